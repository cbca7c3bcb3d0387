"""The mathematics of tilts that add up, in which each expert acts in full: tensors in, tensors out."""

import torch

from .merging import (
    DROPPED,
    ExpertLogits,
    coefficient_of,
    few_rows_at_once,
    precise,
    spread,
    sum_of_logits,
    times,
)

NO_PART = 1e-5  # a share in a sum that rounding makes of 0


def product_log_probs(
    expert_logits: list[ExpertLogits],
    strengths: torch.Tensor,
    reference: int | None = None,
    expert_top_k: int | None = None,
    normalize: bool = True,
) -> torch.Tensor:
    r"""
    Add the experts' tilts to the reference: log π = log_softmax(log π_0 + Σ_i s_i (log π_i − log π_0)).

    Args:
        expert_logits (`list[ExpertLogits]`): of the reference, on all rows, and of N experts or fewer.
        strengths (`torch.FloatTensor` of shape `(batch, seq, experts)`): s, of any sign; 0 for the reference.
        reference (`int`, *optional*): the expert that is π_0; None for the entry of a bare backbone.
        expert_top_k (`int`, *optional*):
            Know of the reference and of each expert the k most probable tokens alone. Candidates are all tokens that
            one of them keeps, but one whose share in the sum is 0 to five digits (as the reference's at Σ s = 1, so
            that one expert at strength 1 is itself). What a model does not keep is worth to it what its least probable
            kept token is. Other tokens rank below all candidates, by the whole product, each by 100 nats or more.
        normalize (`bool`): False gives the sum of logits, so that one expert at strength 1 gives its own.

    Returns:
        `torch.FloatTensor` of shape `(batch, seq, vocab)`: log π in nats. A token that the reference or an expert
        gives -inf, and whose share in the sum is not 0, has -inf, and no gradient.

    Source: the product is MOD's (NeurIPS 2024) and DExperts' (arXiv 2105.03023), at weights that stand still; what a
    top k means in it is this library's.

    Example:

    ```python
    >>> import torch
    >>> from modeling_pcm_ensemble.merging import ExpertLogits
    >>> from modeling_pcm_ensemble.tilts import product_log_probs

    >>> probs = {None: [0.5, 0.5], 0: [0.8, 0.2], 1: [0.6, 0.4]}  # of the reference and two experts
    >>> models = [ExpertLogits(i, None, torch.tensor([[p]]).log()) for i, p in probs.items()]
    >>> both = product_log_probs(models, torch.ones(1, 1, 2))  # 0.8 · 0.6 to 0.2 · 0.4
    >>> [round(p, 3) for p in both.exp().flatten().tolist()]
    [0.857, 0.143]

    ```
    """

    def merge(expert_logits: list[ExpertLogits], coefficients: torch.Tensor) -> torch.Tensor:
        total = sum_of_logits(expert_logits, coefficients)
        if expert_top_k is not None:
            total = _put_candidates(total, expert_logits, coefficients, expert_top_k)
        return total.log_softmax(dim=-1) if normalize else total

    return few_rows_at_once(merge, expert_logits, _coefficients(strengths, reference))


def token_tilts(
    expert_logits: list[ExpertLogits],
    token_ids: torch.Tensor,
    num_experts: int,
    reference: int | None = None,
    expert_top_k: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Read off the reference's log-probability of given tokens, and what each expert changes of it.

    Args:
        expert_logits, reference, expert_top_k: as for [`product_log_probs`].
        token_ids (`torch.LongTensor` of shape `(batch, seq, tokens)`): the tokens.
        num_experts (`int`): N.

    Returns:
        log π_0, `torch.FloatTensor` of shape `(batch, seq, tokens)`, and the tilts log π_i − log π_0, `(batch, seq,
        tokens, experts)`, of any sign, in nats; 0 where an expert did not run, and of the reference. A token that one
        of the models makes impossible has log π_0 = -inf and no tilts.
    """
    log_probs = {}
    for entry in expert_logits:
        whole = precise(entry.logits).log_softmax(dim=-1)  # (active rows, seq, vocab)
        active = slice(None) if entry.rows is None else entry.rows
        log_probs[entry.expert] = whole.gather(-1, token_ids[active]).maximum(_least_kept(whole, expert_top_k))

    base = log_probs[reference]
    impossible = base.isneginf()
    tilts = base.new_zeros(*base.shape, num_experts)
    for entry in expert_logits:
        if entry.expert != reference:
            active = slice(None) if entry.rows is None else entry.rows
            tilts[active, ..., entry.expert] = log_probs[entry.expert] - base[active]
            impossible[active] |= log_probs[entry.expert].isneginf()

    return base.masked_fill(impossible, float("-inf")), tilts.masked_fill(impossible[..., None], 0.0)


def _coefficients(strengths: torch.Tensor, reference: int | None) -> torch.Tensor:
    """What each model counts in the sum, `(batch, seq, models)`, 1 together; a bare reference is the last."""
    of_reference = 1 - strengths.sum(dim=-1, keepdim=True)
    if reference is None:
        return torch.cat([strengths, of_reference], dim=-1)
    return torch.cat([strengths[..., :reference], of_reference, strengths[..., reference + 1 :]], dim=-1)


def _least_kept(logits: torch.Tensor, expert_top_k: int | None) -> torch.Tensor:
    """The logit of the k-th most probable token, `(…, 1)`; of the least probable one without a k."""
    if expert_top_k is None or expert_top_k >= logits.shape[-1]:
        return logits.amin(dim=-1, keepdim=True)
    return logits.topk(expert_top_k, dim=-1).values[..., -1:]


def _put_candidates(
    total: torch.Tensor, expert_logits: list[ExpertLogits], coefficients: torch.Tensor, expert_top_k: int
) -> torch.Tensor:
    """The sum of logits, `(batch, seq, vocab)`, where what no model keeps comes below what one does."""
    tokens, is_repeated, least_kept = candidates(expert_logits, coefficients, expert_top_k)

    # To a model that did not keep a candidate, it is worth as much as the last one that it kept.
    values = torch.zeros_like(tokens, dtype=total.dtype)  # (batch, seq, candidates)
    for entry, least in zip(expert_logits, least_kept):
        active = slice(None) if entry.rows is None else entry.rows
        known = precise(entry.logits.gather(-1, tokens[active]).maximum(least))
        added = times(known, coefficient_of(entry, coefficients))
        values = values + spread(entry, added, len(total), 0.0)

    # A candidate that stands there twice is written twice, but has its gradient once.
    values = torch.where(is_repeated, values.detach(), values)

    # Other tokens keep their order, moved as a whole to below the lowest candidate.
    highest = total.amax(dim=-1, keepdim=True)
    highest = highest.masked_fill(highest.isneginf(), 0)  # where each token is impossible for one of them
    below = values.amin(dim=-1, keepdim=True) - highest - DROPPED
    return (total + below).scatter(-1, tokens, values)


def candidates(
    expert_logits: list[ExpertLogits], coefficients: torch.Tensor, expert_top_k: int
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """
    Tokens that a model with a part in the sum keeps, `(batch, seq, models · k)`; whether a place repeats the token of
    another one; and of each model the logit of its least probable kept token, `(active rows, seq, 1)`.
    """
    kept, least_kept = [], []
    for entry in expert_logits:
        top = entry.logits.topk(min(expert_top_k, entry.logits.shape[-1]), dim=-1)
        has_no_part = coefficient_of(entry, coefficients).abs() < NO_PART  # (active rows, seq, 1)
        kept.append(spread(entry, top.indices.masked_fill(has_no_part, -1), len(coefficients), -1))
        least_kept.append(top.values[..., -1:])

    # Sorted, equal ones stand side by side, and places without a token come last.
    tokens = torch.cat(kept, dim=-1).sort(dim=-1, descending=True).values
    is_repeated = torch.zeros_like(tokens, dtype=torch.bool)
    is_repeated[..., 1:] = (tokens[..., 1:] == tokens[..., :-1]) | (tokens[..., 1:] < 0)
    return torch.where(tokens < 0, tokens[..., :1], tokens), is_repeated, least_kept


__all__ = ["candidates", "product_log_probs", "token_tilts"]
