"""Who wins which comparison, and how sure that is."""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from scipy import stats

from .answers import Case
from .judges import FIRST, SECOND, TIE, Comparison, Judge, Verdict
from .statistics import adjust_p_values, bootstrap_interval, permutation_p_value


@dataclass
class Outcome:
    r"""
    One answerer against another before one judge.

    Args:
        wins (`np.ndarray` of shape `(prompts, preferences)`): 1 where the first wins, 0 where the second, 0.5 where
            neither; NaN where they cannot be compared.
        dimensions (`dict[str, np.ndarray]`): for each dimension, how much the first wins there, likewise.
        position_bias (`float`): how much more than half the time the answer shown first wins, over both orders.
    """

    wins: np.ndarray
    dimensions: dict[str, np.ndarray]
    position_bias: float


def judge_answers(judge: Judge, cases: list[Case], first: list[str | None], second: list[str | None]) -> Outcome:
    """
    Compare two lists of answers, each pair in both orders.

    Raises:
        ValueError: if the lists do not match the cases.
    """
    if not len(cases) == len(first) == len(second):
        raise ValueError(f"There are {len(first)} and {len(second)} answers to {len(cases)} prompts and preferences.")
    pairs: dict[int, Comparison] = {}
    for place, (case, one, other) in enumerate(zip(cases, first, second)):
        if one is not None and other is not None:
            pairs[place] = Comparison(case.prompt, case.preference, one, other)

    shown = judge.judge(list(pairs.values()))
    swapped = judge.judge([pair.swapped() for pair in pairs.values()])

    rows = _places(json.dumps(case.prompt) for case in cases)
    columns = _places(case.preference.label for case in cases)
    empty = np.full((max(rows) + 1, max(columns) + 1), np.nan)  # (prompts, preferences)
    wins = empty.copy()
    dimensions: dict[str, np.ndarray] = defaultdict(empty.copy)
    for place, there, back in zip(pairs, shown, swapped):
        both = [verdict for verdict in (there, back and _turned(back)) if verdict is not None]
        if not both:
            continue
        cell = rows[place], columns[place]
        wins[cell] = fmean(verdict.winner for verdict in both)
        for name in both[0].dimensions:
            dimensions[name][cell] = fmean(verdict.dimensions[name] for verdict in both)

    first_wins = [verdict.winner for verdict in (*shown, *swapped) if verdict is not None]
    bias = fmean(first_wins) - TIE if first_wins else 0.0
    return Outcome(wins, dict(sorted(dimensions.items())), bias)


def _turned(verdict: Verdict) -> Verdict:
    """The same on the pair the other way round."""
    return Verdict(FIRST - verdict.winner, {name: FIRST - value for name, value in verdict.dimensions.items()})


def _places(keys: Iterable[str]) -> list[int]:
    """For each key the place at which it came up first among the different ones."""
    keys = list(keys)
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    return [places[key] for key in keys]


def win_rate(wins: np.ndarray) -> list[float] | None:
    """
    Compute mean and 95 % interval, prompts drawn anew with all their answers; None where nothing was compared. Where
    all prompts are won or lost, drawing them anew says nothing, and the interval is Clopper and Pearson's.
    """
    by_prompt = _by_prompt(wins)
    if not len(by_prompt):
        return None
    if set(by_prompt) in ({FIRST}, {SECOND}):
        exact = stats.binomtest(int(by_prompt.sum()), len(by_prompt)).proportion_ci()
        return [float(by_prompt[0]), float(exact.low), float(exact.high)]
    return list(bootstrap_interval(by_prompt[None]))


def _by_prompt(wins: np.ndarray) -> np.ndarray:
    """Mean over the preferences of each prompt that has a comparison, `(compared prompts,)`."""
    compared = wins[~np.isnan(wins).all(axis=1)]
    return np.nanmean(compared, axis=1) if len(compared) else np.empty(0)


def summarise(outcomes: dict[str, Outcome], cases: list[Case]) -> dict[str, dict]:
    r"""
    Compute win rates against every baseline before one judge.

    Returns:
        For each baseline `win_rate` (mean, lower and upper end), `p` (permutation test, Holm's over the baselines),
        the same by preference and by dimension (Holm's over all cells of that table), and the `position_bias`.
    """
    labels = list(dict.fromkeys(case.preference.label for case in cases))
    report = {name: _summary(outcome, labels) for name, outcome in outcomes.items()}

    _adjust(list(report.values()))
    for part in ("preferences", "dimensions"):
        _adjust([cell for entry in report.values() for cell in entry[part].values()])
    return report


def _summary(outcome: Outcome, labels: list[str]) -> dict:
    """One baseline's part of [`summarise`], its p-values as they are; `labels` are the preferences'."""
    preferences = {}
    for column, label in enumerate(labels):
        wins = outcome.wins[:, [column]]
        if not np.isnan(wins).all():
            preferences[label] = _rate(wins)

    return _rate(outcome.wins) | {
        "preferences": preferences,
        "dimensions": {dimension: _rate(values) for dimension, values in outcome.dimensions.items()},
        "position_bias": outcome.position_bias,
    }


def _rate(wins: np.ndarray) -> dict:
    by_prompt = _by_prompt(wins)
    p = permutation_p_value(by_prompt - TIE) if len(by_prompt) else 1.0
    return {"win_rate": win_rate(wins), "p": p}


def _adjust(entries: list[dict]):
    for entry, p in zip(entries, adjust_p_values([entry["p"] for entry in entries])):
        entry["p"] = p


def agreement(one: Outcome, other: Outcome) -> tuple[float, float] | None:
    """
    Compute how often two judges choose the same side, and Cohen's κ: the same beyond what chance gives. None where
    they have no comparison in common.

    Source: J. Cohen, A Coefficient of Agreement for Nominal Scales, 1960.
    """
    both = ~(np.isnan(one.wins) | np.isnan(other.wins))
    if not both.any():
        return None

    a, b = np.sign(one.wins[both] - TIE), np.sign(other.wins[both] - TIE)
    same = float(np.mean(a == b))
    chance = float(sum(np.mean(a == side) * np.mean(b == side) for side in (-1, 0, 1)))
    return same, (same - chance) / (1 - chance) if chance < 1 else 1.0


__all__ = ["Outcome", "agreement", "judge_answers", "summarise", "win_rate"]
