"""What training logs, under the names that docs/metrics.md of the repository explains."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch

from ..rewards.scoring import Scores
from .preference_sampling import ToldPreference
from .rollouts import Rollout


def means(values: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the mean of each list."""
    return {name: sum(of_name) / len(of_name) for name, of_name in values.items()}


def joined(parts: Iterable[Mapping[str, list[float]]]) -> dict[str, list[float]]:
    """Return the lists of several parts, joined by name, in the order of the names."""
    lists: dict[str, list[float]] = defaultdict(list)
    for part in parts:
        for name, values in part.items():
            lists[name] += values
    return dict(sorted(lists.items()))


def metric_name(label: str) -> str:
    """Return a preference's label, or an expert's name, as a part of a metric's name, without blanks."""
    return label.replace(" + ", "+").replace(" ", "_")


def reward_lists(scores: Scores, told: list[ToldPreference]) -> dict[str, list[float]]:
    """Return rewards over all, by preference and by expert."""
    lists: dict[str, list[float]] = defaultdict(list)
    lists["reward"] += scores.rewards
    for reward, wish in zip(scores.rewards, told):
        kind = "reward" if wish.way == "weights" else "reward_from_text"
        lists[f"{kind}/{metric_name(wish.label)}"].append(reward)
    for name, values in scores.dimensions.items():
        lists[f"rewards/{metric_name(name)}/mean"] += values
    return dict(lists)


def rollout_metrics(
    rollout: Rollout, scores: Scores, told: list[ToldPreference], ended: torch.Tensor
) -> dict[str, float]:
    """
    Return what is logged of a rollout.

    Args:
        rollout (`Rollout`): the completions.
        scores (`Scores`): what they are worth.
        told (`list[ToldPreference]`): what each was asked for.
        ended (`torch.BoolTensor` of shape `(rows,)`): whether each was written to its end.
    """
    lengths = rollout.completion_mask.sum(dim=1).float()  # (rows,)
    return means(reward_lists(scores, told)) | {
        "win_share": sum(scores.wins) / len(scores.wins),
        "completions/mean_length": lengths.mean().item(),
        "completions/clipped_ratio": 1 - ended.float().mean().item(),
    }


def weight_metrics(
    expert_weights: torch.Tensor, weights: torch.Tensor, told: list[ToldPreference], names: list[str]
) -> dict[str, float]:
    """
    Return the mean α, or strength, of each expert where it ran, over all and by preference.

    Args:
        expert_weights (`torch.FloatTensor` of shape `(rows, experts)`): each row's means over its tokens.
        weights (`torch.FloatTensor` of shape `(rows, experts)`): the preference's; experts at 0 did not run.
        told (`list[ToldPreference]`): what each row was asked for.
        names (`list[str]`): the experts'.
    """
    lists: dict[str, list[float]] = defaultdict(list)
    for row, active, wish in zip(expert_weights.tolist(), (weights != 0).tolist(), told):
        kind = "expert_weights" if wish.way == "weights" else "expert_weights_from_text"
        for name, value, ran in zip(map(metric_name, names), row, active):
            if ran:
                lists[f"expert_weights/{name}"].append(value)
                lists[f"{kind}/{metric_name(wish.label)}/{name}"].append(value)
    return means(lists)
