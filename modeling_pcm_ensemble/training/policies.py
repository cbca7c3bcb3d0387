"""What training needs of a way of merging: what is recorded of the experts, and log π of a token from that alone."""

from abc import ABC, abstractmethod

import torch

from ..configuration_pcm_ensemble import PRODUCT, PCMEnsembleConfig
from ..merging import ExpertLogits, token_log_probs
from ..tilts import candidates, token_tilts
from ..weighting import joined_weights
from .losses import (
    expert_weight_entropy,
    log_described_share,
    mixture_token_log_probs,
    product_token_log_probs,
)


class Policy(ABC):
    """How an ensemble merges, as a function of the PCM's opinion h and of what was recorded while sampling."""

    def __init__(self, config: PCMEnsembleConfig):
        self.config = config

    @property
    @abstractmethod
    def width(self) -> tuple[int, ...]:
        """The shape of what is recorded of one token."""

    @abstractmethod
    def record(self, expert_logits: list[ExpertLogits], token_ids: torch.Tensor) -> torch.Tensor:
        """Return what an update needs of the experts, `(rows, seq, *width)`, at tokens `(rows, seq)`."""

    @abstractmethod
    def expert_weights(self, expert_weight_logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the experts' weights, `(rows, seq, experts)`, from h of that shape and w of `(rows, experts)`."""

    @abstractmethod
    def log_probs(
        self, expert_weight_logits: torch.Tensor, weights: torch.Tensor, recorded: torch.Tensor
    ) -> torch.Tensor:
        """Return log π of the tokens that were recorded, `(rows, seq)`; arguments as above."""

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

    def record(self, expert_logits, token_ids):
        return token_log_probs(expert_logits, token_ids, self.config.num_experts, self.config.expert_top_k)

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


class ProductPolicy(Policy):
    """
    `merge="product"`, whose normaliser needs every candidate: log π_0 of each, the token itself first, and every
    expert's tilt, in half the precision.
    """

    @property
    def width(self) -> tuple[int, ...]:
        config = self.config
        most = (config.num_experts + 1) * (config.expert_top_k or config.vocab_size)
        return (1 + min(most, config.vocab_size), config.num_experts + 1)

    def record(self, expert_logits, token_ids):
        config = self.config
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

    def expert_weights(self, expert_weight_logits, weights):
        return joined_weights(self.config, expert_weight_logits, weights)

    def log_probs(self, expert_weight_logits, weights, recorded):
        return product_token_log_probs(joined_weights(self.config, expert_weight_logits, weights), recorded)

    def measures(self, expert_weight_logits, weights, shares):
        strengths = joined_weights(self.config, expert_weight_logits, weights)
        return {"relative_strength": strengths.abs().sum(dim=-1) / weights.abs().sum(dim=-1, keepdim=True)}


def _distinct_first(tokens: torch.Tensor, is_repeated: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Put repeated candidates behind the others, and cut or pad to `width`, within which all others are."""
    order = is_repeated.to(torch.int8).argsort(dim=-1, stable=True)[..., :width]
    tokens, is_repeated = tokens.gather(-1, order), is_repeated.gather(-1, order)
    room = width - tokens.shape[-1]
    return torch.nn.functional.pad(tokens, (0, room)), torch.nn.functional.pad(is_repeated, (0, room), value=True)


POLICIES: dict[str, type[Policy]] = {"probabilities": MixturePolicy, PRODUCT: ProductPolicy}


def policy_of(config: PCMEnsembleConfig) -> Policy:
    """
    Return the policy of an ensemble.

    Raises:
        ValueError: if its `merge` cannot be trained.
    """
    if config.merge not in POLICIES:
        hint = ' Train with `merge="product"`, in which strengths mean the same.' if config.adds_up else ""
        raise ValueError(f"REBEL trains `merge` {' and '.join(map(repr, POLICIES))}, got {config.merge!r}.{hint}")
    return POLICIES[config.merge](config)
