"""Static caches with torch.compile: the tokens of a dynamic cache, and nothing compiled again after a warm-up."""

import copy

import pytest
import torch
from conftest import left_pad, tiny_gpt2, tiny_llama
from test_lora import lora_ensemble, peft_adapter
from transformers import CompileConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # PEFT's
ROWS = [[21, 22, 23, 24, 25], [31, 32, 33], [41, 42, 43, 44]]
COMPILED = {
    "cache_implementation": "static",
    "compile_config": CompileConfig(dynamic=True, mode="default", fullgraph=True),  # a break in a graph is an error
}


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    """Adapters on a Llama and a GPT-2."""
    folder, backbone = tmp_path_factory.mktemp("adapters"), tiny_llama(1)
    adapters = {name: peft_adapter(folder / name, backbone, seed) for seed, name in enumerate("abc")}
    return lora_ensemble(backbone, adapters, d=tiny_gpt2(2))


def greedy(model, rows: list[list[int]], preference, tokens: int = 6, **options) -> list[list[int]]:
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False} | options
    return model.generate(**left_pad(rows), preference=preference, **settings).tolist()


@pytest.fixture(scope="module")
def warm(ensemble):
    """Every submodel's step for one row and for several, which is all that there is to compile."""
    for rows in (ROWS[:1], ROWS[:2]):
        for preference in ("a", ["a", "b", "d"]):
            greedy(ensemble, rows, preference, tokens=3, **COMPILED)
    return ensemble


@pytest.fixture
def nothing_compiles():
    torch.compiler.set_stance("fail_on_recompile")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("preference", ["b", ["c", "a"], {"a": 0.5, "d": 2.0}, ["a", "b", "c", "d"]], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("tokens", [5, 40])
def test_other_preferences_rows_and_lengths_run_what_is_compiled(warm, nothing_compiles, preference, rows, tokens):
    found = greedy(warm, ROWS[:rows], preference, tokens, **COMPILED)
    assert found == greedy(warm, ROWS[:rows], preference, tokens)


def test_a_preference_for_each_row_and_beams(warm, nothing_compiles):
    preferences = [{"a": 1.0}, {"b": 1.0, "c": 0.5}, {"d": 1.0}]
    assert greedy(warm, ROWS, preferences, **COMPILED) == greedy(warm, ROWS, preferences)
    assert greedy(warm, ROWS, ["a", "d"], num_beams=3, **COMPILED) == greedy(warm, ROWS, ["a", "d"], num_beams=3)


def test_a_copy_does_not_run_the_originals_code(warm):
    other = copy.deepcopy(warm)
    other.backbones[0].lm_head.weight.data.neg_()
    found = greedy(other, ROWS[:2], "a", **COMPILED)
    assert found == greedy(other, ROWS[:2], "a")
    assert found != greedy(warm, ROWS[:2], "a")
