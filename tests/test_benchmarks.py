"""The benchmarks run, and the README says what they found."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.continuous import MEASURES
from benchmarks.readme import DOCUMENTS, TABLES, with_tables

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (["decode", "--batches", "1", "2", "--rounds", "2"], {"LoRA experts", "separate models", "PEFT mixed batch"}),
        (
            ["decode", "--fast", "--kinds", "lora", "--batches", "2", "--rounds", "2"],
            {"plain model, compiled", "LoRA experts, compiled"},
        ),
        (["serve", "--requests", "3", "--tokens", "4", "--rounds", "1"], {"this library", "one plain model"}),
        pytest.param(
            ["scaling", "--experts", "1", "2", "--batches", "2", "--contexts", "16", "--rounds", "2"],
            {"LoRA experts, compiled"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["training", "--rounds", "2"],
            {"the same, 6 experts", "the same, experts 4 times as large"},
            marks=pytest.mark.slow,
        ),
        (["prefill", "--context", "64", "--rounds", "2"], {"plain model", "prompted experts", "LoRA experts"}),
        pytest.param(
            ["memory", "--tokens", "4"], {"one plain model", "six LoRA experts and the PCM"}, marks=pytest.mark.slow
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_benchmark_measures_every_variant(command, names, tmp_path):
    size = ["--layers", "4", "--hidden", "128", "--output", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "benchmarks", *command, *size], check=True, cwd=ROOT, capture_output=True)
    (result,) = tmp_path.glob("*.json")
    found = json.loads(result.read_text())
    assert names <= {row["name"] for row in found["rows"]}
    assert found["machine"]["model"] == "Llama 4 x 128"
    if command[0] == "memory":
        for row in found["rows"]:
            assert row["weights_mb"] == pytest.approx(row["expected_weights_mb"], rel=0.02)
    else:
        assert all(row["seconds"] > 0 for row in found["rows"])
        assert command[0] == "training" or list(tmp_path.glob("*.png"))


def test_a_context_that_the_model_has_no_room_for_is_refused_before_anything_is_measured(tmp_path):
    size = ["--layers", "1", "--hidden", "64", "--contexts", "16", "8192", "--output", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", "scaling", *size], cwd=ROOT, capture_output=True, text=True
    )
    assert "take 8208 tokens; the model has 8192" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.real_model
def test_experts_behind_a_server_are_measured_beside_those_here(tmp_path):
    size = ["--batches", "2", "--tokens", "2", "--rounds", "1", "--output", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "benchmarks", "endpoints", *size], check=True, cwd=ROOT, capture_output=True)
    rows = {row["name"]: row for row in json.loads((tmp_path / "endpoints.json").read_text())["rows"]}
    assert list(rows) == ["3 experts here", *(f"{number} behind llama.cpp" for number in (1, 2, 3))]
    assert all(row["tokens a second"] > 0 for row in rows.values())
    assert [name for name, row in rows.items() if "request ms" in row] == list(rows)[1:]
    assert [name for name, row in rows.items() if "overlap" in row] == list(rows)[1:3]


@pytest.mark.slow
@pytest.mark.real_model
def test_requests_that_join_and_leave_are_measured_beside_one_batch_at_a_time(tmp_path):
    size = ["--requests", "2", "--rate", "9", "--tokens", "8", "--eager", "--output", str(tmp_path)]
    subprocess.run(
        [sys.executable, "-m", "benchmarks", "continuous", *size], check=True, cwd=ROOT, capture_output=True
    )
    found = json.loads((tmp_path / "continuous.json").read_text())
    assert [row.pop("name") for row in found["rows"]] == ["one batch at a time", "requests join and leave"]
    assert all(row[name] > 0 for row in found["rows"] for name in MEASURES)
    settings = {"requests": 2, "rate": 9, "rows": 16, "tokens": 8, "seed": 0}
    assert all(row.keys() == {*MEASURES, *settings} and row.items() >= settings.items() for row in found["rows"])
    assert found["machine"]["model"] == "SmolLM2-135M-Instruct"


@pytest.mark.slow
def test_the_first_answer_is_measured_with_nothing_kept_and_in_the_next_process(tmp_path):
    size = ["--layers", "4", "--hidden", "128", "--kinds", "lora", "--tokens", "4", "--output", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "benchmarks", "start", *size], check=True, cwd=ROOT, capture_output=True)
    (result,) = tmp_path.glob("*.json")
    eager, first, again = json.loads(result.read_text())["rows"]
    assert eager["first"] < again["first"] < first["first"]  # by seconds, of which compiling takes many


def test_the_script_for_a_gpu_measures_every_part_of_a_tiny_model(tmp_path):
    size = ["--shapes", "tiny", "--experts", "1", "2", "--batches", "1", "2", "--rounds", "2", "--prompt", "16"]
    command = [sys.executable, "-m", "benchmarks", "gpu", *size, "--output", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    rows = json.loads(next(tmp_path.glob("all-tiny*.json")).read_text())["rows"]
    assert len(list(tmp_path.glob("*.png"))) == 1

    eager, compiled = (
        [row for row in rows if row["mode"] in modes and row["what"] == "decode"]
        for modes in (["eager"], ["compiled", "CUDA graphs"])
    )
    assert len(eager) == 2 * 2 * 5  # numbers of experts, batch sizes, models
    assert len(compiled) == 2 * 2
    assert all(row["tokens a second"] > 0 and row["share of bandwidth"] > 0 for row in eager + compiled)
    assert {row["batch"] for row in rows if row["what"] == "prompt"} == {1, 8}
    assert {row["name"] for row in eager} >= {"plain model", "1 experts, prompted", '2 experts, LoRA, merge="product"'}


def test_what_a_gpu_has_no_time_for_is_named(tmp_path):
    size = ["--shapes", "tiny", "--experts", "1", "--batches", "1", "--seconds", "0"]
    command = [sys.executable, "-m", "benchmarks", "gpu", *size, "--output", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "left out after 0 seconds: tiny, 1 experts; tiny, compiled; tiny, prompts." in result.stderr
    assert result.returncode == 1


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_tables_in_the_documents_are_those_of_the_results(name):
    text = (ROOT / name).read_text()
    markers, tables = (len(re.findall(rf"<!-- [\w-]+(?: \w+)* table -->\n{row}", text)) for row in ("", r"\|.*\n\|"))

    assert with_tables(text) == text
    assert markers == tables > 0


def test_every_results_table_stands_in_a_document():
    texts = "".join((ROOT / name).read_text() for name in DOCUMENTS)
    assert all(f"<!-- {name} table -->" in texts for name in TABLES)
    assert "<!-- experts table -->\n| | own dimension |" in texts


@pytest.mark.parametrize("name", ["report.json", "ablations/report.json"])
def test_the_committed_evaluation_is_of_the_pcm_that_ships(name):
    report = json.loads((ROOT / "docs/results" / name).read_text())
    shipped = (ROOT / "examples/smollm2/artifacts/pcm.safetensors").read_bytes()
    assert report["pcm sha256"] == hashlib.sha256(shipped).hexdigest()
