"""Trainers of transformers, TRL and PEFT on an ensemble: the PCM learns, and no expert changes."""

import copy
import json
import os
import subprocess
import sys
from inspect import signature
from pathlib import Path
from types import MethodType

import pytest
import torch
from conftest import tiny_llama, tiny_qwen2, tiny_tokenizer
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from modeling_pcm_ensemble import PCMEnsembleForCausalLM
from modeling_pcm_ensemble.training import add_mixture_head

TEXTS = ["hello there", "good day to you", "abc abc abc", "what is it"] * 4
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),  # TRL's and PEFT's
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


@pytest.fixture
def ensemble() -> PCMEnsembleForCausalLM:
    return make_ensemble()


def make_ensemble() -> PCMEnsembleForCausalLM:
    return PCMEnsembleForCausalLM.from_experts(
        {"a": {"model": tiny_llama(1), "prompt": "Be brief."}, "b": tiny_qwen2(2)},
        pcm=tiny_llama(3),
        pcm_layers=1,
        tokenizer=tiny_tokenizer(),
    )


def settings(folder, **kwargs) -> dict:
    common = {"output_dir": str(folder), "max_steps": 8, "learning_rate": 1e-2, "use_cpu": True, "report_to": "none"}
    common |= {"logging_steps": 1, "per_device_train_batch_size": 4, "save_strategy": "no", "bf16": False}
    return common | kwargs


def of_trl(folder, **kwargs) -> dict:
    return settings(folder, gradient_checkpointing=False, **kwargs)


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def check_only_the_pcm_learnt(model, before: dict[str, torch.Tensor]):
    after = parameters(model)
    assert all(torch.equal(after[name], old) for name, old in before.items() if name.startswith("backbones"))
    assert not torch.equal(after["pcm.head.weight"], before["pcm.head.weight"])
    assert not any(name.startswith("backbones") for name, p in model.named_parameters() if p.requires_grad)


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_plain_trainer(ensemble, tmp_path):
    def collate(rows):
        batch = ensemble.tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    before = parameters(ensemble)
    arguments = TrainingArguments(**settings(tmp_path, remove_unused_columns=False))
    trainer = Trainer(ensemble, arguments, data_collator=collate, train_dataset=Dataset.from_dict({"text": TEXTS}))
    trainer.train()
    check_only_the_pcm_learnt(ensemble, before)
    assert losses(trainer)[-1] < losses(trainer)[0]


def fine_tuning(ensemble, folder, **options) -> SFTTrainer:
    data = Dataset.from_dict({"text": TEXTS[:4]})  # one batch, the same at each step
    arguments = SFTConfig(**of_trl(folder, **options))
    trainer = SFTTrainer(ensemble, arguments, train_dataset=data, processing_class=ensemble.tokenizer)
    add_mixture_head(trainer)
    return trainer


def test_supervised_fine_tuning_by_trl(ensemble, tmp_path):
    before = parameters(ensemble)
    trainer = fine_tuning(ensemble, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        by_hand = ensemble(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
        ).loss
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(by_hand.item(), abs=1e-3)
    assert losses(trainer)[-1] < losses(trainer)[0]
    check_only_the_pcm_learnt(ensemble, before)


IN_TWO_PROCESSES = """
import sys
sys.path[:0] = sys.argv[1:3]
import torch
from test_trainers import check_only_the_pcm_learnt, fine_tuning, losses, make_ensemble, parameters
ensemble = make_ensemble()
before = parameters(ensemble)
trainer = fine_tuning(ensemble, sys.argv[3], per_device_train_batch_size=2)
trainer.train()
check_only_the_pcm_learnt(ensemble, before)
if trainer.is_world_process_zero():
    print("losses", losses(trainer))
torch.distributed.destroy_process_group()  # whose threads may else abort a process that ends
"""


def test_supervised_fine_tuning_in_two_processes_is_that_of_one(ensemble, tmp_path):
    trainer = fine_tuning(ensemble, tmp_path)
    trainer.train()
    (tmp_path / "run.py").write_text(IN_TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    here = Path(__file__).parent
    run = subprocess.run([*launch, str(tmp_path / "run.py"), str(here.parent), str(here), str(tmp_path)],
                         capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.split("losses ")[1].splitlines()[0])
    assert found == pytest.approx(losses(trainer), abs=2e-3)


def test_group_relative_policy_optimisation_by_trl(ensemble, tmp_path):
    def reward(completions, **columns):
        return [sum(map(ord, text)) / 100 for text in completions]

    before = parameters(ensemble)
    arguments = GRPOConfig(
        **of_trl(tmp_path, num_generations=4, max_completion_length=6, temperature=0.7, max_steps=3)
    )
    data = Dataset.from_dict({"prompt": TEXTS})
    trainer = GRPOTrainer(ensemble, reward, arguments, train_dataset=data, processing_class=ensemble.tokenizer)
    add_mixture_head(trainer)
    trainer.train()
    check_only_the_pcm_learnt(ensemble, before)
    assert all("reward" in entry for entry in trainer.state.log_history[:-1])


def test_direct_preference_optimisation_by_trl(ensemble, tmp_path):
    before = parameters(ensemble)
    data = Dataset.from_dict({"prompt": ["say"] * 4, "chosen": TEXTS[:2] * 2, "rejected": TEXTS[2:4] * 2})
    arguments = DPOConfig(**of_trl(tmp_path))
    reference = copy.deepcopy(ensemble)
    trainer = DPOTrainer(ensemble, reference, args=arguments, train_dataset=data, processing_class=ensemble.tokenizer)
    add_mixture_head(trainer)
    trainer.train()
    check_only_the_pcm_learnt(ensemble, before)
    assert losses(trainer)[-1] < losses(trainer)[0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_mixtures_head_gives_what_trls_gives_for_one_expert(ensemble, tmp_path, temperature):
    """With one expert active, the mixture is that expert, for which TRL's own head is right."""
    tokenizer = tiny_tokenizer()
    arguments = SFTConfig(**of_trl(tmp_path, max_steps=1))
    trainer = SFTTrainer(
        ensemble, arguments, train_dataset=Dataset.from_dict({"text": TEXTS}), processing_class=tokenizer
    )
    add_mixture_head(trainer, temperature)
    expert = tiny_qwen2(2)
    add_fused_lm_head(
        expert, temperature, outputs=("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    )
    ids = torch.tensor([[21, 22, 23, 24, 25], [31, 32, 33, 34, 35]])
    labels = ids.masked_fill(torch.tensor([[1, 1, 0, 0, 0], [0] * 5]) == 1, -100)
    for form in ({"labels": labels}, {"shift_labels": labels}, {"labels": labels, "num_items_in_batch": 11}):
        theirs = expert(input_ids=ids, fused_lm_head=True, **form)
        ours = ensemble(input_ids=ids, fused_lm_head=True, preference="b", **form)
        assert set(ours) == set(theirs)
        for name in set(theirs) - {"mean_logits"}:  # of logits, where ours are log-probabilities
            assert_close(ours[name].to(theirs[name].dtype), theirs[name], msg=name)


def test_trl_still_gives_models_a_forward_of_its_own_that_no_mixture_fits(ensemble, tmp_path):
    """Once it does not, or once its own serves an ensemble, `add_mixture_head` is not needed as it is."""
    data = Dataset.from_dict({"text": TEXTS})
    trainer = SFTTrainer(
        ensemble, SFTConfig(**of_trl(tmp_path)), train_dataset=data, processing_class=ensemble.tokenizer
    )
    theirs = vars(trainer.model)["forward"]
    assert theirs.__func__.__code__.co_filename == add_fused_lm_head.__code__.co_filename
    ids = torch.tensor([[21, 22, 23, 24, 25]])
    with pytest.raises(AttributeError, match="no attribute 'last_hidden_state'"):
        trainer.model(input_ids=ids, labels=ids, fused_lm_head=True)
    add_mixture_head(trainer)
    assert vars(trainer.model)["forward"] is not theirs
    expected = ensemble(input_ids=ids, labels=ids).loss
    assert_close(trainer.model(input_ids=ids, labels=ids, fused_lm_head=True).loss, expected)


def test_the_signature_of_forward_stays_the_ensembles(ensemble, tmp_path):
    trainer = fine_tuning(ensemble, tmp_path)
    assert signature(trainer.model.forward) == signature(MethodType(PCMEnsembleForCausalLM.forward, ensemble))


def test_another_model_is_refused(tmp_path):
    arguments = TrainingArguments(**settings(tmp_path))
    with pytest.raises(TypeError, match="must be a `PCMEnsembleForCausalLM`, got LlamaForCausalLM"):
        add_mixture_head(Trainer(tiny_llama(1), arguments))


@pytest.mark.parametrize("whole", [False, True], ids=["pcm", "ensemble"])
def test_peft_on_the_pcm(ensemble, tmp_path, whole):
    head = "pcm.head" if whole else "head"
    config = LoraConfig(r=2, target_modules=r"(pcm\.)?body\.layers.*_proj", modules_to_save=[head])
    ids = torch.tensor([[21, 22, 23, 24, 25]])
    before = parameters(ensemble.backbones)
    if whole:
        model = get_peft_model(ensemble, config)
    else:
        ensemble.pcm = get_peft_model(ensemble.pcm, config)
        model = ensemble
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora" in name or "modules_to_save" in name for name in trainable)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    first = model(input_ids=ids, labels=ids).loss
    first.backward()
    optimizer.step()
    assert model(input_ids=ids, labels=ids).loss < first
    after = parameters(ensemble.backbones)
    assert all(torch.equal(after[name], old) for name, old in before.items())
    assert model.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3).shape == (1, 8)
