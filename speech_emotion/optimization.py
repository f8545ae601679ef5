"""Loss, optimizer and schedule, the same for both training scripts."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import lr_scheduler
from transformers import PreTrainedModel, get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from speech_emotion.arguments import TORCH_SCHEDULES, SpeechTrainingArguments
from speech_emotion.errors import UserError
from speech_emotion.modeling import HEAD_PREFIXES

OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adam", "sgd", "rmsprop")

# Weight decay leaves these alone, as transformers' Trainer does: layer norms and biases.
NO_DECAY_PATTERNS = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


def build_loss(labels: np.ndarray, num_labels: int, training: SpeechTrainingArguments) -> Callable[..., torch.Tensor]:
    """Builds the loss that Trainer takes as `compute_loss_func`.

    Args:
        labels: of the training clips, (num_clips,).
        num_labels: number of classes.
        training: `loss` (cross_entropy, or focal, in which a clip's cross-entropy is multiplied with (1 - probability of the
            right class) ** `focal_gamma`); `class_weights` ("balanced": num_clips / (num_labels * clips of the class), so
            that a clip weighs 1 on average); `label_smoothing_factor` (share of the target spread over all classes).

    Returns:
        A function of (outputs with `logits` (batch, num_labels), labels (batch,), num_items_in_batch). It divides by
        the clips of the whole optimizer step where that is given, so that accumulation does not change the loss.

    Source: of the focal loss, T.-Y. Lin et al., Focal Loss for Dense Object Detection, arXiv 1708.02002.
    """
    focal_gamma = training.focal_gamma if training.loss == "focal" else None
    label_smoothing = training.label_smoothing_factor
    weight = None
    if training.class_weights == "balanced":
        counts = np.bincount(labels, minlength=num_labels)
        weight = torch.tensor(len(labels) / (num_labels * np.maximum(counts, 1)), dtype=torch.float32)

    def compute_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
        nonlocal weight
        logits = outputs["logits"].float()
        if weight is not None:
            weight = weight.to(logits.device)  # copied once, at the first step
        reduction = "sum" if focal_gamma is None else "none"
        losses = nn.functional.cross_entropy(logits, labels, weight=weight, label_smoothing=label_smoothing, reduction=reduction)
        if focal_gamma is not None:
            right = torch.softmax(logits, dim=-1).gather(1, labels[:, None]).squeeze(1)
            losses = (losses * (1 - right) ** focal_gamma).sum()
        return losses / (num_items_in_batch if num_items_in_batch is not None else len(labels))

    return compute_loss


def build_optimizer(model: PreTrainedModel, training: SpeechTrainingArguments) -> torch.optim.Optimizer:
    """Builds SGD, Adam, AdamW or RMSprop, with two learning rates where `head_learning_rate` is given.

    `optim_args`, as in "momentum=0.9", goes to the optimizer.

    Raises:
        UserError: an optimizer that is not one of these, or an argument that it does not take.
    """
    decayed = set(get_parameter_names(model, [nn.LayerNorm], NO_DECAY_PATTERNS))
    head_rate = training.head_learning_rate or training.learning_rate
    groups = []
    for is_head in (False, True):
        for is_decayed in (True, False):
            parameters = [
                p
                for name, p in model.named_parameters()
                if p.requires_grad and name.startswith(HEAD_PREFIXES) == is_head and (name in decayed) == is_decayed
            ]
            if parameters:
                decay = training.weight_decay if is_decayed else 0.0
                rate = head_rate if is_head else training.learning_rate
                groups.append({"params": parameters, "lr": rate, "weight_decay": decay, "is_head": is_head})

    adam = {"betas": (training.adam_beta1, training.adam_beta2), "eps": training.adam_epsilon}
    builders = {
        "adamw_torch": lambda kwargs: torch.optim.AdamW(groups, **adam | kwargs),
        "adamw_torch_fused": lambda kwargs: torch.optim.AdamW(groups, fused=True, **adam | kwargs),
        "adam": lambda kwargs: torch.optim.Adam(groups, **adam | kwargs),
        "sgd": lambda kwargs: torch.optim.SGD(groups, **kwargs),
        "rmsprop": lambda kwargs: torch.optim.RMSprop(groups, **kwargs),
    }
    if training.optim not in builders:
        raise UserError(f"key 'optim': '{training.optim}' is none of {', '.join(OPTIMIZERS)}.")
    try:
        pairs = [pair.split("=", 1) for pair in (training.optim_args or "").replace(" ", "").split(",") if pair]
        return builders[training.optim]({key: float(value) for key, value in pairs})
    except (TypeError, ValueError) as error:
        raise UserError(f"key 'optim_args': '{training.optim_args}' does not fit {training.optim} ({error}).") from error


def _hold_backbone(scheduler: lr_scheduler.LRScheduler, num_steps: int) -> lr_scheduler.LRScheduler:
    # A learning rate of zero leaves weights as they are, weight decay included.
    if num_steps == 0:
        return scheduler
    if not isinstance(scheduler, lr_scheduler.LambdaLR):
        raise UserError("key 'head_only_epochs': goes with linear, cosine and the other schedules by step only.")

    def hold(factor: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: 0.0 if step < num_steps else factor(step)

    groups = scheduler.optimizer.param_groups
    pairs = zip(groups, scheduler.lr_lambdas, strict=True)
    scheduler.lr_lambdas = [factor if group["is_head"] else hold(factor) for group, factor in pairs]
    for group in groups:
        group["lr"] = group["lr"] if group["is_head"] else 0.0
    scheduler._last_lr = [group["lr"] for group in groups]
    return scheduler


def build_scheduler(
    optimizer: torch.optim.Optimizer, training: SpeechTrainingArguments, num_steps: int
) -> lr_scheduler.LRScheduler:
    """Builds a schedule of transformers or, for step, multi_step, exponential and one_cycle, of torch.optim.

    The arguments of the latter come from `lr_scheduler_kwargs` and are counted in epochs; the rate changes at the
    epochs' ends, except for one_cycle, which changes it at every step up to its `max_lr` (by default the learning
    rates themselves).

    Args:
        optimizer: whose rates are scheduled.
        training: `lr_scheduler_type`, `lr_scheduler_kwargs`, `warmup_steps`, `num_train_epochs`.
        num_steps: optimizer steps of the whole training.

    Raises:
        UserError: an argument that the schedule does not take.
    """
    name, kwargs = training.lr_scheduler_type, dict(training.lr_scheduler_kwargs or {})
    try:
        steps_per_epoch = max(1, math.ceil(num_steps / max(training.num_train_epochs, 1)))
        if name not in TORCH_SCHEDULES:
            scheduler = get_scheduler(
                name, optimizer, training.get_warmup_steps(num_steps), num_steps, scheduler_specific_kwargs=kwargs
            )
            return _hold_backbone(scheduler, round(training.head_only_epochs * steps_per_epoch))
        if name == "step":
            period = round(kwargs.pop("step_size", 1) * steps_per_epoch)
            return lr_scheduler.StepLR(optimizer, step_size=max(1, period), **kwargs)
        if name == "multi_step":
            milestones = [round(epoch * steps_per_epoch) for epoch in kwargs.pop("milestones")]
            return lr_scheduler.MultiStepLR(optimizer, milestones=milestones, **kwargs)
        if name == "exponential":
            # A StepLR of one epoch: ExponentialLR itself would multiply at every step.
            return lr_scheduler.StepLR(optimizer, step_size=steps_per_epoch, gamma=kwargs.pop("gamma"), **kwargs)
        rates = kwargs.pop("max_lr", [group["lr"] for group in optimizer.param_groups])
        return lr_scheduler.OneCycleLR(optimizer, max_lr=rates, total_steps=num_steps, **kwargs)
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"key 'lr_scheduler_kwargs': {training.lr_scheduler_kwargs} does not fit {name} ({error}).") from error
