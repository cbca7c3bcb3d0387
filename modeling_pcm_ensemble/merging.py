"""The mathematics of merging: tensors in, tensors out."""

from typing import NamedTuple

import torch


class ExpertLogits(NamedTuple):
    r"""
    One expert's logits, `(active rows, seq, vocab)`, on the batch rows that run it, `(active rows,)`; `rows` is None
    where all rows of the batch do.
    """

    expert: int
    rows: torch.LongTensor | None
    logits: torch.Tensor


def log_expert_weights(expert_weight_logits: torch.Tensor, log_weights: torch.Tensor) -> torch.Tensor:
    r"""
    Join the PCM's opinion and the user's weights: log α = log_softmax(h + log w), in float32 (float64 where h is).

    Args:
        expert_weight_logits (`torch.Tensor` of shape `(batch, seq, experts)`): h, the PCM's outputs.
        log_weights (`torch.FloatTensor` of shape `(batch, experts)`): log w, -inf for excluded experts.

    Returns:
        `torch.FloatTensor` of shape `(batch, seq, experts)`: log α, -inf for excluded experts.

    Source: α is arXiv 2407.04181's; the term log w is this library's, so that h = 0 gives α = w / Σw.
    """
    return (precise(expert_weight_logits) + log_weights[:, None]).log_softmax(dim=-1)


def mixture_log_probs(
    expert_logits: list[ExpertLogits],
    log_expert_weights: torch.Tensor,
    merge: str = "probabilities",
    expert_top_k: int | None = None,
    exact: bool = True,
) -> torch.Tensor:
    r"""
    Merge the experts' next-token distributions: log π = log Σ_i α_i π_i.

    Args:
        expert_logits (`list[ExpertLogits]`): N experts or fewer; in each row at least one.
        log_expert_weights (`torch.FloatTensor` of shape `(batch, seq, experts)`): log α.
        merge (`str`): `"probabilities"`, or `"logits"` for π ∝ exp Σ_i α_i logits_i, the paper's ablation.
        expert_top_k (`int`, *optional*): keep each expert's k most probable tokens and renormalise.
        exact (`bool`):
            Sum in log space, in full precision for improbable tokens and differentiable in log α; needs memory for
            all experts' distributions at once. False sums probabilities in place: values below 1e-38 are rounded.

    Returns:
        `torch.FloatTensor` of shape `(batch, seq, vocab)`: log π in nats.

    Source: arXiv 2407.04181.
    """
    if merge == "logits":
        return _sum_logits(expert_logits, log_expert_weights).log_softmax(dim=-1)
    if expert_top_k is not None:
        expert_logits = [entry._replace(logits=_keep_top_k(entry.logits, expert_top_k)) for entry in expert_logits]
    if exact:
        terms = [
            _spread(entry, precise(entry.logits).log_softmax(dim=-1), len(log_expert_weights), float("-inf"))
            + log_expert_weights[:, :, entry.expert, None]
            for entry in expert_logits
        ]
        stacked = torch.stack(terms)  # (experts, batch, seq, vocab)
        if expert_top_k is None:
            return stacked.logsumexp(dim=0)
        dropped = stacked.isinf().all(dim=0)  # kept by no expert; logsumexp has no gradient there
        return stacked.masked_fill(dropped, 0).logsumexp(dim=0).masked_fill(dropped, float("-inf"))
    expert_weights = log_expert_weights.exp()
    if not expert_weights.is_cpu or any(entry.rows is not None for entry in expert_logits):
        return _log_sum_probs(expert_logits, expert_weights, expert_top_k)
    # A few rows at a time: what is summed then stays in the processor's cache, three times as fast for 32 rows.
    starts = range(0, len(expert_weights), 2)
    chunks = [[entry._replace(logits=entry.logits[start : start + 2]) for entry in expert_logits] for start in starts]
    weights = expert_weights.split(2)
    return torch.cat([_log_sum_probs(chunk, part, expert_top_k) for chunk, part in zip(chunks, weights)])


def token_log_probs(
    expert_logits: list[ExpertLogits], token_ids: torch.LongTensor, num_experts: int, expert_top_k: int | None = None
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
    """
    dtype = torch.promote_types(expert_logits[0].logits.dtype, torch.float32)
    log_probs = torch.full((*token_ids.shape, num_experts), float("-inf"), dtype=dtype, device=token_ids.device)
    for expert, rows, logits in expert_logits:
        tokens = token_ids if rows is None else token_ids[rows]
        if expert_top_k is not None:
            logits = _keep_top_k(logits, expert_top_k)
        rows = slice(None) if rows is None else rows
        log_probs[rows, :, expert] = precise(logits).log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
    return log_probs


def precise(tensor: torch.Tensor) -> torch.Tensor:
    """In float32, or in float64 where it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _spread(entry: ExpertLogits, values: torch.Tensor, batch_size: int, fill: float) -> torch.Tensor:
    """`(active rows, …)` to `(batch, …)`."""
    if entry.rows is None:
        return values
    return values.new_full((batch_size, *values.shape[1:]), fill).index_copy_(0, entry.rows, values)


def _keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """-inf for all but the k highest logits of each distribution."""
    top, index = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return torch.full_like(logits, float("-inf")).scatter_(-1, index, top)


def _log_sum_probs(
    expert_logits: list[ExpertLogits], expert_weights: torch.Tensor, expert_top_k: int | None
) -> torch.Tensor:
    """log Σ_i α_i π_i, `(batch, seq, vocab)`; each vocabulary-sized tensor is written once and then reused."""
    mixture = None
    for expert, rows, logits in sorted(expert_logits, key=lambda entry: entry.rows is not None):
        probs = logits.softmax(dim=-1, dtype=torch.float32)  # (active rows, seq, vocab)
        weights = expert_weights[:, :, expert, None]  # (batch, seq, 1)
        if rows is None:
            mixture = probs.mul_(weights) if mixture is None else mixture.addcmul_(probs, weights)
            continue
        if mixture is None:
            mixture = probs.new_zeros(len(expert_weights), *probs.shape[1:])
        mixture.index_add_(0, rows, probs.mul_(weights[rows]))
    if expert_top_k is None:
        mixture.clamp_(min=torch.finfo(torch.float32).tiny)  # log 0 only for tokens that no expert kept
    return mixture.log_()


def _sum_logits(expert_logits: list[ExpertLogits], log_expert_weights: torch.Tensor) -> torch.Tensor:
    """Σ_i α_i logits_i, `(batch, seq, vocab)`."""
    return sum(
        _spread(entry, precise(entry.logits), len(log_expert_weights), 0.0)
        * log_expert_weights[:, :, entry.expert, None].exp()
        for entry in expert_logits
    )


__all__ = ["ExpertLogits", "log_expert_weights", "mixture_log_probs", "precise", "token_log_probs"]
