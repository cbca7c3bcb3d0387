"""The best weights that stay the same over prompts and tokens: what a trained PCM must beat."""

from statistics import fmean

import numpy as np
from answers import STATIC, chats, paper_preferences, spread, training_prompts
from rich.console import Console
from rich.table import Table

from modeling_pcm_ensemble.evaluation import (
    Mixture,
    PlainModel,
    RewardJudge,
    collect_answers,
    judge_answers,
    label,
    make_jobs,
    read_by_all,
)
from modeling_pcm_ensemble.training.rewards import proxy_rewards


def best_static_weights(model, rewards: dict[tuple[str, tuple], float]) -> dict[str, dict[str, float]]:
    """Of each preference, by its label, the weights with the best of [`static_rewards`]."""
    best = {name: max(STATIC, key=lambda static: rewards[name, static]) for name, _ in rewards}
    return {label(entry): dict(zip(entry, best[label(entry)])) for entry in paper_preferences(model)}


def static_rewards(model, arguments) -> dict[tuple[str, tuple], float]:
    """
    By preference and weights, the mean reward of answers to training prompts. Arguments: `static_prompts`, `tokens`,
    `batch_size`, and `output`, where answers are kept.
    """
    rewards = proxy_rewards(model.backbones[0], model.tokenizer)
    judge, guard = RewardJudge("training rewards", rewards), next(iter(rewards.values())).guard
    preferences, folder = paper_preferences(model), arguments.output / "static"
    jobs = make_jobs(chats(spread(training_prompts(), arguments.static_prompts)), preferences)

    def answers(baseline) -> list[str]:
        found = collect_answers(baseline, jobs, folder, 1, arguments.batch_size)
        read_by_all(guard, jobs, folder, found)
        return found

    vanilla = answers(PlainModel("vanilla", model.backbones[0], model.tokenizer, arguments.tokens))
    means = {}
    for static in STATIC:
        weights = {label(preference): dict(zip(preference, static)) for preference in preferences}
        name = "static " + ":".join(map(str, static))
        mixture = Mixture(name, model, arguments.tokens, use_pcm=False, weights=weights)
        outcome = judge_answers(judge, jobs, answers(mixture), vanilla)
        by_preference = np.nanmean(list(outcome.dimensions.values()), axis=(0, 1))
        means |= {(name, static): mean for name, mean in zip(weights, by_preference)}
    return means


def show_headroom(means: dict[tuple[str, tuple], float], console: Console):
    """Rewards of static weights on training prompts, by preference."""
    preferences, weights = (list(dict.fromkeys(keys)) for keys in zip(*means))
    table = Table("preference", *(":".join(map(str, w)) for w in weights), title="reward of static weights, training")
    for name in preferences:
        table.add_row(name, *(f"{means[name, w]:.3f}" for w in weights))
    table.add_row("all", *(f"{fmean(means[name, w] for name in preferences):.3f}" for w in weights))
    console.print(table)
