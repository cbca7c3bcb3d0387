"""Whatever is passed to a call, it runs as in any model, or an error names the argument before any model runs."""

import datetime
import warnings
from collections import OrderedDict
from decimal import Decimal
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from conftest import VOCAB, tiny_llama, tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, GenerationConfig

from modeling_pcm_ensemble import PCMEnsembleCache, PCMEnsembleForCausalLM

IDS = torch.tensor([[21, 22, 23], [31, 32, 33]])
DTYPES = sorted({x for x in vars(torch).values() if isinstance(x, torch.dtype)}, key=str)
HUGE = 10**400
RUNS = []  # of submodels
NUMBERS = [0, 1, 2, 3, 5, -1, -3, -100, 98, 99, 0.5, 1e-50, float("nan"), float("inf"), -float("inf")]


@cache
def ensemble() -> PCMEnsembleForCausalLM:
    small = {"num_hidden_layers": 1}
    experts = {"a": {"model": tiny_llama(1, **small), "prompt": "Hm."}, "b": tiny_llama(2, **small)}
    model = PCMEnsembleForCausalLM.from_experts(experts, pcm=tiny_llama(3, **small), tokenizer=tiny_tokenizer())
    torch.nn.init.normal_(model.pcm.head.weight)
    for part in (model.pcm.body, *model.backbones):
        part.register_forward_pre_hook(lambda module, args: RUNS.append(type(module)))
    return model


@st.composite
def tensors(draw) -> torch.Tensor:
    """Of every dtype, most often of one that indices or weights have, some sparse, some without data."""
    shape = draw(
        st.sampled_from([(2, 3), (2, 2), (1, 2), (2,), (3,), (1,), (), (0,), (2, 0), (0, 3), (1, 1, 2), (1, 9)])
    )
    dtype = draw(st.sampled_from([torch.int64, torch.int32, torch.float32, torch.bool, *DTYPES]))
    size = int(np.prod(shape))
    values = torch.tensor(draw(st.lists(st.sampled_from(NUMBERS), min_size=size, max_size=size)), dtype=torch.float64)
    kind = draw(st.sampled_from([lambda x: x, lambda x: x, lambda x: x.to("meta"), lambda x: x.to_sparse()]))
    with warnings.catch_warnings(action="ignore"):  # of dtypes that torch calls experimental
        try:
            return kind(values.reshape(shape).to(dtype))
        except (RuntimeError, NotImplementedError):  # quantised and packed dtypes
            return values


def arrays() -> st.SearchStrategy:
    return st.sampled_from([np.array([1.0, 0.5]), np.array([["a"]]), np.ones((2, 3), int), np.array(None)])


LEAVES = st.one_of(
    st.sampled_from(["a", "b", "c", "", "Be brief.", b"a", *NUMBERS, HUGE, -HUGE, 1j, Fraction(1, 3)]),
    st.sampled_from([None, True, False, Decimal(1), np.float32(0.5), np.int64(1), np.str_("a"), np.datetime64("NaT")]),
    st.sampled_from([object, object(), len, range(2), {1}, frozenset("a"), datetime.date.min, slice(2), Ellipsis]),
    st.builds(DynamicCache),
    st.text(st.characters(), max_size=3),
    arrays(),
    tensors(),
)
NESTED = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from(["a", "b", "c", 1, None, b"a", ("a",)]), inner, max_size=3),
        st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2).map(OrderedDict),
    ),
    max_leaves=6,
)
STRUCTURES = st.one_of(tensors(), LEAVES, NESTED, st.lists(LEAVES, min_size=1, max_size=2))
FORWARD = {
    "input_ids": {},
    "attention_mask": {},
    "past_key_values": {},
    "inputs_embeds": {},
    "labels": {},
    "use_cache": {},
    "logits_to_keep": {},
    "preference": {},
    "preference_text": {},
    "preference_ids": {},
    "tokenizer": {"preference_text": "Be brief."},
    "position_ids": {},
    "output_hidden_states": {},
    "output_attentions": {},
    "output_expert_logits": {},
}
TEXT = ("input_ids", "attention_mask", "preference", "preference_text", "preference_ids", "tokenizer")


def check_answer(argument: str, call):
    """A `TypeError` or `ValueError` names the argument before a model runs; what is not refused gives numbers."""
    error, output = None, torch.zeros(1)
    RUNS.clear()
    try:
        output = call()
    except (TypeError, ValueError) as refusal:
        error = refusal
    assert error is None or f"`{argument}`" in str(error), f"`{argument}` is not in: {error!r}"
    assert error is None or not RUNS, f"`{argument}` is refused after a model has run: {error}"
    assert output.isfinite().all(), f"`{argument}` gives what is no number"


@torch.no_grad()
@settings(max_examples=2000, suppress_health_check=[HealthCheck.too_slow])
@given(value=STRUCTURES)
def test_a_structure_given_to_forward_is_read_or_refused_by_name(value):
    model = ensemble()
    for argument, others in FORWARD.items():

        def call(argument=argument, others=others):
            logits = model(**{"input_ids": IDS, argument: value} | others).logits
            rows = value if argument == "input_ids" else IDS
            kept = value if argument == "logits_to_keep" else 0
            positions = len(kept) if isinstance(kept, torch.Tensor) else min(int(kept), 3) or rows.shape[1]
            assert logits.shape == (len(rows), positions, VOCAB)
            return logits

        check_answer(argument, call)


@torch.no_grad()
@settings(max_examples=2000, suppress_health_check=[HealthCheck.too_slow])
@given(value=STRUCTURES)
def test_a_structure_given_to_generate_is_read_or_refused_by_name(value):
    model = ensemble()
    for argument in ("inputs", "past_key_values", "inputs_embeds", *TEXT):
        given_ids = {} if argument in ("inputs", "input_ids") else {"input_ids": IDS}
        others = FORWARD.get(argument, {})

        def call(argument=argument, given=given_ids | others):
            tokens = model.generate(**given, **{argument: value}, max_new_tokens=1, do_sample=False)
            rows = (
                value if argument in ("inputs", "input_ids") and value is not None else given.get("input_ids", IDS[:1])
            )
            assert len(tokens) == len(rows)
            return tokens

        check_answer(argument, call)


@torch.no_grad()
@settings(max_examples=500, suppress_health_check=[HealthCheck.too_slow])
@given(value=STRUCTURES)
def test_a_structure_in_a_generation_config_is_read_or_refused_by_name(value):
    model = ensemble()
    for argument in ("preference", "preference_text", "preference_ids"):
        config = GenerationConfig(max_new_tokens=1, do_sample=False)
        setattr(config, argument, value)
        check_answer(argument, lambda config=config: model.generate(IDS, generation_config=config))


@torch.no_grad()
@settings(max_examples=500, suppress_health_check=[HealthCheck.too_slow])
@given(value=STRUCTURES)
def test_a_structure_given_to_what_looks_into_a_text_is_read_or_refused_by_name(value):
    model = ensemble()
    for argument in TEXT:
        inputs = {"input_ids": IDS, argument: value} | FORWARD[argument]
        for method in (model.compute_expert_weights, model.attribute):
            check_answer(argument, lambda method=method, inputs=inputs: method(**inputs))


@settings(max_examples=500)
@given(value=STRUCTURES)
def test_a_structure_given_to_a_cache_is_taken_or_refused_by_name(value):
    model = ensemble()
    for argument in ("config", "cache_implementation", "max_length", "cache_config"):
        options = {"config": model.config, "cache_implementation": "static", "max_length": 9} | {argument: value}
        check_answer(argument, lambda options=options: torch.tensor(PCMEnsembleCache(**options).get_max_length()))
    check_answer("caches", lambda: PCMEnsembleCache.join(value))


META = {"device": "meta"}
REFUSED = [
    ({"input_ids": [[21, 22]]}, TypeError, "`input_ids` must be a tensor of token ids, got list"),
    ({"input_ids": "Hello"}, TypeError, "`input_ids` must be a tensor of token ids, got str"),
    ({"input_ids": IDS.numpy()}, TypeError, "`input_ids` must be a tensor of token ids, got ndarray"),
    ({"input_ids": IDS.float()}, TypeError, "`input_ids` .* got torch.float32. Convert it to one of int64, int32"),
    ({"input_ids": IDS.bool()}, TypeError, "`input_ids` .* got torch.bool"),
    ({"input_ids": IDS.to_sparse()}, TypeError, "`input_ids` must be a dense tensor with data, got torch.sparse_coo"),
    ({"input_ids": IDS.to("meta")}, TypeError, "`input_ids` must be a dense tensor with data, .* device meta"),
    ({"input_ids": IDS[0]}, ValueError, r"`input_ids` must have the shape \(batch, seq\) .* got \(3,\)"),
    ({"input_ids": IDS[:0]}, ValueError, r"`input_ids` must have the shape .* got \(0, 3\)"),
    ({"input_ids": IDS + 70}, ValueError, "`input_ids` holds 103, but token ids are from 0 to 98"),
    ({"input_ids": IDS - 22}, ValueError, "`input_ids` holds -1, but token ids are from 0 to 98"),
    ({"attention_mask": [[1, 1, 1]] * 2}, TypeError, "`attention_mask` must be a tensor .* got list"),
    ({"attention_mask": "111"}, TypeError, "`attention_mask` must be a tensor .* got str"),
    ({"attention_mask": IDS * 1j}, TypeError, "`attention_mask` .* got torch.complex64"),
    ({"attention_mask": IDS[:, :2]}, ValueError, r"`attention_mask` has the shape \(2, 2\)"),
    ({"attention_mask": torch.ones(2, 1, 3, 3)}, ValueError, r"`attention_mask` has the shape \(2, 1, 3, 3\)"),
    ({"preference": {"a": HUGE}}, ValueError, "`preference` gives expert 'a' the weight inf in row 0"),
    ({"preference": {"a": -HUGE}}, ValueError, "`preference` gives expert 'a' the weight -inf in row 0"),
    ({"preference": [HUGE, 1]}, ValueError, "`preference` gives expert 'a' the weight inf"),
    ({"preference": {"a": 1e-50, "b": 1}}, ValueError, "`preference` gives expert 'a' the weight 1e-50 in row 0"),
    ({"preference": [[1, 1], [1, 1e-39]]}, ValueError, "expert 'b' the weight 1e-39 in row 1.* at least 1.18e-38"),
    (
        {"preference": torch.tensor([1, 1e-46], dtype=torch.float64)},
        ValueError,
        "`preference` gives expert 'b' the weight",
    ),
    ({"preference": torch.tensor([1, 1j])}, TypeError, "`preference` .* got torch.complex64"),
    ({"preference": torch.ones(2).to_sparse()}, TypeError, "`preference` must be a dense tensor"),
    ({"preference": torch.ones(2, **META)}, TypeError, "`preference` must be a dense tensor"),
    ({"preference": {"a": 1j}}, TypeError, "In `preference` the weight of expert 'a' must be a number, got complex"),
    ({"preference": ["a", "a", "b"]}, ValueError, "`preference` names 'a' more than once"),
    ({"preference": [["a", "b"], ["b", "b"]]}, ValueError, "`preference` names 'b' more than once"),
    ({"preference_ids": torch.tensor([3]).to(torch.uint16)}, TypeError, "`preference_ids` .* got torch.uint16"),
    ({"preference_ids": torch.tensor([3j])}, TypeError, "`preference_ids` .* got torch.complex64"),
    ({"preference_ids": torch.ones(2, **META).long()}, TypeError, "`preference_ids` must be a dense tensor"),
    ({"preference_ids": torch.full((70,), 5)}, ValueError, "The 70 tokens that the PCM reads .* its 64 positions"),
    ({"preference_text": "\ud800"}, ValueError, "`preference_text` holds .* which the tokenizer cannot read"),
    ({"preference_text": "hm", "tokenizer": "gpt2"}, TypeError, "`tokenizer` must be a tokenizer .* got str"),
    ({"past_key_values": DynamicCache()}, TypeError, "`past_key_values` must be a `PCMEnsembleCache`, got Dyn"),
    ({"past_key_values": ((IDS, IDS),)}, TypeError, "`past_key_values` must be a `PCMEnsembleCache`, got tuple"),
]
REFUSED_BY_FORWARD = [
    ({"logits_to_keep": -1}, ValueError, "`logits_to_keep` must be a number of tokens, 0 for all of them, got -1"),
    ({"logits_to_keep": 1.0}, TypeError, "`logits_to_keep` must be a number of tokens or .* got float"),
    ({"logits_to_keep": [1]}, TypeError, "`logits_to_keep` must be a number of tokens or .* got list"),
    ({"logits_to_keep": torch.tensor([0, 3])}, ValueError, "`logits_to_keep` holds the position 3, .* 3 new tokens"),
    ({"logits_to_keep": torch.tensor([0, -4])}, ValueError, "`logits_to_keep` holds the position -4"),
    ({"logits_to_keep": torch.tensor([0.5])}, ValueError, "`logits_to_keep` must be .* got torch.float32"),
    ({"logits_to_keep": torch.tensor(1)}, ValueError, r"`logits_to_keep` must be .* of shape \(positions,\)"),
    ({"logits_to_keep": IDS[0, :0]}, ValueError, r"`logits_to_keep` must be .* of shape \(0,\)"),
    ({"labels": IDS[:, :2]}, ValueError, r"`labels` has the shape \(2, 2\), but the logits are of \(2, 3\) tokens"),
    ({"labels": IDS, "logits_to_keep": 2}, ValueError, r"`labels` has the shape \(2, 3\), .* of \(2, 2\) tokens"),
    ({"labels": (IDS * 0 - 100).to(torch.uint8)}, ValueError, "`labels` holds 156"),
    ({"labels": IDS.float()}, TypeError, "`labels` must be a tensor of token ids, got torch.float32"),
    ({"labels": IDS.tolist()}, TypeError, "`labels` must be a tensor of token ids, got list"),
    ({"labels": IDS + 70}, ValueError, "`labels` holds 101, .* from 0 to 98, and -100 leaves a token out"),
    ({"labels": IDS - 22}, ValueError, "`labels` holds -1, .* from 0 to 98, and -100 leaves a token out"),
    ({"use_cache": "no"}, TypeError, "`use_cache` must be `bool` or None, got str"),
    ({"output_attentions": 1}, TypeError, "`output_attentions` must be `bool` or None, got int"),
    ({"output_expert_logits": IDS}, TypeError, "`output_expert_logits` must be `bool` or None, got Tensor"),
]


@pytest.mark.parametrize(("arguments", "error", "words"), REFUSED + REFUSED_BY_FORWARD)
def test_forward_refuses_before_any_model_runs(arguments, error, words):
    model = ensemble()
    RUNS.clear()
    with pytest.raises(error, match=words):
        model(**{"input_ids": IDS} | arguments)
    assert RUNS == []


@pytest.mark.parametrize(("arguments", "error", "words"), REFUSED)
@pytest.mark.parametrize("name", ["input_ids", "inputs"])
def test_generate_refuses_before_any_model_runs(arguments, error, words, name):
    model = ensemble()
    RUNS.clear()
    given = {"input_ids": IDS} | arguments
    with pytest.raises(error, match=words.replace("input_ids", name)):
        model.generate(**{name: given.pop("input_ids")}, **given, max_new_tokens=2)
    assert RUNS == []


@torch.no_grad()
def test_a_cache_of_another_ensemble_is_refused():
    model, small = ensemble(), {"num_hidden_layers": 1}
    other = PCMEnsembleForCausalLM.from_experts({"c": tiny_llama(4, **small)}, pcm=tiny_llama(3), pcm_layers=1)
    cache = other(IDS).past_key_values
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="was filled by an ensemble of 1 experts"):
            call(IDS, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([[False, True, True], [True, True, True]]),
        torch.tensor([[0, 1, 1], [1, 1, 1]], dtype=torch.uint8),
        torch.tensor([[0.0, 0.5, 0.5], [1.0, 0.5, 0.1]]),
        torch.tensor([[0, 2, 2], [7, 1, -1]]),
        torch.tensor([[0, 1, float("nan")], [1, 1, float("inf")]]),
    ],
    ids=["bool", "bytes", "halves", "whole numbers", "no numbers"],
)
def test_what_a_mask_reads_is_what_any_model_reads(mask):
    model = ensemble()
    expected = model.backbones[1](IDS, attention_mask=mask).logits.log_softmax(-1)
    found = model(IDS, attention_mask=mask, preference="b").logits
    read = mask.bool()
    torch.testing.assert_close(found[read], expected[read], atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    "keep",
    [2, np.int64(2), 7, True, torch.tensor([-1, 0, -3]), torch.tensor([2, 2], dtype=torch.int32), IDS.new_tensor([1])],
    ids=str,
)
def test_logits_that_are_kept_are_those_that_any_model_keeps(keep):
    model = ensemble()
    expected = model.backbones[1](IDS, logits_to_keep=int(keep) if np.ndim(keep) == 0 else keep).logits
    found = model(IDS, preference="b", logits_to_keep=keep)
    torch.testing.assert_close(found.logits, expected.log_softmax(-1), atol=1e-4, rtol=0)
    assert found.expert_weights.shape[:2] == found.logits.shape[:2]


def test_labels_of_the_kept_tokens_and_an_index_to_ignore_are_used():
    model = ensemble()
    for labels, kept in ((IDS[:, 1:].int(), 2), (IDS.masked_fill(IDS == 22, -7), 0)):
        options = {"labels": labels, "logits_to_keep": kept, "ignore_index": -7}
        expected = model.backbones[1](IDS, **options | {"labels": labels.long()}).loss
        torch.testing.assert_close(model(IDS, preference="b", **options).loss, expected)


def test_weights_keep_their_ratios_down_to_the_smallest_that_float32_holds():
    weights = ensemble()(IDS, preference={"a": 3e-38, "b": 1.5e-38}).expert_weights.log()
    expected = ensemble()(IDS, preference={"a": 2.0, "b": 1.0}).expert_weights.log()
    torch.testing.assert_close(weights, expected)
