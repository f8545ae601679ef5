"""How good a classifier is, and how sure one can be of that.

The metrics are `evaluate` modules of our own: `evaluate.load` would fetch a script from the Hub.
"""

from dataclasses import dataclass
from typing import Any

import datasets
import evaluate
import numpy as np
from datasets import Dataset
from scipy.optimize import minimize_scalar

CITATION_UAR = "B. Schuller, S. Steidl, A. Batliner: The INTERSPEECH 2009 Emotion Challenge. Interspeech 2009."

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
MIN_CLUSTERS = 5  # fewer give no spread worth the name
NUM_CALIBRATION_BINS = 15
TEMPERATURE_RANGE = (0.05, 20.0)  # beyond, all probabilities are 0 and 1, or all equal
BOOTSTRAP_SEED = 0  # the interval of the same predictions is always the same


class _ConfusionMetric(evaluate.Metric):
    """A metric that a confusion matrix is enough for."""

    score = ""
    description = ""
    citation = ""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation=self.citation,
            inputs_description="predictions and references: class indices, (num_clips,)",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        num_labels = int(max(np.max(predictions), np.max(references))) + 1
        matrix = compute_confusion_matrix(np.asarray(predictions), np.asarray(references), num_labels)
        return {self.score: float(SCORES[self.score](matrix))}


class Accuracy(_ConfusionMetric):
    """Share of clips classified rightly ("weighted accuracy" in older speech emotion papers)."""

    score = "accuracy"
    description = "Share of clips that are classified rightly."


class UnweightedAverageRecall(_ConfusionMetric):
    """Mean of the classes' recalls, over the classes that occur: rare ones count as much as common ones."""

    score = "uar"
    description = "Mean recall over the classes that occur in the references."
    citation = CITATION_UAR


class MacroF1(_ConfusionMetric):
    """Mean of the classes' F1, over the classes that occur or are predicted."""

    score = "f1_macro"
    description = "Mean F1 over the classes that occur in the references or the predictions."


def compute_confusion_matrix(predictions: np.ndarray, references: np.ndarray, num_labels: int) -> np.ndarray:
    """Returns counts, int64 of shape (num_labels, num_labels): row the reference, column the prediction."""
    matrix = np.zeros((num_labels, num_labels), dtype=np.int64)
    np.add.at(matrix, (references, predictions), 1)
    return matrix


def compute_recalls(matrix: np.ndarray) -> np.ndarray:
    """Returns each class's recall, (..., num_labels), nan where the class does not occur; takes (..., labels, labels)."""
    totals = matrix.sum(axis=-1)
    hits = np.diagonal(matrix, axis1=-2, axis2=-1)
    return np.divide(hits, totals, out=np.full(totals.shape, np.nan), where=totals > 0)


def compute_accuracy(matrix: np.ndarray) -> np.ndarray:
    """Returns the share on the diagonal; takes (..., labels, labels)."""
    return np.trace(matrix, axis1=-2, axis2=-1) / matrix.sum(axis=(-2, -1))


def compute_uar(matrix: np.ndarray) -> np.ndarray:
    """Returns the unweighted average recall; takes (..., labels, labels)."""
    return np.nanmean(compute_recalls(matrix), axis=-1)


def compute_macro_f1(matrix: np.ndarray) -> np.ndarray:
    """Returns the macro F1; takes (..., labels, labels)."""
    hits = np.diagonal(matrix, axis1=-2, axis2=-1)
    sizes = matrix.sum(axis=-1) + matrix.sum(axis=-2)
    f1 = np.divide(2.0 * hits, sizes, out=np.full(sizes.shape, np.nan), where=sizes > 0)
    return np.nanmean(f1, axis=-1)


def compute_precisions(matrix: np.ndarray) -> np.ndarray:
    """Returns each class's precision, (..., num_labels), nan where it is never predicted; takes (..., labels, labels)."""
    return compute_recalls(np.swapaxes(matrix, -1, -2))


SCORES = {"accuracy": compute_accuracy, "uar": compute_uar, "f1_macro": compute_macro_f1}


def load_metrics() -> evaluate.CombinedEvaluations:
    """Returns accuracy, uar and f1_macro as one `evaluate` module that needs no network."""
    return evaluate.combine([module(keep_in_memory=True) for module in (Accuracy, UnweightedAverageRecall, MacroF1)])


def average_windows(logits: np.ndarray, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Averages the logits of each clip's windows.

    Args:
        logits: (num_windows, num_labels).
        clips: the clip of each window, (num_windows,).

    Returns:
        The clips in rising order, (num_clips,), and their mean logits, (num_clips, num_labels).
    """
    numbers, inverse = np.unique(clips, return_inverse=True)
    sums = np.zeros((len(numbers), logits.shape[1]), dtype=np.float64)
    np.add.at(sums, inverse, logits)
    return numbers, sums / np.bincount(inverse)[:, None]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns probabilities, (num_clips, num_labels)."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def compute_losses(probabilities: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Returns the negative log-probability of each clip's own class, in nats, (num_clips,)."""
    return -np.log(np.maximum(probabilities[np.arange(len(references)), references], np.finfo(np.float64).tiny))


def compute_reliability(probabilities: np.ndarray, references: np.ndarray) -> list[dict[str, float]]:
    """Returns how often the model is right at each confidence: the bins of a reliability diagram that hold clips.

    Args:
        probabilities: (num_clips, num_labels).
        references: (num_clips,).

    Returns:
        `low` and `high` end of the confidence, `num_clips`, mean `confidence` and `accuracy`, from low to high.

    Source: C. Guo, G. Pleiss, Y. Sun, K. Weinberger, On Calibration of Modern Neural Networks, ICML 2017, with its 15 bins.
    """
    confidence, is_right = probabilities.max(axis=1), probabilities.argmax(axis=1) == references
    bin_of_clip = np.minimum((confidence * NUM_CALIBRATION_BINS).astype(int), NUM_CALIBRATION_BINS - 1)
    return [
        {
            "low": number / NUM_CALIBRATION_BINS,
            "high": (number + 1) / NUM_CALIBRATION_BINS,
            "num_clips": int(inside.sum()),
            "confidence": float(confidence[inside].mean()),
            "accuracy": float(is_right[inside].mean()),
        }
        for number in range(NUM_CALIBRATION_BINS)
        if (inside := bin_of_clip == number).any()
    ]


def compute_ece(reliability: list[dict[str, float]]) -> float:
    """Returns the expected calibration error: the mean distance of confidence and accuracy over the clips of all bins."""
    total = sum(entry["num_clips"] for entry in reliability)
    return sum(entry["num_clips"] * abs(entry["confidence"] - entry["accuracy"]) for entry in reliability) / total


def fit_temperature(logits: np.ndarray, references: np.ndarray) -> float:
    """Returns the temperature by which logits are divided so that their log loss on these clips is the least.

    Args:
        logits: (num_clips, num_labels), of clips that were not trained on.
        references: (num_clips,).

    Source: as `compute_reliability`, section 4.2.
    """
    found = minimize_scalar(
        lambda log_temperature: compute_losses(softmax(logits / np.exp(log_temperature)), references).mean(),
        bounds=np.log(TEMPERATURE_RANGE),
        method="bounded",
    )
    return float(np.exp(found.x))


@dataclass
class Evaluation:
    """What the model says of one split: `clips` are rows of the corpus table, (num_clips,)."""

    clips: np.ndarray
    references: np.ndarray
    logits: np.ndarray
    label_names: list[str]

    @property
    def predictions(self) -> np.ndarray:
        """Most probable class of each clip, (num_clips,)."""
        return self.logits.argmax(axis=1)

    @property
    def probabilities(self) -> np.ndarray:
        """Of the classes, (num_clips, num_labels)."""
        return softmax(self.logits)

    @property
    def losses(self) -> np.ndarray:
        """Negative log-probability of each clip's own class, in nats, (num_clips,)."""
        return compute_losses(self.probabilities, self.references)

    @property
    def confusion_matrix(self) -> np.ndarray:
        """Counts, (num_labels, num_labels): row the reference, column the prediction."""
        return compute_confusion_matrix(self.predictions, self.references, len(self.label_names))


def evaluate_logits(logits: np.ndarray, table: Dataset, label_names: list[str]) -> Evaluation:
    """Turns the logits of a prepared table's rows, in its order, into one answer a clip."""
    clips = np.asarray(table["clip"][:])
    numbers, mean_logits = average_windows(np.asarray(logits, dtype=np.float32), clips)
    first_row = np.unique(clips, return_index=True)[1]
    return Evaluation(numbers, np.asarray(table["labels"][:])[first_row], mean_logits, label_names)


def compute_results(evaluation: Evaluation) -> dict[str, float]:
    """Returns accuracy, uar, f1_macro and recall_CLASS for each class that occurs."""
    results = load_metrics().compute(predictions=evaluation.predictions, references=evaluation.references)
    recalls = compute_recalls(evaluation.confusion_matrix)
    results |= {
        f"recall_{name}": float(recall)
        for name, recall in zip(evaluation.label_names, recalls, strict=True)
        if not np.isnan(recall)
    }
    return results


def choose_clusters(clips: Dataset) -> tuple[str, np.ndarray]:
    """Returns what the bootstrap draws: sessions, speakers or sentences, the first with at least five, else clips.

    Clips of one speaker or sentence resemble each other; an interval that draws them singly is too narrow.

    Returns:
        "session", "speaker", "sentence" or "clip", and each clip's cluster, (num_clips,).
    """
    for column in ("session_id", "speaker_id", "sentence_id"):
        groups = np.asarray(clips[column][:], dtype=object)
        if None not in set(groups) and len(set(groups)) >= MIN_CLUSTERS:
            return column.removesuffix("_id"), np.unique(groups.astype(str), return_inverse=True)[1]
    if "clip" in clips.column_names:  # answers of several runs: those on one clip go together
        return "clip", np.unique(np.asarray(clips["clip"][:]).astype(str), return_inverse=True)[1]
    return "clip", np.arange(len(clips))


def compute_intervals(evaluation: Evaluation, clusters: np.ndarray) -> dict[str, tuple[float, float]]:
    """Returns 95 % percentile intervals of what `summarize` gives one for, by a cluster bootstrap.

    Args:
        evaluation: of the clips.
        clusters: each clip's cluster, (num_clips,).

    Source: B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13; clusters drawn with
    replacement as in A. C. Davison and D. V. Hinkley, Bootstrap Methods and their Application, 1997, section 3.8.
    """
    num_labels, num_clusters = len(evaluation.label_names), int(clusters.max()) + 1
    weights = draw_weights(num_clusters)
    resampled = resample_matrices(weights, clusters, evaluation.references, evaluation.predictions, num_labels)
    draws = {name: score(resampled) for name, score in SCORES.items()}
    for prefix, values in (("recall", compute_recalls(resampled)), ("precision", compute_precisions(resampled))):
        for index, name in enumerate(evaluation.label_names):
            if not np.isnan(values[:, index]).all():
                draws[f"{prefix}_{name}"] = values[:, index]
    sums, sizes = np.bincount(clusters, evaluation.losses, num_clusters), np.bincount(clusters, minlength=num_clusters)
    draws["log_loss"] = (weights @ sums) / (weights @ sizes)
    return {name: compute_interval(values) for name, values in draws.items()}


def draw_weights(num_clusters: int) -> np.ndarray:
    """Returns how often each cluster is in each resample, (NUM_RESAMPLES, num_clusters); the same on every call."""
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    return rng.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), size=NUM_RESAMPLES)


def resample_matrices(
    weights: np.ndarray, clusters: np.ndarray, references: np.ndarray, predictions: np.ndarray, num_labels: int
) -> np.ndarray:
    """Returns the confusion matrix of each resample, (resamples, labels, labels); the other arrays are (num_clips,)."""
    matrices = np.zeros((weights.shape[1], num_labels, num_labels))
    np.add.at(matrices, (clusters, references, predictions), 1)
    return np.einsum("rc,cij->rij", weights, matrices)


def compute_interval(draws: np.ndarray) -> tuple[float, float]:
    """Returns the 95 % percentile interval of a bootstrap's draws."""
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.nanpercentile(draws, [tail, 100 - tail])
    return float(low), float(high)


def score_uar(references: np.ndarray, predictions: np.ndarray, clusters: np.ndarray, num_labels: int) -> dict[str, Any]:
    """Returns `uar`, its interval `uar_ci95` and `num_clips`; all arrays are (num_clips,), clusters any numbers."""
    clusters = np.unique(clusters, return_inverse=True)[1]
    weights = draw_weights(int(clusters.max()) + 1)
    draws = compute_uar(resample_matrices(weights, clusters, references, predictions, num_labels))
    uar = float(compute_uar(compute_confusion_matrix(predictions, references, num_labels)))
    return {"uar": uar, "uar_ci95": list(compute_interval(draws)), "num_clips": len(references)}


def summarize(evaluation: Evaluation, clips: Dataset, prefix: str) -> dict[str, Any]:
    """Returns all results of a split as one flat dictionary.

    Args:
        evaluation: of the split.
        clips: the whole corpus table.
        prefix: "test" or "eval".

    Returns:
        PREFIX_accuracy, PREFIX_uar, PREFIX_f1_macro, PREFIX_log_loss, PREFIX_recall_CLASS, PREFIX_precision_CLASS, each with
        PREFIX_..._ci95 [low, high]; PREFIX_ece, PREFIX_reliability (see `compute_reliability`), PREFIX_f1_CLASS,
        PREFIX_ci95_clustered_by, PREFIX_num_clips, PREFIX_confusion_matrix and PREFIX_labels.
    """
    unit, clusters = choose_clusters(clips.select(evaluation.clips))
    values = compute_results(evaluation) | {"log_loss": float(evaluation.losses.mean())}
    precisions = compute_precisions(evaluation.confusion_matrix)
    for name, precision in zip(evaluation.label_names, precisions, strict=True):
        if not np.isnan(precision):
            values[f"precision_{name}"] = float(precision)
        if f"recall_{name}" in values:
            total = values[f"recall_{name}"] + np.nan_to_num(precision)
            values[f"f1_{name}"] = float(2 * values[f"recall_{name}"] * np.nan_to_num(precision) / total) if total else 0.0
    results: dict[str, Any] = {f"{prefix}_{name}": value for name, value in values.items()}
    for name, interval in compute_intervals(evaluation, clusters).items():
        if f"{prefix}_{name}" in results:
            results[f"{prefix}_{name}_ci95"] = list(interval)
    results[f"{prefix}_reliability"] = compute_reliability(evaluation.probabilities, evaluation.references)
    results[f"{prefix}_ece"] = compute_ece(results[f"{prefix}_reliability"])
    results[f"{prefix}_ci95_clustered_by"] = unit
    results[f"{prefix}_num_clips"] = len(evaluation.clips)
    results[f"{prefix}_confusion_matrix"] = evaluation.confusion_matrix.tolist()
    results[f"{prefix}_labels"] = evaluation.label_names
    return results
