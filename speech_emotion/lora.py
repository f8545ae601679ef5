"""Low-rank adapters: the pretrained weights stay as they are, and each linear layer learns a small correction.

E. J. Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685; for emotion, T. Feng and S. Narayanan,
PEFT-SER, arXiv 2306.05350. What is trained are a few per cent of the weights. A run leaves both: the adapter alone, for peft
(OUTPUT_DIR/adapter), and the ordinary model with the correction merged into it, for everybody else.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from speech_emotion.arguments import ModelArguments
from speech_emotion.errors import UserError
from speech_emotion.modeling import ADAPTER_NAME, HEAD_PREFIXES, SQUEEZED_TYPES, get_backbone, get_layers, has_adapters

ADAPTER_FOLDER = "adapter"
ALPHA_PER_RANK = 2  # the correction's scale is alpha / rank
# Their code multiplies with the weights themselves instead of calling the layers, so that an adapter would not be heard.
UNCALLED = {"wavlm": ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj")}
POSITIONAL = ("gru_rel_pos_linear", "linear_pos")


def find_targets(model: PreTrainedModel) -> list[str]:
    """Returns the names of the linear layers that get an adapter: attention and feed-forward of each layer."""
    if model.config.model_type in SQUEEZED_TYPES:
        encoder = get_backbone(model).encoder
        layers = encoder.layers if hasattr(encoder, "layers") else encoder.encoder.layer  # SEW, SEW-D
    else:
        layers = get_layers(model)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    skipped = POSITIONAL + UNCALLED.get(model.config.model_type, ())
    return [
        f"{prefix}.{name}"
        for name, module in layers.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith(skipped)
    ]


def add_adapters(model: PreTrainedModel, arguments: ModelArguments) -> None:
    """Gives the model adapters of `lora_rank`, in place, and freezes all else but the head; without a rank, does nothing.

    Raises:
        UserError: peft is not installed.
    """
    if arguments.lora_rank is None:
        return
    try:
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise UserError("key 'lora_rank': needs peft: pip install -r requirements.txt.") from error
    inject_adapter_in_model(_build_config(arguments, find_targets(model)), model, adapter_name=ADAPTER_NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(HEAD_PREFIXES) or ".lora_" in name)


def _build_config(arguments: ModelArguments, targets: list[str], **others: Any) -> "LoraConfig":  # noqa: F821
    from peft import LoraConfig

    return LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha or ALPHA_PER_RANK * arguments.lora_rank,
        lora_dropout=arguments.lora_dropout,
        target_modules=targets,
        **others,
    )


def merge_adapters(model: PreTrainedModel, arguments: ModelArguments, folder: Path, is_main_process: bool = True) -> None:
    """Saves the adapter and the head for peft, and merges the correction into the weights, in place.

    Args:
        model: trained, with adapters; without them nothing happens.
        arguments: of the run.
        folder: the output folder; the adapter goes into adapter/ in it.
        is_main_process: whether to write.
    """
    if not has_adapters(model):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    heads = sorted({name.split(".")[0] for name, _ in model.named_parameters() if name.startswith(HEAD_PREFIXES)})
    wrapped = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    if is_main_process:
        target = folder / ADAPTER_FOLDER
        target.mkdir(exist_ok=True)
        state = {
            f"base_model.model.{name.replace(f'.{ADAPTER_NAME}.', '.')}": tensor.detach().cpu().contiguous()
            for name, tensor in model.state_dict().items()
            if ".lora_" in name or name.startswith(HEAD_PREFIXES)
        }
        save_file(state, target / "adapter_model.safetensors")
        config = _build_config(
            arguments,
            list(wrapped),
            modules_to_save=[name for name in heads if isinstance(getattr(model, name), nn.Module)],
            base_model_name_or_path=arguments.model_name_or_path,
            inference_mode=True,
        )
        config.save_pretrained(target)
    with torch.no_grad():
        for name, module in wrapped.items():
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    # peft marks the model as its own; what is left is an ordinary one.
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(attribute, None)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
