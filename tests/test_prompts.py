"""Long prompts and descriptions are read once and kept from call to call, for every cache that can hold them."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import left_pad, make_ensemble, tiny_gpt2, tiny_llama
from peft import PeftModel
from test_lora import lora_ensemble, peft_adapter
from torch.testing import assert_close

from modeling_pcm_ensemble import PCMEnsembleCache, submodel

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # PEFT's
ROWS = [[21, 22, 23, 24, 25], [31, 32], [41, 42, 43]]
PREFERENCES = [["e0", "e1", "e2"], ["e1"], ["e0", "e3"]]
TEXTS = ([5, 6, 7, 8, 9, 10], [11, 12, 13], [], [14, 15, 16, 17])


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(submodel, "MIN_TOKENS_KEPT", 1)
    experts = [(0, TEXTS[0], [51]), (0, TEXTS[1], [52]), (0, TEXTS[2], [53]), (1, TEXTS[3], [54])]
    return make_ensemble([tiny_llama(1), tiny_gpt2(2)], experts)


def shapes_read(part) -> list:
    shapes = []
    part.register_forward_hook(
        lambda module, args, kwargs, output: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_each_request_reads_what_it_would_read_alone(model, kind, monkeypatch):
    for _ in range(2):  # the second time the prompts are there
        cache = PCMEnsembleCache(model.config, kind, 8)
        together = model(**left_pad(ROWS), preference=PREFERENCES, past_key_values=cache)
        step = model(torch.tensor([[1]] * 3), past_key_values=cache).logits
    monkeypatch.setattr(submodel, "MIN_TOKENS_KEPT", 10**6)
    for i, row in enumerate(ROWS):
        alone = model(torch.tensor([[*row, 1]]), preference=PREFERENCES[i], use_cache=False).logits[0]
        assert_close(together.logits[i, -len(row) :], alone[:-1], atol=1e-4, rtol=0)
        assert_close(step[i], alone[-1:], atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_prompt_is_read_once_and_again_when_it_or_a_weight_has_changed(model):
    shapes, ids = shapes_read(model.backbones[0]), torch.tensor([ROWS[0]])
    model(ids, preference=["e0"])
    model(ids, preference=["e0", "e1"])
    model(ids, preference=["e1", "e0"])
    assert shapes == [(1, 5), (1, 6), (1, 2), (2, 6), (2, 6)]
    model.config.experts[1]["prompt_ids"] = [77, 12, 13]
    model(ids, preference=["e0", "e1"])
    assert shapes[5:] == [(1, 2), (2, 6)]
    before = model(ids, preference="e0").logits
    model.backbones[0].model.layers[0].self_attn.k_proj.weight.neg_()
    after = model(ids, preference="e0").logits
    assert shapes[6:] == [(2, 6), (1, 6), (1, 5), (1, 6)]
    assert not torch.allclose(before, after)
    model.backbones[0].model.layers[0].self_attn.k_proj.weight.data.neg_()
    model.forget_weights()
    assert_close(model(ids, preference="e0").logits, before, atol=1e-5, rtol=0)
    assert not copy.deepcopy(model).backbones.submodels[0].store.states


@torch.no_grad()
def test_prompts_are_read_under_their_experts_adapters(tmp_path, monkeypatch):
    backbone = tiny_llama(1)
    adapters = {name: peft_adapter(tmp_path / name, backbone, seed) for seed, name in enumerate("ab")}
    model = lora_ensemble(backbone, adapters)
    for expert in model.config.experts:
        expert["prompt_ids"] = [5, 6, 7, 8]
    expected = model(torch.tensor([ROWS[0]]), preference=["a", "b"]).logits
    monkeypatch.setattr(submodel, "MIN_TOKENS_KEPT", 1)
    for _ in range(2):
        found = model(torch.tensor([ROWS[0]]), preference=["a", "b"]).logits
        assert_close(found, expected, atol=1e-4, rtol=0)
    for tensor in model.backbones.bank_of("a").tensors("a").values():
        tensor.mul_(2)
    found = model(torch.tensor([ROWS[0]]), preference=["a", "b"]).logits
    monkeypatch.setattr(submodel, "MIN_TOKENS_KEPT", 10**6)
    assert_close(found, model(torch.tensor([ROWS[0]]), preference=["a", "b"]).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_an_expert_without_a_prompt_joins_one_whose_prompt_is_kept(model, monkeypatch):
    ids = torch.tensor([ROWS[0]])
    model(ids, preference=["e0"])
    found = model(ids, preference=["e0", "e2"]).logits
    monkeypatch.setattr(submodel, "MIN_TOKENS_KEPT", 10**6)
    assert_close(found, model(ids, preference=["e0", "e2"]).logits, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (2, 0), (0, 3), (1, 1)])
def test_the_pcm_reads_what_it_would_read_without_kept_descriptions(model, kind, left, right, monkeypatch):
    """However they are padded."""
    torch.nn.init.normal_(model.pcm.head.weight)
    given = [[5, 6, 7, 8, 9], [-1, -1, -1, 11, 12] if left else [11, 12, -1, -1, -1], [5, 6, 7, 8, 9]]
    options = {"preference_ids": torch.tensor([[-1] * left + ids + [-1] * right for ids in given])}
    alpha = []
    for threshold in (1, 1, 10**6):
        monkeypatch.setattr(submodel, "MIN_TOKENS_KEPT", threshold)
        cache = PCMEnsembleCache(model.config, kind, 8)
        first = model(**left_pad(ROWS), **options, past_key_values=cache).expert_weights
        alpha.append(torch.cat([first, model(torch.tensor([[1]] * 3), past_key_values=cache).expert_weights], dim=1))
    mask = torch.cat([left_pad(ROWS)["attention_mask"], torch.ones(3, 1)], dim=1)[..., None]
    for found in alpha[:2]:
        assert_close(found * mask, alpha[2] * mask, atol=1e-5, rtol=0)


@torch.no_grad()
def test_descriptions_are_read_once_until_the_pcm_learns_and_the_last_ones_used_are_kept(model, monkeypatch):
    monkeypatch.setattr(submodel, "MOST_TOKENS_KEPT", 4)  # two of these
    shapes, ids = shapes_read(model.pcm.body), torch.tensor([ROWS[0]])
    for description in ([5, 6, 7], [8, 9, 10], [5, 6, 7], [11, 12, 13], [5, 6, 7]):
        model(ids, preference_ids=torch.tensor([description]))
    assert shapes == [(1, 2), (1, 6), (1, 2), (1, 6), (1, 6), (1, 2), (1, 6), (1, 6)]
    model(ids, preference_ids=torch.tensor([[8, 9, 10]]))  # the one that was used the longest time ago is gone
    assert shapes[8:] == [(1, 2), (1, 6)]
    next(model.pcm.body.parameters()).mul_(2)
    model(ids, preference_ids=torch.tensor([[8, 9, 10]]))
    model(ids, preference_ids=torch.tensor([[8, 9, 10]]), output_hidden_states=True)  # of the whole text
    assert shapes[10:] == [(1, 2), (1, 6), (1, 8)]


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_of_any_optimizer_is_noticed(model, fused):
    torch.nn.init.normal_(model.pcm.head.weight)
    ids, options = torch.tensor([ROWS[0]]), {"preference_ids": torch.tensor([[5, 6, 7]])}
    with torch.no_grad():
        model(ids, **options)
    optimizer = torch.optim.AdamW(model.pcm.parameters(), lr=0.1, fused=fused)
    model(ids, **options, labels=ids).loss.backward()
    optimizer.step()
    with torch.no_grad():
        found = model(ids, **options).expert_weights
        model.forget_weights()
        assert_close(found, model(ids, **options).expert_weights)


def test_what_autocast_makes_is_not_kept(model):
    torch.nn.init.normal_(model.pcm.head.weight)
    ids, options = torch.tensor([ROWS[0]]), {"preference_ids": torch.tensor([[5, 6, 7]])}
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            model(ids, **options)
        found = model(ids, **options).expert_weights
        model.forget_weights()
        assert_close(found, model(ids, **options).expert_weights)


def test_a_pcm_that_learns_reads_its_descriptions_with_the_context(model):
    shapes, ids = shapes_read(model.pcm.body), torch.tensor([ROWS[0]])
    model(ids, preference_ids=torch.tensor([[5, 6, 7]]), labels=ids, use_cache=True).loss.backward()
    assert shapes == [(1, 8)]


def test_weights_made_in_inference_mode_are_kept_track_of(monkeypatch):
    monkeypatch.setattr(submodel, "MIN_TOKENS_KEPT", 1)
    with torch.inference_mode():
        model = make_ensemble([tiny_llama(1)], [(0, [5, 6, 7], [51])])
        first = model(torch.tensor([ROWS[0]])).logits
        assert_close(model(torch.tensor([ROWS[0]])).logits, first, atol=1e-5, rtol=0)
    with torch.no_grad():
        assert_close(model(torch.tensor([ROWS[0]])).logits, first, atol=1e-5, rtol=0)


@torch.no_grad()
def test_threads_that_read_and_drop_texts_at_once_do_not_disturb_one_another(model, monkeypatch):
    monkeypatch.setattr(submodel, "MOST_TOKENS_KEPT", 5100)
    torch.nn.init.normal_(model.pcm.head.weight)
    ids = torch.tensor([ROWS[0]])
    descriptions = [torch.tensor([[5 + number, 6, 7]]) for number in range(60)]
    expected = [model(ids, preference_ids=description).expert_weights for description in descriptions]
    model.pcm.submodel.store.states |= {
        (None, (-number,)): [] for number in range(5000)
    }  # so that counting takes long

    @torch.no_grad()  # which is each thread's own
    def ask(number: int):
        number %= len(descriptions)
        return model(ids, preference_ids=descriptions[number]).expert_weights - expected[number]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            differences = list(pool.map(ask, range(300)))
    finally:
        sys.setswitchinterval(interval)
    assert torch.stack(differences).abs().max() < 1e-5


@torch.no_grad()
def test_a_prompt_is_read_again_where_an_adapter_was_switched_off_or_a_hook_put_on(tmp_path, monkeypatch):
    monkeypatch.setattr(submodel, "MIN_TOKENS_KEPT", 1)
    backbone = PeftModel.from_pretrained(tiny_llama(1), peft_adapter(tmp_path / "a", tiny_llama(1), 1)).eval()
    model, ids = make_ensemble([backbone.merge_and_unload()], [(0, TEXTS[0], [51])]), torch.tensor([ROWS[0]])
    model.backbones[0].load_adapter(peft_adapter(tmp_path / "b", tiny_llama(1), 2))
    with_adapter = model(ids, preference="e0").logits
    model.backbones[0].disable_adapters()
    without = model(ids, preference="e0").logits
    assert not torch.allclose(with_adapter, without, atol=1e-3)
    monkeypatch.setattr(submodel, "MIN_TOKENS_KEPT", 10**6)
    assert_close(model(ids, preference="e0").logits, without, atol=1e-4, rtol=0)

    monkeypatch.setattr(submodel, "MIN_TOKENS_KEPT", 1)
    model.backbones[0].model.layers[0].register_forward_hook(lambda module, args, output: output + 1)
    steered = model(ids, preference="e0").logits
    monkeypatch.setattr(submodel, "MIN_TOKENS_KEPT", 10**6)
    assert_close(model(ids, preference="e0").logits, steered, atol=1e-4, rtol=0)
