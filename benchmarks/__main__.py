"""The quick set of all benchmarks, in one table: `python -m benchmarks` (`make bench`), under five minutes on two cores."""

import time

from benchmarks import data_road, frozen_parts, inference_speed, startup_time, training_step, whole_run
from benchmarks.measuring import describe_machine, format_rows, quiet_libraries

MODULES = (startup_time, data_road, training_step, frozen_parts, whole_run, inference_speed)


def main() -> None:
    """Measures, and prints the table."""
    start = time.perf_counter()
    quiet_libraries()
    print(describe_machine(), flush=True)
    rows = []
    for module in MODULES:
        began = time.perf_counter()
        rows += module.measure(quick=True)
        print(f"{module.__name__.rpartition('.')[2]}: {time.perf_counter() - began:.0f} s", flush=True)
    print(f"\n{format_rows(rows)}\n\n{time.perf_counter() - start:.0f} s in all. Whole measurements: benchmarks/README.md.")


if __name__ == "__main__":
    main()
