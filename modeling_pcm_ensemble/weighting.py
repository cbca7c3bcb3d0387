"""What each expert counts: the PCM's opinion h and the user's weights w, joined as shares or as strengths."""

import torch
from torch.nn.functional import logsigmoid

from .configuration_pcm_ensemble import ADDITIVE, PCMEnsembleConfig
from .merging import precise


def joined_weights(
    config: PCMEnsembleConfig, expert_weight_logits: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    r"""
    Join the PCM's opinion and the user's weights as `config.merge` takes them.

    A PCM of strengths serves mixtures too: with g = 2σ(h), α = w g / Σ w g, so that h = 0 gives α = w / Σw, and words
    divide the weight among the experts that they wish for. A PCM of shares has no strengths to give.

    Args:
        config (`PCMEnsembleConfig`): says how experts are merged, and what the PCM was trained for.
        expert_weight_logits (`torch.Tensor` of shape `(batch, seq, experts)`): h, the PCM's outputs.
        weights (`torch.FloatTensor` of shape `(batch, experts)`): w.

    Returns:
        `torch.FloatTensor` of shape `(batch, seq, experts)`: strengths where tilts add up, else log α.

    Source: this library; see [`log_expert_weights`] and [`expert_strengths`].
    """
    if config.adds_up:
        return expert_strengths(expert_weight_logits, weights)
    if config.pcm_trained_for in ADDITIVE:
        expert_weight_logits = logsigmoid(precise(expert_weight_logits))
    return log_expert_weights(expert_weight_logits, weights.log())


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


def expert_strengths(expert_weight_logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    r"""
    Join the PCM's opinion and the user's weights where tilts add up: s = w · 2σ(h), in float32 (float64 where h is).

    Args:
        expert_weight_logits (`torch.Tensor` of shape `(batch, seq, experts)`): h, the PCM's outputs.
        weights (`torch.FloatTensor` of shape `(batch, experts)`): w, 1 for an expert's full tilt, below 0 to steer
            away from it, 0 for experts that do not run.

    Returns:
        `torch.FloatTensor` of shape `(batch, seq, experts)`: s, between 0 and 2 w.

    Source: this library. h = 0 gives s = w, and no h turns a wish around.
    """
    return weights[:, None] * (2 * precise(expert_weight_logits).sigmoid())


__all__ = ["expert_strengths", "joined_weights", "log_expert_weights"]
