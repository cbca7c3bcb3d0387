"""One validation of the configuration, whether from_experts makes it or config.json says it."""

import copy
import json
import math

import pytest
import torch
from conftest import tiny_llama, tiny_qwen2, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from modeling_pcm_ensemble import PCMEnsembleConfig, PCMEnsembleForCausalLM
from modeling_pcm_ensemble.lora_config import FIELDS

CONTEXT = torch.tensor([[21, 22, 23]])
BAD_CALL = (TypeError, ValueError)
HUGE = 10**12


def adapter(backbone, names=("up_proj",)) -> dict:
    tensors = {}
    for path, linear in backbone.named_modules():
        if path.endswith(names):
            tensors[f"{path}.lora_A.weight"] = torch.full((2, linear.in_features), 0.1)
            tensors[f"{path}.lora_B.weight"] = torch.full((linear.out_features, 2), 0.1)
    return {"r": 2, "target_modules": list(names), "tensors": tensors}


def small_ensemble(**options) -> PCMEnsembleForCausalLM:
    llama, qwen = tiny_llama(1, hidden_size=16), tiny_qwen2(2, hidden_size=16, vocab_size=112)
    experts = {
        "a": {"model": llama, "prompt": "Hi", "dimension": "style"},
        "b": {"model": llama, "adapter": adapter(llama)},
        "c": qwen,
    }
    return PCMEnsembleForCausalLM.from_experts(
        experts, pcm=tiny_llama(3, hidden_size=16), pcm_layers=1, tokenizer=tiny_tokenizer(), **options
    )


@pytest.fixture(scope="module")
def saved() -> dict:
    return json.loads(small_ensemble(default_preference={"a": 1.0, "b": 0.5}).config.to_json_string(use_diff=False))


def with_value(config: dict, path: tuple, value) -> dict:
    config = copy.deepcopy(config)
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return config


@torch.no_grad()
def runs(config: dict):
    """What loading does with a configuration before it reads weights, and a call."""
    model = PCMEnsembleForCausalLM(PCMEnsembleConfig.from_dict(copy.deepcopy(config)))
    assert model(CONTEXT).logits.isfinite().all()
    assert model(CONTEXT, preference=model.config.expert_names[0]).logits.shape[-1] == model.config.vocab_size


ADAPTER = ("experts", 1, "adapter")
WRONG = [
    *[(("experts", 0, field), value) for field in ("prompt_ids", "description_ids") for value in
      ([-1, -5], [True], [HUGE], [99], "abc", [1.5], [[1]], {}, None, 5)],
    *[(("prefix_bos_token_id",), value) for value in (-1, 99, HUGE, True, "1")],
    *[(("vocab_size",), value) for value in (0, -1, 100, HUGE, "99", True, 1.5)],
    *[(("experts", 2, "backbone"), value) for value in (True, 1.0, 2, -1, "1", None, [0])],
    *[(("experts", 0, "name"), value) for value in ("", "b", 5, None)],
    *[(("experts", 0, field), value) for field in ("prompt", "description", "dimension") for value in (5, ["x"])],
    *[(("experts", 0, "source"), value) for value in ("x", {}, {"repository": 5}, [])],
    *[(("default_preference",), value) for value in
      ("z", {"a": math.nan}, {"a": 0}, {"a": -1}, {"a": "x"}, {}, [], [1], 5, "")],
    *[(ADAPTER, value) for value in ({"r": 2}, [], "x", 5, True, {})],
    *[((*ADAPTER, "r"), value) for value in (0, -2, "2", 2.0, True, HUGE)],
    *[((*ADAPTER, "lora_alpha"), value) for value in (math.nan, math.inf, 1e308, "8", [8], True)],
    *[((*ADAPTER, "rank_pattern"), value) for value in ([1], {"q": 0}, {"q": "2"}, {"(((": 2}, "x", {"q": True})],
    *[((*ADAPTER, "alpha_pattern"), value) for value in ([1], {"q": math.nan}, {"q": None}, {"[": 2.0})],
    *[((*ADAPTER, "target_modules"), value) for value in ("(((", 5, [5], {}, "", [], None)],
    *[((*ADAPTER, "exclude_modules"), value) for value in ("(((", 5, [5])],
    *[((*ADAPTER, "layers_pattern"), value) for value in ("(((", 5, [5])],
    *[((*ADAPTER, "layers_to_transform"), value) for value in ("1", [1.5], [True], {})],
    *[((*ADAPTER, "use_rslora"), value) for value in (1, "yes")],
    *[((*ADAPTER, "use_dora"), True), ((*ADAPTER, "init_lora_weights"), "pissa")],
    *[(("backbones", 0), value) for value in
      (5, None, {}, {"model_type": []}, {"model_type": "vit"}, {"model_type": "t5"},
      {"model_type": "pcm_ensemble"})],
    *[(("pcm",), value) for value in (5, [], {}, {"model_type": {}})],
    (("expert_top_k",), True), (("expert_top_k",), 0), (("merge",), "x"), (("experts",), {}), (("experts",), [5]),
    (("backbones",), {}), (("thin",), []), (("thin",), {}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), WRONG, ids=str)
def test_a_wrong_value_in_a_file_is_refused_by_its_field(saved, path, value):
    with pytest.raises(BAD_CALL) as refused:
        runs(with_value(saved, path, value))
    assert named(path, refused.value)


def named(path: tuple, error: Exception) -> bool:
    """Whether an error names the field, or for a field of an adapter also the adapter."""
    fields = [key for key in path if isinstance(key, str)]
    return fields[-1] in str(error) or (path == ADAPTER and "target_modules" in str(error))


@pytest.mark.parametrize(
    "value", [{"backbones": [], "shared": {}}, {"shared": {"x": ["y"]}}, {"shared": ["x"]}], ids=str
)
def test_a_wrong_thin_is_refused(saved, value):
    entry = {"repository": "x/y", "revision": "0" * 40, "digest": "z"}
    with pytest.raises(ValueError, match="`thin` must give"):
        PCMEnsembleConfig.from_dict(saved | {"thin": {"backbones": [entry, entry]} | value})


def test_the_saved_configuration_itself_runs(saved):
    runs(saved)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (file, content)
        for file in ("config.json", "model.safetensors.index.json")
        for content in ("[]", "null", "5", '"x"')
    ]
    + [("model.safetensors.index.json", '{"weight_map": null}'), ("model.safetensors.index.json", "{")],
)
def test_a_file_that_holds_something_else_is_refused_by_name(tmp_path, file, content):
    small_ensemble().save_pretrained(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=file.removesuffix(".json")):
        PCMEnsembleForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["[]", "null", "{"])
def test_a_tokenizer_that_cannot_be_read_says_so(tmp_path, file, content):
    small_ensemble().save_pretrained(tmp_path)
    (tmp_path / file).write_text(content)
    model = PCMEnsembleForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"The tokenizer's files in .* cannot be read"):
        model.tokenizer  # noqa: B018


@pytest.mark.parametrize("content", ["[]", "null", "{", '{"r": 0, "target_modules": "all-linear"}'])
def test_an_adapter_config_that_cannot_be_read_is_refused_by_name(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=str(tmp_path)):
        PCMEnsembleForCausalLM.from_experts(
            {"a": {"model": tiny_llama(1), "adapter": str(tmp_path)}}, pcm=tiny_llama(2)
        )


@pytest.mark.parametrize("load", [PCMEnsembleForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_both_ways_of_loading_refuse_what_building_refuses(tmp_path, load):
    with pytest.raises(ValueError, match=r"`default_preference`.*unknown expert 'z'"):
        small_ensemble(default_preference="z")
    small_ensemble().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"default_preference": "z"}))
    with pytest.raises(ValueError, match=r"`default_preference`.*unknown expert 'z'"):
        load(tmp_path, trust_remote_code=True)


@pytest.mark.parametrize(
    "change", [{"target_modules": ["zz"]}, {"layers_to_transform": [0]}, {"exclude_modules": ["down_proj"]}, {"r": 3}]
)
def test_a_configuration_that_names_other_layers_than_the_adapters_tensors_is_refused(tmp_path, change):
    llama = tiny_llama(1)
    expert = {"model": llama, "adapter": adapter(llama, ("up_proj", "down_proj"))}
    PCMEnsembleForCausalLM.from_experts({"a": expert}, pcm=tiny_llama(2)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["experts"][0]["adapter"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"disagree: tensors .*backbones\.adapters"):
        PCMEnsembleForCausalLM.from_pretrained(tmp_path)


# Whatever JSON can say

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 130), st.sampled_from([HUGE, -HUGE, 2**63, 10**300]),
    st.floats(), st.sampled_from(["", "a", "b", "q_proj", "up_proj", "all-linear", ".*", "(", "\\", "[a-"]),
    st.text(max_size=4),
)  # fmt: skip
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
ADAPTERS = st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, JSON) | {"use_dora": JSON, "bias": JSON})
FIELD_PATHS = [
    *[("experts", 0, name) for name in
      ("name", "backbone", "prompt", "prompt_ids", "description", "description_ids", "dimension", "source")],
    *[(*ADAPTER, name) for name in FIELDS],
    *[(name,) for name in
      ("vocab_size", "prefix_bos_token_id", "default_preference", "merge", "expert_top_k", "thin")],
    ("experts", 1), ("backbones", 1), ("pcm",),
]  # fmt: skip


@pytest.mark.parametrize("path", FIELD_PATHS, ids=lambda path: ".".join(map(str, path)))
@settings(max_examples=100)
@given(value=JSON)
def test_any_value_of_a_field_runs_or_is_refused_by_name(saved, path, value):
    refused_by_name(with_value(saved, path, value), path)


@settings(max_examples=300)
@given(value=ADAPTERS)
def test_any_adapter_runs_or_is_refused_by_name(saved, value):
    refused_by_name(with_value(saved, ADAPTER, value), ADAPTER)


def refused_by_name(config: dict, path: tuple):
    try:
        runs(config)
    except BAD_CALL as error:
        fields = [key for key in path if isinstance(key, str)]
        assert any(field in str(error) for field in (*fields[-1:], *fields[:1])), error  # noqa: PT017
