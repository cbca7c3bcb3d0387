"""Attention for decoding many rows on a CPU: `attn_implementation="grouped_sdpa"`."""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
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
    which for dozens of rows takes less time than torch's kernel (`python -m benchmarks decode --fast`).

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
    groups = query.reshape(rows, key.shape[1], heads // key.shape[1], dim)
    scores = torch.matmul(groups, key.transpose(2, 3)).float() * (dim**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(torch.float32).min)
    attended = torch.matmul(scores.softmax(dim=-1).to(value.dtype), value)  # (rows, key-value heads, shared by, dim)
    return attended.reshape(rows, 1, heads, value.shape[-1]), None


AttentionInterface.register(GROUPED_SDPA, grouped_sdpa)
AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)

__all__ = ["GROUPED_SDPA", "grouped_sdpa"]
