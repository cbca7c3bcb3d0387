"""Rows that go on without an expert whose endpoint has failed."""

from collections.abc import Collection

import torch

from .merging import ExpertLogits


def without_failed(
    expert_logits: list[ExpertLogits],
    weights: torch.Tensor,
    served: Collection[int],
    adds_up: bool,
    reference: int | None = None,
) -> tuple[list[ExpertLogits], torch.Tensor, torch.Tensor | None]:
    r"""
    Leave out what has failed: logits that are NaN. In these rows the other experts share the weight of a mixture, as
    if the user had not asked for the one; where tilts add up, its tilt is missing.

    Args:
        expert_logits (`list[ExpertLogits]`): of all experts that were asked.
        weights (`torch.FloatTensor` of shape `(batch, positions, experts)`): log α, or strengths.
        served (`Collection[int]`): the experts that are behind endpoints.
        adds_up (`bool`): whether `weights` are strengths.
        reference (`int`, *optional*): the expert that a product cannot do without.

    Returns:
        The entries that are left, the weights that go with them, and which experts have failed in which rows,
        `torch.BoolTensor` of shape `(batch, experts)`; None where none has.

    Raises:
        RuntimeError: if a row has no expert left, or its reference has failed.
    """
    failed = torch.zeros(len(weights), weights.shape[-1], dtype=torch.bool, device=weights.device)
    left = []
    for entry in expert_logits:
        if entry.expert in served:
            rows = torch.arange(len(weights), device=weights.device) if entry.rows is None else entry.rows
            is_failed = entry.logits[..., 0].isnan().any(dim=1)  # (active rows,)
            failed[rows[is_failed], entry.expert] = True
            if is_failed.any():
                entry = ExpertLogits(entry.expert, rows[~is_failed], entry.logits[~is_failed])
        if entry.rows is None or len(entry.rows):
            left.append(entry)

    if not failed.any():
        return expert_logits, weights, None
    if reference is not None and failed[:, reference].any():
        raise RuntimeError("The endpoint of a product's `reference` has failed, which no row can go on without.")
    return left, _reweighted(weights, failed[:, None], adds_up), failed


def _reweighted(weights: torch.Tensor, failed: torch.Tensor, adds_up: bool) -> torch.Tensor:
    if adds_up:
        return weights.masked_fill(failed, 0.0)

    weights = weights.masked_fill(failed, float("-inf"))
    if weights.isneginf().all(dim=-1).any():
        raise RuntimeError("The endpoints of all experts of a row have failed.")
    return weights.log_softmax(dim=-1)


__all__ = ["without_failed"]
