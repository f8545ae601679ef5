"""Says whether one run is better than another, on the same test clips.

    python -m speech_emotion.compare runs/wav2vec2 runs/wavlm

It reads the two `predictions.csv`. The difference gets an interval from a paired bootstrap: whole speakers (or sentences) are
drawn, the same for both runs, since the clips of one speaker stand or fall together. McNemar's exact test counts the clips
that only one of the runs has right. Folders of several runs (cross-validation, seeds) are compared as a whole.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from speech_emotion.corpora.table import GROUP_COLUMNS
from speech_emotion.errors import UserError, list_offenders, run_as_command
from speech_emotion.metrics import (
    MIN_CLUSTERS,
    SCORES,
    compute_confusion_matrix,
    compute_interval,
    draw_weights,
    resample_matrices,
)

PREDICTIONS_FILE = "predictions.csv"


def compare_runs(first: Path, second: Path) -> dict[str, Any]:
    """Compares the predictions of two output folders.

    Returns:
        `num_clips`; `clustered_by`; for accuracy, uar and f1_macro `NAME_a`, `NAME_b`, `NAME_difference` (B minus A) and its
        `NAME_difference_ci95`; `only_a_right` and `only_b_right` (clips) with `mcnemar_p` (two-sided, exact), null where a
        clip has several predictions; and `verdict`, a sentence.

    Raises:
        UserError: no predictions, other clips, or other labels.

    Source: paired bootstrap of clusters, B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13;
        Q. McNemar, Psychometrika 12, 1947.
    """
    a, b = _read(first), _read(second)
    _check_same_clips(a, b, first, second)
    names = sorted(set(a["label"]) | set(a["prediction"]) | set(b["prediction"]))
    unit, cluster_of_clip = _choose_clusters(a)
    num_clusters = max(cluster_of_clip.values()) + 1
    weights = draw_weights(num_clusters)
    result: dict[str, Any] = {"a": str(first), "b": str(second), "num_clips": len(set(a["clip"])), "clustered_by": unit}
    matrices, draws = [], []
    for frame in (a, b):
        references, predictions = (np.array([names.index(name) for name in frame[column]]) for column in ("label", "prediction"))
        clusters = np.array([cluster_of_clip[clip] for clip in frame["clip"]])
        matrices.append(compute_confusion_matrix(predictions, references, len(names)))
        draws.append(resample_matrices(weights, clusters, references, predictions, len(names)))
    for name, score in SCORES.items():
        result[f"{name}_a"], result[f"{name}_b"] = (float(score(matrix)) for matrix in matrices)
        result[f"{name}_difference"] = result[f"{name}_b"] - result[f"{name}_a"]
        result[f"{name}_difference_ci95"] = list(compute_interval(score(draws[1]) - score(draws[0])))
    result |= _test_mcnemar(a, b)
    result["verdict"] = _judge(result)
    return result


def _read(folder: Path) -> pd.DataFrame:
    path = folder / PREDICTIONS_FILE if folder.is_dir() else folder
    if not path.is_file():
        raise UserError(f"{path}: there are no predictions. Name the output folder of a finished run.")
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as CSV ({str(error).splitlines()[0]}).") from error
    absent = [column for column in ("clip", "label", "prediction") if column not in frame.columns]
    if absent or frame.empty:
        raise UserError(f"{path}: " + (f"has no column '{absent[0]}'." if absent else "lists no clips."))
    return frame


def _check_same_clips(a: pd.DataFrame, b: pd.DataFrame, first: Path, second: Path) -> None:
    labels = [dict(zip(frame["clip"], frame["label"], strict=True)) for frame in (a, b)]
    alone = [f"{clip} (only in {folder})" for one, other, folder in ((0, 1, first), (1, 0, second))
             for clip in sorted(labels[one].keys() - labels[other].keys())]  # fmt: skip
    if alone:
        raise UserError(
            f"{first} and {second} were tested on different clips, {len(alone)} of them:\n{list_offenders(alone)}\n"
            "Train both with the same split: the same split_seed, test_groups or cross_validation."
        )
    changed = [clip for clip, label in labels[0].items() if labels[1][clip] != label]
    if changed:
        raise UserError(f"{first} and {second} give {len(changed)} clips different labels:\n{list_offenders(changed)}")


def _choose_clusters(frame: pd.DataFrame) -> tuple[str, dict[str, int]]:
    """Returns what is drawn, and the cluster of each clip: as `metrics.choose_clusters`, from the table of predictions."""
    for column in GROUP_COLUMNS:
        if column in frame.columns and "" not in set(frame[column]) and frame[column].nunique() >= MIN_CLUSTERS:
            return column.removesuffix("_id"), dict(zip(frame["clip"], pd.factorize(frame[column])[0], strict=True))
    return "clip", dict(zip(frame["clip"], pd.factorize(frame["clip"])[0], strict=True))


def _test_mcnemar(a: pd.DataFrame, b: pd.DataFrame) -> dict[str, Any]:
    if a["clip"].duplicated().any() or b["clip"].duplicated().any():
        return {"only_a_right": None, "only_b_right": None, "mcnemar_p": None}
    right = [(frame.set_index("clip")["prediction"] == frame.set_index("clip")["label"]).sort_index() for frame in (a, b)]
    only_a, only_b = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    p = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return {"only_a_right": only_a, "only_b_right": only_b, "mcnemar_p": p}


def _judge(result: dict[str, Any]) -> str:
    low, high = result["uar_difference_ci95"]
    if low > 0 or high < 0:
        better, other = ("B", "A") if low > 0 else ("A", "B")
        return f"{better} is better than {other}: the interval of the difference in UAR leaves zero out."
    return (
        f"Neither is shown to be better: on these clips, the difference in UAR may lie anywhere from {low:+.3f} to {high:+.3f}."
    )


def format_comparison(result: dict[str, Any]) -> str:
    """Returns the table for the screen."""
    lines = [
        f"A: {result['a']}",
        f"B: {result['b']}",
        f"{result['num_clips']} test clips, {result['clustered_by']}s drawn",
        "",
        "                A       B   B - A   95 % interval",
    ]
    for name, title in (("uar", "UAR"), ("accuracy", "Accuracy"), ("f1_macro", "Macro F1")):
        low, high = result[f"{name}_difference_ci95"]
        lines.append(
            f"  {title:10} {result[f'{name}_a']:6.3f}  {result[f'{name}_b']:6.3f}  {result[f'{name}_difference']:+6.3f}   "
            f"{low:+.3f} to {high:+.3f}"
        )
    if result["mcnemar_p"] is None:
        lines += ["", "McNemar's test needs one prediction a clip; here some clips have several."]
    else:
        lines += [
            "",
            f"McNemar: only A is right on {result['only_a_right']} clips, only B on {result['only_b_right']}; "
            f"p = {result['mcnemar_p']:.3g} (it takes clips for independent)",
        ]
    return "\n".join([*lines, "", result["verdict"]])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Reads the command line, prints the comparison and returns it."""
    parser = argparse.ArgumentParser(
        prog="python -m speech_emotion.compare", description="Says whether run B is better than run A on the same test clips."
    )
    parser.add_argument("run_a", type=Path, help="output folder of a run, of a cross-validation or of several seeds")
    parser.add_argument("run_b", type=Path, help="the other")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    result = compare_runs(arguments.run_a, arguments.run_b)
    print(json.dumps(result, indent=2) if arguments.json else format_comparison(result))
    return result


if __name__ == "__main__":
    run_as_command(main)
