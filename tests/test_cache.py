"""PCMEnsembleCache: what one model's cache can do, over the rows of every part."""

import copy

import pytest
import torch
from conftest import left_pad, reference
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from modeling_pcm_ensemble import PCMEnsembleCache

ROWS = [[21, 22, 23, 24, 25], [31, 32, 33], [41, 42, 43, 44]]
WEIGHTS = [[1.0, 0.5, 0.0, 0.0, 2.0, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0, 0.0], [1.0] * 6]


@pytest.fixture
def cache(mixed) -> PCMEnsembleCache:
    with torch.no_grad():
        return mixed(**left_pad(ROWS), preference=torch.tensor(WEIGHTS)).past_key_values


def check_next_tokens(model, cache, rows: list[int], length: int = 5):
    """The cache's row i holds `ROWS[rows[i]]`, under the preference of that row."""
    inputs = left_pad(ROWS)
    mask = torch.cat([inputs["attention_mask"][rows][:, :length], torch.ones(len(rows), 1)], dim=1)
    with torch.no_grad():
        logits = model(torch.full((len(rows), 1), 50), attention_mask=mask, past_key_values=cache).logits
    for i, row in enumerate(rows):
        kept = [t for t, m in zip(inputs["input_ids"][row, :length].tolist(), mask[i].tolist()) if m]
        expected = reference(model, [*kept, 50], WEIGHTS[row])["log_probs"][-1]
        assert_close(logits[i, 0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rows", [[1, 0, 2], [2, 2, 0], [1, 1, 1]], ids=str)
def test_reordered_rows_go_on_as_those_rows(mixed, cache, rows):
    cache.reorder_cache(torch.tensor(rows))
    check_next_tokens(mixed, cache, rows)


def test_repeated_rows_go_on_as_those_rows(mixed, cache):
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 6
    check_next_tokens(mixed, cache, [0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize("rows", [[1], [2, 0]], ids=str)
def test_selected_rows_go_on_as_those_rows_and_parts_without_rows_are_dropped(mixed, cache, rows):
    cache.batch_select_indices(torch.tensor(rows))
    assert set(cache.backbones) == ({1} if rows == [1] else {0, 1, 2, 3})
    check_next_tokens(mixed, cache, rows)


@torch.no_grad()
@pytest.mark.parametrize("kind", [("static", 8, None), ("quantized", None, {"backend": "fp8"})], ids=lambda k: k[0])
def test_rows_of_other_kinds_of_caches_are_selected_too(prompted, kind):
    caches = [PCMEnsembleCache(prompted.config, *kind) for _ in range(2)]
    for cache in caches:
        prompted(torch.tensor([ROWS[0]] * 3), preference=[["e0"], ["e1", "e2"], ["e2"]], past_key_values=cache)
    whole = prompted(torch.tensor([[50], [51], [52]]), past_key_values=caches[0]).logits
    caches[1].batch_select_indices(torch.tensor([2, 0]))
    selected = prompted(torch.tensor([[52], [50]]), past_key_values=caches[1]).logits
    assert_close(selected, whole[[2, 0]], atol=1e-5, rtol=1e-5)


def test_a_cropped_cache_goes_on_from_the_tokens_left(prompted):
    with torch.no_grad():
        cache = prompted(torch.tensor([[21, 22, 23, 24], [31, 32, 33, 34]]), preference=[["e0"], ["e1", "e2"]])
        cache = cache.past_key_values
        cache.crop(-2)
        assert cache.get_seq_length() == 2
        logits = prompted(torch.tensor([[50], [51]]), past_key_values=cache).logits
    assert_close(logits[0, 0], reference(prompted, [21, 22, 50], [1.0, 0, 0])["log_probs"][-1], atol=1e-4, rtol=0)
    assert_close(logits[1, 0], reference(prompted, [31, 32, 51], [0, 1.0, 1.0])["log_probs"][-1], atol=1e-4, rtol=0)


def test_lengths_count_the_context_without_prefixes(mixed, cache):
    assert cache.get_seq_length() == 5
    assert cache.get_max_length() == -1
    assert cache.batch_size == 3
    assert PCMEnsembleCache(mixed.config).get_seq_length() == 0


def test_a_reset_cache_starts_over_under_another_preference(mixed, cache):
    cache.reset()
    with torch.no_grad():
        logits = mixed(torch.tensor([[21, 22]]), past_key_values=cache, preference="e1").logits
    assert_close(logits[0], reference(mixed, [21, 22], [0, 1.0, 0, 0, 0, 0])["log_probs"], atol=1e-4, rtol=0)


def test_a_cache_of_other_rows_is_refused(mixed, cache):
    with pytest.raises(ValueError, match="`past_key_values` has 3 rows, but `input_ids` has 1"):
        mixed(torch.tensor([[21]]), past_key_values=cache)


def test_cropping_rows_padded_on_the_right_is_refused(prompted):
    ids, mask = torch.tensor([[21, 22, 23], [31, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    with torch.no_grad():
        cache = prompted(ids, attention_mask=mask, preference=["e0", "e1"]).past_key_values
    with pytest.raises(ValueError, match="padded on the right cannot be cropped"):
        cache.crop(-1)
    assert cache.get_seq_length() == 3


def test_a_kind_of_cache_that_there_is_not_is_refused(mixed):
    with pytest.raises(ValueError, match="got 'statik'"):
        PCMEnsembleCache(mixed.config, "statik")
    with pytest.raises(ValueError, match="A static cache needs `max_length`"):
        PCMEnsembleCache(mixed.config, "static")


@torch.no_grad()
def test_copies_of_a_cache_grow_apart_and_cropped_ones_grow_again(prompted):
    def step(cache, token: int) -> torch.Tensor:
        return prompted(torch.tensor([[token]]), past_key_values=cache).logits[0, 0]

    cache = prompted(torch.tensor([[21, 22, 23]])).past_key_values
    step(cache, 24)
    copied = copy.deepcopy(cache)
    step(cache, 25)
    step(copied, 35)
    cache.crop(-1)
    step(cache, 45)
    for end, expected in ((cache, [21, 22, 23, 24, 45, 50]), (copied, [21, 22, 23, 24, 35, 50])):
        assert_close(step(end, 50), reference(prompted, expected, [1.0] * 3)["log_probs"][-1], atol=1e-4, rtol=0)


def test_a_cache_goes_on_outside_inference_mode_and_with_gradients(prompted):
    with torch.inference_mode():
        cache = prompted(torch.tensor([[21, 22]])).past_key_values
        prompted(torch.tensor([[23]]), past_key_values=cache)
    with torch.no_grad():
        prompted(torch.tensor([[24]]), past_key_values=cache)
    logits = prompted(torch.tensor([[25]]), past_key_values=cache).logits[0, 0]
    assert_close(logits, reference(prompted, [21, 22, 23, 24, 25], [1.0] * 3)["log_probs"][-1], atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_step_writes_into_the_room_that_an_earlier_one_made(prompted):
    cache = prompted(torch.tensor([[21, 22, 23]])).past_key_values
    places = []
    for token in range(4):
        prompted(torch.tensor([[token + 5]]), past_key_values=cache)
        places.append(cache.backbones[0].cache.layers[0].keys.data_ptr())
    assert len(set(places)) == 1


def test_a_failed_call_leaves_an_empty_cache_empty(mixed):
    cache = PCMEnsembleCache(mixed.config)

    def fail(*_):
        raise MemoryError

    mixed.backbones[0].register_forward_hook(fail)
    with pytest.raises(MemoryError):
        mixed(torch.tensor([[50]]), past_key_values=cache, preference="e0")
    assert cache.route is None


def test_a_failed_generate_leaves_an_empty_cache_empty(mixed):
    cache = PCMEnsembleCache(mixed.config)

    def fail(*_):
        raise MemoryError

    hook = mixed.backbones[0].register_forward_hook(fail)
    with pytest.raises(MemoryError):
        mixed.generate(torch.tensor([[50, 51]]), past_key_values=cache, preference="e0", max_new_tokens=2)
    hook.remove()
    options = {"preference": "e0", "max_new_tokens": 4, "do_sample": False}
    found = mixed.generate(torch.tensor([[50, 51]]), past_key_values=cache, **options)
    assert found.tolist() == mixed.generate(torch.tensor([[50, 51]]), **options).tolist()


@torch.no_grad()
def test_a_reweighted_cache_goes_on_at_the_new_weights_and_for_the_same_experts_alone(prompted):
    ids, weights = torch.tensor([[21, 22, 23]]), [1.0, 3.0, 0.0]
    cache = prompted(ids, preference=["e0", "e1"]).past_key_values
    cache.reweight(torch.tensor([weights]))
    assert cache.preferences[0].label == "e0=1 + e1=3"
    logits = prompted(torch.tensor([[50]]), past_key_values=cache).logits[0]
    expected = reference(prompted, [21, 22, 23, 50], weights)["log_probs"][-1:]
    assert_close(logits, expected, atol=1e-4, rtol=0)
    for wrong in ([[1.0, 1.0, 1.0]], [[1.0, 0.0, 0.0]], [[1.0, float("inf"), 0.0]], [[1.0, 1.0]]):
        with pytest.raises(ValueError, match="above 0 for the experts that each row runs"):
            cache.reweight(torch.tensor(wrong))


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (2, ValueError, "must be from -4, which is all that is cached, to 0, got 2"),
        (-5, ValueError, "must be from -4, which is all that is cached, to 0, got -5"),
        ("-1", TypeError, "`tokens_to_remove` must be `int`"),
    ],
)
@torch.no_grad()
def test_a_crop_that_cannot_be_is_refused_and_leaves_no_trace(prompted, tokens, error, message):
    cache = prompted(torch.tensor([[21, 22, 23, 24]]), preference="e0").past_key_values
    with pytest.raises(error, match=message):
        cache.crop(tokens)
    logits = prompted(torch.tensor([[50]]), past_key_values=cache).logits
    expected = reference(prompted, [21, 22, 23, 24, 50], [1.0, 0, 0])["log_probs"][-1]
    assert_close(logits[0, 0], expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_static_cache_is_not_cropped_and_goes_on(prompted):
    cache = PCMEnsembleCache(prompted.config, "static", 8)
    prompted(torch.tensor([[21, 22]]), preference="e0", past_key_values=cache)
    with pytest.raises(ValueError, match="A static cache cannot be cropped"):
        cache.crop(-1)
    logits = prompted(torch.tensor([[50]]), past_key_values=cache).logits
    assert_close(logits[0, 0], reference(prompted, [21, 22, 50], [1.0, 0, 0])["log_probs"][-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("change", ["crop", "reorder_cache"])
@torch.no_grad()
def test_a_change_that_broke_off_is_not_gone_on_with(prompted, change, monkeypatch):
    cache = prompted(torch.tensor([[21, 22]] * 2), preference="e0").past_key_values

    def break_off(*_):
        raise MemoryError

    monkeypatch.setattr(cache.layers[-1], change, break_off)
    with pytest.raises(MemoryError):
        getattr(cache, change)({"crop": -1, "reorder_cache": torch.tensor([1, 0])}[change])
    with pytest.raises(RuntimeError, match="The last call with this cache failed on its way"):
        prompted(torch.tensor([[50]] * 2), past_key_values=cache)


@torch.no_grad()
def test_a_copy_of_a_cache_is_of_the_same_ensemble(prompted):
    cache = prompted(torch.tensor([[21, 22]]), preference="e0").past_key_values
    joined = PCMEnsembleCache.join([cache, copy.deepcopy(cache)])
    logits = prompted(torch.tensor([[50], [50]]), past_key_values=joined).logits
    assert_close(logits[1], logits[0], atol=1e-6, rtol=0)


@torch.no_grad()
def test_weights_that_are_no_tensor_are_refused(prompted):
    cache = prompted(torch.tensor([[21, 22]]), preference=["e0", "e1"]).past_key_values
    with pytest.raises(TypeError, match="`weights` must be"):
        cache.reweight([[3.0, 1.0, 0.0]])


@pytest.mark.parametrize("field", ["prompt_ids", "description_ids"])
@torch.no_grad()
def test_a_text_that_began_under_another_prompt_is_not_gone_on_with(prompted, field):
    cache = prompted(torch.tensor([[21, 22]]), preference="e0").past_key_values
    prompted.config.experts[0][field] = [71, 72]
    with pytest.raises(ValueError, match="filled by other experts"):
        prompted(torch.tensor([[50]]), past_key_values=cache)
    prompted.config.experts[0][field].append(73)
    cache = prompted(torch.tensor([[21, 22]]), preference="e0").past_key_values
    prompted.config.experts[0][field].append(74)
    with pytest.raises(ValueError, match="filled by other experts"):
        prompted(torch.tensor([[50]]), past_key_values=cache)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # PEFT's
def test_gradients_pass_through_cached_steps_whose_keys_need_none(prompted):
    """Attention keeps keys for the queries' gradients, and the next step must not write behind them."""
    torch.nn.init.normal_(prompted.pcm.head.weight)
    prompted.pcm.body = get_peft_model(
        prompted.pcm.body, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    cache, loss = PCMEnsembleCache(prompted.config), 0.0
    for token in range(21, 26):
        output = prompted(torch.tensor([[token]]), preference=["e0", "e1"], past_key_values=cache)
        loss = loss + output.logits[0, -1, 7]
    loss.backward()
    gradients = [p.grad for name, p in prompted.pcm.body.named_parameters() if "lora_A" in name]
    assert gradients
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
