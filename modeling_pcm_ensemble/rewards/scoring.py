"""From completions to one reward each: every wanted dimension's, against the base model's completions."""

import json
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

SHARED = "shared"  # what a reward is called that counts whatever is wanted
SHARED_WEIGHT = 0.5  # of such a reward, beside 1 for all that is wanted


def normalised_reward(reward: float, reference: float) -> float:
    """
    Return σ(r(x, y) − r(x, y_ref)): how often y beats the reference in a Bradley-Terry model.

    Source: arXiv 2407.04181.
    """
    difference = reward - reference
    return 1 / (1 + math.exp(-difference)) if difference > -700 else 0.0


def call_reward(name: str, reward: Callable, prompts: list, completions: list, columns: Mapping) -> list[float]:
    """
    Return one reward for each completion.

    Raises:
        TypeError: if the reward gives no list of numbers.
        ValueError: if there are fewer or more, or one is not finite; the message names the row.
    """
    given = reward(prompts=prompts, completions=completions, **columns)
    try:
        values = list(given)
        numbers = [math.nan if value is None else float(value) for value in values]
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"The reward of {name!r} must give a list of numbers, got {reprlib.repr(given)}.") from error

    if len(values) != len(prompts):
        raise ValueError(f"The reward of {name!r} gave {len(values)} values for {len(prompts)} completions.")
    for row, number in enumerate(numbers):
        if not math.isfinite(number):
            raise ValueError(
                f"The reward of {name!r} gave {values[row]} for row {row} of the {len(prompts)} that it was given: "
                f"prompt {prompts[row]!r}, completion {completions[row]!r}. Rewards must be finite numbers."
            )
    return numbers


@dataclass
class Scores:
    r"""
    What completions are worth.

    Args:
        rewards (`list[float]`): of each completion, the weighted mean over its dimensions, between 0 and 1; one to
            steer away from counts as 1 less its reward.
        dimensions (`dict[str, list[float]]`): each dimension's normalised rewards of the completions that want it.
        wins (`list[float]`): share of a completion's references and dimensions that it beats.
    """

    rewards: list[float]
    dimensions: dict[str, list[float]]
    wins: list[float]


@dataclass
class Scorer:
    r"""
    Scores completions by the wanted dimensions, each normalised against the prompt's reference completions.

    Args:
        reward_funcs (`Mapping[str, Callable]`): by expert; under `SHARED` one that counts whatever is wanted, such as
            that of answering at all.
        shared_reward_weight (`float`): how much the reward `SHARED`, where there is one, counts beside 1 for all
            wanted dimensions together.
        references (`dict[str, list]`): completions of the base model, by prompt (see [`prompt_key`]).
        reference_rewards (`dict[str, dict[str, list[float]]]`): their rewards, by prompt and name, as needed.
    """

    reward_funcs: Mapping[str, Callable]
    shared_reward_weight: float = SHARED_WEIGHT
    references: dict[str, list] = field(default_factory=dict)
    reference_rewards: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def score(self, rows: list[dict], completions: list, shares: torch.Tensor, names: list[str]) -> Scores:
        r"""
        Score each completion under its own wish.

        Args:
            rows (`list[dict]`): each completion's row of the dataset, with `prompt`.
            completions (`list`): as texts or, where prompts are conversations, as conversations.
            shares (`torch.Tensor` of shape `(completions, experts)`): how much each expert's reward counts; below 0
                for experts to steer away from.
            names (`list[str]`): the experts'.
        """
        counts = dict(zip(names, shares.T.tolist()))  # by name, of each completion
        if SHARED in self.reward_funcs:
            whole = 1 + self.shared_reward_weight
            counts = {name: [share / whole for share in of_name] for name, of_name in counts.items()}
            counts[SHARED] = [self.shared_reward_weight / whole] * len(rows)

        rewards = [0.0] * len(rows)
        beaten: list[list[bool]] = [[] for _ in rows]  # of each completion, one for each reference and dimension
        dimensions: dict[str, list[float]] = {}
        for name, of_name in counts.items():
            wanted = [i for i, share in enumerate(of_name) if share != 0]
            if not wanted:
                continue

            compared = self._compare(name, [rows[i] for i in wanted], [completions[i] for i in wanted])
            dimensions[name] = []
            for i, (mean, better, worse) in zip(wanted, compared):
                share = of_name[i]
                dimensions[name].append(mean)
                rewards[i] += share * mean if share > 0 else -share * (1 - mean)
                beaten[i] += better if share > 0 else worse
        return Scores(rewards, dimensions, [sum(won) / len(won) for won in beaten])

    def _compare(self, name: str, rows: list[dict], completions: list) -> list[tuple[float, list[bool], list[bool]]]:
        """Return each completion's normalised reward, and whether it is above, or below, each of its references."""
        prompts, columns = _columns(rows)
        values = call_reward(name, self.reward_funcs[name], prompts, completions, columns)
        self._score_references(name, rows)

        compared = []
        for row, value in zip(rows, values):
            references = self.reference_rewards[prompt_key(row)][name]
            normalised = [normalised_reward(value, reference) for reference in references]
            mean = sum(normalised) / len(normalised)
            compared.append((mean, [value > other for other in references], [value < other for other in references]))
        return compared

    def _score_references(self, name: str, rows: list[dict]):
        """Reward the references of these rows by one reward, where that is not done yet."""
        by_key = {prompt_key(row): row for row in rows}
        new = {key: row for key, row in by_key.items() if name not in self.reference_rewards.setdefault(key, {})}
        repeated = [row for key, row in new.items() for _ in self.references[key]]
        completions = [completion for key in new for completion in self.references[key]]
        if not repeated:
            return

        prompts, columns = _columns(repeated)
        values = iter(call_reward(name, self.reward_funcs[name], prompts, completions, columns))
        for key in new:
            self.reference_rewards[key][name] = [next(values) for _ in self.references[key]]


def prompt_key(row: dict) -> str:
    """Return a row of a dataset as a key: its prompt, and what else its reward and reference may depend on."""
    return json.dumps({name: value for name, value in row.items() if name != "preference"}, default=str)


def _columns(rows: list[dict]) -> tuple[list, dict[str, list]]:
    """Return prompts, and the other columns of the dataset by name."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return columns.pop("prompt"), columns
