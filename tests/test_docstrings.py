"""Examples in docstrings run as they stand, and what docstrings and messages name is there."""

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch
import transformers
from conftest import tiny_llama, tiny_tokenizer
from test_lora import lora_ensemble, peft_adapter

import modeling_pcm_ensemble

MODULES = [
    "cache",
    "endpoints.configuration",
    "experts",
    "failures",
    "generation",
    "merging",
    "modeling_pcm_ensemble",
    "preference",
]
ROOT = Path(__file__).parents[1]
PATHS = [*(ROOT / "modeling_pcm_ensemble").rglob("*.py"), *(ROOT / "hub_upload").rglob("*.py")]
FILES = sorted(path.relative_to(ROOT) for path in PATHS)
# Folders of the repository that no installation has.
NOT_INSTALLED = re.compile(r"\b(?:benchmarks|docs|examples|tests)/[\w./-]+|python -m benchmarks")
REFERENCE = re.compile(r"\[`~?([\w.]+)`\]")


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # PEFT's
@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name, tmp_path):
    base = tiny_llama(1)
    model = lora_ensemble(base, {"concise": peft_adapter(tmp_path / "concise", base, 1)}, friendly=tiny_llama(2))
    torch.nn.init.zeros_(model.pcm.head.weight)
    known = {"PCMEnsembleForCausalLM": modeling_pcm_ensemble.PCMEnsembleForCausalLM, "model": model, "base": base}
    known |= {"tokenizer": tiny_tokenizer(), "prompt_ids": torch.tensor([[21, 22, 23]]), "folder": tmp_path / "out"}

    module = importlib.import_module(f"modeling_pcm_ensemble.{name}")
    failed, attempted = doctest.testmod(module, extraglobs=known)
    assert attempted > 0
    assert failed == 0


def texts(path: Path) -> list[str]:
    """Every string in a module: its docstrings, and what it may say."""
    nodes = ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def defined(path: Path) -> set[str]:
    """The names that a module defines, and those of its classes."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_text_names_a_path_that_an_installation_does_not_have(path):
    """But as one of the repository."""
    misleading = [text for text in texts(path) if "the repository" not in text]
    assert [found for text in misleading for found in NOT_INSTALLED.findall(text)] == []


@pytest.mark.parametrize("path", FILES, ids=str)
def test_what_a_text_refers_to_is_there(path):
    known = set().union(*map(defined, FILES)) | set(dir(modeling_pcm_ensemble)) | set(dir(transformers))
    found = [name for text in texts(path) for name in REFERENCE.findall(text)]
    assert [name for name in found if name.rpartition(".")[2] not in known] == []
