"""Experts of unlike architectures in one ensemble: attention, state spaces, both in one model, an adapter, prompts."""

import pytest
import torch
from conftest import left_pad, make_ensemble, reference, tiny_gpt2, tiny_llama
from peft import LoraConfig, get_peft_model
from test_lora import peft_adapter
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    FalconMambaConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from modeling_pcm_ensemble import PCMEnsembleForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # PEFT's
SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
CACHE = "cache_implementation"
ROWS = [[21, 22, 23, 24, 25], [31, 32, 33], [41, 42, 43, 44]]
WEIGHTS = [[1.0, 0.5, 2.0, 1.0], [0.0, 0.0, 1.0, 0.3], [1.0, 1.0, 0.0, 0.0]]


def tiny(model_class, config_class, seed: int, **options):
    torch.manual_seed(seed)
    return model_class(config_class(**SIZES | TOKENS | options)).eval()


def mamba2(seed: int) -> Mamba2ForCausalLM:
    return tiny(Mamba2ForCausalLM, Mamba2Config, seed, state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=4)


def lfm2(seed: int) -> Lfm2ForCausalLM:
    """Short convolutions and attention by turns."""
    return tiny(Lfm2ForCausalLM, Lfm2Config, seed, full_attn_idxs=[1], block_multiple_of=8, **ATTENTION)


def qwen3_next(seed: int) -> Qwen3NextForCausalLM:
    """Gated delta rule and attention by turns, with a mixture of experts of its own."""
    heads = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    heads |= {"linear_value_head_dim": 8, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    return tiny(
        Qwen3NextForCausalLM, Qwen3NextConfig, seed, shared_expert_intermediate_size=16, **heads | experts | ATTENTION
    )


def falcon_h1(seed: int) -> FalconH1ForCausalLM:
    """A state space and attention side by side in each layer."""
    state = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4}
    return tiny(FalconH1ForCausalLM, FalconH1Config, seed, **state | ATTENTION)


@pytest.fixture
def unlike() -> PCMEnsembleForCausalLM:
    experts = [(0, [], [11]), (1, [5, 6], [12, 13]), (2, [7, 8, 9], [14]), (3, [4], [15])]
    return make_ensemble([tiny_llama(1), mamba2(2), lfm2(3), qwen3_next(4)], experts)


def greedy(model, inputs, tokens: int = 6, **options) -> list[list[int]]:
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False} | options
    return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()


def by_hand(model, row: list[int], weights: list[float], steps: int = 6) -> list[int]:
    context = list(row)
    for _ in range(steps):
        log_probs = reference(model, context, weights)["log_probs"][-1]
        log_probs[2] = float("-inf")  # `min_new_tokens` forbids the end
        context.append(int(log_probs.argmax()))
    return context[len(row) :]


def test_padded_rows_under_different_weights_give_the_mixture_by_hand(unlike):
    inputs = left_pad(ROWS)
    output = unlike(**inputs, preference=torch.tensor(WEIGHTS))
    for i, (row, weights) in enumerate(zip(ROWS, WEIGHTS)):
        expected = reference(unlike, row, weights)["log_probs"]
        assert_close(output.logits[i, -len(row) :], expected, atol=1e-4, rtol=1e-3)
    expected = [by_hand(unlike, row, weights) for row, weights in zip(ROWS, WEIGHTS)]
    assert greedy(unlike, inputs, preference=torch.tensor(WEIGHTS)) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"prefill_chunk_size": 2},
        {CACHE: "static"},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_modes_of_generation_give_what_they_give_without_a_cache(unlike, options):
    inputs = {"input_ids": torch.tensor([ROWS[0] + ROWS[0]])}
    weights = torch.tensor(WEIGHTS[:1])
    torch.manual_seed(0)
    found = greedy(unlike, inputs, preference=weights, **options)
    torch.manual_seed(0)
    uncached = {name: value for name, value in options.items() if name not in ("prefill_chunk_size", CACHE)}
    assert found == greedy(unlike, inputs, preference=weights, use_cache=False, **uncached)


DRAFTS = [{"assistant_model": tiny_llama(9)}, {"prompt_lookup_num_tokens": 2}]


@pytest.mark.parametrize("draft", DRAFTS, ids=["model", "lookup"])
def test_drafts_are_taken_back_where_every_expert_can_forget(draft):
    model = make_ensemble([tiny_llama(1), lfm2(3)], [(0, [], [11]), (1, [5], [12]), (1, [7, 8], [13])])
    inputs = {"input_ids": torch.tensor([ROWS[0] + ROWS[0]])}
    assert greedy(model, inputs, **draft) == greedy(model, inputs)


@pytest.mark.parametrize("draft", DRAFTS, ids=["model", "lookup"])
def test_drafts_are_refused_where_one_cannot(unlike, draft):
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        greedy(unlike, {"input_ids": torch.tensor([ROWS[0]])}, **draft)


def test_a_chat_goes_on_from_its_cache(unlike):
    weights, turn = torch.tensor(WEIGHTS[:1]), [51, 52, 53]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    first = unlike.generate(torch.tensor(ROWS[:1]), preference=weights, return_dict_in_generate=True, **options)
    context = torch.tensor([first.sequences[0].tolist() + turn])
    second = unlike.generate(context, past_key_values=first.past_key_values, **options)
    assert second.tolist() == unlike.generate(context, preference=weights, **options).tolist()


def test_padding_that_a_state_would_fade_over_is_refused(unlike):
    weights, options = torch.tensor(WEIGHTS[:2]), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with pytest.raises(ValueError, match="recurrent state cannot leave out padding"):
        unlike.generate(**left_pad([ROWS[0], [31, 32]]), preference=weights, prefill_chunk_size=2, **options)
    inputs = left_pad([ROWS[0], ROWS[0]])
    first = unlike.generate(**inputs, preference=weights, return_dict_in_generate=True, **options)
    turns = torch.cat([first.sequences, torch.tensor([[51, 52], [50, 53]])], dim=1)
    mask = torch.ones_like(turns)
    mask[1, -2] = 0
    cache = first.past_key_values
    with pytest.raises(ValueError, match="Continue rows of one length"):
        unlike.generate(turns, attention_mask=mask, past_key_values=cache, **options)
    # What was refused has left no trace
    found = unlike.generate(turns, past_key_values=cache, **options)
    assert found.tolist() == unlike.generate(turns, preference=weights, **options).tolist()


@pytest.mark.parametrize("make", [mamba2, lfm2, falcon_h1], ids=lambda make: make.__name__)
def test_rows_that_read_the_same_long_text_are_each_themselves(make):
    """Where that saves work, it is read once, and its keys and values copied."""
    model = make_ensemble([make(2)], [(0, [], [11]), (0, [5], [12])])
    text = torch.tensor([[5 + i % 80 for i in range(50)]])
    one = greedy(model, {"input_ids": text}, preference=torch.ones(1, 2))
    assert greedy(model, {"input_ids": text.repeat(12, 1)}, preference=torch.ones(12, 2)) == one * 12


def test_peft_on_a_recurrent_pcm_keeps_its_cache():
    model = PCMEnsembleForCausalLM.from_experts({"a": tiny_llama(1), "b": tiny_gpt2(2)}, pcm=mamba2(5))
    torch.nn.init.normal_(model.pcm.head.weight)
    model.pcm.body = get_peft_model(model.pcm.body, LoraConfig(r=2, target_modules=["in_proj"]))
    inputs = left_pad(ROWS[:2])
    assert greedy(model, inputs, tokens=12) == greedy(model, inputs, tokens=12, use_cache=False)


def test_long_prompts_of_padded_rows_are_read_row_by_row_where_a_state_would_fade():
    """Prompts are else encoded once, and the context's padding would come behind them."""
    prompts = [[5 + i % 40 for i in range(80)], [9 + i % 50 for i in range(80)]]
    model = make_ensemble([falcon_h1(2)], [(0, prompts[0], [11]), (0, prompts[1], [12])])
    rows = [ROWS[i % 3] for i in range(12)]
    output = model(**left_pad(rows))
    for i in (0, 1, 11):
        expected = reference(model, rows[i], [1.0, 1.0])["log_probs"]
        assert_close(output.logits[i, -len(rows[i]) :], expected, atol=1e-3, rtol=1e-3)


def test_an_adapter_and_full_checkpoints_share_an_ensemble_that_is_saved(tmp_path):
    backbone = tiny_llama(1)
    experts = {
        "adapter": {"model": backbone, "adapter": peft_adapter(tmp_path / "adapter", backbone, 1)},
        "plain": backbone,
        "mamba": mamba2(2),
        "gpt2": tiny_gpt2(3),
    }
    model = PCMEnsembleForCausalLM.from_experts(experts, pcm=mamba2(5), pcm_layers=1)
    torch.nn.init.normal_(model.pcm.head.weight)
    inputs = left_pad(ROWS[:2])
    expected = greedy(model, inputs)
    assert expected == greedy(model, inputs, use_cache=False)
    model.save_pretrained(tmp_path / "ensemble")
    assert greedy(PCMEnsembleForCausalLM.from_pretrained(tmp_path / "ensemble"), inputs) == expected


@pytest.mark.parametrize("config_class", [MambaConfig, FalconMambaConfig])
def test_state_spaces_that_take_no_second_text_are_refused(config_class):
    model = AutoModelForCausalLM.from_config(config_class(**SIZES | TOKENS, state_size=8))
    with pytest.raises(ValueError, match="does not run with a mask, positions and a cache"):
        PCMEnsembleForCausalLM.from_experts({"a": model}, pcm=tiny_llama(2))
