"""The frame of a run: quiet libraries, all cores, an output folder that loses nothing, and where to resume."""

import dataclasses
import json
import logging
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback

from speech_emotion.arguments import (
    RECIPE_FILE,
    RUN_FILE,
    Arguments,
    ModelArguments,
    SpeechTrainingArguments,
    describe_environment,
    resolve_recipe,
    strip_local_paths,
)
from speech_emotion.augmentation import build_augmentation
from speech_emotion.corpora.table import SPLITS
from speech_emotion.cross_corpus import OtherCorpus
from speech_emotion.dropout import use_cpu_dropout
from speech_emotion.errors import UserError
from speech_emotion.examination import Findings, examine
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
from speech_emotion.metrics import Evaluation, fit_temperature, summarize
from speech_emotion.modeling import FIXED_WINDOW_TYPES, compile_layers, count_parameters, divide_logits
from speech_emotion.publishing import Publisher, publish_or_explain
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
from speech_emotion.splits import Split
from speech_emotion.tracking import Tracker

logger = logging.getLogger(__name__)

CHECKPOINT_STATE = "trainer_state.json"
# Keys whose change between a checkpoint and its resumption changes nothing that is learnt.
HARMLESS_KEYS = {"output_dir", "report_to", "run_name", "tags", "comet_workspace", "comet_project", "cache_dir",
                 "preprocessing_num_workers", "overwrite_cache", "logging_steps", "save_total_limit",
                 "dataloader_num_workers", "audit", "robustness", "report", "report_audio", "test_on",
                 "label_map", "push_to_hub", "hub_model_id", "hub_private_repo"}  # fmt: skip


def set_up_logging(arguments: Arguments) -> None:
    """Shows this project's sentences on the main process, and none of the libraries' noise."""
    is_main = arguments.training.process_index == 0
    level = logging.INFO if is_main else logging.ERROR
    logging.basicConfig(format="%(message)s", level=logging.ERROR, stream=sys.stdout, force=True)
    for name in ("speech_emotion", "run_classification", "run_classification_no_trainer"):
        logging.getLogger(name).setLevel(level)
    transformers.utils.logging.set_verbosity_error()
    datasets.utils.logging.set_verbosity_error()
    # Bars over loading weights or flattening indices flicker by; those over work that takes long are switched on there.
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", module=r"(torch|transformers|accelerate|datasets|comet_ml)\b")


def use_all_cores(arguments: Arguments) -> None:
    """Gives each process its share of the cores: `accelerate launch` sets OMP_NUM_THREADS to 1.

    A number that the user chose (OMP_NUM_THREADS above 1) stays.
    """
    if arguments.training.device.type != "cpu" or int(os.environ.get("OMP_NUM_THREADS", "1")) > 1:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, cores // processes))


def prepare_for_speed(model: PreTrainedModel, training: SpeechTrainingArguments) -> None:
    """Compiles the layers if that is asked for; else gives a model that is trained on the CPU its quicker dropout."""
    if training.torch_compile:
        compile_layers(model, training.torch_compile_backend, training.torch_compile_mode)
        training.torch_compile_backend = training.torch_compile_mode = None  # else Trainer would compile it all again
    elif training.device.type == "cpu":
        use_cpu_dropout(model)


def open_output_dir(arguments: Arguments) -> Path:
    """Creates the output folder, or finds that it may be used; starting over deletes its old checkpoints.

    Raises:
        UserError: it cannot be written, or holds a run that is neither resumed nor overwritten.
    """
    training = arguments.training
    folder = Path(training.output_dir)
    if training.process_index != 0:
        return folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"key 'output_dir': {folder} is a file, not a folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").write_bytes(b"x")
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"key 'output_dir': {folder} cannot be written ({error.strerror}). Choose another folder.") from error
    has_run = (folder / "all_results.json").exists() or any(folder.glob("checkpoint-*"))
    if has_run and training.resume_from_checkpoint is None:
        if not training.overwrite_output_dir:
            raise UserError(
                f"key 'output_dir': {folder} already holds a run. Choose another --output_dir, go on with "
                "--resume_from_checkpoint last, or start over with --overwrite_output_dir."
            )
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    return folder


def find_checkpoint(arguments: Arguments) -> str | None:
    """Returns the checkpoint to resume from, or None to start at the beginning.

    Raises:
        UserError: no such checkpoint, or one of a run with another recipe.
    """
    training = arguments.training
    wanted = training.resume_from_checkpoint
    if wanted is None:
        return None
    folder = Path(training.output_dir)
    checkpoint = _last_whole_checkpoint(folder) if wanted == "last" else wanted
    if checkpoint is None:
        logger.info(f"{folder} has no checkpoint yet: training starts at the beginning.")
        return None
    if not (Path(checkpoint) / CHECKPOINT_STATE).is_file():
        raise UserError(f"key 'resume_from_checkpoint': {checkpoint} is not a checkpoint. Use 'last', or a folder checkpoint-N.")
    _check_same_recipe(Path(checkpoint).parent / RECIPE_FILE, resolve_recipe(arguments))
    return checkpoint


def _last_whole_checkpoint(folder: Path) -> str | None:
    # A run that was killed while it saved leaves a checkpoint without the state, which is written last.
    whole = [path for path in folder.glob("checkpoint-*") if (path / CHECKPOINT_STATE).is_file()]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def _check_same_recipe(path: Path, recipe: dict[str, Any]) -> None:
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(
        key for key in before.keys() | recipe.keys() if key not in HARMLESS_KEYS and before.get(key) != recipe.get(key)
    )
    if changed:
        differences = "; ".join(f"{key} was {before.get(key)} and is {recipe.get(key)}" for key in changed)
        raise UserError(f"the checkpoint's run had another recipe: {differences}. Resume with {path}, or start a new run.")


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
    arguments: Arguments,
    prepared: PreparedSplits,
    extraction: Extraction,
    train_results: dict[str, Any],
    validation: Evaluation,
    test: Evaluation,
    log_history: list[dict[str, Any]],
    tracker: Tracker,
    layer_scores: LayerScores | None = None,
    temperature: float | None = None,
    others: list[OtherCorpus] | None = None,
    publisher: Publisher | None = None,
) -> dict[str, Any]:
    """Examines the model, writes and shows what a run gave, on the main process; returns all of it as one flat dictionary."""
    split = prepared.split
    eval_results = summarize(validation, split.clips, "eval")
    test_results = summarize(test, split.clips, "test") | {
        "test_notes": split.notes,
        "test_speaker_dependence": split.speaker_dependence,
        "test_overlaps": split.overlaps,
    }
    if layer_scores is not None:
        train_results = train_results | {"layer": layer_scores.chosen, "layer_uar": layer_scores.uar.tolist()}
    if temperature is not None:
        before = dataclasses.replace(test, logits=test.logits * temperature)
        test_results |= {"temperature": temperature, "test_ece_before": summarize(before, split.clips, "test")["test_ece"]}
    all_results = train_results | eval_results | test_results
    if arguments.training.process_index == 0:
        folder = Path(arguments.training.output_dir)
        if arguments.training.audit or arguments.training.robustness or others:
            logger.info("Examining the model: shortcuts, worse recordings, other corpora, as far as the recipe asks for them.")
        findings = examine(arguments, split, extraction, test, others or [], folder)
        test_results["test_confused_pairs"] = findings.confused_pairs
        all_results = train_results | eval_results | test_results
        write_predictions(test, split.clips, folder / "predictions.csv")
        history = write_history(log_history, folder / "history.csv")
        figures = write_findings(findings, others or [], folder, arguments.training.report)
        for name, results in (("train", train_results), ("eval", eval_results), ("test", test_results)):
            write_json(folder / f"{name}_results.json", results)
        if arguments.training.report:
            figures += [*draw_results(test_results, "test", folder), draw_history(history, folder / "training_curves.png")]
            if layer_scores is not None:
                figures.append(draw_layers(layer_scores.uar, layer_scores.chosen, folder / "layers.png"))
            write_report(arguments, split, all_results, history, findings, layer_scores, extraction.sampling_rate, folder)
        tracker.log_results(test_results, test, split.clips, figures, findings)
        write_json(folder / "all_results.json", all_results)  # last: with it, the run is finished
        logger.info("\n" + format_results(test_results, "test", split.notes))
        for warning in findings.audit["warnings"] if findings.audit else []:
            logger.warning(f"  {warning}")
        for other in findings.cross_corpus:
            logger.info(f"  On {other['corpus']}, {other['num_clips']} clips: UAR {other['uar']:.3f}, within shared classes "
                        f"{other['uar_shared']:.3f}. {other['mapped']}"
                        + (f" Left out: {other['unmapped']}." if other["unmapped"] else ""))  # fmt: skip
        report = " Open report.html in it." if arguments.training.report else ""
        logger.info(f"\nThe model and all results are in {folder}.{report}")
    tracker.end()
    if publisher is not None and arguments.training.process_index == 0:
        publish_or_explain(Path(arguments.training.output_dir), publisher)
    return all_results


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


def describe_trained(model: ModelArguments) -> str:
    """Returns which weights are trained, in words."""
    if model.lora_rank is not None:
        return f"adapters of rank {model.lora_rank}, and the head"
    return {"none": "all weights", "feature_encoder": "all but the convolutions", "backbone": "the head"}[model.freeze]


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
            ("Trained", describe_trained(arguments.model)),
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


def describe_run(arguments: Arguments, prepared: PreparedSplits, model: PreTrainedModel, num_padded: float) -> str:
    """Returns what is about to happen, as sentences."""
    training, split = arguments.training, prepared.split
    names, labels = split.clips.features["label"].names, np.asarray(split.clips["label"][:])
    lines = [
        f"{len(split.clips)} clips of {arguments.data.dataset_name}, split so that no two splits share a "
        + (" or ".join(column.removesuffix("_id") for column in split.split_by) if split.split_by else "clip")
        + ":"
    ]
    for part in SPLITS:
        rows = split.indices(part)
        counts = np.bincount(labels[rows], minlength=len(names))
        seconds = float(np.nansum(np.asarray(split.clips["duration"][:])[rows]))
        per_class = ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))
        lines.append(f"  {part:10} {len(rows):6} clips, {seconds / 60:6.1f} min: {per_class}")
    lines += [f"  {note}" for note in split.notes]
    total, trained = count_parameters(model)
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    precision = "bfloat16" if training.bf16 else "float16" if training.fp16 else "float32"
    threads = f", {torch.get_num_threads()} threads" if training.device.type == "cpu" else ""
    is_fixed = model.config.model_type in FIXED_WINDOW_TYPES  # their batches need no padding, since every clip has its own
    lines.append(
        f"{model.config.model_type} with {total:,} parameters, {trained:,} of them trained, in "
        f"{precision} on {training.world_size} x {training.device.type}{threads}. {batch} clips an optimizer step, "
        + ("each padded to the model's whole window." if is_fixed else f"of which padding is {num_padded:.1%}.")
    )
    lines.append(f"Everything goes to {training.output_dir}.")
    return "\n".join(lines)


def write_recipe(arguments: Arguments, folder: Path) -> dict[str, Any]:
    """Writes the resolved recipe, which repeats the run, and what else shaped it; returns the recipe."""
    recipe = resolve_recipe(arguments)
    if arguments.training.process_index == 0:
        write_json(folder / RECIPE_FILE, recipe)
        write_json(folder / RUN_FILE, describe_environment(arguments))
    return recipe


class ProgressSentences(TrainerCallback):
    """A progress bar over the optimizer steps, and a sentence for each validation."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the bar where training starts or resumes."""
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="Training", unit="step", disable=args.disable_tqdm
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the bar on by one optimizer step."""
        if self.bar is not None:
            self.bar.update(1)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Says what validation found."""
        if self.bar is None or not metrics or "eval_uar" not in metrics:
            return
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        training_loss = f"training loss {losses[-1]:.3f}, " if losses else ""
        self.bar.write(
            f"Epoch {state.epoch:g}: {training_loss}validation loss {metrics['eval_loss']:.3f}, "
            f"UAR {metrics['eval_uar']:.3f}, accuracy {metrics['eval_accuracy']:.3f}"
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
