"""Libraries that are too old."""

import importlib.metadata
import inspect
import subprocess
import sys

import pytest
import torch
from oldest_versions import ROOT, oldest, oldest_to_run
from packaging.version import Version

import modeling_pcm_ensemble
from modeling_pcm_ensemble.requirements import OLDEST, OLDEST_TO_COMPILE, OLDEST_TO_RUN

IMPORT = """
import importlib.metadata
version = importlib.metadata.version
importlib.metadata.version = lambda name: {version!r} if name == {name!r} else version(name)
import modeling_pcm_ensemble
"""
COMPILE = """
from modeling_pcm_ensemble.requirements import check_compiles
print("imported")
check_compiles()
"""

MAKE = """
from modeling_pcm_ensemble import PCMEnsembleConfig, PCMEnsembleForCausalLM, Preference
from transformers import LlamaConfig
llama = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
config = PCMEnsembleConfig(backbones=[llama], pcm=llama, experts=[{"name": "a"}])
print(Preference.parse("a", config.expert_names).label)
PCMEnsembleForCausalLM(config)
"""


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("name", OLDEST)
def test_a_library_that_is_too_old_is_named(name):
    found = run(IMPORT.format(name=name, version="0.1"))
    assert f"{name}>={OLDEST[name]} is required" in found.stderr
    assert f"pip install -U {name}" in found.stderr


def test_a_transformers_that_is_too_old_for_models_reads_configurations_and_preferences():
    found = run(IMPORT.format(name="transformers", version="5.20.0") + MAKE)
    assert found.stdout.strip() == "a"
    assert f"transformers>={OLDEST_TO_RUN} is required" in found.stderr
    assert oldest_to_run() == OLDEST_TO_RUN


def test_a_torch_that_is_too_old_to_compile_steps_is_named_where_they_are_compiled():
    found = run(IMPORT.format(name="torch", version="2.12.1") + COMPILE)
    assert found.stdout.strip() == "imported"
    assert f"torch>={OLDEST_TO_COMPILE} is required" in found.stderr
    assert "pass `disable_compile=True` to `generate`" in found.stderr


def test_steps_are_compiled_with_an_option_that_older_versions_of_torch_lack():
    has_option = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    assert has_option == (Version(torch.__version__) >= Version(OLDEST_TO_COMPILE))


def test_the_version_is_the_installed_one_and_the_one_to_cite():
    assert modeling_pcm_ensemble.__version__ == importlib.metadata.version("pcm-ensemble")
    assert f"\nversion: {modeling_pcm_ensemble.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    experts = (ROOT / "examples" / "smollm2" / "pyproject.toml").read_text()
    assert f'\nversion = "{modeling_pcm_ensemble.__version__}"\n' in experts


def test_the_bounds_are_those_of_the_package():
    assert oldest().items() >= OLDEST.items()
