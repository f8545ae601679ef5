"""The frame of a run: quiet libraries, all cores, an output folder that loses nothing, and where to resume."""

import json
import logging
import os
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback

from speech_emotion.arguments import (
    RECIPE_FILE,
    RUN_FILE,
    Arguments,
    SpeechTrainingArguments,
    describe_environment,
    resolve_recipe,
)
from speech_emotion.corpora.table import SPLITS
from speech_emotion.dropout import use_cpu_dropout
from speech_emotion.errors import UserError
from speech_emotion.features import PreparedSplits
from speech_emotion.memory import keep_freed_memory
from speech_emotion.modeling import FIXED_WINDOW_TYPES, compile_layers, count_parameters, decide_masks_without_asking
from speech_emotion.publishing import Publisher, open_hub
from speech_emotion.report import (
    write_json,
)
from speech_emotion.startup import quiet_transformers
from speech_emotion.tracking import Tracker

logger = logging.getLogger(__name__)

CHECKPOINT_STATE = "trainer_state.json"
# Keys whose change between a checkpoint and its resumption changes nothing that is learnt.
HARMLESS_KEYS = {"output_dir", "report_to", "run_name", "tags", "comet_workspace", "comet_project", "cache_dir",
                 "preprocessing_num_workers", "overwrite_cache", "logging_steps", "save_total_limit",
                 "dataloader_num_workers", "audit", "robustness", "report", "report_audio", "test_on",
                 "label_map", "push_to_hub", "hub_model_id", "hub_private_repo"}  # fmt: skip


@dataclass
class Session:
    """A run that has begun: what it was asked, where it writes, where it resumes, and who is told of it.

    Attributes:
        arguments: of the run.
        output_dir: that may be written to.
        checkpoint: to resume from, or None.
        recipe: the resolved one.
        tracker: of the run.
        publisher: of the model, if the recipe publishes.
    """

    arguments: Arguments
    output_dir: Path
    checkpoint: str | None
    recipe: dict[str, Any]
    tracker: Tracker
    publisher: Publisher | None


def open_session(arguments: Arguments) -> Session:
    """Begins a run: whatever of folder, checkpoint, trackers and Hub can be wrong is said here.

    Raises:
        UserError: as `open_output_dir`, `find_checkpoint`, `Tracker` and `open_hub`.
    """
    set_up_logging(arguments)
    use_all_cores(arguments)
    output_dir = open_output_dir(arguments)
    checkpoint = find_checkpoint(arguments)
    recipe = write_recipe(arguments, output_dir)
    return Session(arguments, output_dir, checkpoint, recipe, Tracker(arguments.training), open_hub(arguments.training))


def set_up_logging(arguments: Arguments) -> None:
    """Shows this project's sentences on the main process, and none of the libraries' noise."""
    is_main = arguments.training.process_index == 0
    level = logging.INFO if is_main else logging.ERROR
    logging.basicConfig(format="%(message)s", level=logging.ERROR, stream=sys.stdout, force=True)
    for name in ("speech_emotion", "run_classification", "run_classification_no_trainer"):
        logging.getLogger(name).setLevel(level)
    quiet_transformers()
    datasets.utils.logging.set_verbosity_error()
    # Bars over loading weights or flattening indices flicker by; those over work that takes long are switched on there.
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
    """Compiles the layers if that is asked for; else gives a model that is trained on the CPU its quicker dropout.

    A process that trains on the CPU keeps its memory from step to step.
    """
    decide_masks_without_asking()
    if training.device.type == "cpu":
        keep_freed_memory()
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
    written = Path(checkpoint).parent / RECIPE_FILE
    changes = describe_changes(written, resolve_recipe(arguments))
    if changes:
        raise UserError(f"the checkpoint's run had another recipe: {changes}. Resume with {written}, or start a new run.")
    return checkpoint


def _last_whole_checkpoint(folder: Path) -> str | None:
    # A run that was killed while it saved leaves a checkpoint without the state, which is written last.
    whole = [path for path in folder.glob("checkpoint-*") if (path / CHECKPOINT_STATE).is_file()]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def describe_changes(path: Path, recipe: dict[str, Any]) -> str:
    """Returns how a recipe differs from the one that an earlier run wrote, in what matters; empty if in nothing."""
    if not path.is_file():
        return ""
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(
        key for key in before.keys() | recipe.keys() if key not in HARMLESS_KEYS and before.get(key) != recipe.get(key)
    )
    return "; ".join(f"{key} was {before.get(key)} and is {recipe.get(key)}" for key in changed)


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
