"""What training needs of a way of merging: what is recorded while sampling, and log π from that alone."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from ..configuration_pcm_ensemble import ADAPTERS, PRODUCT, PCMEnsembleConfig
from ..merging import ExpertLogits, token_log_probs
from ..modeling_pcm_ensemble import PCMEnsembleOutput
from ..tilts import candidates, token_tilts
from ..weighting import joined_weights
from .losses import (
    expert_weight_entropy,
    log_described_share,
    mixture_token_log_probs,
    product_token_log_probs,
    strength_log_densities,
    token_kl,
)

STEPS_OF_A_PIECE = 12  # tokens of a completion that are sampled under one draw of noise


class Policy(ABC):
    """
    How an ensemble merges, as a function of the PCM's opinion h and of what was recorded while sampling.

    Args:
        config (`PCMEnsembleConfig`): the ensemble's.
        exploration (`float`, defaults to 0): see [`~rebel_config.RebelConfig`].
    """

    reads_experts: ClassVar[bool] = True  # whether it records what each expert predicts

    def __init__(self, config: PCMEnsembleConfig, exploration: float = 0.0):
        self.config = config
        self.exploration = exploration

    @property
    @abstractmethod
    def width(self) -> tuple[int, ...]:
        """The shape of what is recorded of one token."""

    @abstractmethod
    def record(self, output: PCMEnsembleOutput, token_ids: torch.Tensor) -> torch.Tensor:
        """
        Return what an update needs of one step, `(rows, 1, *width)`: of what the ensemble gave, and of the tokens,
        `(rows, 1)`, that were drawn from it.
        """

    @abstractmethod
    def expert_weights(self, expert_weight_logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the experts' weights, `(rows, seq, experts)`, from h of that shape and w of `(rows, experts)`."""

    @abstractmethod
    def log_probs(
        self, expert_weight_logits: torch.Tensor, weights: torch.Tensor, recorded: torch.Tensor
    ) -> torch.Tensor:
        """Return log π of the tokens that were recorded, `(rows, seq)`; arguments as above."""

    def kl(
        self,
        log_probs: torch.Tensor,
        expert_weight_logits: torch.Tensor,
        weights: torch.Tensor,
        recorded: torch.Tensor,
    ) -> torch.Tensor:
        """
        Return the KL divergence of π to that of h = 0, at which the experts' weights are the user's alone: an estimate
        from the sampled tokens, `(rows, seq)`, of which `log_probs`, of that shape, is log π. The rest is as above.
        """
        return token_kl(log_probs, self.log_probs(torch.zeros_like(expert_weight_logits), weights, recorded))

    @abstractmethod
    def measures(
        self, expert_weight_logits: torch.Tensor, weights: torch.Tensor, shares: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return what is logged of each token, `(rows, seq)`; `shares`, `(rows, experts)`, are of the reward."""


class MixturePolicy(Policy):
    """`merge="probabilities"`, which needs one number of each expert: its log-probability of the token."""

    @property
    def width(self) -> tuple[int, ...]:
        return (self.config.num_experts,)

    def record(self, output, token_ids):
        return token_log_probs(output.expert_logits, token_ids, self.config.num_experts, self.config.expert_top_k)

    def expert_weights(self, expert_weight_logits, weights):
        return joined_weights(self.config, expert_weight_logits, weights).exp()

    def log_probs(self, expert_weight_logits, weights, recorded):
        return mixture_token_log_probs(joined_weights(self.config, expert_weight_logits, weights), recorded)

    def measures(self, expert_weight_logits, weights, shares):
        log_weights = joined_weights(self.config, expert_weight_logits, weights)
        return {
            "expert_weight_entropy": expert_weight_entropy(log_weights),
            "described_share": log_described_share(expert_weight_logits, shares > 0).exp(),
        }


class AdditivePolicy(Policy):
    """Where tilts add up, weights are strengths."""

    def expert_weights(self, expert_weight_logits, weights):
        return joined_weights(self.config, expert_weight_logits, weights)

    def measures(self, expert_weight_logits, weights, shares):
        strengths = self.expert_weights(expert_weight_logits, weights)
        return {"relative_strength": strengths.abs().sum(dim=-1) / weights.abs().sum(dim=-1, keepdim=True)}


class ProductPolicy(AdditivePolicy):
    """
    `merge="product"`, whose normaliser needs every candidate: log π_0 of each, the token itself first, and every
    expert's tilt, in half the precision. Strengths will change, so that what a model keeps is a candidate here even
    where its share in the sum is 0 to five digits, for which a forward leaves it out.
    """

    @property
    def width(self) -> tuple[int, ...]:
        config = self.config
        most = (config.num_experts + 1) * (config.expert_top_k or config.vocab_size)
        return (1 + min(most, config.vocab_size), config.num_experts + 1)

    def record(self, output, token_ids):
        config, expert_logits = self.config, output.expert_logits
        kept, is_repeated = self._candidates(expert_logits, token_ids)
        tokens = torch.cat([token_ids[..., None], kept], dim=-1)  # (rows, seq, candidates)

        log_probs, tilts = token_tilts(
            expert_logits, tokens, config.num_experts, config.reference_index, config.expert_top_k
        )
        log_probs[..., 1:].masked_fill_(is_repeated | (kept == token_ids[..., None]), float("-inf"))
        recorded = torch.cat([tilts, log_probs[..., None]], dim=-1)
        return recorded if recorded.dtype == torch.float64 else recorded.half()

    def _candidates(
        self, expert_logits: list[ExpertLogits], token_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a model keeps, `(rows, seq, width - 1)`, and whether a place there repeats another one."""
        config, width = self.config, self.width[0] - 1
        if config.expert_top_k is None:
            every_token = torch.arange(width, device=token_ids.device).expand(*token_ids.shape, -1)
            return every_token, torch.zeros_like(every_token, dtype=torch.bool)

        every_model = torch.ones(*token_ids.shape, config.num_experts + 1, device=token_ids.device)
        kept, is_repeated, _ = candidates(expert_logits, every_model, config.expert_top_k)
        return _distinct_first(kept, is_repeated, width)

    def log_probs(self, expert_weight_logits, weights, recorded):
        return product_token_log_probs(self.expert_weights(expert_weight_logits, weights), recorded)


class AdaptersPolicy(AdditivePolicy):
    r"""
    `merge="adapters"`, where one model runs, and no expert says what it would have predicted alone. What the PCM does
    is then to choose strengths, and the tokens are what comes of them. π is a policy over strengths: in each piece of
    a completion, log s is normal around log(w · 2σ(h)), with the standard deviation of `exploration`, and apart from
    other pieces. The strengths that acted on the completion are recorded, and those on the prompt are not. They are
    samples of another policy, whose noise is partly the same in all pieces, which REBEL allows.
    """

    reads_experts = False

    @property
    def width(self) -> tuple[int, ...]:
        return (self.config.num_experts,)

    def record(self, output, token_ids):
        return output.expert_weights[:, -1:]

    def log_probs(self, expert_weight_logits, weights, recorded):
        meant = self.expert_weights(expert_weight_logits, weights)
        return strength_log_densities(meant, recorded, self.exploration) / STEPS_OF_A_PIECE  # one draw for so many

    def kl(self, log_probs, expert_weight_logits, weights, recorded):
        # Of normal distributions with one deviation, it is minus the log density of the one's mean under the other.
        meant = self.expert_weights(expert_weight_logits, weights)
        return -self.log_probs(torch.zeros_like(expert_weight_logits), weights, meant)


def _distinct_first(tokens: torch.Tensor, is_repeated: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Put repeated candidates behind the others, and cut or pad to `width`, within which all others are."""
    order = is_repeated.to(torch.int8).argsort(dim=-1, stable=True)[..., :width]
    tokens, is_repeated = tokens.gather(-1, order), is_repeated.gather(-1, order)
    room = width - tokens.shape[-1]
    return torch.nn.functional.pad(tokens, (0, room)), torch.nn.functional.pad(is_repeated, (0, room), value=True)


POLICIES: dict[str, type[Policy]] = {
    "probabilities": MixturePolicy,
    PRODUCT: ProductPolicy,
    ADAPTERS: AdaptersPolicy,
}


def policy_of(config: PCMEnsembleConfig, exploration: float = 0.0) -> Policy:
    """
    Return the policy of an ensemble.

    Raises:
        ValueError: if its `merge` cannot be trained.
    """
    if config.merge not in POLICIES:
        raise ValueError(f"REBEL trains `merge` {', '.join(map(repr, POLICIES))}, got {config.merge!r}.")
    return POLICIES[config.merge](config, exploration)
