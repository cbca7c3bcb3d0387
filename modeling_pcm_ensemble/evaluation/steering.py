"""Do answers follow the weights? Grids of weights between experts, which every way to answer is asked alike."""

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from pathlib import Path

import numpy as np
import torch

from ..checkpoint_staging import write_text
from ..preference import Preference
from ..rewards.quality import TextQuality
from ..rewards.scoring import SHARED, Scorer, prompt_key
from .answers import Case, collect_answers, collect_text_features, make_cases
from .baselines import Baseline, Conversation
from .cost import measure_cost

PAIR_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SHARES_OF_MORE = (0.1, 0.6, 0.9)  # of each expert in turn; equal weights stand between the first and the second
DIGITS = 4  # of what is kept: a reward's third digit is chance


@dataclass(frozen=True)
class Line:
    r"""
    Two or more experts, and a grid of weights between them.

    Args:
        experts (`tuple[str, ...]`): who is wanted at every point.
        points (`tuple[tuple[float, ...], ...]`): one weight above 0 for each expert. They sum to the number of
            experts, so that a weight of 1 is an equal share.

    Raises:
        ValueError: if the weights of a point are too few or too many or have another sum, or if the grid has no edge
            for an expert, see [`Line.edge`].
    """

    experts: tuple[str, ...]
    points: tuple[tuple[float, ...], ...]

    def __post_init__(self):
        number = len(self.experts)
        for point in self.points:
            if len(point) != number or not isclose(sum(point), number, abs_tol=1e-4):
                raise ValueError(
                    f"A point between {self.label} must have {number} weights with the sum {number}, got {point}."
                )

        for place, expert in enumerate(self.experts):
            if len(self.edge(place)) < 2:
                raise ValueError(
                    f"The grid between {self.label} must have two points or more between which the weight of {expert} "
                    "rises while all others have equal weights."
                )

    @property
    def label(self) -> str:
        """How it is printed: `concise, friendly`."""
        return ", ".join(self.experts)

    def preferences(self) -> list[Preference]:
        """Return what is asked for at each point."""
        return [Preference(dict(zip(self.experts, point))) for point in self.points]

    def edge(self, place: int) -> list[int]:
        """Return the points at which all other experts have equal weights, by rising weight of the one at `place`."""
        found = []
        for number, point in enumerate(self.points):
            others = point[:place] + point[place + 1 :]
            if max(others) - min(others) < 1e-4:
                found.append(number)
        return sorted(found, key=lambda number: self.points[number][place])


def make_line(experts: Sequence[str], shares: Sequence[float]) -> Line:
    """Give each expert in turn each share of the weight, while all others share the rest alike; and equal weights."""
    number = len(experts)
    points = []
    for place in range(number):
        for share in shares:
            weights = [(1 - share) / (number - 1)] * number
            weights[place] = share
            points.append(tuple(round(number * weight, 6) for weight in weights))

    points.append((1.0,) * number)
    return Line(tuple(experts), tuple(sorted(set(points))))


def make_lines(dimensions: Mapping[str, str]) -> list[Line]:
    r"""
    Make a line of every pair of experts, and of half of the sets with one expert of each dimension, if there are three
    dimensions or more. Of experts in two of three dimensions, every pair is in one such set.

    Args:
        dimensions (`Mapping[str, str]`): each expert's dimension.

    Source: the half is a fractional factorial design: G. E. P. Box and J. S. Hunter, The 2^(k−p) Fractional Factorial
    Designs, 1961.
    """
    lines = [make_line(pair, PAIR_SHARES) for pair in itertools.combinations(dimensions, 2)]

    members: dict[str, list[str]] = {}
    for expert, dimension in dimensions.items():
        members.setdefault(dimension, []).append(expert)
    if len(members) < 3:
        return lines

    for places in itertools.product(*(range(len(group)) for group in members.values())):
        if sum(places) % 2 == 0:
            experts = [group[place] for group, place in zip(members.values(), places)]
            lines.append(make_line(experts, SHARES_OF_MORE))
    return lines


def collect_references(base: Baseline, prompts: list[Conversation], path: Path, number: int = 4) -> list[list[str]]:
    r"""
    Let the base model answer each prompt `number` times, or take the answers that are kept at `path`.

    Kept ones are taken whatever the base model's dtype is: references must be the same for all ways, and ways may be
    measured on machines of which one computes in bfloat16 and another one in float32.

    Args:
        base (`Baseline`): who answers; preferences are not read.
        prompts (`list[Conversation]`): what is asked.
        path (`Path`): a JSON file of `prompts`, `answers` and who gave them. It is made anew if it holds other
            prompts, another number of answers to each, or those of a baseline with another name, length or top k.
        number (`int`): answers to each prompt.
    """
    asked = {name: getattr(base, name, None) for name in ("name", "max_new_tokens", "top_k")}
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        same = kept["prompts"] == prompts and kept.get("base", asked) == asked
        if same and {len(texts) for texts in kept["answers"]} == {number}:
            return kept["answers"]

    cases = make_cases(prompts, [Preference({base.name: 1.0})])
    answers = [collect_answers(base, cases, path.with_suffix(""), seed) for seed in range(number)]
    references = [list(texts) for texts in zip(*answers)]
    write_text(path, json.dumps({"base": asked, "prompts": prompts, "answers": references}, indent=1) + "\n")
    return references


class SteeringTest:
    r"""
    What every way to answer is asked, and how its answers are judged: by rewards, each normalised against the base
    model's answers to the same prompt, σ(r − r_ref), so that the base model has 0.5.

    Args:
        lines (`list[Line]`): the grids.
        prompts (`list[Conversation]`): each is asked at every point.
        judges (`Mapping[str, Mapping[str, Callable]]`): by judge and expert, reward functions as TRL's; under `SHARED`
            one that counts whatever is wanted, half as much as all experts' together.
        references (`list[list[str]]`): the base model's answers to each prompt, from [`collect_references`].
        quality (`TextQuality`): reads answers as text.
        answers (`int`): to each prompt at each point.
        batch_size (`int`): answers that are sampled at once.

    Raises:
        ValueError: if a judge has no reward for an expert, two lines have a point in common, or there are not as many
            lists of references as prompts.
    """

    def __init__(
        self,
        lines: list[Line],
        prompts: list[Conversation],
        judges: Mapping[str, Mapping[str, Callable]],
        references: list[list[str]],
        quality: TextQuality,
        *,
        answers: int = 1,
        batch_size: int = 64,
    ):
        self.lines = lines
        self.prompts = prompts
        self.experts = list(dict.fromkeys(expert for line in lines for expert in line.experts))
        self.references = references
        self.quality = quality
        self.answers = answers
        self.batch_size = batch_size

        if len(references) != len(prompts):
            raise ValueError(f"There are references to {len(references)} prompts, and {len(prompts)} prompts.")
        as_messages = {}
        for prompt, texts in zip(prompts, references):
            as_messages[prompt_key({"prompt": prompt})] = [_as_answer(text) for text in texts]
        self.scorers = {name: Scorer(rewards, references=as_messages) for name, rewards in judges.items()}

        for name, rewards in judges.items():
            if missing := set(self.experts) - set(rewards):
                raise ValueError(f"Judge {name!r} has no reward for {', '.join(sorted(missing))}. Give it these too.")
        preferences = [preference for line in lines for preference in line.preferences()]
        self.cases = self._cases(preferences)

    def measure(self, way: Baseline, folder: Path) -> dict:
        r"""
        Let a way answer every prompt at every point, and measure the answers.

        Args:
            way (`Baseline`): who answers.
            folder (`Path`): where answers, and what `quality` reads in them, are kept: a folder of this way's own if
                several processes run at once.

        Returns:
            `way`, its name; `asked`, what results must have in common to be compared; `settings`, a digest of the
            way's; `dtype`, which the machine computed in; for each of `lines`, `rewards` by judge,
            `(points, experts, prompts)`, and `shared` by judge, `(points, prompts)`; and `text`, by what
            [`TextQuality`] reads, a mean for each prompt.

        Raises:
            ValueError: if the way does not apply at every point.
        """
        refused = [case.preference.label for case in self.cases if not way.applies(case.preference)]
        if refused:
            raise ValueError(f"{way.name!r} must answer at every point, and does not apply under {refused[0]!r}.")

        answers = self._collect(way, self.cases, folder)
        wanted = np.array([[expert in case.preference.weights for expert in self.experts] for case in self.cases])
        rewards, shared = self._rewards(self.cases, answers, wanted)
        return {
            "way": way.name,
            "asked": self.asked(),
            "settings": _settings_digest(way),
            "dtype": str(self.quality.model.dtype).removeprefix("torch."),
            "lines": self._by_line(rewards, shared),
            "text": self._text(answers),
        }

    def has_measured(self, way: Baseline, path: Path) -> bool:
        """Return whether `path` holds what [`SteeringTest.measure`] gives for a way: it was the same, and so asked."""
        found = json.loads(path.read_text()) if path.exists() else {}
        return (found.get("asked"), found.get("settings")) == (self.asked(), _settings_digest(way))

    def measure_costs(self, plain: Baseline, ways: Sequence[Baseline], rounds: int = 3) -> dict:
        r"""
        Let one plain model and all ways answer in turns, so that what they cost can be compared.

        Args:
            plain (`Baseline`): the unit of `time`.
            ways (`Sequence[Baseline]`): as for [`SteeringTest.measure`].
            rounds (`int`): how often each answers.

        Returns:
            `dtype`, which the machine computed in; and `costs`, for each way what [`measure_cost`] gives, and `time`,
            that of a token as a multiple of the plain model's.
        """
        costs = measure_cost([plain, *ways], self.cases, self.quality.tokenizer, rounds)
        unit = costs[plain.name]["seconds_per_token"]
        return {
            "dtype": str(self.quality.model.dtype).removeprefix("torch."),
            "costs": {name: cost | {"time": cost["seconds_per_token"] / unit} for name, cost in costs.items()},
        }

    def measure_experts(self, alone: Mapping[str, Baseline], folder: Path) -> dict:
        r"""
        Measure all rewards of each expert alone: what [`reference_point`] is made of.

        Args:
            alone (`Mapping[str, Baseline]`): a way to answer for each expert.
            folder (`Path`): as for [`SteeringTest.measure`].

        Returns:
            `asked`, as [`SteeringTest.measure`] gives it; and `alone`, by judge, expert that answers, and expert whose
            reward it is, the mean reward.
        """
        found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in self.scorers}
        for expert in self.experts:
            cases = self._cases([Preference({expert: 1.0})])
            answers = self._collect(alone[expert], cases, folder)

            every = np.ones((len(cases), len(self.experts)), dtype=bool)
            rewards, _ = self._rewards(cases, answers, every)
            for judge, values in rewards.items():
                means = values.mean(axis=0).round(DIGITS).tolist()
                found[judge][expert] = dict(zip(self.experts, means))
        return {"asked": self.asked(), "alone": found}

    def asked(self) -> dict:
        """Return what results must have in common to be compared."""
        return {
            "lines": [
                {"experts": list(line.experts), "points": [list(p) for p in line.points]} for line in self.lines
            ],
            "prompts": [prompt[-1]["content"] for prompt in self.prompts],
            "answers": self.answers,
            "judges": list(self.scorers),
            "shared": {
                name: getattr(scorer.reward_funcs[SHARED], "settings", None)
                for name, scorer in self.scorers.items()
                if SHARED in scorer.reward_funcs
            },
            "references": hashlib.sha256(json.dumps(self.references).encode()).hexdigest()[:16],
        }

    def _cases(self, preferences: list[Preference]) -> list[Case]:
        """Cases by preference, and then by prompt: the order that rewards are taken apart in."""
        places = {preference.label: place for place, preference in enumerate(preferences)}
        cases = make_cases(self.prompts, preferences)
        return sorted(cases, key=lambda case: places[case.preference.label])

    def _collect(self, way: Baseline, cases: list[Case], folder: Path) -> list[list[str]]:
        """Answers to all cases, once for each seed; all of them are known to `quality` then."""
        answers = [collect_answers(way, cases, folder, seed, self.batch_size) for seed in range(self.answers)]
        collect_text_features(self.quality, cases, folder, *answers)
        return answers  # type: ignore[return-value]  # none is None, for the way applies to all

    def _rewards(
        self, cases: list[Case], answers: list[list[str]], wanted: np.ndarray
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """
        By judge, mean rewards over the answers `(cases, experts)`, NaN but where wanted `(cases, experts)`; and shared
        ones, `(cases,)`, of judges that have one.
        """
        rows = [{"prompt": case.prompt} for case in cases] * len(answers)
        completions = [_as_answer(text) for texts in answers for text in texts]
        of_all = np.tile(wanted, (len(answers), 1))  # (answers · cases, experts)

        found, shared = {}, {}
        for judge, scorer in self.scorers.items():
            values = np.full(of_all.shape, np.nan)
            scores = scorer.score(rows, completions, torch.from_numpy(of_all).float(), self.experts)
            if SHARED in scores.dimensions:
                of_cases = np.array(scores.dimensions.pop(SHARED)).reshape(len(answers), len(cases))
                shared[judge] = of_cases.mean(axis=0)
            for expert, rewards in scores.dimensions.items():
                column = self.experts.index(expert)
                values[of_all[:, column], column] = rewards
            found[judge] = values.reshape(len(answers), *wanted.shape).mean(axis=0)
        return found, shared

    def _by_line(self, rewards: dict[str, np.ndarray], shared: dict[str, np.ndarray]) -> list[dict]:
        """Rewards `(cases, experts)`, and shared ones `(cases,)`, by line and judge, see [`SteeringTest.measure`]."""
        found, start = [], 0
        for line in self.lines:
            end = start + len(line.points) * len(self.prompts)
            columns = [self.experts.index(expert) for expert in line.experts]

            of_line = {}
            for judge, values in rewards.items():
                shape = (len(line.points), len(self.prompts), len(columns))
                by_point = values[start:end, columns].reshape(shape).swapaxes(1, 2)
                of_line[judge] = by_point.round(DIGITS).tolist()

            of_all = {}
            for judge, values in shared.items():
                of_points = values[start:end].reshape(len(line.points), len(self.prompts))
                of_all[judge] = of_points.round(DIGITS).tolist()

            found.append({"rewards": of_line, "shared": of_all})
            start = end
        return found

    def _text(self, answers: list[list[str]]) -> dict[str, list[float]]:
        """For each prompt the mean of what is read in its answers."""
        prompts = [case.prompt for case in self.cases] * len(answers)
        features = self.quality.features(prompts, [text for texts in answers for text in texts])

        found = {}
        for name in features[0]:
            values = np.array([entry[name] for entry in features])
            found[name] = values.reshape(-1, len(self.prompts)).mean(axis=0).round(DIGITS).tolist()
        return found


def _settings_digest(way: Baseline) -> str:
    return hashlib.sha256(way.settings().encode()).hexdigest()


def _as_answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


__all__ = ["Line", "SteeringTest", "collect_references", "make_line", "make_lines"]
