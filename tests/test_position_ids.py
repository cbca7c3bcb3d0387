"""`position_ids` that say what the mask says are taken, for callers who pass them to every model; others are not."""

from functools import partial

import pytest
import torch
from conftest import left_pad, make_ensemble, tiny_gpt2, tiny_llama
from torch.testing import assert_close

ROWS = [[21, 22, 23, 24, 25], [31, 32, 33]]
PADDED = left_pad(ROWS)
MASK = PADDED["attention_mask"]
RIGHT = {"input_ids": PADDED["input_ids"].flip(1), "attention_mask": MASK.flip(1)}


@pytest.fixture
def model():
    return make_ensemble([tiny_llama(1), tiny_gpt2(2)], [(0, [5, 6, 7], [11, 12]), (0, [], [13]), (1, [8], [14])])


def counted(mask: torch.Tensor, masked: int) -> torch.Tensor:
    """As transformers counts; it puts 0 or 1 where nothing is read."""
    return (mask.cumsum(1) - 1).masked_fill(mask == 0, masked)


@torch.no_grad()
@pytest.mark.parametrize(
    ("inputs", "position_ids"),
    [
        (PADDED, counted(MASK, 0)),
        (PADDED, counted(MASK, 1).int()),
        (RIGHT, counted(RIGHT["attention_mask"], 1)),
        ({"input_ids": PADDED["input_ids"]}, torch.arange(5)[None]),
        ({"input_ids": PADDED["input_ids"]}, torch.arange(5).repeat(2, 1)),
        ({"input_ids": PADDED["input_ids"], "attention_mask": torch.ones(2, 5)}, torch.arange(5)[None]),
    ],
    ids=["left, 0", "left, 1", "right", "no mask, one row", "no mask", "nothing masked"],
)
def test_those_that_follow_from_the_mask_change_nothing(model, inputs, position_ids):
    expected = model(**inputs, preference=["e0", "e2"]).logits
    assert_close(model(**inputs, preference=["e0", "e2"], position_ids=position_ids).logits, expected, atol=0, rtol=0)


@torch.no_grad()
def test_with_a_cache_they_count_what_it_holds(model):
    whole, position_ids = model(**PADDED, preference=["e0", "e2"]).logits, counted(MASK, 0)
    cache = None
    for start, end in ((0, 3), (3, 4), (4, 5)):
        output = model(
            PADDED["input_ids"][:, start:end],
            attention_mask=MASK[:, :end],
            position_ids=position_ids[:, start:end],
            past_key_values=cache,
            **{} if cache else {"preference": ["e0", "e2"]},
        )
        cache = output.past_key_values
        assert_close(output.logits[:, -1], whole[:, end - 1], atol=1e-4, rtol=0)
    for wrong in (torch.tensor([[4]]), torch.tensor([[0], [0]])):
        with pytest.raises(ValueError, match=r"`position_ids`, .* unless they count the tokens"):
            model(torch.tensor([[1], [1]]), past_key_values=cache, position_ids=wrong)


@pytest.mark.parametrize(
    ("inputs", "position_ids"),
    [
        (PADDED, torch.arange(5)[None]),  # which would count padding
        (PADDED, counted(MASK, 0) + 1),
        ({"input_ids": PADDED["input_ids"]}, torch.tensor([[0, 1, 2, 0, 1]])),  # two texts in a row
        ({"input_ids": PADDED["input_ids"]}, torch.arange(5)),
        ({"input_ids": PADDED["input_ids"]}, torch.arange(6)[None]),
        ({"input_ids": PADDED["input_ids"]}, torch.arange(5).repeat(3, 1)),
        ({"input_ids": PADDED["input_ids"]}, torch.arange(5)[None, None]),
        ({"input_ids": PADDED["input_ids"]}, torch.zeros(2, 0).long()),
    ],
    ids=["padding", "one more", "packed", "one axis", "too many", "other rows", "three axes", "none"],
)
def test_those_that_say_otherwise_are_refused_with_the_reason(model, inputs, position_ids):
    for call in (model, partial(model.generate, max_new_tokens=1)):
        with pytest.raises(ValueError, match=r"`position_ids`, .* because each submodel counts its own prefix"):
            call(
                **inputs | {"attention_mask": inputs.get("attention_mask", torch.ones(2, 5))},
                position_ids=position_ids,
            )


@pytest.mark.parametrize("position_ids", [torch.arange(5.0)[None], [[0, 1, 2, 3, 4]], "01234"], ids=str)
def test_what_is_no_tensor_of_positions_is_refused(model, position_ids):
    for call in (model, partial(model.generate, max_new_tokens=1)):
        with pytest.raises(TypeError, match="`position_ids` must be a tensor of positions"):
            call(**PADDED, position_ids=position_ids)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"use_cache": False}, {"prefill_chunk_size": 2}], ids=str)
def test_generate_goes_on_counting(model, mode):
    options = {"preference": ["e0", "e2"], "max_new_tokens": 5, "do_sample": False} | mode
    found = model.generate(**PADDED, position_ids=counted(MASK, 0), **options)
    assert found.tolist() == model.generate(**PADDED, **options).tolist()


@pytest.mark.parametrize("preference", ["e0", ["e0", "e2"], None], ids=str)
@pytest.mark.parametrize("new_tokens", [1, 12])
def test_an_ensemble_drafts_for_a_plain_model(model, preference, new_tokens):
    plain, ids = tiny_llama(1), torch.tensor(ROWS[:1])
    model.generation_config.preference = preference
    options = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = plain.generate(ids, **options).tolist()
    rounds = []
    model.pcm.body.register_forward_hook(lambda *_: rounds.append(1))
    for given in ({}, {"attention_mask": torch.ones_like(ids)}):
        assert plain.generate(ids, assistant_model=model, **given, **options).tolist() == expected
    assert bool(rounds) == (new_tokens > 1)


@pytest.mark.parametrize("preference", ["e1", ["e0", "e2"]], ids=str)
def test_an_ensemble_drafts_for_an_ensemble(model, preference):
    drafter = make_ensemble([tiny_llama(1)], [(0, [5, 6, 7], [11, 12]), (0, [], [13])])
    options = {"preference": preference, "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(torch.tensor(ROWS[:1]), **options).tolist()
    assert model.generate(torch.tensor(ROWS[:1]), assistant_model=drafter, **options).tolist() == expected
