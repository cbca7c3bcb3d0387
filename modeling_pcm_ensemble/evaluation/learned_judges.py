r"""
A style judge for each preference, learned from prompted answers of the base model: a direction in the space of
sentence embeddings, and no formula of the rewards.

An answer's reward is w·e, of its embedding e, and σ(w·e₁ − w·e₂) is how often the first of two answers is the one that
was asked for the style: the Bradley-Terry model, R. A. Bradley and M. E. Terry, Rank Analysis of Incomplete Block
Designs, 1952.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..preference import Preference
from ..rewards.quality import answer_texts
from .embeddings import SentenceEmbedder
from .judges import Comparison, Judge, RewardJudge, Verdict
from .statistics import adjust_p_values, bootstrap_interval, permutation_p_value

HEADS = Path(__file__).with_name("smollm2_style_heads.json")
DECAY = 1.0  # of the heads' weights, on the sum of the comparisons' losses
FOLDS = 9
SIGNIFICANT = 0.05


def fit_head(wanted: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    r"""
    Fit a head by logistic regression without intercept.

    Args:
        wanted, other (`torch.Tensor` of shape `(comparisons, hidden)`): embeddings of the answers that win, and of
            those that lose.

    Returns:
        Its weights, `(hidden,)`.
    """
    differences = (wanted - other).double()
    head = torch.zeros(differences.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([head], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.softplus(-differences @ head).sum() + DECAY / 2 * head.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return head.detach().float()


def held_out_wins(wanted: torch.Tensor, other: torch.Tensor, prompts: list[str], seed: int = 0) -> torch.Tensor:
    r"""
    Find which comparisons a head gets right that was fitted to those of other prompts, by cross-validation.

    Args:
        wanted, other (`torch.Tensor`): as for [`fit_head`].
        prompts (`list[str]`): each comparison's.

    Returns:
        1 where the wanted answer wins, else 0, `(comparisons,)`.
    """
    distinct = list(dict.fromkeys(prompts))
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    fold_of = {distinct[place]: number % FOLDS for number, place in enumerate(order)}
    folds = torch.tensor([fold_of[prompt] for prompt in prompts])  # (comparisons,)

    wins = torch.zeros(len(prompts))
    for fold in folds.unique():
        held_out = folds == fold
        head = fit_head(wanted[~held_out], other[~held_out])
        wins[held_out] = ((wanted[held_out] - other[held_out]) @ head > 0).float()
    return wins


def train_heads(comparisons: Mapping[str, list[tuple[str, str, str]]], embedder: SentenceEmbedder) -> dict[str, dict]:
    r"""
    Fit a head for each dimension, and measure it on prompts that it was not fitted to.

    Args:
        comparisons (`Mapping`): by dimension, (prompt, answer that was asked for it, answer that was not), of at least
            nine prompts.
        embedder (`SentenceEmbedder`): embeds the answers.

    Returns:
        By dimension its `head`, the number of `comparisons`, the `accuracy` by cross-validation (mean and 95 %
        interval, prompts drawn anew), `p` against chance (permutation test over prompts, Holm's over the dimensions),
        and whether it is `offered`: better than chance at p < 0.05.
    """
    heads: dict[str, dict] = {}
    for dimension, triples in comparisons.items():
        prompts, *texts = zip(*triples)
        wanted, other = (embedder(list(side)) for side in texts)
        wins = held_out_wins(wanted, other, list(prompts)).numpy()

        of_prompts = [wins[[entry == prompt for entry in prompts]].mean() for prompt in dict.fromkeys(prompts)]
        by_prompt = np.array([of_prompts])  # (1, prompts)
        heads[dimension] = {
            "accuracy": [round(value, 4) for value in bootstrap_interval(by_prompt)],
            "p": permutation_p_value(by_prompt[0] - 0.5),
            "comparisons": len(triples),
            "head": [round(value, 5) for value in fit_head(wanted, other).tolist()],
        }

    adjusted = adjust_p_values([entry["p"] for entry in heads.values()])
    for entry, p in zip(heads.values(), adjusted):
        entry |= {"p": p, "offered": p < SIGNIFICANT and entry["accuracy"][0] > 0.5}
    return heads


def learned_rewards(
    embedder: SentenceEmbedder | None = None, heads: Mapping[str, dict] | None = None
) -> dict[str, Callable]:
    r"""
    Build the learned rewards, by preference: `(prompts, completions) → list[float]`. Their differences are log-odds.

    Args:
        embedder (`SentenceEmbedder`, *optional*): defaults to all-MiniLM-L6-v2.
        heads (`Mapping`, *optional*): from [`train_heads`]; defaults to those of SmolLM2-135M-Instruct's answers.
            Those that are not better than chance are left out.
    """
    heads = heads or json.loads(HEADS.read_text())
    embedder = embedder or SentenceEmbedder()
    offered = {name: torch.tensor(entry["head"]) for name, entry in heads.items() if entry["offered"]}
    return {name: partial(_learned_reward, head, embedder) for name, head in offered.items()}


class LearnedJudge(Judge):
    r"""
    Judges by the learned rewards that are offered. Of a preference it judges those dimensions alone, and a preference
    that wants none of them is not judged.

    Args:
        embedder, heads: as for [`learned_rewards`].
    """

    def __init__(self, embedder: SentenceEmbedder | None = None, heads: Mapping[str, dict] | None = None):
        self.rewards = learned_rewards(embedder, heads)
        self.name = f"learned heads ({', '.join(self.rewards)})"
        self._judge = RewardJudge(self.name, self.rewards)

    def judge(self, comparisons: list[Comparison]) -> list[Verdict | None]:
        parts = [self._judged_part(comparison) for comparison in comparisons]
        verdicts = iter(self._judge.judge([part for part in parts if part]))
        return [next(verdicts) if part else None for part in parts]

    def _judged_part(self, comparison: Comparison) -> Comparison | None:
        """Return a comparison under as much of its preference as there are heads for."""
        weights = {name: weight for name, weight in comparison.preference.weights.items() if name in self.rewards}
        return replace(comparison, preference=Preference(weights)) if weights else None


def _learned_reward(
    head: torch.Tensor, embedder: SentenceEmbedder, prompts: list, completions: list, **columns
) -> list[float]:
    texts = answer_texts(completions)
    return (embedder(texts) @ head).tolist() if texts else []


__all__ = ["HEADS", "LearnedJudge", "fit_head", "learned_rewards", "train_heads"]
