"""The best weights that stay the same over prompts and tokens: what a trained PCM must beat."""

import itertools
from pathlib import Path
from statistics import fmean

import numpy as np
from common import READINGS_AT_ONCE, chats, paper_preferences, spread, training_prompts
from rich.console import Console
from rich.table import Table

from modeling_pcm_ensemble import Preference
from modeling_pcm_ensemble.evaluation import (
    Baseline,
    PlainModel,
    RewardJudge,
    StaticWeights,
    collect_answers,
    collect_text_features,
    judge_answers,
    make_cases,
)
from modeling_pcm_ensemble.rewards.proxies import proxy_rewards
from modeling_pcm_ensemble.rewards.quality import TextQuality

# What is tried for a preference's three experts, (1, 1, 1) first: shares of a mixture, of which only ratios count, and
# as many strengths of tilts
SHAPES: dict[bool, list[tuple[float, ...]]] = {
    False: [(1, 1, 1), (1, 0, 0), (3, 1, 1), (2, 2, 1)],
    True: [(1, 1, 1), (0.6, 0.6, 0.6), (1.4, 1.4, 1.4), (1.8, 1.8, 1.8), (1.5, 0.75, 0.75), (1.5, 1.5, 0.75)],
}


def best_static_weights(model, rewards: dict[tuple[str, tuple], float]) -> dict[str, Preference]:
    """Choose for each preference, by its label, the weights with the best of [`static_rewards`]."""
    best = {}
    for preference in paper_preferences(model):
        weights = max(tried_weights(model.config.adds_up), key=lambda tried: rewards[preference.label, tried])
        best[preference.label] = reweighted(preference, weights)
    return best


def tried_weights(adds_up: bool) -> list[tuple[float, ...]]:
    """Return every order of each shape."""
    return [weights for shape in SHAPES[adds_up] for weights in sorted(set(itertools.permutations(shape)))]


def reweighted(preference: Preference, weights: tuple[float, ...]) -> Preference:
    """Give a preference's experts these weights."""
    return Preference(dict(zip(preference.weights, weights)))


def static_rewards(
    model, top_k: int, prompts: int, tokens: int, folder: Path, batch_size: int
) -> dict[tuple[str, tuple], float]:
    r"""
    Measure, by preference and weights, the mean reward of answers to training prompts.

    Args:
        model (`PCMEnsembleForCausalLM`): the ensemble.
        top_k (`int`): tokens of the merged distribution that are sampled from; 0 for all.
        prompts (`int`): how many training prompts.
        tokens (`int`): most tokens of an answer.
        folder (`Path`): where answers are kept.
        batch_size (`int`): answers that are sampled at once.
    """
    quality = TextQuality(model.backbones[0], model.tokenizer, batch_size=READINGS_AT_ONCE)
    judge = RewardJudge("training rewards", proxy_rewards(quality))
    preferences = paper_preferences(model)
    cases = make_cases(chats(spread(training_prompts(), prompts)), preferences)

    def answers(baseline: Baseline) -> list[str | None]:
        texts = collect_answers(baseline, cases, folder, 1, batch_size)
        collect_text_features(quality, cases, folder, texts)
        return texts

    vanilla = answers(PlainModel("vanilla", model.backbones[0], model.tokenizer, tokens))
    means = {}
    for tried in tried_weights(model.config.adds_up):
        name = "static " + ":".join(map(str, tried))
        weights = {preference.label: reweighted(preference, tried) for preference in preferences}
        static = StaticWeights(name, model, tokens, weights=weights, top_k=top_k)
        outcome = judge_answers(judge, cases, answers(static), vanilla)
        by_preference = np.nanmean(list(outcome.dimensions.values()), axis=(0, 1))
        for label, mean in zip(weights, by_preference):
            means[label, tried] = mean
    return means


def show_headroom(means: dict[tuple[str, tuple], float], console: Console):
    """Print rewards of static weights on training prompts, by preference."""
    labels, tried = (list(dict.fromkeys(keys)) for keys in zip(*means))
    table = Table("preference", *(":".join(map(str, w)) for w in tried), title="reward of static weights, training")
    for label in labels:
        table.add_row(label, *(f"{means[label, w]:.3f}" for w in tried))
    table.add_row("all", *(f"{fmean(means[label, w] for label in labels):.3f}" for w in tried))
    console.print(table)
