"""A whole evaluation: answers, judges, text quality, cost."""

import itertools
import zlib
from pathlib import Path
from statistics import fmean
from typing import cast

import numpy as np
import torch
from tqdm import tqdm

from ..failures import truncation_bound
from ..modeling_pcm_ensemble import PCMEnsembleForCausalLM
from ..rewards.quality import TextQuality
from .answers import Case, collect_answers, collect_text_features, distributed_state
from .baselines import Baseline, Conversation
from .comparison import Outcome, agreement, judge_answers, summarise
from .cost import measure_cost
from .ensemble_baselines import tokenizer_of
from .judges import Judge

SEEDS = 100_000  # of baselines; multiplied by the number of cases, they stay below the 2³² that NumPy takes
BOUNDED = 8  # answers over which the truncation is bounded


def evaluate(
    ours: Baseline,
    others: list[Baseline],
    cases: list[Case],
    judges: list[Judge],
    folder: Path,
    *,
    base: str = "vanilla",
    model: PCMEnsembleForCausalLM,
    quality: TextQuality,
    seed: int = 0,
    batch_size: int = 64,
    cost_rounds: int = 3,
) -> dict | None:
    r"""
    Compare one baseline with the others.

    Args:
        ours (`Baseline`), others (`list[Baseline]`): who answers.
        cases (`list[Case]`): from [`make_cases`].
        judges (`list[Judge]`): the first one also scores every baseline against `base`.
        folder (`Path`): where answers, and what `quality` reads in them, are kept, see [`collect_answers`].
        base (`str`): the name of the one among `others` that scores are against.
        model (`PCMEnsembleForCausalLM`): whose α is drawn over an answer of `ours`.
        quality (`TextQuality`): reads answers as text.
        seed (`int`): other seeds give other answers. Each baseline draws random numbers of its own.
        batch_size (`int`): as for [`collect_answers`].
        cost_rounds (`int`): how often each answers for [`measure_cost`]; 0: costs are not measured.

    Returns:
        What [`write_report`] takes, but for `title` and `command`; None on all processes but the main one.

    Raises:
        ValueError: if two baselines have one name, one applies nowhere, `base` is none of them, or a judge cannot
            judge a wanted expert.
    """
    baselines = [ours, *others]
    _check(baselines, cases, judges, base)

    # Under the same random numbers, ways that are alike would sample the same words, and those wins be more or less
    # certain than wins over other ways.
    answers = {}
    for baseline in baselines:
        own_seed = zlib.crc32(f"{seed} {baseline.name}".encode()) % SEEDS
        answers[baseline.name] = collect_answers(baseline, cases, folder, own_seed, batch_size)
    collect_text_features(quality, cases, folder, *answers.values())
    if not distributed_state().is_main_process:
        return None

    outcomes: dict[str, dict[str, Outcome]] = {}
    for judge in judges:
        outcomes[judge.name] = {
            other.name: judge_answers(judge, cases, answers[ours.name], answers[other.name])
            for other in tqdm(others, desc=f"judge: {judge.name}")
        }

    agreements = {}
    for one, other in itertools.combinations(outcomes, 2):
        agreements[f"{one}, {other}"] = mean_agreement(outcomes[one], outcomes[other])
    rewards, as_text = {}, {}
    for name, texts in answers.items():
        rewards[name] = mean_rewards(judge_answers(judges[0], cases, texts, answers[base]))
        as_text[name] = text_quality(quality, cases, texts)

    return {
        "ours": ours.name,
        "base": base,
        "judges": {name: summarise(against, cases) for name, against in outcomes.items()},
        "agreement": agreements,
        "rewards": rewards,
        "quality": as_text,
        "cost": measure_cost(baselines, cases, tokenizer_of(model), cost_rounds) if cost_rounds else {},
        "expert_weights": expert_weights_example(model, cases, answers[ours.name]),
        "truncation": mean_truncation_bound(model, cases, answers[ours.name]),
    }


def _check(baselines: list[Baseline], cases: list[Case], judges: list[Judge], base: str):
    names = [baseline.name for baseline in baselines]
    if len(set(names)) < len(names) or base not in names:
        raise ValueError(f"Baselines must have names of their own, and one must be {base!r}, got {names}.")

    for baseline in baselines:
        if not any(baseline.applies(case.preference) for case in cases):
            raise ValueError(f"Baseline {baseline.name!r} applies under none of the preferences. Leave it out.")

    wanted = {name for case in cases for name in case.preference.weights}
    for judge in judges:
        if judge.dimensions is not None and (missing := wanted - judge.dimensions):
            raise ValueError(f"Judge {judge.name!r} cannot judge {', '.join(sorted(missing))}. Give it these too.")


def mean_agreement(one: dict[str, Outcome], other: dict[str, Outcome]) -> list[float] | None:
    """Compute the agreement of two judges, see [`agreement`], over the baselines that both have compared."""
    found = [pair for name in one if (pair := agreement(one[name], other[name])) is not None]
    return [fmean(values) for values in zip(*found)] or None


def mean_rewards(against_base: Outcome) -> dict[str, float]:
    """Compute mean normalised rewards by dimension, and over all answers as `mean`."""
    compared = ~np.isnan(against_base.wins)
    values = {name: by_case[compared] for name, by_case in against_base.dimensions.items()}  # (answers,)
    means = {name: float(np.nanmean(v)) for name, v in values.items() if not np.isnan(v).all()}
    of_answers = np.nanmean(list(values.values()), axis=0)
    return means | {"mean": float(of_answers.mean())}


def text_quality(quality: TextQuality, cases: list[Case], answers: list[str | None]) -> dict[str, float]:
    """
    Compute means of what is read in answers: the base model's nats a token (`nll`), nats that the prompt saves
    (`gain`), `repetition`, `words`.
    """
    given = [(case.prompt, answer) for case, answer in zip(cases, answers) if answer is not None]
    features = quality.features([prompt for prompt, _ in given], [answer for _, answer in given])
    return {name: fmean(entry[name] for entry in features) for name in features[0]}


@torch.no_grad()
def expert_weights_over(
    model: PCMEnsembleForCausalLM, prompt: Conversation, answer: str, **preference
) -> tuple[list[int], torch.Tensor]:
    """
    Compute α over an answer.

    Args:
        model (`PCMEnsembleForCausalLM`): the ensemble.
        prompt (`list[dict]`), answer (`str`): what it was asked, and what was answered.
        preference: as for `forward`: `preference`, `preference_text`, `preference_ids`.

    Returns:
        The answer's tokens, and the α that each is drawn under, `(tokens, experts)`.
    """
    ids, start = _prompt_and_answer(model, prompt, answer)
    expert_weights = model.compute_expert_weights(ids, **preference)[0]  # (tokens of prompt and answer, experts)
    return ids[0, start:].tolist(), expert_weights[start - 1 : -1]


def _prompt_and_answer(model: PCMEnsembleForCausalLM, prompt: Conversation, answer: str) -> tuple[torch.Tensor, int]:
    """Tokens of both, `(1, tokens)`, and where the answer's begin."""
    tokenizer = tokenizer_of(model)
    text = cast(str, tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))
    # Apart, since the two may end and begin with what together is one token
    before, of_answer = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, answer))
    return torch.tensor([before + of_answer], device=model.device), len(before)


@torch.no_grad()
def mean_truncation_bound(
    model: PCMEnsembleForCausalLM, cases: list[Case], answers: list[str | None]
) -> dict[str, float] | None:
    """
    Compute how far, at most, the mixture of top k is from that of whole distributions, see [`truncation_bound`].

    Returns:
        `bound`, the mean over the tokens of some answers, and `tokens`, their number; None if the experts are merged
        in another way, or without a top k.
    """
    if model.config.merge != "probabilities" or model.config.expert_top_k is None:
        return None

    given = [(case, answer) for case, answer in zip(cases, answers) if answer]
    bounds = []
    for case, answer in tqdm(given[:: max(1, len(given) // BOUNDED)][:BOUNDED], desc="top k", leave=False):
        ids, start = _prompt_and_answer(model, case.prompt, answer)
        places = torch.arange(start - 1, ids.shape[1] - 1, device=ids.device)  # which the answer's tokens come after
        output = model(ids, preference=case.preference, logits_to_keep=places, output_expert_logits=True)
        of_answer = truncation_bound(
            output.expert_logits, output.expert_weights, model.config.expert_top_k, model.served_experts
        )
        bounds += of_answer[0].tolist()
    return {"bound": fmean(bounds), "tokens": len(bounds)} if bounds else None


def expert_weights_example(model: PCMEnsembleForCausalLM, cases: list[Case], answers: list[str | None]) -> dict:
    """Find the answer, of those longer than 100 characters or else of all, in which α moves most; give α over it."""
    given = [(case, answer) for case, answer in zip(cases, answers) if answer]
    given = [pair for pair in given if len(pair[1]) > 100] or given

    moves = []
    for case, answer in tqdm(given, desc="expert weights", leave=False):
        ids, values = expert_weights_over(model, case.prompt, answer, preference=case.preference)
        moves.append((values.std(dim=0, correction=0).sum().item(), case, ids, values))
    _, case, ids, values = max(moves, key=lambda move: move[0])

    wanted = list(case.preference.weights)
    columns = [model.config.expert_names.index(name) for name in wanted]
    return {
        "title": f"{case.prompt[-1]['content']} [{case.preference.label}]",
        "names": wanted,
        "tokens": [tokenizer_of(model).decode([token]) for token in ids],
        "values": values[:, columns].tolist(),
        "adds_up": model.config.adds_up,
    }


__all__ = ["evaluate", "expert_weights_over", "mean_truncation_bound"]
