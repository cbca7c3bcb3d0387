"""Answers of every baseline, who wins which comparison, and how sure that is."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import set_seed

from .baselines import Baseline, Conversation, Preference
from .judges import FIRST, TIE, Comparison, Judge
from .kept_lines import KeptLines
from .statistics import bootstrap_interval, holm, permutation_p_value


@dataclass(frozen=True)
class Job:
    """A prompt to answer under a preference."""

    prompt: Conversation
    preference: Preference

    @property
    def label(self) -> str:
        """The preference in tables."""
        equal = len(set(self.preference.values())) == 1
        return " + ".join(name if equal else f"{name}={w:g}" for name, w in self.preference.items())


def make_jobs(prompts: list[Conversation], preferences: list[Preference]) -> list[Job]:
    """
    Every prompt under every preference; those of one prompt lie together.

    Raises:
        ValueError: if there are no prompts or preferences, or one of them is there twice.
    """
    jobs = [Job(prompt, preference) for prompt in prompts for preference in preferences]
    keys = [json.dumps([job.prompt, job.preference]) for job in jobs]
    if not jobs:
        raise ValueError("There is nothing to compare. Pass at least one prompt and one preference.")
    if len(set(keys)) < len(keys):
        raise ValueError("A prompt or a preference is there twice. Pass each once, or its answers count double.")
    return jobs


def collect_answers(
    baseline: Baseline, jobs: list[Job], folder: Path, seed: int = 0, batch_size: int = 64
) -> list[str | None]:
    r"""
    Answer every job, or read the answer that a run before has kept in `folder`.

    Under `accelerate launch` the batches are split over the processes. Each batch has random numbers of its own, the
    same for all baselines, so that the answers depend neither on who gives them nor on what a killed run had done.

    Returns:
        `list[str]`: one answer for each job, None where the baseline does not apply.

    Raises:
        ValueError: if a baseline gives fewer or more answers than it was asked for.
    """
    state = processes()
    jobs_of = [job for job in jobs if baseline.applies(job.preference)]
    file_name = f"answers-{baseline.name.replace('/', '-')}"

    def key(job: Job) -> str:
        return json.dumps([job.prompt, job.preference, baseline.settings, seed])

    mine = KeptLines(folder / f"{file_name}.{state.process_index}.jsonl")
    batches = [jobs_of[start : start + batch_size] for start in range(0, len(jobs_of), batch_size)]
    done = _all_lines(folder, file_name)
    share = list(enumerate(batches))[state.process_index :: state.num_processes]
    for number, batch in tqdm(share, desc=baseline.name, disable=not state.is_main_process):
        if all(key(job) in done for job in batch):
            continue
        set_seed(1000 * seed + number)
        start = time.perf_counter()
        answers = baseline.generate([job.prompt for job in batch], [job.preference for job in batch])
        if len(answers) != len(batch):
            raise ValueError(f"Baseline {baseline.name!r} gave {len(answers)} answers to {len(batch)} prompts.")
        seconds = (time.perf_counter() - start) / len(batch)
        mine.add({"key": key(job), "answer": a, "seconds": seconds} for job, a in zip(batch, answers))
    state.wait_for_everyone()
    done = _all_lines(folder, file_name)
    return [done[key(job)]["answer"] if baseline.applies(job.preference) else None for job in jobs]


def processes() -> PartialState:
    """All processes of a launch; on CPUs they are found only if asked for."""
    return PartialState(cpu=not torch.accelerator.is_available())


def _all_lines(folder: Path, file_name: str) -> dict[str, dict]:
    """What all processes have kept."""
    lines = {}
    for path in sorted(folder.glob(f"{file_name}.*.jsonl")):
        lines |= KeptLines(path).lines
    return lines


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
    places = [i for i in range(len(jobs)) if first[i] is not None and second[i] is not None]
    pairs = [Comparison(jobs[i].prompt, jobs[i].preference, first[i], second[i]) for i in places]
    swapped = [pair.swapped() for pair in pairs]
    verdicts, reverse = judge.judge(pairs), judge.judge(swapped)
    names = sorted({name for pair in pairs for name in pair.preference})
    shape = (len({json.dumps(job.prompt) for job in jobs}), -1)
    wins = np.full(len(jobs), np.nan)
    dimensions = {name: np.full(len(jobs), np.nan) for name in names}
    shown_first = []
    for place, pair, other, there, back in zip(places, pairs, swapped, verdicts, reverse):
        one, two = judge.overall(pair, there), judge.overall(other, back)
        shown_first += [one, two]
        wins[place] = (one + FIRST - two) / 2
        for name in pair.preference:
            dimensions[name][place] = (there[name] + FIRST - back[name]) / 2
    return Outcome(
        wins.reshape(shape),
        {name: values.reshape(shape) for name, values in dimensions.items()},
        float(np.mean(shown_first)) - TIE if shown_first else 0.0,
    )


def win_rate(wins: np.ndarray) -> list[float] | None:
    """Mean and 95 % interval, prompts drawn anew with all their answers; None where nothing was compared."""
    by_prompt = _by_prompt(wins)
    return list(bootstrap_interval(by_prompt[None])) if len(by_prompt) else None


def _by_prompt(wins: np.ndarray) -> np.ndarray:
    compared = wins[~np.isnan(wins).all(axis=1)]
    return np.nanmean(compared, axis=1) if len(compared) else np.empty(0)


def summarise(outcomes: dict[str, Outcome], jobs: list[Job]) -> dict[str, dict]:
    r"""
    Win rates against every baseline before one judge.

    Returns:
        For each baseline `win_rate` (mean, lower and upper end), `p` (permutation test, Holm's over the baselines),
        the same by preference (Holm's over all cells of that table) and by dimension, and the `position_bias`.
    """
    labels = list(dict.fromkeys(job.label for job in jobs))
    report = {
        name: {
            "win_rate": win_rate(outcome.wins),
            "p": _p_value(outcome.wins),
            "preferences": {
                label: {"win_rate": win_rate(outcome.wins[:, [i]]), "p": _p_value(outcome.wins[:, [i]])}
                for i, label in enumerate(labels)
                if not np.isnan(outcome.wins[:, i]).all()
            },
            "dimensions": {d: win_rate(values) for d, values in outcome.dimensions.items()},
            "position_bias": outcome.position_bias,
        }
        for name, outcome in outcomes.items()
    }
    _adjust(list(report.values()))
    _adjust([cell for entry in report.values() for cell in entry["preferences"].values()])
    return report


def _p_value(wins: np.ndarray) -> float:
    by_prompt = _by_prompt(wins)
    return permutation_p_value(by_prompt[None] - TIE) if len(by_prompt) else 1.0


def _adjust(entries: list[dict]):
    for entry, p in zip(entries, holm([entry["p"] for entry in entries])):
        entry["p"] = p


def agreement(one: Outcome, other: Outcome) -> tuple[float, float]:
    """
    How often two judges choose the same side, and Cohen's κ: the same beyond what chance gives.

    Source: J. Cohen, A Coefficient of Agreement for Nominal Scales, 1960.
    """
    both = ~(np.isnan(one.wins) | np.isnan(other.wins))
    a, b = np.sign(one.wins[both] - TIE), np.sign(other.wins[both] - TIE)
    same = float(np.mean(a == b))
    chance = float(sum(np.mean(a == side) * np.mean(b == side) for side in (-1, 0, 1)))
    return same, (same - chance) / (1 - chance) if chance < 1 else 1.0
