"""What endpoints leave open: rows whose expert has failed, and the probability of tokens that are not told."""

from collections.abc import Collection
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any

import torch

from .merging import ExpertLogits, precise, spread

NO_REFERENCE = "The endpoint of a product's `reference` has failed, which no row can go on without."


def results(futures: Collection[Future]) -> list[Any]:
    """Return all results, in their order, or raise the first failure without waiting for the others."""
    for future in wait(futures, return_when=FIRST_EXCEPTION).done:
        future.result()
    return [future.result() for future in futures]


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
        reference (`int`, *optional*): the expert that a product cannot do without; a bare backbone is another one.

    Returns:
        The entries that are left, the weights that go with them, and which experts have failed in which rows,
        `torch.BoolTensor` of shape `(batch, experts)`; None where none has.

    Raises:
        RuntimeError: if a row has no expert left, or its reference has failed.
    """
    failed = torch.zeros(len(weights), weights.shape[-1], dtype=torch.bool, device=weights.device)
    left = []
    for entry in expert_logits:
        if entry.expert is None and entry.logits[..., 0].isnan().any():
            raise RuntimeError(NO_REFERENCE)
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
        raise RuntimeError(NO_REFERENCE)
    return left, _reweighted(weights, failed[:, None], adds_up), failed


def _reweighted(weights: torch.Tensor, failed: torch.Tensor, adds_up: bool) -> torch.Tensor:
    if adds_up:
        return weights.masked_fill(failed, 0.0)

    weights = weights.masked_fill(failed, float("-inf"))
    if weights.isneginf().all(dim=-1).any():
        raise RuntimeError("The endpoints of all experts of a row have failed. The log says why.")
    return weights.log_softmax(dim=-1)


def truncation_bound(
    expert_logits: list[ExpertLogits],
    expert_weights: torch.Tensor,
    expert_top_k: int,
    served: Collection[int] = (),
) -> torch.Tensor:
    r"""
    Bound how far a mixture of top k is from that of whole distributions: Σ_i α_i (1 − Σ_{kept y} π_i(y)).

    Args:
        expert_logits (`list[ExpertLogits]`): of a call with `output_expert_logits=True`.
        expert_weights (`torch.FloatTensor` of shape `(batch, positions, experts)`): its α.
        expert_top_k (`int`): the tokens that are kept of each expert.
        served (`Collection[int]`): the experts behind endpoints, `model.served_experts`, which tell log-probabilities.

    Returns:
        `torch.FloatTensor` of shape `(batch, positions)`, 0 to 1: the total variation distance is at most this.

    Source: this library. An expert that is renormalised to its kept tokens moves by the mass of the others.

    Example:

    ```python
    >>> import torch
    >>> from modeling_pcm_ensemble.failures import truncation_bound
    >>> from modeling_pcm_ensemble.merging import ExpertLogits

    >>> probs = [[0.5, 0.3, 0.2], [0.9, 0.1, 0.0]]
    >>> models = [ExpertLogits(i, None, torch.tensor([[p]]).log()) for i, p in enumerate(probs)]
    >>> round(truncation_bound(models, torch.tensor([[[0.5, 0.5]]]), expert_top_k=2).item(), 3)
    0.1

    ```
    """
    bound = expert_weights.new_zeros(expert_weights.shape[:2])
    for entry in expert_logits:
        if entry.expert is None:
            raise ValueError("The bound is of mixtures, and a bare backbone is the reference of a product.")
        logits = precise(entry.logits)
        log_probs = logits if entry.expert in served else logits.log_softmax(dim=-1)
        kept = log_probs.topk(min(expert_top_k, logits.shape[-1]), dim=-1).values.exp().sum(dim=-1)
        missing = spread(entry, (1 - kept).clamp(min=0), len(bound), 0.0)  # (batch, positions)
        bound = bound + expert_weights[..., entry.expert] * missing
    return bound


__all__ = ["results", "truncation_bound", "without_failed"]
