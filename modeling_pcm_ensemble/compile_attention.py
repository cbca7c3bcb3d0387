"""Attention for decoding many rows on a CPU: `attn_implementation="grouped_sdpa"`."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED_SDPA = "grouped_sdpa"


def grouped_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    r"""
    As transformers' `sdpa`; but one query on a CPU is two matrix products over the heads that share keys and values,
    which for dozens of rows takes less time than torch's kernel.

    Args:
        query (`torch.Tensor` of shape `(rows, heads, queries, dim)`): the new tokens'.
        key, value (`torch.Tensor` of shape `(rows, key-value heads, length, dim)`): the cache's.
        attention_mask (`torch.Tensor` of shape `(rows or 1, 1, queries, length)`, *optional*): True = attend.

    Returns:
        `(rows, queries, heads, dim)`, and None for attention weights.
    """
    rows, heads, queries, dim = query.shape
    special = dropout or any(kwargs.get(name) is not None for name in ("position_bias", "cache", "s_aux", "softcap"))
    if queries > 1 or special or query.device.type != "cpu":
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )

    groups = query.reshape(-1, heads // key.shape[1], dim)  # (rows * key-value heads, heads that share them, dim)
    scores = torch.bmm(groups, key.flatten(0, 1).transpose(1, 2)).float() * (dim**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores.view(rows, heads, -1).masked_fill(~attention_mask[:, 0], torch.finfo(torch.float32).min)
    weights = scores.softmax(dim=-1).to(value.dtype).view(groups.shape[0], groups.shape[1], -1)

    attended = torch.bmm(weights, value.flatten(0, 1))
    return attended.reshape(rows, 1, heads, value.shape[-1]), None


@contextmanager
def grouped_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model on a CPU that attends by `sdpa` attend by `grouped_sdpa` inside."""
    config = model.config.get_text_config()
    chosen = config._attn_implementation
    if model.device.type == "cpu" and chosen == "sdpa":
        config._attn_implementation = GROUPED_SDPA
    try:
        yield
    finally:
        config._attn_implementation = chosen


AttentionInterface.register(GROUPED_SDPA, grouped_sdpa)
AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)

__all__ = ["GROUPED_SDPA", "grouped_attention", "grouped_sdpa"]
