"""A whole evaluation: answers, judges, text quality, cost."""

import itertools
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from ..modeling_pcm_ensemble import PCMEnsembleForCausalLM
from ..training.rewards import Guard
from .baselines import Baseline
from .comparison import Job, Outcome, agreement, collect_answers, judge_answers, processes, summarise
from .cost import measure_cost
from .judges import Judge


def evaluate(
    ours: Baseline,
    others: list[Baseline],
    jobs: list[Job],
    judges: list[Judge],
    folder: Path,
    *,
    base: str = "vanilla",
    model: PCMEnsembleForCausalLM,
    guard: Guard,
    seed: int = 0,
    batch_size: int = 64,
) -> dict | None:
    r"""
    Compare one baseline with the others.

    Args:
        ours (`Baseline`), others (`list[Baseline]`): who answers.
        jobs (`list[Job]`): from [`make_jobs`].
        judges (`list[Judge]`): the first one also scores every baseline against `base`.
        folder (`Path`): where answers are kept, see [`collect_answers`].
        base (`str`): the name of the one among `others` that scores are against.
        model (`PCMEnsembleForCausalLM`): whose α is drawn over an answer of `ours`.
        guard (`Guard`): reads answers as text.
        seed, batch_size (`int`): as for [`collect_answers`].

    Returns:
        What [`write_report`] takes, but for `title` and `command`; None on all processes but the main one.

    Raises:
        ValueError: if two baselines have one name, or `base` is none of them.
    """
    baselines = [ours, *others]
    names = [baseline.name for baseline in baselines]
    if len(set(names)) < len(names) or base not in names:
        raise ValueError(f"Baselines must have names of their own, and one must be {base!r}, got {names}.")
    answers = {b.name: collect_answers(b, jobs, folder, seed, batch_size) for b in baselines}
    if not processes().is_main_process:
        return None
    outcomes = {
        judge.name: {b.name: judge_answers(judge, jobs, answers[ours.name], answers[b.name]) for b in others}
        for judge in judges
    }
    return {
        "ours": ours.name,
        "judges": {name: summarise(entry, jobs) for name, entry in outcomes.items()},
        "agreement": {
            f"{one}, {other}": mean_agreement(outcomes[one], outcomes[other])
            for one, other in itertools.combinations(outcomes, 2)
        },
        "scores": {
            name: scores(judge_answers(judges[0], jobs, answers[name], answers[base]).dimensions) for name in names
        },
        "quality": {name: text_quality(guard, jobs, answers[name]) for name in names},
        "cost": measure_cost(baselines, jobs[:8], model.tokenizer),
        "expert_weights": expert_weights_example(model, jobs, answers[ours.name]),
    }


def mean_agreement(one: dict[str, Outcome], other: dict[str, Outcome]) -> list[float]:
    """Agreement of two judges, see [`agreement`], over all baselines."""
    return [fmean(values) for values in zip(*(agreement(one[name], other[name]) for name in one))]


def scores(dimensions: dict[str, np.ndarray]) -> dict[str, float]:
    """Means by dimension, of those that were compared."""
    return {name: float(np.nanmean(values)) for name, values in dimensions.items() if not np.isnan(values).all()}


def text_quality(guard: Guard, jobs: list[Job], answers: list[str | None]) -> dict[str, float]:
    """Means of what the guard reads: the base model's nats a token, nats that the prompt saves, repetition, words."""
    given = [(job.prompt, answer) for job, answer in zip(jobs, answers) if answer is not None]
    features = guard.features(*map(list, zip(*given)))
    return {name: fmean(entry[name] for entry in features) for name in features[0]}


@torch.no_grad()
def expert_weights_example(model: PCMEnsembleForCausalLM, jobs: list[Job], answers: list[str]) -> dict:
    """α over the answer, of those longer than 100 characters or else of all, in which it moves most."""
    tokenizer, names, found = model.tokenizer, model.config.expert_names, []
    long = [pair for pair in zip(jobs, answers) if len(pair[1]) > 100] or list(zip(jobs, answers))
    for job, answer in long:
        prompt = tokenizer.apply_chat_template(job.prompt, add_generation_prompt=True, tokenize=False)
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = tokenizer(prompt + answer, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
        values = model.compute_expert_weights(ids, preference=job.preference)[0, start - 1 : -1]  # (tokens, experts)
        found.append((values.std(dim=0).sum().item(), job, ids[0, start:].tolist(), values))
    _, job, ids, values = max(found, key=lambda entry: entry[0])
    return {
        "title": f"{job.prompt[-1]['content']} [{job.label}]",
        "names": list(job.preference),
        "tokens": [tokenizer.decode([token]) for token in ids],
        "values": values[:, [names.index(name) for name in job.preference]].tolist(),
    }
