"""Figures against scikit-learn's, intervals against known coverage."""

import evaluate
import numpy as np
import pytest
from datasets import Dataset
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, log_loss, precision_score

from speech_emotion.arguments import DataArguments
from speech_emotion.corpora import polish
from speech_emotion.metrics import (
    Accuracy,
    Evaluation,
    average_windows,
    choose_clusters,
    compute_ece,
    compute_intervals,
    compute_reliability,
    compute_results,
    evaluate_logits,
    fit_temperature,
    load_metrics,
    softmax,
    summarize,
)


def random_evaluation(num_clips=300, num_labels=4, skill=0.6, seed=0):
    rng = np.random.default_rng(seed)
    references = rng.integers(0, num_labels, num_clips)
    logits = rng.standard_normal((num_clips, num_labels))
    logits[np.arange(num_clips), references] += 3 * (rng.random(num_clips) < skill)
    return Evaluation(np.arange(num_clips), references, logits, [f"c{i}" for i in range(num_labels)])


def test_metrics_are_evaluate_modules_and_agree_with_scikit_learn():
    assert isinstance(Accuracy(keep_in_memory=True), evaluate.Metric)
    evaluation = random_evaluation()
    results = load_metrics().compute(predictions=evaluation.predictions, references=evaluation.references)
    truth = (evaluation.references, evaluation.predictions)
    assert results["accuracy"] == pytest.approx(accuracy_score(*truth))
    assert results["uar"] == pytest.approx(balanced_accuracy_score(*truth))
    assert results["f1_macro"] == pytest.approx(f1_score(*truth, average="macro"))


def test_precision_log_loss_and_calibration_agree_with_their_definitions():
    evaluation = random_evaluation()
    table = Dataset.from_dict({name: [None] * 300 for name in ("session_id", "speaker_id", "sentence_id")})
    results = summarize(evaluation, table, "test")
    truth = (evaluation.references, evaluation.predictions)
    expected = precision_score(*truth, average=None)
    assert [results[f"test_precision_c{i}"] for i in range(4)] == pytest.approx(list(expected))
    assert [results[f"test_f1_c{i}"] for i in range(4)] == pytest.approx(list(f1_score(*truth, average=None)))
    assert results["test_log_loss"] == pytest.approx(log_loss(evaluation.references, evaluation.probabilities))
    for name in ("log_loss", "precision_c0", "recall_c3", "uar"):
        low, high = results[f"test_{name}_ci95"]
        assert low <= results[f"test_{name}"] <= high
    # The calibration error, summed by hand over 15 equal bins.
    confidence = evaluation.probabilities.max(axis=1)
    right = evaluation.predictions == evaluation.references
    bins = np.minimum((confidence * 15).astype(int), 14)
    by_hand = sum(abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in set(bins))
    assert results["test_ece"] == pytest.approx(by_hand)
    assert sum(entry["num_clips"] for entry in results["test_reliability"]) == 300


def test_a_temperature_is_found_again_and_calibrates():
    rng = np.random.default_rng(0)
    logits = 2.0 * rng.standard_normal((4000, 4))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    references = np.array([rng.choice(4, p=p) for p in probabilities])  # the logits say how likely each class is
    assert fit_temperature(logits, references) == pytest.approx(1.0, abs=0.05)
    assert fit_temperature(5 * logits, references) == pytest.approx(5.0, rel=0.05)
    sure = compute_ece(compute_reliability(softmax(5 * logits), references))
    calibrated = compute_ece(compute_reliability(softmax(logits), references))
    assert sure > 0.15 and calibrated < 0.03


def test_classes_that_do_not_occur_are_left_out():
    evaluation = Evaluation(np.arange(3), np.array([0, 0, 2]), np.eye(3)[[0, 1, 2]], ["a", "b", "c"])
    results = compute_results(evaluation)
    assert results["uar"] == pytest.approx(0.75) and "recall_b" not in results
    assert (results["recall_a"], results["recall_c"]) == (0.5, 1.0)


def test_logits_of_windows_are_averaged_for_each_clip():
    table = Dataset.from_dict({"clip": [4, 2, 4, 2, 9], "labels": [1, 0, 1, 0, 1]}).with_format("numpy")
    logits = np.array([[1.0, 0], [2, 0], [0, 3], [4, 0], [0, 1]])
    evaluation = evaluate_logits(logits, table, ["a", "b"])
    assert evaluation.clips.tolist() == [2, 4, 9] and evaluation.references.tolist() == [0, 1, 1]
    np.testing.assert_allclose(evaluation.logits, [[3, 0], [0.5, 1.5], [0, 1]])
    assert average_windows(logits, np.arange(5))[1].shape == (5, 2)


def test_intervals_cover_the_truth_as_often_as_they_claim():
    # 200 draws of clips in 20 clusters that are right or wrong together; a bootstrap over clips would cover about 70 %.
    rng = np.random.default_rng(0)
    covered = by_clip = 0
    for _ in range(200):
        clusters = np.repeat(np.arange(20), 10)
        rates = np.clip(rng.normal(0.7, 0.2, 20), 0.05, 0.95)[clusters]
        references = np.tile([0, 1], 100)
        right = rng.random(200) < rates
        logits = np.eye(2)[np.where(right, references, 1 - references)]
        evaluation = Evaluation(np.arange(200), references, logits, ["a", "b"])
        low, high = compute_intervals(evaluation, clusters)["accuracy"]
        covered += low <= 0.695 <= high
        low, high = compute_intervals(evaluation, np.arange(200))["accuracy"]
        by_clip += low <= 0.695 <= high
    assert 0.87 <= covered / 200 <= 0.99 and by_clip < covered


def test_the_same_predictions_give_the_same_interval():
    evaluation = random_evaluation()
    clusters = np.arange(300) % 30
    assert compute_intervals(evaluation, clusters) == compute_intervals(evaluation, clusters)


@pytest.mark.parametrize(("speakers", "words", "unit"), [(5, 6, "speaker"), (1, 6, "sentence"), (1, 3, "clip")])
def test_clusters_are_speakers_else_sentences_else_clips(speakers, words, unit):
    table = polish.load(DataArguments())
    frame = table.select_columns(["speaker_id", "sentence_id"]).to_pandas()
    kept = frame["speaker_id"].isin(sorted(frame["speaker_id"].unique())[:speakers])
    kept &= frame["sentence_id"].isin(sorted(frame["sentence_id"].unique())[:words])
    found, clusters = choose_clusters(table.select(np.flatnonzero(kept)))
    assert found == unit and clusters.max() + 1 == {"speaker": 5, "sentence": 6, "clip": kept.sum()}[unit]


def test_a_summary_holds_every_figure_with_its_interval():
    table = polish.load(DataArguments())
    labels = np.asarray(table["label"])
    evaluation = Evaluation(np.arange(450), labels, np.eye(3)[labels], ["anger", "fear", "neutral"])
    results = summarize(evaluation, table, "test")
    for name in ("uar", "accuracy", "f1_macro", "recall_anger", "recall_fear", "recall_neutral"):
        assert results[f"test_{name}"] == 1.0 and results[f"test_{name}_ci95"] == [1.0, 1.0]
    assert results["test_ci95_clustered_by"] == "speaker" and results["test_num_clips"] == 450
    assert results["test_confusion_matrix"] == [[150, 0, 0], [0, 150, 0], [0, 0, 150]]
