"""What a trained model is asked beyond its score: where it fails, what else could explain it, and how it holds elsewhere."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speech_emotion.analysis import compute_group_results, find_confused_pairs, find_worst_clips
from speech_emotion.arguments import Arguments
from speech_emotion.audit import audit_shortcuts
from speech_emotion.cross_corpus import OtherCorpus, evaluate_on_others
from speech_emotion.features import Extraction
from speech_emotion.inference import Classifier
from speech_emotion.metrics import Evaluation
from speech_emotion.modeling import load_trained
from speech_emotion.robustness import measure_robustness
from speech_emotion.splits import Split


@dataclass
class Findings:
    """What `describe_failures` and `examine` found; what the recipe did not ask for is None or empty."""

    groups: list[dict[str, Any]]
    confused_pairs: list[dict[str, Any]]
    worst_clips: list[dict[str, Any]]
    audit: dict[str, Any] | None = None
    robustness: list[dict[str, Any]] | None = None
    cross_corpus: list[dict[str, Any]] = field(default_factory=list)
    other_evaluations: list[Evaluation] = field(default_factory=list)


def describe_failures(split: Split, test: Evaluation) -> Findings:
    """Returns where the model fails, from its answers alone."""
    return Findings(compute_group_results(test, split.clips), find_confused_pairs(test), find_worst_clips(test, split.clips))


def examine(
    findings: Findings,
    arguments: Arguments,
    split: Split,
    extraction: Extraction,
    test: Evaluation,
    others: list[OtherCorpus],
    folder: Path,
) -> None:
    """Examines the model saved in a run's output folder, on one process, and adds to the findings what it finds.

    Args:
        findings: of `describe_failures`; what was added before an error stays.
        arguments: `audit`, `robustness`, device and precision.
        split: clips with their splits.
        extraction: of the run.
        test: the model's answers on the test clips.
        others: corpora to try it on.
        folder: with the saved model: what is examined is what is published.
    """
    training = arguments.training
    if not (training.audit or training.robustness or others):
        return
    classifier = Classifier(load_trained(str(folder)), extraction, training.device, bool(training.bf16))
    if training.audit:
        findings.audit = audit_shortcuts(split, test, classifier, training.seed)
    if training.robustness:
        findings.robustness = measure_robustness(test, split.clips, classifier, training.seed)
    findings.cross_corpus, findings.other_evaluations = evaluate_on_others(others, classifier)
