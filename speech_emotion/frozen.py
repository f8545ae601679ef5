"""What is frozen and hears the same clips in every epoch is computed once, and training starts from there.

Frozen convolutions (`freeze feature_encoder`) leave their output, (frames, channels) for each clip; a frozen backbone leaves
every layer's hidden states, averaged over the clip, from which the head can be trained in seconds and the best layer be
told by validation. The model stays the ordinary one: only its `forward` begins later while it is trained, and what
is saved runs from the waveform as ever.

Each clip is computed alone, as `pipeline` does with it later. With group norm, whose statistics padding would enter, a
cached clip is thus the same in any batch, and is masked there like any other.
"""

import functools
import hashlib
import logging
import math
import shutil
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, Value
from datasets import Sequence as ArraySequence
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from speech_emotion.arguments import ModelArguments, SpeechTrainingArguments
from speech_emotion.batching import Collator, round_up
from speech_emotion.errors import UserError
from speech_emotion.features import PreparedSplits, build_arrow_table, map_once, select_splits
from speech_emotion.metrics import compute_confusion_matrix, compute_uar
from speech_emotion.modeling import (
    AST,
    FIXED_WINDOW_TYPES,
    SQUEEZED_TYPES,
    WHISPER,
    find_layer,
    get_backbone,
    get_layers,
    keep_layers,
    start_behind_convolutions,
)

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
COLUMN = "frozen"
WINDOWS_PER_BATCH = 16  # of models whose windows all have one size; other clips are computed singly
ROWS_PER_WRITE = 16
DISK_MARGIN = 1.1  # free space wanted, as a multiple of what will be written
# Of the logistic regressions that compare layers: a thousand correlated, standardised dimensions want a strong penalty.
PROBE_C = 0.01
PROBE_ITERATIONS = 200


@dataclass
class LayerScores:
    """Validation UAR of a linear classifier on each layer, (num_layers,), and the layer that was taken, from 1 on."""

    uar: np.ndarray
    chosen: int


@dataclass
class FrozenCollator:
    """Makes a batch of cached rows.

    Attributes:
        width: values of one frame, or of one layer's hidden state.
        rows: which of a clip's stored states the head sees (None: all frames).
        multiple: batches are padded to a multiple of so many frames.
    """

    width: int
    rows: slice | None
    multiple: int = 1

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns `labels` (batch,) and `input_values`.

        For frozen convolutions `input_values` is (batch, frames, width), padded with zeros, and `attention_mask`
        (batch, frames) says where frames end, if anything is padded; for a frozen backbone it is (batch, states, width).
        """
        arrays = [np.asarray(row[COLUMN]).reshape(-1, self.width) for row in rows]
        labels = torch.tensor([int(row["labels"]) for row in rows])
        if self.rows is not None:
            return {"input_values": torch.from_numpy(np.stack([array[self.rows] for array in arrays])), "labels": labels}
        lengths = torch.tensor([len(array) for array in arrays])
        longest = round_up(int(lengths.max()), self.multiple)
        batch = np.zeros((len(arrays), longest, self.width), dtype=arrays[0].dtype)
        for i, array in enumerate(arrays):
            batch[i, : len(array)] = array
        inputs = {"input_values": torch.from_numpy(batch), "labels": labels}
        if int(lengths.min()) < longest:
            inputs["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        return inputs


def cache_frozen(
    model: PreTrainedModel,
    prepared: PreparedSplits,
    collate: Collator,
    arguments: ModelArguments,
    training: SpeechTrainingArguments,
    overwrite: bool = False,
) -> tuple[PreparedSplits, Collator | FrozenCollator, LayerScores | None]:
    """Computes what is frozen for each clip once, and makes the model start behind it; where that cannot be, does nothing.

    Args:
        model: with its frozen part; its `forward` takes the cached rows afterwards, and it may have lost layers.
        prepared: features of all clips.
        collate: of these features.
        arguments: `freeze`, `layer`, `cache_frozen`.
        training: device and precision.
        overwrite: compute again.

    Returns:
        Splits whose rows hold the frozen part's output, the collator for them, and the layers' scores if they were
        compared; or what came in, unchanged.

    Raises:
        UserError: `cache_frozen` or layer 'best' was asked for and cannot be had, or a layer that the model lacks.
    """
    if arguments.freeze == "none" or arguments.cache_frozen is False:
        return prepared, collate, None
    is_backbone, number = arguments.freeze == "backbone", find_layer(model, arguments.layer)
    obstacle = _find_obstacle(model, prepared, training)
    if obstacle and (arguments.cache_frozen or arguments.layer == "best"):
        key = "cache_frozen" if arguments.cache_frozen else "layer"
        raise UserError(f"key '{key}': the frozen part's output cannot be cached: {obstacle}.")
    if obstacle:
        logger.info(f"The frozen part runs in every epoch: {obstacle}.")
        if is_backbone and number is not None:
            keep_layers(model, number)
        return prepared, collate, None

    model.to(training.device)
    compute = _LayerMeans(model) if is_backbone else _Convolutions(model)
    table = _compute_once(model, prepared, compute, is_backbone, training, overwrite)
    prepared = select_splits(prepared.split, table, table, prepared.num_bad_clips, prepared.cache)
    scores = None
    if is_backbone:
        if arguments.layer == "best":
            scores = compare_layers(prepared, compute)
            number = scores.chosen
        rows = compute.rows(number, arguments.layer == "weighted")
        if number is not None:
            keep_layers(model, number)
        start_at_head(model)
        return prepared, FrozenCollator(compute.width, rows), scores
    start_behind_convolutions(model)
    # One frame for each of the samples that the convolutions stride over.
    frames = max(1, collate.multiple // math.prod(stride for _, stride in compute.strides))
    return prepared, FrozenCollator(compute.width, None, frames), None


def _find_obstacle(model: PreTrainedModel, prepared: PreparedSplits, training: SpeechTrainingArguments) -> str | None:
    if prepared.cache is None:
        return "features are extracted on the fly"
    if "waveform" in prepared.train.column_names:
        return "training clips are augmented, or cropped at random since some are longer than max_length_seconds"
    if training.fsdp or training.deepspeed:
        return "the model is sharded"
    return None


class _Convolutions:
    """The output of wav2vec2's convolutional feature encoder and its relatives', (frames, channels), in half precision."""

    dtype = "float16"

    def __init__(self, model: PreTrainedModel) -> None:
        self.encoder = get_backbone(model).feature_extractor
        self.parameters = list(self.encoder.parameters())
        self.width = model.config.conv_dim[-1]
        self.strides = list(zip(model.config.conv_kernel, model.config.conv_stride, strict=True))
        self.num_windows_at_once = 1

    def count_values(self, lengths: np.ndarray) -> int:
        """Returns how many numbers are stored for clips of so many samples."""
        frames = lengths.copy()
        for kernel, stride in self.strides:
            frames = (frames - kernel) // stride + 1
        return int(frames.sum()) * self.width

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """(clips, num_samples) -> (clips, frames, channels)."""
        return self.encoder(inputs).transpose(1, 2)


class _LayerMeans:
    """Every layer's hidden states as the head would see them, averaged over the clip, (states, hidden size).

    The first 1 + num_layers states are those of transformers' `hidden_states`, which a weighted sum takes. Where the
    backbone ends in a norm of its own, num_layers more follow: each layer's as if it were the last.
    """

    dtype = "float32"

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        self.backbone = get_backbone(model)
        self.parameters = list(self.backbone.parameters())
        self.width = config.hidden_size
        self.is_ast = config.model_type == AST
        # Where the layers run at another rate than the head, only their end can be averaged.
        self.has_layers = config.model_type not in SQUEEZED_TYPES
        self.num_layers = len(get_layers(model)) if self.has_layers else 0
        self.final_norm = self._find_final_norm(config)
        self.num_windows_at_once = WINDOWS_PER_BATCH if config.model_type in FIXED_WINDOW_TYPES else 1
        self.keyword = "input_features" if model.main_input_name == "input_features" else "input_values"

    def _find_final_norm(self, config: Any) -> nn.Module | None:
        if config.model_type == AST:
            return self.backbone.layernorm
        if config.model_type == WHISPER:
            return self.backbone.layer_norm
        is_normed = getattr(config, "do_stable_layer_norm", False) or config.model_type == "wav2vec2-conformer"
        return self.backbone.encoder.layer_norm if is_normed and self.has_layers else None

    def count_values(self, lengths: np.ndarray) -> int:
        """Returns how many numbers are stored for so many clips."""
        num_states = 1 + self.num_layers * (1 if self.final_norm is None else 2)
        return len(lengths) * num_states * self.width

    def rows(self, layer: int | None, weighted: bool) -> slice:
        """Returns which states the head sees for this layer (None: the last), or for a weighted sum."""
        if weighted:
            return slice(0, 1 + self.num_layers)
        if not self.has_layers:
            return slice(0, 1)
        layer = self.num_layers if layer is None else layer
        start = layer + (0 if self.final_norm is None else self.num_layers)
        return slice(start, start + 1)

    def _average(self, states: torch.Tensor) -> torch.Tensor:
        # AST's head sees the mean of its class and distillation tokens, all others' the mean over time.
        return states[:, :2].mean(dim=1) if self.is_ast else states.mean(dim=1)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """(clips, ...) -> (clips, states, hidden size)."""
        outputs = self.backbone(**{self.keyword: inputs}, output_hidden_states=self.has_layers)
        last = outputs.last_hidden_state.float()
        if not self.has_layers:
            return self._average(last)[:, None]
        hidden = [state.float() for state in outputs.hidden_states]
        ends = [] if self.final_norm is None else [*(self.final_norm(state) for state in hidden[1:-1]), last]
        return torch.stack([self._average(state) for state in [*hidden, *ends]], dim=1)


def _compute_once(
    model: PreTrainedModel,
    prepared: PreparedSplits,
    compute: _Convolutions | _LayerMeans,
    is_backbone: bool,
    training: SpeechTrainingArguments,
    overwrite: bool,
) -> Dataset:
    rows, folder = prepared.features, prepared.cache
    precision = "bfloat16" if training.bf16 else "float16" if training.fp16 else "float32"
    digest = hashlib.blake2b(f"{FORMAT_VERSION} {folder.name} {precision} {model.config.model_type}".encode(), digest_size=16)
    for parameter in [*compute.parameters, *model.buffers()]:
        digest.update(parameter.detach().cpu().numpy().tobytes())
    cache = folder.with_name(f"frozen-{digest.hexdigest()}")
    num_bytes = compute.count_values(np.asarray(rows["length"][:])) * np.dtype(compute.dtype).itemsize
    if not cache.is_dir() or overwrite:
        what = "backbone's hidden states" if is_backbone else "feature encoder's output"
        logger.info(
            f"The frozen {what} will be computed once for {len(rows):,} clips and take {_format_bytes(num_bytes)} in "
            f"{cache.parent} (--cache_frozen false computes it in each epoch instead)."
        )
        _check_space(cache, num_bytes)
    was_training = model.training
    model.eval()
    input_name = next(name for name in rows.column_names if name not in ("clip", "length", "error", COLUMN))
    features = Features({name: rows.features[name] for name in ("clip", "length", "error")})
    features[COLUMN] = ArraySequence(Value(compute.dtype))
    function = functools.partial(_map_batch, compute=compute, input_name=input_name, training=training, features=features)
    table = map_once(
        rows.with_format("numpy"),
        function,
        features,
        cache,
        num_processes=1,
        batch_size=ROWS_PER_WRITE,
        description="Computing the frozen part",
        overwrite=overwrite,
    )
    model.train(was_training)
    return table


@torch.no_grad()
def _map_batch(
    batch: dict[str, Any],
    compute: Callable[[torch.Tensor], torch.Tensor],
    input_name: str,
    training: SpeechTrainingArguments,
    features: Features,
) -> pa.Table:
    device, inputs = training.device, list(batch[input_name])
    dtype = torch.bfloat16 if training.bf16 else torch.float16
    values: list[np.ndarray] = []
    with torch.autocast(device.type, dtype, enabled=training.bf16 or training.fp16):
        for start in range(0, len(inputs), compute.num_windows_at_once):
            part = np.stack(inputs[start : start + compute.num_windows_at_once]).astype(np.float32, copy=False)
            computed = compute(torch.from_numpy(part).to(device)).float().cpu().numpy().astype(compute.dtype)
            values.extend(clip.ravel() for clip in computed)
    if not all(np.isfinite(value).all() for value in values):
        raise UserError(
            f"key 'cache_frozen': the frozen part gives numbers that {compute.dtype} cannot hold. Use --cache_frozen false."
        )
    rows = {name: list(batch[name]) for name in ("clip", "length", "error")}
    return build_arrow_table(rows | {COLUMN: values}, features)


def _check_space(cache: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(cache.parent).free
    if free < num_bytes * DISK_MARGIN:
        raise UserError(
            f"key 'cache_frozen': {cache.parent} has {_format_bytes(free)} left, too little for the frozen part's output of "
            f"{_format_bytes(num_bytes)}. Free some space, name another --cache_dir, or use --cache_frozen false."
        )


def _format_bytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def start_at_head(model: PreTrainedModel) -> None:
    """Makes the model take averaged hidden states, (batch, states, hidden size), for `input_values`, in place.

    The projector is linear, so that the projected mean is the mean of the projections: the logits are the whole model's.
    """

    def forward(self: PreTrainedModel, input_values: torch.Tensor, **kwargs: Any) -> SequenceClassifierOutput:
        states = input_values.float()
        # There is one state, or all of them are weighted.
        weights = torch.softmax(self.layer_weights, dim=-1)[:, None] if hasattr(self, "layer_weights") else 1.0
        state = (states * weights).sum(dim=1)
        if hasattr(self, "projector"):
            state = self.projector(state)
        return SequenceClassifierOutput(logits=self.classifier(state))

    model.forward = types.MethodType(forward, model)


def compare_layers(prepared: PreparedSplits, compute: _LayerMeans) -> LayerScores:
    """Returns each layer's UAR on the validation split, by a logistic regression on the training split's averaged states.

    Source: G. Alain and Y. Bengio, Understanding intermediate layers using linear classifier probes, arXiv 1610.01644.
    That one good layer serves emotion better than all of them weighted: arXiv 2308.08713.
    """
    from sklearn.linear_model import LogisticRegression  # here, since few runs compare layers
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    tables = {name: getattr(prepared, name) for name in ("train", "validation")}
    states = {name: np.stack([np.asarray(row) for row in table[COLUMN][:]]).reshape(len(table), -1, compute.width)
              for name, table in tables.items()}  # fmt: skip
    labels = {name: np.asarray(table["labels"][:]) for name, table in tables.items()}
    num_labels = max(part.max() for part in labels.values()) + 1
    uar = np.zeros(compute.num_layers)
    for layer in range(1, compute.num_layers + 1):
        row = compute.rows(layer, weighted=False).start
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=PROBE_C, max_iter=PROBE_ITERATIONS, class_weight="balanced"))
        probe.fit(states["train"][:, row], labels["train"])
        predictions = probe.predict(states["validation"][:, row])
        uar[layer - 1] = compute_uar(compute_confusion_matrix(predictions, labels["validation"], num_labels))
    chosen = int(uar.argmax()) + 1  # of equals the lowest, which is the fastest
    listed = ", ".join(f"{layer}: {score:.3f}" for layer, score in enumerate(uar, start=1))
    logger.info(f"Validation UAR of a linear classifier on each layer: {listed}. The head is trained on layer {chosen}.")
    return LayerScores(uar, chosen)
