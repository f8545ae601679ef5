"""What a run leaves behind to be read: tables on the screen, JSON, CSV and figures."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from speech_emotion.metrics import SCORES, Evaluation, softmax
from speech_emotion.splits import clip_names

logger = logging.getLogger(__name__)

TITLES = {"accuracy": "Accuracy", "uar": "UAR", "f1_macro": "Macro F1"}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON whole or not at all, so that a full disk leaves the file that was there."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def write_predictions(evaluation: Evaluation, clips: Dataset, path: Path) -> None:
    """Writes the CSV with the columns clip, label, prediction and probability_CLASS, one row a clip."""
    names = np.array(evaluation.label_names)
    frame = pd.DataFrame(
        {
            "clip": np.array(clip_names(clips))[evaluation.clips],
            "label": names[evaluation.references],
            "prediction": names[evaluation.predictions],
        }
    )
    probabilities = softmax(evaluation.logits)
    for index, name in enumerate(names):
        frame[f"probability_{name}"] = probabilities[:, index].round(6)
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


def draw_figures(evaluation: Evaluation, history: pd.DataFrame, folder: Path) -> list[Path]:
    """Draws confusion_matrix.png and training_curves.png and returns their paths."""
    plt = _load_pyplot()
    paths = [folder / "confusion_matrix.png", folder / "training_curves.png"]
    figure, axes = plt.subplots(figsize=(1.2 + 0.8 * len(evaluation.label_names), 1 + 0.8 * len(evaluation.label_names)))
    _draw_confusion_matrix(axes, evaluation)
    figure.savefig(paths[0], dpi=150, bbox_inches="tight")
    plt.close(figure)

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
    figure.savefig(paths[1], dpi=150)
    plt.close(figure)
    return paths


def _draw_confusion_matrix(axes: Any, evaluation: Evaluation) -> None:
    matrix, names = evaluation.confusion_matrix, evaluation.label_names
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    for i, j in np.ndindex(matrix.shape):
        color = "white" if shares[i, j] > 0.5 else "black"
        axes.text(j, i, f"{shares[i, j]:.0%}\n{matrix[i, j]}", ha="center", va="center", color=color, fontsize=8)
