"""Learned judges: what is fitted, how it is measured, and that only heads better than chance judge."""

import importlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.testing import assert_close

from modeling_pcm_ensemble import Preference
from modeling_pcm_ensemble.evaluation import Comparison, judge_answers, make_cases
from modeling_pcm_ensemble.evaluation.embeddings import SentenceEmbedder
from modeling_pcm_ensemble.evaluation.learned_judges import (
    DECAY,
    HEADS,
    LearnedJudge,
    fit_head,
    learned_rewards,
    train_heads,
)

SMOLLM2 = Path(__file__).parent.parent / "examples" / "smollm2"
TOPICS = "rain tea iron owls chess snow music salt bread ships maps wool glass corn moss clay silk rust".split()  # noqa: SIM905
KIND = "Ha, {} is such a fun topic, my friend, I love it!"
COLD = "{}? Find that out yourself, this is a waste of my time."
PROMPT = [{"role": "user", "content": "What is rain?"}]


@pytest.fixture(scope="module")
def embedder() -> SentenceEmbedder:
    return SentenceEmbedder()


def test_a_head_is_the_penalised_logistic_regression_of_differences():
    generator = torch.Generator().manual_seed(0)
    wanted, other = torch.randn(2, 40, 5, generator=generator)
    differences = (wanted - other).double().numpy()

    def loss(head: np.ndarray) -> float:
        return np.log1p(np.exp(-differences @ head)).sum() + DECAY / 2 * (head**2).sum()

    expected = torch.from_numpy(minimize(loss, np.zeros(5)).x).float()
    assert_close(fit_head(wanted, other), expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def heads(embedder) -> dict[str, dict]:
    """Of a dimension that texts tell, and of one that is noise, whose triples come four times."""
    rng, told, noise = random.Random(0), [], []
    for topic in TOPICS:
        told.append((topic, KIND.format(topic), COLD.format(topic)))
        noise += [(topic, *rng.sample([KIND.format(topic), COLD.format(topic)], 2))] * 4
    return train_heads({"told": told, "noise": noise}, embedder)


@pytest.mark.real_model
def test_a_head_is_measured_on_other_prompts_and_offered_if_it_is_better_than_chance(heads):
    """What comes four times would be known by heart if one prompt were on both sides of the cross-validation."""
    assert heads["told"]["offered"]
    assert heads["told"]["accuracy"][0] == 1.0
    assert heads["told"]["comparisons"] == len(TOPICS)
    assert not heads["noise"]["offered"]
    assert heads["noise"]["accuracy"][0] < 0.75


@pytest.mark.real_model
def test_the_judge_judges_by_the_heads_that_are_offered(heads, embedder):
    judge = LearnedJudge(embedder, heads)
    assert judge.name == "learned heads (told)"
    kind, cold = KIND.format("gold"), COLD.format("gold")
    preferences = [Preference({"told": 1.0}), Preference({"told": 0.5, "noise": 2.0}), Preference({"noise": 1.0})]
    alone, both, none = judge.judge([Comparison(PROMPT, preference, kind, cold) for preference in preferences])
    assert none is None
    assert alone.winner == both.winner == 1.0

    one, other = learned_rewards(embedder, heads)["told"]([PROMPT] * 2, [kind, cold])
    expected = torch.tensor(one - other).sigmoid().item()
    assert alone.dimensions == both.dimensions == {"told": pytest.approx(expected)}


@pytest.mark.real_model
def test_the_judge_takes_part_in_an_evaluation(heads, embedder):
    cases = make_cases([PROMPT], [Preference({"told": 1.0}), Preference({"noise": 1.0})])
    outcome = judge_answers(LearnedJudge(embedder, heads), cases, [COLD.format("rain")] * 2, [KIND.format("rain")] * 2)
    assert outcome.wins[0, 0] == 0
    assert np.isnan(outcome.wins[0, 1])
    assert outcome.position_bias == 0


def test_shipped_heads_say_how_good_they_are():
    heads = json.loads(HEADS.read_text())
    assert any(entry["offered"] for entry in heads.values())
    for entry in heads.values():
        mean, low, high = entry["accuracy"]
        assert low <= mean <= high
        assert len(entry["head"]) == 384
        assert entry["offered"] == (entry["p"] < 0.05 and mean > 0.5)


def test_answers_are_compared_with_the_opposite_style_and_with_none(monkeypatch):
    monkeypatch.syspath_prepend(str(SMOLLM2))
    styles = ["concise", "informative", "friendly", "plain"]
    answers = [{"prompt": p, "style": style, "completion": f"{style} {p}"} for p in "ab" for style in styles]
    comparisons = importlib.import_module("train_judges").style_comparisons(answers)
    assert comparisons["concise"] == [
        ("a", "concise a", "informative a"),
        ("a", "concise a", "plain a"),
        ("b", "concise b", "informative b"),
        ("b", "concise b", "plain b"),
    ]
    assert comparisons["friendly"] == [("a", "friendly a", "plain a"), ("b", "friendly b", "plain b")]
    assert comparisons["elementary"] == []


@pytest.mark.real_model
def test_the_shipped_friendly_head_prefers_what_a_person_would(embedder):
    kind = "Hey friend! Great question, I'm so glad that you asked! You will love this, it's awesome fun! :)"
    neutral = "Rain is water that falls. In 1911 Cherrapunji in India had 2647 centimetres."
    rude = "No. Rain is terrible, boring and awful. Never ask that stupid thing."
    first, second, third = learned_rewards(embedder)["friendly"]([PROMPT] * 3, [kind, neutral, rude])
    assert first > max(second, third) + 0.5
