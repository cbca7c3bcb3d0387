"""Which preference a prompt is answered under during training."""

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..configuration_pcm_ensemble import PCMEnsembleConfig
from ..preferences import preference_weights


@dataclass(frozen=True)
class DrawnPreference:
    r"""
    Args:
        name (`str`): the experts that are wanted, joined by " + ".
        weights (`tuple[float, ...]`): one for each expert.
        words (`str`, *optional*): how it is told when not by weights, `"preference_text"` or `"system"`: every expert
            is active then, and the PCM must choose from the words.
    """

    name: str
    weights: tuple[float, ...]
    words: str | None = None

    @property
    def active_weights(self) -> tuple[float, ...]:
        """The weights that generation gets."""
        return self.weights if self.words is None else (1.0,) * len(self.weights)


def default_preference_sets(config: PCMEnsembleConfig, whole: bool = True) -> list[list[str]]:
    """
    Give every combination of one expert for each declared dimension: 2 × 2 × 2 = 8 for three dimensions of two. With
    `whole=False` dimensions may be left out: 3 × 3 × 3 - 1 = 26.

    Raises:
        ValueError: if an expert has no `dimension`.
    """
    dimensions: dict[str, list[str | None]] = {}
    for expert in config.experts:
        if expert["dimension"] is None:
            raise ValueError(
                f"Expert {expert['name']!r} has no `dimension`, so preferences cannot be combined from dimensions. "
                "Pass `preference_sets`."
            )
        dimensions.setdefault(expert["dimension"], [] if whole else [None]).append(expert["name"])
    combinations = ([name for name in names if name] for names in itertools.product(*dimensions.values()))
    return [names for names in combinations if names]


class PreferenceSampler:
    r"""
    Draws preferences.

    Args:
        config (`PCMEnsembleConfig`): the ensemble's.
        preference_sets (`list`, *optional*): preferences in any form of one row; see [`default_preference_sets`].
        preference_weights (`str`): `"equal"` for the sets as they are, `"dirichlet"` for random weights within a set.
        text_only_fraction (`float`): share of draws that are told in words alone.
    """

    def __init__(
        self,
        config: PCMEnsembleConfig,
        preference_sets: list | None = None,
        preference_weights: str = "equal",
        text_only_fraction: float = 0.0,
    ):
        self.names = config.expert_names
        sets = preference_sets if preference_sets is not None else default_preference_sets(config)
        self.sets = [self.preference(entry) for entry in sets]
        self.preference_weights = preference_weights
        self.text_only_fraction = text_only_fraction

    def preference(self, preference: str | list | Mapping) -> DrawnPreference:
        """The preference that a user would give for one row."""
        if isinstance(preference, Mapping):  # a dataset's columns have every name in every row
            preference = {name: weight for name, weight in preference.items() if weight is not None}
        weights = tuple(preference_weights(preference, self.names, 1)[0].tolist())
        active = {name: weight for name, weight in zip(self.names, weights) if weight > 0}
        equal = len(set(active.values())) == 1
        return DrawnPreference(" + ".join(n if equal else f"{n}={w:g}" for n, w in active.items()), weights)

    def draw(self, generator: random.Random, given: str | list | Mapping | None = None) -> DrawnPreference:
        """One preference: `given` by the dataset, or one of the sets."""
        drawn = generator.choice(self.sets) if given is None else self.preference(given)
        weights, words = drawn.weights, None
        if self.preference_weights == "dirichlet" and given is None:
            shares = [generator.gammavariate(1, 1) if weight > 0 else 0.0 for weight in weights]
            # The softmax of float32 must not see a weight vanish.
            shares = [max(share, 1e-4) if weight > 0 else 0.0 for share, weight in zip(shares, weights)]
            weights = tuple(share * sum(weights) / sum(shares) for share in shares)
        if generator.random() < self.text_only_fraction:
            words = generator.choice(["preference_text", "system"])
        return DrawnPreference(drawn.name, weights, words)


def reward_shares(draws: list[DrawnPreference]) -> torch.Tensor:
    """How much each expert's reward counts in each row, `(rows, experts)`; rows sum to 1."""
    weights = torch.tensor([draw.weights for draw in draws])
    return weights / weights.sum(dim=1, keepdim=True)
