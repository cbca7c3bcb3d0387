"""Whatever from_experts takes, save_pretrained saves and from_pretrained loads, equal; the rest it refuses."""

import copy
import json

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama, tiny_mistral, tiny_qwen2, tiny_tokenizer
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from test_saving import run_without_the_package
from torch import nn
from torch.testing import assert_close
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TorchAoConfig

from modeling_pcm_ensemble import PCMEnsembleForCausalLM

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT's call

CONTEXT = torch.tensor([[21, 22, 23, 24]])


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)


def changed(change, **options) -> LlamaForCausalLM:
    model = tiny_llama(1, **options)
    change(model)
    return model


class ScaledLinear(nn.Linear):
    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


class ScaledLlama(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


def one_storage(model):
    """As frameworks for training keep them: all parameters in one block of memory."""
    block, start = torch.cat([parameter.data.flatten() for parameter in model.parameters()]), 0
    for parameter in model.parameters():
        parameter.data = block[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()


def replace(path, module):
    return lambda model: model.set_submodule(path, module)


CANNOT_BE_SAVED = {
    "add_adapter": (lambda: changed(lambda m: m.add_adapter(lora())), "an adapter on model.layers.0.self_attn.q_proj"),
    "get_base_model": (lambda: get_peft_model(tiny_llama(1), lora()).get_base_model(), "an adapter on model.layers.0"),
    "layer": (lambda: changed(replace("lm_head", ScaledLinear(32, 99, bias=False))), "lm_head is a ScaledLinear"),
    "subclass": (lambda: ScaledLlama(tiny_llama(1).config), "is a ScaledLlama, not a LlamaForCausalLM"),
    "larger-head": (lambda: changed(replace("lm_head", nn.Linear(32, 120, bias=False))), r"shape \(120, 32\), not"),
    "biased-head": (lambda: changed(replace("lm_head", nn.Linear(32, 99))), "lm_head.bias"),
    "fewer-layers": (lambda: changed(lambda m: m.model.layers.__delitem__(1)), "model.layers.1 is missing"),
    "compiled-layer": (
        lambda: changed(lambda m: m.model.set_submodule("norm", torch.compile(m.model.norm, backend="eager"))),
        "model.norm is a OptimizedModule",
    ),
    "weight-norm": (lambda: changed(lambda m: nn.utils.parametrizations.weight_norm(m.lm_head)), "lm_head is a "),
    "buffer": (lambda: changed(lambda m: m.register_buffer("extra", torch.ones(1))), "the tensor extra"),
    "tied-by-hand": (
        lambda: changed(lambda m: setattr(m.lm_head, "weight", m.model.embed_tokens.weight)),
        "model.embed_tokens.weight and lm_head.weight are one tensor",
    ),
    "untied-by-hand": (
        lambda: changed(lambda m: setattr(m.lm_head, "weight", nn.Parameter(torch.ones(99, 32))),
                        tie_word_embeddings=True),
        "are not one tensor",
    ),
    "quantised-by-hand": (lambda: changed(lambda m: quantize_(m, Int8WeightOnlyConfig())), "a `quantization_config`"),
}  # fmt: skip


@pytest.mark.parametrize("name", CANNOT_BE_SAVED)
def test_a_model_that_a_checkpoint_could_not_hold_is_refused(name):
    make, words = CANNOT_BE_SAVED[name]
    with pytest.raises(ValueError, match=rf"expert 'a'.*{words}"):
        PCMEnsembleForCausalLM.from_experts({"a": make()}, pcm=tiny_llama(9))
    model = PCMEnsembleForCausalLM.from_experts({"b": tiny_llama(2)}, pcm=tiny_llama(9))
    with pytest.raises(ValueError, match=rf"expert 'a'.*{words}"):
        model.add_expert("a", make())
    assert model.config.expert_names == ["b"]


def test_a_generation_config_that_transformers_would_not_save_is_refused():
    model = changed(lambda m: setattr(m.generation_config, "temperature", 0.7))
    with pytest.raises(ValueError, match="`generation_config` of expert 'a' could not be saved"):
        PCMEnsembleForCausalLM.from_experts({"a": model}, pcm=tiny_llama(9))


def shared_weight(one, other):
    other.model.embed_tokens.weight = one.model.embed_tokens.weight


def shared_memory(one, other):
    other.model.embed_tokens.weight.data = one.model.embed_tokens.weight.data


def shared_module(one, other):
    other.model.layers[0] = one.model.layers[0]


@pytest.mark.parametrize("share", [shared_weight, shared_memory, shared_module])
def test_experts_that_share_memory_are_refused(share):
    one, other = tiny_llama(1), tiny_llama(2)
    share(one, other)
    with pytest.raises(ValueError, match="expert 'a' and expert 'b' share the tensor model"):
        PCMEnsembleForCausalLM.from_experts({"a": one, "b": other}, pcm=tiny_llama(9))
    model = PCMEnsembleForCausalLM.from_experts({"a": one}, pcm=tiny_llama(9))
    with pytest.raises(ValueError, match="share the tensor model"):
        model.add_expert("b", other)


def quantised(tmp_path):
    tiny_llama(1).save_pretrained(tmp_path / "whole")
    options = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig()), "dtype": torch.bfloat16}
    return AutoModelForCausalLM.from_pretrained(tmp_path / "whole", **options)


def test_layers_beyond_the_configurations_last_are_refused(tmp_path):
    tiny_llama(1).save_pretrained(tmp_path / "expert")
    PCMEnsembleForCausalLM.from_experts({"a": tiny_llama(1)}, pcm=tiny_llama(2)).save_pretrained(tmp_path / "whole")
    for name, parts in {"expert": [[]], "whole": [["pcm"], ["backbones", 0]]}.items():
        original = (tmp_path / name / "config.json").read_text()
        for place in parts:
            config = part = json.loads(original)
            for key in place:
                part = part[key]
            part["num_hidden_layers"] = 1
            part.pop("layer_types", None)
            (tmp_path / name / "config.json").write_text(json.dumps(config))
            load = {
                "expert": lambda: PCMEnsembleForCausalLM.from_experts(
                    {"a": str(tmp_path / "expert")}, pcm=tiny_llama(2)
                ),
                "whole": lambda: PCMEnsembleForCausalLM.from_pretrained(tmp_path / "whole"),
            }
            with pytest.raises(ValueError, match=r"unexpected \(the first is .*layers\.1\."):
                load[name]()


def test_an_output_layer_that_is_exchanged_later_is_refused_when_saving(tmp_path):
    model = PCMEnsembleForCausalLM.from_experts({"a": tiny_llama(1)}, pcm=tiny_llama(2), pcm_layers=1)
    model.backbones[0].lm_head = nn.Linear(32, 99, bias=True)
    with pytest.raises(ValueError, match=r"the tensor lm_head.bias has the shape"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["expert", "pcm"])
def test_an_adapter_that_is_put_into_a_part_later_is_refused_when_saving(part, tmp_path):
    model = PCMEnsembleForCausalLM.from_experts({"a": tiny_llama(1)}, pcm=tiny_llama(2), pcm_layers=1)
    changed = {"expert": model.backbones[0], "pcm": model.pcm.body}[part]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), changed)
    with pytest.raises(ValueError, match=r"it has an adapter on .*q_proj"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_adapter_in_a_quantised_model_is_refused_too(tmp_path):
    model = quantised(tmp_path)
    model.add_adapter(lora())
    with pytest.raises(ValueError, match=r"an adapter on model.layers.0.self_attn.q_proj"):
        PCMEnsembleForCausalLM.from_experts({"a": model}, pcm=tiny_llama(9).to(torch.bfloat16))


def published_sampler(tmp_path) -> str:
    """As some models are published: with sampling's options, but without `do_sample`."""
    tiny_llama(1).save_pretrained(tmp_path / "sampler")
    path = tmp_path / "sampler" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.6, "eos_token_id": [2, 5]}))
    return str(tmp_path / "sampler")


one_config = tiny_llama(1).config
CAN_BE_SAVED = {
    "merged": lambda _: {"a": get_peft_model(tiny_llama(1), lora()).merge_and_unload()},
    "one-tied": lambda _: {"a": tiny_llama(1, tie_word_embeddings=True), "b": tiny_llama(2)},
    "one-config": lambda _: {"a": LlamaForCausalLM(one_config), "b": LlamaForCausalLM(one_config)},
    "one-storage": lambda _: {"a": changed(one_storage)},
    "copies": lambda _: {"a": tiny_llama(1), "b": copy.deepcopy(tiny_llama(1))},
    "resized": lambda _: {"a": changed(lambda m: m.resize_token_embeddings(112)), "b": tiny_llama(2)},
    "architectures": lambda _: {"a": tiny_gpt2(1), "b": tiny_qwen2(2), "c": tiny_mistral(3)},
    "sampler": lambda folder: {"a": published_sampler(folder), "b": tiny_llama(2)},
    "loaded-sampler": lambda folder: {"a": AutoModelForCausalLM.from_pretrained(published_sampler(folder))},
}


@pytest.mark.parametrize("name", CAN_BE_SAVED)
def test_what_is_taken_is_saved_and_loaded_equal(name, tmp_path):
    experts = CAN_BE_SAVED[name](tmp_path)
    model = PCMEnsembleForCausalLM.from_experts(experts, pcm=tiny_llama(9), tokenizer=tiny_tokenizer())
    model.save_pretrained(tmp_path / "ensemble")
    loaded = PCMEnsembleForCausalLM.from_pretrained(tmp_path / "ensemble")
    assert torch.equal(loaded(CONTEXT).logits, model(CONTEXT).logits)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert loaded.generate(CONTEXT, **options).tolist() == model.generate(CONTEXT, **options).tolist()
    loaded.save_pretrained(tmp_path / "again")


def test_an_expert_that_comes_later_leaves_a_published_generation_config_one_that_is_saved(tmp_path):
    model = PCMEnsembleForCausalLM.from_experts({"a": published_sampler(tmp_path)}, pcm=tiny_llama(9))
    other = tiny_llama(2)
    other.generation_config.eos_token_id = 7
    model.add_expert("b", other)
    assert model.generation_config.eos_token_id == [2, 5, 7]
    model.save_pretrained(tmp_path / "ensemble")
    loaded = PCMEnsembleForCausalLM.from_pretrained(tmp_path / "ensemble")
    assert (loaded.generation_config.temperature, loaded.generation_config.eos_token_id) == (0.6, [2, 5, 7])


def test_an_expert_that_comes_later_leaves_the_end_tokens_that_a_user_has_set():
    model = PCMEnsembleForCausalLM.from_experts({"a": tiny_llama(1)}, pcm=tiny_llama(9))
    model.generation_config.eos_token_id = [2, 19]
    model.add_expert("same", model.backbones[0])
    assert model.generation_config.eos_token_id == [2, 19]
    other = tiny_llama(2)
    other.generation_config.eos_token_id = 7
    model.add_expert("b", other)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == [2, 19, 7]


def test_an_expert_that_goes_takes_its_end_token_along_unless_a_user_has_set_others():
    model = PCMEnsembleForCausalLM.from_experts({"a": tiny_llama(1)}, pcm=tiny_llama(9))
    other = tiny_llama(2)
    other.generation_config.eos_token_id = 7
    model.add_expert("b", other)
    model.remove_expert("b")
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 2

    model.add_expert("b", other)
    model.generation_config.eos_token_id = [7, 19]
    model.remove_expert("b")
    assert model.generation_config.eos_token_id == [7, 19]


@pytest.mark.parametrize(("chosen", "with_smaller", "after"), [(112, 104, 112), (108, 104, 112), (99, 99, 99)])
def test_experts_that_come_and_go_leave_a_vocabulary_that_a_user_has_set(chosen, with_smaller, after):
    parts = [tiny_llama(seed, vocab_size=112) for seed in (1, 9)]  # padded beyond the tokenizer's 99
    model = PCMEnsembleForCausalLM.from_experts({"a": parts[0]}, pcm=parts[1], tokenizer=tiny_tokenizer())
    model.config.vocab_size = chosen
    model.add_expert("smaller", tiny_llama(2, vocab_size=104))
    assert model(CONTEXT).logits.shape[-1] == model.config.vocab_size == with_smaller

    model.remove_expert("smaller")
    assert model(CONTEXT).logits.shape[-1] == model.config.vocab_size == after


def test_an_expert_that_a_default_preference_does_not_go_with_is_refused():
    model = PCMEnsembleForCausalLM.from_experts({"a": tiny_llama(1), "b": tiny_llama(2)}, pcm=tiny_llama(9))
    model.config.default_preference = [1.0, 0.5]
    with pytest.raises(ValueError, match=r"`config\.default_preference` does not go with 3 experts"):
        model.add_expert("c", tiny_llama(3))
    assert model.config.expert_names == ["a", "b"]
    model.generate(CONTEXT, max_new_tokens=1)

    for default in ([{"a": 1.0}, {"b": 1.0}], ["a", "b"], {"a": 2.0}, "b"):  # which any other experts leave as it is
        model.config.default_preference = default
        model.add_expert("c", tiny_llama(3))
        model.remove_expert("c")
    model.config.default_preference = [["a"], ["b"]]
    with pytest.raises(ValueError, match="does not go without expert 'b'"):
        model.remove_expert("b")


# Tensors and tokens that are too many


@pytest.mark.parametrize(
    ("make", "extra"),
    [
        (tiny_gpt2, "transformer.h.0.attn.masked_bias"),
        (tiny_llama, "v_head.summary.weight"),
        (tiny_llama, "mtp.0.weight"),
        (tiny_llama, "model.layers.0.self_attn.q_proj.weight_scale"),
    ],
)
def test_tensors_without_a_place_are_left_out_with_a_warning(make, extra, tmp_path, transformers_log):
    make(1).save_pretrained(tmp_path / "expert")
    add_tensor(tmp_path / "expert", extra)
    model = PCMEnsembleForCausalLM.from_experts({"a": str(tmp_path / "expert")}, pcm=tiny_llama(9))
    assert_close(model(CONTEXT).logits, make(1)(CONTEXT).logits.log_softmax(-1), atol=1e-5, rtol=0)
    assert any(extra in line for line in transformers_log())

    model.save_pretrained(tmp_path / "ensemble")
    add_tensor(tmp_path / "ensemble", "pcm.v_head.weight")
    loaded = PCMEnsembleForCausalLM.from_pretrained(tmp_path / "ensemble")
    assert torch.equal(loaded(CONTEXT).logits, model(CONTEXT).logits)
    assert any("pcm.v_head.weight" in line for line in transformers_log())


def add_tensor(folder, name):
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name: torch.ones(1)}, path, {"format": "pt"})


@pytest.fixture
def with_pad(tmp_path):
    """A base of 99 tokens, and a model of 100 whose tokenizer was given one for padding."""
    for name, model, tokenizer in (
        ("base", tiny_llama(1), tiny_tokenizer()),
        ("padded", tiny_llama(2, vocab_size=100), tiny_tokenizer()),
    ):
        if name == "padded":
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return str(tmp_path / "base"), str(tmp_path / "padded")


def test_an_added_token_is_settled_by_a_tokenizer_that_is_given(with_pad):
    base, padded = with_pad
    experts = {"a": base, "b": padded}
    with pytest.raises(ValueError, match=r"token 99 is None in .*base', but '\[PAD\]' in .* pass the `tokenizer=`"):
        PCMEnsembleForCausalLM.from_experts(experts, pcm=base)
    model = PCMEnsembleForCausalLM.from_experts(experts, pcm=base, tokenizer=base)
    assert model(CONTEXT).logits.shape[-1] == len(model.tokenizer) == 99


def test_an_added_token_is_settled_by_resizing_the_base(with_pad):
    base, padded = with_pad
    experts = {"a": base, "b": padded}
    with pytest.raises(ValueError, match=r"100 tokens, but the model of expert 'a' only 99.*embeddings\(100\)`"):
        PCMEnsembleForCausalLM.from_experts(experts, pcm=base, tokenizer=padded)
    resized = AutoModelForCausalLM.from_pretrained(base)
    resized.resize_token_embeddings(100)
    model = PCMEnsembleForCausalLM.from_experts(experts | {"a": resized}, pcm=padded, tokenizer=padded)
    assert model(CONTEXT).logits.shape[-1] == len(model.tokenizer) == 100


def test_tokens_that_two_tokenizers_read_differently_are_refused_with_any_tokenizer(with_pad, tmp_path):
    base, _ = with_pad
    tiny_llama(3).save_pretrained(tmp_path / "other")
    tiny_tokenizer(letters="BA").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"token 36 is 'A' in `tokenizer`, but 'C' in .*other'"):
        PCMEnsembleForCausalLM.from_experts({"a": base, "b": str(tmp_path / "other")}, pcm=base, tokenizer=base)


def test_the_tokenizer_of_an_ensemble_loads_without_its_code(with_pad, tmp_path):
    base, _ = with_pad
    PCMEnsembleForCausalLM.from_experts({"a": base}, pcm=base).save_pretrained(tmp_path / "ensemble")
    (tmp_path / "ensemble" / "configuration_pcm_ensemble.py").write_text("raise SystemExit('it ran')")
    code = """
        from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)
        print(sorted(tokenizer.get_vocab().items()))
    """
    printed = run_without_the_package(code, str(tmp_path / "ensemble"))
    assert printed.strip() == str(sorted(tiny_tokenizer().get_vocab().items()))
