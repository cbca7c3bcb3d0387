"""A length that is asked for is an upper bound: answers end where positions do, and only the input can be too long."""

import numpy as np
import pytest
import torch
from conftest import make_ensemble, tiny_gpt2, tiny_llama, tiny_mistral, tiny_tokenizer
from transformers import CompileConfig, pipeline

from modeling_pcm_ensemble import PCMEnsembleCache, PCMEnsembleForCausalLM

PROMPT = list(range(5, 13))  # 8 tokens that expert e0 reads first
IDS = torch.tensor([[21, 22, 23, 24]])
LIMIT = 32  # positions of every submodel
LONGEST = LIMIT - len(PROMPT)  # context that e0 can read; the last token of an answer is not read


@pytest.fixture(params=[tiny_llama, tiny_gpt2, tiny_mistral], ids=["rotary", "learned", "sliding"])
def model(request) -> PCMEnsembleForCausalLM:
    limit = {"n_positions" if request.param is tiny_gpt2 else "max_position_embeddings": LIMIT}
    model = make_ensemble([request.param(1, **limit)], [(0, PROMPT, [11]), (0, [], [13])])
    model._tokenizer = tiny_tokenizer()
    return model


def generate(model, ids=IDS, **options) -> torch.Tensor:
    return model.generate(ids, **{"do_sample": False, "preference": "e0", "pad_token_id": 0} | options)


@pytest.mark.parametrize("length", [{"max_length": 64}, {"max_new_tokens": 64}], ids=lambda x: next(iter(x)))
def test_an_inherited_length_is_cut_to_what_fits_without_a_word(model, length, transformers_log):
    model.generation_config.update(**length)
    assert generate(model).shape == (1, LONGEST + 1)
    assert transformers_log() == []


@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"use_cache": False},
        {"num_beams": 2},
        {"do_sample": True},
        {"cache_implementation": "static"},
        {"min_new_tokens": 64},
    ],
    ids=lambda mode: next(iter(mode), "greedy"),
)
@pytest.mark.parametrize("length", [{"max_length": 8192}, {"max_new_tokens": 8192}], ids=lambda x: next(iter(x)))
@pytest.mark.filterwarnings("ignore:Unfeasible length constraints:UserWarning")
def test_a_given_length_is_reached_as_far_as_positions_go(model, mode, length):
    output = generate(model, return_dict_in_generate=True, **length, **mode)
    assert output.sequences.shape == (1, LONGEST + 1)
    if mode.get("cache_implementation") == "static":
        assert output.past_key_values.get_max_length() == LONGEST


@pytest.mark.parametrize("length", [4, 14, LONGEST - 1, LONGEST])
def test_tokens_that_are_looked_up_are_not_read_beyond_the_end(model, length):
    ids = torch.tensor([[21, 22] * (length // 2) + [23] * (length % 2)])
    drafted = 3
    found = generate(model, ids, max_new_tokens=99, prompt_lookup_num_tokens=drafted)
    assert found.shape[1] >= max(LONGEST + 1 - drafted, length + 1)
    assert found[0].tolist() == generate(model, ids, max_new_tokens=99)[0, : found.shape[1]].tolist()


def test_a_warning_says_how_long_the_answer_can_be(model, transformers_log):
    asked = 9999 + sum(map(ord, type(model.backbones[0]).__name__))  # what was said in this process is not said again
    generate(model, max_new_tokens=asked)
    (message,) = (text for text in transformers_log() if f"tokens instead of {asked}" in text)
    assert f"at most {LONGEST + 1 - 4} tokens" in message


def test_an_answer_that_ends_before_is_whole(model):
    free = generate(model, max_new_tokens=10)[0, 4:].tolist()
    end = next(token for token in free[3:] if token not in free[:3])
    ended = free[: free.index(end) + 1]
    found = generate(model, max_new_tokens=8192, eos_token_id=end)[0, 4:].tolist()
    assert found == ended


def test_compiled_steps_reach_the_end(model):
    options = {"cache_implementation": "static", "compile_config": CompileConfig(backend="eager")}
    assert generate(model, max_new_tokens=99, **options).tolist() == generate(model, max_new_tokens=99).tolist()


def test_each_preference_has_the_room_that_its_own_prompts_leave(model):
    long = torch.full((1, LONGEST + 2), 21)
    with pytest.raises(ValueError, match="context of 26 tokens is too long for expert 'e0'"):
        generate(model, long, max_new_tokens=1)
    assert generate(model, long, preference="e1", max_new_tokens=99).shape == (1, LIMIT + 1)
    with pytest.warns(UserWarning, match="model-agnostic default"):
        assert generate(model, long, preference="e1").shape[1] > long.shape[1] + 1


@pytest.mark.parametrize("length", [LONGEST, LONGEST - 1])
def test_input_that_fits_is_answered_by_what_is_left(model, length):
    assert generate(model, torch.full((1, length), 21), max_new_tokens=99).shape == (1, LONGEST + 1)


def test_a_batch_ends_for_the_row_with_the_longest_prompt(model):
    rows = torch.cat([IDS, IDS])
    assert generate(model, rows, preference=[["e1"], ["e0"]], max_new_tokens=99).shape == (2, LONGEST + 1)


@pytest.mark.parametrize("repeated", [True, False], ids=["whole chat", "new tokens alone"])
def test_a_chat_that_passes_the_cache_back_ends_where_a_new_one_does(model, repeated):
    first = generate(model, max_new_tokens=3, return_dict_in_generate=True)
    more = torch.cat([first.sequences, torch.tensor([[61, 62]])], dim=1)
    given = more if repeated else more[:, first.past_key_values.get_seq_length() :]
    found = model.generate(
        given,
        attention_mask=torch.ones_like(more),
        past_key_values=first.past_key_values,
        max_new_tokens=99,
        do_sample=False,
    )
    expected = generate(model, more, max_new_tokens=99)
    assert found[0, given.shape[1] :].tolist() == expected[0, more.shape[1] :].tolist()
    assert expected.shape == (1, LONGEST + 1)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning")
def test_a_static_cache_that_is_passed_in_is_filled_and_no_more(model):
    cache = PCMEnsembleCache(model.config, "static", 9)
    assert generate(model, past_key_values=cache, max_new_tokens=99).shape == (1, 9 + 1)
    with pytest.raises(
        ValueError, match="context of 10 tokens is too long for `past_key_values`, a static cache of 9"
    ):
        generate(model, torch.full((1, 10), 21), past_key_values=PCMEnsembleCache(model.config, "static", 9))


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning")
def test_a_description_that_leaves_no_room_is_refused_as_such(model):
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"The 200 tokens that the PCM reads .* Shorten .*`preference_text`"):
            call(IDS, preference_ids=torch.full((200,), 7))


def test_a_pipeline_with_its_own_default_length_answers(model):
    pipe = pipeline("text-generation", model=model, tokenizer=model.tokenizer)
    answer = pipe("Hi", preference="e0", return_full_text=False, return_tensors=None, skip_special_tokens=False)
    ids = model.tokenizer(answer[0]["generated_text"])["input_ids"]
    assert len(ids) == LONGEST + 1 - 2


@pytest.mark.parametrize("mode", [{}, {"prompt_lookup_num_tokens": 3}], ids=["greedy", "lookup"])
def test_without_a_limit_nothing_is_cut(model, mode):
    for part in (model.config.pcm, *model.config.backbones):
        part.max_position_embeddings = -1
    ids = torch.tensor([[21, 22, 21, 22]])
    found = generate(model, ids, max_new_tokens=12, **mode)
    assert found.shape == (1, 16)
    end = found[0, 6].item()
    many = {"max_new_tokens": np.int64(2**40), "eos_token_id": end}
    assert generate(model, ids, **many, **mode)[0].tolist() == found[0].tolist()[: found[0].tolist().index(end, 4) + 1]


def test_the_users_configurations_stay_as_they_are(model):
    model.generation_config.max_length = 64
    before = model.generation_config.to_dict()
    generate(model)
    assert model.generation_config.to_dict() == before
