"""What a run leaves behind: the calibrated model, results, findings, figures and the report, told to trackers and the Hub."""

import json
import logging
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedModel

from speech_emotion.arguments import (
    RUN_FILE,
    Arguments,
    SpeechTrainingArguments,
    resolve_recipe,
    strip_local_paths,
)
from speech_emotion.augmentation import build_augmentation
from speech_emotion.cross_corpus import OtherCorpus
from speech_emotion.examination import Findings, describe_failures, examine
from speech_emotion.features import Extraction, PreparedSplits
from speech_emotion.frozen import LayerScores
from speech_emotion.html_report import (
    describe_groups,
    describe_history,
    describe_layers,
    describe_results,
    describe_split,
    describe_worst_clips,
    dump,
    render,
)
from speech_emotion.metrics import Evaluation, compute_ece, compute_reliability, fit_temperature, softmax, summarize
from speech_emotion.modeling import describe_trained, divide_logits
from speech_emotion.publishing import publish_or_explain
from speech_emotion.report import (
    REPORT_FILE,
    draw_bars,
    draw_history,
    draw_layers,
    draw_results,
    format_results,
    write_history,
    write_json,
    write_predictions,
    write_text,
)
from speech_emotion.session import Session
from speech_emotion.splits import Split

logger = logging.getLogger(__name__)


def calibrate(model: PreTrainedModel, validation: Evaluation, training: SpeechTrainingArguments) -> float | None:
    """Divides the model's logits by the temperature that fits validation, if that is asked for, and returns it.

    Both the model's head and the answers of `validation` are changed, in place.
    """
    if not training.temperature_scaling:
        return None
    temperature = fit_temperature(validation.logits, validation.references)
    divide_logits(model, temperature)
    validation.logits = validation.logits / temperature
    return temperature


def finish_run(
    session: Session,
    prepared: PreparedSplits,
    extraction: Extraction,
    train_results: dict[str, Any],
    validation: Evaluation,
    test: Evaluation,
    log_history: list[dict[str, Any]],
    layer_scores: LayerScores | None = None,
    temperature: float | None = None,
    others: list[OtherCorpus] | None = None,
) -> dict[str, Any]:
    """Examines the model, writes and shows what a run gave, on the main process; returns all of it as one flat dictionary."""
    arguments, split, folder = session.arguments, prepared.split, session.output_dir
    eval_results = summarize(validation, split.clips, "eval")
    test_results = summarize(test, split.clips, "test") | {
        "test_notes": split.notes,
        "test_speaker_dependence": split.speaker_dependence,
        "test_overlaps": split.overlaps,
    }
    if layer_scores is not None:
        train_results = train_results | {"layer": layer_scores.chosen, "layer_uar": layer_scores.uar.tolist()}
    if temperature is not None:
        before = compute_reliability(softmax(test.logits * temperature), test.references)
        test_results |= {"temperature": temperature, "test_ece_before": compute_ece(before)}
    all_results = train_results | eval_results | test_results
    if arguments.training.process_index == 0:
        # The results first: whatever becomes of the rest, they are there.
        write_predictions(test, split.clips, folder / "predictions.csv")
        history = write_history(log_history, folder / "history.csv")
        findings = describe_failures(split, test)
        test_results["test_confused_pairs"] = findings.confused_pairs
        for name, results in (("train", train_results), ("eval", eval_results), ("test", test_results)):
            write_json(folder / f"{name}_results.json", results)
        all_results = train_results | eval_results | test_results
        _examine(findings, arguments, split, extraction, test, others or [], folder)
        figures = write_findings(findings, others or [], folder, arguments.training.report)
        if arguments.training.report:
            figures += [*draw_results(test_results, "test", folder), draw_history(history, folder / "training_curves.png")]
            if layer_scores is not None:
                figures.append(draw_layers(layer_scores.uar, layer_scores.chosen, folder / "layers.png"))
            write_report(arguments, split, all_results, history, findings, layer_scores, extraction.sampling_rate, folder)
        session.tracker.log_results(test_results, test, split.clips, figures, findings)
        write_json(folder / "all_results.json", all_results)  # last: with it, the run is finished
        logger.info(format_outcome(test_results, split, findings, folder, arguments.training.report))
    session.tracker.end()
    if session.publisher is not None and arguments.training.process_index == 0:
        publish_or_explain(folder, session.publisher)
    return all_results


def _examine(findings: Findings, arguments: Arguments, *what: Any) -> None:
    if arguments.training.audit or arguments.training.robustness or arguments.data.test_on:
        logger.info("Examining the model: shortcuts, worse recordings, other corpora, as far as the recipe asks for them.")
    try:
        examine(findings, arguments, *what)
    except torch.OutOfMemoryError:
        logger.warning("Too little memory to examine the model: part of audit, robustness and other corpora is missing.")


def format_outcome(test_results: dict[str, Any], split: Split, findings: Findings, folder: Path, has_report: bool) -> str:
    """Returns the table of results, what the examination warns of, and where all of it lies."""
    lines = ["", format_results(test_results, "test", split.notes)]
    lines += [f"  {warning}" for warning in (findings.audit["warnings"] if findings.audit else [])]
    for other in findings.cross_corpus:
        left_out = f" Left out: {other['unmapped']}." if other["unmapped"] else ""
        lines.append(
            f"  On {other['corpus']}, {other['num_clips']} clips: UAR {other['uar']:.3f}, within shared classes "
            f"{other['uar_shared']:.3f}. {other['mapped']}{left_out}"
        )
    lines += ["", f"The model and all results are in {folder}." + (" Open report.html in it." if has_report else "")]
    return "\n".join(lines)


def write_findings(findings: Findings, others: list[OtherCorpus], folder: Path, with_figures: bool) -> list[Path]:
    """Writes groups.csv and, as far as they were asked for, audit.json, robustness.json and cross_corpus.json.

    Returns:
        The figures that were drawn.
    """
    pd.DataFrame(findings.groups).to_csv(folder / "groups.csv", index=False)
    figures = []
    if findings.audit is not None:
        write_json(folder / "audit.json", findings.audit)
        bars = [{"cue": "the model", "by": "the model"} | findings.audit["model"], *findings.audit["shortcuts"]]
        names = [bar["cue"] + (" (model)" if bar["by"] == "the model" and i else "") for i, bar in enumerate(bars)]
        if with_figures:
            colors = ["C0" if bar["by"] == "the model" else "C1" for bar in bars]
            figures.append(draw_bars(folder / "audit.png", "UAR of the model and of shortcuts", names,
                                     [bar["uar"] for bar in bars], [bar["uar_ci95"] for bar in bars], findings.audit["chance"],
                                     colors))  # fmt: skip
    if findings.robustness is not None:
        write_json(folder / "robustness.json", {"conditions": findings.robustness})
        if with_figures:
            rows = findings.robustness
            figures.append(draw_bars(folder / "robustness.png", "UAR when the recording gets worse",
                                     [row["condition"] for row in rows], [row["uar"] for row in rows],
                                     [row["uar_ci95"] for row in rows]))  # fmt: skip
    if findings.cross_corpus:
        write_json(folder / "cross_corpus.json", {"corpora": findings.cross_corpus})
        for other, evaluation in zip(others, findings.other_evaluations, strict=True):
            write_predictions(evaluation, other.clips, folder / f"predictions_{other.name}.csv")
    return figures


def describe_model(arguments: Arguments) -> str:
    """Returns the pretrained model's name, without the folders of this machine."""
    name = arguments.model.model_name_or_path or arguments.model.config_name
    return strip_local_paths({"name": name})["name"]


def write_report(
    arguments: Arguments,
    split: Split,
    results: dict[str, Any],
    history: pd.DataFrame,
    findings: Findings,
    layer_scores: LayerScores | None,
    sampling_rate: int,
    folder: Path,
) -> None:
    """Writes report.html of one run."""
    data, training = arguments.data, arguments.training
    augmentation = build_augmentation(data)
    dependence = split.speaker_dependence
    environment = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    context = describe_results(results, "test") | describe_split(split) | {
        "title": training.run_name or folder.name,
        "subtitle": f"{describe_model(arguments)} on {Path(data.dataset_name).name}",
        "badges": [
            {"text": dependence if dependence != "unknown" else "speakers unknown", "bad": dependence != "speaker-independent"},
            {"text": "hold-out", "bad": False},
            {"text": f"seed {training.seed}", "bad": False},
            {"text": f"{results['test_num_clips']} test clips", "bad": False},
        ],
        "warnings": [*(note for note in split.notes if note.startswith("LEAK")),
                     *(findings.audit["warnings"] if findings.audit else [])],
        "curves": describe_history(history),
        "pairs": findings.confused_pairs,
        "temperature": results.get("temperature"),
        "ece_before": results.get("test_ece_before"),
        "audit": findings.audit,
        "robustness": findings.robustness,
        "cross_corpus": findings.cross_corpus,
        "layers": describe_layers(layer_scores.uar, layer_scores.chosen) if layer_scores is not None else None,
        "groups": describe_groups(findings.groups),
        "training_rows": [
            ("Model", describe_model(arguments)),
            ("Trained", describe_trained(arguments.model.freeze, arguments.model.lora_rank)),
            ("Epochs", f"{results['epoch']:g} of {training.num_train_epochs:g}"),
            ("Time", f"{results['train_runtime']:.0f} s on {training.world_size} x {environment['device']}"),
            ("Optimizer", f"{training.optim}, learning rate {training.learning_rate:g}, {training.lr_scheduler_type}"),
            ("Loss", training.loss + (f", gamma {training.focal_gamma:g}" if training.loss == "focal" else "")
             + (f", label smoothing {training.label_smoothing_factor:g}" if training.label_smoothing_factor else "")),
            ("Class balance", "sampling" if training.class_balanced_sampling else
             "weights" if training.class_weights == "balanced" else "none"),
            ("Augmentation", augmentation.describe() + ", in training only" * bool(augmentation)),
        ],
        "recipe": dump(strip_local_paths(resolve_recipe(arguments))),
        "environment": dump({key: value for key, value in environment.items() if key not in ("overrides", "recipe")}),
    } | describe_worst_clips(findings.worst_clips, split.clips, sampling_rate, training.report_audio)  # fmt: skip
    write_text(folder / REPORT_FILE, render(context))
