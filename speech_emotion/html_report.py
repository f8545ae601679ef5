"""The report: one HTML file that needs no network and no script, on any screen, in light and dark.

Whatever comes from files, labels or speakers is escaped by Jinja, and the page forbids scripts and requests to itself.
"""

import base64
import io
import json
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import soundfile
from datasets import Dataset

from speech_emotion.analysis import MAX_GROUPS_SHOWN
from speech_emotion.corpora.table import SPLITS, read_waveforms
from speech_emotion.report import TITLES
from speech_emotion.splits import Split

TEMPLATES = Path(__file__).parent / "templates"
MAX_CLIP_SECONDS = 10.0  # of a clip's audio and spectrogram in the page, so that it stays a few megabytes
SPECTROGRAM_SAMPLES, SPECTROGRAM_HOP = 512, 160
SPECTROGRAM_RANGE_DB = 80.0
# Where a chart's axes lie within its 360 x 200 units.
LEFT, RIGHT, TOP, BOTTOM = 46, 350, 10, 168


def render(context: dict[str, Any]) -> str:
    """Returns the page; all values are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=_Empty
    )
    return environment.get_template("report.html").render(context)


class _Empty(jinja2.Undefined):
    """A section that a report has not: false, and an error where it is printed."""

    __str__ = jinja2.StrictUndefined.__str__


def describe_results(results: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Returns the parts of the page that stand on one evaluation: headline figures, matrix, classes and calibration.

    Args:
        results: of `metrics.summarize`.
        prefix: that it was given.
    """
    names = results[f"{prefix}_labels"]
    matrix = np.array(results[f"{prefix}_confusion_matrix"])
    totals = np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    cards = [
        {"title": title, "value": results[f"{prefix}_{key}"], "interval": results.get(f"{prefix}_{key}_ci95"), "note": note}
        for key, title, note in [*((key, title, "") for key, title in TITLES.items()), ("log_loss", "Log loss", "nats"),
                                 ("ece", "Calibration error", "15 bins")]
    ]  # fmt: skip
    classes = [
        {
            "name": name,
            "num_clips": int(matrix[i].sum()),
            "recall": results[f"{prefix}_recall_{name}"],
            "recall_interval": results[f"{prefix}_recall_{name}_ci95"],
            "precision": results.get(f"{prefix}_precision_{name}"),
            "precision_interval": results.get(f"{prefix}_precision_{name}_ci95"),
        }
        for i, name in enumerate(names)
        if f"{prefix}_recall_{name}" in results
    ]
    order = [cards[1], cards[0], *cards[2:]]  # UAR first: it is the field's main figure
    bins = results[f"{prefix}_reliability"]
    most = max(entry["num_clips"] for entry in bins)
    points = [(entry["confidence"], entry["accuracy"], 2 + 7 * (entry["num_clips"] / most) ** 0.5) for entry in bins]
    reliability = build_chart("confidence and accuracy", "confidence", {"test clips": points}, (0, 1), (0, 1))
    reliability["diagonal"] = (LEFT, BOTTOM, RIGHT, TOP)
    return {
        "cards": order,
        "names": names,
        "num_clips": results[f"{prefix}_num_clips"],
        "chance": 1 / len(classes),
        "matrix_rows": [[{"share": float(share), "count": int(count)} for share, count in zip(*row, strict=True)]
                        for row in zip(matrix / totals, matrix, strict=True)],
        "classes": classes,
        "reliability": reliability,
        "ece": results[f"{prefix}_ece"],
        "interval_note": f"Below each figure its 95 % interval, from a bootstrap over {results[f'{prefix}_ci95_clustered_by']}s "
        f"of {results[f'{prefix}_num_clips']} test clips. Chance is {1 / len(classes):.3f} UAR.",
    }  # fmt: skip


def describe_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the groups of each kind, the worst ones where there are many."""
    described = []
    for by in dict.fromkeys(row["by"] for row in groups):
        rows = [row for row in groups if row["by"] == by]
        if len(rows) < 2:
            continue
        shown = rows if len(rows) <= MAX_GROUPS_SHOWN else sorted(rows, key=lambda row: row["uar"])[:MAX_GROUPS_SHOWN]
        described.append({"by": by, "rows": shown, "cut": len(rows) > len(shown), "total": len(rows)})
    return described


def describe_split(split: Split) -> dict[str, Any]:
    """Returns the parts of the page on the data: sizes, overlaps, protocol and notes."""
    names, labels = split.clips.features["label"].names, np.asarray(split.clips["label"][:])
    durations = np.asarray(split.clips["duration"][:], dtype=float)
    sizes = [
        {"split": name, "num_clips": len(rows), "minutes": float(np.nansum(durations[rows])) / 60,
         "counts": np.bincount(labels[rows], minlength=len(names)).tolist()}
        for name in SPLITS
        for rows in [split.indices(name)]
    ]  # fmt: skip
    apart = " and no ".join(column.removesuffix("_id") for column in split.split_by)
    protocol = f"No {apart} is in more than one split." if apart else "The clips were split singly."
    return {"split_sizes": sizes, "overlaps": split.overlaps, "protocol": protocol, "notes": split.notes}


def describe_worst_clips(worst: list[dict[str, Any]], clips: Dataset, sampling_rate: int, with_audio: bool) -> dict[str, Any]:
    """Returns the worst clips, with spectrogram (PNG) and audio (FLAC, 16 bits) in base64 where audio may be shown."""
    shown = {}
    if with_audio:
        for row, waveform in read_waveforms(clips, [entry["row"] for entry in worst], sampling_rate):
            part = waveform[: round(MAX_CLIP_SECONDS * sampling_rate)]
            shown[row] = {"image": base64.b64encode(draw_spectrogram(part)).decode(), "audio": encode_audio(part, sampling_rate)}
    return {"worst": [entry | shown.get(entry["row"], {}) for entry in worst], "nyquist_khz": sampling_rate / 2000}


def describe_history(history: pd.DataFrame) -> list[dict[str, Any]]:
    """Returns the charts of losses and of validation scores over the epochs."""
    charts = []
    for title, columns in (
        ("Loss", {"loss": "training", "eval_loss": "validation"}),
        ("Validation", {"eval_uar": "UAR", "eval_accuracy": "accuracy"}),
    ):
        series = {}
        for column, name in columns.items():
            if column in history:
                points = history[["epoch", column]].dropna()
                series[name] = [(float(x), float(y)) for x, y in points.itertuples(index=False)]
        series = {name: points for name, points in series.items() if points}
        if series:
            charts.append(build_chart(title, "epoch", series, y_range=(0, 1) if title == "Validation" else None))
    return charts


def describe_layers(uar: np.ndarray, chosen: int) -> dict[str, Any]:
    """Returns the chart of each layer's validation UAR, (num_layers,)."""
    points = [(float(layer), float(score)) for layer, score in enumerate(uar, start=1)]
    return {"chosen": chosen, "chart": build_chart("layers", "layer", {"validation UAR": points})}


def build_chart(
    title: str,
    x_title: str,
    series: dict[str, list[tuple[float, ...]]],
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Returns what the template draws: lines and dots of (x, y) or (x, y, radius), within a frame of 360 x 200 units."""
    xs, ys = ([point[axis] for points in series.values() for point in points] for axis in (0, 1))
    x_ticks = _choose_ticks(*(x_range or (min(xs), max(xs))))
    y_ticks = _choose_ticks(*(y_range or (min(0.0, *ys), max(ys))))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            round(LEFT + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (RIGHT - LEFT), 1),
            round(BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (BOTTOM - TOP), 1),
        )

    lines = []
    for number, (name, points) in enumerate(series.items(), start=1):
        placed = [place(x, y) for x, y, *_ in points]
        radius = 3.0 if len(points) <= 40 else 0.0
        dots = [(*at, round(point[2], 1) if len(point) > 2 else radius) for at, point in zip(placed, points, strict=True)]
        lines.append({"name": name, "number": number, "points": " ".join(f"{x},{y}" for x, y in placed), "dots": dots})
    return {
        "title": title,
        "x_title": x_title,
        "series": lines,
        "diagonal": None,
        "x_ticks": [{"at": place(tick, y_ticks[0])[0], "name": f"{tick:g}"} for tick in x_ticks],
        "y_ticks": [{"at": place(x_ticks[0], tick)[1], "name": f"{tick:g}"} for tick in y_ticks],
    }


def _choose_ticks(low: float, high: float) -> list[float]:
    """Returns round numbers, four to seven of them, that reach from below `low` to above `high`."""
    if high <= low:
        high = low + 1
    raw = (high - low) / 5
    step = 10.0 ** np.floor(np.log10(raw))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if factor * step >= raw * (1 - 1e-9))
    first, last = np.floor(low / step + 1e-9), np.ceil(high / step - 1e-9)
    return [round(float(number * step), 10) for number in np.arange(first, last + 1)]


def encode_audio(waveform: np.ndarray, sampling_rate: int) -> str:
    """Returns a waveform, (num_samples,), as base64 of FLAC, which every browser plays."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(waveform, -1, 1), sampling_rate, format="FLAC", subtype="PCM_16")
    return base64.b64encode(buffer.getvalue()).decode()


def draw_spectrogram(waveform: np.ndarray) -> bytes:
    """Returns a spectrogram of 80 dB, (num_samples,) as a PNG, low frequencies at the bottom."""
    import matplotlib.image  # here, since only a run's end needs it

    padded = np.pad(waveform, (0, max(0, SPECTROGRAM_SAMPLES - len(waveform))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, SPECTROGRAM_SAMPLES)[::SPECTROGRAM_HOP]
    power = np.abs(np.fft.rfft(frames * np.hanning(SPECTROGRAM_SAMPLES), axis=1)).T ** 2
    levels = 10 * np.log10(np.maximum(power, 1e-12))
    buffer = io.BytesIO()
    top = levels.max()
    matplotlib.image.imsave(buffer, levels, format="png", cmap="magma", origin="lower", vmin=top - SPECTROGRAM_RANGE_DB, vmax=top)
    return buffer.getvalue()


def dump(content: dict[str, Any]) -> str:
    """Returns JSON to be read in a page."""
    return json.dumps(content, indent=2, ensure_ascii=False)
