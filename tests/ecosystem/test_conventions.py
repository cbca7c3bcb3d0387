"""What any transformers model can be asked for, beside forward and generate()."""

import copy
import pickle

import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from modeling_pcm_ensemble import PCMEnsembleForCausalLM

CONTEXT = torch.tensor([[21, 22, 23, 24, 25]])


@pytest.fixture
def folder(ensemble, tmp_path) -> str:
    ensemble.save_pretrained(tmp_path / "ensemble")
    return str(tmp_path / "ensemble")


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(CONTEXT).logits


def attention_of(model) -> set[str]:
    return {part._attn_implementation for part in (model.config, *model.config.sub_config_items().values())}


def test_construction_on_the_meta_device_allocates_nothing(ensemble):
    with torch.device("meta"):
        model = PCMEnsembleForCausalLM(ensemble.config)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_random_weights_from_a_config_are_an_untrained_ensemble(ensemble):
    model = AutoModelForCausalLM.from_config(ensemble.config)
    assert not model.pcm.head.weight.any()
    assert_close(model(CONTEXT).expert_weights, torch.full((1, 5, 3), 1 / 3))
    assert not any(parameter.requires_grad for parameter in model.backbones.parameters())
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, "float16"])
def test_dtype_is_every_parts(ensemble, folder, dtype):
    model = PCMEnsembleForCausalLM.from_pretrained(folder, dtype=dtype)
    expected = torch.float32 if dtype == "auto" else torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_an_automatic_device_map_changes_nothing(ensemble, folder):
    model = PCMEnsembleForCausalLM.from_pretrained(folder, device_map="auto")
    assert_close(logits(model), logits(ensemble))


def test_backbones_are_spread_over_devices_and_disk(ensemble, folder, tmp_path):
    places = {"pcm": "cpu", "backbones.0": "cpu", "backbones.1": "disk", "backbones.2": "disk"}
    model = PCMEnsembleForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "off")
    assert isinstance(model.backbones[1]._hf_hook, AlignDevicesHook)
    assert all(parameter.is_meta for parameter in model.backbones[1].parameters())  # on disk until it runs
    assert_close(logits(model), logits(ensemble))
    options = {"max_new_tokens": 5, "do_sample": False, "preference": {"b": 1.0, "c": 0.5}}
    assert_close(model.generate(CONTEXT, **options), ensemble.generate(CONTEXT, **options))


@pytest.mark.parametrize("attention", ["eager", "sdpa", "grouped_sdpa"])
def test_the_attention_that_is_asked_for_reaches_every_part(ensemble, folder, attention):
    model = PCMEnsembleForCausalLM.from_pretrained(folder, attn_implementation=attention)
    assert attention_of(model) == {attention}
    assert_close(logits(model), logits(ensemble))
    other = "eager" if attention == "sdpa" else "sdpa"
    model.set_attn_implementation(other)
    assert attention_of(model) == {other}
    assert_close(logits(model), logits(ensemble))


def test_the_input_embeddings_are_the_pcms(ensemble):
    assert ensemble.get_input_embeddings() is ensemble.pcm.body.get_input_embeddings()
    other = torch.nn.Embedding(99, 32)
    ensemble.set_input_embeddings(other)
    assert ensemble.pcm.body.get_input_embeddings() is other


@pytest.mark.parametrize(("arguments", "size"), [({"new_num_tokens": 107}, 107), ({"pad_to_multiple_of": 64}, 128)])
def test_resizing_the_vocabulary_resizes_every_part(ensemble, arguments, size, tmp_path):
    before = [backbone(CONTEXT).logits for backbone in ensemble.backbones]
    ensemble.resize_token_embeddings(**arguments, mean_resizing=False)
    for backbone, old in zip(ensemble.backbones, before):
        assert backbone(CONTEXT).logits.shape[-1] == size
        assert_close(backbone(CONTEXT).logits[..., :99], old)
    assert logits(ensemble).shape == (1, 5, size)
    assert ensemble.config.vocab_size == size
    assert not any(parameter.requires_grad for parameter in ensemble.backbones.parameters())
    ensemble.save_pretrained(tmp_path)
    assert_close(logits(PCMEnsembleForCausalLM.from_pretrained(tmp_path)), logits(ensemble))


def test_gradient_checkpointing_of_the_pcm_changes_no_gradient(ensemble):
    def gradient(model) -> torch.Tensor:
        model.train()
        model(CONTEXT, labels=CONTEXT).loss.backward()
        return model.pcm.body.get_input_embeddings().weight.grad

    checkpointed = copy.deepcopy(ensemble)
    checkpointed.activation_checkpointing_enable()
    assert checkpointed.pcm.body.is_activation_checkpointing
    found = gradient(checkpointed)
    assert found.any()
    assert_close(found, gradient(ensemble))


def test_hidden_states_and_attentions_are_the_pcms(ensemble):
    ensemble.set_attn_implementation("eager")
    output = ensemble(CONTEXT, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(1, 5, 32)] * 2
    assert [tuple(attention.shape) for attention in output.attentions] == [(1, 4, 5, 5)]


def test_a_tuple_is_returned_where_asked_for(ensemble):
    found = ensemble(CONTEXT, labels=CONTEXT, return_dict=False)
    output = ensemble(CONTEXT, labels=CONTEXT)
    assert isinstance(found, tuple)
    assert_close(found[:2], (output.loss, output.logits))


def test_the_loss_is_over_all_items_of_the_batch(ensemble):
    mean = ensemble(CONTEXT, labels=CONTEXT).loss
    assert_close(ensemble(CONTEXT, labels=CONTEXT, num_items_in_batch=torch.tensor(8)).loss, mean * 4 / 8)


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_casting_leaves_the_mixture_in_float32(ensemble, cast):
    output = getattr(copy.deepcopy(ensemble), cast)()(CONTEXT)
    assert output.logits.dtype == output.expert_weights.dtype == torch.float32
    assert_close(output.logits.exp().sum(-1), torch.ones(1, 5), atol=1e-5, rtol=0)
    assert_close(output.logits, logits(ensemble), atol=0.2, rtol=0.1)


def test_a_copy_stands_on_its_own(ensemble):
    before = logits(ensemble)
    other = copy.deepcopy(ensemble)
    assert_close(logits(other), before)
    torch.nn.init.zeros_(other.pcm.head.weight)
    torch.nn.init.zeros_(other.backbones[0].model.norm.weight)
    assert_close(logits(ensemble), before)


def test_the_config_survives_pickling(ensemble):
    assert pickle.loads(pickle.dumps(ensemble.config)).to_dict() == ensemble.config.to_dict()


def test_initialising_again_keeps_loaded_weights(ensemble, folder):
    model = PCMEnsembleForCausalLM.from_pretrained(folder)
    model.init_weights()
    model.tie_weights()
    assert_close(logits(model), logits(ensemble))
    assert model.backbones[0].lm_head.weight is model.backbones[0].model.embed_tokens.weight


def test_what_the_configuration_asks_to_put_out_is_put_out(ensemble):
    ensemble.set_attn_implementation("eager")
    ensemble.config.output_hidden_states = ensemble.config.output_attentions = True
    output = ensemble(CONTEXT, preference="a")
    assert len(output.hidden_states) == ensemble.config.num_hidden_layers + 1
    assert output.attentions[0].shape[1] == ensemble.config.num_attention_heads
    assert ensemble(CONTEXT, output_hidden_states=False, output_attentions=False).hidden_states is None


def test_labels_may_be_shifted_already(ensemble):
    labels = CONTEXT.clone()
    shifted = torch.cat([labels[:, 1:], torch.full((1, 1), -100)], dim=1)
    expected = ensemble(CONTEXT, labels=labels).loss
    assert_close(ensemble(CONTEXT, labels=labels, shift_labels=shifted).loss, expected)
    assert_close(ensemble(CONTEXT, labels=labels.masked_fill(labels == 25, 7), ignore_index=7).loss,
                 ensemble(CONTEXT, labels=labels.masked_fill(labels == 25, -100)).loss)  # fmt: skip


def test_resizing_the_vocabulary_is_known_to_the_model_too(ensemble):
    ensemble.resize_token_embeddings(110)
    assert ensemble.vocab_size == ensemble.config.vocab_size == 110
