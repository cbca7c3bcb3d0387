"""Which preference a prompt is answered under during training, and how the models are told of it."""

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ..configuration_pcm_ensemble import PCMEnsembleConfig
from ..preference import MOST_STRENGTH, Preference, check_reference, preference_weights

WORDS = ("preference_text", "system")  # the ways of telling a preference without weights
SMALLEST_SHARE = 1e-4  # of a drawn weight: the softmax of float32 must not see it vanish


@dataclass(frozen=True)
class ToldPreference:
    r"""
    A preference, and how the models are told of it.

    Args:
        preference (`Preference`): what is wanted, and rewarded.
        way (`str`, defaults to `"weights"`):
            `"weights"`, as a user gives them; or in words alone, with every expert active, so that the PCM must choose
            from the words: `"preference_text"`, which only the PCM reads, or `"system"`, a system message.
        drawn_from (`Preference`, *optional*): the preference set of which `preference` has the experts, at weights of
            its own.
    """

    preference: Preference
    way: str = "weights"
    drawn_from: Preference | None = None

    @property
    def label(self) -> str:
        """What it is logged as: the preference set, whatever weights were drawn within it."""
        return (self.drawn_from or self.preference).label

    def active(self, names: list[str]) -> Preference:
        """Return what generation gets: the preference, or every expert at weight 1 where words must tell."""
        return Preference(dict.fromkeys(names, 1.0)) if self.way in WORDS else self.preference


def default_preference_sets(config: PCMEnsembleConfig, whole: bool = True) -> list[list[str]]:
    """
    Return every combination of one expert for each declared dimension: 2 × 2 × 2 = 8 for three dimensions of two. With
    `whole=False` dimensions may be left out: 3 × 3 × 3 - 1 = 26.

    Raises:
        ValueError: if an expert has no `dimension`.
    """
    dimensions: dict[str, list[str | None]] = {}
    for expert in config.experts or []:
        if expert["name"] not in config.weighted_names:
            continue
        if expert["dimension"] is None:
            raise ValueError(
                f"Expert {expert['name']!r} has no `dimension`, so preferences cannot be combined from dimensions. "
                "Pass `preference_sets`."
            )
        dimensions.setdefault(expert["dimension"], [] if whole else [None]).append(expert["name"])

    combinations = [[name for name in names if name] for names in itertools.product(*dimensions.values())]
    return [names for names in combinations if names]


class PreferenceSampler:
    r"""
    Draws preferences.

    Args:
        config (`PCMEnsembleConfig`): the ensemble's.
        preference_sets (`list`, *optional*): preferences in any form of one row; see [`default_preference_sets`].
        weight_distribution (`str`, defaults to `"equal"`):
            `"equal"` for the sets as they are; `"dirichlet"` for random shares within a set; `"signed"`, where tilts
            add up, for random strengths of both signs, see [`RebelConfig`].
        text_only_fraction (`float`, defaults to 0): share of draws that are told in words alone.
    """

    def __init__(
        self,
        config: PCMEnsembleConfig,
        preference_sets: list | None = None,
        weight_distribution: str = "equal",
        text_only_fraction: float = 0.0,
    ):
        self.config = config
        self.names = config.expert_names
        self.weight_distribution = weight_distribution
        self.text_only_fraction = text_only_fraction
        sets = preference_sets if preference_sets is not None else default_preference_sets(config)
        self.sets = [ToldPreference(self.parse(preference)) for preference in sets]

    def parse(self, preference: str | list | Mapping) -> Preference:
        """
        Read the preference that a user would give for one row, or that a dataset's column has.

        Raises:
            TypeError, ValueError: as [`Preference.parse`], or if it wants no expert or a product's reference, or no
                weights can be drawn around it.
        """
        if isinstance(preference, Mapping):  # a dataset's columns have every name in every row
            preference = {name: weight for name, weight in preference.items() if weight is not None}
        parsed = Preference.parse(preference, self.names, self.config.adds_up)
        check_reference(self.config, torch.tensor([[parsed.weights.get(name, 0.0) for name in self.names]]))
        if not parsed.weights:
            raise ValueError(f"`preference` {preference!r} wants no expert, so that nothing could be rewarded.")
        if self.weight_distribution == "dirichlet" and min(parsed.weights.values()) < 0:
            raise ValueError(
                f"`weight_distribution` 'dirichlet' draws shares, and {parsed.label} has a weight below 0. Use "
                "'signed'."
            )
        return parsed

    def draw(self, generator: random.Random, given: str | list | Mapping | None = None) -> ToldPreference:
        """Draw one preference: `given` by the dataset, or one of the sets."""
        if given is not None:
            drawn = ToldPreference(self.parse(given))
        else:
            drawn = generator.choice(self.sets)
            if self.weight_distribution != "equal":
                draw = {"dirichlet": _dirichlet, "signed": _signed}[self.weight_distribution]
                drawn = ToldPreference(draw(drawn.preference, generator), drawn_from=drawn.preference)

        if generator.random() < self.text_only_fraction:
            drawn = replace(drawn, way=generator.choice(WORDS))
        return drawn


def _dirichlet(preference: Preference, generator: random.Random) -> Preference:
    """Draw weights from the uniform distribution over all mixtures of the wanted experts, scaled to the same sum."""
    # Gamma variates over their sum are a draw from a Dirichlet distribution.
    variates = {name: max(generator.gammavariate(1, 1), SMALLEST_SHARE) for name in preference.weights}
    scale = sum(preference.weights.values()) / sum(variates.values())
    return Preference({name: variate * scale for name, variate in variates.items()})


def _signed(preference: Preference, generator: random.Random) -> Preference:
    """Draw strengths around those of the set: times up to 2, and one of ten below 0, times up to 1."""
    weights = {}
    for name, weight in preference.weights.items():
        factor = generator.uniform(0.05, 2.0) if generator.random() < 0.9 else generator.uniform(-1.0, -0.05)
        weights[name] = max(-MOST_STRENGTH, min(weight * factor, MOST_STRENGTH))
    return Preference(weights)


def reward_shares(told: list[ToldPreference], config: PCMEnsembleConfig) -> torch.Tensor:
    """
    Return how much each expert's reward counts in each row, `(rows, experts)`. The absolute values of a row sum to 1;
    one below 0 is of an expert to steer away from.
    """
    wishes = [wish.preference for wish in told]
    weights = preference_weights(wishes, config.expert_names, len(told), config.adds_up)
    return weights / weights.abs().sum(dim=1, keepdim=True)
