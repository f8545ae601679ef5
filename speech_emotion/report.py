"""What a run leaves behind to be read: tables on the screen, JSON, CSV and figures."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from speech_emotion.corpora.table import GROUP_COLUMNS
from speech_emotion.metrics import SCORES, Evaluation
from speech_emotion.splits import clip_names

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"
TITLES = {"accuracy": "Accuracy", "uar": "UAR", "f1_macro": "Macro F1"}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON whole or not at all, so that a full disk leaves the file that was there."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_predictions(evaluation: Evaluation, clips: Dataset, path: Path) -> None:
    """Writes the CSV with the columns clip, label, prediction, probability_CLASS, loss (nats) and those groups that are known."""
    names = np.array(evaluation.label_names)
    frame = pd.DataFrame(
        {
            "clip": np.array(clip_names(clips))[evaluation.clips],
            "label": names[evaluation.references],
            "prediction": names[evaluation.predictions],
        }
    )
    probabilities = evaluation.probabilities
    for index, name in enumerate(names):
        frame[f"probability_{name}"] = probabilities[:, index].round(6)
    frame["loss"] = evaluation.losses.round(6)
    table = clips.select(evaluation.clips)
    for column in GROUP_COLUMNS:
        if any(value is not None for value in table[column]):
            frame[column] = list(table[column])
    frame.to_csv(path, index=False)


def format_results(results: dict[str, Any], prefix: str, notes: list[str]) -> str:
    """Returns the table of results for the screen."""
    unit = results[f"{prefix}_ci95_clustered_by"]
    lines = [f"{prefix.capitalize()} results on {results[f'{prefix}_num_clips']} clips", ""]
    rows = [(TITLES[name], f"{prefix}_{name}") for name in SCORES]
    rows += [(f"Recall of {name}", f"{prefix}_recall_{name}") for name in results[f"{prefix}_labels"]]
    width = max(len(title) for title, _ in rows)
    lines.append(f"  {'':{width}}          95 % interval")
    for title, key in rows:
        if key in results:
            low, high = results[f"{key}_ci95"]
            lines.append(f"  {title:{width}}  {results[key]:6.3f}  {low:.3f} to {high:.3f}")
    lines.append(
        f"  {'Log loss':{width}}  {results[f'{prefix}_log_loss']:6.3f}  calibration error {results[f'{prefix}_ece']:.3f}"
    )
    lines += ["", f"  Intervals: bootstrap over {unit}s. Chance is {1 / len(results[f'{prefix}_labels']):.3f} UAR."]
    return "\n".join(lines + [f"  {note}" for note in notes])


def write_history(log_history: list[dict[str, Any]], path: Path) -> pd.DataFrame:
    """Writes what was logged while training, one row an entry, and returns it."""
    frame = pd.DataFrame(log_history)
    frame.to_csv(path, index=False)
    return frame


def _load_pyplot() -> Any:
    import matplotlib  # here, since only the main process at a run's end needs it

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_layers(uar: np.ndarray, chosen: int, path: Path) -> Path:
    """Draws the validation UAR of each layer, (num_layers,), the chosen one marked, and returns the figure's path."""
    plt = _load_pyplot()
    figure, axes = plt.subplots(figsize=(6, 3.2))
    layers = np.arange(1, len(uar) + 1)
    axes.plot(layers, uar, marker="o", markersize=4)
    axes.plot(chosen, uar[chosen - 1], marker="o", markersize=10, fillstyle="none", color="black", label=f"taken: layer {chosen}")
    axes.set_xticks(layers)
    axes.set_xlabel("layer")
    axes.set_ylabel("UAR")
    axes.set_title("Validation, a linear classifier on each layer")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def draw_results(results: dict[str, Any], prefix: str, folder: Path) -> list[Path]:
    """Draws confusion_matrix.png, per_class.png and calibration.png of `metrics.summarize` and returns their paths."""
    plt = _load_pyplot()
    path, names = folder / "confusion_matrix.png", results[f"{prefix}_labels"]
    figure, axes = plt.subplots(figsize=(1.2 + 0.8 * len(names), 1 + 0.8 * len(names)))
    _draw_confusion_matrix(axes, np.array(results[f"{prefix}_confusion_matrix"]), names)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    tested = [name for name in names if f"{prefix}_recall_{name}" in results]
    values = [results[f"{prefix}_recall_{name}"] for name in tested]
    intervals = [results[f"{prefix}_recall_{name}_ci95"] for name in tested]
    return [
        path,
        draw_bars(folder / "per_class.png", "Recall, with 95 % interval", tested, values, intervals, 1 / len(tested)),
        draw_reliability(results[f"{prefix}_reliability"], results[f"{prefix}_ece"], folder / "calibration.png"),
    ]


def draw_history(history: pd.DataFrame, path: Path) -> Path:
    """Draws losses and validation scores over the epochs and returns the figure's path."""
    plt = _load_pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    for name, axes in (("loss", left), ("eval_loss", left), ("eval_uar", right), ("eval_accuracy", right)):
        if name in history:
            points = history[["epoch", name]].dropna()
            title = {"loss": "training", "eval_loss": "validation", "eval_uar": "UAR", "eval_accuracy": "accuracy"}[name]
            style = "--" if name == "eval_accuracy" else "-"  # on balanced splits it lies on the UAR
            axes.plot(points["epoch"], points[name], style, label=title, marker="o" if len(points) < 30 else None, markersize=3)
    for axes, title in ((left, "Loss"), (right, "Validation")):
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    right.set_ylim(0, 1)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def draw_bars(
    path: Path,
    title: str,
    names: list[str],
    values: list[float],
    intervals: list[tuple[float, float]] | None = None,
    chance: float | None = None,
    colors: list[str] | None = None,
) -> Path:
    """Draws horizontal bars between 0 and 1, the first on top, and returns the figure's path.

    Args:
        path: of the PNG.
        title: above the bars.
        names: of the bars.
        values: their lengths.
        intervals: low and high end of each, drawn as whiskers.
        chance: drawn as a dotted line.
        colors: of the bars.
    """
    plt = _load_pyplot()
    figure, axes = plt.subplots(figsize=(6.5, 0.9 + 0.36 * len(names)))
    places = np.arange(len(names))[::-1]
    errors = None
    if intervals is not None:
        bounds = np.array(intervals)
        errors = np.clip(np.stack([values - bounds[:, 0], bounds[:, 1] - values]), 0, None)
    axes.barh(places, values, xerr=errors, color=colors or "C0", height=0.65, error_kw={"linewidth": 1, "capsize": 3})
    axes.set_yticks(places, names)
    axes.set_xlim(0, 1)
    if chance is not None:
        axes.axvline(chance, color="black", linestyle=":", linewidth=1)
    axes.set_title(title)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return path


def draw_lines(path: Path, title: str, x_title: str, y_title: str, series: dict[str, list[tuple[float, float]]]) -> Path:
    """Draws lines through (x, y) points, y between 0 and 1, and returns the figure's path."""
    plt = _load_pyplot()
    figure, axes = plt.subplots(figsize=(6, 3.6))
    for name, points in series.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(title=title, xlabel=x_title, ylabel=y_title, ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return path


def draw_reliability(reliability: list[dict[str, float]], ece: float, path: Path) -> Path:
    """Draws accuracy over confidence, of `metrics.compute_reliability`, and returns the figure's path."""
    plt = _load_pyplot()
    figure, axes = plt.subplots(figsize=(4, 4))
    axes.plot([0, 1], [0, 1], "k--", linewidth=1)
    sizes = np.array([entry["num_clips"] for entry in reliability])
    xs, ys = ([entry[key] for entry in reliability] for key in ("confidence", "accuracy"))
    axes.plot(xs, ys, linewidth=1)
    axes.scatter(xs, ys, s=10 + 120 * sizes / sizes.max())
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", title=f"Calibration error {ece:.3f}")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return path


def _draw_confusion_matrix(axes: Any, matrix: np.ndarray, names: list[str]) -> None:
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    for i, j in np.ndindex(matrix.shape):
        color = "white" if shares[i, j] > 0.5 else "black"
        axes.text(j, i, f"{shares[i, j]:.0%}\n{matrix[i, j]}", ha="center", va="center", color=color, fontsize=8)
