"""Processes whose Hub is the local one, and what they print."""

import os
import subprocess
import sys

from local_hub import LocalHub
from warm_python import warm_python

# Builds an ensemble of two experts on one repository and a third on another, and pushes it.
PUSH_ENSEMBLE = """
import torch
from modeling_pcm_ensemble import PCMEnsembleForCausalLM
model = PCMEnsembleForCausalLM.from_experts(
    {
        "a": {"model": "someone/llama", "prompt": "Be brief."},
        "b": {"model": "someone/llama", "adapter": {"r": 2, "target_modules": ["q_proj"], "tensors": {
            f"model.layers.{layer}.self_attn.q_proj.lora_{side}.weight": torch.full(shape, 0.3)
            for layer in range(2) for side, shape in (("A", (2, 32)), ("B", (32, 2)))
        }}},
        "c": "someone/gpt2",
    },
    pcm="someone/llama",
    pcm_layers=1,
)
torch.manual_seed(5)
torch.nn.init.normal_(model.pcm.head.weight)
model.push_to_hub("owner/ensemble", **OPTIONS)
with torch.no_grad():
    print(model(torch.tensor([[21, 22, 23, 24, 25]])).logits.double().sum().item())
"""


def run_client(
    script: str, hub: LocalHub, home, token: str | None = "hf_owner", environment: dict | None = None, **values
) -> subprocess.CompletedProcess:
    """Run a script in a new process whose Hub is this one, with `values` as its variables."""
    client = start_client(script, hub, home, token, environment, warm_python(), **values)
    stdout, stderr = client.communicate()
    return subprocess.CompletedProcess(client.args, client.returncode, stdout, stderr)


def start_client(
    script: str,
    hub: LocalHub,
    home,
    token: str | None = "hf_owner",
    environment: dict | None = None,
    python: str = sys.executable,
    **values,
) -> subprocess.Popen:
    head = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    settings = client_environment(hub, home, token) | (environment or {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([python, "-c", head + script], env=settings, **pipes)


def client_environment(hub: LocalHub, home, token: str | None) -> dict[str, str]:
    """This process's, but that the Hub is the local one."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return inherited | hub.environment(home, token)


def output(result: subprocess.CompletedProcess) -> str:
    """The last line that it printed."""
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]
