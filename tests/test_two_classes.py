"""A model that came with its checkpoint's code works with this package, which has other classes of the same names."""

import subprocess
import sys

import pytest
from conftest import tiny_gpt2, tiny_llama, tiny_tokenizer

from modeling_pcm_ensemble import PCMEnsembleForCausalLM

LOAD = """
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("ensemble", trust_remote_code=True).eval()
import modeling_pcm_ensemble
from modeling_pcm_ensemble import PCMEnsembleCache, PCMEnsembleForCausalLM
assert not isinstance(model, PCMEnsembleForCausalLM)
ids, preference = torch.tensor([[21, 22, 23]]), ["a", "b"]
"""
CACHES = """
options = {"preference": preference, "max_new_tokens": 5, "do_sample": False}
expected = model.generate(ids, **options)
assert model.generate(ids, past_key_values=PCMEnsembleCache(model.config), **options).tolist() == expected.tolist()
with torch.no_grad():
    expected = model(torch.tensor([[21, 22, 23, 24]]), preference=preference).logits[:, -1]
    for kind in ("dynamic", "static"):
        cache = PCMEnsembleCache(model.config, kind, 8)
        assert type(cache) is not type(model(ids).past_key_values)
        model(ids, past_key_values=cache, preference=preference)
        assert_close(model(torch.tensor([[24]]), past_key_values=cache).logits[:, -1], expected, atol=1e-4, rtol=0)

    caches = [model(ids, preference="a").past_key_values, PCMEnsembleCache(model.config)]
    model(ids[:, :2], past_key_values=caches[1], preference=["b"])
    for room in (None, 4):
        cache = PCMEnsembleCache.join(caches, room)
        found = model(torch.tensor([[24], [24]]), past_key_values=cache).logits
        for row, (text, name) in enumerate(((ids, "a"), (ids[:, :2], "b"))):
            alone = model(torch.cat([text, torch.tensor([[24]])], dim=1), preference=name).logits
            assert_close(found[row, -1], alone[0, -1], atol=1e-4, rtol=0)
"""
TRAINERS = """
from datasets import Dataset
from modeling_pcm_ensemble.training import DescriptionConfig, DescriptionTrainer, RebelConfig, RebelTrainer

options = {"max_steps": 2, "learning_rate": 0.1, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
data = Dataset.from_dict({"prompt": ["what?", "hello"], "completion": ["this", "hi"]})
before = model.pcm.head.weight.clone()
DescriptionTrainer(model, DescriptionConfig("out", **options), data, preference_sets=[["a"]]).train()
assert not torch.equal(before, model.pcm.head.weight)

def reward(completions, **kwargs):
    return [float(sum(map(ord, str(text))) % 97) for text in completions]

config = RebelConfig("out", num_generations=2, per_device_train_batch_size=4, max_completion_length=4, **options)
before = model.pcm.head.weight.clone()
trainer = RebelTrainer(model, {"a": reward, "b": reward}, config, data, preference_sets=[preference])
trainer.train()
assert not torch.equal(before, model.pcm.head.weight)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    experts = {"a": {"model": tiny_llama(1), "prompt": "Hm."}, "b": tiny_gpt2(2)}
    model = PCMEnsembleForCausalLM.from_experts(experts, pcm=tiny_llama(3), tokenizer=tiny_tokenizer())
    model.save_pretrained(folder / "ensemble")
    return folder


@pytest.mark.parametrize("code", [CACHES, TRAINERS], ids=["caches", "trainers"])
def test_what_the_package_has_works_with_the_checkpoints_model(folder, code):
    command = [sys.executable, "-W", "ignore", "-c", LOAD + code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0, result.stderr
