"""Rows of several caches in one: every request reads what it would read alone, whoever comes and goes."""

import pytest
import torch
from conftest import left_pad, make_ensemble, tiny_gpt2, tiny_llama, tiny_mistral
from test_lora import lora_ensemble, peft_adapter
from torch.testing import assert_close

from modeling_pcm_ensemble import PCMEnsembleCache

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # PEFT's
REQUESTS = [
    ([21, 22, 23, 24, 25], [1.0, 0.5, 0.0]),
    ([31, 32], [0.0, 0.0, 1.0]),
    ([41, 42, 43, 44, 45, 46, 47], [0.0, 2.0, 0.3]),
    ([51, 52, 53], [1.0, 1.0, 1.0]),
]
TOKENS = [61, 62, 63, 64, 65, 66, 67, 68]  # what every row goes on with


@pytest.fixture(params=["prompts", "adapters", "product", "added adapters"])
def model(request, tmp_path):
    if request.param == "prompts":
        experts = [(0, [5, 6, 7], [11, 12]), (0, [], [13]), (1, [8], [14, 15, 16])]
        return make_ensemble([tiny_llama(1), tiny_gpt2(2)], experts)
    backbone = tiny_llama(1)
    adapters = {name: peft_adapter(tmp_path / name, backbone, seed) for seed, name in enumerate("abc")}
    model = lora_ensemble(backbone, adapters)
    merges = {"adapters": "probabilities", "product": "product", "added adapters": "adapters"}
    model.config.merge = merges[request.param]
    return model


def alone(model, index: int, tokens: int) -> torch.Tensor:
    """Log-probabilities after the request's prompt and each of its first tokens, without a cache."""
    prompt, weights = REQUESTS[index]
    ids = torch.tensor([prompt + TOKENS[:tokens]])
    return model(ids, preference=torch.tensor([weights])).logits[0, len(prompt) - 1 :]


def read(model, *indexes: int, static: bool = False) -> PCMEnsembleCache:
    cache = PCMEnsembleCache(model.config, "static", 9) if static else PCMEnsembleCache(model.config)
    weights = torch.tensor([REQUESTS[index][1] for index in indexes])
    model(**left_pad([REQUESTS[index][0] for index in indexes]), past_key_values=cache, preference=weights)
    return cache


@torch.no_grad()
@pytest.mark.parametrize("room", [None, 3], ids=["dynamic", "static"])
def test_requests_that_join_and_leave_read_what_they_would_alone(model, room):
    running, done = [0, 1], [0, 0]  # requests, and how many tokens each has read
    cache = read(model, 0, 1, static=room is not None)

    def step():
        tokens = torch.tensor([[TOKENS[number]] for number in done])
        found = model(tokens, past_key_values=cache).logits[:, -1]
        for row, index in enumerate(running):
            done[row] += 1
            assert_close(found[row], alone(model, index, done[row])[-1], atol=1e-4, rtol=1e-4)

    step()
    cache = PCMEnsembleCache.join([cache, read(model, 2)], room)
    running, done = [0, 1, 2], [*done, 0]
    step()
    cache.batch_select_indices(torch.tensor([1, 2]))
    running, done = [1, 2], done[1:]
    step()
    cache = PCMEnsembleCache.join([cache, read(model, 3, static=room is not None)], room)
    running, done = [1, 2, 3], [*done, 0]
    step()
    step()
    if room is not None:
        step()
        with pytest.raises(ValueError, match="a static cache of 12"):
            step()
        cache = PCMEnsembleCache.join([cache], room)
        step()


@torch.no_grad()
def test_columns_that_no_row_needs_are_left_out(model):
    cache = PCMEnsembleCache.join([read(model, 1), read(model, 2)])
    assert cache.get_seq_length() >= 7
    cache.batch_select_indices(torch.tensor([0]))
    trimmed = PCMEnsembleCache.join([cache])
    for memory, before in zip(trimmed.memories, cache.memories, strict=True):
        assert memory.cache.layers[0].keys.shape[2] == memory.length < before.length
        assert memory.attention_mask is None
    found = model(torch.tensor([TOKENS[:1]]), past_key_values=trimmed).logits[0, -1]
    assert_close(found, alone(model, 1, 1)[-1], atol=1e-4, rtol=1e-4)


def test_prefixes_do_not_count_as_context(model):
    prompt, weights = REQUESTS[2]
    cache = PCMEnsembleCache.join([read(model, 2)])
    assert cache.get_seq_length() == len(prompt)
    more, options = torch.tensor([prompt + TOKENS[:3]]), {"max_new_tokens": 4, "do_sample": False}
    found = model.generate(more, past_key_values=PCMEnsembleCache.join([cache], room=12), **options)
    assert found.tolist() == model.generate(more, preference=torch.tensor([weights]), **options).tolist()


@torch.no_grad()
def test_each_request_keeps_its_description():
    model = make_ensemble([tiny_llama(1)], [(0, [], [11, 12]), (0, [5], [13])])
    texts = [torch.tensor([71, 72, 73]), torch.tensor([74])]
    caches = [PCMEnsembleCache(model.config) for _ in texts]
    for text, cache in zip(texts, caches):
        model(torch.tensor([[21, 22]]), past_key_values=cache, preference_ids=text)
    found = model(torch.tensor([[23], [23]]), past_key_values=PCMEnsembleCache.join(caches)).logits[:, -1]
    for row, text in enumerate(texts):
        expected = model(torch.tensor([[21, 22, 23]]), preference_ids=text).logits[0, -1]
        assert_close(found[row], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_caches_without_room_for_padding_are_refused():
    sliding = make_ensemble([tiny_mistral(1)], [(0, [], [11])])
    full = make_ensemble([tiny_llama(1)], [(0, [], [11])])
    cache = PCMEnsembleCache(sliding.config)
    sliding(torch.tensor([[21, 22]]), past_key_values=cache)
    with pytest.raises(ValueError, match="dynamic and static caches of full attention"):
        PCMEnsembleCache.join([cache])
    for refused in ([], [PCMEnsembleCache(full.config)]):
        with pytest.raises(ValueError, match="one or more caches that one ensemble has filled"):
            PCMEnsembleCache.join(refused)
    with pytest.raises(ValueError, match="`room` must be at least 1"):
        PCMEnsembleCache.join([PCMEnsembleCache(full.config)], room=0)


def test_a_cache_that_some_submodels_have_read_further_than_others_is_refused_everywhere(model):
    ids = torch.tensor([REQUESTS[0][0]])
    cache = model(ids, preference=torch.tensor([REQUESTS[0][1]])).past_key_values

    def fail(*_):
        raise MemoryError

    hook = model.backbones[0].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        model(ids[:, :1], past_key_values=cache)
    hook.remove()

    uses = (
        lambda: model(ids[:, :1], past_key_values=cache),
        lambda: PCMEnsembleCache.join([cache]),
        lambda: cache.batch_select_indices(torch.tensor([0])),
        lambda: cache.reorder_cache(torch.tensor([0])),
        lambda: cache.crop(-1),
    )
    for use in uses:
        with pytest.raises(RuntimeError, match="failed on its way"):
            use()
