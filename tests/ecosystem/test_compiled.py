"""Static caches with torch.compile: the tokens of a dynamic cache, and nothing compiled again after a warm-up."""

import copy
import gc
import os
import pickle
import random
import signal
import threading
import time
from itertools import count

import pytest
import torch
from conftest import left_pad, tiny_gpt2, tiny_llama, tiny_mistral, tiny_qwen2
from test_lora import lora_ensemble, peft_adapter
from transformers import CompileConfig, GemmaConfig, GemmaForCausalLM

from modeling_pcm_ensemble import PCMEnsembleCache, PCMEnsembleForCausalLM, demo
from modeling_pcm_ensemble.compile_blocks import find_blocks

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # PEFT's
ROWS = [[21, 22, 23, 24, 25], [31, 32, 33], [41, 42, 43, 44]]
COMPILED = {
    "cache_implementation": "static",
    "compile_config": CompileConfig(dynamic=True, mode="default", fullgraph=True),  # a break in a graph is an error
}
TRACED = COMPILED | {"compile_config": CompileConfig(dynamic=True, backend="eager", fullgraph=True)}  # a shorter wait


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    """Adapters on a Llama and a GPT-2."""
    folder, backbone = tmp_path_factory.mktemp("adapters"), tiny_llama(1)
    adapters = {name: peft_adapter(folder / name, backbone, seed) for seed, name in enumerate("abc")}
    return lora_ensemble(backbone, adapters, d=tiny_gpt2(2))


def tiny_gemma(seed: int) -> GemmaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 12,
    }
    return GemmaForCausalLM(GemmaConfig(vocab_size=99, num_hidden_layers=2, **sizes)).eval()


def greedy(model, rows: list[list[int]], preference, tokens: int = 6, **options) -> list[list[int]]:
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False} | options
    return model.generate(**left_pad(rows), preference=preference, **settings).tolist()


@pytest.fixture(scope="module")
def warm(ensemble):
    """Every submodel's step for one row and for several, which is all that there is to compile."""
    torch.compiler.reset()  # sizes that others have compiled would count as ones that vary
    for rows in (ROWS[:1], ROWS[:2]):
        for preference in ("a", ["a", "b", "d"]):
            greedy(ensemble, rows, preference, tokens=3, **COMPILED)
    for submodel in ensemble.submodels:
        assert submodel.compiled_step.has_run == {True: True, False: True}
        assert submodel.compiled_step.compiles
    return ensemble


@pytest.fixture
def nothing_compiles(caplog):
    torch.compiler.set_stance("fail_on_recompile")
    yield
    torch.compiler.set_stance("default")
    assert "does not compile" not in caplog.text  # what would have run uncompiled


@pytest.mark.parametrize("preference", ["b", ["c", "a"], {"a": 0.5, "d": 2.0}, ["a", "b", "c", "d"]], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("tokens", [5, 40])
def test_other_preferences_rows_and_lengths_run_what_is_compiled(warm, nothing_compiles, preference, rows, tokens):
    found = greedy(warm, ROWS[:rows], preference, tokens, **COMPILED)
    assert found == greedy(warm, ROWS[:rows], preference, tokens)


def test_two_hundred_requests_compile_nothing_again(warm, nothing_compiles):
    choice = random.Random(0)
    for number in range(200):
        lengths = [choice.randint(1, 40) for _ in range(choice.randint(1, 6))]
        rows = [[choice.randrange(5, 60) for _ in range(length)] for length in lengths]
        preference = {name: choice.uniform(0.1, 3) for name in choice.sample("abcd", choice.randint(1, 4))}
        tokens = choice.randint(2, 8)
        found = greedy(warm, rows, preference, tokens, **COMPILED)
        if number % 10 == 0:
            assert found == greedy(warm, rows, preference, tokens)


def test_each_row_may_have_a_preference_of_its_own(warm, nothing_compiles):
    preferences = [{"a": 1.0}, {"b": 1.0, "c": 0.5}, {"d": 1.0}]
    assert greedy(warm, ROWS, preferences, **COMPILED) == greedy(warm, ROWS, preferences)


@torch.no_grad()
def test_requests_that_join_run_what_is_compiled(warm, nothing_compiles):
    caches, step = [], warm.get_compiled_call(COMPILED["compile_config"])
    for row, preference in zip(ROWS, ("a", ["b", "d"], ["a", "c"])):
        caches.append(PCMEnsembleCache(warm.config))
        warm(torch.tensor([row]), preference=preference, past_key_values=caches[-1])
    tokens, eager = torch.tensor([[7], [8], [9]]), PCMEnsembleCache.join(caches)
    joined = PCMEnsembleCache.join(caches, room=2)
    torch.testing.assert_close(
        step(tokens, past_key_values=joined).logits, warm(tokens, past_key_values=eager).logits, atol=1e-4, rtol=1e-4
    )
    kept = torch.tensor([2, 0])
    for cache in (joined, eager):
        cache.batch_select_indices(kept)
    torch.testing.assert_close(
        step(tokens[kept], past_key_values=joined).logits,
        warm(tokens[kept], past_key_values=eager).logits,
        atol=1e-4,
        rtol=1e-4,
    )


def test_beams_are_not_compiled_as_in_transformers(ensemble):
    model = copy.deepcopy(ensemble)
    assert greedy(model, ROWS, ["a", "d"], num_beams=3, **COMPILED) == greedy(model, ROWS, ["a", "d"], num_beams=3)
    assert model.backbones.submodels[0].compiled_step is None


def test_threads_do_not_read_each_others_adapters_while_one_compiles(ensemble):
    model = copy.deepcopy(ensemble)
    expected = {name: greedy(model, ROWS[:2], name) for name in "ab"}
    found, done = [], threading.Event()

    def eagerly():
        while not done.is_set():
            found.append(greedy(model, ROWS[:2], "b"))

    thread = threading.Thread(target=eagerly)
    thread.start()
    try:
        assert greedy(model, ROWS[:2], "a", **TRACED) == expected["a"]
    finally:
        done.set()
        thread.join()
    assert found
    assert all(tokens == expected["b"] for tokens in found)


def test_adapters_that_come_later_are_compiled_in(tmp_path):
    """To a backbone whose step is compiled already, in one ensemble and in another that shares it."""
    backbone = tiny_llama(1)
    model = PCMEnsembleForCausalLM.from_experts({"plain": backbone, "other": tiny_gpt2(2)}, pcm=tiny_llama(3))
    model.generation_config.eos_token_id = None
    plain = greedy(model, ROWS[:2], "plain", **TRACED)
    adapter = peft_adapter(tmp_path / "a", backbone, 1)
    model.add_expert("adapted", {"model": backbone, "adapter": adapter})
    found = greedy(model, ROWS[:2], "adapted", **TRACED)
    assert found == greedy(model, ROWS[:2], "adapted") != plain
    second = lora_ensemble(backbone, {"b": peft_adapter(tmp_path / "b", backbone, 2)})
    assert greedy(second, ROWS[:2], "b", **TRACED) == greedy(second, ROWS[:2], "b") != found
    assert greedy(model, ROWS[:2], "adapted", **TRACED) == found


def test_a_compiled_model_is_pickled_and_a_users_config_stays(ensemble):
    config = CompileConfig(mode="default")
    model = copy.deepcopy(ensemble)
    expected = greedy(model, ROWS[:1], "d", cache_implementation="static", compile_config=config)
    assert config._compile_all_devices is None
    assert greedy(pickle.loads(pickle.dumps(model)), ROWS[:1], "d") == expected


def test_a_copy_does_not_run_the_originals_code(warm):
    other = copy.deepcopy(warm)
    other.backbones[0].lm_head.weight.data.neg_()
    found = greedy(other, ROWS[:2], "a", **COMPILED)
    assert found == greedy(other, ROWS[:2], "a")
    assert found != greedy(warm, ROWS[:2], "a")


def test_weights_that_change_in_place_are_compiled_anew(ensemble):
    """Packed weights are constants of the compiled code: a backbone's, and an adapter's."""
    model = copy.deepcopy(ensemble)
    before = greedy(model, ROWS[:1], "a", **COMPILED)
    with torch.no_grad():
        model.backbones[0].lm_head.weight.neg_()
    negated = greedy(model, ROWS[:1], "a", **COMPILED)
    assert negated == greedy(model, ROWS[:1], "a") != before
    with torch.no_grad():
        for tensor in model.backbones.bank_of("a").tensors("a").values():
            tensor.mul_(5)
    stronger = greedy(model, ROWS[:1], "a", **COMPILED)
    assert stronger == greedy(model, ROWS[:1], "a") != negated
    model.backbones[0].lm_head.weight = torch.nn.Parameter(-model.backbones[0].lm_head.weight, requires_grad=False)
    assert greedy(model, ROWS[:1], "a", **COMPILED) == greedy(model, ROWS[:1], "a") != stronger
    model.backbones[0].lm_head.weight.data.neg_()
    model.forget_weights()
    assert greedy(model, ROWS[:1], "a", **COMPILED) == stronger


def test_weights_that_change_are_packed_once(ensemble):
    """What changes again and again, as in training, must not add a packed copy each time, nor keep the first."""

    def packed() -> int:
        gc.collect()
        return sum(issubclass(type(held), torch.Tensor) and held.layout == torch._mkldnn for held in gc.get_objects())

    model, numbers = copy.deepcopy(ensemble).to(demo.fast_dtype()), [packed()]
    for _ in range(3):
        assert greedy(model, ROWS[:1], "a", tokens=2, **COMPILED)
        numbers.append(packed())
        with torch.no_grad():
            for part in (model.pcm.body, model.backbones[0]):
                next(part.parameters()).mul_(2)
    assert numbers[0] < numbers[1]
    assert numbers[2] == numbers[3] == numbers[0]  # what was packed of weights that have changed is freed


def test_a_backbone_that_does_not_compile_runs_uncompiled(ensemble, caplog):
    model = copy.deepcopy(ensemble)
    model.backbones[1].transformer.h[0].mlp.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    expected = greedy(model, ROWS[:2], ["a", "d"])
    with caplog.at_level("WARNING", logger="modeling_pcm_ensemble"):
        assert greedy(model, ROWS[:2], ["a", "d"], **TRACED) == expected
        assert greedy(model, ROWS[:1], "d", **TRACED) == greedy(model, ROWS[:1], "d")
    warnings = [record.message for record in caplog.records if "does not compile" in record.message]
    assert len(warnings) == 1
    assert warnings[0].startswith("GPT2LMHeadModel does not compile")


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_part_that_is_replaced_is_compiled_anew(backend):
    torch.compiler.reset()
    model = PCMEnsembleForCausalLM.from_experts({"a": tiny_llama(1), "b": tiny_gpt2(2)}, pcm=tiny_llama(3))
    model.generation_config.eos_token_id = None
    options = COMPILED | {"compile_config": CompileConfig(backend=backend)}
    before = greedy(model, ROWS[:1], ["a", "b"], **options)
    model.backbones.add_module("0", tiny_llama(7).eval())
    found = greedy(model, ROWS[:1], ["a", "b"], **options)
    assert found == greedy(model, ROWS[:1], ["a", "b"]) != before


@torch.no_grad()
def test_a_call_that_asks_for_compiled_steps_notices_changed_weights():
    torch.compiler.reset()
    model = PCMEnsembleForCausalLM.from_experts({"a": tiny_llama(1), "b": tiny_gpt2(2)}, pcm=tiny_llama(3))

    def step(**options):
        cache = PCMEnsembleCache(model.config, "static", 8)
        model(torch.tensor(ROWS[:1]), past_key_values=cache)
        return model(torch.tensor([[9]]), past_key_values=cache, **options).logits

    step(compile_config=CompileConfig())
    model.backbones[0].model.layers[0].self_attn.v_proj.weight.mul_(3)
    torch.testing.assert_close(step(compile_config=CompileConfig()), step(), atol=1e-4, rtol=1e-4)


def test_adapters_of_another_ensemble_leave_compiled_weights_alone(tmp_path):
    torch.compiler.reset()
    backbone = tiny_llama(1)
    model = lora_ensemble(backbone, {"a": peft_adapter(tmp_path / "a", backbone, 1)})
    expected = greedy(model, ROWS[:1], "a", **COMPILED)
    lora_ensemble(backbone, {"b": peft_adapter(tmp_path / "b", backbone, 2)})
    assert greedy(model, ROWS[:1], "a", **COMPILED) == expected
    assert not model.backbones.submodels[0].weights_change


def test_a_killed_warm_up_leaves_nothing_broken(ensemble):
    model = copy.deepcopy(ensemble)

    def interrupt(signal_number, frame):
        if frame.f_code.co_name == "gc_callback":  # Hypothesis has one, and Python swallows what a callback raises
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            raise KeyboardInterrupt

    def kill():
        while model.pcm.submodel.compiled_step is None:
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGALRM)

    previous = signal.signal(signal.SIGALRM, interrupt)
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            greedy(model, ROWS[:2], ["a", "d"], **COMPILED)
    finally:
        killer.join()
        signal.signal(signal.SIGALRM, previous)
    assert not model.pcm.submodel.compiled_step.has_run[False]  # it was compiling
    expected = greedy(model, ROWS[:2], ["a", "d"])
    assert greedy(model, ROWS[:2], ["a", "d"], **COMPILED) == expected
    assert model.backbones.submodels[0].compiled_step.has_run[False]


def test_a_context_beyond_a_static_cache_is_refused(ensemble):
    cache = PCMEnsembleCache(ensemble.config, "static", 6)
    ensemble(torch.tensor(ROWS[:1]), preference="a", past_key_values=cache)
    with pytest.raises(ValueError, match="8 tokens is too long for `past_key_values`, a static cache of 6"):
        ensemble(torch.tensor([[1, 2, 3]]), past_key_values=cache)


def test_layers_that_are_alike_are_compiled_once(warm):
    for submodel in warm.submodels:
        assert submodel.compiled_step.blocks is not None
    assert warm.backbones.submodels[0].compiled_step.blocks.packed[0]


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2, tiny_mistral, tiny_gpt2, tiny_gemma])
def test_common_models_layers_are_alike(make):
    assert find_blocks(make(1), None) is not None


def fail_at_layer(number: int, blocks):
    """Let a layer that is compiled for all be one that does not compile, the next time that it is called."""
    call, calls = blocks.call, count()

    def call_or_fail(*args):
        if next(calls) == number:
            raise torch._dynamo.exc.Unsupported("a test")
        return call(*args)

    blocks.call = call_or_fail


def test_a_model_whose_first_layer_does_not_compile_for_all_is_compiled_whole():
    torch.compiler.reset()
    model = PCMEnsembleForCausalLM.from_experts({"a": tiny_llama(1)}, pcm=tiny_llama(2))
    expected = greedy(model, ROWS, "a", **TRACED)
    step = model.backbones.submodels[0].compiled_step
    fail_at_layer(0, step.blocks)
    for _ in range(2):
        assert greedy(model, ROWS, "a", **TRACED) == expected
        assert model.backbones.submodels[0].compiled_step is step  # and it is not tried again
        assert step.blocks is None
        assert step.compiles


def test_a_step_that_fails_half_way_is_not_run_twice():
    torch.compiler.reset()
    model = PCMEnsembleForCausalLM.from_experts({"a": tiny_llama(1)}, pcm=tiny_llama(2))
    expected = greedy(model, ROWS, "a", **TRACED)
    fail_at_layer(1, model.backbones.submodels[0].compiled_step.blocks)
    with pytest.raises(RuntimeError, match="Begin this answer anew"):
        greedy(model, ROWS, "a", **TRACED)
    assert greedy(model, ROWS, "a", **TRACED) == expected


def test_layers_are_compiled_as_one_again_after_training():
    torch.compiler.reset()
    model = PCMEnsembleForCausalLM.from_experts({"a": tiny_llama(1)}, pcm=tiny_llama(2))
    model.backbones[0].train()
    greedy(model, ROWS, "a", **TRACED)
    assert model.backbones.submodels[0].compiled_step.blocks is None
    model.backbones[0].eval()
    greedy(model, ROWS, "a", **TRACED)
    assert model.backbones.submodels[0].compiled_step.blocks is not None


def test_layers_that_are_not_alike_are_compiled_one_by_one():
    expert = tiny_llama(1, num_hidden_layers=3)
    expert.model.layers[1].self_attn.scaling *= 2
    model = PCMEnsembleForCausalLM.from_experts({"a": expert}, pcm=tiny_llama(2))
    assert greedy(model, ROWS, "a", **TRACED) == greedy(model, ROWS, "a")
    assert find_blocks(expert.eval(), None) is None
    assert model.backbones.submodels[0].compiled_step.blocks is None
    assert model.backbones.submodels[0].compiled_step.compiles


def test_layers_that_ask_the_cache_for_more_are_compiled_with_the_model():
    def ask(module, args, kwargs):
        kwargs["past_key_values"].get_seq_length(0)  # a layer that is compiled for all has its own part alone

    expert = tiny_llama(1)
    for layer in expert.model.layers:
        layer.register_forward_pre_hook(ask, with_kwargs=True)
    model = PCMEnsembleForCausalLM.from_experts({"a": expert}, pcm=tiny_llama(2))
    assert greedy(model, ROWS, "a", **TRACED) == greedy(model, ROWS, "a")
    assert model.backbones.submodels[0].compiled_step.blocks is None
    assert model.backbones.submodels[0].compiled_step.compiles


def hook_of_its_own(layer, number: int):
    layer.mlp.register_forward_hook(lambda module, inputs, output: output * (1 + number))


def forward_of_its_own(layer, number: int):
    forward = layer.mlp.forward
    layer.mlp.forward = lambda hidden_states: forward(hidden_states) * (1 + number)


def attribute_of_its_own(layer, number: int):
    layer.self_attn.scaling *= 1 + number


@pytest.mark.parametrize("change", [hook_of_its_own, forward_of_its_own, attribute_of_its_own])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_layer_has_of_its_own_is_run(change, when):
    """Also where it comes after the layers were compiled as one."""
    torch.compiler.reset()
    expert = tiny_llama(1)
    model = PCMEnsembleForCausalLM.from_experts({"a": expert}, pcm=tiny_llama(2))
    before = greedy(model, ROWS, "a", 12, **(TRACED if when == "after" else {}))
    for number, layer in enumerate(expert.model.layers):
        change(layer, 3 * number)
    assert greedy(model, ROWS, "a", 12, **TRACED) == greedy(model, ROWS, "a", 12) != before


def test_an_adapter_of_pefts_that_is_switched_off_is_off_in_compiled_steps(tmp_path):
    torch.compiler.reset()
    expert = tiny_llama(1)
    model = PCMEnsembleForCausalLM.from_experts({"a": expert}, pcm=tiny_llama(2))
    expert.load_adapter(peft_adapter(tmp_path / "a", tiny_llama(1), 1))
    expert.eval()
    on = greedy(model, ROWS, "a", 12, **TRACED)
    expert.disable_adapters()
    assert greedy(model, ROWS, "a", 12, **TRACED) == greedy(model, ROWS, "a", 12) != on


def test_dropout_is_run_in_training_alone():
    torch.compiler.reset()
    expert = tiny_gpt2(1, resid_pdrop=0.5)
    model = PCMEnsembleForCausalLM.from_experts({"a": expert}, pcm=tiny_llama(2))
    expected = greedy(model, ROWS, "a")
    expert.train()
    greedy(model, ROWS, "a", **TRACED)
    expert.eval()
    assert greedy(model, ROWS, "a", **TRACED) == expected


def test_a_heads_own_hooks_are_run():
    torch.compiler.reset()
    expert = tiny_llama(1)
    model = PCMEnsembleForCausalLM.from_experts({"a": expert}, pcm=tiny_llama(2))
    before = greedy(model, ROWS, "a", **COMPILED)
    expert.lm_head.register_forward_pre_hook(lambda module, inputs: (-inputs[0],))
    assert greedy(model, ROWS, "a", **COMPILED) == greedy(model, ROWS, "a") != before


def test_a_step_that_asks_for_gradients_gets_them():
    torch.compiler.reset()
    model = PCMEnsembleForCausalLM.from_experts({"a": tiny_llama(1), "d": tiny_gpt2(2)}, pcm=tiny_llama(3))
    cache = PCMEnsembleCache(model.config, "static", 8)
    call = model.get_compiled_call(CompileConfig(dynamic=True, backend="eager"))
    with torch.no_grad():
        model(torch.tensor(ROWS[:1]), preference=["a", "d"], past_key_values=cache)
    call(torch.tensor([[7]]), past_key_values=cache).logits[0, 0, 5].backward()
    assert model.pcm.body.layers[1].mlp.down_proj.weight.grad is not None


def test_biases_are_added_to_packed_products():
    torch.compiler.reset()
    expert = tiny_qwen2(1)
    with torch.no_grad():
        for layer in expert.model.layers:
            layer.self_attn.q_proj.bias.normal_()
    model = PCMEnsembleForCausalLM.from_experts({"a": expert}, pcm=tiny_llama(2))
    assert greedy(model, ROWS, "a", 12, **COMPILED) == greedy(model, ROWS, "a", 12)
    assert model.backbones.submodels[0].compiled_step.blocks.packed[0]


def test_weights_packed_and_not_give_the_same_step(ensemble):
    model = copy.deepcopy(ensemble)
    packed = greedy(model, ROWS, ["a", "b"], **COMPILED)
    unpacked = {"compile_config": CompileConfig(dynamic=True, mode=None, options={"freezing": False})}
    assert greedy(model, ROWS, ["a", "b"], **COMPILED | unpacked) == packed == greedy(model, ROWS, ["a", "b"])
