"""What vLLM answers equals what `generate` answers, token by token, whatever the engine does to requests."""

from dataclasses import replace

import pytest
import torch
from conftest import REFERENCES, ask, check_equal, engine, metric, references
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaForCausalLM
from vllm.sampling_params import StructuredOutputsParams

MIXTURES = ["probabilities", "top-k", "logits", "qwen2", "zeroed"]
ADDITIVE = ["product", "product-top-k", "reference", "adapters", "adapters-and-a-prompt"]
PROMPTED = ["prompted", "prompted-product", "bos"]


@pytest.mark.parametrize("name", [*MIXTURES, *ADDITIVE, *PROMPTED])
def test_requests_of_mixed_preferences_in_one_batch_are_answered_as_by_generate(name):
    asked = references(name)
    assert len(asked) == 24
    with engine(name) as llm:
        check_equal(ask(llm, asked), asked)


@pytest.mark.parametrize("name", ["probabilities", "logits", "product"])
def test_one_expert_under_a_repetition_penalty_writes_what_its_model_writes(name):
    """ "plain" is the backbone itself. A penalty divides logits above 0 and multiplies those below."""
    asked = [replace(reference, extra_args={"preference": "plain"}) for reference in references(name)[::3]]
    with engine(name) as llm:
        answers = ask(llm, asked, repetition_penalty=1.3)

    model = LlamaForCausalLM.from_pretrained(REFERENCES / "parts" / name / "backbone")
    model.generation_config.eos_token_id = None
    for answer, reference in zip(answers, asked, strict=True):
        prompt = torch.tensor([reference.prompt])
        told = {"do_sample": False, "max_new_tokens": 12, "repetition_penalty": 1.3}
        assert answer.outputs[0].token_ids == model.generate(prompt, **told)[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("name", ["probabilities", "prompted"])
def test_what_is_read_behind_prefixes_is_attended_to_by_the_fast_kernel(name):
    asked = references(name)
    with engine(name) as llm, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        check_equal(ask(llm, asked), asked)


@pytest.mark.parametrize("name", ["smollm2-probabilities", "smollm2-adapters"])
def test_the_real_ensemble_is_answered_as_by_generate(name):
    asked = references(name)
    with engine(name) as llm:
        check_equal(ask(llm, asked), asked)


@pytest.mark.parametrize("name", ["probabilities", "product", "adapters", "prompted"])
def test_chunks_and_cached_prefixes_change_nothing(name):
    asked = references(name)
    with engine(name, max_num_batched_tokens=100, block_size=32) as llm:
        check_equal(ask(llm, asked), asked)
        first = metric(llm, "prefix_cache_hits")
        check_equal(ask(llm, asked), asked)
        assert metric(llm, "prefix_cache_hits") > first


@pytest.mark.parametrize("name", ["probabilities", "adapters"])
def test_preempted_requests_go_on_as_they_were(name):
    asked = [reference for reference in references(name) if len(reference.prompt) == 64]
    few = {"max_model_len": 96, "block_size": 32, "num_gpu_blocks_override": 7}
    with engine(name, **few, enable_prefix_caching=False) as llm:
        check_equal(ask(llm, asked), asked)
        assert metric(llm, "num_preemptions") > 0


@pytest.mark.parametrize("name", ["probabilities", pytest.param("adapters", marks=pytest.mark.slow)])
def test_two_processes_that_share_every_layer_answer_the_same(name, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    asked = references(name)
    with engine(name, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        check_equal(ask(llm, asked), asked)


def test_one_slot_serves_requests_for_one_expert():
    asked = [reference for reference in references("probabilities") if reference.extra_args == {"preference": "kind"}]
    assert asked
    with engine("probabilities", additional_config={"expert_slots": 1}) as llm:
        check_equal(ask(llm, asked), asked)


@pytest.mark.parametrize("name", ["probabilities", "adapters", pytest.param("product", marks=pytest.mark.slow)])
def test_compiled_steps_answer_the_same(name):
    asked = references(name)
    with engine(name, enforce_eager=False) as llm:
        check_equal(ask(llm, asked), asked)


@pytest.mark.parametrize("name", ["probabilities", "product", "adapters"])
def test_prompts_are_scored_as_by_forward(name):
    asked = references(name)[:9]
    with engine(name, enable_prefix_caching=False) as llm:
        answers = ask(llm, asked, prompt_logprobs=0, max_tokens=1)
    for answer, reference in zip(answers, asked, strict=True):
        found = [entry[token].logprob for entry, token in zip(answer.prompt_logprobs[1:], reference.prompt[1:])]
        assert found == pytest.approx(reference.prompt_logprobs, abs=1e-4)


def test_a_grammar_finds_its_tokens_beyond_what_experts_keep():
    choices = ["zebra", "quick"]
    grammar = {"structured_outputs": StructuredOutputsParams(choice=choices), "ignore_eos": False}
    with engine("top-k") as llm:
        answers = ask(llm, references("top-k")[:6], max_tokens=16, **grammar)
    assert all(answer.outputs[0].text in choices for answer in answers)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_experts_count_survives_16_bits(dtype):
    asked = references("product")
    with engine("product", dtype=dtype) as llm:
        answers = ask(llm, asked, max_tokens=1)
    for answer, reference in zip(answers, asked, strict=True):
        [(token, found)] = list(answer.outputs[0].logprobs[0].items())[:1]
        assert found.logprob == pytest.approx(reference.next[token], abs=0.2), reference.extra_args
