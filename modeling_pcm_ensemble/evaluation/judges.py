"""Which of two answers suits a preference better: by rewards, by a language model, by people."""

import csv
import json
import os
import random
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from ..preference import Preference
from ..rewards.scoring import call_reward, normalised_reward
from .baselines import Conversation
from .kept_lines import KeptLines

FIRST, TIE, SECOND = 1.0, 0.5, 0.0


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt under one preference."""

    prompt: Conversation
    preference: Preference
    first: str
    second: str

    def swapped(self) -> "Comparison":
        return Comparison(self.prompt, self.preference, self.second, self.first)


@dataclass(frozen=True)
class Verdict:
    r"""
    Args:
        winner (`float`): 1 if the first answer suits the preference better, 0 if the second, 0.5 if neither.
        dimensions (`dict[str, float]`): for each wanted expert that was judged apart, likewise or in between.
    """

    winner: float
    dimensions: dict[str, float]


class Judge(ABC):
    r"""
    Compares answers.

    Attributes:
        name (`str`): stands in tables.
        dimensions (`set[str]`, *optional*): the experts that it can judge; None for all.
    """

    name: str
    dimensions: set[str] | None = None

    @abstractmethod
    def judge(self, comparisons: list[Comparison]) -> list[Verdict | None]:
        """Give a verdict on each comparison, None where there is none."""


def weighted_verdict(preference: Preference, dimensions: dict[str, float]) -> Verdict:
    """Find the winner by weighted mean over the preference's dimensions."""
    balance = sum(weight * (dimensions[name] - TIE) for name, weight in preference.weights.items())
    if abs(balance) <= 1e-9:
        return Verdict(TIE, dimensions)
    return Verdict(FIRST if balance > 0 else SECOND, dimensions)


class RewardJudge(Judge):
    r"""
    Judges by rewards. A dimension is won by how often the first answer would be preferred, σ(r(first) − r(second)),
    as in the normalised reward of training, and the whole by their weighted mean.

    Args:
        name (`str`): see [`Judge`].
        rewards (`Mapping[str, Callable]`): by dimension, `(prompts, completions) → list[float]` as TRL's, for
            conversations, in units of a standard deviation.
    """

    def __init__(self, name: str, rewards: Mapping[str, Callable]):
        self.name = name
        self.rewards = rewards
        self.dimensions = set(rewards)
        self._known: dict[tuple[str, str, str], float] = {}

    def judge(self, comparisons: list[Comparison]) -> list[Verdict | None]:
        for dimension in self.rewards:
            wanting = [c for c in comparisons if dimension in c.preference.weights]
            self._reward(dimension, [(c.prompt, text) for c in wanting for text in (c.first, c.second)])

        verdicts: list[Verdict | None] = []
        for c in comparisons:
            won = {name: self._won(name, c) for name in c.preference.weights}
            verdicts.append(weighted_verdict(c.preference, won))
        return verdicts

    def _won(self, dimension: str, c: Comparison) -> float:
        prompt = json.dumps(c.prompt)
        return normalised_reward(
            self._known[dimension, prompt, c.first],
            self._known[dimension, prompt, c.second],
        )

    def _reward(self, dimension: str, texts: list[tuple[Conversation, str]]):
        """Let `_known` have the rewards of answers to prompts."""
        new = {(dimension, json.dumps(prompt), text): (prompt, text) for prompt, text in texts}
        new = {key: pair for key, pair in new.items() if key not in self._known}
        if not new:
            return
        prompts = [prompt for prompt, _ in new.values()]
        completions = [[{"role": "assistant", "content": text}] for _, text in new.values()]
        rewards = call_reward(dimension, self.rewards[dimension], prompts, completions, {})
        self._known |= dict(zip(new, rewards))


# The words are this project's own.
QUESTION = """\
A conversation:
{prompt}

Answer A:
{first}

Answer B:
{second}

The answers were written under this instruction: "{description}"
Which answer follows the instruction better? Judge by this alone. Reply with one line: A, B, or TIE."""
THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
QUOTES = r"[\s*`\"'.]*"
REPLY = re.compile(rf"{QUOTES}(?:answer[\s:]+)?{QUOTES}(A|B|TIE)\b{QUOTES}$", re.IGNORECASE)


class LanguageModelJudge(Judge):
    r"""
    Asks a language model about each dimension apart, and keeps what it said.

    Args:
        name (`str`): see [`Judge`]; replies kept under another name are not taken for its.
        ask (`Callable[[str], str]`): a question → the model's reply, such as [`ChatEndpoint`], of a local model too
            if `transformers serve` runs it.
        descriptions (`Mapping[str, str]`): what each dimension asks of an answer.
        path (`Path`): a JSONL file that replies are kept in, so that none is asked for twice.
        workers (`int`): questions that are asked at once.

    Raises:
        ValueError: if a reply is not A, B or TIE. It is not kept; those before it are.
    """

    def __init__(
        self, name: str, ask: Callable[[str], str], descriptions: Mapping[str, str], path: Path, workers: int = 8
    ):
        self.name = name
        self.ask = ask
        self.descriptions = descriptions
        self.workers = workers
        self.dimensions = set(descriptions)
        self.replies = KeptLines(path)

    def judge(self, comparisons: list[Comparison]) -> list[Verdict | None]:
        questions = [(c, name) for c in comparisons for name in c.preference.weights]
        with ThreadPoolExecutor(self.workers) as pool:
            answers = pool.map(lambda question: self._won(*question), questions)  # one that fails cancels the rest
            won = iter(list(tqdm(answers, self.name, len(questions), disable=len(questions) < 32)))

        verdicts: list[Verdict | None] = []
        for c in comparisons:
            by_dimension = dict(zip(c.preference.weights, won))  # takes as many answers as it has dimensions
            verdicts.append(weighted_verdict(c.preference, by_dimension))
        return verdicts

    def _won(self, comparison: Comparison, dimension: str) -> float:
        if comparison.first == comparison.second:
            return TIE

        question = QUESTION.format(
            prompt="\n\n".join(f"{turn['role']}: {turn['content']}" for turn in comparison.prompt),
            first=comparison.first,
            second=comparison.second,
            description=self.descriptions[dimension],
        )

        key = json.dumps([self.name, question])
        if key not in self.replies:
            self.replies.add([{"key": key, "winner": parse_reply(self.ask(question))}])
        return {"A": FIRST, "B": SECOND, "TIE": TIE}[self.replies[key]["winner"]]


def parse_reply(reply: str) -> str:
    """Read A, B or TIE from a reply that says nothing else beside its thoughts."""
    if not (match := REPLY.match(THOUGHT.sub("", reply))):
        raise ValueError(f"The judge must reply with A, B or TIE, replied {reply!r}. Use a model that follows this.")
    return match[1].upper()


class ChatEndpoint:
    r"""
    Asks a model behind any endpoint that speaks OpenAI's chat completions. Failing and slow replies are asked for
    again, at growing distances.

    Args:
        url (`str`): up to and including `/v1`.
        model (`str`): its name there.
        api_key (`str`, *optional*): sent as a bearer token; by default `OPENAI_API_KEY`, if it is set.
        timeout (`float`): seconds to wait for a reply.
        max_retries (`int`): attempts after the first.

    Raises:
        ConnectionError: if the endpoint fails throughout. What was judged before is kept: run again later.
    """

    def __init__(self, url: str, model: str, api_key: str | None = None, timeout: float = 60, max_retries: int = 5):
        try:
            import openai
        except ImportError as error:
            raise ImportError(
                "A judge behind an endpoint needs openai. Install it with `pip install openai`."
            ) from error

        self.url = url
        self.model = model
        self.failures = openai.APIError
        api_key = api_key or os.environ.get("OPENAI_API_KEY", "none")  # local servers take any
        self.client = openai.OpenAI(base_url=url, api_key=api_key, timeout=timeout, max_retries=max_retries)

    def __call__(self, question: str) -> str:
        messages: list = [{"role": "user", "content": question}]
        try:
            reply = self.client.chat.completions.create(model=self.model, messages=messages, temperature=0)
        except self.failures as error:
            raise ConnectionError(
                f"The judge at {self.url} gave no reply: {error}. What it has judged is kept; run again later."
            ) from error
        return reply.choices[0].message.content or ""


COLUMNS = ("prompt", "preference", "first", "second", "choice")
FORMULAS = tuple("=+-@\t\r\n＝＋－＠")  # what makes a spreadsheet run a cell


def as_cell(text: str) -> str:
    """Write a text so that a spreadsheet shows it and does not run it."""
    return f"'{text}" if text.lstrip("'").startswith(FORMULAS) else text


def from_cell(cell: str | None) -> str:
    """Read the text of a cell that [`as_cell`] made, or that is as it was."""
    cell = cell or ""
    return cell[1:] if cell.startswith("'") and cell.lstrip("'").startswith(FORMULAS) else cell


def write_ballot(comparisons: list[Comparison], path: Path, seed: int = 0):
    """Lay out pairs for people to vote on, as a CSV file in random order and either way round."""
    rng = random.Random(seed)
    shown = list(comparisons)
    rng.shuffle(shown)

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for c in shown:
            sides = rng.sample((c.first, c.second), 2)
            texts = (c.prompt[-1]["content"], c.preference.label, *sides, "")
            writer.writerow([as_cell(text) for text in texts])


class HumanVotes(Judge):
    r"""
    People's choices from a CSV file with columns `prompt` (the last turn), `preference` (its label), `first` and
    `second` as they were shown, and `choice` (`first`, `second`, `tie`, or nothing yet), such as [`write_ballot`] lays
    out. Several votes on one pair are averaged; pairs without votes are left out. A cell may begin with an apostrophe
    before what would make a spreadsheet run it.

    Raises:
        ValueError: if a column is missing or a choice is another; the message names the line.
    """

    name = "people"

    def __init__(self, path: Path):
        with Path(path).open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if missing := set(COLUMNS) - set(reader.fieldnames or ()):
                raise ValueError(f"{path} has no column {', '.join(sorted(missing))}.")
            rows = list(reader)

        self.votes: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for number, row in enumerate(rows, start=2):
            if not (row["choice"] or "").strip():
                continue
            choice = {"first": FIRST, "second": SECOND, "tie": TIE}.get(row["choice"].strip().lower())
            if choice is None:
                raise ValueError(f"`choice` must be first, second or tie, got {row['choice']!r} in line {number}.")
            self.votes[tuple(from_cell(row[column]) for column in COLUMNS[:4])].append(choice)

    def judge(self, comparisons: list[Comparison]) -> list[Verdict | None]:
        verdicts: list[Verdict | None] = []
        for c in comparisons:
            votes = self.votes.get((c.prompt[-1]["content"], c.preference.label, c.first, c.second))
            verdicts.append(None if votes is None else Verdict(fmean(votes), {}))
        return verdicts


__all__ = [
    "ChatEndpoint",
    "Comparison",
    "HumanVotes",
    "Judge",
    "LanguageModelJudge",
    "RewardJudge",
    "Verdict",
    "write_ballot",
]
