r"""
Rewards that run offline: a documented proxy for each of the six preferences, less what an answer loses as text.

A proxy is a weighted mean of standardised text features, standardised again, so that 0 is an average completion of the
base model in style and 1 is one standard deviation above. [`TextQuality`] fines in that unit.
"""

from collections.abc import Callable, Mapping
from statistics import fmean, pstdev

from .features import text_features
from .quality import TextQuality, answer_texts

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


class ProxyReward:
    r"""
    The reward of one preference: its proxy, standardised, less what the text is fined. A reward function as TRL's
    trainers take.

    Args:
        name (`str`): a key of `PROXIES`.
        quality (`TextQuality`): fines texts, and holds the constants; shared by the rewards of one base model.
    """

    def __init__(self, name: str, quality: TextQuality):
        self.name = name
        self.quality = quality
        self.__name__ = name

    def __call__(self, prompts: list, completions: list, **columns) -> list[float]:
        """
        Return each completion's reward, in the base model's standard deviations: 0 is its average style, in fluent
        text. Completions are texts or conversations, of which the last message counts.
        """
        constants = self.quality.constants
        mean, deviation = constants[self.name]
        texts = answer_texts(completions)

        proxies = [(proxy(self.name, text_features(text), constants) - mean) / deviation for text in texts]
        penalties = self.quality.penalties(prompts, texts)
        return [value - penalty for value, penalty in zip(proxies, penalties)]


def proxy_rewards(quality: TextQuality) -> dict[str, Callable]:
    """Return the six rewards, by preference."""
    return {name: ProxyReward(name, quality) for name in PROXIES}


def proxy(name: str, features: Mapping[str, float], constants: Mapping[str, tuple[float, float]]) -> float:
    """Return a preference's proxy of a completion with these features; `constants` standardise them."""
    return weighted_proxy(PROXIES[name], features, constants)


def weighted_proxy(
    weights: Mapping[str, int], features: Mapping[str, float], constants: Mapping[str, tuple[float, float]]
) -> float:
    """Compute the weighted mean of standardised features, each clipped at three deviations."""

    def standard(feature: str) -> float:
        mean, deviation = constants[feature]
        return min(max((features[feature] - mean) / deviation, -CLIP), CLIP)

    weighted = sum(weight * standard(feature) for feature, weight in weights.items())
    return weighted / sum(map(abs, weights.values()))


def reward_constants(quality: TextQuality, prompts: list, completions: list[str]) -> dict[str, tuple[float, float]]:
    """Compute mean and standard deviation of every feature and proxy over a base model's completions."""
    of_style = [text_features(text) for text in completions]
    of_quality = quality.features(prompts, completions)

    columns = {name: [features[name] for features in of_style] for name in of_style[0]}
    columns |= {name: [features[name] for features in of_quality] for name in ("nll", "gain", "repetition")}
    constants = {name: moments(values) for name, values in columns.items()}

    for name in PROXIES:
        constants[name] = moments([proxy(name, features, constants) for features in of_style])
    return constants


def moments(values: list[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation, which is never 0."""
    return fmean(values), max(pstdev(values), 1e-3)
