"""What a policy update minimises: tensors in, tensors out. The gradient flows through the experts' weights alone."""

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from ..merging import precise

LOSSES = ("rebel", "ppo", "rloo")


def mixture_token_log_probs(log_expert_weights: torch.Tensor, expert_log_probs: torch.Tensor) -> torch.Tensor:
    r"""
    Compute log π of given tokens from what the experts said when they were sampled.

    Args:
        log_expert_weights (`torch.FloatTensor` of shape `(batch, seq, experts)`): log α, -inf for inactive experts.
        expert_log_probs (`torch.FloatTensor` of shape `(batch, seq, experts)`): each expert's log-probability of the
            token, -inf for inactive experts and for tokens that an expert's `expert_top_k` dropped.

    Returns:
        `torch.FloatTensor` of shape `(batch, seq)`: log Σ_i α_i π_i, in nats.
    """
    # -inf has no gradient that is a number, and an inactive expert adds nothing.
    active = expert_log_probs.isfinite() & log_expert_weights.isfinite()
    terms = log_expert_weights.masked_fill(~active, 0) + expert_log_probs.masked_fill(~active, 0)
    return terms.masked_fill(~active, -1e30).logsumexp(dim=-1)


def product_token_log_probs(strengths: torch.Tensor, recorded: torch.Tensor) -> torch.Tensor:
    r"""
    Compute log π of given tokens from what the experts said of them, and of every other candidate, when they were
    sampled.

    Args:
        strengths (`torch.FloatTensor` of shape `(batch, seq, experts)`): s.
        recorded (`torch.Tensor` of shape `(batch, seq, candidates, experts + 1)`): of each candidate, of which the
            token is the first, the experts' tilts and then log π_0; -inf where a place has no candidate.

    Returns:
        `torch.FloatTensor` of shape `(batch, seq)`: log π_0 + Σ_i s_i (log π_i − log π_0), normalised, in nats.
    """
    recorded = precise(recorded)
    totals = recorded[..., -1] + (recorded[..., :-1] * strengths[:, :, None]).sum(dim=-1)  # (batch, seq, candidates)
    return totals[..., 0] - totals.logsumexp(dim=-1)


def strength_log_densities(meant: torch.Tensor, acted: torch.Tensor, deviation: float) -> torch.Tensor:
    r"""
    Compute the log density of the strengths that acted, of which the logarithms are normal around those that are
    meant; without its constant.

    Args:
        meant (`torch.FloatTensor` of shape `(batch, seq, experts)`): strengths; 0 for experts that do not run.
        acted (`torch.FloatTensor` of shape `(batch, seq, experts)`): likewise, and of the same signs.
        deviation (`float`): standard deviation of the logarithms.

    Returns:
        `torch.FloatTensor` of shape `(batch, seq)`: −Σ_i (log |a_i| − log |s_i|)² / 2 deviation².
    """
    runs = (meant != 0) & (acted != 0)  # padding has recorded nothing
    distance = acted.abs().masked_fill(~runs, 1).log() - meant.abs().masked_fill(~runs, 1).log()
    return -(distance / deviation).square().sum(dim=-1) / 2


def rebel_loss(log_ratios: torch.Tensor, rewards: torch.Tensor, eta: float) -> torch.Tensor:
    r"""
    Regress differences of log-ratios onto differences of rewards, over all pairs of a prompt's completions, which need
    not be samples of π_t.

    Args:
        log_ratios (`torch.FloatTensor` of shape `(prompts, completions)`): log π_θ(y|x) / π_t(y|x).
        rewards (`torch.FloatTensor` of shape `(prompts, completions)`): r(x, y).
        eta (`float`): η; a larger one follows the rewards further in one step.

    Returns:
        The mean over prompts and pairs of ((Δ log-ratio) / η − Δr)².

    Source: arXiv 2404.16767, equation (1); arXiv 2407.04181.
    """
    residuals = log_ratios / eta - rewards
    return 2 * residuals.var(dim=1, unbiased=True).mean()  # the mean over pairs of (a_i − a_j)² is twice the variance


def ppo_loss(
    log_ratios: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, epsilon: float, max_length: int
) -> torch.Tensor:
    r"""
    Compute PPO's clipped objective, token by token, with one advantage for a completion, over the most tokens there
    could be: a mean over those there are would weigh a completion by the lengths of the others in its batch.

    Args:
        log_ratios (`torch.FloatTensor` of shape `(batch, seq)`): log π_θ / π_t of each token.
        advantages (`torch.FloatTensor` of shape `(batch,)`): see [`leave_one_out`].
        mask (`torch.Tensor` of shape `(batch, seq)`): 1 for tokens that were sampled.
        epsilon (`float`): ε, the clipping range.
        max_length (`int`): most tokens of a completion.

    Source: arXiv 1707.06347, equation (7).
    """
    ratios, advantages = log_ratios.exp(), advantages[:, None]
    objective = torch.minimum(ratios * advantages, ratios.clamp(1 - epsilon, 1 + epsilon) * advantages)
    return -(objective * mask).sum() / (len(mask) * max_length)


def rloo_loss(log_ratios: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    r"""
    Compute REINFORCE's objective with the leave-one-out baseline. The importance ratio, 1 in the first update of a
    rollout, keeps later ones unbiased.

    Args:
        log_ratios (`torch.FloatTensor` of shape `(batch,)`): log π_θ(y|x) / π_t(y|x).
        advantages (`torch.FloatTensor` of shape `(batch,)`): see [`leave_one_out`].

    Source: arXiv 2402.14740, section 3.
    """
    return -(advantages * log_ratios.exp()).mean()


def leave_one_out(rewards: torch.Tensor) -> torch.Tensor:
    """Return each reward less the mean of its prompt's others, both `(prompts, completions)`."""
    others = rewards.shape[1] - 1
    return rewards - (rewards.sum(dim=1, keepdim=True) - rewards) / others


def token_kl(log_probs: torch.Tensor, initial_log_probs: torch.Tensor) -> torch.Tensor:
    """
    Estimate KL(π_θ ‖ π_0) from sampled tokens, `(batch, seq)`: e^Δ − Δ − 1 with Δ = log π_0 − log π_θ, never negative.

    Source: J. Schulman, "Approximating KL divergence", estimator k3.
    """
    difference = initial_log_probs - log_probs
    return difference.exp() - difference - 1


def expert_weight_entropy(log_expert_weights: torch.Tensor) -> torch.Tensor:
    """Compute the entropy of α at each token, `(batch, seq)`, in nats."""
    finite = log_expert_weights.isfinite()
    return -(log_expert_weights.exp() * log_expert_weights.masked_fill(~finite, 0)).sum(dim=-1)


def log_described_share(expert_weight_logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    r"""
    Compute the log of what wanted experts would have of α if all experts ran at weight 1, `(batch, seq)`.

    Args:
        expert_weight_logits (`torch.Tensor` of shape `(batch, seq, experts)`): h, the PCM's outputs.
        wanted (`torch.BoolTensor` of shape `(batch, experts)`): at least one expert in each row.
    """
    log_weights = precise(expert_weight_logits).log_softmax(dim=-1)
    return log_weights.masked_fill(~wanted[:, None], float("-inf")).logsumexp(dim=-1)


def expert_weight_cross_entropy(expert_weight_logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    r"""
    Compute the cross-entropy of α, if all experts ran at weight 1, from target weights, `(batch, seq)`, in nats.

    Args:
        expert_weight_logits (`torch.Tensor` of shape `(batch, seq, experts)`): h, the PCM's outputs.
        targets (`torch.FloatTensor` of shape `(batch, seq, experts)`): the weights; each token's sum to 1.
    """
    return -(targets * precise(expert_weight_logits).log_softmax(dim=-1)).sum(dim=-1)


def expert_strength_cross_entropy(expert_weight_logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    r"""
    Compute the binary cross-entropy of g / 2 = σ(h) from target strengths, summed over experts, `(batch, seq)`, in
    nats.

    Args:
        expert_weight_logits (`torch.Tensor` of shape `(batch, seq, experts)`): h, the PCM's outputs.
        targets (`torch.FloatTensor` of shape `(batch, seq, experts)`): strengths of an expert at weight 1, 0 to 2.
    """
    logits = precise(expert_weight_logits)
    return binary_cross_entropy_with_logits(logits, targets.to(logits) / 2, reduction="none").sum(dim=-1)
