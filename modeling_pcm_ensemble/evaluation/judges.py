"""Which of two answers suits a preference better: by rewards, by a language model, by people."""

import csv
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..training.scoring import call_reward, normalised_reward
from .baselines import Conversation, Preference
from .kept_lines import KeptLines

FIRST, TIE, SECOND = 1.0, 0.5, 0.0
Verdict = dict[str, float]  # dimension → how much the first answer wins


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt under one preference."""

    prompt: Conversation
    preference: Preference
    first: str
    second: str

    def swapped(self) -> "Comparison":
        return Comparison(self.prompt, self.preference, self.second, self.first)

    def key(self) -> str:
        return json.dumps([self.prompt, self.preference, self.first, self.second])


class Judge(ABC):
    r"""
    Compares answers.

    Attributes:
        name (`str`): stands in tables and file names.
    """

    name: str

    @abstractmethod
    def judge(self, comparisons: list[Comparison]) -> list[Verdict]:
        """For each comparison and wanted dimension, 1 if the first answer wins, 0 if the second, 0.5 if neither."""

    def overall(self, comparison: Comparison, verdict: Verdict) -> float:
        """Who wins under the preference as a whole: the majority of its dimensions, by weight."""
        balance = sum(weight * (verdict[name] - TIE) for name, weight in comparison.preference.items())
        return FIRST if balance > 1e-9 else SECOND if balance < -1e-9 else TIE


class RewardJudge(Judge):
    r"""
    Judges by rewards. A dimension is won by how often the first answer would be preferred, σ(r(first) − r(second)),
    as in the normalised reward of training, and the whole by their weighted mean.

    Args:
        name (`str`): see [`Judge`].
        rewards (`Mapping[str, Callable]`): by dimension, `(prompts, completions) → list[float]`, in units of a
            standard deviation.
    """

    def __init__(self, name: str, rewards: Mapping[str, Callable]):
        self.name, self.rewards = name, rewards
        self._known: dict[tuple[str, str, str], float] = {}

    def judge(self, comparisons: list[Comparison]) -> list[Verdict]:
        for dimension in self.rewards:
            texts = [
                (c.prompt, text) for c in comparisons if dimension in c.preference for text in (c.first, c.second)
            ]
            self._score(dimension, texts)
        return [
            {
                dimension: normalised_reward(
                    self._known[dimension, json.dumps(c.prompt), c.first],
                    self._known[dimension, json.dumps(c.prompt), c.second],
                )
                for dimension in c.preference
            }
            for c in comparisons
        ]

    def _score(self, dimension: str, texts: list[tuple[Conversation, str]]):
        new = {(dimension, json.dumps(prompt), text): (prompt, text) for prompt, text in texts}
        new = {key: entry for key, entry in new.items() if key not in self._known}
        if new:
            prompts, completions = zip(*new.values())
            values = call_reward(dimension, self.rewards[dimension], list(prompts), list(completions), {})
            self._known |= dict(zip(new, values))


# The words are this project's own.
QUESTION = """\
A user asked:
{prompt}

Answer A:
{first}

Answer B:
{second}

The answers were written under this instruction: "{description}"
Which answer follows the instruction better? Judge by this alone. Reply with one line: A, B, or TIE."""
REPLY = re.compile(r"\s*\**(?:answer\s+)?(A|B|TIE)\b\**[\s.]*$", re.IGNORECASE)


class LanguageModelJudge(Judge):
    r"""
    Asks a language model about each dimension apart, and keeps what it said.

    Args:
        name (`str`): see [`Judge`].
        ask (`Callable[[str], str]`): a question → the model's reply, such as [`ChatEndpoint`].
        descriptions (`Mapping[str, str]`): what each dimension asks of an answer.
        path (`Path`): a JSONL file that replies are kept in, so that none is asked for twice.

    Raises:
        ValueError: if a reply is not A, B or TIE. It is not kept; those before it are.
    """

    def __init__(self, name: str, ask: Callable[[str], str], descriptions: Mapping[str, str], path: Path):
        self.name, self.ask, self.descriptions = name, ask, descriptions
        self.replies = KeptLines(path)

    def judge(self, comparisons: list[Comparison]) -> list[Verdict]:
        return [
            {dimension: self._verdict(comparison, dimension) for dimension in comparison.preference}
            for comparison in tqdm(comparisons, desc=self.name, disable=len(comparisons) < 8)
        ]

    def _verdict(self, comparison: Comparison, dimension: str) -> float:
        question = QUESTION.format(
            prompt=comparison.prompt[-1]["content"],
            first=comparison.first,
            second=comparison.second,
            description=self.descriptions[dimension],
        )
        key = json.dumps([self.name, question])
        if key not in self.replies:
            reply = self.ask(question)
            self.replies.add([{"key": key, "winner": parse_reply(reply)}])
        return {"A": FIRST, "B": SECOND, "TIE": TIE}[self.replies[key]["winner"]]


def parse_reply(reply: str) -> str:
    """A, B or TIE, of a reply that says nothing else."""
    if not (match := REPLY.match(reply)):
        raise ValueError(f"The judge must reply with A, B or TIE, replied {reply!r}. Use a model that follows this.")
    return match[1].upper()


class ChatEndpoint:
    r"""
    Asks a model behind any endpoint that speaks OpenAI's chat completions. Failing and slow replies are asked for
    again, at growing distances.

    Args:
        url (`str`): up to and including `/v1`.
        model (`str`): its name there.
        api_key (`str`): sent as a bearer token; local servers take any.
        timeout (`float`): seconds to wait for a reply.
        max_retries (`int`): attempts after the first.

    Raises:
        ConnectionError: if the endpoint fails throughout. What was judged before is kept: run again later.
    """

    def __init__(self, url: str, model: str, api_key: str = "none", timeout: float = 60, max_retries: int = 5):
        try:
            import openai
        except ImportError as error:
            raise ImportError(
                "A judge behind an endpoint needs openai. Install it with `pip install openai`."
            ) from error
        self.url, self.model, self.failures = url, model, openai.APIError
        self.client = openai.OpenAI(base_url=url, api_key=api_key, timeout=timeout, max_retries=max_retries)

    def __call__(self, question: str) -> str:
        messages = [{"role": "user", "content": question}]
        try:
            reply = self.client.chat.completions.create(model=self.model, messages=messages, temperature=0)
        except self.failures as error:
            raise ConnectionError(
                f"The judge at {self.url} gave no reply: {error}. What it has judged is kept; run again later."
            ) from error
        return reply.choices[0].message.content or ""


class HumanVotes(Judge):
    r"""
    People's choices from a CSV file with columns `prompt`, `preference` (names joined by " + "), `first`, `second` and
    `choice` (`first`, `second` or `tie`). Several votes on one pair are averaged.

    Raises:
        ValueError: if a column is missing or a choice is another; if a comparison was not voted on.
    """

    name = "people"

    def __init__(self, path: Path):
        with Path(path).open(newline="") as file:
            rows = list(csv.DictReader(file))
        self.votes: dict[tuple, list[float]] = {}
        for number, row in enumerate(rows, start=2):
            if missing := {"prompt", "preference", "first", "second", "choice"} - {k for k, v in row.items() if v}:
                raise ValueError(f"Line {number} of {path} has no {', '.join(sorted(missing))}.")
            choice = {"first": FIRST, "second": SECOND, "tie": TIE}.get(row["choice"].strip().lower())
            if choice is None:
                raise ValueError(f"`choice` must be first, second or tie, got {row['choice']!r} in line {number}.")
            key = (row["prompt"], row["preference"])
            self.votes.setdefault((*key, row["first"], row["second"]), []).append(choice)
            self.votes.setdefault((*key, row["second"], row["first"]), []).append(1 - choice)

    def has(self, comparison: Comparison) -> bool:
        return self._key(comparison) in self.votes

    def judge(self, comparisons: list[Comparison]) -> list[Verdict]:
        for comparison in comparisons:
            if not self.has(comparison):
                raise ValueError(f"Nobody voted on {self._key(comparison)}.")
        means = [sum(votes) / len(votes) for votes in (self.votes[self._key(c)] for c in comparisons)]
        return [dict.fromkeys(c.preference, mean) for c, mean in zip(comparisons, means)]

    def _key(self, comparison: Comparison) -> tuple:
        names = " + ".join(comparison.preference)
        return (comparison.prompt[-1]["content"], names, comparison.first, comparison.second)
