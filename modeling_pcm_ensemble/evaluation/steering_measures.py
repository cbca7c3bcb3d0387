r"""
How well answers follow the weights: arrays in, numbers out.

Rewards are `(points, experts, draws)`: at each point of a line's grid the mean reward of each of its experts, once for
each draw of prompts. Every measure is computed for all draws, so that it has an interval, whatever it is.

| measure | what it is | source |
|---|---|---|
| moved | how much an expert's reward rises between the ends of its edge, see [`Line.edge`] | |
| rank correlation | Spearman's ρ between an expert's weight and its reward over the grid | Spearman 1904 |
| violations | share of an edge's steps on which the reward falls while the weight rises | |
| hypervolume | share of the box from `reference` to the best reward, 1, that points dominate | Zitzler, Thiele 1999 |
| inner product | mean over the grid of Σ w_i r_i / Σ w_i; a shared reward counts half beside | arXiv 2505.06274 |
| shared | mean over the grid of the reward that counts whatever is wanted | |
| Pareto share | share of the points that no other one dominates | |

The hypervolume is computed by pymoo (J. Blank and K. Deb, 2020).
"""

from dataclasses import dataclass

import numpy as np
from pymoo.indicators.hv import HV
from scipy.stats import rankdata

from ..rewards.scoring import SHARED_WEIGHT
from .statistics import draw_prompts, percentile_interval
from .steering import Line

BASE = 0.5  # the base model's mean normalised reward, by symmetry
HIGHER_IS_BETTER = {
    "moved": True,
    "rank correlation": True,
    "worst rank correlation": True,
    "violations": False,
    "hypervolume": True,
    "inner product": True,
    "shared": True,
    "Pareto share": True,
}


@dataclass
class LineRewards:
    r"""
    One way's rewards on one line, before one judge.

    Args:
        line (`Line`): where they were measured.
        rewards (`np.ndarray` of shape `(points, experts, prompts)`): mean normalised rewards.
        reference (`np.ndarray` of shape `(experts,)`): the hypervolume's reference point, see [`reference_point`].
        shared (`np.ndarray` of shape `(points, prompts)`, *optional*): mean rewards that count whatever is wanted.
    """

    line: Line
    rewards: np.ndarray
    reference: np.ndarray
    shared: np.ndarray | None = None


def rewards_alone(line: Line, alone: dict[str, dict[str, float]]) -> np.ndarray:
    r"""
    Return what there is without any way to merge: rewards of the line's experts alone, and of the base model.

    Args:
        line (`Line`): the line.
        alone (`dict[str, dict[str, float]]`): mean rewards, by expert that answers alone, and expert whose reward it
            is.

    Returns:
        `(experts + 1, experts)`, the base model last.
    """
    rewards = [[alone[answers][rewarded] for rewarded in line.experts] for answers in line.experts]
    return np.array([*rewards, [BASE] * len(line.experts)])


def reference_point(line: Line, alone: dict[str, dict[str, float]]) -> np.ndarray:
    """
    Fix the hypervolume's reference before any way is measured: for each expert the worst of [`rewards_alone`],
    `(experts,)`.
    """
    return rewards_alone(line, alone).min(axis=0)


def moved(rewards: np.ndarray, edges: list[list[int]]) -> np.ndarray:
    """Return `(experts, draws)`: how much each reward rises between the ends of its edge."""
    return np.stack([rewards[edge[-1], place] - rewards[edge[0], place] for place, edge in enumerate(edges)])


def violations(rewards: np.ndarray, edges: list[list[int]]) -> np.ndarray:
    """Return `(experts, draws)`: the share of an edge's steps on which the reward falls."""
    return np.stack([(np.diff(rewards[edge, place], axis=0) < 0).mean(axis=0) for place, edge in enumerate(edges)])


def rank_correlation(weights: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """Return `(experts, draws)`: Spearman's ρ with the weights `(points, experts)`; 0 where all rewards are equal."""
    of_weights = rankdata(weights, axis=0)[:, :, None]
    of_rewards = rankdata(rewards, axis=0)
    x, y = of_weights - of_weights.mean(axis=0), of_rewards - of_rewards.mean(axis=0)

    scale = np.sqrt((x**2).sum(axis=0) * (y**2).sum(axis=0))
    return np.divide((x * y).sum(axis=0), scale, out=np.zeros(scale.shape), where=scale > 0)


def hypervolume(rewards: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return `(draws,)`: the share of the box from the reference to 1 that the points dominate."""
    indicator = HV(ref_point=-reference)  # which minimises
    volumes = np.array([indicator(-points) for points in np.moveaxis(rewards, 2, 0)])
    return volumes / np.prod(1 - reference)


def inner_product(weights: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """Return `(draws,)`: the mean over the points of Σ w_i r_i / Σ w_i."""
    shares = weights / weights.sum(axis=1, keepdims=True)
    return (shares[:, :, None] * rewards).sum(axis=1).mean(axis=0)


def pareto_share(rewards: np.ndarray) -> np.ndarray:
    """Return `(draws,)`: the share of points than which none is as good in all rewards and better in one."""
    one, other = rewards[:, None], rewards[None]  # (points, points, experts, draws)
    dominated = np.all(other >= one, axis=2) & np.any(other > one, axis=2)  # (points, points, draws)
    return 1 - np.any(dominated, axis=1).mean(axis=0)


def measure_line(entry: LineRewards, draws: np.ndarray) -> dict[str, np.ndarray]:
    r"""
    Compute all measures of one line.

    Args:
        entry (`LineRewards`): the rewards.
        draws (`np.ndarray` of shape `(draws, prompts)`): which prompts are drawn.

    Returns:
        By name, `(experts, draws)` for what each expert has, else `(draws,)`.
    """
    weights = np.array(entry.line.points)
    edges = [entry.line.edge(place) for place in range(len(entry.line.experts))]
    means = np.stack([entry.rewards[:, :, prompts].mean(axis=2) for prompts in draws], axis=2)
    measures = {
        "moved": moved(means, edges),
        "rank correlation": rank_correlation(weights, means),
        "violations": violations(means, edges),
        "hypervolume": hypervolume(means, entry.reference),
        "inner product": inner_product(weights, means),
        "Pareto share": pareto_share(means),
    }

    if entry.shared is not None:
        shared = np.array([entry.shared[:, prompts].mean() for prompts in draws])
        measures["shared"] = shared
        measures["inner product"] = (measures["inner product"] + SHARED_WEIGHT * shared) / (1 + SHARED_WEIGHT)
    return measures


def measure_lines(entries: list[LineRewards], samples: int = 2000, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """
    Compute the measures of each line: first of all prompts, then of `samples` draws of them, the same on every line
    and for every way.
    """
    prompts = entries[0].rewards.shape[2]
    draws = np.concatenate([np.arange(prompts)[None], draw_prompts(prompts, samples, seed)])
    return [measure_line(entry, draws) for entry in entries]


def over_lines(lines: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Average measures over lines and their experts, `(1 + samples,)` each; and find the worst rank correlation."""
    found = {}
    for name in lines[0]:
        of_lines = [np.atleast_2d(line[name]) for line in lines]
        found[name] = np.concatenate(of_lines).mean(axis=0)
        if name == "rank correlation":
            found["worst rank correlation"] = np.concatenate(of_lines).min(axis=0)
    return found


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """
    Return estimate and 95 % interval of `(1 + samples,)` values, the first of which is of all prompts. The interval
    says how other prompts, as many, would differ: draws of prompts are noisier than the prompts, which alone shifts
    ranks and fronts, and that shift is taken out.
    """
    estimate = float(values[0])
    return percentile_interval(estimate, values[1:] + estimate - values[1:].mean())


__all__ = [
    "HIGHER_IS_BETTER",
    "LineRewards",
    "hypervolume",
    "inner_product",
    "interval",
    "measure_line",
    "measure_lines",
    "moved",
    "over_lines",
    "pareto_share",
    "rank_correlation",
    "reference_point",
    "rewards_alone",
    "violations",
]
