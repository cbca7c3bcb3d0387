"""Answers of every baseline, who wins which comparison, and how sure that is."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from scipy import stats
from tqdm import tqdm
from transformers import set_seed

from ..rewards.quality import TextQuality
from .baselines import Baseline, Conversation, Preference, digest, label
from .judges import FIRST, SECOND, TIE, Comparison, Judge, Verdict
from .kept_lines import KeptLines, read_lines
from .statistics import bootstrap_interval, holm, permutation_p_value


@dataclass(frozen=True)
class Job:
    """A prompt to answer under a preference."""

    prompt: Conversation
    preference: Preference


def make_jobs(prompts: list[Conversation], preferences: list[Preference]) -> list[Job]:
    """
    Every prompt under every preference; those of one prompt lie together.

    Raises:
        TypeError: if a prompt is no conversation.
        ValueError: if there are no prompts or preferences, one of them is there twice, or a weight is not above 0.
    """
    for prompt in prompts:
        if not isinstance(prompt, list):
            raise TypeError(f"Prompts must be conversations, lists of messages, got {type(prompt).__name__}.")
    for preference in preferences:
        if not preference or not all(isfinite(weight) and weight > 0 for weight in preference.values()):
            raise ValueError(f"A preference's weights must be above 0, got {preference}. Leave unwanted experts out.")
    jobs = [Job(prompt, preference) for prompt in prompts for preference in preferences]
    if not jobs:
        raise ValueError("There is nothing to compare. Pass at least one prompt and one preference.")
    if len({(json.dumps(job.prompt), label(job.preference)) for job in jobs}) < len(jobs):
        raise ValueError("A prompt or a preference is there twice. Pass each once, or its answers count double.")
    return jobs


def collect_answers(
    baseline: Baseline, jobs: list[Job], folder: Path, seed: int = 0, batch_size: int = 64
) -> list[str | None]:
    r"""
    Answer every job, or take the answer that a run before has kept in `folder`.

    Each batch of jobs has random numbers of its own, so that the answers are the same after a kill and with any number
    of processes: under `accelerate launch` they share the batches.

    Returns:
        One answer for each job, None where the baseline does not apply.

    Raises:
        ValueError: if a baseline gives fewer or more answers than it was asked for.
    """
    state, settings = processes(), baseline.settings()
    known, mine = kept_by_all(folder, "answers", state.process_index)

    def key(job: Job) -> str:
        return json.dumps([baseline.name, job.prompt, job.preference, settings, seed])

    applies = [baseline.applies(job.preference) for job in jobs]
    keys = [key(job) if applied else None for job, applied in zip(jobs, applies)]
    starts = range(0, len(jobs), batch_size)[state.process_index :: state.num_processes]
    for start in tqdm(starts, desc=baseline.name, disable=not state.is_main_process):
        batch = slice(start, start + batch_size)
        new = [(k, job) for k, job in zip(keys[batch], jobs[batch]) if k is not None and k not in known]
        if not new:
            continue
        set_seed(seed * len(jobs) + start)
        answers = baseline.generate([job.prompt for _, job in new], [job.preference for _, job in new])
        if len(answers) != len(new):
            raise ValueError(f"Baseline {baseline.name!r} gave {len(answers)} answers to {len(new)} prompts.")
        mine.add(
            {"key": k, "baseline": baseline.name, "preference": label(job.preference), "answer": answer}
            for (k, job), answer in zip(new, answers)
        )
    known |= mine.lines
    for found in gather_object([{k: known[k] for k in keys if k in known}]):  # other machines' files are not here
        known |= found
    return [None if k is None else known[k]["answer"] for k in keys]


def read_by_all(guard: TextQuality, jobs: list[Job], folder: Path, *answers: list[str | None]):
    """
    Let the processes of a launch share what a guard reads, which is the longest part of judging by rewards. What it
    has found is kept in `folder`, as answers are.
    """
    state, reader = processes(), f"{digest(guard.model)} {guard.tokenizer.chat_template}"
    reader = hashlib.sha256(reader.encode()).hexdigest()[:16]
    known, mine = kept_by_all(folder, "read", state.process_index)
    given = {(json.dumps(job.prompt), text) for texts in answers for job, text in zip(jobs, texts) if text is not None}
    keys = {pair: json.dumps([reader, *pair]) for pair in sorted(given)}  # answers to one prompt lie together
    # All are split, not the new ones: processes on other machines may see other files.
    with state.split_between_processes(list(keys)) as pairs:
        new, size = [pair for pair in pairs if keys[pair] not in known], 4 * guard.batch_size
        quiet = not new or not state.is_main_process
        for start in tqdm(range(0, len(new), size), desc="reading answers", disable=quiet):
            batch = new[start : start + size]
            found = guard.features([json.loads(prompt) for prompt, _ in batch], [text for _, text in batch])
            mine.add({"key": keys[pair], "features": entry} for pair, entry in zip(batch, found))
    known |= mine.lines
    for others in gather_object([{pair: known[keys[pair]]["features"] for pair in pairs}]):
        guard.known |= others


def kept_by_all(folder: Path, name: str, process_index: int) -> tuple[dict[str, dict], KeptLines]:
    """What the processes of runs before have kept in `folder` under a name, and this process's file to go on with."""
    known: dict[str, dict] = {}
    for path in sorted(folder.glob(f"{name}-*.jsonl")):
        known |= read_lines(path)[0]
    return known, KeptLines(folder / f"{name}-{process_index}.jsonl")


def processes() -> PartialState:
    """
    All processes of a launch; on CPUs they are found only if asked for. A program that was launched should end with
    `processes().destroy_process_group()`, or threads that still run may abort it.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


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


def judge_answers(judge: Judge, jobs: list[Job], first: list[str | None], second: list[str | None]) -> Outcome:
    """
    Compare two lists of answers, each pair in both orders.

    Raises:
        ValueError: if the lists do not match the jobs.
    """
    if not len(jobs) == len(first) == len(second):
        raise ValueError(f"There are {len(first)} and {len(second)} answers to {len(jobs)} prompts and preferences.")
    pairs = {
        i: Comparison(jobs[i].prompt, jobs[i].preference, first[i], second[i])
        for i in range(len(jobs))
        if first[i] is not None and second[i] is not None
    }
    shown = judge.judge(list(pairs.values()))
    swapped = judge.judge([pair.swapped() for pair in pairs.values()])
    rows, columns = _places(json.dumps(job.prompt) for job in jobs), _places(label(job.preference) for job in jobs)
    empty = np.full((max(rows) + 1, max(columns) + 1), np.nan)
    wins, dimensions = empty.copy(), defaultdict(empty.copy)
    for place, there, back in zip(pairs, shown, swapped):
        cell = rows[place], columns[place]
        both = [v for v in (there, back and Verdict(FIRST - back.winner, _turned(back.dimensions))) if v is not None]
        if both:
            wins[cell] = fmean(verdict.winner for verdict in both)
            for name in both[0].dimensions:
                dimensions[name][cell] = fmean(verdict.dimensions[name] for verdict in both)
    first_wins = [verdict.winner for verdict in (*shown, *swapped) if verdict is not None]
    return Outcome(wins, dict(sorted(dimensions.items())), fmean(first_wins) - TIE if first_wins else 0.0)


def _turned(dimensions: dict[str, float]) -> dict[str, float]:
    return {name: FIRST - value for name, value in dimensions.items()}


def _places(keys: Iterable[str]) -> list[int]:
    """For each key the place at which it came up first among the different ones."""
    keys = list(keys)
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    return [places[key] for key in keys]


def win_rate(wins: np.ndarray) -> list[float] | None:
    """
    Mean and 95 % interval, prompts drawn anew with all their answers; None where nothing was compared. Where all
    prompts are won or lost, drawing them anew says nothing, and the interval is Clopper and Pearson's.
    """
    by_prompt = _by_prompt(wins)
    if not len(by_prompt):
        return None
    if set(by_prompt) in ({FIRST}, {SECOND}):
        exact = stats.binomtest(int(by_prompt.sum()), len(by_prompt)).proportion_ci()
        return [float(by_prompt[0]), float(exact.low), float(exact.high)]
    return list(bootstrap_interval(by_prompt[None]))


def _by_prompt(wins: np.ndarray) -> np.ndarray:
    compared = wins[~np.isnan(wins).all(axis=1)]
    return np.nanmean(compared, axis=1) if len(compared) else np.empty(0)


def summarise(outcomes: dict[str, Outcome], jobs: list[Job]) -> dict[str, dict]:
    r"""
    Win rates against every baseline before one judge.

    Returns:
        For each baseline `win_rate` (mean, lower and upper end), `p` (permutation test, Holm's over the baselines),
        the same by preference and by dimension (Holm's over all cells of that table), and the `position_bias`.
    """
    labels = list(dict.fromkeys(label(job.preference) for job in jobs))
    report = {
        name: {
            "win_rate": win_rate(outcome.wins),
            "p": _p_value(outcome.wins),
            "preferences": {
                preference: {"win_rate": win_rate(outcome.wins[:, [i]]), "p": _p_value(outcome.wins[:, [i]])}
                for i, preference in enumerate(labels)
                if not np.isnan(outcome.wins[:, i]).all()
            },
            "dimensions": {
                dimension: {"win_rate": win_rate(values), "p": _p_value(values)}
                for dimension, values in outcome.dimensions.items()
            },
            "position_bias": outcome.position_bias,
        }
        for name, outcome in outcomes.items()
    }
    _adjust(list(report.values()))
    for part in ("preferences", "dimensions"):
        _adjust([cell for entry in report.values() for cell in entry[part].values()])
    return report


def _p_value(wins: np.ndarray) -> float:
    by_prompt = _by_prompt(wins)
    return permutation_p_value(by_prompt[None] - TIE) if len(by_prompt) else 1.0


def _adjust(entries: list[dict]):
    for entry, p in zip(entries, holm([entry["p"] for entry in entries])):
        entry["p"] = p


def agreement(one: Outcome, other: Outcome) -> tuple[float, float] | None:
    """
    How often two judges choose the same side, and Cohen's κ: the same beyond what chance gives. None where they have
    no comparison in common.

    Source: J. Cohen, A Coefficient of Agreement for Nominal Scales, 1960.
    """
    both = ~(np.isnan(one.wins) | np.isnan(other.wins))
    if not both.any():
        return None
    a, b = np.sign(one.wins[both] - TIE), np.sign(other.wins[both] - TIE)
    same = float(np.mean(a == b))
    chance = float(sum(np.mean(a == side) * np.mean(b == side) for side in (-1, 0, 1)))
    return same, (same - chance) / (1 - chance) if chance < 1 else 1.0
