"""A file of a PCM alone: what is in it, where it loads, and what is refused."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import make_ensemble, tiny_llama
from safetensors.torch import load_file, save_file

from modeling_pcm_ensemble import PCMEnsembleForCausalLM, checkpoint_io


@pytest.fixture
def product() -> PCMEnsembleForCausalLM:
    return make_ensemble([tiny_llama(1)], [(0, [5], [6]), (0, [7, 8], [9])], merge="product")


@pytest.mark.parametrize(("trained_for", "accepted"), [(None, False), ("probabilities", False), ("adapters", True)])
def test_a_pcm_that_was_trained_in_another_space_is_not_loaded(product, tmp_path, trained_for, accepted):
    tensors = {name: tensor.clone() + 1 for name, tensor in product.pcm.state_dict().items()}
    save_file(tensors, tmp_path / "pcm.safetensors", metadata=trained_for and {"trained_for": trained_for})
    before = product.pcm.head.weight.clone()
    if accepted:
        product.load_pcm(tmp_path / "pcm.safetensors")
        assert product.config.pcm_trained_for == "adapters"
    else:
        with pytest.raises(ValueError, match="was trained for `merge='probabilities'`"):
            product.load_pcm(tmp_path / "pcm.safetensors")
    assert torch.equal(product.pcm.head.weight, before + 1 if accepted else before)


def test_a_pcm_is_saved_without_what_is_frozen_and_loads_where_it_has_as_many_layers(tmp_path):
    experts = {"e0": tiny_llama(1), "e1": tiny_llama(2)}
    shallow, same, deep = (
        PCMEnsembleForCausalLM.from_experts(
            experts, pcm=tiny_llama(seed, num_hidden_layers=layers), merge="product", reference="e0"
        )
        for seed, layers in ((3, 2), (4, 2), (5, 3))
    )
    torch.nn.init.normal_(shallow.pcm.head.weight)
    shallow.pcm.body.layers[0].requires_grad_(False)
    shallow.save_pcm(tmp_path / "pcm.safetensors")

    frozen = same.pcm.body.layers[0].mlp.up_proj.weight.clone()
    same.load_pcm(tmp_path / "pcm.safetensors")
    assert same.config.pcm_trained_for == "product"
    assert torch.equal(same.pcm.head.weight, shallow.pcm.head.weight)
    assert torch.equal(same.pcm.body.layers[1].mlp.up_proj.weight, shallow.pcm.body.layers[1].mlp.up_proj.weight)
    assert torch.equal(same.pcm.body.layers[0].mlp.up_proj.weight, frozen)

    with pytest.raises(ValueError, match="holds a PCM of 2 layers, and that of this ensemble has 3"):
        deep.load_pcm(tmp_path / "pcm.safetensors")
    save_file(load_file(tmp_path / "pcm.safetensors"), tmp_path / "older.safetensors", {"trained_for": "product"})
    with pytest.raises(ValueError, match="holds a part of the PCM's body, and does not say of how many layers"):
        deep.load_pcm(tmp_path / "older.safetensors")
    assert not deep.pcm.head.weight.any()

    deep.config.experts = deep.config.experts[::-1]
    deep.save_pcm(tmp_path / "reversed.safetensors")
    deep.config.experts = deep.config.experts[::-1]
    with pytest.raises(ValueError, match="PCM of the experts e1, e0, and this ensemble has e0, e1"):
        deep.load_pcm(tmp_path / "reversed.safetensors")

    wide = PCMEnsembleForCausalLM.from_experts(
        experts, pcm=tiny_llama(6, intermediate_size=64), merge="product", reference="e0"
    )
    before = copy.deepcopy(wide.pcm.state_dict())
    with pytest.raises(ValueError, match=r"has no body.layers.1.mlp.\w+.weight of the shape"):
        wide.load_pcm(tmp_path / "pcm.safetensors")
    assert all(torch.equal(weight, before[name]) for name, weight in wide.pcm.state_dict().items())

    with pytest.raises(ValueError, match="All of the PCM is frozen"):
        deep.requires_grad_(False).save_pcm(tmp_path / "nothing.safetensors")


def test_a_pcm_that_cannot_be_written_leaves_the_file_that_was_there(tmp_path, product, monkeypatch):
    file = tmp_path / "pcm.safetensors"
    product.save_pcm(file)
    before = file.read_bytes()

    def broken(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint_io, "save_file", broken)
    with pytest.raises(OSError, match="No space left"):
        product.save_pcm(file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_pcm_in_bfloat16_is_loaded_and_a_weight_that_the_pcm_has_not_is_refused(tmp_path):
    experts = {"a": tiny_llama(1), "b": tiny_llama(2)}
    models = [PCMEnsembleForCausalLM.from_experts(experts, pcm=tiny_llama(seed)) for seed in (3, 4)]
    torch.nn.init.normal_(models[0].pcm.head.weight)
    models[0].pcm.body.embed_tokens.requires_grad_(False)
    models[0].save_pcm(tmp_path / "pcm.safetensors", torch.bfloat16)

    embeddings = models[1].pcm.body.embed_tokens.weight.clone()
    models[1].load_pcm(tmp_path / "pcm.safetensors")
    for name, weight in models[1].pcm.named_parameters():
        learnt = models[0].pcm.get_parameter(name).to(torch.bfloat16).float()
        assert torch.equal(weight, embeddings if "embed_tokens" in name else learnt), name

    save_file({"head.bias": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"another architecture or size: this one has no head\.bias"):
        models[1].load_pcm(tmp_path / "other.safetensors")


def test_a_pcm_does_not_take_the_place_of_a_checkpoint(product, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is what a whole checkpoint is called"):
        product.save_pcm(tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
