"""
Experts that real servers serve, vLLM's and llama.cpp's, beside the same ones here. `VLLM_PYTHON` names a Python with
vLLM: tests/vllm_plugin/run has one.
"""

import contextlib
import itertools
import os
import re

import pytest
import torch
from torch.testing import assert_close

from benchmarks.endpoints import LONGEST, serve_by_llamacpp, serve_by_vllm
from modeling_pcm_ensemble import PCMEnsembleForCausalLM, demo

VLLM_PYTHON = os.environ.get("VLLM_PYTHON")
pytestmark = pytest.mark.real_model

SERVED = ("friendly", "concise")
PREFERENCES = [
    {"elementary": 1.0, "friendly": 1.0},
    {"friendly": 1.0},
    {"concise": 2.0, "friendly": 0.5},
    {"elementary": 1.0, "friendly": 0.5, "concise": 0.5},
]
QUESTIONS = [
    f"{verb} {thing}."
    for verb, thing in itertools.product(
        ["Explain", "Tell me about", "Write a poem on", "Name two facts on"],
        ["gravity", "bread", "the sea", "chess", "Paris"],
    )
]


@pytest.fixture(scope="module", params=["vllm", "llamacpp"])
def served_specs(request, tmp_path_factory):
    """Who serves two adapters on SmolLM2, by expert."""
    folder = tmp_path_factory.mktemp(request.param)
    with contextlib.ExitStack() as running:
        if request.param == "llamacpp":
            pytest.importorskip("xllamacpp")
            yield serve_by_llamacpp(SERVED, folder, running, slots=20)  # one for each of the twenty prompts
        elif VLLM_PYTHON is None:
            pytest.skip("VLLM_PYTHON names no Python with vLLM")
        else:
            yield serve_by_vllm(VLLM_PYTHON, SERVED, folder, running, max_logprobs=-1)


def ensembles(specs: dict[str, dict], top_k: int | None, **options) -> list[PCMEnsembleForCausalLM]:
    """Two experts served, and the same here; both with one PCM, of random opinions."""
    smollm2, names = demo.fetch_smollm2(), ("elementary", *SERVED)
    local = {name: {"model": smollm2, "adapter": str(demo.ARTIFACTS / name)} for name in names}
    told = {"timeout": 120.0, "top_logprobs": top_k or 49152}
    elsewhere = local | {name: told | spec for name, spec in specs.items()}

    models = []
    for experts in (elsewhere, local):
        model = PCMEnsembleForCausalLM.from_experts(
            experts, pcm=smollm2, pcm_layers=4, dtype=torch.float32, expert_top_k=top_k, **options
        )
        torch.nn.init.normal_(model.pcm.head.weight, std=0.05, generator=torch.Generator().manual_seed(0))
        models.append(model)
    return models


def chats(model: PCMEnsembleForCausalLM, questions: list[str]) -> dict:
    conversations = [[{"role": "user", "content": question}] for question in questions]
    return dict(
        model.tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
    )


def test_the_whole_vocabulary_is_told_and_the_mixture_is_that_of_local_experts(served_specs):
    served, local = ensembles(served_specs, top_k=None)
    inputs = chats(served, QUESTIONS[:4]) | {"preference": PREFERENCES, "logits_to_keep": 1}
    with torch.no_grad():
        assert_close(served(**inputs).logits, local(**inputs).logits, atol=1e-3, rtol=0)


def test_twenty_prompts_are_answered_by_the_same_greedy_tokens(served_specs):
    served, local = ensembles(served_specs, top_k=20)
    inputs = chats(served, QUESTIONS) | {"preference": PREFERENCES * 5, "max_new_tokens": 5, "do_sample": False}
    assert len(QUESTIONS) == 20
    assert torch.equal(served.generate(**inputs), local.generate(**inputs))
    usage = served.endpoint_usage[next(iter(served.endpoint_usage))]
    assert (usage.prompts, usage.failed_tries) == (101, 0)  # one to try it


@pytest.mark.parametrize(
    ("options", "rows"),
    [({"num_beams": 3}, 1), ({}, 8)],
    ids=["beams", "batch"],
)
def test_modes_of_generate_give_what_local_experts_give(served_specs, options, rows):
    answers = []
    for model in ensembles(served_specs, top_k=20):
        inputs = chats(model, QUESTIONS[:rows]) | {"preference": (PREFERENCES * 2)[:rows]}
        torch.manual_seed(0)
        answers.append(model.generate(**inputs, **{"do_sample": False, "max_new_tokens": 5} | options))
    assert torch.equal(*answers)


def test_a_product_with_a_reference_here_is_that_of_local_experts(served_specs):
    answers = []
    for model in ensembles(served_specs, top_k=20, merge="product", reference="elementary"):
        inputs = chats(model, QUESTIONS[:2]) | {"preference": [{"friendly": 1.0, "concise": 0.5}, {"concise": 1.5}]}
        answers.append(model.generate(**inputs, do_sample=False, max_new_tokens=5))
    assert torch.equal(*answers)


def test_a_model_or_a_context_that_the_server_does_not_have_is_an_error_that_says_so(served_specs):
    spec = dict(served_specs["friendly"])
    options = {"pcm": demo.fetch_smollm2(), "pcm_layers": 1, "tokenizer": demo.fetch_smollm2(), "expert_top_k": 20}
    model = PCMEnsembleForCausalLM.from_experts({"friendly": spec}, **options)
    with pytest.raises(ValueError, match=str(LONGEST - 1)):
        model.generate(torch.full((1, LONGEST), 40), max_new_tokens=1)

    if "served_model" in spec:
        with pytest.raises(Exception, match=re.compile("does not exist|not found|404", re.IGNORECASE)):
            PCMEnsembleForCausalLM.from_experts({"rude": spec | {"served_model": "rude"}}, **options)
