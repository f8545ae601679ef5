"""Where a classifier fails: by speaker, sentence and duration, which classes it confuses, and on which clips it errs most."""

from typing import Any

import numpy as np
from datasets import Dataset

from speech_emotion.corpora.table import GROUP_COLUMNS
from speech_emotion.metrics import Evaluation, compute_accuracy, compute_confusion_matrix, compute_uar
from speech_emotion.splits import clip_names

NUM_QUARTILES = 4
MAX_GROUPS_SHOWN = 40  # of one kind, in the report: beyond, the worst are shown
NUM_PAIRS, NUM_WORST_CLIPS = 6, 12


def compute_group_results(evaluation: Evaluation, clips: Dataset) -> list[dict[str, Any]]:
    """Returns accuracy and UAR of each session, speaker, sentence and quartile of duration among the clips.

    Args:
        evaluation: of the clips.
        clips: the whole corpus table.

    Returns:
        Dictionaries with `by`, `group`, `num_clips`, `accuracy` and `uar` (over the classes that the group has).
    """
    table = clips.select(evaluation.clips)
    groups = {column.removesuffix("_id"): np.asarray(table[column][:], dtype=object) for column in GROUP_COLUMNS}
    groups["duration"] = _name_quartiles(np.asarray(table["duration"][:], dtype=float))
    predictions = evaluation.predictions
    rows = []
    for by, names in groups.items():
        for name in sorted(set(names) - {None}):
            inside = names == name
            matrix = compute_confusion_matrix(predictions[inside], evaluation.references[inside], len(evaluation.label_names))
            rows.append(
                {"by": by, "group": name, "num_clips": int(inside.sum()), "accuracy": float(compute_accuracy(matrix)),
                 "uar": float(compute_uar(matrix))}
            )  # fmt: skip
    return rows


def _name_quartiles(seconds: np.ndarray) -> np.ndarray:
    names = np.full(len(seconds), None, dtype=object)
    known = np.flatnonzero(~np.isnan(seconds))
    if len(known) < NUM_QUARTILES:
        return names
    bounds = np.quantile(seconds[known], np.linspace(0, 1, NUM_QUARTILES + 1))
    for clip in known:
        number = min(int(np.searchsorted(bounds[1:-1], seconds[clip], side="left")), NUM_QUARTILES - 1)
        names[clip] = f"{number + 1}: {bounds[number]:.2f} to {bounds[number + 1]:.2f} s"
    return names


def find_confused_pairs(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Returns the most frequent confusions: `label`, `prediction`, `num_clips` and their `share` of the label's clips."""
    matrix, names = evaluation.confusion_matrix, evaluation.label_names
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-wrong.ravel(), kind="stable")[:NUM_PAIRS]
    return [
        {"label": names[i], "prediction": names[j], "num_clips": int(wrong[i, j]), "share": float(wrong[i, j] / matrix[i].sum())}
        for i, j in zip(*np.unravel_index(order, matrix.shape), strict=True)
        if wrong[i, j]
    ]


def find_worst_clips(evaluation: Evaluation, clips: Dataset) -> list[dict[str, Any]]:
    """Returns the clips with the highest loss, the worst first: mistaken with confidence, or wrongly labelled.

    Returns:
        Dictionaries with `clip` (its name), `row` (of `clips`), `label`, `prediction`, `probability` (of the prediction),
        `loss` (nats), `speaker_id` and `sentence_id`.
    """
    names, all_names = evaluation.label_names, clip_names(clips)
    losses, predictions, probabilities = evaluation.losses, evaluation.predictions, evaluation.probabilities
    worst = np.argsort(-losses, kind="stable")[:NUM_WORST_CLIPS]
    rows = evaluation.clips[worst]
    speakers, sentences = clips.select(rows)["speaker_id"], clips.select(rows)["sentence_id"]
    return [
        {"clip": all_names[row], "row": int(row), "label": names[evaluation.references[i]],
         "prediction": names[predictions[i]], "probability": float(probabilities[i].max()),
         "loss": float(losses[i]), "speaker_id": speaker, "sentence_id": sentence}
        for i, row, speaker, sentence in zip(worst, rows, speakers, sentences, strict=True)
    ]  # fmt: skip
