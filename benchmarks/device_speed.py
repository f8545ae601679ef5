"""How fast this machine multiplies matrices and copies data: `python -m benchmarks.device_speed`.

The course's exercise done properly: each product is warmed up, the device is synchronised before the clock is read, and
the median of several runs counts. Random data, since zeros multiply faster than anything real. Precisions: float32
("highest", no reduced-precision units), tf32 where CUDA has it, bfloat16. The training benchmarks compare themselves with
these rates.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

NUM_WARM_UPS = 2
MIN_SECONDS = 1.0  # of measuring, for each figure
MIN_RUNS = 5
SIZES = {"cpu": 2048, "cuda": 8192, "mps": 4096}  # large enough to fill the device
COPY_NUM_BYTES = 256 * 2**20


def find_devices() -> list[torch.device]:
    """Returns the CPU and every accelerator."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return devices + ([torch.device("mps")] if torch.backends.mps.is_available() else [])


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all it was given; without it a clock measures how fast work is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def median_seconds(action: Callable[[], object], device: torch.device) -> float:
    """Returns the median duration of an action, in seconds, after warm-ups."""
    for _ in range(NUM_WARM_UPS):
        action()
    synchronize(device)
    durations: list[float] = []
    while len(durations) < MIN_RUNS or sum(durations) < MIN_SECONDS:
        start = time.perf_counter()
        action()
        synchronize(device)
        durations.append(time.perf_counter() - start)
        if sum(durations) > 10 * MIN_SECONDS:  # a precision that the device emulates: one run would do
            break
    return statistics.median(durations)


def matrix_rate(device: torch.device, precision: str, size: int | None = None) -> float:
    """Returns the rate of square matrix products, in floating-point operations a second.

    Args:
        device: where to multiply.
        precision: "float32", "tf32" (CUDA only) or "bfloat16".
        size: rows of the matrices; by default enough to fill the device.
    """
    size = size or SIZES[device.type]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    if precision == "bfloat16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        size //= 4  # emulated, a hundred times slower
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        return 2 * size**3 / median_seconds(lambda: a @ b, device)
    finally:
        torch.set_float32_matmul_precision(before)


def copy_rates(device: torch.device) -> dict[str, float]:
    """Returns bytes a second: within the device (read plus written), and to and from pinned host memory."""
    source = torch.randn(COPY_NUM_BYTES // 4, device=device)
    target = torch.empty_like(source)
    rates = {"within": 2 * COPY_NUM_BYTES / median_seconds(lambda: target.copy_(source), device)}
    if device.type != "cpu":
        host = torch.randn(COPY_NUM_BYTES // 4)
        host = host.pin_memory() if device.type == "cuda" else host
        rates["to_device"] = COPY_NUM_BYTES / median_seconds(lambda: source.copy_(host, non_blocking=True), device)
        rates["from_device"] = COPY_NUM_BYTES / median_seconds(lambda: host.copy_(source, non_blocking=True), device)
    return rates


def measure() -> list[dict[str, object]]:
    """Returns one entry a device: name, FLOP/s for each precision, bytes/s for each copy."""
    results = []
    for device in find_devices():
        precisions = ["float32", *(["tf32"] if device.type == "cuda" else []), "bfloat16"]
        name = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({torch.get_num_threads()} threads)"
        )
        flops = {precision: matrix_rate(device, precision) for precision in precisions}
        results.append({"device": str(device), "name": name, "flops": flops, "copy": copy_rates(device)})
    return results


def main(argv: list[str] | None = None) -> list[dict[str, object]]:
    """Measures, prints the table and, with --output, writes JSON."""
    parser = argparse.ArgumentParser(description="Matrix product and copy rates of every device.")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args(argv)
    results = measure()
    cpu = results[0]["flops"]["float32"]
    print(f"{'device':28} {'precision':10} {'GFLOP/s':>10} {'vs CPU float32':>15}")
    for entry in results:
        for precision, rate in entry["flops"].items():
            print(f"{entry['name']:28} {precision:10} {rate / 1e9:10.1f} {rate / cpu:14.2f}x")
        for kind, rate in entry["copy"].items():
            print(f"{entry['name']:28} copy {kind:12} {rate / 1e9:8.2f} GB/s")
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
