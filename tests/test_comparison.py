"""Comparisons: answers that are kept, wins that can be counted by hand, reports that say what was counted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_llama, tiny_tokenizer

from modeling_pcm_ensemble import Preference
from modeling_pcm_ensemble.evaluation import (
    Baseline,
    Judge,
    Outcome,
    PlainModel,
    RewardJudge,
    Verdict,
    agreement,
    collect_answers,
    collect_text_features,
    judge_answers,
    make_cases,
    measure_cost,
    summarise,
)
from modeling_pcm_ensemble.evaluation.comparison import win_rate
from modeling_pcm_ensemble.rewards import quality
from modeling_pcm_ensemble.rewards.quality import TextQuality

PREFERENCES = [Preference({"long": 1.0}), Preference({"long": 1.0, "plain": 1.0})]
CASES = make_cases([[{"role": "user", "content": f"Question {i}?"}] for i in range(3)], PREFERENCES)


class Parrot(Baseline):
    """What a user writes to add a baseline."""

    def __init__(self, name: str, times: int = 1, fails_at: int | None = None):
        self.name, self.times, self.fails_at, self.calls = name, times, fails_at, 0

    def generate(self, prompts, preferences):
        if self.calls == self.fails_at:
            raise RuntimeError("killed")
        self.calls += 1
        return [" ".join([prompt[-1]["content"]] * self.times) for prompt in prompts]

    def applies(self, preference):
        return self.name != "picky" or "plain" in preference.weights


class FirstIsBest(Judge):
    """A judge who does not read."""

    name = "first"

    def judge(self, comparisons):
        return [Verdict(1.0, dict.fromkeys(comparison.preference.weights, 1.0)) for comparison in comparisons]


LENGTH = RewardJudge(
    "length",
    {
        "long": lambda prompts, completions, **_: [len(answer[-1]["content"]) / 10 for answer in completions],
        "plain": lambda prompts, completions, **_: [0.0 for _ in completions],
    },
)


def test_cases_are_every_prompt_under_every_preference_once():
    assert [(case.prompt[0]["content"], case.preference.label) for case in CASES[:3]] == [
        ("Question 0?", "long"),
        ("Question 0?", "long + plain"),
        ("Question 1?", "long"),
    ]
    assert Preference({"a": 2.0, "b": 2.0}).label == "a=2 + b=2"


@pytest.mark.parametrize(
    ("prompts", "preferences", "message"),
    [
        ([CASES[0].prompt], [Preference({"a": 1.0}), Preference({"a": 1})], "twice"),
        ([], PREFERENCES, "nothing to compare"),
        ([CASES[0].prompt], [Preference({"a": 0.0})], "must be above 0"),
        ([CASES[0].prompt], [Preference({"a": float("nan")})], "must be above 0"),
        (["What?"], PREFERENCES, "must be conversations"),
        ([CASES[0].prompt], [{"a": 1.0}], "must be of the type `Preference`, got dict"),
    ],
)
def test_what_cannot_be_compared_is_refused(prompts, preferences, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make_cases(prompts, preferences)


def test_an_interrupted_collection_goes_on_where_it_stopped(tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        collect_answers(Parrot("parrot", fails_at=2), CASES, tmp_path, batch_size=2)
    again = Parrot("parrot")
    answers = collect_answers(again, CASES, tmp_path, batch_size=2)
    assert again.calls == 1
    assert answers == [case.prompt[0]["content"] for case in CASES]


def test_sampled_answers_do_not_depend_on_an_interruption(tmp_path):
    plain = PlainModel("plain", tiny_llama(0), tiny_tokenizer(), 5)
    whole = collect_answers(plain, CASES, tmp_path / "whole", batch_size=2)
    first = sorted(CASES, key=lambda case: case.preference.label)[:2]  # of one preference
    collect_answers(plain, first, tmp_path / "parts", batch_size=2)
    assert collect_answers(plain, CASES, tmp_path / "parts", batch_size=2) == whole
    assert len(set(whole)) > 1


def test_cases_of_one_preference_are_answered_together(tmp_path):
    class Grouped(Parrot):
        def generate(self, prompts, preferences):
            assert len({preference.label for preference in preferences}) == 1
            return super().generate(prompts, preferences)

    assert collect_answers(Grouped("grouped"), CASES, tmp_path, batch_size=3)[1] == CASES[1].prompt[0]["content"]


def test_answers_are_kept_by_name_and_settings(tmp_path):
    def plain(seed: int, name: str = "plain", tokens: int = 5):
        return collect_answers(PlainModel(name, tiny_llama(seed), tiny_tokenizer(), tokens), CASES, tmp_path)

    first = plain(0)
    assert plain(1) != first
    assert plain(0, tokens=6) != first
    calls = Parrot("plain")
    assert collect_answers(calls, CASES, tmp_path)[0] == "Question 0?"
    assert calls.calls == 1
    assert plain(0) == first
    assert [collect_answers(Parrot(name, times), CASES, tmp_path)[0] for name, times in (("a", 1), ("a.1", 2))] == [
        "Question 0?",
        "Question 0? Question 0?",
    ]


def test_a_line_that_another_process_is_writing_is_left_alone(tmp_path):
    collect_answers(Parrot("parrot"), CASES, tmp_path)
    theirs = tmp_path / "answers-1.jsonl"
    theirs.write_text('{"key": "half')
    assert collect_answers(Parrot("parrot", fails_at=0), CASES, tmp_path)[0] == "Question 0?"
    assert theirs.read_text() == '{"key": "half'


def test_a_baseline_answers_only_where_it_applies(tmp_path):
    answers = collect_answers(Parrot("picky"), CASES, tmp_path)
    assert [answer is None for answer in answers] == [True, False] * 3
    outcome = judge_answers(LENGTH, CASES, answers, ["x"] * 6)
    assert np.isnan(outcome.wins[:, 0]).all()
    assert (outcome.wins[:, 1] == 1).all()


def test_answers_that_do_not_match_their_prompts_are_refused(tmp_path):
    class Short(Parrot):
        def generate(self, prompts, preferences):
            return super().generate(prompts, preferences)[1:]

    with pytest.raises(ValueError, match=r"'short' gave 5 answers to 6 prompts"):
        collect_answers(Short("short"), CASES, tmp_path)
    with pytest.raises(ValueError, match="1 and 6 answers to 6"):
        judge_answers(LENGTH, CASES, ["x"], ["x"] * 6)


def test_rewards_win_by_dimension_and_as_a_whole():
    outcome = judge_answers(LENGTH, CASES[:2], ["0123456789" * 2, "0123456789" * 2], ["0123456789", "0123456789" * 2])
    assert outcome.dimensions["long"][0] == pytest.approx([1 / (1 + np.exp(-1)), 0.5])
    assert outcome.dimensions["plain"][0, 1] == 0.5
    assert outcome.wins.tolist() == [[1.0, 0.5]]
    assert outcome.position_bias == 0


def test_wins_stand_in_the_place_of_their_prompt_and_preference():
    cases = sorted(CASES, key=lambda case: case.preference.label)
    ours = ["longer" if case.preference.label == "long" else "no" for case in cases]
    outcome = judge_answers(LENGTH, cases, ours, ["short"] * 6)
    assert outcome.wins.tolist() == [[1.0, 0.0]] * 3
    report = summarise({"other": outcome}, cases)["other"]
    assert report["preferences"]["long"]["win_rate"][0] == 1.0
    assert report["preferences"]["long + plain"]["win_rate"][0] == 0.0


def test_a_judge_with_a_favourite_place_decides_nothing():
    outcome = judge_answers(FirstIsBest(), CASES, ["a"] * 6, ["b"] * 6)
    assert (outcome.wins == 0.5).all()
    assert outcome.position_bias == 0.5


def test_the_summary_counts_wins_and_adjusts_for_their_number():
    twelve = make_cases([[{"role": "user", "content": str(i)}] for i in range(12)], PREFERENCES)
    always = judge_answers(LENGTH, twelve, ["longer"] * 24, ["short"] * 24)
    half = Outcome(np.tile([[1.0, 0.0]], (12, 1)), {"long": np.full((12, 2), 0.5)}, 0.0)
    report = summarise({"worse": always, "equal": half}, twelve)
    assert report["worse"]["win_rate"] == pytest.approx([1.0, 0.025 ** (1 / 12), 1.0])  # Clopper and Pearson's
    assert report["equal"]["win_rate"] == [0.5, 0.5, 0.5]
    assert report["equal"]["preferences"]["long"]["win_rate"][0] == 1.0
    assert report["worse"]["p"] == pytest.approx(2 * 2 / 2**12)  # of all signs two are as extreme; one of two tests
    assert report["equal"]["p"] == 1.0
    by_dimension = report["worse"]["dimensions"]["long"]
    assert by_dimension["win_rate"] == pytest.approx([1 / (1 + np.exp(-0.1))] * 3)
    assert by_dimension["p"] == pytest.approx(3 * 2 / 2**12)  # one of three cells
    assert report["worse"]["preferences"]["long"]["p"] == pytest.approx(4 * 2 / 2**12)


@pytest.mark.parametrize("rate", [0.5, 0.66, 0.97])
def test_intervals_of_win_rates_cover_the_true_rate_as_often_as_they_say(rate):
    """50 prompts of 8 answers each, which a prompt makes alike, and ties."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(300):
        by_prompt = rng.beta(4 * rate, 4 * (1 - rate), size=(50, 1))
        wins = (rng.random((50, 8)) < by_prompt).astype(float)
        wins[rng.random((50, 8)) < 0.1] = 0.5
        _, low, high = win_rate(wins)
        covered += low <= 0.9 * rate + 0.1 * 0.5 <= high
    assert 0.90 <= covered / 300 <= 0.99


def test_agreement_is_that_worked_out_by_hand():
    def outcome(*wins):
        return Outcome(np.array([wins]), {}, 0.0)

    # Same side on 3 of 4; by chance 0.5 · 0.75 + 0.5 · 0.25 = 0.5.
    same, kappa = agreement(outcome(1.0, 1.0, 0.0, 0.0), outcome(1.0, 1.0, 1.0, 0.0))
    assert (same, kappa) == (0.75, pytest.approx(0.5))


def test_cost_is_measured_for_every_baseline():
    plain = PlainModel("plain", tiny_llama(0), tiny_tokenizer(), 5)
    again = PlainModel("again", plain.model, tiny_tokenizer(), 5)
    cost = measure_cost([plain, again, Parrot("parrot")], CASES, tiny_tokenizer(), rounds=2)
    assert cost["plain"]["working_mb"] == pytest.approx(cost["again"]["working_mb"], abs=4)
    assert cost["plain"]["weights_mb"] == pytest.approx(sum(p.nbytes for p in plain.model.parameters()) / 2**20)
    assert cost["plain"]["seconds_per_token"] > cost["parrot"]["seconds_per_token"] > 0


PARALLEL = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from conftest import tiny_llama, tiny_tokenizer
from test_comparison import CASES
from modeling_pcm_ensemble.evaluation import PlainModel, collect_answers, distributed_state, collect_text_features
from modeling_pcm_ensemble.rewards.quality import TextQuality
answers = collect_answers(PlainModel("plain", tiny_llama(0), tiny_tokenizer(), 5), CASES, Path(sys.argv[2]), 0, 2)
guard, read = TextQuality(tiny_llama(0), tiny_tokenizer()), []
nll = guard.nll
guard.nll = lambda prompts, texts: read.extend(texts) or nll(prompts, texts)
collect_text_features(guard, CASES, Path(sys.argv[2]), answers)
seen = {"answers": answers, "read": len(read) // 2, "known": sorted(map(list, guard.known))}  # with prompt and without
(Path(sys.argv[2]) / f"seen-{os.environ['RANK']}.json").write_text(json.dumps(seen))
distributed_state().destroy_process_group()
"""


def test_two_processes_answer_and_read_as_one(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(PARALLEL)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    command = [*launch, str(Path(__file__).parent), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    written = [len(path.read_text().splitlines()) for path in sorted(tmp_path.glob("answers-*.jsonl"))]
    assert written == [4, 2]
    alone = collect_answers(PlainModel("plain", tiny_llama(0), tiny_tokenizer(), 5), CASES, tmp_path / "one", 0, 2)
    texts = sorted({(json.dumps(case.prompt), text) for case, text in zip(CASES, alone)})
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(2)]
    assert all(entry["answers"] == alone and entry["known"] == list(map(list, texts)) for entry in seen)
    assert sum(entry["read"] for entry in seen) == len(texts)
    guard = TextQuality(tiny_llama(0), tiny_tokenizer())
    guard.nll = lambda *_: pytest.fail("what was kept is read again")
    collect_text_features(guard, CASES, tmp_path, alone)
    assert sorted(map(list, guard.known)) == list(map(list, texts))


def test_more_answers_than_a_guard_remembers_are_read_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "MOST_KNOWN", 2)
    guard = TextQuality(tiny_llama(0), tiny_tokenizer(), batch_size=1)
    answers = [f"answer {i}" for i in range(len(CASES))]
    collect_text_features(guard, CASES, tmp_path, answers)
    assert {text for _, text in guard.known} == set(answers)
    monkeypatch.setattr(guard, "nll", lambda *_: pytest.fail("what is known is read again"))
    assert len(guard.features([case.prompt for case in CASES], answers)) == len(CASES)
    assert len((tmp_path / "read-0.jsonl").read_text().splitlines()) == len(CASES)
