"""The offline rewards: proxies that tell styles apart, and fines that no degenerate text escapes."""

import json
from statistics import fmean, pstdev

import pytest
import torch
from conftest import HEADS, SIZES, tiny_llama, tiny_tokenizer
from torch.testing import assert_close
from transformers import GraniteConfig, GraniteForCausalLM

from modeling_pcm_ensemble.rewards.features import text_features
from modeling_pcm_ensemble.rewards.proxies import PROXIES, proxy, proxy_rewards, reward_constants
from modeling_pcm_ensemble.rewards.quality import CONSTANTS, TextQuality, repetition
from modeling_pcm_ensemble.rewards.scoring import SHARED, Scorer, call_reward, normalised_reward, prompt_key

EASY = "The sun is hot. It gives us light. Plants need the sun to grow. We can play in the sun and have fun."
HARD = (
    "Gravitational interaction manifests through spacetime curvature, whose relationship with energy-momentum "
    "distributions is encapsulated by Einstein's nonlinear differential field equations."
)
SHORT = "Gravity pulls objects toward each other; heavier masses pull harder and distance weakens the force."
LONG = (
    "Gravity attracts masses. Newton described it with an inverse-square law; Einstein replaced that picture with "
    "curved spacetime. It shapes orbits, tides, stars and galaxies, keeps atmospheres attached, and bends light: "
    "telescopes observe that as lensing around clusters of galaxies. Einstein predicted waves in it, which detectors "
    "first measured in 2015, emitted by colliding black holes."
)
WARM = "Hey friend! Great question, I'm so glad that you asked! You will love this, it's awesome fun! :)"
COLD = (
    "What a stupid, boring question. This is a pathetic waste of time. Stop being lazy and read a terrible old book."
)


def stored() -> dict:
    return json.loads(CONSTANTS.read_text())


@pytest.mark.parametrize(
    ("name", "better", "worse"),
    [
        ("elementary", EASY, HARD),
        ("knowledgeable", HARD, EASY),
        ("concise", SHORT, LONG),
        ("informative", LONG, SHORT),
        ("friendly", WARM, COLD),
        ("unfriendly", COLD, WARM),
    ],
)
def test_a_proxy_tells_its_style_by_more_than_a_standard_deviation(name, better, worse):
    constants = stored()
    _, deviation = constants[name]
    difference = proxy(name, text_features(better), constants) - proxy(name, text_features(worse), constants)
    assert difference > deviation


def test_no_feature_fails_on_odd_text():
    for text in ("", "...", "1 2 3", "\n\n", "你好", "a" * 500, "!!!! 😀😀"):
        assert all(value == value for value in text_features(text).values())
        assert all(abs(proxy(name, text_features(text), stored())) <= 3 for name in PROXIES)


@pytest.fixture
def quality() -> TextQuality:
    return TextQuality(tiny_llama(3, max_position_embeddings=512), tiny_tokenizer(), batch_size=3)


def tiny_granite():
    """A model that scales its logits after the head."""
    torch.manual_seed(3)
    config = GraniteConfig(**SIZES | HEADS | {"initializer_range": 0.3, "logits_scaling": 4.0})
    return GraniteForCausalLM(config).eval()


@pytest.mark.parametrize("model", [lambda: tiny_llama(3, max_position_embeddings=512), tiny_granite])
def test_the_likelihoods_equal_those_of_each_text_alone(model):
    quality = TextQuality(model(), tiny_tokenizer(), batch_size=3)
    prompts = ["why?", "what is it?", "hi", "go on", "why?"]
    completions = ["because", "a cat", "x", "and then some more", "no"]
    batched = quality.features(prompts, completions)
    for prompt, completion, features in zip(prompts, completions, batched):
        head = quality.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        tail = quality.tokenizer(completion, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            log_probs = quality.model(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1].log_softmax(-1)
        expected = -log_probs[torch.arange(len(tail)), tail].mean().item()
        assert features["nll"] == pytest.approx(expected, abs=1e-4)
    assert quality.nll(["why?"], [""])[0] > 0  # an empty answer is an end token


def test_text_quality_reads_each_distinct_prompt_once(quality):
    rows = []
    quality.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    quality.nll(["why?", "what is it?", "why?"], ["because", "a cat", "no"])
    assert rows == [2, 3]


def test_constants_standardise_the_base_models_completions(quality):
    prompts, completions = ["why?"] * 5, [EASY, HARD, SHORT, WARM, COLD]
    constants = reward_constants(quality, prompts, completions)
    for name in PROXIES:
        mean, deviation = constants[name]
        values = [(proxy(name, text_features(text), constants) - mean) / deviation for text in completions]
        assert_close(torch.tensor([fmean(values), pstdev(values)]), torch.tensor([0.0, 1.0]), atol=1e-5, rtol=0)


def test_degenerate_answers_lose_more_than_style_can_win(quality):
    """What the base model finds average passes; repetition, nonsense and answers of a few words do not."""
    constants = stored() | {"nll": (quality.features(["why?"], [EASY])[0]["nll"] + 0.5, 0.5), "gain": (-9.0, 1.0)}
    quality.constants = constants
    sane, repeated, short = quality.penalties(["why?"] * 3, [EASY, "fun fun fun fun " * 8, "Fun!"])
    assert sane < 0.1
    assert repeated > 3
    assert short > 2
    quality.constants = constants | {"nll": (0.0, 0.5)}
    assert quality.penalties(["why?"], [EASY])[0] > 3


def test_conversations_are_scored_as_their_texts(quality):
    rewards = proxy_rewards(quality)
    conversation = [[{"role": "user", "content": "why?"}]]
    plain = rewards["friendly"](["why?"], [WARM])
    assert rewards["friendly"](conversation, [[{"role": "assistant", "content": WARM}]]) == plain


@pytest.mark.parametrize(("text", "expected"), [("a b c", 0), ("", 0), ("a b c a b c", 0.25), ("a a a a a", 2 / 3)])
def test_repetition_is_the_share_of_repeated_triples(text, expected):
    assert repetition(text) == pytest.approx(expected)


def test_rewards_are_normalised_by_the_logistic_of_the_difference():
    assert normalised_reward(1.0, 1.0) == 0.5
    assert normalised_reward(3.0, 1.0) == pytest.approx(0.880797, abs=1e-6)
    assert normalised_reward(-1e6, 1e6) == 0.0


def test_a_completion_gets_the_weighted_mean_of_its_dimensions_against_every_reference():
    scorer = Scorer({"a": lambda prompts, completions, **_: [float(len(c)) for c in completions],
                     "b": lambda prompts, completions, **_: [-float(len(c)) for c in completions]})  # fmt: skip
    scorer.references = {prompt_key({"prompt": "p"}): ["xx", "xxxx"]}
    rows, shares = [{"prompt": "p"}] * 2, torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    scores = scorer.score(rows, ["xxx", "x"], shares, ["a", "b"])
    a = (normalised_reward(3, 2) + normalised_reward(3, 4)) / 2
    assert scores.rewards[0] == pytest.approx(0.25 * a + 0.75 * (1 - a))
    assert scores.rewards[1] == pytest.approx((normalised_reward(1, 2) + normalised_reward(1, 4)) / 2)
    assert scores.wins == [0.5, 0.0]
    assert scores.dimensions["a"] == pytest.approx([a, scores.rewards[1]])


def test_a_reward_below_0_counts_backwards_and_a_shared_one_beside_all():
    def length(prompts, completions, **columns):
        return [float(len(text)) for text in completions]

    def letters(prompts, completions, **columns):
        return [float(text.count("x")) for text in completions]

    scorer = Scorer({"a": length, SHARED: letters}, 0.5)
    row = {"prompt": "p"}
    scorer.references[prompt_key(row)] = ["yy"]
    scores = scorer.score([row, row], ["xxx", "y"], torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), ["a", "b"])
    liked, disliked = normalised_reward(3, 2), 1 - normalised_reward(1, 2)
    assert scores.rewards == pytest.approx(
        [(liked + 0.5 * normalised_reward(3, 0)) / 1.5, (disliked + 0.5 * normalised_reward(0, 0)) / 1.5]
    )
    assert scores.dimensions == {
        "a": [pytest.approx(liked), pytest.approx(1 - disliked)],
        "shared": [pytest.approx(normalised_reward(3, 0)), 0.5],
    }
    assert scores.wins == [1.0, 0.5]
    assert scorer.score([row], ["yy"], torch.tensor([[-1.0, 0.0]]), ["a", "b"]).wins == [0.0]  # a tie wins nothing


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0], "gave 1 values for 2 completions"),
        ([1.0, None], "gave None for row 1 of the 2 that it was given: prompt 'q', completion 'y'"),
        ([float("inf"), 1], "gave inf for row 0 of the 2 that it was given: prompt 'p', completion 'x'"),
        (["good", "bad"], r"must give a list of numbers, got \['good', 'bad'\]"),
        (None, "must give a list of numbers, got None"),
    ],
)
def test_a_reward_that_is_no_number_is_refused_with_its_row(values, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call_reward("a", lambda prompts, completions: values, ["p", "q"], ["x", "y"], {})
