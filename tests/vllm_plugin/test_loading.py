"""Which files of a folder are an ensemble's weights."""

from pathlib import Path

import pytest
import torch
from conftest import REFERENCES, ask, check_equal, engine, references
from safetensors.torch import load_file, save_file

NAME = "probabilities"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint that has files of others beside its own."""
    for path in (REFERENCES / NAME).iterdir():
        (tmp_path / path.name).symlink_to(path.resolve())
    state = load_file(tmp_path / "model.safetensors")
    learnt = {name.removeprefix("pcm."): tensor + 1 for name, tensor in state.items() if name.startswith("pcm.")}
    save_file(learnt, tmp_path / "pcm.safetensors")  # as `save_pcm` does
    return tmp_path


def shard(folder: Path, count: int):
    """Let the weights be of several files."""
    state = list(load_file((REFERENCES / NAME / "model.safetensors").resolve()).items())
    for number in range(count):
        save_file(dict(state[number::count]), folder / f"model-{number + 1:05}-of-{count:05}.safetensors")


def check_answers(folder: Path):
    asked = references(NAME)[:6]
    with engine(str(folder)) as llm:
        check_equal(ask(llm, asked), asked)


def test_other_files_beside_the_weights_are_not_loaded(folder):
    check_answers(folder)


def test_weights_in_several_files_are_loaded_and_not_mixed_with_others(folder):
    (folder / "model.safetensors").unlink()
    shard(folder, 2)
    check_answers(folder)

    shard(folder, 3)
    with pytest.raises(ValueError, match="twice"):
        check_answers(folder)


def test_pickles_are_not_loaded(folder):
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    for path in (weights, folder / "pcm.safetensors"):
        path.unlink()
    with pytest.raises(RuntimeError, match="Cannot find any model weights"):
        check_answers(folder)
