r"""
Rewards that run offline: a documented proxy for each of the six preferences, and a guard that keeps answers sane.

A proxy is a weighted mean of standardised text features, standardised again, so that 0 is an average completion of the
base model in style and 1 is one standard deviation above. The guard subtracts in that unit.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean, pstdev

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .features import text_features
from .quality import Guard

# The proxy of each preference: the features whose weighted mean it is.
HARD = ("ari", "coleman_liau", "lix", "rix", "syllables", "rarity")
PROXIES: dict[str, dict[str, int]] = {
    "elementary": dict.fromkeys(HARD, -1),
    "knowledgeable": dict.fromkeys(HARD, 1),
    "concise": {"brevity": 3, "density": 1, "redundancy": -1},
    "informative": {"content": 3, "density": 1, "redundancy": -1},
    "friendly": {"sentiment": 1, "address": 1, "warmth": 1},
    "unfriendly": {"sentiment": -1, "rudeness": 1, "warmth": -1},
}

CLIP = 3.0  # standard deviations: one odd word or sign must not carry an answer
CONSTANTS = Path(__file__).with_name("smollm2_rewards.json")


class ProxyReward:
    r"""
    The reward of one preference: its proxy, standardised, less the guard. A reward function as TRL's trainers take.

    Args:
        name (`str`): a key of `PROXIES`.
        guard (`Guard`): shared by the rewards of one base model.
        constants (`Mapping`): mean and standard deviation of each feature, and of the proxy by its name.
    """

    def __init__(self, name: str, guard: Guard, constants: Mapping[str, tuple[float, float]]):
        self.name, self.guard, self.constants = name, guard, constants
        self.__name__ = name

    def __call__(self, prompts: list, completions: list[str], **columns) -> list[float]:
        """Rewards of completions, in the base model's standard deviations: 0 is its average style, in fluent text."""
        mean, deviation = self.constants[self.name]
        texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
        proxies = [(proxy(self.name, text_features(text), self.constants) - mean) / deviation for text in texts]
        return [value - penalty for value, penalty in zip(proxies, self.guard(prompts, texts))]


def proxy(name: str, features: Mapping[str, float], constants: Mapping[str, tuple[float, float]]) -> float:
    """A preference's proxy of a completion with these features; `constants` standardise them."""
    return weighted_proxy(PROXIES[name], features, constants)


def weighted_proxy(
    weights: Mapping[str, int], features: Mapping[str, float], constants: Mapping[str, tuple[float, float]]
) -> float:
    """Compute the weighted mean of standardised features, each clipped at three deviations."""

    def standard(feature: str) -> float:
        mean, deviation = constants[feature]
        return min(max((features[feature] - mean) / deviation, -CLIP), CLIP)

    return sum(weight * standard(feature) for feature, weight in weights.items()) / sum(map(abs, weights.values()))


def reward_constants(guard: Guard, prompts: list, completions: list[str]) -> dict[str, tuple[float, float]]:
    """Compute mean and standard deviation of every feature and proxy over a base model's completions."""
    texts = [text_features(text) for text in completions]
    sanity = guard.features(prompts, completions)
    columns = {name: [entry[name] for entry in texts] for name in texts[0]}
    columns |= {name: [entry[name] for entry in sanity] for name in ("nll", "gain", "repetition")}
    constants = {name: moments(values) for name, values in columns.items()}
    for name in PROXIES:
        constants[name] = moments([proxy(name, entry, constants) for entry in texts])
    return constants


def moments(values: list[float]) -> tuple[float, float]:
    return fmean(values), max(pstdev(values), 1e-3)


def proxy_rewards(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    constants: Mapping[str, tuple[float, float]] | None = None,
    batch_size: int = 16,
) -> dict[str, Callable]:
    r"""
    Build the six rewards, by preference.

    Args:
        model (`PreTrainedModel`), tokenizer (`PreTrainedTokenizerBase`): the base model, for the guard.
        constants (`Mapping`, *optional*): from [`reward_constants`]; defaults to those of SmolLM2-135M-Instruct.
        batch_size (`int`): completions that the base model reads at once.
    """
    constants = constants or json.loads(CONSTANTS.read_text())
    guard = Guard(model, tokenizer, constants, batch_size)
    return {name: ProxyReward(name, guard, constants) for name in PROXIES}
