"""Preferences: every accepted form, every refusal, and the route that follows."""

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import tiny_gpt2, tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from modeling_pcm_ensemble import PCMEnsembleConfig
from modeling_pcm_ensemble.preference import Preference, preference_weights
from modeling_pcm_ensemble.routing import Route

NAMES = ["concise", "friendly", "elementary"]


@pytest.mark.parametrize(
    ("preference", "expected"),
    [
        pytest.param("friendly", [[0, 1, 0]] * 2, id="name"),
        pytest.param({"concise": 1.0, "elementary": 0.5}, [[1, 0, 0.5]] * 2, id="mapping"),
        pytest.param(["concise", "friendly"], [[1, 1, 0]] * 2, id="names"),
        pytest.param([0.5, 0, 2], [[0.5, 0, 2]] * 2, id="numbers"),
        pytest.param([{"concise": 2}, {"friendly": 1}], [[2, 0, 0], [0, 1, 0]], id="mapping-per-row"),
        pytest.param([["concise"], ["friendly", "elementary"]], [[1, 0, 0], [0, 1, 1]], id="names-per-row"),
        pytest.param([[1, 2, 3], [0, 0, 1]], [[1, 2, 3], [0, 0, 1]], id="numbers-per-row"),
        pytest.param(
            {"concise": np.float32(0.5), "friendly": Fraction(1, 4)}, [[0.5, 0.25, 0]] * 2, id="other-numbers"
        ),
        pytest.param(torch.tensor([1, 0, 2]), [[1, 0, 2]] * 2, id="tensor"),
        pytest.param(torch.tensor([[1, 0, 2], [0, 1, 0]]), [[1, 0, 2], [0, 1, 0]], id="tensor-per-row"),
    ],
)
def test_every_accepted_form_gives_weights_by_row_and_expert(preference, expected):
    assert_close(preference_weights(preference, NAMES, 2), torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize(
    ("preference", "error", "words"),
    [
        pytest.param("frendly", ValueError, "unknown expert 'frendly'. Did you mean 'friendly'", id="misspelt"),
        pytest.param({"brief": 1}, ValueError, "The experts are concise, friendly, elementary", id="unknown"),
        pytest.param({"concise": -1}, ValueError, "expert 'concise' the weight -1.0 in row 0", id="negative"),
        pytest.param({"concise": float("nan")}, ValueError, "'concise' the weight nan", id="nan"),
        pytest.param(torch.tensor([1, float("inf"), 0]), ValueError, "'friendly' the weight inf", id="infinite"),
        pytest.param({"concise": 1e300}, ValueError, "'concise' the weight inf", id="too-large"),
        pytest.param({"concise": 0}, ValueError, "leaves row 0 without an expert", id="all-zero"),
        pytest.param([{"concise": 1}, {"concise": 0}], ValueError, "leaves row 1 without", id="a-zero-row"),
        pytest.param([["concise"]], ValueError, "has 1 rows, but the batch has 2", id="too-few-rows"),
        pytest.param(torch.ones(3, 3), ValueError, "has 3 rows, but the batch has 2", id="too-many-rows"),
        pytest.param(torch.ones(2, 4), ValueError, "has 4 weights, but the ensemble has 3 experts", id="columns"),
        pytest.param([1.0, 2.0], ValueError, "has 2 weights, but the ensemble has 3", id="too-few-numbers"),
        pytest.param(torch.ones(1, 2, 3), ValueError, r"the shape \(1, 2, 3\)", id="three-axes"),
        pytest.param(["concise", 1.0], TypeError, "entries of one kind", id="mixed-kinds"),
        pytest.param(["concise", {"friendly": 1}], TypeError, "entries of one kind", id="mixed-rows"),
        pytest.param([], TypeError, "an empty list", id="empty"),
        pytest.param(
            {"concise": "much"}, TypeError, "weight of expert 'concise' must be a number, got str", id="text"
        ),
        pytest.param(3, TypeError, "must be an expert's name, a mapping", id="a-number"),
    ],
)
def test_what_is_not_a_preference_is_refused_by_name(preference, error, words):
    with pytest.raises(error, match=words):
        preference_weights(preference, NAMES, 2)


def test_a_preferences_tokens_are_whole_numbers_in_any_sequence():
    preference = Preference({"concise": 1.0}, [3, 4])
    assert preference == Preference({"concise": 1.0}, torch.tensor([3, 4]))
    assert hash(preference) == hash(Preference({"concise": 1.0}, (3, 4)))
    for wrong in ((1.9,), "ab", 5):
        with pytest.raises(TypeError, match="`description_ids` must be token ids"):
            Preference({"concise": 1.0}, wrong)


@pytest.fixture(scope="module")
def config() -> PCMEnsembleConfig:
    experts = [
        {"name": name, "backbone": backbone, "description_ids": [10 + backbone, 20 + i]}
        for i, (name, backbone) in enumerate(zip(NAMES, [0, 1, 0]))
    ]
    backbones = [tiny_llama().config, tiny_gpt2().config]
    return PCMEnsembleConfig(
        backbones=backbones, pcm=tiny_llama().config, experts=experts, prefix_bos_token_id=1, pad_token_id=0
    )


def test_descriptions_of_active_experts_are_joined_behind_bos(config):
    wanted = [{"concise": 1.0, "elementary": 0.2}, dict.fromkeys(NAMES, 2), {"friendly": 1}]
    route = Route(config, Preference.parse_batch(config, 3, wanted))
    assert route.descriptions == [(1, 10, 20, 10, 22), (), (1, 11, 21)]


def test_an_expert_to_steer_away_from_is_described_too(config):
    signed = copy.deepcopy(config)
    signed.merge, signed.reference = "product", "elementary"
    wanted = [{"concise": 1.0, "friendly": -0.5}, {"concise": 0.5, "friendly": 1.5}, {"friendly": -1.0}]
    route = Route(signed, Preference.parse_batch(signed, 3, wanted))
    assert route.descriptions == [(1, 10, 20, 11, 21), (1, 10, 20, 11, 21), (1, 11, 21)]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"preference_text": "short"}, ValueError, "needs a tokenizer"),
        ({"preference_text": ["short"]}, ValueError, "has 1 entries, but the batch has 2 rows"),
        ({"preference_text": 5}, TypeError, "must be a string or one string for each row, got 5"),
        ({"preference_text": "a", "preference_ids": torch.tensor([3])}, ValueError, "say the same thing"),
        ({"preference_ids": torch.ones(2)}, TypeError, "must be a tensor of token ids, got torch.float32"),
        ({"preference_ids": [3]}, TypeError, "must be a tensor of token ids, got list"),
        ({"preference_ids": torch.ones(3, 1).long()}, ValueError, r"the shape \(3, 1\). Pass \(tokens,\) or \(2,"),
        ({"preference_ids": torch.tensor([200])}, ValueError, "holds 200, but the PCM has 99 tokens"),
    ],
)
def test_descriptions_that_cannot_be_read_are_refused(config, arguments, error, words):
    with pytest.raises(error, match=words):
        Preference.parse_batch(config, 2, **arguments)


def route_of(weights: list[list[float]], backbone_of: list[int]) -> Route:
    """The route of a batch at these weights; expert i stands on backbone `backbone_of[i]`."""
    experts = [{"name": f"e{i}", "backbone": backbone} for i, backbone in enumerate(backbone_of)]
    backbones = [tiny_llama().config for _ in range(max(backbone_of) + 1)]
    config = PCMEnsembleConfig(backbones=backbones, pcm=tiny_llama().config, experts=experts)
    return Route(config, Preference.parse_batch(config, len(weights), torch.tensor(weights)))


def test_a_routes_pairs_are_in_order_of_expert_then_row():
    route = route_of([[1.0, 0, 1, 0], [1, 0, 0, 1], [0, 0, 2, 1]], [0, 1, 0, 2])
    assert {b: [(e.expert, e.num_rows) for e in entries] for b, entries in route.expert_rows.items()} == {
        0: [(0, 2), (2, 2)],
        2: [(3, 2)],
    }
    assert {b: rows.tolist() for b, rows in route.pair_rows.items()} == {0: [0, 1, 0, 2], 2: [1, 2]}


@given(
    weights=st.lists(
        st.lists(st.sampled_from([0.0, 1.0]), min_size=4, max_size=4).filter(any), min_size=1, max_size=5
    ),
    data=st.data(),
)
def test_selecting_rows_maps_each_pair_to_the_old_pair_of_its_row_and_expert(weights, data):
    route = route_of(weights, [0, 1, 0, 1])
    rows = data.draw(st.lists(st.integers(0, len(weights) - 1), min_size=1, max_size=6))
    selected, pairs = route.select(torch.tensor(rows))

    def pair_list(route, backbone):
        experts = [e.expert for e in route.expert_rows[backbone] for _ in range(e.num_rows)]
        return list(zip(experts, route.pair_rows[backbone].tolist()))

    assert_close(selected.weights, torch.tensor(weights)[rows])
    assert set(pairs) == set(selected.expert_rows)
    for backbone, index in pairs.items():
        old = pair_list(route, backbone)
        expected = [(expert, rows[row]) for expert, row in pair_list(selected, backbone)]
        assert [old[i] for i in index.tolist()] == expected
