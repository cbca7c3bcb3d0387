"""Experts in few bits: the backbones alone, as they would be quantised on their own."""

import pytest
import torch
from conftest import tiny_llama, tiny_qwen2, tiny_tokenizer
from torch.testing import assert_close
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
from transformers import HqqConfig, LlamaForCausalLM, TorchAoConfig

from modeling_pcm_ensemble import PCMEnsembleForCausalLM

INT4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))
CONTEXT = torch.tensor([[21, 22, 23, 24, 25]])
ADAPTER = {
    "r": 2,
    "target_modules": ["q_proj"],
    "tensors": {
        f"model.layers.{layer}.self_attn.q_proj.lora_{side}.weight": torch.full(shape, 0.3)
        for layer in range(2)
        for side, shape in (("A", (2, 32)), ("B", (32, 2)))
    },
}


@pytest.fixture
def folder(tmp_path) -> str:
    tiny_llama(1).save_pretrained(tmp_path / "llama")
    model = PCMEnsembleForCausalLM.from_experts(
        {"a": str(tmp_path / "llama"), "b": {"model": tiny_qwen2(2), "adapter": ADAPTER}},
        pcm=tiny_llama(3),
        tokenizer=tiny_tokenizer(),
    )
    torch.nn.init.normal_(model.pcm.head.weight)
    model.save_pretrained(tmp_path / "ensemble")
    return str(tmp_path / "ensemble")


def quantized(model) -> set[str]:
    return {name for name, p in model.named_parameters() if type(p) is not torch.nn.Parameter}


@torch.no_grad()
def logits(model, **kwargs) -> torch.Tensor:
    return model(CONTEXT, **kwargs).logits


@pytest.mark.parametrize(
    ("kind", "form"),
    [(Int8WeightOnlyConfig(), "config"), (Int8WeightOnlyConfig(), "dict"), (INT4, "config")],
    ids=["int8", "int8-dict", "int4"],
)
def test_experts_are_those_quantised_alone_and_the_pcm_is_whole(folder, tmp_path, kind, form):
    quantization = TorchAoConfig(kind)
    given = quantization if form == "config" else quantization.to_dict()
    model = PCMEnsembleForCausalLM.from_pretrained(folder, quantization_config=given, dtype=torch.bfloat16)
    names = quantized(model)
    assert {name.split(".")[0] for name in names} == {"backbones"}
    assert not any("lm_head" in name or "lora" in name for name in names)
    assert len(names) == 2 * 2 * 7  # every linear layer of two backbones of two layers
    alone = LlamaForCausalLM.from_pretrained(
        tmp_path / "llama", quantization_config=quantization, dtype=torch.bfloat16
    )
    assert quantized(alone) == {name.removeprefix("backbones.0.") for name in names if name.startswith("backbones.0.")}
    assert_close(logits(model, preference="a"), logits(alone).float().log_softmax(-1))
    whole = PCMEnsembleForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert_close(model(CONTEXT).expert_weights, whole(CONTEXT).expert_weights)


@pytest.mark.parametrize("kind", [Int8WeightOnlyConfig(), INT4], ids=["int8", "int4"])
def test_a_quantised_ensemble_is_saved_and_loaded_again(folder, tmp_path, kind):
    quantization = TorchAoConfig(kind)
    model = PCMEnsembleForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "again")
    again = PCMEnsembleForCausalLM.from_pretrained(tmp_path / "again")
    assert quantized(again) == quantized(model)
    assert_close(logits(again), logits(model), atol=0, rtol=0)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert again.generate(CONTEXT, **options).tolist() == model.generate(CONTEXT, **options).tolist()


@pytest.mark.parametrize("loaded", [False, True], ids=["by name", "loaded"])
def test_an_ensemble_of_quantised_experts_keeps_its_pcm_whole_and_says_how_it_can_be_saved(tmp_path, loaded):
    quantization = TorchAoConfig(Int8WeightOnlyConfig())
    expert, options = str(tmp_path / "llama"), {"quantization_config": quantization, "dtype": torch.bfloat16}
    tiny_llama(1).save_pretrained(expert)
    alone = LlamaForCausalLM.from_pretrained(expert, **options)
    model = PCMEnsembleForCausalLM.from_experts({"a": alone if loaded else expert}, pcm=expert, **options)
    assert {name.split(".")[0] for name in quantized(model)} == {"backbones"}
    assert_close(logits(model), logits(alone).float().log_softmax(-1))
    with pytest.raises(ValueError, match="load that with `quantization_config`"):
        model.save_pretrained(tmp_path / "ensemble")


def test_a_quantisation_that_leaves_no_module_out_is_refused_by_name(folder):
    with pytest.raises(ValueError, match="is a HqqConfig, which would quantise the PCM and output layers"):
        PCMEnsembleForCausalLM.from_pretrained(folder, quantization_config=HqqConfig(nbits=4))
