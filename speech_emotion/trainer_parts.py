"""What transformers' Trainer does differently here, so that both training scripts share it."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from speech_emotion.batching import LengthBucketSampler
from speech_emotion.modeling import WEIGHTS_FILE, has_adapters, load_weights, save_checkpoint_model
from speech_emotion.optimization import OPTIMIZERS, build_optimizer, build_scheduler


class TrainerParts:
    """Sampler, optimizer, schedule and the loading of checkpoints; to be inherited before Trainer.

    Args:
        sampler: of the training rows.
        kwargs: of Trainer.
    """

    def __init__(self, sampler: LengthBucketSampler, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sampler = sampler

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthBucketSampler:
        return self.sampler

    def create_optimizer(self, model: PreTrainedModel | None = None) -> torch.optim.Optimizer:
        """Builds the optimizer that the hand-written loop builds too, where it is one of ours."""
        if self.optimizer is None and self.args.optim in OPTIMIZERS:
            self.optimizer = build_optimizer(self.model if model is None else model, self.args)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Builds the schedule that the hand-written loop builds too."""
        if self.lr_scheduler is None:
            self.lr_scheduler = build_scheduler(optimizer or self.optimizer, self.args, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # Trainer loads a checkpoint's weights by their names in the file, which for some architectures (AST) are not those of
    # the model: it would skip them and keep the last epoch's. `from_pretrained` knows both names.
    def _load_best_model(self) -> None:
        if not self._load_whole(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_whole(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if has_adapters(self.model):
            save_checkpoint_model(self.model, output_dir or self.args.output_dir)

    def _load_whole(self, folder: str) -> bool:
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if is_sharded or not (Path(folder) / WEIGHTS_FILE).is_file():
            return False
        load_weights(self.model, folder)
        return True
