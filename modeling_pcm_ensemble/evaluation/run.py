"""A whole evaluation: answers, judges, text quality, cost."""

import itertools
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from tqdm import tqdm

from ..modeling_pcm_ensemble import PCMEnsembleForCausalLM
from ..training.rewards import Guard
from .baselines import Baseline, Conversation, label
from .comparison import Job, Outcome, agreement, collect_answers, judge_answers, processes, read_by_all, summarise
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
        folder (`Path`): where answers, and what the guard reads in them, are kept, see [`collect_answers`].
        base (`str`): the name of the one among `others` that scores are against.
        model (`PCMEnsembleForCausalLM`): whose α is drawn over an answer of `ours`.
        guard (`Guard`): reads answers as text.
        seed, batch_size (`int`): as for [`collect_answers`].

    Returns:
        What [`write_report`] takes, but for `title` and `command`; None on all processes but the main one.

    Raises:
        ValueError: if two baselines have one name, one applies nowhere, `base` is none of them, or a judge cannot
            judge a wanted expert.
    """
    baselines = [ours, *others]
    names = [baseline.name for baseline in baselines]
    _check(baselines, jobs, judges, base)
    answers = {b.name: collect_answers(b, jobs, folder, seed, batch_size) for b in baselines}
    read_by_all(guard, jobs, folder, *answers.values())
    if not processes().is_main_process:
        return None
    outcomes = {
        judge.name: {
            b.name: judge_answers(judge, jobs, answers[ours.name], answers[b.name])
            for b in tqdm(others, desc=f"judge: {judge.name}")
        }
        for judge in judges
    }
    return {
        "ours": ours.name,
        "base": base,
        "judges": {name: summarise(entry, jobs) for name, entry in outcomes.items()},
        "agreement": {
            f"{one}, {other}": mean_agreement(outcomes[one], outcomes[other])
            for one, other in itertools.combinations(outcomes, 2)
        },
        "rewards": {
            name: mean_rewards(judge_answers(judges[0], jobs, answers[name], answers[base])) for name in names
        },
        "quality": {name: text_quality(guard, jobs, answers[name]) for name in names},
        "cost": measure_cost(baselines, jobs, model.tokenizer),
        "expert_weights": expert_weights_example(model, jobs, answers[ours.name]),
    }


def _check(baselines: list[Baseline], jobs: list[Job], judges: list[Judge], base: str):
    names = [baseline.name for baseline in baselines]
    if len(set(names)) < len(names) or base not in names:
        raise ValueError(f"Baselines must have names of their own, and one must be {base!r}, got {names}.")
    for baseline in baselines:
        if not any(baseline.applies(job.preference) for job in jobs):
            raise ValueError(f"Baseline {baseline.name!r} applies under none of the preferences. Leave it out.")
    wanted = {name for job in jobs for name in job.preference}
    for judge in judges:
        if judge.dimensions is not None and (missing := wanted - judge.dimensions):
            raise ValueError(f"Judge {judge.name!r} cannot judge {', '.join(sorted(missing))}. Give it these too.")


def mean_agreement(one: dict[str, Outcome], other: dict[str, Outcome]) -> list[float] | None:
    """Agreement of two judges, see [`agreement`], over the baselines that both have compared."""
    found = [pair for name in one if (pair := agreement(one[name], other[name])) is not None]
    return [fmean(values) for values in zip(*found)] or None


def mean_rewards(against_base: Outcome) -> dict[str, float]:
    """Mean normalised rewards by dimension, and over all answers as `mean`."""
    compared = ~np.isnan(against_base.wins)
    values = {name: by_job[compared] for name, by_job in against_base.dimensions.items()}  # (answers,)
    means = {name: float(np.nanmean(v)) for name, v in values.items() if not np.isnan(v).all()}
    return means | {"mean": float(np.nanmean(list(values.values()), axis=0).mean())}


def text_quality(guard: Guard, jobs: list[Job], answers: list[str | None]) -> dict[str, float]:
    """Means of what the guard reads: the base model's nats a token, nats that the prompt saves, repetition, words."""
    given = [(job.prompt, answer) for job, answer in zip(jobs, answers) if answer is not None]
    features = guard.features(*map(list, zip(*given)))
    return {name: fmean(entry[name] for entry in features) for name in features[0]}


@torch.no_grad()
def expert_weights_over(
    model: PCMEnsembleForCausalLM, prompt: Conversation, answer: str, **preference
) -> tuple[list[int], torch.Tensor]:
    """An answer's tokens, and the α that each is drawn under, `(tokens, experts)`; preference as for `forward`."""
    tokenizer = model.tokenizer
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    start = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = tokenizer(text + answer, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
    return ids[0, start:].tolist(), model.compute_expert_weights(ids, **preference)[0, start - 1 : -1]


def expert_weights_example(model: PCMEnsembleForCausalLM, jobs: list[Job], answers: list[str]) -> dict:
    """α over the answer, of those longer than 100 characters or else of all, in which it moves most."""
    names, found = model.config.expert_names, []
    given = [(job, answer) for job, answer in zip(jobs, answers) if answer]
    given = [pair for pair in given if len(pair[1]) > 100] or given
    for job, answer in tqdm(given, desc="expert weights", leave=False):
        ids, values = expert_weights_over(model, job.prompt, answer, preference=job.preference)
        found.append((values.std(dim=0, correction=0).sum().item(), job, ids, values))
    _, job, ids, values = max(found, key=lambda entry: entry[0])
    return {
        "title": f"{job.prompt[-1]['content']} [{label(job.preference)}]",
        "names": list(job.preference),
        "tokens": [model.tokenizer.decode([token]) for token in ids],
        "values": values[:, [names.index(name) for name in job.preference]].tolist(),
    }
