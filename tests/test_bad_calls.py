"""Whatever is passed to a call, it runs, or a TypeError or ValueError names the argument before any model runs."""

import datetime
import warnings
from collections import OrderedDict
from decimal import Decimal
from fractions import Fraction
from functools import cache

import numpy as np
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
@settings(max_examples=2000, suppress_health_check=[HealthCheck.too_slow])
@given(value=STRUCTURES)
def test_a_structure_in_a_generation_config_is_read_or_refused_by_name(value):
    model = ensemble()
    for argument in ("preference", "preference_text", "preference_ids"):
        config = GenerationConfig(max_new_tokens=1, do_sample=False)
        setattr(config, argument, value)
        check_answer(argument, lambda config=config: model.generate(IDS, generation_config=config))


@torch.no_grad()
@settings(max_examples=2000, suppress_health_check=[HealthCheck.too_slow])
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
