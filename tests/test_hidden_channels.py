"""
What a call depends on stands in its signature. Where that cannot be (docs/architecture.md has the list), the test here
fails when the reason is gone.
"""

import inspect
import subprocess
import sys
from contextvars import ContextVar

import pytest
import torch
from conftest import make_ensemble, tiny_gpt2, tiny_llama
from test_lora import lora_ensemble, peft_adapter
from transformers import CompileConfig, GenerationMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_pcm_ensemble import PCMEnsembleCache
from modeling_pcm_ensemble.lora import _traced

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # PEFT's
COMPILED = {"cache_implementation": "static", "compile_config": CompileConfig(backend="eager")}


def test_importing_the_package_hooks_no_optimizer():
    code = (
        "import modeling_pcm_ensemble; from torch.optim.optimizer import _global_optimizer_post_hooks as hooks; "
        "assert not hooks, hooks"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("options", [{}, COMPILED], ids=["eager", "compiled"])
def test_a_users_models_get_no_attributes(tmp_path, options):
    """Their layers get hooks while an ensemble has adapters on them; nothing else of them is new or another."""

    def attributes() -> list[dict[str, int]]:
        modules = [module for model in (backbone, other) for module in model.modules()]
        return [{name: id(value) for name, value in vars(module).items()} for module in modules]

    torch.compiler.reset()
    backbone, other = tiny_llama(1).eval(), tiny_gpt2(2).eval()
    before = attributes()
    model = lora_ensemble(backbone, {"a": peft_adapter(tmp_path / "a", backbone, 1)}, b=other)
    for preference in ("a", ["a", "b"]):
        model.generate(torch.tensor([[21, 22]]), preference=preference, max_new_tokens=3, do_sample=False, **options)
    assert attributes() == before


def test_a_model_hands_none_of_its_arguments_to_its_layers():
    """Or adapters could be one, in place of the context variable in lora.py."""
    seen = []
    model = tiny_llama(1)
    model.model.layers[0].self_attn.q_proj.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs), with_kwargs=True
    )
    model(torch.tensor([[5]]), adapter_selection=object())
    assert seen == [{}]


def test_the_compiler_traces_no_context_variable():
    """Or hooks could read it in traced code too, without `_traced` in lora.py."""
    torch.compiler.reset()
    variable = ContextVar("variable", default=1.0)
    step = torch.compile(lambda x: x * variable.get(), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        step(torch.ones(2))


def test_nothing_of_a_traced_step_stays(tmp_path):
    torch.compiler.reset()
    backbone = tiny_llama(1)
    model = lora_ensemble(backbone, {"a": peft_adapter(tmp_path / "a", backbone, 1)})
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    expected = model.generate(torch.tensor([[21, 22]]), preference="a", **options)
    found = model.generate(torch.tensor([[21, 22]]), preference="a", **options, **COMPILED)
    assert found.tolist() == expected.tolist()
    assert model.backbones.submodels[0].compiled_step.compiles
    assert (_traced.is_step, _traced.bank, _traced.masks) == (False, None, [])


def test_nothing_of_a_traced_step_that_failed_stays(tmp_path):
    torch.compiler.reset()
    backbone = tiny_llama(1)
    model = lora_ensemble(backbone, {"a": peft_adapter(tmp_path / "a", backbone, 1)})
    cache = PCMEnsembleCache(model.config, "static", 8)
    model(torch.tensor([[21, 22]]), past_key_values=cache)

    @torch.compiler.disable
    def fail(*_):
        raise MemoryError

    backbone.lm_head.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        model(torch.tensor([[23]]), past_key_values=cache, compile_config=CompileConfig(backend="eager"))
    assert (_traced.is_step, _traced.bank, _traced.masks) == (False, None, [])


def test_a_fused_optimizer_does_not_count_what_it_writes():
    """Or no hook on optimizers would be needed, see weight_changes.py. Without the package, which registers it."""
    code = """
import torch
weight = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.AdamW([weight], fused=True)
weight.sum().backward()
before = weight._version
optimizer.step()
assert weight._version == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_attention_is_chosen_by_the_configuration_alone():
    """Or a step could be given its own, without compile_attention.py setting it for a while."""
    called = []

    def attention(module, query, key, value, *args, **kwargs):
        called.append(module)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("test_attention", attention)
    model = tiny_llama(1)
    model(torch.tensor([[5]]), attn_implementation="test_attention")
    assert not called
    model.config._attn_implementation = "test_attention"
    model(torch.tensor([[5]]))
    assert called


def test_a_models_attention_is_as_it_was_after_a_compiled_step():
    torch.compiler.reset()
    model = make_ensemble([tiny_llama(1)], [(0, [], [11])])
    before = [part.config._attn_implementation for part in (model.pcm.body, *model.backbones)]
    model.generate(torch.tensor([[21, 22]]), max_new_tokens=3, do_sample=False, **COMPILED)
    assert [part.config._attn_implementation for part in (model.pcm.body, *model.backbones)] == before


def test_generate_prepares_a_length_and_a_cache_without_a_word_between_them():
    """Or what generation.py notes on `generate`'s copy of the generation configuration could be an argument."""
    prepared = inspect.signature(GenerationMixin._prepare_cache_for_generation).parameters
    assert set(prepared) == {
        "self",
        "generation_config",
        "model_kwargs",
        "generation_mode",
        "batch_size",
        "max_cache_length",
    }
