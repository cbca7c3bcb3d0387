"""LoRA experts: equal to PEFT's own, row by row, alone and mixed; in and out of PEFT's format; coming and going."""

import copy
import json
import weakref
from pathlib import Path

import pytest
import torch
from conftest import left_pad, tiny_gpt2, tiny_llama, tiny_mistral, tiny_qwen2, tiny_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

from modeling_pcm_ensemble import PCMEnsembleForCausalLM

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT's call

CONTEXT = torch.tensor([[21, 22, 23, 24, 25, 26, 27]])


def peft_adapter(folder, backbone, seed: int, **options) -> str:
    """A folder written by PEFT, with a random adapter."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    if isinstance(backbone, type(tiny_gpt2())):
        options["fan_in_fan_out"] = True
    model = get_peft_model(copy.deepcopy(backbone), LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def peft_log_probs(backbone, folder, input_ids: torch.Tensor) -> torch.Tensor:
    """PEFT's own answer, `(batch, seq, vocab)`."""
    model = PeftModel.from_pretrained(copy.deepcopy(backbone), folder).eval()
    return model(input_ids).logits.log_softmax(-1)


def lora_ensemble(backbone, adapters: dict, **others) -> PCMEnsembleForCausalLM:
    experts = {name: {"model": backbone, "adapter": adapter} for name, adapter in adapters.items()}
    model = PCMEnsembleForCausalLM.from_experts(experts | others, pcm=tiny_llama(9), pcm_layers=1)
    torch.manual_seed(3)
    torch.nn.init.normal_(model.pcm.head.weight)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def backbone():
    return tiny_llama(1)


@pytest.fixture
def adapters(backbone, tmp_path) -> dict[str, str]:
    return {
        "a": peft_adapter(tmp_path / "a", backbone, 1),
        "b": peft_adapter(tmp_path / "b", backbone, 2, r=3, use_rslora=True),
        "c": peft_adapter(tmp_path / "c", backbone, 3, r=2, target_modules=["q_proj", "up_proj"]),
    }


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="all-linear"),
        pytest.param({"r": 5, "lora_alpha": 3, "use_rslora": True}, id="rslora"),
        pytest.param({"target_modules": ["v_proj", "down_proj"]}, id="list"),
        pytest.param({"target_modules": r".*\.(q_proj|k_proj)"}, id="regex"),
        pytest.param({"target_modules": ["model.layers.1.mlp.up_proj"]}, id="full-path"),
        pytest.param({"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]}, id="layers"),
        pytest.param(
            {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}, id="layers-pattern"
        ),
        pytest.param({"exclude_modules": ["q_proj"]}, id="exclude"),
        pytest.param(
            {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7}, "alpha_pattern": {"q_proj": 5}},
            id="patterns",
        ),
    ],
)
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2, tiny_mistral])
def test_an_adapter_gives_pefts_logits(make, options, tmp_path):
    backbone = make(1)
    folder = peft_adapter(tmp_path / "a", backbone, 1, **options)
    model = lora_ensemble(backbone, {"a": folder}, base=backbone)
    output = model(CONTEXT, preference="a")
    assert (output.logits - peft_log_probs(backbone, folder, CONTEXT)).abs().max() < 1e-4
    assert_close(model(CONTEXT, preference="base").logits, make(1)(CONTEXT).logits.log_softmax(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("target", ["all-linear", ["c_attn"], ["c_proj", "c_fc"]], ids=str)
def test_an_adapter_on_conv1d_gives_pefts_logits(target, tmp_path):
    backbone = tiny_gpt2(1)
    folder = peft_adapter(tmp_path / "a", backbone, 1, target_modules=target)
    output = lora_ensemble(backbone, {"a": folder})(CONTEXT)
    assert (output.logits - peft_log_probs(backbone, folder, CONTEXT)).abs().max() < 1e-4


def test_rows_with_different_adapters_none_and_prompts_share_one_forward(backbone, adapters):
    calls = []
    backbone.register_forward_hook(lambda m, a, k, o: calls.append(len(k["input_ids"])), with_kwargs=True)
    model = PCMEnsembleForCausalLM.from_experts(
        {
            **{name: {"model": backbone, "adapter": adapter} for name, adapter in adapters.items()},
            "prompt": {"model": backbone, "prompt": "Hi"},
            "both": {"model": backbone, "prompt": "Yo", "adapter": adapters["b"]},
            "base": backbone,
        },
        pcm=tiny_llama(9),
        tokenizer=tiny_tokenizer(None),
    )
    prompts = {expert["name"]: expert["prompt_ids"] for expert in model.config.experts}
    rows = [[21, 22, 23, 24], [31, 32], [41, 42, 43], [51], [61, 62, 63], [71, 72]]
    calls.clear()
    with torch.no_grad():
        output = model(**left_pad(rows), preference=[[name] for name in model.config.expert_names])
    assert calls == [6]
    for row, name, logits in zip(rows, model.config.expert_names, output.logits):
        ids = torch.tensor([prompts[name] + row])
        folder = adapters["b"] if name == "both" else adapters.get(name)
        plain = tiny_llama(1)
        expected = plain(ids).logits.log_softmax(-1) if folder is None else peft_log_probs(plain, folder, ids)
        assert_close(logits[-len(row) :], expected[0, -len(row) :], atol=1e-4, rtol=0)


@pytest.mark.parametrize("merge", ["probabilities", "product", "adapters"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beam", "sample"])
def test_generation_is_the_same_cached_and_uncached_and_alone(backbone, adapters, merge, options):
    model = lora_ensemble(backbone, adapters, base=backbone)
    model.config.merge = merge
    rows = [[21, 22, 23, 24], [31, 32], [41, 42, 43]]
    preferences = [{"a": 1.0, "b": 0.5}, {"c": 1.0}, {"a": 1.0, "b": 1.0, "c": 2.0}]

    def generate(rows, preferences, **more):
        torch.manual_seed(0)
        inputs = left_pad(rows)
        more = {"max_new_tokens": 6, "do_sample": False} | options | more
        return model.generate(**inputs, preference=preferences, **more)[:, inputs["input_ids"].shape[1] :].tolist()

    batch = generate(rows, preferences)
    assert batch == generate(rows, preferences, use_cache=False)
    if not options.get("do_sample"):
        assert batch == [generate([row], [preference])[0] for row, preference in zip(rows, preferences)]


def test_added_adapters_equal_pefts_exact_weighted_sum(backbone, adapters):
    model = lora_ensemble(backbone, adapters)
    torch.nn.init.zeros_(model.pcm.head.weight)
    model.config.merge = "adapters"
    weights = torch.tensor([[0.2, 0.5, 0.3], [0.0, 1.25, -0.75]])  # as given: they need not add up to 1
    inputs = left_pad([CONTEXT[0].tolist(), [31, 32, 33]])
    output = model(**inputs, preference=weights)
    for i, length in enumerate((7, 3)):
        merged = PeftModel.from_pretrained(tiny_llama(1), adapters["a"], adapter_name="a")
        for name in ("b", "c"):
            merged.load_adapter(adapters[name], name)
        merged.add_weighted_adapter(["a", "b", "c"], weights[i].tolist(), "mixed", combination_type="cat")
        merged.set_adapter("mixed")
        with torch.no_grad():
            expected = merged(inputs["input_ids"][i : i + 1, -length:]).logits[0].log_softmax(-1)
        assert_close(output.logits[i, -length:], expected, atol=1e-4, rtol=0)


def test_added_adapters_follow_the_pcm_from_token_to_token(backbone, adapters):
    """A strength changes at each token, so a cached pass equals one over the whole text only if each kept its own."""
    model = lora_ensemble(backbone, adapters)
    model.config.merge = "adapters"
    with torch.no_grad():
        whole = model(CONTEXT, preference=["a", "b"])
        first = model(CONTEXT[:, :4], preference=["a", "b"])
        rest = model(CONTEXT[:, 4:], past_key_values=first.past_key_values)
        last = model(CONTEXT, preference=["a", "b"], logits_to_keep=1)
    assert whole.expert_weights[0].std(dim=0)[0] > 0.05
    assert_close(torch.cat([first.logits, rest.logits], 1), whole.logits, atol=1e-4, rtol=0)
    assert_close(last.logits[:, -1], whole.logits[:, -1], atol=1e-5, rtol=0)
    assert last.expert_weights.shape == (1, 1, 3)


def test_a_product_of_adapters_is_measured_against_the_bare_backbone(backbone, adapters):
    model = lora_ensemble(backbone, adapters)
    torch.nn.init.zeros_(model.pcm.head.weight)
    model.config.merge = "product"
    with torch.no_grad():
        found = model(CONTEXT, preference={"a": 0.5, "b": -1.0}).logits
        bare = tiny_llama(1)(CONTEXT).logits.log_softmax(-1)
    a, b = (peft_log_probs(tiny_llama(1), adapters[name], CONTEXT) for name in "ab")
    assert_close(found, (bare + 0.5 * (a - bare) - (b - bare)).log_softmax(-1), atol=1e-4, rtol=0)


def test_no_weight_at_all_is_the_bare_backbone(backbone, adapters):
    model = lora_ensemble(backbone, adapters)
    for merge in ("product", "adapters"):
        model.config.merge = merge
        with torch.no_grad():
            found = model(CONTEXT, preference=[0, 0, 0]).logits
        assert_close(found, tiny_llama(1)(CONTEXT).logits.log_softmax(-1), atol=1e-5, rtol=0)


def test_rows_without_an_expert_need_one_backbone_that_they_are(backbone, adapters, tmp_path):
    other = tiny_llama(5)
    model = lora_ensemble(backbone, adapters, whole=tiny_gpt2(2))
    model.config.merge = "adapters"
    with torch.no_grad():
        found = model(torch.cat([CONTEXT, CONTEXT]), preference=[{"a": 1.0}, {}]).logits
    assert_close(found[1], tiny_llama(1)(CONTEXT).logits[0].log_softmax(-1), atol=1e-5, rtol=0)

    model.add_expert("d", {"model": other, "adapter": peft_adapter(tmp_path / "d", other, 9)})
    with pytest.raises(ValueError, match="adapters of this ensemble are on 2 of them"):
        model(CONTEXT, preference=[0, 0, 0, 0, 0])


def test_merging_adapters_refuses_other_experts_and_training(backbone, adapters):
    model = lora_ensemble(backbone, adapters, base=backbone)
    model.config.merge = "adapters"
    with pytest.raises(ValueError, match="cannot mix expert 'base'"):
        model(CONTEXT, preference=["a", "base"])
    with pytest.raises(ValueError, match=r"the PCM would get no gradient. Call `eval\(\)`, train with `RebelTrainer`"):
        model.train()(CONTEXT, preference="a")
    with pytest.raises(ValueError, match="needs experts that run apart"):
        model.eval().attribute(CONTEXT, preference="a")
    with pytest.raises(ValueError, match="`output_expert_logits` needs experts that run apart"):
        model(CONTEXT, preference="a", output_expert_logits=True)


def test_a_checkpoint_with_adapters_comes_back_as_it_was(backbone, adapters, tmp_path):
    model = lora_ensemble(backbone, adapters, base=tiny_gpt2(2))
    model.save_pretrained(tmp_path / "ensemble")
    loaded = PCMEnsembleForCausalLM.from_pretrained(tmp_path / "ensemble")
    assert not any(parameter.requires_grad for parameter in loaded.backbones.parameters())
    for name in ("a", "b", "c", "base"):
        assert torch.equal(loaded(CONTEXT, preference=name).logits, model(CONTEXT, preference=name).logits)


def test_export_and_import_are_bit_equal_and_peft_reads_the_export(backbone, adapters, tmp_path):
    model = lora_ensemble(backbone, adapters)
    for name, folder in adapters.items():
        model.export_adapter(name, tmp_path / "out" / name)
        original, exported = (load_file(f"{f}/adapter_model.safetensors") for f in (folder, tmp_path / "out" / name))
        assert original.keys() == exported.keys()
        assert all(torch.equal(original[key], exported[key]) for key in original)
        assert_close(
            peft_log_probs(tiny_llama(1), tmp_path / "out" / name, CONTEXT),
            peft_log_probs(tiny_llama(1), folder, CONTEXT),
        )


def test_a_mapping_with_tensors_is_an_adapter_too(backbone, adapters):
    tensors = load_file(f"{adapters['a']}/adapter_model.safetensors")
    mapping = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "tensors": tensors}
    model = lora_ensemble(backbone, {"a": mapping})
    assert_close(model(CONTEXT).logits, peft_log_probs(tiny_llama(1), adapters["a"], CONTEXT), atol=1e-4, rtol=0)


def test_experts_come_and_go_and_the_pcm_keeps_what_it_learnt(backbone, adapters, tmp_path):
    model = lora_ensemble(backbone, {"a": adapters["a"]}, gpt2=tiny_gpt2(2))
    before, head = model(CONTEXT).logits, model.pcm.head.weight.clone()
    model.add_expert("b", {"model": backbone, "adapter": adapters["b"]})
    assert torch.equal(model.pcm.head.weight[:2], head)
    assert model.pcm.head.weight[2].eq(0).all()
    assert_close(model(CONTEXT, preference=["a", "gpt2"]).logits, before, atol=1e-5, rtol=0)
    expected = peft_log_probs(tiny_llama(1), adapters["b"], CONTEXT)
    assert_close(model(CONTEXT, preference="b").logits, expected, atol=1e-4, rtol=0)
    model.remove_expert("gpt2")
    assert model.config.expert_names == ["a", "b"]
    assert len(model.config.backbones) == 1
    assert torch.equal(model.pcm.head.weight[0], head[0])
    assert model.pcm.head.weight.requires_grad
    model.remove_expert("a")
    assert_close(model(CONTEXT).logits, expected, atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path / "ensemble")
    loaded = PCMEnsembleForCausalLM.from_pretrained(tmp_path / "ensemble")
    assert torch.equal(loaded(CONTEXT).logits, model(CONTEXT).logits)


def test_a_new_backbone_comes_with_its_expert(backbone, adapters):
    model = lora_ensemble(backbone, {"a": adapters["a"]})
    model.add_expert("gpt2", tiny_gpt2(2))
    assert len(model.config.backbones) == 2
    assert_close(
        model(CONTEXT, preference="gpt2").logits, tiny_gpt2(2)(CONTEXT).logits.log_softmax(-1), atol=1e-4, rtol=0
    )


def test_a_new_expert_brings_its_vocabulary_end_token_and_chat_template():
    model = PCMEnsembleForCausalLM.from_experts(
        {"a": tiny_llama(1, vocab_size=112)}, pcm=tiny_llama(9, vocab_size=112), tokenizer=tiny_tokenizer()
    )
    chat = [{"role": "user", "content": "Hi"}]
    assert "You are a test" in model.tokenizer.apply_chat_template(chat, tokenize=False)
    other = tiny_llama(2)
    other.generation_config.eos_token_id = 7
    model.add_expert("b", {"model": other, "prompt": "Be brief."})
    assert model.generation_config.eos_token_id == [2, 7]
    assert model(CONTEXT).logits.shape[-1] == 99
    assert "You are a test" not in model.tokenizer.apply_chat_template(chat, tokenize=False)
    with pytest.raises(ValueError, match=r"one dtype, got backbone 0 torch.float32, .*expert 'c' torch.bfloat16"):
        model.add_expert("c", tiny_llama(3).to(torch.bfloat16))


def test_a_copy_keeps_adapters_of_its_own(backbone, adapters):
    model = lora_ensemble(backbone, adapters)
    expected = model(CONTEXT, preference="b").logits
    other = copy.deepcopy(model)
    other.remove_expert("a")
    assert_close(other(CONTEXT, preference="b").logits, expected, atol=1e-5, rtol=0)
    assert torch.equal(model(CONTEXT, preference="b").logits, expected)


def test_the_backbone_alone_runs_without_adapters(backbone, adapters):
    model = lora_ensemble(backbone, adapters)
    model(CONTEXT, preference="a")
    assert torch.equal(model.backbones[0](CONTEXT).logits, tiny_llama(1)(CONTEXT).logits)


def test_two_ensembles_may_share_a_backbone(backbone, adapters):
    one, other = lora_ensemble(backbone, {"a": adapters["a"]}), lora_ensemble(backbone, {"x": adapters["b"]})
    assert_close(one(CONTEXT).logits, peft_log_probs(tiny_llama(1), adapters["a"], CONTEXT), atol=1e-4, rtol=0)
    assert_close(other(CONTEXT).logits, peft_log_probs(tiny_llama(1), adapters["b"], CONTEXT), atol=1e-4, rtol=0)


def test_adapters_weigh_what_they_weigh(backbone, adapters):
    model = lora_ensemble(backbone, adapters)
    files = [load_file(f"{folder}/adapter_model.safetensors") for folder in adapters.values()]
    assert sum(p.numel() for p in model.backbones.adapters.parameters()) == sum(
        tensor.numel() for tensors in files for tensor in tensors.values()
    )


def test_adapters_work_in_half_precision_under_autocast_and_compiled(backbone, adapters):
    model = lora_ensemble(backbone, adapters)
    with torch.no_grad():
        expected = model(CONTEXT, preference="b").logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_close(model(CONTEXT, preference="b").logits, expected, atol=0.3, rtol=0)
        compiled = torch.compile(model.backbones[0], backend="eager")
        model.backbones._modules["0"] = compiled
        assert_close(model(CONTEXT, preference="b").logits, expected, atol=1e-5, rtol=0)
        model.backbones._modules["0"] = compiled._orig_mod
        assert_close(model.to(torch.bfloat16)(CONTEXT, preference="b").logits, expected, atol=0.3, rtol=0)


def edit_config(**changes):
    def damage(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def edit_tensors(change):
    def damage(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return damage


def cut_short(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def pickle(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


KEY = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(edit_config(use_dora=True), "uses `use_dora`", id="dora"),
        pytest.param(edit_config(modules_to_save=["lm_head"]), "uses `modules_to_save`", id="modules"),
        pytest.param(edit_config(bias="all"), "uses `bias`", id="bias"),
        pytest.param(edit_config(peft_type="IA3"), "of the PEFT type 'IA3'", id="type"),
        pytest.param(edit_config(target_modules=["zz"]), r"\['zz'\] matches no linear layer", id="nothing"),
        pytest.param(edit_config(r=7), r"lora_A.weight has the shape \(4, 32\), not \(7, 32\)", id="rank"),
        pytest.param(edit_tensors(lambda t: t.pop(KEY)), "0.mlp.up_proj.lora_A.weight is missing", id="missing"),
        pytest.param(edit_tensors(lambda t: t.update({"x.lora_A.weight": ONE})), "x.lora_A.* no layer", id="extra"),
        pytest.param(edit_tensors(lambda t: t.update({"x.lora_embedding_A": ONE})), "not one of LoRA", id="embedding"),
        pytest.param(cut_short, "not a readable safetensors", id="corrupt"),
        pytest.param(pickle, "a pickle, which is never loaded", id="pickle"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_refused_and_the_ensemble_unchanged(backbone, adapters, damage, words):
    model = lora_ensemble(backbone, {"a": adapters["a"]})
    before, config = model(CONTEXT).logits, model.config.to_dict()
    damage(Path(adapters["a"]))
    with pytest.raises(ValueError, match=words):
        model.add_expert("b", {"model": backbone, "adapter": adapters["a"]})
    with pytest.raises(ValueError, match="The adapter of expert 'z'"):
        lora_ensemble(backbone, {"z": adapters["a"]})
    assert torch.equal(model(CONTEXT).logits, before)
    assert model.config.to_dict() == config


def test_an_expert_that_a_default_names_stays(backbone, adapters):
    model = lora_ensemble(backbone, adapters)
    model.config.default_preference = "a"
    with pytest.raises(ValueError, match=r"`config\.default_preference` does not go without expert 'a'"):
        model.remove_expert("a")
    model.config.default_preference, model.generation_config.preference = None, {"a": 1.0, "b": 1.0}
    with pytest.raises(ValueError, match=r"`generation_config\.preference` does not go without expert 'a'"):
        model.remove_expert("a")
    assert model.config.expert_names == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("act", "words"),
    [
        pytest.param(lambda m, a: m.add_expert("a", a), "already has an expert 'a'", id="taken"),
        pytest.param(lambda m, a: m.remove_expert("z"), "unknown expert 'z'", id="unknown"),
        pytest.param(lambda m, a: m.remove_expert("a"), "is the only one", id="last"),
        pytest.param(lambda m, a: m.export_adapter("z", "x"), "unknown expert 'z'", id="export-unknown"),
        pytest.param(
            lambda m, a: m.add_expert("g", {"model": tiny_gpt2(1), "adapter": a}),
            "matches no linear layer",
            id="other",
        ),
    ],
)
def test_what_cannot_be_done_with_experts_is_refused(backbone, tmp_path, act, words):
    adapter = peft_adapter(tmp_path / "a", backbone, 1, target_modules=["q_proj"])
    model = lora_ensemble(backbone, {"a": adapter})
    with pytest.raises(ValueError, match=words):
        act(model, adapter)
    assert model.config.expert_names == ["a"]


def test_adapters_on_a_quantised_backbone_add_to_its_quantised_layers(backbone, adapters, tmp_path):
    backbone.save_pretrained(tmp_path / "backbone")
    config = TorchAoConfig(Int8WeightOnlyConfig())
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone", quantization_config=config)
    model = lora_ensemble(quantised, adapters)
    rounded = copy.deepcopy(backbone)
    for name, parameter in quantised.named_parameters():
        value = parameter.dequantize() if hasattr(parameter, "dequantize") else parameter
        rounded.get_parameter(name).data = value.detach().clone()
    weight = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(rounded.get_parameter(weight), backbone.get_parameter(weight))
    for name, folder in adapters.items():
        logits = model(CONTEXT, preference=name).logits
        assert (logits - peft_log_probs(rounded, folder, CONTEXT)).abs().max() < 1e-4


@pytest.mark.parametrize("change", ["add", "remove"])
def test_an_adapter_on_the_pcm_stays_when_experts_come_and_go(backbone, adapters, change):
    model = lora_ensemble(backbone, {"a": adapters["a"], "b": adapters["b"]})
    model.pcm.body = get_peft_model(model.pcm.body, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    before = {name: tensor.clone() for name, tensor in model.pcm.body.state_dict().items()}
    if change == "add":
        model.add_expert("c", {"model": backbone, "adapter": adapters["c"]})
    else:
        model.remove_expert("b")
    after = model.pcm.body.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_an_lm_head_that_a_user_put_in_is_used_as_it_is(backbone):
    backbone.lm_head = torch.nn.Linear(backbone.config.hidden_size, backbone.config.vocab_size, bias=False)
    weight = backbone.lm_head.weight.detach().clone()
    model = PCMEnsembleForCausalLM.from_experts({"a": backbone}, pcm=tiny_llama(9))
    assert torch.equal(model.backbones[0].lm_head.weight, weight)


@torch.no_grad()
def test_a_layers_input_does_not_stay_until_the_call_ends(backbone, adapters):
    model, alive, inputs = lora_ensemble(backbone, {"a": adapters["a"]}), [], []
    layers = model.backbones[0].model.layers
    layers[0].self_attn.q_proj.register_forward_pre_hook(lambda module, args: inputs.append(weakref.ref(args[0])))
    layers[-1].mlp.register_forward_hook(lambda *_: alive.extend(ref() for ref in inputs))
    model(CONTEXT, preference="a")
    assert alive == [None]


def test_hooks_of_adapters_stay_where_they_are_when_the_mode_is_set(backbone, adapters):
    """Another thread may be generating, and a user's own hooks keep their place behind the adapter's."""
    model = lora_ensemble(backbone, {"a": adapters["a"]})
    layer, seen = model.backbones[0].model.layers[0].self_attn.q_proj, []
    layer.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    for switch in (lambda: model, model.eval, model.train):
        switch()
        with torch.no_grad():
            model(CONTEXT, preference="a")
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
