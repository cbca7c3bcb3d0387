"""Statistics of evaluations: arrays in, numbers out."""

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
from scipy import stats


def bootstrap_interval(
    differences: np.ndarray, level: float = 0.95, samples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    r"""
    Compute the mean of paired differences and its percentile bootstrap interval, with both training runs and prompts
    drawn anew: answers to one prompt are alike, and so are those of one run.

    Args:
        differences (`np.ndarray` of shape `(runs, prompts)`): of each run and prompt, the mean over its answers.
        level (`float`): share of the bootstrap means inside the interval.

    Returns:
        Mean, lower and upper end.

    Source: B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    rng = np.random.default_rng(seed)
    num_runs, num_prompts = differences.shape
    runs = rng.integers(num_runs, size=(samples, num_runs))
    prompts = rng.integers(num_prompts, size=(samples, num_prompts))
    drawn = differences[runs[:, :, None], prompts[:, None, :]]  # (samples, runs, prompts)
    return percentile_interval(float(differences.mean()), drawn.mean(axis=(1, 2)), level)


def draw_prompts(num_prompts: int, samples: int, seed: int = 0) -> np.ndarray:
    """Draw as many prompts as there are, with replacement: their places, `(samples, prompts)`."""
    return np.random.default_rng(seed).integers(num_prompts, size=(samples, num_prompts))


def percentile_interval(estimate: float, resampled: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """Return an estimate, and the ends between which the middle `level` of its resampled values `(samples,)` lie."""
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return estimate, float(low), float(high)


def permutation_p_value(differences: np.ndarray, samples: int = 9999, seed: int = 0) -> float:
    r"""
    Test whether paired differences are 0 on average: how often would a mean as far from 0 come about if each prompt's
    difference could as well have had the other sign? Two-sided; exact where there are few prompts.

    Args:
        differences (`np.ndarray` of shape `(prompts,)`): of each prompt, the mean over its answers.

    Source: R. A. Fisher, The Design of Experiments, 1935, chapter 3.
    """
    if len(differences) < 2 or not differences.any():  # of one difference, either sign is as far from 0
        return 1.0

    result = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",  # which changes signs
        vectorized=True,
        n_resamples=samples,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def adjust_p_values(p_values: Sequence[float]) -> list[float]:
    """
    Adjust p-values for being one of several by Holm's method, so that a table with no true effect seldom shows one.

    Source: S. Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979.
    """
    order = np.argsort(p_values)
    factors = np.arange(len(order), 0, -1)
    adjusted = np.minimum(np.maximum.accumulate(np.asarray(p_values)[order] * factors), 1.0)
    return adjusted[np.argsort(order)].tolist()


def omega_squared(groups: Sequence[Hashable], values: Sequence[float], within: Sequence[Hashable]) -> float:
    r"""
    Estimate the share of a variance that lies between groups, ω² of a one-way analysis of variance: unlike the plain
    share it is about 0, not above, where groups do not matter.

    Args:
        groups (`Sequence`): each value's group.
        values (`Sequence[float]`): what varies.
        within (`Sequence`): each value's stratum, whose mean is taken out first; groups should lie within strata.

    Source: W. L. Hays, Statistics for Psychologists, 1963.
    """
    raw = np.asarray(values, dtype=float)
    centred = raw - _means(within, raw)
    inside = ((centred - _means(groups, centred)) ** 2).sum()
    total = (centred**2).sum()
    if total == 0:
        return 0.0

    num_groups, num_strata = len(set(groups)), len(set(within))
    error = inside / max(len(raw) - num_groups, 1)
    return float((total - inside - (num_groups - num_strata) * error) / (total + error))


def _means(groups: Sequence[Hashable], values: np.ndarray) -> np.ndarray:
    """Each value's group mean, `(values,)`."""
    places: dict[Hashable, list[int]] = defaultdict(list)
    for place, group in enumerate(groups):
        places[group].append(place)

    means = np.empty_like(values)
    for entries in places.values():
        means[entries] = values[entries].mean()
    return means


__all__ = [
    "adjust_p_values",
    "bootstrap_interval",
    "draw_prompts",
    "omega_squared",
    "percentile_interval",
    "permutation_p_value",
]
