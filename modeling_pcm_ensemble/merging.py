"""The mathematics of mixtures, in which experts share the next token: tensors in, tensors out."""

from collections.abc import Callable
from typing import NamedTuple

import torch

# What an expert's top k leaves out keeps its probability times e^-100, 4e-44: at usual temperatures no sample changes,
# while a grammar that forbids what was kept, and given text, find finite numbers in the order of the whole mixture.
DROPPED = 100.0  # nats
ROWS_AT_ONCE = 2  # that a CPU sums


class ExpertLogits(NamedTuple):
    r"""
    One expert's logits, `(active rows, seq, vocab)`, on the batch rows that run it, `(active rows,)`; `rows` is None
    where all rows of the batch do, `expert` where it is no expert that runs but a bare backbone.
    """

    expert: int | None
    rows: torch.Tensor | None
    logits: torch.Tensor


def mixture_log_probs(
    expert_logits: list[ExpertLogits],
    log_expert_weights: torch.Tensor,
    merge: str = "probabilities",
    expert_top_k: int | None = None,
    exact: bool = True,
    normalize: bool = True,
) -> torch.Tensor:
    r"""
    Merge the experts' next-token distributions: log π = log Σ_i α_i π_i.

    Args:
        expert_logits (`list[ExpertLogits]`): N experts or fewer; in each row at least one.
        log_expert_weights (`torch.FloatTensor` of shape `(batch, seq, experts)`): log α.
        merge (`str`): one of `MIXTURES`: `"probabilities"`, or `"logits"` for π ∝ exp Σ_i α_i logits_i, the paper's
            ablation.
        expert_top_k (`int`, *optional*):
            Keep each expert's k most probable tokens and renormalise. What no expert keeps has its probability of the
            whole mixture times e^-100, below 1e-43 together (at a temperature T, times e^(-100/T)); its order is that
            of the whole mixture.
        exact (`bool`):
            Sum in log space, differentiable in log α; needs memory for all experts' distributions at once. False sums
            probabilities in place, and only where some are below 1e-38, in log space too.
        normalize (`bool`):
            False adds Σ_i α_i log Z_i at each position, Z_i being what expert i's kept tokens were divided by. One
            expert's logits then come back as they were. With `merge="logits"` it gives Σ_i α_i logits_i.

    Returns:
        `torch.FloatTensor` of shape `(batch, seq, vocab)`: log π in nats, plus the above without `normalize`. A token
        that every expert gives -inf has -inf, and no gradient.

    Source: arXiv 2407.04181; the offset of `normalize=False` is this library's.

    Example:

    ```python
    >>> import torch
    >>> from modeling_pcm_ensemble.merging import ExpertLogits, mixture_log_probs

    >>> logits = [torch.tensor([[[0.9, 0.1]]]).log(), torch.zeros(1, 1, 2)]
    >>> experts = [ExpertLogits(i, None, logits[i]) for i in range(2)]
    >>> even = torch.tensor([[[0.5, 0.5]]]).log()
    >>> [round(p, 3) for p in mixture_log_probs(experts, even).exp().flatten().tolist()]
    [0.7, 0.3]

    ```
    """
    return MIXTURES[merge](expert_logits, log_expert_weights, expert_top_k, exact, normalize)


def _merge_probabilities(
    expert_logits: list[ExpertLogits],
    log_expert_weights: torch.Tensor,
    expert_top_k: int | None,
    exact: bool,
    normalize: bool,
) -> torch.Tensor:
    """log Σ_i α_i π_i, by the way that suits."""
    if exact:
        return _log_sum_exactly(expert_logits, log_expert_weights, expert_top_k, normalize)

    def merge(expert_logits: list[ExpertLogits], expert_weights: torch.Tensor) -> torch.Tensor:
        return _log_sum_probs(expert_logits, expert_weights, expert_top_k, normalize)

    return few_rows_at_once(merge, expert_logits, log_expert_weights.exp())


def few_rows_at_once(
    merge: Callable[[list[ExpertLogits], torch.Tensor], torch.Tensor],
    expert_logits: list[ExpertLogits],
    expert_weights: torch.Tensor,
) -> torch.Tensor:
    """
    Give what `merge` gives. On a CPU it is asked for a few rows at a time: what it sums then stays in the processor's
    cache, three times as fast for 32 rows.
    """
    if not expert_weights.is_cpu or any(entry.rows is not None for entry in expert_logits):
        return merge(expert_logits, expert_weights)

    merged = []
    for start in range(0, len(expert_weights), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        chunk = [entry._replace(logits=entry.logits[rows]) for entry in expert_logits]
        merged.append(merge(chunk, expert_weights[rows]))
    return torch.cat(merged)


def token_log_probs(
    expert_logits: list[ExpertLogits], token_ids: torch.Tensor, num_experts: int, expert_top_k: int | None = None
) -> torch.Tensor:
    r"""
    Read off each expert's log-probability of given tokens.

    Args:
        expert_logits (`list[ExpertLogits]`): logits at the positions that predict the tokens.
        token_ids (`torch.LongTensor` of shape `(batch, seq)`): the tokens.
        num_experts (`int`): N.
        expert_top_k (`int`, *optional*): as in [`mixture_log_probs`].

    Returns:
        `torch.FloatTensor` of shape `(batch, seq, experts)`: log π_i of each token, -inf where expert i did not run.
        What expert i's top k leaves out has its log π_i less 100 nats.
    """
    dtype = torch.promote_types(expert_logits[0].logits.dtype, torch.float32)
    log_probs = torch.full((*token_ids.shape, num_experts), float("-inf"), dtype=dtype, device=token_ids.device)

    for expert, rows, logits in expert_logits:
        active = slice(None) if rows is None else rows
        of_expert = _log_probs(logits, expert_top_k)  # (active rows, seq, vocab)
        log_probs[active, :, expert] = of_expert.gather(-1, token_ids[active][..., None])[..., 0]
    return log_probs


def precise(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float32, or in float64 where it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def spread(entry: ExpertLogits, values: torch.Tensor, batch_size: int, fill: float) -> torch.Tensor:
    """Put values of an expert's rows, `(active rows, …)`, at their rows of the batch, `(batch, …)`."""
    if entry.rows is None:
        return values
    return values.new_full((batch_size, *values.shape[1:]), fill).index_copy_(0, entry.rows, values)


def _log_probs(logits: torch.Tensor, expert_top_k: int | None) -> torch.Tensor:
    """One expert's log π_i; where it has a top k, of those renormalised, and of the rest less `DROPPED`."""
    log_probs = precise(logits).log_softmax(dim=-1)
    if expert_top_k is None:
        return log_probs
    top, index = logits.topk(min(expert_top_k, logits.shape[-1]), dim=-1)
    return (log_probs - DROPPED).scatter_(-1, index, precise(top).log_softmax(dim=-1))


def _log_sum_exactly(
    expert_logits: list[ExpertLogits], log_expert_weights: torch.Tensor, expert_top_k: int | None, normalize: bool
) -> torch.Tensor:
    """log Σ_i α_i π_i, `(batch, seq, vocab)`, in log space."""
    batch_size = len(log_expert_weights)
    terms: list[torch.Tensor] = []
    offset: torch.Tensor | float = 0.0  # (batch, seq, 1), without `normalize`
    for entry in expert_logits:
        log_probs = _log_probs(entry.logits, expert_top_k)  # (active rows, seq, vocab)
        log_weights = log_expert_weights[:, :, entry.expert, None]  # (batch, seq, 1)
        terms.append(spread(entry, log_probs, batch_size, float("-inf")) + log_weights)

        if not normalize:
            log_normalizer = _log_normalizer(entry.logits, log_probs.amax(dim=-1, keepdim=True))
            offset = offset + spread(entry, log_normalizer, batch_size, 0.0) * log_weights.exp()

    stacked = torch.stack(terms)  # (experts, batch, seq, vocab)
    impossible = stacked.isneginf().all(dim=0)  # logsumexp has no gradient there that is a number
    mixture = stacked.masked_fill(impossible, 0).logsumexp(dim=0)
    return mixture.masked_fill(impossible, float("-inf")) + offset


def _log_sum_probs(
    expert_logits: list[ExpertLogits], expert_weights: torch.Tensor, expert_top_k: int | None, normalize: bool
) -> torch.Tensor:
    """log Σ_i α_i π_i, `(batch, seq, vocab)`; each vocabulary-sized tensor is written once and then reused."""
    tiny, batch_size = torch.finfo(torch.float32).tiny, len(expert_weights)
    mixture: torch.Tensor | None = None  # (batch, seq, vocab)
    offset: torch.Tensor | float = 0.0  # (batch, seq, 1), without `normalize`
    kept: list[tuple[tuple[torch.Tensor, ...], torch.Tensor]] = []  # of each expert, where its top k are and their α π

    # Experts on all rows first, whose own tensor then holds the sum.
    for entry in sorted(expert_logits, key=lambda entry: entry.rows is not None):
        expert, rows, logits = entry
        probs = logits.softmax(dim=-1, dtype=torch.float32)  # (active rows, seq, vocab)
        weights = expert_weights[:, :, expert, None]  # (batch, seq, 1)
        best = probs

        if expert_top_k is not None:
            top, index = logits.topk(min(expert_top_k, logits.shape[-1]), dim=-1)  # (active rows, seq, k)
            best = top.softmax(dim=-1, dtype=torch.float32)
            shares = best * (weights if rows is None else weights[rows])
            kept.append((_places(rows, index), shares.clamp_(min=tiny)))

        if not normalize:
            log_normalizer = _log_normalizer(logits, best.amax(dim=-1, keepdim=True).log())
            offset = offset + spread(entry, log_normalizer, batch_size, 0.0) * weights

        if rows is None:
            mixture = probs.mul_(weights) if mixture is None else mixture.addcmul_(probs, weights)
        else:
            mixture = probs.new_zeros(batch_size, *probs.shape[1:]) if mixture is None else mixture
            mixture.index_add_(0, rows, probs.mul_(weights[rows]))

    if mixture is None:
        raise ValueError("`expert_logits` is empty. In each row at least one expert must run.")
    if mixture.amin() < tiny:  # what float32 rounds or cannot hold, such as a token that no expert allows
        return _log_sum_exactly(expert_logits, expert_weights.log(), expert_top_k, normalize)

    log_probs = mixture.log_()
    if kept:
        _put_kept(log_probs, kept)
    return log_probs if normalize else log_probs.add_(offset)


def _places(rows: torch.Tensor | None, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Where tokens `index`, `(active rows, seq, k)`, of an expert's rows stand in a tensor `(batch, seq, vocab)`."""
    num_rows, seq, _ = index.shape
    active = torch.arange(num_rows, device=index.device) if rows is None else rows
    return active[:, None, None], torch.arange(seq, device=index.device)[:, None], index


def _put_kept(log_probs: torch.Tensor, kept: list[tuple[tuple[torch.Tensor, ...], torch.Tensor]]):
    """Write log Σ_i α_i π_i of the experts' top k over the whole mixture's, which is lowered by `DROPPED`."""
    sums = torch.zeros_like(log_probs)
    for places, shares in kept:
        sums[places] += shares  # an expert keeps a token once

    log_probs.sub_(DROPPED)
    for places, _ in kept:
        log_probs[places] = sums[places].log()


def _log_normalizer(logits: torch.Tensor, best_log_prob: torch.Tensor) -> torch.Tensor:
    """log Z, `(active rows, seq, 1)`, of log π = logits - log Z, read off the most probable token."""
    return precise(logits.amax(dim=-1, keepdim=True)) - best_log_prob


def sum_of_logits(expert_logits: list[ExpertLogits], coefficients: torch.Tensor) -> torch.Tensor:
    """Give Σ_i c_i logits_i, `(batch, seq, vocab)`, for c of `(batch, seq, models)`; a bare backbone's is the last."""
    total = _summed(expert_logits, coefficients, torch.mul)
    if total.isfinite().all():
        return total
    return _summed(expert_logits, coefficients, times)  # -inf takes care, and time


def _summed(
    expert_logits: list[ExpertLogits],
    coefficients: torch.Tensor,
    multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    total: torch.Tensor | None = None
    for entry in expert_logits:
        added = multiply(precise(entry.logits), coefficient_of(entry, coefficients))
        added = spread(entry, added, len(coefficients), 0.0)
        total = added if total is None else total + added

    if total is None:
        raise ValueError("`expert_logits` is empty. In each row at least one model must run.")
    return total


def coefficient_of(entry: ExpertLogits, coefficients: torch.Tensor) -> torch.Tensor:
    """Give a model's own, `(active rows, seq, 1)`, of `(batch, seq, models)`; a bare backbone's is the last."""
    own = coefficients[:, :, -1 if entry.expert is None else entry.expert, None]
    return own if entry.rows is None else own[entry.rows]


def times(logits: torch.Tensor, coefficient: torch.Tensor) -> torch.Tensor:
    """Multiply logits by c; -inf stays -inf at any c but 0, and has no gradient."""
    impossible = logits.isneginf()
    product = logits.masked_fill(impossible, 0) * coefficient
    return product.masked_fill(impossible & (coefficient != 0), float("-inf"))


def _merge_logits(
    expert_logits: list[ExpertLogits],
    log_expert_weights: torch.Tensor,
    expert_top_k: int | None,
    exact: bool,
    normalize: bool,
) -> torch.Tensor:
    """Σ_i α_i logits_i, `(batch, seq, vocab)`, of all tokens and always exact; normalised where that is asked for."""
    merged = sum_of_logits(expert_logits, log_expert_weights.exp())
    return merged.log_softmax(dim=-1) if normalize else merged


# The ways to mix what experts predict, by the value of `merge`. All are called alike, and keep these promises:
# - an expert's `rows` may be some of the batch, or None for all;
# - a token that every expert gives -inf has -inf, and no gradient;
# - with `normalize` they give log π, and without it one active expert's logits come back as they were.
# Those that cut no distributions ignore `expert_top_k`, which the configuration refuses with them, and `exact`.
MIXTURES: dict[str, Callable[[list[ExpertLogits], torch.Tensor, int | None, bool, bool], torch.Tensor]] = {
    "probabilities": _merge_probabilities,
    "logits": _merge_logits,
}


__all__ = [
    "DROPPED",
    "MIXTURES",
    "ExpertLogits",
    "coefficient_of",
    "few_rows_at_once",
    "mixture_log_probs",
    "precise",
    "spread",
    "sum_of_logits",
    "times",
    "token_log_probs",
]
