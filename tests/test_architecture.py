"""The rooms of docs/architecture.md are those that there are, and doors open one way."""

import ast
import re
import sys
from pathlib import Path

import pytest

import modeling_pcm_ensemble
from modeling_pcm_ensemble.configuration_pcm_ensemble import EXPERT_FIELDS
from modeling_pcm_ensemble.evaluation import ensemble_baselines
from modeling_pcm_ensemble.training import checkpoints

PACKAGE = Path(modeling_pcm_ensemble.__file__).parent
DOCUMENT = Path(__file__).parents[1] / "docs" / "architecture.md"
FOLDERS = ("endpoints", "rewards", "training", "evaluation", "vllm")


def rooms() -> list[list[str]]:
    """The files of each line of the table."""
    lines = re.findall(
        r"^\| (`[a-z_/` ]+`) \|", DOCUMENT.read_text(encoding="utf-8").split("## Files")[1], re.MULTILINE
    )
    return [re.findall(r"`([a-z_/]+)`", line) for line in lines]


def imports(path: Path) -> set[str]:
    """Names of what a file imports from the package: files of the core, or folders."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parent if node.level == 1 else path.parents[node.level - 1]
            name = (node.module or "").split(".")[0]
            in_folder = base != PACKAGE
            found.add(f"{base.name}/" if in_folder else f"{name}/" if name in FOLDERS else name)
    return found


def test_every_file_has_a_room():
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} | {f"{folder}/" for folder in FOLDERS}
    assert sorted(name for line in rooms() for name in line) == sorted(files)


@pytest.mark.parametrize("name", [name for line in rooms() for name in line])
def test_a_file_imports_only_from_lines_above(name):
    lines = rooms()
    place = next(index for index, line in enumerate(lines) if name in line)
    above = {other for line in lines[:place] for other in line}
    beside = set(lines[place]) - {"training/", "evaluation/"}  # these two do not know one another
    own = {name} if name.endswith("/") else set()
    paths = [PACKAGE / f"{name}.py"] if not own else sorted((PACKAGE / name).rglob("*.py"))
    for path in paths:
        assert imports(path) <= above | beside | own, path.name


@pytest.mark.parametrize("name", ["rows", "memory"])
def test_rows_and_memories_know_neither_adapters_nor_the_compiler(name):
    seen, waiting = set(), {name}
    while waiting:
        current = waiting.pop()
        seen.add(current)
        waiting |= imports(PACKAGE / f"{current}.py") - seen
    assert not {file for file in seen if file.startswith(("lora", "compile"))}


def test_a_field_of_an_expert_is_known_to_all_who_ask_what_it_predicts():
    """Texts are there as tokens, the adapter's weights are compared, and its source changes nothing."""
    elsewhere = {"prompt", "description", "adapter", "source"}
    assert set(EXPERT_FIELDS) == {*checkpoints.EXPERT_SETTINGS} | elsewhere
    assert set(EXPERT_FIELDS) == {*ensemble_baselines.EXPERT_FACTS, "dimension"} | elsewhere


def test_the_core_imports_what_is_uploaded_with_it_or_installed_with_transformers():
    allowed = {"torch", "transformers", "safetensors", "huggingface_hub", "filelock", "regex", "jinja2"}
    for path in PACKAGE.glob("*.py"):
        if path.stem in ("__init__", "demo", "terminal"):  # not uploaded
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            outside = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
            assert outside <= allowed, path.name
