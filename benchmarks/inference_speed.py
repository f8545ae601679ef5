"""A trained model on many files: `python -m benchmarks.inference_speed [--quick]`.

`speech_emotion.inference` against `pipeline("audio-classification")` on the same CPU: given the files (which pipeline decodes
with one ffmpeg process each, where ffmpeg is installed), and given arrays (decoding and resampling in Python for both).
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import soundfile
from transformers import pipeline

from benchmarks.measuring import ROOT, Row, compare, in_turn, link_clips, make_clips, run_as_benchmark, save_model, work_folder
from speech_emotion.inference import load_classifier

TOLERANCE = 1e-3


def train_demo() -> Path:
    """Trains the demo once and returns its folder."""
    folder = work_folder() / "demo"
    if not (folder / "all_results.json").exists():
        command = [sys.executable, "run_classification.py", "recipes/demo.json", "--output_dir", str(folder),
                   "--num_train_epochs", "3", "--overwrite_output_dir"]  # fmt: skip
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return folder


def measure_model(name: str, model: Path, files: list[str], rounds: int, as_files: bool) -> list[Row]:
    """Returns clips a second of both sides, and the largest difference of a probability."""
    other = pipeline("audio-classification", model=str(model), device="cpu", top_k=None)
    ours, fast = (load_classifier(model, "cpu", bf16=bf16) for bf16 in (False, True))
    arrays = [dict(zip(("array", "sampling_rate"), soundfile.read(path, dtype="float32"), strict=True)) for path in files]
    answers: dict[str, np.ndarray] = {}

    def run_pipeline() -> float:
        start = time.perf_counter()
        results = other(list(files)) if as_files else other([dict(array) for array in arrays])
        seconds = time.perf_counter() - start
        scores = [{entry["label"]: entry["score"] for entry in result} for result in results]
        answers["other"] = np.array([[score[label] for label in ours.label_names] for score in scores])
        return len(files) / seconds

    def run_ours(classifier: object, side: str) -> float:
        start = time.perf_counter()
        results = classifier.classify(files if as_files else arrays)
        seconds = time.perf_counter() - start
        answers[side] = np.array([result.probabilities for result in results])
        return len(files) / seconds

    sides = {"other": run_pipeline, "ours": lambda: run_ours(ours, "ours")}
    if fast.bf16:
        sides["bf16"] = lambda: run_ours(fast, "bf16")
    rates = in_turn(sides, rounds)
    given = "files" if as_files else "arrays"
    rows = [compare(f"inference, {name}, {len(files)} {given}", rates["other"], rates["ours"], "clips/s", 3)]
    difference = np.abs(answers["ours"] - answers["other"]).max()
    rows.append(Row("  its probabilities", "", f"{difference:.1e} apart", "", f"< {TOLERANCE:g}", bool(difference < TOLERANCE)))
    if fast.bf16:
        row = compare(f"  the same with bf16=True ({np.abs(answers['bf16'] - answers['other']).max():.0e} apart)",
                      rates["other"], rates["bf16"], "clips/s", 3)  # fmt: skip
        row.goal, row.met = "", None
        rows.append(row)
    return rows


def measure(quick: bool = False) -> list[Row]:
    """Returns the rows of item 10."""
    work, rows = work_folder(), []
    recordings = sorted(str(path) for path in (ROOT / "assets" / "polish_emotions").glob("*.flac"))
    files = recordings[:100] if quick else (recordings * 3)[:1000]
    demo = train_demo()
    if shutil.which("ffmpeg"):
        rows += measure_model("the demo's model", demo, files, 1 if quick else 3, as_files=True)
    rows += measure_model("the demo's model", demo, files, 1 if quick else 3, as_files=False)
    if not quick:
        clips = make_clips(work / "clips", 240)
        many = sorted(str(path) for path in link_clips(clips, work / "clips_720", 3).rglob("*.wav"))
        rows += measure_model("wav2vec2-base shape", save_model(work / "wav2vec2-base"), many[:60], 3, as_files=False)
    return rows


if __name__ == "__main__":
    run_as_benchmark(measure)
