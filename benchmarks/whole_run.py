"""One epoch with evaluation, from the command to the saved model: `python -m benchmarks.whole_run [--quick]`.

`--once` runs each side once instead of three times: on two cores the other side takes seven minutes.
`plain_trainer` against `run_classification.py` on the same clips, split and initial weights of wav2vec2-base's shape.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.measuring import (
    ROOT,
    Row,
    compare,
    in_turn,
    make_clips,
    run_as_benchmark,
    save_model,
    split_into_folders,
    work_folder,
)

LOSS_TOLERANCE = 0.05
ONCE = "--once"
LEARNING_RATE = "3e-5"


def run_process(command: list[str]) -> dict[str, Any]:
    """Runs a command and returns its wall time, the last line it printed, and the most memory that a process of it held."""
    start = time.perf_counter()
    # A process of its own in between, whose children's peak is then this command's alone.
    waiter = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:], capture_output=True, text=True);"
        "print(done.stdout.strip().splitlines()[-1] if done.stdout.strip() else '');"
        "print(done.stderr[-3000:], file=sys.stderr);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024); sys.exit(done.returncode)"
    )
    done = subprocess.run([sys.executable, "-c", waiter, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    last, peak = done.stdout.strip().splitlines()[-2:]
    return {"seconds": time.perf_counter() - start, "last": last, "peak": float(peak)}


def run_plain(data: Path, model: Path, folder: Path) -> dict[str, Any]:
    """Runs the other side and returns seconds, peak memory, validation loss and steps."""
    shutil.rmtree(folder, ignore_errors=True)
    done = run_process(
        [sys.executable, "-m", "benchmarks.plain_trainer", "--data_dir", str(data), "--model_name_or_path", str(model),
         "--output_dir", str(folder), "--learning_rate", LEARNING_RATE]
    )  # fmt: skip
    results = json.loads(done["last"])
    return done | {"loss": results["eval_loss"], "steps": results["steps"]}


def run_ours(data: Path, model: Path, folder: Path) -> dict[str, Any]:
    """Runs ours, with nothing cached before, and returns the same."""
    shutil.rmtree(folder, ignore_errors=True)
    done = run_process(
        [sys.executable, "run_classification.py", "--dataset_name", "audio_folder", "--data_dir", str(data),
         # What the other side has no counterpart for: the examination of the trained model.
         "--audit", "false", "--robustness", "false", "--report", "false",
         "--model_name_or_path", str(model), "--freeze", "feature_encoder", "--output_dir", str(folder),
         "--num_train_epochs", "1", "--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "8",
         "--learning_rate", LEARNING_RATE, "--warmup_steps", "0.1", "--cache_dir", str(folder / "cache"), "--seed", "0"]
    )  # fmt: skip
    history = pd.read_csv(folder / "history.csv")
    shutil.rmtree(folder / "cache", ignore_errors=True)
    return done | {"loss": float(history["eval_loss"].dropna().iloc[-1]), "steps": int(history["step"].max())}


def measure(quick: bool = False) -> list[Row]:
    """Returns the rows of item 7."""
    work = work_folder()
    clips = make_clips(work / ("few_clips" if quick else "clips"), 40 if quick else 240)
    data = split_into_folders(clips, work / ("few_split" if quick else "split"))
    model = save_model(work / "wav2vec2-base")
    runs: dict[str, list[dict[str, Any]]] = {"other": [], "ours": []}

    def take(side: str, result: dict[str, Any]) -> float:
        runs[side].append(result)
        return result["seconds"]

    rounds = 1 if quick or ONCE in sys.argv else 3
    seconds = in_turn({"other": lambda: take("other", run_plain(data, model, work / "plain")),
                       "ours": lambda: take("ours", run_ours(data, model, work / "whole"))}, rounds)  # fmt: skip
    other, ours = ({key: min(run[key] for run in runs[side]) for key in ("peak", "loss", "steps")} for side in ("other", "ours"))
    size = f"{40 if quick else 240} clips"
    memory = ours["peak"] / other["peak"]
    return [
        compare(f"whole run, one epoch of {size}, wav2vec2-base shape", seconds["other"], seconds["ours"], "s", 2.5, False),
        Row("its peak memory", f"{other['peak'] / 2**20:,.0f} MiB", f"{ours['peak'] / 2**20:,.0f} MiB", f"{1 / memory:.2f}x",
            ">= 1x", memory <= 1),
        Row(f"its validation loss after {other['steps']:.0f} and {ours['steps']:.0f} steps", f"{other['loss']:.3f}",
            f"{ours['loss']:.3f}", "", f"<= other + {LOSS_TOLERANCE:g}", ours["loss"] <= other["loss"] + LOSS_TOLERANCE),
    ]  # fmt: skip


if __name__ == "__main__":
    run_as_benchmark(measure)
