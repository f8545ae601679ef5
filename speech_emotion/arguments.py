"""A recipe and the command line become three typed dataclasses; whatever is wrong with them is said in one line.

    run_classification.py recipes/demo.json --learning_rate 1e-4

A recipe is one flat JSON object. Its values come first, then the flags. Both are read by the same parser, so that a
key means the same in either place.
"""

import argparse
import difflib
import json
import os
import platform
import subprocess
import sys
from dataclasses import MISSING, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import torch
from transformers import HfArgumentParser, SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames

from speech_emotion.errors import UserError

RECIPE_FILE = "recipe.json"
RUN_FILE = "run.json"
LIBRARIES = ("torch", "torchaudio", "transformers", "datasets", "evaluate", "accelerate", "comet-ml", "soundfile")

# A secret in a recipe ends in a commit, one on the command line in the shell's history, in `ps` and in trackers.
SECRET_KEYS = {
    "hub_token": "HF_TOKEN",
    "push_to_hub_token": "HF_TOKEN",
    "token": "HF_TOKEN",
    "comet_api_key": "COMET_API_KEY",
    "wandb_api_key": "WANDB_API_KEY",
}

# Schedules of torch.optim that transformers does not have; see optimization.py.
TORCH_SCHEDULES = ("step", "multi_step", "exponential", "one_cycle")


MAX_LOADER_WORKERS = 4
MIN_FOLDS = 3  # of a cross-validation: one each to train, validate and test on
SECONDS_BETWEEN_COMPILED_LENGTHS = 1.0

# What the head may see instead of the output of the layer of a given number.
LAYER_CHOICES = ("weighted", "best")


@dataclass
class ModelArguments:
    """Which pretrained model, and how much of it is trained."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of a pretrained model. Without it, config_name trains from scratch."},
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Hub id, folder or JSON file of a configuration, if not the model's own."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Changes to the model's configuration, as in 'hidden_dropout=0.0,use_weighted_layer_sum=true'."},
    )
    feature_extractor_name: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a feature extractor, if not the model's own."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where downloads and prepared features are kept; by default the Hub's cache."}
    )
    freeze: Literal["none", "feature_encoder", "backbone"] = field(
        default="none",
        metadata={
            "help": "What stays as it was pretrained: nothing, the convolutional feature encoder (wav2vec2 and its "
            "relatives: quicker, and usually a little better), or all but the classification head (quickest)."
        },
    )
    layer: str | None = field(
        default=None,
        metadata={
            "help": "What the head sees: the output of layer N (1 is the lowest; those above are cut off), the learnt "
            "'weighted' sum of all, or, with freeze backbone, the 'best' by validation UAR. By default the last layer."
        },
    )
    cache_frozen: bool | None = field(
        default=None,
        metadata={
            "help": "Compute what is frozen once for each clip, and train from there: much quicker, for some disk space. "
            "By default wherever nothing random (augmentation, crops) comes before it; true insists, false never does."
        },
    )
    lora_rank: int | None = field(
        default=None,
        metadata={
            "help": "Low-rank adapters of this rank (4 to 16) in each layer are trained instead of the pretrained weights, and "
            "the head: little memory, small checkpoints. Both the adapter and the merged model are saved."
        },
    )
    lora_alpha: int | None = field(default=None, metadata={"help": "Scale of the adapters; by default twice the rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "'eager' or 'sdpa'; by default the fastest that the architecture has."}
    )


@dataclass
class DataArguments:
    """Which recordings, how they are split, and what of them the model hears."""

    dataset_name: str = field(
        default="demo",
        metadata={
            "help": "demo, thorsten_emotional, emodb, ravdess, crema_d, tess, savee, esd, iemocap, meld, emov_db, "
            "msp_podcast, audio_folder, manifest, or a data set's Hub id or folder."
        },
    )
    dataset_config_name: str | None = field(
        default=None,
        metadata={"help": "Configuration of a Hub data set; for thorsten_emotional 'styles' (8 classes) or 'emotions' (5)."},
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder of the recordings (or, for thorsten_emotional, also its .tgz archive)."}
    )
    data_files: list[str] | None = field(
        default=None,
        metadata={"help": "Manifest files: CSV, TSV, JSON or JSONL; 'train=a.csv test=b.csv' gives the splits."},
    )
    download_url: str | None = field(
        default=None, metadata={"help": "A mirror to download thorsten_emotional from, instead of OpenSLR."}
    )
    audio_column_name: str = field(default="audio", metadata={"help": "Column with the audio or its path."})
    label_column_name: str = field(default="label", metadata={"help": "Column with the class."})
    speaker_column_name: str = field(default="speaker_id", metadata={"help": "Column with the speaker, if there is one."})
    sentence_column_name: str = field(
        default="sentence_id", metadata={"help": "Column that tells which sentence is spoken, if there is one."}
    )
    split_column_name: str = field(
        default="split", metadata={"help": "Column of a manifest with train, validation or test, if there is one."}
    )
    group_pattern: str | None = field(
        default=None,
        metadata={
            "help": "audio_folder: a regular expression searched in each path below data_dir, with the named groups "
            "speaker_id and/or sentence_id, as in '(?P<speaker_id>spk\\d+)_(?P<sentence_id>\\d+)'."
        },
    )
    class_names: list[str] | None = field(
        default=None, metadata={"help": "Only these classes, in this order; by default all that the corpus has."}
    )
    split_by: list[str] | None = field(
        default=None,
        metadata={
            "help": "What no two splits share: session_id, speaker_id, sentence_id, or two of them. By default the first "
            "of these that the corpus knows and has at least 3 of."
        },
    )
    validation_fraction: float = field(default=0.1, metadata={"help": "Share of the groups for validation."})
    test_fraction: float = field(default=0.1, metadata={"help": "Share of the groups for the test."})
    validation_groups: list[str] | None = field(
        default=None, metadata={"help": "These groups (speakers, say) are the validation split, instead of a draw."}
    )
    test_groups: list[str] | None = field(
        default=None, metadata={"help": "These groups (speakers, say) are the test split, instead of a draw."}
    )
    split_seed: int | None = field(
        default=None, metadata={"help": "Seed of the split, to keep it while seed varies; by default seed itself."}
    )
    allow_group_leak: bool = field(
        default=False,
        metadata={"help": "Accept given splits that share groups; the results then say so."},
    )
    cross_validation: str | None = field(
        default=None,
        metadata={
            "help": "loso (each speaker, or session where the corpus has sessions, is the test once) or a number of folds; each "
            "is a full run in a folder of its own, and the same command resumes."
        },
    )
    train_fractions: list[float] | None = field(
        default=None,
        metadata={
            "help": "A run for each of these shares of the training groups, as in '0.05 0.1 0.25 1': a data-efficiency curve."
        },
    )
    ignore_splits: bool = field(default=False, metadata={"help": "Draw new splits even where the corpus comes with its own."})
    test_on: list[str] | None = field(
        default=None,
        metadata={
            "help": "Other corpora to test the trained model on: NAME=FOLDER, as in 'emodb=/data/emodb', or a recipe's JSON file "
            "whose data keys describe the corpus."
        },
    )
    label_map: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'JSON: which class of those corpora is which of the model\'s, as in \'{"happiness": "happy"}\', or for one '
            "corpus '{\"emodb\": {...}}'. Equal names are the same by themselves; null leaves a class out."
        },
    )
    train_on_validation: bool = field(
        default=False,
        metadata={
            "help": "Train on the validation clips as well, once all else is chosen. Validation then measures nothing, "
            "so the last model is taken instead of the best."
        },
    )
    train_fraction: float = field(
        default=1.0,
        metadata={"help": "Share of the training groups (sentences, speakers) that is trained on; the test stays the same."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most so many clips."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Validate on at most so many clips."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Test on at most so many clips."})
    max_length_seconds: float | None = field(
        default=None,
        metadata={
            "help": "The model's window. Longer clips are cropped at random in training and covered by several "
            "windows in evaluation. Whisper and AST, which always compute their whole window, become as much faster."
        },
    )
    on_bad_audio: Literal["error", "skip"] = field(
        default="error", metadata={"help": "Clips that cannot be read or hold no sound: stop and list them, or drop them."}
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that prepare features; by default one a core, at most 8."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Prepare the features again."})
    augment_speed: float = field(
        default=0.0,
        metadata={"help": "Training clips play up to this share faster or slower, which shifts the voice's pitch too."},
    )
    augment_gain_db: float = field(default=0.0, metadata={"help": "Training clips are up to so many decibels louder or softer."})
    augment_time_mask_seconds: float = field(
        default=0.0, metadata={"help": "A stretch of up to so many seconds of a training clip is silenced."}
    )
    augment_frequency_mask_hz: float = field(
        default=0.0, metadata={"help": "A band of up to so many hertz is taken out of a training clip."}
    )
    augment_noise_snr_db: list[float] | None = field(
        default=None,
        metadata={"help": "Noise is added to training clips at a signal-to-noise ratio drawn between two values, as in '5 20'."},
    )
    augment_noise_dir: str | None = field(
        default=None, metadata={"help": "Folder of noise recordings (MUSAN, say); without it, the noise is synthetic."}
    )
    augment_probability: float = field(
        default=1.0, metadata={"help": "Each change is made to so large a share of the training clips, drawn anew in each epoch."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.label_map, str):
            try:
                self.label_map = json.loads(self.label_map)
            except json.JSONDecodeError as error:
                raise ValueError(f"key 'label_map': not valid JSON ({error.msg}).") from error
        if self.label_map is not None and not isinstance(self.label_map, dict):
            raise ValueError('key \'label_map\': must be a JSON object, {"their class": "our class"}.')


@dataclass
class SpeechTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments, with the defaults of this task and the few arguments that it lacks."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Where the model and all results go; by default runs/ and the recipe's name."}
    )
    seeds: list[int] | None = field(
        default=None, metadata={"help": "A run for each of these seeds, on the same split; summarized with mean and spread."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start over in an output folder that already holds a run."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "'last' or a checkpoint's folder: go on from there."}
    )
    optim: str = field(
        default="adamw_torch_fused",
        metadata={
            "help": "adamw_torch_fused (one pass over the weights), adamw_torch, adam, sgd, rmsprop, or another of transformers."
        },
    )
    lr_scheduler_type: str = field(
        default="linear",
        metadata={
            "help": "linear, cosine, constant_with_warmup, ... of transformers, or step, multi_step, exponential, "
            "one_cycle of torch.optim, with lr_scheduler_kwargs counted in epochs, as in '{\"step_size\": 5}'."
        },
    )
    head_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the new classification head; by default learning_rate, as for the rest."},
    )
    head_only_epochs: float = field(
        default=0.0,
        metadata={
            "help": "The head is trained alone for so many epochs first, so that a random head does not bend what was "
            "pretrained (linear probing, then fine-tuning: arXiv 2202.10054)."
        },
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "bfloat16 mixed precision; by default where the hardware computes it fast."}
    )
    class_weights: Literal["none", "balanced"] = field(
        default="none", metadata={"help": "balanced: a clip of a rare class weighs as much more as the class is rarer."}
    )
    class_balanced_sampling: bool = field(
        default=False,
        metadata={
            "help": "Each class is heard equally often in an epoch: clips of rare ones are repeated, of common ones left out."
        },
    )
    loss: Literal["cross_entropy", "focal"] = field(
        default="cross_entropy",
        metadata={"help": "focal: clips that the model is sure of count less (arXiv 1708.02002)."},
    )
    focal_gamma: float = field(default=2.0, metadata={"help": "How much less; 0 is cross_entropy."})
    temperature_scaling: bool = field(
        default=False,
        metadata={
            "help": "Divide the logits by a temperature fitted on validation, so that probabilities mean what they say; it is "
            "saved in the model's head. Predictions stay the same."
        },
    )
    audit: bool = field(
        default=True,
        metadata={"help": "At the end, ask what duration, loudness, bandwidth and the parts without speech would explain."},
    )
    robustness: bool = field(
        default=True, metadata={"help": "At the end, test with added noise, other loudness and a telephone's bandwidth."}
    )
    report: bool = field(default=True, metadata={"help": "Write report.html and the figures."})
    report_audio: bool = field(
        default=True,
        metadata={"help": "Put the worst clips' audio into report.html; not for corpora that must not be passed on."},
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many validations without a better metric_for_best_model."}
    )
    bucket_by_length: bool = field(
        default=True, metadata={"help": "Batches of clips of similar length: less padding, quicker steps."}
    )
    pad_to_seconds: float | None = field(
        default=None,
        metadata={
            "help": "Pad each batch to a multiple of so many seconds, so that few lengths occur; with torch_compile by "
            "default 1, since each length is compiled. For models with an attention mask, and with a cached feature encoder."
        },
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "When to validate: epoch, steps or no."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint: epoch, steps, best or no."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Keep so many checkpoints, the best among them."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Test and save the best model, not the last."})
    metric_for_best_model: str | None = field(default="uar", metadata={"help": "What decides which model is best."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide losses that are not finite; asks the device after every batch, which slows a GPU."}
    )
    dataloader_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that load batches ahead; by default up to 4 beside a GPU, none on a CPU."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave this off: the collator decides."})
    report_to: list[str] | None = field(
        default=None, metadata={"help": "Trackers: comet_ml, tensorboard, wandb, trackio, ...; by default none."}
    )
    comet_workspace: str | None = field(default=None, metadata={"help": "Comet workspace; else COMET_WORKSPACE."})
    comet_project: str | None = field(default=None, metadata={"help": "Comet project; else COMET_PROJECT_NAME."})
    tags: list[str] | None = field(default=None, metadata={"help": "Tags of the run in Comet."})
    hub_strategy: str = field(
        default="end",
        metadata={
            "help": "With push_to_hub: end (the tested model with its card) or every_save (each checkpoint's weights too)."
        },
    )
    card_language: list[str] | None = field(
        default=None,
        metadata={"help": "For the model card: the corpus's languages (ISO 639-1), where the loader does not know them."},
    )
    card_license: str | None = field(
        default=None,
        metadata={"help": "For the model card: the licence of the weights, as the Hub spells it (cc-by-nc-4.0, mit, ...)."},
    )

    def __post_init__(self) -> None:
        optim, lr_scheduler_type = self.optim, self.lr_scheduler_type
        for key, own, theirs in (("optim", ("adam",), OptimizerNames), ("lr_scheduler_type", TORCH_SCHEDULES, SchedulerType)):
            known = [*own, *(member.value for member in theirs)]
            if getattr(self, key) not in known:
                near = difflib.get_close_matches(getattr(self, key), known, n=1)
                hint = f"Did you mean '{near[0]}'?" if near else f"There are: {', '.join(known)}."
                raise ValueError(f"key '{key}': there is no '{getattr(self, key)}'. {hint}")
        # transformers accepts only its own names; ours are put back below and read by optimization.py.
        if optim == "adam":
            self.optim = "adamw_torch"
        if lr_scheduler_type in TORCH_SCHEDULES:
            self.lr_scheduler_type = "constant"
        if self.bf16 is None:
            self.bf16 = not self.fp16 and has_fast_bfloat16(use_cpu=self.use_cpu)
        if not torch.accelerator.is_available():
            self.use_cpu = True  # else transformers refuses bf16, and accelerate takes each of several processes for one
        if self.use_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self.ddp_backend = self.ddp_backend or "gloo"
        self.report_to = self.report_to or ["none"]
        on_gpu = torch.cuda.is_available() and not self.use_cpu
        if self.dataloader_num_workers is None:
            processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            # On a CPU a batch of cached rows is ready in a millisecond, and a worker would take a core from training.
            self.dataloader_num_workers = min(MAX_LOADER_WORKERS, (os.cpu_count() or 1) // processes) if on_gpu else 0
        self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        # Layers are compiled in place (modeling.compile_layers): transformers would compile the whole model, whose Python
        # between the layers (masks, layer drop) costs compilations and gains nothing.
        compiles = self.torch_compile or self.torch_compile_backend or self.torch_compile_mode
        backend, mode = self.torch_compile_backend, self.torch_compile_mode
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = False, None, None
        if compiles:
            self.pad_to_seconds = self.pad_to_seconds or SECONDS_BETWEEN_COMPILED_LENGTHS
        if on_gpu and self.accelerator_config is None:
            self.accelerator_config = {"non_blocking": True}  # copies from pinned memory need not be waited for
        super().__post_init__()
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = bool(compiles), backend, mode
        self.optim, self.lr_scheduler_type = optim, lr_scheduler_type


@dataclass
class LoopArguments:
    """What only the hand-written loop is asked."""

    feature_extraction: Literal["map", "on_the_fly"] = field(
        default="map",
        metadata={"help": "Features from the cached table, or extracted in the Dataset each time a clip is touched."},
    )
    parallel: Literal["auto", "none", "dp", "ddp"] = field(
        default="auto",
        metadata={
            "help": "dp: one process, DataParallel over its GPUs; ddp: one process a device, started by torchrun or "
            "accelerate launch; auto: ddp where several processes were started, else none."
        },
    )


def has_fast_bfloat16(use_cpu: bool = False) -> bool:
    """Whether this machine multiplies bfloat16 matrices faster than float32 ones.

    True on NVIDIA GPUs from Ampere on and on CPUs with AMX or AVX512-BF16. A CPU without them emulates bfloat16 at a
    small fraction of float32's rate (measured: 2 against 120 GFLOP/s on an AVX2 processor), so there it is False.
    """
    if torch.cuda.is_available() and not use_cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.mps.is_available() and not use_cpu:
        return False
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


# What `--help` shows of TrainingArguments' 120 fields besides those above; all others are accepted too.
SHOWN_TRAINING_FIELDS = [
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "weight_decay",
    "warmup_steps",
    "lr_scheduler_kwargs",
    "max_grad_norm",
    "label_smoothing_factor",
    "seed",
    "fp16",
    "use_cpu",
    "activation_checkpointing",
    "torch_compile",
    "run_name",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
]

TRAINING_HELP_FOOTER = (
    "Every other field of transformers.TrainingArguments is accepted too:\n"
    "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"
)


class Arguments(NamedTuple):
    """What a run was asked to do; `given` are the keys that the recipe or the command line named."""

    model: ModelArguments
    data: DataArguments
    training: SpeechTrainingArguments
    given: dict[str, Any]
    recipe_path: str | None
    command_line: list[str]
    loop: LoopArguments | None = None

    @property
    def split_seed(self) -> int:
        """Seed of the split: its own if there is one, else that of the run."""
        return self.training.seed if self.data.split_seed is None else self.data.split_seed


class _Parser(HfArgumentParser):
    """HfArgumentParser that raises `UserError` instead of printing its usage."""

    source = "the command line"

    def error(self, message: str) -> None:
        key, _, reason = message.removeprefix("argument ").partition(": ")
        key = key.split("/")[0].strip()
        raise UserError(f"{self.source}, key '{key.lstrip('-')}': {reason or message}. See --help.")


def _build_parser(with_loop: bool) -> _Parser:
    own = (ModelArguments, DataArguments, LoopArguments) if with_loop else (ModelArguments, DataArguments)
    parser = _Parser(
        (*own, SpeechTrainingArguments),
        prog="run_classification_no_trainer.py" if with_loop else "run_classification.py",
        usage="%(prog)s [recipes/NAME.json] [--key value ...]",
        description="Fine-tunes a pretrained audio model to classify emotion in speech.",
        epilog=TRAINING_HELP_FOOTER,
        allow_abbrev=False,
        add_help=True,
    )
    shown = {*SHOWN_TRAINING_FIELDS, *SpeechTrainingArguments.__annotations__}
    shown |= {f.name for cls in own for f in fields(cls)}
    for action in parser._actions:
        if action.dest not in shown | {"help"} or any(name.startswith("--no_") for name in action.option_strings):
            action.help = argparse.SUPPRESS
        action.option_strings = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        if action.choices is None:
            action.metavar = None if action.nargs == 0 else "VALUE"
    return parser


def parse_arguments(argv: list[str] | None = None, with_loop: bool = False) -> Arguments:
    """Reads `[recipe.json] [--key value ...]`; flags override the recipe.

    Args:
        argv: the command line without the program's name; by default `sys.argv[1:]`.
        with_loop: read the arguments of the hand-written loop too.

    Returns:
        The three dataclasses, and what is needed to repeat the run.

    Raises:
        UserError: an unknown or duplicate key, a wrong type, invalid JSON, a missing file, or a secret where it does
            not belong. The message names the file, the key and the nearest valid key.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(argv):
        _build_parser(with_loop).print_help()
        raise SystemExit(0)

    recipe_path = argv.pop(0) if argv and not argv[0].startswith("--") else None
    recipe = load_recipe(recipe_path) if recipe_path else {}
    flags = _split_flags(argv)
    if recipe_path is None and not flags:
        raise UserError("the command line names no recipe and no --key: try recipes/demo.json, or see --help.")

    return _build_arguments(recipe, flags, recipe_path, argv, with_loop)


def derive_arguments(arguments: Arguments, changes: dict[str, Any]) -> Arguments:
    """Returns the arguments of the same recipe with some keys changed; None takes a key's default.

    Raises:
        UserError: as `parse_arguments`.
    """
    recipe = {key: value for key, value in (resolve_recipe(arguments) | changes).items() if changes.get(key, "") is not None}
    return _build_arguments(recipe, {}, arguments.recipe_path, arguments.command_line, arguments.loop is not None)


def _build_arguments(
    recipe: dict[str, Any], flags: dict[str, list[str]], recipe_path: str | None, argv: list[str], with_loop: bool
) -> Arguments:
    parser = _build_parser(with_loop)
    types = {key: hint for cls in parser.dataclass_types for key, hint in get_type_hints(cls).items()}
    names = {f.name for cls in parser.dataclass_types for f in fields(cls) if f.init}
    _check_keys(recipe, names, recipe_path)
    _check_keys(flags, names, "the command line")

    # Parsed alone first, so that an error is blamed on the file it stands in.
    recipe_tokens = [token for key, value in recipe.items() for token in _tokens(key, value, recipe_path)]
    parser.source = recipe_path
    parser.parse_known_args(recipe_tokens)
    parser.source = "the command line"
    flag_tokens = [token for key, values in flags.items() for token in _flag_tokens(key, values, types)]
    parser.parse_known_args(flag_tokens)

    if "output_dir" not in {*recipe, *flags}:
        flag_tokens.append(f"--output_dir=runs/{Path(recipe_path).stem if recipe_path else 'run'}")
    try:
        parts = parser.parse_args_into_dataclasses(args=recipe_tokens + flag_tokens, look_for_args_file=False)
    except (ValueError, ImportError, TypeError) as error:
        # TrainingArguments checks its values when it is made; the first line is the reason, without our frames.
        sources = [source for source, given in ((recipe_path, recipe), ("the command line", flags)) if given]
        raise UserError(f"{' with '.join(sources)}: {error}") from error
    model, data, *loop, training = parts
    nulls = {key for key, value in recipe.items() if value is None} - set(flags)
    for part in parts:
        for f in fields(part):
            if f.name in nulls and f.default is not None:
                if type(None) not in get_args(types[f.name]):
                    raise UserError(f"{recipe_path}, key '{f.name}': null is not a value that it can take.")
                setattr(part, f.name, None)
    _check_values(model, data, training, recipe_path or "the command line")
    if data.train_on_validation:
        training.load_best_model_at_end = False
    # transformers' own name for the last checkpoint is True; ours can be typed.
    if training.resume_from_checkpoint in ("true", "True"):
        training.resume_from_checkpoint = "last"
    return Arguments(model, data, training, {**recipe, **dict.fromkeys(flags)}, recipe_path, argv, *loop)


def load_recipe(path: str) -> dict[str, Any]:
    """Returns a recipe's keys and values as they stand in the file.

    Raises:
        UserError: no such file, not a JSON object, or a key that stands there twice.
    """

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        duplicates = sorted({key for key in keys if keys.count(key) > 1})
        if duplicates:
            raise UserError(f"{path}, key '{duplicates[0]}' stands there twice: keep one of them.")
        return dict(pairs)

    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        known = sorted(str(p) for p in Path("recipes").glob("*.json"))
        near = difflib.get_close_matches(path, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else (f" There are: {', '.join(known)}." if known else "")
        raise UserError(f"{path}: there is no such recipe.{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}). A recipe is a JSON file in UTF-8.") from error
    try:
        recipe = json.loads(text, object_pairs_hook=refuse_duplicates)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}).") from error
    if not isinstance(recipe, dict):
        raise UserError(f'{path}: a recipe is one JSON object, {{"key": value, ...}}, not a {type(recipe).__name__}.')
    return recipe


def _split_flags(argv: list[str]) -> dict[str, list[str]]:
    """Returns each flag's values as they were typed; `--key=value` and `--key value` are the same."""
    flags: dict[str, list[str]] = {}
    for token in argv:
        if token.startswith("--"):
            key, equals, value = token[2:].partition("=")
            key = key.replace("-", "_")
            if key in flags:
                raise UserError(f"the command line, key '{key}' stands there twice: keep one of them.")
            flags[key] = [value] if equals else []
        elif not flags:
            raise UserError(f"the command line: '{token}' is neither a recipe (NAME.json, first) nor a --key.")
        else:
            flags[list(flags)[-1]].append(token)
    return flags


def _check_keys(keys: dict[str, Any], names: set[str], source: str | None) -> None:
    for key in keys:
        if key in SECRET_KEYS:
            raise UserError(
                f"{source}, key '{key}': a secret here would end in your shell's history, in trackers or in a commit. "
                f"Set the environment variable {SECRET_KEYS[key]} instead"
                + (", or run `hf auth login`." if SECRET_KEYS[key] == "HF_TOKEN" else ".")
            )
        if key in names or (key.startswith("no_") and key[3:] in names):
            continue
        raise UserError(f"{source}, key '{key}': there is no such key. {suggest_key(key, names)}")


def suggest_key(key: str, names: set[str]) -> str:
    """Returns which key was probably meant, as a question, or where to look."""
    near = difflib.get_close_matches(key, sorted(names), n=1, cutoff=0.5)
    return f"Did you mean '{near[0]}'?" if near else "See --help for those that there are."


def _tokens(key: str, value: Any, path: str) -> list[str]:
    """A recipe's value as command-line tokens, so that argparse checks its type."""
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{key}={str(value).lower()}"]
    if isinstance(value, list):
        if not value or any(isinstance(item, list | dict) or item is None for item in value):
            raise UserError(f"{path}, key '{key}': a list holds one or more plain values; leave the key out for none.")
        return [f"--{key}", *map(str, value)]
    if isinstance(value, dict):
        return [f"--{key}={json.dumps(value)}"]
    return [f"--{key}={value}"]


def _flag_tokens(key: str, values: list[str], types: dict[str, Any]) -> list[str]:
    if not values and key == "resume_from_checkpoint":
        return [f"--{key}=last"]
    if not values and types.get(key) == bool | None:
        return [f"--{key}=true"]
    if len(values) == 1:
        return [f"--{key}={values[0]}"]
    return [f"--{key}", *values]


def _check_values(model: ModelArguments, data: DataArguments, training: SpeechTrainingArguments, source: str) -> None:
    def refuse(key: str, problem: str) -> None:
        raise UserError(f"{source}, key '{key}': {problem}")

    if model.model_name_or_path is None and model.config_name is None:
        refuse("model_name_or_path", "is missing. Name a pretrained model, or a config_name to train from scratch.")
    if model.model_name_or_path is None and model.feature_extractor_name is None:
        refuse("feature_extractor_name", "is needed to train from scratch, since there is no model to take it from.")
    if model.layer is not None and model.layer not in LAYER_CHOICES and not (model.layer.isdigit() and int(model.layer) > 0):
        refuse("layer", f"is '{model.layer}', and must be a layer's number from 1 on, 'weighted' or 'best'.")
    if model.layer == "best" and (model.freeze != "backbone" or model.cache_frozen is False):
        refuse("layer", "'best' compares the cached outputs of a frozen backbone: it needs freeze 'backbone' and cache_frozen.")
    if model.cache_frozen and model.freeze == "none":
        refuse("cache_frozen", "has nothing to cache, since nothing is frozen: set freeze, or leave it out.")
    if model.lora_rank is not None and model.lora_rank < 1:
        refuse("lora_rank", f"is {model.lora_rank}, and must be at least 1.")
    if model.lora_rank is not None and model.freeze == "backbone":
        refuse("lora_rank", "adapts the layers that freeze 'backbone' keeps as they are: take freeze 'feature_encoder' or none.")
    if model.lora_rank is None and (model.lora_alpha is not None or model.lora_dropout):
        refuse("lora_rank", "is missing: lora_alpha and lora_dropout say how its adapters are, and it whether there are any.")
    if model.lora_alpha is not None and model.lora_alpha < 1:
        refuse("lora_alpha", f"is {model.lora_alpha}, and must be at least 1.")
    if not 0 <= model.lora_dropout < 1:
        refuse("lora_dropout", f"is {model.lora_dropout}, and must be at least 0 and below 1.")
    for key in ("validation_fraction", "test_fraction"):
        if not 0 < getattr(data, key) < 1:
            refuse(key, f"is {getattr(data, key)}, and must lie between 0 and 1.")
    if data.validation_fraction + data.test_fraction >= 1:
        refuse("test_fraction", "and validation_fraction leave nothing to train on: their sum must be below 1.")
    for key in (
        "max_train_samples",
        "max_eval_samples",
        "max_predict_samples",
        "max_length_seconds",
        "preprocessing_num_workers",
    ):
        value = getattr(data, key)
        if value is not None and value <= 0:
            refuse(key, f"is {value}, and must be above 0; leave it out for no limit.")
    for key in ("augment_gain_db", "augment_time_mask_seconds", "augment_frequency_mask_hz"):
        if getattr(data, key) < 0:
            refuse(key, f"is {getattr(data, key)}, and must be at least 0.")
    if data.augment_noise_snr_db is not None and (
        len(data.augment_noise_snr_db) != 2 or data.augment_noise_snr_db[0] > data.augment_noise_snr_db[1]
    ):
        refuse("augment_noise_snr_db", "takes the lowest and the highest ratio in decibels, as in [5, 20].")
    if data.augment_noise_dir is not None and data.augment_noise_snr_db is None:
        refuse("augment_noise_dir", "says which noise, and augment_noise_snr_db how much: give that too, as in [5, 20].")
    if not 0 < data.augment_probability <= 1:
        refuse("augment_probability", f"is {data.augment_probability}, and must be above 0 and at most 1.")
    if training.class_balanced_sampling and training.class_weights == "balanced":
        refuse("class_balanced_sampling", "and class_weights 'balanced' both make up for rare classes: take one of them.")
    if training.loss == "focal" and training.label_smoothing_factor:
        refuse("label_smoothing_factor", "is not defined for the focal loss: leave one of them out.")
    if training.focal_gamma < 0:
        refuse("focal_gamma", f"is {training.focal_gamma}, and must be at least 0.")
    if training.temperature_scaling and data.train_on_validation:
        refuse("temperature_scaling", "is fitted on the validation clips, which train_on_validation trains on: leave one out.")
    protocol = data.cross_validation
    if protocol is not None and protocol != "loso" and not (protocol.isdigit() and int(protocol) >= MIN_FOLDS):
        refuse("cross_validation", f"is '{protocol}', and must be loso or a number of folds from {MIN_FOLDS} on.")
    if protocol is not None and (data.test_groups or data.validation_groups):
        refuse("cross_validation", "chooses test and validation groups by itself: leave test_groups and validation_groups out.")
    if data.train_fractions is not None and (
        len(set(data.train_fractions)) < len(data.train_fractions) or not all(0 < share <= 1 for share in data.train_fractions)
    ):
        refuse("train_fractions", "takes different shares above 0 and up to 1, as in [0.05, 0.1, 0.25, 1].")
    if training.seeds is not None and len(set(training.seeds)) < len(training.seeds):
        refuse("seeds", "names a seed twice.")
    strategy = getattr(training.hub_strategy, "value", training.hub_strategy)
    if training.push_to_hub and strategy not in ("end", "every_save"):
        refuse("hub_strategy", f"is '{strategy}', and must be end or every_save: checkpoints to resume from stay here.")
    if not 0 < data.train_fraction <= 1:
        refuse("train_fraction", f"is {data.train_fraction}, and must be above 0 and at most 1.")
    if not 0 <= data.augment_speed < 0.5:
        refuse("augment_speed", f"is {data.augment_speed}, and must be at least 0 and below 0.5.")
    for key in data.split_by or []:
        if key not in ("session_id", "speaker_id", "sentence_id"):
            refuse("split_by", f"'{key}' is not a group: take session_id, speaker_id or sentence_id.")
    if data.train_on_validation and training.early_stopping_patience is not None:
        refuse("early_stopping_patience", "has nothing to go by with train_on_validation: leave one of them out.")
    if training.head_only_epochs < 0:
        refuse("head_only_epochs", f"is {training.head_only_epochs}, and must be at least 0.")
    if training.head_only_epochs and training.lr_scheduler_type in TORCH_SCHEDULES:
        refuse("head_only_epochs", f"does not go with the schedule '{training.lr_scheduler_type}': take linear or cosine, say.")
    best = str(training.metric_for_best_model or "loss").removeprefix("eval_")
    if best not in ("uar", "accuracy", "f1_macro", "loss") and not best.startswith("recall_"):
        refuse("metric_for_best_model", f"'{best}' is none of uar, accuracy, f1_macro, loss and recall_CLASS.")
    if training.load_best_model_at_end and str(training.eval_strategy.value) == "no":
        refuse("eval_strategy", "'no' leaves no best model to choose: set load_best_model_at_end to false as well.")
    if training.label_smoothing_factor and not 0 <= training.label_smoothing_factor < 1:
        refuse("label_smoothing_factor", f"is {training.label_smoothing_factor}, and must be at least 0 and below 1.")


def resolve_recipe(arguments: Arguments) -> dict[str, Any]:
    """Returns the flat recipe that repeats the run: every key of ours, and those of TrainingArguments that were given.

    What transformers filled in by itself is left to the version that `run.json` names. Secrets are never in it.
    """
    recipe: dict[str, Any] = {}
    own = {
        *SpeechTrainingArguments.__annotations__,
        "seed",
        "num_train_epochs",
        "learning_rate",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
    }
    for part in filter(None, (arguments.model, arguments.data, arguments.loop, arguments.training)):
        for f in fields(part):
            is_ours = not isinstance(part, TrainingArguments) or f.name in own or f.name in arguments.given
            value = getattr(part, f.name)
            if not is_ours or f.name in SECRET_KEYS or f.name == "resume_from_checkpoint":
                continue
            if value is None:
                if f.default not in (None, MISSING):  # null was asked for
                    recipe[f.name] = None
                continue
            value = getattr(value, "value", value)  # enums
            if isinstance(value, str | int | float | bool | list | dict) and value != []:
                recipe[f.name] = value
    # Whether to start over is said on each run's command line: a recipe that deletes would be a trap.
    recipe.pop("overwrite_output_dir", None)
    return recipe


def strip_local_paths(recipe: dict[str, Any]) -> dict[str, Any]:
    """Returns the recipe as it may be shown to others: folders of this machine are named by their last part, or left out."""

    def strip(value: Any) -> Any:
        if isinstance(value, list):
            return [strip(item) for item in value]
        if isinstance(value, str) and "=" in value and Path(value.partition("=")[2]).is_absolute():
            return value.partition("=")[0]  # NAME=FOLDER
        is_local = isinstance(value, str) and (Path(value).is_absolute() or value.startswith(("~", "..")))
        return Path(value).name if is_local else value

    return {key: strip(value) for key, value in recipe.items() if key not in ("output_dir", "cache_dir", "logging_dir")}


def describe_environment(arguments: Arguments) -> dict[str, Any]:
    """Returns what else shaped the run: overrides, the code's commit, library versions, machine."""
    root = Path(__file__).parent.parent
    git = (
        subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            check=False,
        )
        if (root / ".git").exists()
        else None
    )
    device = arguments.training.device
    return {
        "recipe": arguments.recipe_path,
        "overrides": arguments.command_line,
        "git_commit": git.stdout.strip() if git and git.returncode == 0 else None,
        "python": platform.python_version(),
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})",
        "num_processes": arguments.training.world_size,
        "num_cores": os.cpu_count(),
    }
