"""What vLLM's users count on: prefix caching, sampling, several answers, stop strings, beams."""

import json
import math

import pytest
from conftest import Reference, ask, check_equal, engine, metric, references
from scipy import stats
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams
from vllm.v1.request import Request

DRAWS = 3000


@pytest.fixture(scope="module")
def llm():
    with engine("probabilities", block_size=32) as llm:
        yield llm


def long_ones() -> list[Reference]:
    """Two preferences over one long prompt."""
    asked = [reference for reference in references("probabilities") if len(reference.prompt) == 180]
    assert len({json.dumps(reference.extra_args) for reference in asked}) == len(asked) > 1
    return asked


def test_two_preferences_over_one_long_prompt_stay_apart(llm):
    for reference in long_ones():
        check_equal(ask(llm, [reference]), [reference])


def test_no_salt_of_a_user_is_another_ones_preference(llm):
    """Who sends the salt that a preference makes must not fill the cache of those who have that preference."""
    asked = [reference for reference in long_ones() if reference.extra_args]
    wish = json.dumps([None, asked[0].extra_args], sort_keys=True)
    llm.reset_prefix_cache()
    prompt = {"prompt_token_ids": asked[0].prompt, "cache_salt": wish}
    llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    check_equal(ask(llm, asked[:1]), asked[:1])


def test_without_the_salt_they_would_not(llm, monkeypatch):
    unsalted = classmethod(Request.from_engine_core_request.__func__.__wrapped__)
    monkeypatch.setattr(Request, "from_engine_core_request", unsalted)
    llm.reset_prefix_cache()
    answers = [ask(llm, [reference])[0] for reference in long_ones()]
    with pytest.raises(AssertionError):
        check_equal(answers, long_ones())
    llm.reset_prefix_cache()


def test_the_first_sampled_token_is_drawn_from_the_mixture(llm):
    reference = references("probabilities")[4]
    params = SamplingParams(n=DRAWS, temperature=1.0, max_tokens=1, seed=5, extra_args=reference.extra_args or None)
    [answer] = llm.generate([{"prompt_token_ids": reference.prompt}], params, use_tqdm=False)

    counts = [0] * len(reference.next)
    for output in answer.outputs:
        counts[output.token_ids[0]] += 1
    expected = [DRAWS * math.exp(log_prob) for log_prob in reference.next]
    rare = [token for token, number in enumerate(expected) if number < 5]
    common = [token for token in range(len(expected)) if token not in rare]
    found, wanted = ([of[token] for token in common] + [sum(of[token] for token in rare)] for of in (counts, expected))
    scale = sum(found) / sum(wanted)
    assert stats.chisquare(found, [number * scale for number in wanted]).pvalue > 0.001


def test_several_answers_with_a_seed_come_again(llm):
    reference = references("probabilities")[5]

    def draw() -> list[list[int]]:
        params = SamplingParams(n=4, temperature=1.0, max_tokens=8, seed=11, extra_args=reference.extra_args or None)
        [answer] = llm.generate([{"prompt_token_ids": reference.prompt}], params, use_tqdm=False)
        return [list(output.token_ids) for output in answer.outputs]

    first = draw()
    assert first == draw()
    assert len({tuple(tokens) for tokens in first}) > 1


def test_a_stop_string_ends_an_answer(llm):
    reference = references("probabilities")[0]
    text = llm.get_tokenizer().decode(reference.tokens)
    [answer] = ask(llm, [reference], stop=text[4])
    assert answer.outputs[0].text == text[: text.index(text[4])]


def test_what_ends_midway_harms_nobody(llm):
    asked = references("probabilities")
    prompts = [{"prompt_token_ids": reference.prompt} for reference in asked]
    lengths = [1 + number % 12 for number in range(len(asked))]
    params = [
        SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, extra_args=reference.extra_args or None)
        for length, reference in zip(lengths, asked)
    ]
    for answer, reference in zip(llm.generate(prompts, params, use_tqdm=False), asked, strict=True):
        tokens = list(answer.outputs[0].token_ids)
        assert tokens == reference.tokens[: len(tokens)]


def test_a_bad_request_leaves_the_engine_as_it_was(llm):
    asked = references("probabilities")[:3]
    with pytest.raises(VLLMValidationError, match="unknown expert 'nobody'"):
        llm.generate(["Hello"], SamplingParams(extra_args={"preference": "nobody"}), use_tqdm=False)
    check_equal(ask(llm, asked), asked)
    assert metric(llm, "num_requests_running") == 0


def test_beams_are_of_the_default_preference(llm):
    reference = next(reference for reference in references("probabilities") if not reference.extra_args)
    [beams] = llm.beam_search([{"prompt_token_ids": reference.prompt}], BeamSearchParams(beam_width=1, max_tokens=6))
    assert beams.sequences[0].tokens[-6:] == reference.tokens[:6]
