"""Answers of every baseline, and what a base model reads in them: kept in files, shared by processes."""

import hashlib
import json
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import set_seed

from ..preference import Preference
from ..rewards.quality import TextQuality
from .baselines import Baseline, Conversation, digest
from .kept_lines import KeptLines, read_lines

LONGEST_SETTINGS = 8192  # characters that are kept as they are


@dataclass(frozen=True)
class Case:
    """A prompt to answer under a preference."""

    prompt: Conversation
    preference: Preference


def make_cases(prompts: list[Conversation], preferences: list[Preference]) -> list[Case]:
    """
    Combine every prompt with every preference; those of one prompt lie together.

    Raises:
        TypeError: if a prompt is no conversation, or a preference no `Preference`.
        ValueError: if there are no prompts or preferences, one of them is there twice, or a weight is not above 0.
    """
    for prompt in prompts:
        if not isinstance(prompt, list):
            raise TypeError(f"Prompts must be conversations, lists of messages, got {type(prompt).__name__}.")
    for preference in preferences:
        _check(preference)

    cases = [Case(prompt, preference) for prompt in prompts for preference in preferences]
    if not cases:
        raise ValueError("There is nothing to compare. Pass at least one prompt and one preference.")
    if len({(json.dumps(case.prompt), case.preference.label) for case in cases}) < len(cases):
        raise ValueError("A prompt or a preference is there twice. Pass each once, or its answers count double.")
    return cases


def _check(preference: Preference):
    if not isinstance(preference, Preference):
        raise TypeError(
            f"Preferences must be of the type `Preference`, got {type(preference).__name__}. Write "
            '`Preference({"concise": 1.0})`.'
        )
    weights = preference.weights
    if not weights or not all(isfinite(weight) and weight > 0 for weight in weights.values()):
        raise ValueError(f"A preference's weights must be above 0, got {weights}. Leave unwanted experts out.")


def collect_answers(
    baseline: Baseline, cases: list[Case], folder: Path, seed: int = 0, batch_size: int = 64
) -> list[str | None]:
    r"""
    Answer every case, or take the answer that a run before has kept in `folder`.

    Each batch of cases has random numbers of its own, so that the answers are the same after a kill and with any
    number of processes: under `accelerate launch` they share the batches.

    Args:
        baseline (`Baseline`): who answers.
        cases (`list[Case]`): from [`make_cases`].
        folder (`Path`): holds `answers-<process>.jsonl`; made if it is not there.
        seed (`int`): other seeds give other answers, which are kept apart.
        batch_size (`int`): cases that are answered at once.

    Returns:
        One answer for each case, None where the baseline does not apply.

    Raises:
        ValueError: if a baseline gives fewer or more answers than it was asked for.
    """
    state = distributed_state()
    known, own = open_kept_lines(folder, "answers", state.process_index)
    settings = baseline.settings()
    if len(settings) > LONGEST_SETTINGS:  # such as words for every point of a grid, which would stand in each key
        settings = hashlib.sha256(settings.encode()).hexdigest()

    keys = []
    for case in cases:
        asked = [baseline.name, case.prompt, dict(case.preference.weights), settings, seed]
        if case.preference.description_ids is not None:
            asked.append(case.preference.description_ids)
        keys.append(json.dumps(asked) if baseline.applies(case.preference) else None)

    # Cases of one preference lie together, since some ways make a model for each.
    asked_of = sorted(zip(keys, cases), key=lambda pair: pair[1].preference.label)
    starts = range(0, len(cases), batch_size)[state.process_index :: state.num_processes]
    for start in tqdm(starts, desc=baseline.name, disable=not state.is_main_process):
        batch = asked_of[start : start + batch_size]
        new = [(k, case) for k, case in batch if k is not None and k not in known]
        if new:
            set_seed(seed * len(cases) + start)
            own.add(_answered(baseline, new))

    known |= own.lines
    for found in gather_object([{k: known[k] for k in keys if k in known}]):  # other machines' files are not here
        known |= found
    return [None if k is None else known[k]["answer"] for k in keys]


def _answered(baseline: Baseline, new: list[tuple[str, Case]]) -> list[dict]:
    """Lines to keep: a baseline's answers to cases, each with its key."""
    answers = baseline.generate([case.prompt for _, case in new], [case.preference for _, case in new])
    if len(answers) != len(new):
        raise ValueError(f"Baseline {baseline.name!r} gave {len(answers)} answers to {len(new)} prompts.")

    lines = []
    for (key, case), answer in zip(new, answers):
        facts = {"key": key, "baseline": baseline.name, "preference": case.preference.label}
        lines.append(facts | {"answer": answer})
    return lines


def collect_text_features(quality: TextQuality, cases: list[Case], folder: Path, *answers: list[str | None]):
    r"""
    Let the processes of a launch share what a base model reads in answers, which is the longest part of judging by
    rewards. All of it is known to `quality` then, and kept in `folder`, as answers are.

    Args:
        quality (`TextQuality`): whose features are wanted.
        cases (`list[Case]`), folder (`Path`): as for [`collect_answers`].
        answers (`list[str | None]`): of any number of baselines, one for each case.
    """
    state = distributed_state()
    known, own = open_kept_lines(folder, "read", state.process_index)

    pairs = set()
    for texts in answers:
        pairs |= {(json.dumps(case.prompt), text) for case, text in zip(cases, texts) if text is not None}
    reader = hashlib.sha256(f"{digest(quality.model)} {quality.tokenizer.chat_template}".encode()).hexdigest()[:16]
    keys = {pair: json.dumps([reader, *pair]) for pair in sorted(pairs)}  # answers to one prompt lie together

    # All are split, not the new ones: processes on other machines may see other files.
    with state.split_between_processes(list(keys)) as shared:
        new = [pair for pair in shared if keys[pair] not in known]
        size = 4 * quality.batch_size
        quiet = not new or not state.is_main_process
        for start in tqdm(range(0, len(new), size), desc="reading answers", disable=quiet):
            batch = new[start : start + size]
            features = quality.features([json.loads(prompt) for prompt, _ in batch], [text for _, text in batch])
            own.add([{"key": keys[pair], "features": entry} for pair, entry in zip(batch, features)])

    known |= own.lines
    for others in gather_object([{pair: known[keys[pair]]["features"] for pair in shared}]):
        quality.known |= others


def open_kept_lines(folder: Path, name: str, process_index: int) -> tuple[dict[str, dict], KeptLines]:
    """Read what all processes of runs before have kept in `folder` under a name; and this process's own file of it."""
    known: dict[str, dict] = {}
    for path in sorted(folder.glob(f"{name}-*.jsonl")):
        known |= read_lines(path)[0]
    return known, KeptLines(folder / f"{name}-{process_index}.jsonl")


def distributed_state() -> PartialState:
    """
    Return accelerate's view of all processes of a launch; on CPUs they are found only if asked for. A program that was
    launched should end with `distributed_state().destroy_process_group()`, or threads that still run may abort it.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


__all__ = [
    "Case",
    "collect_answers",
    "collect_text_features",
    "distributed_state",
    "make_cases",
    "open_kept_lines",
]
