"""From the command to the first answer: `python -m benchmarks.startup_time [--quick]`.

`--help`, and the demo's first training step under `accelerate launch` with prepared features.
"""

import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.measuring import ROOT, Row, run_as_benchmark, work_folder

HELP_SECONDS, FIRST_STEP_SECONDS = 3.0, 12.0


def help_seconds() -> float:
    """Returns how long `run_classification.py --help` takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "run_classification.py", "--help"], cwd=ROOT, capture_output=True, check=True)
    return time.perf_counter() - start


def first_step_seconds() -> float:
    """Returns how long it takes until the demo's progress bar shows its first step."""
    folder = work_folder() / "startup"
    shutil.rmtree(folder, ignore_errors=True)
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--quiet", "--num_processes", "1",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "run_classification.py",
               "recipes/demo.json",
               "--max_steps", "2", "--output_dir", str(folder)]  # fmt: skip
    start = time.perf_counter()
    shown = b""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while b"1/2 [" not in shown:
            character = process.stdout.read(1)
            if not character:
                raise SystemExit(f"the demo ended before its first step:\n{shown[-2000:].decode()}")
            shown += character
        seconds = time.perf_counter() - start
        process.stdout.read()
    return seconds


def measure(quick: bool = False) -> list[Row]:
    """Returns the rows of item 9; the first run warms the caches."""
    rounds = 1 if quick else 5
    help_seconds(), first_step_seconds()
    answered = statistics.median(help_seconds() for _ in range(rounds))
    stepped = statistics.median(first_step_seconds() for _ in range(rounds))
    return [
        Row("run_classification.py --help", "", f"{answered:.1f} s", "", f"< {HELP_SECONDS:g} s", answered < HELP_SECONDS),
        Row("the demo's first training step, warm cache", "", f"{stepped:.1f} s", "", f"< {FIRST_STEP_SECONDS:g} s",
            stepped < FIRST_STEP_SECONDS),
    ]  # fmt: skip


if __name__ == "__main__":
    run_as_benchmark(measure)
