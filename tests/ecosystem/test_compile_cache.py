"""Code that is kept from process to process: found again, never a stale one, and never somebody else's."""

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import tiny_llama
from transformers import CompileConfig

from modeling_pcm_ensemble import PCMEnsembleForCausalLM
from modeling_pcm_ensemble.compile_cache import cache_folders, check_cache_folders, main

COMPILED = {"cache_implementation": "static", "compile_config": CompileConfig(dynamic=True)}

STEP = """
import sys

import torch
from conftest import tiny_llama
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

from modeling_pcm_ensemble import PCMEnsembleForCausalLM

model = PCMEnsembleForCausalLM.from_experts({"a": tiny_llama(int(sys.argv[1]))}, pcm=tiny_llama(3))
ids = torch.tensor([[21, 22, 23], [31, 32, 33]])
options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
fast = {"cache_implementation": "static", "compile_config": CompileConfig(dynamic=True)}
assert model.generate(ids, **options, **fast).tolist() == model.generate(ids, **options).tolist()
assert model.backbones.submodels[0].compiled_step.blocks is not None
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""

PREPARED = """
import threading
from pathlib import Path
from tempfile import gettempdir

from torch._inductor.cpu_vec_isa import VecISA, pick_vec_isa

from modeling_pcm_ensemble.compile_start import HEADERS_THREAD, prepare_compiler

prepare_compiler()
check_build, VecISA.check_build = VecISA.check_build, None
assert pick_vec_isa().bit_width() > 0
VecISA.check_build = check_build

(headers_thread,) = [thread for thread in threading.enumerate() if thread.name == HEADERS_THREAD]
headers_thread.join()
headers = [path.name for path in Path(gettempdir()).rglob("*.?ch")]
assert len(headers) == 1
"""
USED = """
assert [path.name for path in Path(gettempdir()).rglob("*.?ch")] == headers
"""


is_x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets are told apart on x86 alone"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    path = tmp_path / "compiled"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tmp_path.chmod(0o700)
    return path


def hits_and_misses(seed: int, script: str = STEP, **environment: str) -> list[int]:
    """Run a compiled step in a process of its own, and compare it with an eager one there."""
    tests = str(Path(__file__).parent.parent)
    environment |= {"PYTHONPATH": os.pathsep.join([tests, *sys.path]), "TMPDIR": tempfile.gettempdir()}
    done = subprocess.run(
        [sys.executable, "-c", script, str(seed)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return [int(number) for number in done.stdout.split()[-2:]]


@is_x86
def test_code_is_found_by_the_next_process_whatever_the_weights_but_not_by_another_processor(folder):
    hits, misses = hits_and_misses(1)
    assert misses > 0
    assert hits_and_misses(2) == [hits + misses, 0]
    assert hits_and_misses(1, ATEN_CPU_CAPABILITY="default") == [hits, misses]


@is_x86
def test_headers_that_were_compiled_in_the_background_are_those_that_a_step_needs(folder):
    _, misses = hits_and_misses(1, PREPARED + STEP + USED)
    assert misses > 0


SETTINGS = """
from torch._inductor import config
from torch._inductor.cpu_vec_isa import VecISA

from modeling_pcm_ensemble.compile_start import prepare_compiler

seen = []
check_build = VecISA.check_build


def noted(isa, code):
    seen.append(config.cpp.cxx[-1])
    return check_build(isa, code)


VecISA.check_build = noted
config.cpp.cxx = (None, "c++")
prepare_compiler()
print(seen.count("c++"), len(seen))
"""


@is_x86
def test_instruction_sets_are_tried_by_the_compiler_that_a_program_has_chosen(folder):
    chosen, tried = hits_and_misses(1, SETTINGS)
    assert 0 < chosen == tried


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root can write anywhere")
def test_a_folder_that_cannot_be_written_to_is_refused(folder):
    folder.mkdir(mode=0o700)
    (folder / "ab").mkdir()
    folder.chmod(0o500)
    with pytest.raises(PermissionError, match="this user cannot write there"):
        check_cache_folders()


def test_a_folder_that_is_missing_is_made_for_this_user_alone(folder):
    check_cache_folders()
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_folder_that_others_can_write_to_is_refused_unless_it_is_empty(folder, mode):
    folder.mkdir()
    folder.chmod(mode)
    check_cache_folders()
    assert folder.stat().st_mode & 0o777 == 0o700

    (folder / "ab").mkdir()
    folder.chmod(mode)
    with pytest.raises(PermissionError, match="others than this user can write to"):
        check_cache_folders()


def test_a_folder_within_one_that_others_can_write_to_is_refused(folder):
    folder.mkdir(mode=0o700)
    folder.parent.chmod(0o777)
    with pytest.raises(PermissionError, match=f"can write to {folder.parent}:"):
        check_cache_folders()

    folder.parent.chmod(0o1777)  # as /tmp is: nobody can put another folder in its place
    check_cache_folders()


def test_a_file_that_others_can_write_to_is_refused(folder):
    (folder / "ab").mkdir(parents=True, mode=0o700)
    (folder / "ab" / "code.so").touch()
    (folder / "ab" / "code.so").chmod(0o666)
    folder.chmod(0o700)
    check_cache_folders()  # nobody else gets there

    folder.chmod(0o755)
    with pytest.raises(PermissionError, match=r"can write to .*code\.so:"):
        check_cache_folders()


def test_a_link_in_a_folder_that_others_can_write_to_is_refused(folder, tmp_path, monkeypatch):
    target = tmp_path / "own"
    target.mkdir(mode=0o700)
    folder.symlink_to(target)
    check_cache_folders()

    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    folder.unlink()
    (shared / "link").symlink_to(target)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(shared / "link"))
    with pytest.raises(PermissionError, match=f"can write to {shared}:"):
        check_cache_folders()


def test_steps_run_uncompiled_rather_than_what_others_may_have_written(folder, caplog):
    (folder / "ab").mkdir(parents=True)
    folder.chmod(0o777)
    model = PCMEnsembleForCausalLM.from_experts({"a": tiny_llama(1)}, pcm=tiny_llama(3))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    ids = model.dummy_inputs["input_ids"]

    with caplog.at_level("WARNING", logger="modeling_pcm_ensemble"):
        fast = model.generate(ids, **options, **COMPILED)
    assert fast.tolist() == model.generate(ids, **options).tolist()
    assert "run uncompiled" in caplog.text
    assert [path.name for path in folder.iterdir()] == ["ab"]


def test_without_a_compiler_steps_run_uncompiled(folder):
    tests = str(Path(__file__).parent.parent)
    environment = {"PYTHONPATH": os.pathsep.join([tests, *sys.path]), "TMPDIR": tempfile.gettempdir()}
    environment |= {"CXX": str(folder / "no-compiler")}
    script = STEP.partition("assert model.backbones")[0]
    command = [sys.executable, "-c", script, "1"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    assert "does not compile; its steps run uncompiled" in done.stderr


def test_the_folder_is_told_measured_and_cleared(folder, capsys):
    check_cache_folders()
    (folder / "fxgraph").mkdir()
    (folder / "ab").mkdir()
    (folder / "ab" / "code.so").write_bytes(b"x" * 3_000_000)
    main([])
    assert f"{folder}: 3 MB\n" in capsys.readouterr().out
    main(["--clear"])
    assert len(cache_folders()) == 2
    assert not any(path.exists() for path in cache_folders())


def test_a_folder_with_other_things_in_it_is_not_deleted_and_neither_is_the_other_folder(folder):
    (headers,) = set(cache_folders()) - {folder}
    (headers / "precompiled_headers").mkdir(parents=True)
    for name in ("thesis.tex", "de"):
        (folder / name).mkdir(parents=True)
        with pytest.raises(SystemExit, match=rf"{name} in .* is not torch's"):
            main(["--clear"])
        assert (headers / "precompiled_headers").exists()
        (folder / name).rmdir()


def test_the_program_starts_without_a_warning():
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "modeling_pcm_ensemble.compile_cache", "--help"]
    assert "--clear" in subprocess.run(command, check=True, capture_output=True, text=True).stdout
