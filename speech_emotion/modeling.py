"""Any audio-classification architecture of transformers: load it, cut its window, freeze parts of it."""

import difflib
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    PretrainedConfig,
    PreTrainedModel,
    SequenceFeatureExtractor,
    masking_utils,
    set_seed,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES

from speech_emotion.arguments import ModelArguments
from speech_emotion.errors import UserError, list_offenders

logger = logging.getLogger(__name__)

WHISPER, AST, WAV2VEC2_BERT = "whisper", "audio-spectrogram-transformer", "wav2vec2-bert"
# Both compute their whole window whatever the clip's length, and have no attention mask.
FIXED_WINDOW_TYPES = (WHISPER, AST)

# Parameters of the classification heads, whatever the architecture; all others belong to the backbone.
WEIGHTS_FILE = "model.safetensors"
ADAPTER_NAME = "default"
TRAINED_PARTS = {"none": "all weights", "feature_encoder": "all but the convolutions", "backbone": "the head"}
HEAD_PREFIXES = ("projector.", "classifier.", "layer_weights")
# Learnt only where SpecAugment is on, and absent from many checkpoints.
OPTIONAL_WEIGHTS = ("masked_spec_embed",)

# Their layers run at a lower rate than what the head sees, with a convolution in between.
SQUEEZED_TYPES = ("sew", "sew-d")

KALDI_FRAME_SAMPLES, KALDI_HOP_SAMPLES = 400, 160  # 25 ms and 10 ms at 16 kHz


def build_model(
    arguments: ModelArguments, label_names: list[str], max_length_seconds: float | None, seed: int
) -> tuple[PreTrainedModel, SequenceFeatureExtractor, float | None]:
    """Loads model and feature extractor, cuts their window and freezes what stays as it was.

    Returns:
        The model in float32, its feature extractor, and the window in seconds (None: any length).

    Raises:
        UserError: as `load_feature_extractor`, `load_config`, `load_model`, `fit_window`, `freeze` and `find_layer` do.
    """
    feature_extractor = load_feature_extractor(arguments)
    config = load_config(arguments, label_names)
    set_seed(seed)  # right before the head is drawn, so that it does not depend on what was done before
    model = load_model(arguments, config)
    window_seconds = fit_window(model, feature_extractor, max_length_seconds)
    freeze(model, arguments.freeze)
    number = find_layer(model, arguments.layer)
    if number is not None and not caches_backbone(arguments):
        keep_layers(model, number)
    # The saved extractor then pads as training did.
    feature_extractor.return_attention_mask = wants_attention_mask(config)
    return model, feature_extractor, window_seconds


def load_feature_extractor(model: ModelArguments) -> SequenceFeatureExtractor:
    """Loads the feature extractor that belongs to the model.

    Raises:
        UserError: there is none, or it is not for audio.
    """
    name = model.feature_extractor_name or model.model_name_or_path
    try:
        return AutoFeatureExtractor.from_pretrained(name, cache_dir=model.cache_dir, revision=model.model_revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"key 'feature_extractor_name': {name} has no feature extractor that can be loaded. {_explain(error, name)}"
        ) from error


def load_config(model: ModelArguments, label_names: list[str]) -> PretrainedConfig:
    """Loads the configuration and writes the classes into it.

    Raises:
        UserError: not found, an architecture without an audio-classification head, or an override that it lacks.
    """
    name = model.config_name or model.model_name_or_path
    try:
        config = AutoConfig.from_pretrained(
            name,
            num_labels=len(label_names),
            id2label=dict(enumerate(label_names)),
            label2id={label: i for i, label in enumerate(label_names)},
            cache_dir=model.cache_dir,
            revision=model.model_revision,
        )
    except (OSError, ValueError) as error:
        key = "config_name" if model.config_name else "model_name_or_path"
        raise UserError(f"key '{key}': {name} cannot be loaded. {_explain(error, name)}") from error
    if config.model_type not in MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES:
        raise UserError(
            f"key 'model_name_or_path': {name} is a {config.model_type}, which has no audio-classification head. Those "
            f"that do: {', '.join(sorted(MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES))}."
        )
    for key, value in _parse_overrides(model.config_overrides).items():
        if key not in config.to_dict() and key not in config.attribute_map:
            raise UserError(f"key 'config_overrides': the configuration of {config.model_type} has no '{key}'.")
        setattr(config, key, value)
    if model.layer == "weighted":
        if config.model_type in (AST, *SQUEEZED_TYPES):
            raise UserError(f"key 'layer': {config.model_type} cannot weight its layers. Take a number.")
        config.use_weighted_layer_sum = True
    return config


def _parse_overrides(overrides: str | None) -> dict[str, Any]:
    parsed = {}
    for pair in filter(None, (overrides or "").split(",")):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise UserError(f"key 'config_overrides': '{pair}' is not KEY=VALUE.")
        try:
            parsed[key] = json.loads(value)
        except json.JSONDecodeError:
            parsed[key] = value
    return parsed


def load_model(model: ModelArguments, config: PretrainedConfig) -> PreTrainedModel:
    """Loads the pretrained weights in float32 under a classification head, or starts from scratch without a model name.

    The head is new unless the checkpoint has one for as many classes.

    Raises:
        UserError: not found, or a checkpoint that does not hold this architecture's backbone.
    """
    kwargs = {"attn_implementation": model.attn_implementation} if model.attn_implementation else {}
    try:
        if model.model_name_or_path is None:
            return AutoModelForAudioClassification.from_config(config, **kwargs)
        loaded, info = AutoModelForAudioClassification.from_pretrained(
            model.model_name_or_path,
            config=config,
            cache_dir=model.cache_dir,
            revision=model.model_revision,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # a head for other classes; anything else is refused below
            output_loading_info=True,
            **kwargs,
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"key 'model_name_or_path': {model.model_name_or_path} cannot be loaded. {_explain(error, model.model_name_or_path)}"
        ) from error
    absent = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    absent = sorted(key for key in absent if not key.startswith(HEAD_PREFIXES) and not key.endswith(OPTIONAL_WEIGHTS))
    if absent:
        raise UserError(
            f"key 'model_name_or_path': {model.model_name_or_path} is no checkpoint of a {config.model_type} of this "
            f"shape; {len(absent)} of its weights are missing or have another shape:\n{list_offenders(absent)}"
        )
    return loaded


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether the model has low-rank adapters that are not merged into its weights."""
    return any(f".lora_A.{ADAPTER_NAME}." in name for name, _ in model.named_parameters())


def save_checkpoint_model(model: PreTrainedModel, folder: str | Path) -> None:
    """Saves a model so that `load_weights` finds all of it, adapters included."""
    if not has_adapters(model):
        model.save_pretrained(folder)
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    # By the names that they have here: from_pretrained would know neither adapters nor what they are wrapped around.
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, Path(folder) / WEIGHTS_FILE)


def load_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Loads into a model, in place, the weights that `save_checkpoint_model` left in a folder."""
    if has_adapters(model):
        model.load_state_dict(load_file(Path(folder) / WEIGHTS_FILE))
    else:
        model.load_state_dict(type(model).from_pretrained(folder, dtype=torch.float32).state_dict())


def load_trained(name: str) -> PreTrainedModel:
    """Loads a trained classifier in float32, from a folder or the Hub.

    Raises:
        UserError: not found, another kind of model, or one whose head was never trained.
    """
    try:
        model, info = AutoModelForAudioClassification.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: no audio-classification model can be loaded from there. {_explain(error, name)}") from error
    absent = sorted(key for key in info["missing_keys"] if not key.endswith(OPTIONAL_WEIGHTS))
    if absent:
        raise UserError(
            f"{name}: {len(absent)} weights of a classifier are missing. Train one first with run_classification.py:\n"
            f"{list_offenders(absent)}"
        )
    return model


def find_window_seconds(model: PreTrainedModel, feature_extractor: SequenceFeatureExtractor) -> float | None:
    """Returns the window that a trained Whisper or AST computes, in seconds, or None for models that take any length."""
    config = model.config
    if config.model_type == WHISPER:
        return float(feature_extractor.chunk_length)
    return config.max_length * KALDI_HOP_SAMPLES / feature_extractor.sampling_rate if config.model_type == AST else None


def fit_window(
    model: PreTrainedModel, feature_extractor: SequenceFeatureExtractor, max_length_seconds: float | None
) -> float | None:
    """Cuts the window of Whisper or AST to `max_length_seconds`, in place; the others compute just what they are given.

    Whisper pads every clip to 30 s and AST to 10.24 s. The position table loses its end, so that the logits of what
    is left are those of the full table's first positions; the result is an ordinary model with an ordinary extractor.

    Returns:
        The window in seconds, or None for a model that takes any length and no `max_length_seconds`. Whisper's is
        rounded up to whole seconds, since its extractor stores it so.

    Raises:
        UserError: a window longer than the model's own, or too short for a single position.
    """
    config = model.config
    if config.model_type not in FIXED_WINDOW_TYPES:
        return max_length_seconds
    sampling_rate = feature_extractor.sampling_rate
    if config.model_type == WHISPER:
        encoder = model.encoder
        stride = encoder.conv1.stride[0] * encoder.conv2.stride[0]
        own_seconds = config.max_source_positions * stride * feature_extractor.hop_length / sampling_rate
        seconds = math.ceil(max_length_seconds) if max_length_seconds else own_seconds
        _check_window(seconds, own_seconds, max_length_seconds)
        feature_extractor.chunk_length = int(seconds)
        feature_extractor.n_samples = int(seconds) * sampling_rate
        feature_extractor.nb_max_frames = feature_extractor.n_samples // feature_extractor.hop_length
        num_positions = feature_extractor.nb_max_frames // stride
        table = encoder.embed_positions.weight.data[:num_positions].clone()  # (positions, hidden)
        encoder.embed_positions = nn.Embedding.from_pretrained(table, freeze=True)
        encoder.max_source_positions = config.max_source_positions = num_positions
        return float(seconds)

    hop_seconds = KALDI_HOP_SAMPLES / sampling_rate
    own_seconds = config.max_length * hop_seconds
    seconds = max_length_seconds or own_seconds
    _check_window(seconds, own_seconds, max_length_seconds)
    num_frames = max(round(seconds / hop_seconds), config.patch_size)
    embeddings = model.audio_spectrogram_transformer.embeddings
    num_rows, num_columns = embeddings.get_shape(config)  # of patches, along frequency and time
    config.max_length = feature_extractor.max_length = num_frames
    _, new_columns = embeddings.get_shape(config)
    table = embeddings.position_embeddings.data  # (1, 2 + rows * columns, hidden)
    special, patches = table[:, :2], table[:, 2:].unflatten(1, (num_rows, num_columns))
    table = torch.cat([special, patches[:, :, :new_columns].flatten(1, 2)], dim=1)
    embeddings.position_embeddings = nn.Parameter(table.clone())
    return num_frames * hop_seconds


def _check_window(seconds: float, own_seconds: float, wanted: float | None) -> None:
    if seconds > own_seconds + 1e-6:
        raise UserError(f"key 'max_length_seconds': {wanted} s is more than the model's own window of {own_seconds:g} s.")


def freeze(model: PreTrainedModel, part: str) -> None:
    """Stops the training of "feature_encoder" (the convolutions) or "backbone" (all but the head), or of nothing ("none").

    A frozen backbone stays in evaluation mode: dropout and SpecAugment regularise what is trained, and nothing there is.

    Raises:
        UserError: an architecture without that part.
    """
    if part == "feature_encoder":
        if not hasattr(model, "freeze_feature_encoder"):
            raise UserError(
                f"key 'freeze': {model.config.model_type} has no convolutional feature encoder to freeze. Use 'none', or "
                "'backbone' to train the head alone."
            )
        model.freeze_feature_encoder()
    elif part == "backbone":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(HEAD_PREFIXES))
        backbone = get_backbone(model).eval()
        backbone.train = lambda mode=True: backbone  # what a later model.train() calls


def get_backbone(model: PreTrainedModel) -> PreTrainedModel:
    """Returns what comes before the classification head."""
    return model.encoder if model.config.model_type == WHISPER else model.base_model


def get_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Returns the backbone's transformer layers.

    Raises:
        UserError: an architecture of which no layer can be taken as the last.
    """
    if model.config.model_type in SQUEEZED_TYPES:
        raise UserError(
            f"key 'layer': the layers of {model.config.model_type} run at a lower rate than its head, so none but the last "
            "can be taken. Leave the key out."
        )
    backbone = get_backbone(model)
    return getattr(backbone, "encoder", backbone).layers


def find_layer(model: PreTrainedModel, layer: str | None) -> int | None:
    """Returns the number of the layer that the key `layer` names, from 1 on, or None where it names none.

    Raises:
        UserError: the model has no such layer, or an architecture whose layers cannot be told apart.
    """
    if layer in (None, "weighted"):
        return None
    num_layers = len(get_layers(model))
    if layer == "best":
        return None
    if not 1 <= int(layer) <= num_layers:
        raise UserError(f"key 'layer': {layer} is not a layer of this model, which has 1 to {num_layers}.")
    return int(layer)


def keep_layers(model: PreTrainedModel, num_layers: int) -> None:
    """Cuts the layers above the first `num_layers`, in place: the head then sees that layer's output.

    The result is an ordinary model of fewer layers, and as much faster.
    """
    del get_layers(model)[num_layers:]
    model.config.num_hidden_layers = num_layers
    if model.config.model_type == WHISPER:
        model.config.encoder_layers = num_layers


def describe_trained(freeze: str, lora_rank: int | None) -> str:
    """Returns which weights are trained, in words."""
    return f"adapters of rank {lora_rank} (LoRA), and the head" if lora_rank else TRAINED_PARTS[freeze]


def divide_logits(model: PreTrainedModel, divisor: float) -> None:
    """Makes the head's logits smaller by a factor, in its last weights, so that whoever loads the model gets them so."""
    last = [module for module in model.classifier.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.div_(divisor)


def compile_layers(model: PreTrainedModel, backend: str | None, mode: str | None) -> None:
    """Compiles each transformer layer, in place, where there is more than a head to train; nothing of it is saved.

    The layers are alike, so that one compilation serves all of them.
    """
    if any(parameter.requires_grad for parameter in get_backbone(model).parameters()):
        for layer in get_layers(model):
            layer.compile(backend=backend or "inductor", mode=mode)


def decide_masks_without_asking() -> None:
    """Lets transformers take every attention mask for one that masks something, for the rest of this process.

    It would ask the device once a step whether that is so, and a GPU would wait for the answer. The collators give a mask
    only where something is padded, so that they have decided it already.
    """

    def skips(padding_mask: torch.Tensor | None, kv_length: int, local_attention_size: int | None = None) -> bool:
        return padding_mask is None and (local_attention_size is None or kv_length < local_attention_size)

    masking_utils._ignore_bidirectional_mask_sdpa = skips


def start_behind_convolutions(model: PreTrainedModel) -> None:
    """Makes the model take the feature encoder's output, (batch, frames, channels), for `input_values`, in place.

    The attention mask is then one of frames. Weights stay where they are, so that what is saved is the whole model.
    """
    backbone = get_backbone(model)
    backbone.feature_extractor.forward = lambda frames: frames.float().transpose(1, 2)
    for module in (model, backbone):
        module._get_feat_extract_output_lengths = lambda lengths, *args, **kwargs: lengths


def caches_backbone(arguments: ModelArguments) -> bool:
    """Whether the frozen backbone's outputs may be cached, with all layers' kept until one is chosen."""
    return arguments.freeze == "backbone" and arguments.cache_frozen is not False


def wants_attention_mask(config: PretrainedConfig) -> bool:
    """Whether a padded batch comes with an attention mask.

    wav2vec2 and its relatives were pretrained with one where their convolutions use layer norm, and without one where
    they use group norm (transformers' documentation of Wav2Vec2Model).
    """
    if config.model_type in FIXED_WINDOW_TYPES:
        return False
    return getattr(config, "feat_extract_norm", "layer") == "layer"


def min_num_samples(model: PreTrainedModel) -> int:
    """Returns the fewest samples that the model takes, in training too: shorter clips are padded with silence.

    A clip must fill one receptive field of the convolutions and be longer than one SpecAugment mask.
    """
    config = model.config
    if config.model_type in FIXED_WINDOW_TYPES:
        return KALDI_FRAME_SAMPLES
    masks = getattr(config, "apply_spec_augment", False) and config.mask_time_prob > 0
    num_frames = config.mask_time_length + 1 if masks else 2
    num_frames = max(num_frames, 2 * getattr(config, "squeeze_factor", 1))
    if config.model_type == WAV2VEC2_BERT:  # two 10 ms frames stacked
        return KALDI_FRAME_SAMPLES + 2 * num_frames * KALDI_HOP_SAMPLES
    num_samples = 1
    for kernel, stride in reversed(list(zip(config.conv_kernel, config.conv_stride, strict=True))):
        num_samples = kernel + stride * (num_frames - 1 if num_samples == 1 else num_samples - 1)
    return num_samples


def may_skip_parameters(model: PreTrainedModel) -> bool:
    """Whether a training step may leave parameters without gradient, which DistributedDataParallel has to be told.

    Layer drop skips layers at random, and the embedding of masked frames is used only where SpecAugment masks some.
    """
    drops_layers = any(getattr(model.config, key, 0) > 0 for key in ("layerdrop", "encoder_layerdrop"))
    return drops_layers or any(name.endswith(OPTIONAL_WEIGHTS) for name, _ in model.named_parameters())


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Returns how many parameters the model has, and how many of them are trained."""
    sizes = np.array([(p.numel(), p.numel() * p.requires_grad) for p in model.parameters()])
    return int(sizes[:, 0].sum()), int(sizes[:, 1].sum())


def _explain(error: Exception, name: str) -> str:
    """Returns the error's first line and, for what may be a misspelt folder, the nearest one that there is."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    folder = Path(name)
    if folder.exists() or not folder.parent.is_dir():
        return first
    known = [str(path) for path in folder.parent.iterdir() if path.is_dir()]
    near = difflib.get_close_matches(str(folder), known, n=1)
    return f"{first} Did you mean the folder {near[0]}?" if near else first
