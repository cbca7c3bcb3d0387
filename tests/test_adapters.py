"""Adapters as PEFT users have them: which are taken and equal PEFT's numbers, which are refused, and what is said."""

import copy
import dataclasses
import json
import time
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from conftest import tiny_gpt2, tiny_llama, tiny_tokenizer
from hub_clients import output, run_client
from peft import EvaConfig, LoraConfig, LoraGAConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file, save_file
from test_lora import CONTEXT, edit_config, edit_tensors, lora_ensemble, peft_adapter, peft_log_probs
from torch.testing import assert_close

from modeling_pcm_ensemble import PCMEnsembleForCausalLM, lora_config

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, on its own initialisations

CHANGING = ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"]
MAKES = [tiny_llama, tiny_gpt2, partial(tiny_llama, tie_word_embeddings=True)]
LEAVING = [True, False, None, "gaussian", "eva", "orthogonal", "mica"]


def initialised(initialisation) -> PeftModel:
    """PEFT's model on the backbone, prepared as each initialisation asks for."""
    torch.manual_seed(0)
    model, ids = tiny_llama(1), torch.randint(3, 99, (4, 16))
    options = {
        "corda": {"corda_config": CordaConfig()},
        "lora_ga": {"lora_ga_config": LoraGAConfig()},
        "eva": {"eva_config": EvaConfig()},
    }.get(initialisation, {})
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=initialisation, **options)
    if initialisation == "corda":
        preprocess_corda(model, config, run_model=lambda: model(ids[:1]))
    if initialisation == "lora_ga":
        preprocess_loraga(model, config, train_step=lambda: model(ids, labels=ids).loss.backward())
    model = get_peft_model(model, config)
    if initialisation == "eva":
        initialize_lora_eva_weights(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * 3)
    return model


def trained(model: PeftModel, folder: Path) -> str:
    """The folder of an adapter whose weights have moved."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return str(folder)


def as_mapping(folder: str) -> dict:
    config = LoraConfig.from_pretrained(folder).to_dict()
    return config | {"tensors": load_file(f"{folder}/adapter_model.safetensors")}


WAYS = {
    "folder": lambda base, adapter: lora_ensemble(base, {"a": adapter}),
    "mapping": lambda base, adapter: lora_ensemble(base, {"a": as_mapping(adapter)}),
    "add_expert": lambda base, adapter: added(base, adapter),
}


def added(base, adapter):
    model = PCMEnsembleForCausalLM.from_experts({"base": base}, pcm=tiny_llama(9))
    model.add_expert("a", {"model": base, "adapter": adapter})
    return model


@pytest.mark.parametrize("initialisation", CHANGING)
def test_an_adapter_that_changed_its_base_is_refused_by_name(initialisation, tmp_path):
    if initialisation == "loftq":  # PEFT makes it with bitsandbytes alone, for CUDA
        peft_adapter(tmp_path, tiny_llama(1), 1)
        edit_config(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1})(tmp_path)
    else:
        trained(initialised(initialisation), tmp_path)
    for way in WAYS.values():
        with pytest.raises(ValueError, match=f"adapter of expert 'a'.* `init_lora_weights` '{initialisation}'"):
            way(tiny_llama(1), str(tmp_path))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("initialisation", LEAVING, ids=str)
def test_an_adapter_that_left_its_base_alone_gives_pefts_logits(initialisation, way, tmp_path):
    folder = trained(initialised(initialisation), tmp_path)
    logits = WAYS[way](tiny_llama(1), folder)(CONTEXT, preference="a").logits
    assert_close(logits, peft_log_probs(tiny_llama(1), folder, CONTEXT), atol=1e-4, rtol=0)


@pytest.mark.parametrize("initialisation", ["Pissa", "true", "unknown", 1, ["pissa"]], ids=str)
def test_an_initialisation_that_peft_does_not_have_is_refused(initialisation, tmp_path):
    folder = Path(peft_adapter(tmp_path / "a", tiny_llama(1), 1))
    edit_config(init_lora_weights=initialisation)(folder)
    with pytest.raises(ValueError, match="`init_lora_weights`"):
        lora_ensemble(tiny_llama(1), {"a": str(folder)})


@pytest.mark.parametrize("initialisation", ["pissa", "olora", "corda", "lora_ga"])
def test_what_peft_converts_or_merges_is_the_trained_model(initialisation, tmp_path):
    model = initialised(initialisation)
    config, base = model.peft_config["default"], copy.deepcopy(model)
    config.init_lora_weights = True
    model.save_pretrained(tmp_path / "first")  # what training starts from
    config.init_lora_weights = initialisation
    trained(model, tmp_path / "trained")
    with torch.no_grad():
        expected = model.eval()(CONTEXT).logits.log_softmax(-1)
    assert (base(CONTEXT).logits.log_softmax(-1) - expected).abs().max() > 0.1

    first = str(tmp_path / "first")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=first)
    converted = lora_ensemble(tiny_llama(1), {"a": str(tmp_path / "plain")})
    assert_close(converted(CONTEXT).logits, expected, atol=2e-3, rtol=0)

    merged = PCMEnsembleForCausalLM.from_experts({"a": model.merge_and_unload()}, pcm=tiny_llama(9))
    assert_close(merged(CONTEXT).logits, expected, atol=1e-4, rtol=0)


def test_every_field_of_pefts_lora_has_its_place():
    known = {*lora_config.FIELDS, *lora_config.IGNORED, *lora_config.UNSUPPORTED}
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= known | {"peft_type", "init_lora_weights"}
    installed = tuple(map(int, peft.__version__.split(".")[:2]))
    assert installed <= lora_config.NEWEST_PEFT, "compare the fields, then raise NEWEST_PEFT"


def test_a_field_that_peft_does_not_know_is_ignored_with_a_warning(tmp_path, transformers_log):
    folder = Path(peft_adapter(tmp_path / "a", tiny_llama(1), 1))
    edit_config(lorap_emb_lr=1e-6, lorap_lr_ratio=None)(folder)
    model = lora_ensemble(tiny_llama(1), {"a": str(folder)})
    assert_close(model(CONTEXT).logits, peft_log_probs(tiny_llama(1), folder, CONTEXT), atol=1e-4, rtol=0)
    assert [line for line in transformers_log() if "['lorap_emb_lr']" in line and "expert 'a'" in line]

    edit_config(peft_version="99.1.0")(folder)
    with pytest.raises(ValueError, match=r"`lorap_emb_lr` .* PEFT 99.1.0, .* may know more"):
        lora_ensemble(tiny_llama(1), {"a": str(folder)})


# What stands beside LoRA's tensors


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("save_embeddings", ["auto", True])
def test_an_adapter_on_the_output_layer_gives_pefts_logits(make, save_embeddings, tmp_path):
    options = {"r": 4, "target_modules": ["lm_head", "mlp.c_fc", "q_proj"], "init_lora_weights": False}
    model = get_peft_model(make(1), LoraConfig(**options, fan_in_fan_out=make is tiny_gpt2))
    model.save_pretrained(tmp_path, save_embedding_layers=save_embeddings)
    assert any(".base_layer." in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    logits = lora_ensemble(make(1), {"a": str(tmp_path)})(CONTEXT).logits
    assert_close(logits, peft_log_probs(make(1), tmp_path, CONTEXT), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["lm_head.base_layer.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_embeddings_that_were_trained_too_are_refused(name, tmp_path):
    folder, base = Path(peft_adapter(tmp_path / "a", tiny_llama(1), 1)), tiny_llama(1)
    own = base.get_parameter(name.replace(".base_layer", "")).detach()
    key = f"base_model.model.{name}"
    edit_tensors(lambda tensors: tensors.update({key: own}))(folder)
    lora_ensemble(base, {"a": str(folder)})

    edit_tensors(lambda tensors: tensors.update({key: own.bfloat16()}))(folder)  # as the base was when it was trained
    lora_ensemble(base, {"a": str(folder)})

    edit_tensors(lambda tensors: tensors.update({key: own + 0.01}))(folder)
    with pytest.raises(ValueError, match=f"its {name} is not the base's: it was trained too"):
        lora_ensemble(base, {"a": str(folder)})

    edit_tensors(lambda tensors: tensors.update({key: torch.zeros(100, 32)}))(folder)
    with pytest.raises(ValueError, match=r"the shape \(100, 32\), the base's \(99, 32\).*resize_token_embeddings"):
        lora_ensemble(base, {"a": str(folder)})


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("size", [112, 90])
def test_an_adapter_on_the_output_layer_is_resized_with_it(make, size, tmp_path):
    base = make(1)
    adapter = peft_adapter(tmp_path / "a", base, 1, target_modules=["lm_head", "c_fc", "q_proj"])
    model = lora_ensemble(base, {"a": adapter}, base=base)
    before = model(CONTEXT, preference="a").logits
    model.resize_token_embeddings(size, mean_resizing=False)
    after = model(CONTEXT, preference="a").logits
    assert after.shape[-1] == size
    assert_close((after - after[..., :1])[..., :90], (before - before[..., :1])[..., :90], atol=1e-4, rtol=0)

    model.save_pretrained(tmp_path / "ensemble")
    loaded = PCMEnsembleForCausalLM.from_pretrained(tmp_path / "ensemble")
    assert torch.equal(loaded(CONTEXT, preference="a").logits, after)
    loaded.export_adapter("a", tmp_path / "out")
    expected = peft_log_probs(loaded.backbones[0], tmp_path / "out", CONTEXT)
    assert_close(after, expected, atol=1e-4, rtol=0)


def test_a_size_that_loses_tokens_of_a_prompt_is_refused_before_anything_changes():
    experts = {"a": {"model": tiny_llama(1), "prompt": "~"}, "b": tiny_llama(2)}
    model = PCMEnsembleForCausalLM.from_experts(experts, pcm=tiny_llama(9), tokenizer=tiny_tokenizer())
    before = model(CONTEXT).logits
    with pytest.raises(ValueError, match=r"`new_num_tokens` 40 is too small: .* tokens up to 98"):
        model.resize_token_embeddings(40)
    assert torch.equal(model(CONTEXT).logits, before)


# What is said of tensors and of places


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("base_model.model.model.", "base_model.model.model.language_model."),
        ("base_model.model.model.", "base_model.model."),
        ("base_model.model.model.", "base_model.model.language_model.model."),
    ],
)
@pytest.mark.parametrize("options", [{}, {"target_modules": ["up_proj"]}], ids=["all", "one"])
def test_a_tensor_under_another_prefix_is_named(old, new, options, tmp_path):
    folder = Path(peft_adapter(tmp_path / "a", tiny_llama(1), 1, **options))
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key.replace(old, new): t for key, t in tensors.items()}, folder / "adapter_model.safetensors")
    there = new.removeprefix("base_model.model.") + "layers.0."
    with pytest.raises(ValueError, match=f"is missing. It is there under another prefix, as {there}"):
        lora_ensemble(tiny_llama(1), {"a": str(folder)})


def test_targets_that_match_under_another_prefix_alone_say_so(tmp_path):
    folder = Path(peft_adapter(tmp_path / "a", tiny_llama(1), 1, target_modules=["up_proj"]))
    edit_config(target_modules=r".*language_model.*up_proj")(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {key.replace("model.layers", "language_model.layers"): t for key, t in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"matches no linear layer .* under another prefix, as language_model.layers"):
        lora_ensemble(tiny_llama(1), {"a": str(folder)})


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(4, 32).to(kind) for kind in (torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)]
    + [torch.ones(4, 32).to_sparse(), torch.ones(4, 32, device="meta")],
    ids=lambda tensor: f"{tensor.dtype}-{tensor.layout}-{tensor.device}",
)
def test_tensors_that_are_no_floating_point_numbers_are_refused(tensor, tmp_path):
    mapping = as_mapping(peft_adapter(tmp_path / "a", tiny_llama(1), 1, target_modules=["up_proj"]))
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    mapping["tensors"][key] = tensor
    with pytest.raises(ValueError, match=f"adapter of expert 'a': the tensor {key} must be of floating-point"):
        lora_ensemble(tiny_llama(1), {"a": mapping})


@pytest.mark.parametrize("tensors", [[1], {"x": [1.0]}, {5: torch.ones(1)}], ids=str)
def test_tensors_of_another_kind_are_refused(tensors):
    with pytest.raises(TypeError, match="`tensors` of The adapter of expert 'a' must map names to tensors"):
        lora_ensemble(tiny_llama(1), {"a": {"target_modules": ["q_proj"], "tensors": tensors}})


def test_a_float32_adapter_on_a_16_bit_base_is_said_to_be_rounded_once(tmp_path, transformers_log):
    base = tiny_llama(1).to(torch.bfloat16)
    folder = peft_adapter(tmp_path / "a", base, 1)
    assert next(iter(load_file(f"{folder}/adapter_model.safetensors").values())).dtype == torch.float32

    experts = {"a": {"model": base, "adapter": folder}}
    model = PCMEnsembleForCausalLM.from_experts(experts, pcm=tiny_llama(9).to(torch.bfloat16))
    said = [line for line in transformers_log() if "rounded from torch.float32 to torch.bfloat16" in line]
    assert len(said) == 1
    model.export_adapter("a", tmp_path / "b")
    model.add_expert("b", {"model": base, "adapter": str(tmp_path / "b")})  # nothing is lost of this one
    assert len([line for line in transformers_log() if "rounded" in line]) == 1

    # Rounded or not, the answer is as far from the exact one as PEFT's, whose base is rounded
    exact = peft_log_probs(copy.deepcopy(base).float(), folder, CONTEXT)
    ours, theirs = model(CONTEXT, preference="a").logits, peft_log_probs(base, folder, CONTEXT).float()
    assert (ours - exact).abs().mean() < 2 * (theirs - exact).abs().mean()


@pytest.mark.parametrize(
    ("place", "error", "words"),
    [
        ({"repository": "x", "revison": "y"}, ValueError, r"unknown fields \['revison'\]"),
        ({"repository": 5}, TypeError, "`repository` of The adapter of expert 'a'"),
        ({"repository": "x", "subfolder": 5}, TypeError, "`subfolder` of The adapter of expert 'a'"),
        ({"repository": "x", "revision": ["y"]}, TypeError, "`revision` of The adapter of expert 'a'"),
    ],
)
def test_a_place_that_cannot_be_one_is_refused(place, error, words):
    with pytest.raises(error, match=words):
        lora_ensemble(tiny_llama(1), {"a": place})


def test_an_adapter_in_a_subfolder_is_found(tmp_path):
    adapter = peft_adapter(tmp_path / "run" / "style", tiny_llama(1), 1)
    model = lora_ensemble(tiny_llama(1), {"a": {"repository": str(tmp_path / "run"), "subfolder": "style"}})
    assert_close(model(CONTEXT).logits, peft_log_probs(tiny_llama(1), adapter, CONTEXT), atol=1e-4, rtol=0)


FROM_THE_HUB = """
from modeling_pcm_ensemble import PCMEnsembleForCausalLM
experts = {
    name: {"model": "someone/base", "adapter": {"repository": "someone/adapters", "subfolder": name} | more}
    for name, more in (("old", {"revision": REVISION}), ("new", {}))
}
model = PCMEnsembleForCausalLM.from_experts(experts, pcm="someone/base")
print([entry["source"] for entry in model.config.experts])
"""


def test_an_adapter_has_a_revision_of_its_own_on_the_hub(hub, tmp_path):
    tiny_llama(1).save_pretrained(tmp_path / "base")
    hub.add("someone/base", tmp_path / "base")
    revisions = []
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        peft_adapter(tmp_path / name / name, tiny_llama(1), 1, target_modules=["q_proj"])
        revisions.append(hub.add("someone/adapters", tmp_path / name))
    sources = output(run_client(FROM_THE_HUB, hub, tmp_path / "user", None, REVISION=revisions[0]))
    expected = [
        {"repository": "someone/adapters", "revision": revision, "subfolder": name}
        for name, revision in zip(("old", "new"), revisions)
    ]
    assert sources == str(expected)


# Regular expressions

FAMILIES = [
    r"(a+)+", r"(([a-z._0-9]+)+)+X", r"(a|a)*", r"(.*)*", r"(.|.)*pro[jx]x?y", r"(\w|\.|[a-z])*[A-Z]",
    r"(..|...|.)*[A-Z]", ".*" * 20 + "[A-Z]", "(?:m|.)*" * 12 + "[A-Z]", "(?:.?){60}[A-Z]", r"(.+)+\1[A-Z]",
    r"(?=(.*)*[A-Z]).*", r"(\w*\W*)*[A-Z]", "(.{0,500}){0,500}[A-Z]", "(m|m|.)" * 31 + "[A-Z]",
]  # fmt: skip


@pytest.mark.parametrize("pattern", FAMILIES)
def test_a_pattern_ends_wherever_it_stands(pattern, tmp_path, monkeypatch):
    monkeypatch.setattr(lora_config, "PATTERN_SECONDS", 0.2)
    tensors = as_mapping(peft_adapter(tmp_path / "a", tiny_llama(1), 1, target_modules=["q_proj"]))
    places = [
        {"target_modules": pattern},
        {"exclude_modules": pattern},
        {"rank_pattern": {pattern: 4}},
        {"alpha_pattern": {pattern: 8}},
        {"layers_to_transform": [0, 1], "layers_pattern": pattern},
    ]
    for place in places:
        begun = time.monotonic()
        try:
            lora_ensemble(tiny_llama(1), {"a": tensors | place})
        except ValueError as error:
            assert "expert 'a'" in str(error)  # noqa: PT017
        assert time.monotonic() - begun < 5


def test_a_checkpoints_pattern_ends_too(tmp_path, monkeypatch):
    monkeypatch.setattr(lora_config, "PATTERN_SECONDS", 0.2)
    adapter = peft_adapter(tmp_path / "a", tiny_llama(1), 1)
    lora_ensemble(tiny_llama(1), {"a": adapter}).save_pretrained(tmp_path / "e")
    config = json.loads((tmp_path / "e" / "config.json").read_text())
    config["experts"][0]["adapter"]["target_modules"] = r"(\w|\.|[a-z])*[A-Z]"
    (tmp_path / "e" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="`target_modules` of an adapter has regular expressions that could not be"):
        PCMEnsembleForCausalLM.from_pretrained(tmp_path / "e")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": r"^model\.layers\.(0|1[0-9]|2[0-3])\..*[qv]_proj$"},
        {"target_modules": r"(?:.*?(?:language|text|layers).*?(?:self_attn|mlp).*?(?:q|up)_proj.*?)|(?:\bx\.\d{1,})"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "(layers|h)"},
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {r"layers\.1\..*": 2, "up_proj": 3}},
    ],
    ids=lambda options: next(reversed(options)),
)
def test_patterns_of_peft_users_mean_what_they_mean_in_peft(options, tmp_path):
    folder = peft_adapter(tmp_path / "a", tiny_llama(1), 1, **options)
    logits = lora_ensemble(tiny_llama(1), {"a": folder})(CONTEXT).logits
    assert_close(logits, peft_log_probs(tiny_llama(1), folder, CONTEXT), atol=1e-4, rtol=0)
