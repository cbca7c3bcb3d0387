"""lm-evaluation-harness on an ensemble's checkpoint, by its own command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama, tiny_qwen2, tiny_tokenizer

from modeling_pcm_ensemble import PCMEnsembleForCausalLM

TASK = """
task: local_choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""
QUESTIONS = ["is it", "what now", "who are you there", "why"]


def evaluate(model: str, folder: Path) -> tuple[float, list[float]]:
    """Accuracy, and the log-likelihood of every choice."""
    output = folder / f"results of {Path(model).name}"
    arguments = f"pretrained={model},trust_remote_code=True,dtype=float32"
    command = [Path(sys.executable).with_name("lm_eval"), "--model", "hf", "--model_args", arguments]
    command += ["--tasks", "local_choices", "--include_path", folder / "tasks", "--device", "cpu"]
    command += ["--batch_size", "4", "--output_path", output, "--log_samples"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert result.returncode == 0, result.stderr
    (results,), (samples,) = output.rglob("results_*.json"), output.rglob("samples_*.jsonl")
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    likelihoods = [float(choice[0]) for line in lines for choice in line["filtered_resps"]]
    return json.loads(results.read_text())["results"]["local_choices"]["acc,none"], likelihoods


def test_one_active_expert_scores_as_that_expert_alone(tmp_path):
    tokenizer = tiny_tokenizer()
    alone = tiny_llama(1, max_position_embeddings=512)
    alone.save_pretrained(tmp_path / "alone")
    tokenizer.save_pretrained(tmp_path / "alone")
    ensemble = PCMEnsembleForCausalLM.from_experts(
        {"a": str(tmp_path / "alone"), "b": tiny_qwen2(2)},
        pcm=tiny_llama(3, max_position_embeddings=512),
        default_preference="a",
    )
    torch.nn.init.normal_(ensemble.pcm.head.weight)
    ensemble.save_pretrained(tmp_path / "one")
    ensemble.config.default_preference = None
    ensemble.save_pretrained(tmp_path / "both")
    choices = {"choices": ["yes it is", "no", "maybe so"]}
    rows = [choices | {"question": question, "answer": i % 3} for i, question in enumerate(QUESTIONS)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    accuracy, likelihoods = evaluate(str(tmp_path / "alone"), tmp_path)
    found_accuracy, found = evaluate(str(tmp_path / "one"), tmp_path)
    assert len(likelihoods) == 12
    assert found_accuracy == accuracy
    assert found == pytest.approx(likelihoods, abs=1e-4)
    assert evaluate(str(tmp_path / "both"), tmp_path)[1] != pytest.approx(likelihoods, abs=0.1)
