"""transformers' own tensor parallelism and FSDP2, in two processes that talk over gloo."""

import inspect
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import make_ensemble, tiny_gpt2, tiny_llama, tiny_qwen2
from test_lora import lora_ensemble, peft_adapter
from torch.testing import assert_close
from transformers import Phi3Config, Phi3ForCausalLM

from modeling_pcm_ensemble import PCMEnsembleForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # PEFT's
ROWS = [[21, 22, 23, 24, 25], [31, 32, 33, 34, 35]]
START = """
    import sys
    import torch
    from transformers.distributed import DistributedConfig
    from modeling_pcm_ensemble import PCMEnsembleForCausalLM

    def load(**split):
        return PCMEnsembleForCausalLM.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(**split))
"""


def launch(tmp_path, script: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a script in two processes."""
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(START) + textwrap.dedent(script))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=180)


def greedy(model) -> list[list[int]]:
    return model.generate(torch.tensor(ROWS), max_new_tokens=8, do_sample=False).tolist()


def adapted_ensemble(folder) -> PCMEnsembleForCausalLM:
    """Two adapters on one Llama, and a GPT-2."""
    backbone = tiny_llama(1)
    adapters = {name: peft_adapter(folder / name, backbone, seed) for seed, name in enumerate("ab")}
    return lora_ensemble(backbone, adapters, c=tiny_gpt2(2))


def test_tensor_parallel_backbones_give_the_tokens_of_one_process(tmp_path):
    experts = [(0, [], []), (0, [5, 6], [7]), (1, [], [8])]
    model = make_ensemble([tiny_llama(1), tiny_qwen2(3)], experts)
    model.save_pretrained(tmp_path / "ensemble")
    script = """
        model = load(tp_size=2)
        for part in (model.pcm.body, model.backbones[0].model, model.backbones[1].model):
            weight = part.layers[0].self_attn.q_proj.weight
            assert weight.to_local().shape[0] == weight.shape[0] // 2
        tokens = model.generate(torch.tensor(eval(sys.argv[2])), max_new_tokens=8, do_sample=False)
        assert tokens.tolist() == eval(sys.argv[3])
        try:
            model.add_expert("late", {"model": model.backbones[0]})
        except ValueError as error:
            assert "Tensor parallelism has split this ensemble" in str(error)
        else:
            raise AssertionError("an expert was added")
        torch.distributed.destroy_process_group()  # whose threads may else abort a process that ends
    """
    result = launch(tmp_path, script, str(tmp_path / "ensemble"), str(ROWS), str(greedy(model)))
    assert result.returncode == 0, result.stderr
    assert "match nothing" not in result.stderr


def test_tensor_parallelism_refuses_adapters(tmp_path):
    adapted_ensemble(tmp_path).save_pretrained(tmp_path / "ensemble")
    result = launch(tmp_path, "load(tp_size=2)", str(tmp_path / "ensemble"))
    assert "ValueError: Tensor parallelism splits layers that adapters are added to" in result.stderr


def test_tensor_parallelism_refuses_backbones_whose_plans_differ(tmp_path):
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    phi = Phi3ForCausalLM(Phi3Config(num_attention_heads=4, num_key_value_heads=2, **sizes))
    make_ensemble([tiny_llama(1), phi], [(0, [], []), (1, [], [])]).save_pretrained(tmp_path / "ensemble")
    result = launch(tmp_path, "load(tp_size=2)", str(tmp_path / "ensemble"))
    assert "split layers of one name in different ways: the backbones are llama, phi3" in result.stderr


def train(model, rows: torch.Tensor) -> list[float]:
    """Three steps on the PCM; also what each process runs, on its own row."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = model(rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_fsdp2_shards_every_part_and_trains_the_pcm_as_one_process(tmp_path):
    model = adapted_ensemble(tmp_path)
    model.save_pretrained(tmp_path / "ensemble")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    script = (
        inspect.getsource(train)
        + """
model = load(fsdp_size=2)
weight = model.backbones[0].model.layers[0].self_attn.q_proj.weight
assert weight.to_local().shape[0] == weight.shape[0] // 2
assert all(hasattr(parameter, "to_local") for parameter in model.parameters())
rows, rank = torch.tensor(eval(sys.argv[2])), torch.distributed.get_rank()
losses = train(model, rows[rank : rank + 1])
assert losses[-1] < losses[0]
tokens = model.generate(rows, max_new_tokens=8, do_sample=False)
model.save_pretrained(sys.argv[3])
if rank == 0:
    print("tokens", tokens.tolist())
torch.distributed.destroy_process_group()
"""
    )
    result = launch(tmp_path, script, str(tmp_path / "ensemble"), str(ROWS), str(tmp_path / "trained"))
    assert result.returncode == 0, result.stderr
    trained = PCMEnsembleForCausalLM.from_pretrained(tmp_path / "trained").state_dict()
    train(model, torch.tensor(ROWS))
    assert f"tokens {greedy(model)}" in result.stdout
    for name, tensor in model.state_dict().items():
        assert_close(trained[name], tensor, rtol=1e-4, atol=1e-6)
        if name.startswith("backbones"):
            assert torch.equal(trained[name], before[name])
