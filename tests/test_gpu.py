"""What a GPU runs in another way than a CPU: moved models, CUDA graphs, training. Skipped where there is none."""

import copy

import pytest
import torch
from conftest import left_pad, tiny_gpt2, tiny_llama
from test_lora import lora_ensemble, peft_adapter
from test_training import make_trainer
from transformers import CompileConfig

from modeling_pcm_ensemble import PCMEnsembleCache

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),  # PEFT's
]
ROWS = [[21, 22, 23, 24, 25], [31, 32, 33], [41, 42, 43, 44]]
PREFERENCES = ["b", ["c", "a"], [{"a": 1.0}, {"b": 1.0, "c": 0.5}, {"d": 1.0}]]
COMPILED = {"cache_implementation": "static", "compile_config": CompileConfig(dynamic=True, fullgraph=True)}


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    """Adapters on a Llama and a GPT-2, on the GPU."""
    folder, backbone = tmp_path_factory.mktemp("adapters"), tiny_llama(1)
    adapters = {name: peft_adapter(folder / name, backbone, seed) for seed, name in enumerate("abc")}
    return lora_ensemble(backbone, adapters, d=tiny_gpt2(2)).cuda()


def greedy(model, preference, rows=ROWS, tokens: int = 6, **options) -> list[list[int]]:
    inputs = {name: tensor.to(model.device) for name, tensor in left_pad(rows).items()}
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False} | options
    return model.generate(**inputs, preference=preference, **settings).tolist()


@pytest.mark.parametrize("preference", PREFERENCES, ids=str)
def test_tokens_are_those_of_the_cpu(ensemble, preference):
    assert greedy(ensemble, preference) == greedy(copy.deepcopy(ensemble).cpu(), preference)


def test_cuda_graphs_give_the_tokens_of_eager_steps(ensemble):
    for rows in (1, 3):
        for preference in ("a", ["a", "b", "d"]):
            greedy(ensemble, preference, ROWS[:rows], **COMPILED)
    torch.compiler.set_stance("fail_on_recompile")
    try:
        for preference in PREFERENCES:
            for rows, tokens in ((3, 6), (3, 30)):
                expected = greedy(ensemble, preference, ROWS[:rows], tokens)
                assert greedy(ensemble, preference, ROWS[:rows], tokens, **COMPILED) == expected
    finally:
        torch.compiler.set_stance("default")
    assert all(submodel.compiled_step.compiles for submodel in ensemble.submodels)


@torch.no_grad()
def test_what_a_step_gives_is_not_written_over_by_the_next(ensemble):
    step = ensemble.get_compiled_call(CompileConfig(dynamic=True))
    ids = torch.tensor([ROWS[0]], device="cuda")
    cache, found = PCMEnsembleCache(ensemble.config, "static", 32), []
    ensemble(ids, preference=["a", "b"], past_key_values=cache)
    for token in range(7, 15):
        output = step(torch.tensor([[token]], device="cuda"), past_key_values=cache, output_expert_logits=True)
        found.append([entry.logits for entry in output.expert_logits])
    ids = torch.cat([ids, torch.arange(7, 15, device="cuda")[None]], dim=1)
    whole = ensemble(ids, preference=["a", "b"], output_expert_logits=True).expert_logits
    for place, logits in enumerate(found):
        for one, entry in zip(logits, whole):
            torch.testing.assert_close(one[:, 0], entry.logits[:, len(ROWS[0]) + place], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "bfloat16"])
def test_training_changes_the_pcm_alone(tmp_path, precision):
    trainer = make_trainer(tmp_path, use_cpu=False, max_steps=3, **precision)
    before = {name: tensor.clone() for name, tensor in trainer.ensemble.state_dict().items()}
    assert trainer.ensemble.device.type == "cuda"
    trainer.train()
    changed = {name for name, value in trainer.ensemble.state_dict().items() if not torch.equal(value, before[name])}
    assert "pcm.head.weight" in changed
    assert all(name.startswith("pcm.") and "embed_tokens" not in name for name in changed)
