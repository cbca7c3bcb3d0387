"""Checkpoints of earlier versions of this library go on loading: they stand in tests/fixtures as they were saved."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_pcm_ensemble import PCMEnsembleForCausalLM

CHECKPOINTS = sorted((Path(__file__).parents[1] / "fixtures").glob("checkpoint-*"))


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_an_earlier_checkpoint_loads_and_predicts_what_it_did(folder, tmp_path):
    """An adapter, a prompt, a tied GPT-2, a trained PCM; what was expected stands beside it."""
    expected = json.loads((folder / "expected.json").read_text())
    model = PCMEnsembleForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        output = model(torch.tensor([[21, 22, 23, 24, 25]]), preference={"a": 1.0, "b": 0.5, "c": 2.0})
    top = output.logits[0, -1].topk(8)
    assert top.indices.tolist() == expected["tokens"]
    assert top.values.tolist() == pytest.approx(expected["log_probs"], abs=1e-4)
    assert output.expert_weights[0, -1].tolist() == pytest.approx(expected["expert_weights"], abs=1e-4)
    model.save_pretrained(tmp_path)
    saved, now = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert {name: t.shape for name, t in saved.items()} == {name: t.shape for name, t in now.items()}
