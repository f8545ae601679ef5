"""Dropout that costs a CPU little.

torch draws one random number a value, one after the other on a single core: with the dropout of 0.1 that wav2vec2 and its
relatives train with, that is a third of a training step on a CPU with fast bfloat16 (benchmarks/README.md). Here one
64-bit random number of a quicker generator (numpy's SFC64) decides about eight values, block by block, so that the
numbers never leave the processor's cache; attention draws them for a whole score matrix.

Values are dropped with exactly the probability asked for and scaled in the same way. Eight bits alone would round it to
1/256, so rows of values are compared with the number above or below, as often as makes the probability right. torch's own
generator gives each mask its seed, so that seeds and resumed runs hold. GPUs have a fast dropout of their own.
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION_NAME = "sdpa_cpu_dropout"
LEVELS = 2**8  # of the 8-bit numbers that decide
DECISIONS_PER_DRAW = 8  # in one 64-bit number
ROW = 2**10  # values that are compared with the same number
BLOCK = 2**9  # rows that are drawn at once: 512 KiB, in the cache of any recent processor


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, p: float) -> torch.Tensor:
        # Seeded by torch's generator, and several times as fast as it.
        seed = int(torch.empty((), dtype=torch.int64).random_().numpy())
        ctx.kept = torch.from_numpy(_draw_kept(values.numel(), p, seed)).view(values.shape)
        ctx.scale = 1 / (1 - p)
        return _scale(values, ctx.kept, ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _scale(gradient, ctx.kept, ctx.scale), None


def _draw_kept(num_values: int, p: float, seed: int) -> np.ndarray:
    # (num_values,) of uint8: 0 with probability p, else 1.
    if p > 0.5:  # so that no number to compare with exceeds eight bits
        return 1 - _draw_kept(num_values, 1 - p, seed)
    generator = np.random.SFC64(seed)
    num_rows = -(-num_values // ROW)
    kept = np.empty((num_rows, ROW), bool)
    below, share_above = divmod(p * LEVELS, 1)
    for first in range(0, num_rows, BLOCK):
        block = kept[first : first + BLOCK]
        levels = generator.random_raw(block.size // DECISIONS_PER_DRAW).view(np.uint8).reshape(block.shape)
        above = generator.random_raw(len(block)) < np.uint64(share_above * 2.0**64)
        np.greater_equal(levels, (above + int(below)).astype(np.uint8)[:, None], out=block)
    return kept.view(np.uint8).ravel()[:num_values]


def _scale(values: torch.Tensor, kept: torch.Tensor, scale: float) -> torch.Tensor:
    # 0 + scale * values * kept: both products in one pass over the memory.
    return torch.addcmul(values.new_zeros(()), values, kept, value=scale)


def drop(values: torch.Tensor, p: float) -> torch.Tensor:
    """Zeroes each value with probability p and divides the others by 1 - p; 0 <= p < 1, any shape, on the CPU."""
    return _Drop.apply(values, p)


class CpuDropout(nn.Dropout):
    """`nn.Dropout` by way of `drop`."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Returns values of the same shape."""
        if not self.training or self.p == 0.0 or values.device.type != "cpu" or self.p >= 1.0:
            return super().forward(values)
        return drop(values, self.p)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with dropout by way of `drop`, for encoders; without dropout it is transformers' SDPA.

    Args:
        module: the attention layer.
        query: (batch, heads, frames, width); `key` and `value` likewise.
        attention_mask: bool, (batch, 1, frames, frames), true where a frame may be attended to.
        dropout: probability.
        scaling: of the scores; by default 1 / sqrt(width).
        is_causal: as in SDPA.
        kwargs: for SDPA.

    Returns:
        (batch, frames, heads, width) and None, as transformers' attention functions do.
    """
    if dropout == 0.0 or query.device.type != "cpu":
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query * scale, key.transpose(2, 3))  # (batch, heads, frames, frames)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = drop(torch.softmax(scores, dim=-1).to(value.dtype), dropout)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None


def use_cpu_dropout(model: PreTrainedModel) -> None:
    """Makes a model that is trained on the CPU drop values by way of `drop`, in place; nothing of it is saved."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, CpuDropout(child.p).train(child.training))
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(ATTENTION_NAME, attend)
        AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
        model.set_attn_implementation(ATTENTION_NAME)
