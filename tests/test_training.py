"""RebelTrainer on tiny models: exact gradients, learning, resuming, refusing."""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import HEADS, SIZES, make_ensemble, tiny_llama, tiny_tokenizer
from datasets import Dataset
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForSequenceClassification

from modeling_pcm_ensemble import PCMEnsembleForCausalLM
from modeling_pcm_ensemble.rewards import ModelReward
from modeling_pcm_ensemble.training import RebelConfig, RebelTrainer

PROMPTS = ["what is a cat?", "name three birds", "why is the sky blue?", "hello", "tell me more", "how far is it?"]


def tiny_ensemble(seed: int = 0):
    """Three experts, two on one backbone, each on a dimension of its own but for the first two."""
    model = make_ensemble(
        [tiny_llama(1), tiny_llama(2)], [(0, [5, 6], [11, 12]), (1, [], [13]), (0, [], [14, 15])], seed
    )
    for expert, dimension in zip(model.config.experts, ("size", "size", "colour")):
        expert["dimension"] = dimension
    torch.nn.init.zeros_(model.pcm.head.weight)
    model._tokenizer = tiny_tokenizer()
    model.generation_config.eos_token_id = 2
    return model


def tiny_product(seed: int = 0):
    """Three prompted experts on one backbone, whose tilts add up on it as it is."""
    model = make_ensemble([tiny_llama(1)], [(0, [5, 6], [11, 12]), (0, [9], [13]), (0, [7], [14, 15])], seed)
    for expert, dimension in zip(model.config.experts, ("size", "size", "colour")):
        expert["dimension"] = dimension
    torch.nn.init.zeros_(model.pcm.head.weight)
    model._tokenizer = tiny_tokenizer()
    model.generation_config.eos_token_id = 2
    model.config.merge = "product"
    return model


def count_letters(letters: str):
    """A reward: how many of these letters a completion has."""
    return lambda prompts, completions, **columns: [float(sum(c in letters for c in text)) for text in completions]


REWARDS = {"e0": count_letters("abcdefgh"), "e1": count_letters("0123456789"), "e2": count_letters("ABCDEFGHIJ")}


def make_trainer(
    folder,
    model=None,
    rewards=None,
    prompts=PROMPTS,
    columns=None,
    preference_sets=None,
    trainer_class=RebelTrainer,
    shared_reward=None,
    **settings,
) -> RebelTrainer:
    options = {
        "per_device_train_batch_size": 6,
        "num_generations": 3,
        "steps_per_generation": 1,
        "max_completion_length": 7,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    } | settings
    dataset = Dataset.from_dict({"prompt": prompts} | (columns or {}))
    return trainer_class(
        model=model or tiny_ensemble(),
        args=RebelConfig(output_dir=str(folder), **options),
        reward_funcs=REWARDS if rewards is None else rewards,
        train_dataset=dataset,
        eval_dataset=dataset,
        preference_sets=preference_sets,
        shared_reward=shared_reward,
    )


def test_training_changes_the_pcm_alone(tmp_path):
    trainer = make_trainer(tmp_path)
    before = copy.deepcopy(trainer.ensemble.state_dict())
    trainer.train()
    changed = {name for name, value in trainer.ensemble.state_dict().items() if not torch.equal(value, before[name])}
    assert "pcm.head.weight" in changed
    assert all(name.startswith("pcm.") and "embed_tokens" not in name for name in changed)


def sampled(trainer, preferences=None):
    """A rollout of two prompts, three completions each, under two preferences."""
    rows = [{"prompt": prompt} for prompt in PROMPTS[:2] for _ in range(3)]
    told = [preference for preference in preferences or trainer.preferences.sets[:2] for _ in range(3)]
    rollout, scores = trainer.rollouts.sample(rows, told, seed=3)
    rollout.old_log_probs, _ = trainer._old_log_probs(rollout)
    return rollout, scores


def whole_log_probs(model, rollout) -> torch.Tensor:
    """log π of each sampled token from a plain forward that runs every expert, `(rows, seq)`, with gradient."""
    rows = []
    for i in range(len(rollout)):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i].bool()]
        ids = torch.cat([prompt, rollout.completion_ids[i]])[None]
        prefix = rollout.prefix_ids[i]
        words = {"preference_ids": prefix[None]} if (prefix >= 0).any() else {}
        logits = model(ids, preference=rollout.weights[i : i + 1], **words).logits[0, len(prompt) - 1 : -1]
        rows.append(logits.gather(-1, rollout.completion_ids[i][:, None])[:, 0])
    return torch.stack(rows)


@pytest.mark.parametrize(("loss_type", "top_k"), [("rebel", None), ("rebel", 5), ("ppo", None), ("rloo", None)])
def test_the_gradient_equals_one_that_runs_every_expert_inside_the_loss(loss_type, top_k, tmp_path):
    model = tiny_ensemble().double()
    model.config.expert_top_k = top_k
    torch.nn.init.normal_(model.pcm.head.weight)
    penalties = {"beta": 0.3, "entropy_coef": 0.2, "description_coef": 0.1}
    trainer = make_trainer(tmp_path, model, loss_type=loss_type, eta=2.0, epsilon=0.1, **penalties)
    rollout, _ = sampled(trainer)
    rollout.rewards = rollout.rewards.double()
    rollout.old_log_probs = rollout.old_log_probs + 0.2 * torch.randn(rollout.old_log_probs.shape)  # a later epoch
    model.zero_grad()
    loss = trainer.compute_loss(model.pcm, rollout)
    loss.backward()
    gradient = {name: p.grad.clone() for name, p in model.pcm.named_parameters() if p.requires_grad}

    model.zero_grad()
    expected = brute_force_loss(model, rollout, loss_type)
    expected.backward()
    assert loss.dtype == torch.float64
    assert_close(loss, expected, atol=1e-10, rtol=1e-9)
    for name, value in gradient.items():  # through the body's norms, which transformers computes in float32
        assert_close(value, model.pcm.get_parameter(name).grad, atol=1e-6, rtol=1e-4)


def brute_force_loss(model, rollout, loss_type: str, shares: bool = True) -> torch.Tensor:
    """REBEL (arXiv 2404.16767), PPO (arXiv 1707.06347) and RLOO (arXiv 2402.14740), pair by pair, token by token."""
    mask = rollout.completion_mask
    log_probs = whole_log_probs(model, rollout).masked_fill(mask == 0, 0)  # what no expert keeps is -inf
    ratios = log_probs - rollout.old_log_probs * mask
    rewards, terms = rollout.rewards.tolist(), []
    for group in ((0, 1, 2), (3, 4, 5)):
        for i in group:
            others = [rewards[j] for j in group if j != i]
            advantage = rewards[i] - sum(others) / 2
            if loss_type == "rebel":
                terms += [
                    ((ratios[i].sum() - ratios[j].sum()) / 2.0 - (rewards[i] - rewards[j])) ** 2
                    for j in group
                    if j > i
                ]
            elif loss_type == "rloo":
                terms.append(-advantage * ratios[i].sum().exp())
            else:
                for token in range(int(mask[i].sum())):
                    ratio = ratios[i, token].exp()
                    terms.append(-torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage))
    most = 6 * 7  # completions, and tokens of the longest that there could be
    loss = torch.stack(terms).sum() / most if loss_type == "ppo" else torch.stack(terms).mean()
    kl, entropy, described = 0.0, 0.0, 0.0
    uniform = copy.deepcopy(model)
    torch.nn.init.zeros_(uniform.pcm.head.weight)
    initial = whole_log_probs(uniform, rollout).detach()  # without a gradient a forward sums in float32
    for i in range(len(rollout)):
        written = int(mask[i].sum())
        difference = initial[i, :written] - log_probs[i, :written]
        kl = kl + (difference.exp() - difference - 1).sum()
        if not shares:
            continue
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i].bool()]
        ids = torch.cat([prompt, rollout.completion_ids[i]])[None]
        prefix = rollout.prefix_ids[i : i + 1]
        words = {"preference_ids": prefix} if (prefix >= 0).any() else {}
        places = slice(len(prompt) - 1, len(prompt) - 1 + written)
        weights = model.compute_expert_weights(ids, preference=rollout.weights[i : i + 1], **words)[0, places]
        entropy = entropy - torch.where(weights > 0, weights * weights.clamp(min=1e-30).log(), 0.0).sum()
        all_ran = model.compute_expert_weights(ids, preference=torch.ones(1, 3), **words)[0, places]
        described = described + all_ran[:, rollout.weights[i] > 0].sum(dim=1).log().sum()
    return loss + 0.3 * kl / most - 0.2 * entropy / most - 0.1 * described / most


def test_an_update_runs_no_expert(tmp_path):
    trainer = make_trainer(tmp_path)
    rollout, _ = sampled(trainer)
    for backbone in trainer.ensemble.backbones:
        backbone.register_forward_hook(lambda *_: pytest.fail("an expert ran"))
    trainer.compute_loss(trainer.model, rollout).backward()


def constant_expert(token: int):
    """A model that says `token` nearly always."""
    model = tiny_llama(0, tie_word_embeddings=False)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = 0.4
    return model


def alternating_trainer(folder, others=(), experts=((0, [], [11]), (1, [], [12])), **settings) -> RebelTrainer:
    """
    A known problem: expert e0 writes a's and e1 b's, and both are rewarded for a, b, a, b. `others` are more
    backbones, `experts` as for `make_ensemble`, and `settings` the trainer's, but for `merge` and `reference`.
    """
    tokenizer = tiny_tokenizer()
    a, b = tokenizer("ab", add_special_tokens=False)["input_ids"]
    of_ensemble = {name: settings.pop(name) for name in ("merge", "reference") if name in settings}
    model = make_ensemble([constant_expert(a), constant_expert(b), *others], list(experts), **of_ensemble)
    torch.nn.init.zeros_(model.pcm.head.weight)
    model._tokenizer = tokenizer

    def alternates(prompts, completions, **columns):
        return [8 * sum(c == "ab"[i % 2] for i, c in enumerate(text)) / 4 for text in completions]

    return make_trainer(
        folder,
        model,
        {"e0": alternates, "e1": alternates},
        prompts=PROMPTS[:2],
        columns={"reference": ["aabb"] * 2},  # half of it right
        preference_sets=[["e0", "e1"]],
        max_completion_length=4,
        per_device_train_batch_size=32,
        num_generations=16,
        **settings,
    )


@pytest.mark.parametrize(
    ("loss_type", "settings"),
    [
        ("rebel", {"eta": 4.0, "num_iterations": 2, "entropy_coef": 0.1, "learning_rate": 1e-3}),
        ("rebel", {"exploration": 1.0, "eta": 4.0, "num_iterations": 2, "entropy_coef": 0.1, "learning_rate": 1e-3}),
        ("ppo", {"num_iterations": 2, "entropy_coef": 0.01, "learning_rate": 1e-3}),
        ("rloo", {"entropy_coef": 0.05, "learning_rate": 2e-3}),
    ],
)
def test_training_reaches_the_best_weights_of_a_known_problem(loss_type, settings, tmp_path):
    trainer = alternating_trainer(tmp_path, max_steps=320, loss_type=loss_type, **settings)
    trainer.train()
    best = 1 / (1 + math.exp(-4))
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]  # of 32 completions each
    assert rewards[0] < 0.6
    trainer.args.exploration = 0.0
    learnt = [trainer._new_rollout(number).rewards.mean().item() for number in range(20)]
    assert sum(learnt) / 20 > 0.95 * best


PARALLEL = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from test_training import SharedRollouts, make_trainer
trainer = make_trainer(sys.argv[2], trainer_class=SharedRollouts, max_steps=3,
                       per_device_train_batch_size=12 // int(sys.argv[3]), logging_strategy="no")
losses = []
step = trainer.training_step
trainer.training_step = lambda *a, **k: losses.append(step(*a, **k)) or losses[-1]
trainer.train()
losses = trainer.accelerator.reduce(torch.stack(losses), "mean")
if trainer.is_world_process_zero():
    torch.save((trainer._pcm.state_dict(), losses), sys.argv[4])
torch.distributed.destroy_process_group()  # whose threads may else abort a process that ends
"""


class SharedRollouts(RebelTrainer):
    """Every process samples all rows, which do not depend on how many there are, and takes its own."""

    def _new_rollout(self, number: int):
        rows = [{"prompt": PROMPTS[(4 * number + i) % 6]} for i in range(4) for _ in range(3)]
        told = [self.preferences.sets[i % 2] for i in range(4) for _ in range(3)]
        rollout, _ = self.rollouts.sample(rows, told, seed=number)
        rollout.old_log_probs, _ = self._old_log_probs(rollout)
        size = 12 // self.args.world_size
        return rollout.rows(slice(self.args.process_index * size, (self.args.process_index + 1) * size))


def test_two_processes_learn_as_one_with_the_same_global_batch(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(PARALLEL)
    # `accelerate launch` starts CPU processes through MPI only; torchrun starts what accelerate then finds.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    results = []
    for processes in (1, 2):
        end = tmp_path / f"{processes}.pt"
        arguments = [str(Path(__file__).parent), str(tmp_path / str(processes)), str(processes), str(end)]
        run = subprocess.run([*launch, str(processes), str(script), *arguments], capture_output=True, text=True,
                             env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
        assert run.returncode == 0, run.stderr
        results.append(torch.load(end))
    (weights, losses), (shared, shared_losses) = results
    assert_close(losses, shared_losses, atol=1e-5, rtol=1e-4)
    for name, value in weights.items():
        assert_close(value, shared[name], atol=1e-4, rtol=1e-3)


def test_what_is_logged_covers_rewards_weights_and_speed(tmp_path):
    trainer = make_trainer(tmp_path, text_only_fraction=0.5, max_steps=4)
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert {"loss", "reward", "win_share", "kl", "expert_weight_entropy", "completions/mean_length"} <= logged
    assert {"rollout_tokens_per_second", "update_tokens_per_second"} <= logged
    assert {"rewards/e0/mean", "rewards/e1/mean", "rewards/e2/mean", "expert_weights/e0"} <= logged
    assert {"expert_weights/e0+e2/e0", "expert_weights/e1+e2/e2"} & logged
    assert {"reward/e0+e2", "reward/e1+e2"} & logged
    assert any(name.startswith("reward_from_text/") for name in logged)
    assert all(entry["log_ratio"] < 1e-4 for entry in trainer.state.log_history if "log_ratio" in entry)


def test_a_reward_model_is_a_reward(tmp_path):
    config = LlamaConfig(**SIZES | HEADS, num_labels=1)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "reward")
    tiny_tokenizer().save_pretrained(tmp_path / "reward")
    trainer = make_trainer(tmp_path / "run", rewards=REWARDS | {"e0": str(tmp_path / "reward")}, max_steps=1)
    ids = tiny_tokenizer()("hello there", return_tensors="pt")["input_ids"]
    expected = model(ids).logits[0, 0].item()
    assert trainer.reward_funcs["e0"](["hello", "tell me"], [" there", " more now"])[0] == pytest.approx(
        expected, abs=1e-5
    )
    trainer.train()
    model.config._name_or_path = ""
    with pytest.raises(ValueError, match="needs a tokenizer"):
        make_trainer(tmp_path / "run", rewards=REWARDS | {"e0": model})
    loaded = make_trainer(tmp_path / "run", rewards=REWARDS | {"e0": ModelReward(model, tiny_tokenizer())})
    assert loaded.reward_funcs["e0"](["hello"], [" there"])[0] == pytest.approx(expected, abs=1e-5)


def test_a_trained_ensemble_is_saved_in_the_experts_dtype_and_loads(tmp_path):
    trainer = make_trainer(tmp_path / "run", tiny_ensemble().to(torch.bfloat16))
    assert trainer.model.dtype == torch.float32
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PCMEnsembleForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert loaded.dtype == loaded.pcm.dtype == loaded.backbones[0].dtype == torch.bfloat16
    assert torch.equal(loaded.pcm.head.weight, trainer.model.head.weight.to(torch.bfloat16))
    assert trainer.model.dtype == torch.float32


def test_a_dataset_without_prompts_and_experts_without_dimensions_are_refused(tmp_path):
    with pytest.raises(ValueError, match="needs `prompt`, lacks prompt; its columns are text"):
        RebelTrainer(tiny_ensemble(), REWARDS, RebelConfig(str(tmp_path)), Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(TypeError, match=r"`train_dataset` must be a datasets\.Dataset.*got list"):
        RebelTrainer(tiny_ensemble(), REWARDS, RebelConfig(str(tmp_path)), [{"prompt": "a"}])
    with pytest.raises(ValueError, match="Pass `train_dataset`"):
        RebelTrainer(tiny_ensemble(), REWARDS, RebelConfig(str(tmp_path), report_to="none")).train()
    model = tiny_ensemble()
    model.config.experts[1]["dimension"] = None
    with pytest.raises(ValueError, match=r"Expert 'e1' has no `dimension`.*Pass `preference_sets`"):
        make_trainer(tmp_path, model)


def test_saving_and_training_leave_the_ensemble_as_its_checkpoint_is(tmp_path):
    trainer = make_trainer(tmp_path / "run", tiny_ensemble().to(torch.bfloat16), bf16=True)
    trainer.train()
    ids = torch.tensor([list(range(20, 50))])
    before = trainer.ensemble(ids, preference="e0").logits
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.equal(trainer.ensemble(ids, preference="e0").logits, before)
    loaded = PCMEnsembleForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert loaded(ids).past_key_values is not None  # `use_cache` is still the ensemble's own
    exact = copy.deepcopy(trainer.ensemble)
    exact.pcm.to(torch.bfloat16).float()
    for name, buffer in trainer.ensemble.pcm.named_buffers():
        exact.pcm.get_buffer(name).copy_(buffer)
    expected = exact.compute_expert_weights(ids, preference=["e0", "e1"])
    assert_close(loaded.float().compute_expert_weights(ids, preference=["e0", "e1"]), expected, atol=1e-2, rtol=0)


def test_preferences_of_the_dataset_need_no_dimensions_and_may_be_missing(tmp_path):
    model = tiny_ensemble()
    for expert in model.config.experts:
        expert["dimension"] = None
    columns = {"preference": [{"e0": 1.0}, {"e0": 1.0, "e2": 0.5}] * 3}  # Arrow gives each row both names
    rewards = {name: REWARDS[name] for name in ("e0", "e2")}
    trainer = make_trainer(tmp_path, model, rewards, columns=columns)
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert {"reward/e0", "reward/e0=1+e2=0.5"} & logged
    assert set(trainer.evaluate()) >= {"eval_reward/e0", "eval_reward/e0=1+e2=0.5"}
    with pytest.raises(ValueError, match="has no `dimension`"):
        make_trainer(tmp_path, model, rewards, columns={"preference": [{"e0": 1.0}] * 5 + [None]})


def test_embeddings_learn_where_that_is_asked_for(tmp_path):
    trainer = make_trainer(tmp_path, train_embeddings=True, max_steps=4)
    embeddings = trainer.model.body.get_input_embeddings().weight
    before = embeddings.detach().clone()
    trainer.train()
    assert not torch.equal(embeddings, before)


def test_what_was_frozen_before_stays_frozen_and_the_head_learns_without_it(tmp_path):
    model = tiny_ensemble()
    model.pcm.body.requires_grad_(False)
    before = copy.deepcopy(model.pcm.state_dict())
    trainer = make_trainer(tmp_path, model, max_steps=2)
    trainer.train()
    changed = [name for name, value in model.pcm.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["head.weight"]


def test_activation_checkpointing_runs_layers_again_and_turns_no_dropout_on(tmp_path):
    model = tiny_ensemble()
    trainer = make_trainer(tmp_path, model, activation_checkpointing=True, max_steps=1)
    calls = []
    for layer in model.pcm.body.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    trainer.train()
    assert trainer.state.log_history[0]["log_ratio"] < 1e-4
    assert sum(calls) == 2 * len(model.pcm.body.layers)  # once more going back
    model.config.pcm.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"would turn the PCM's dropout on.*'attention_dropout': 0.1"):
        make_trainer(tmp_path, model, activation_checkpointing=True)


def test_training_again_begins_anew(tmp_path):
    trainer, calls = make_trainer(tmp_path), []
    trainer.train()

    def breaks(prompts, completions, **columns):
        calls.append(1)
        return [float("nan")] * len(prompts)

    trainer.scorer.reward_funcs = dict.fromkeys(REWARDS, breaks)
    with pytest.raises(ValueError, match="gave nan"):
        trainer.train()
    assert calls
    assert not list(tmp_path.glob("checkpoint-*"))  # of no update


def test_a_batch_may_be_split_in_micro_batches(tmp_path):
    results = []
    for size, parts in ((12, 1), (6, 2), (3, 4)):
        trainer = make_trainer(
            tmp_path, trainer_class=SharedRollouts, loss_type="ppo", beta=0.1, entropy_coef=0.1, max_steps=1,
            per_device_train_batch_size=size, gradient_accumulation_steps=parts, steps_per_generation=parts,
        )  # fmt: skip
        trainer.train()
        results.append((trainer.model.head.weight, trainer.state.log_history[0]["loss"]))
    for weight, loss in results[1:]:
        assert_close(weight, results[0][0], atol=1e-5, rtol=1e-3)
        assert loss == pytest.approx(results[0][1], abs=1e-4)


def test_a_tokenizer_without_a_padding_token_pads_with_its_end_token(tmp_path):
    model = tiny_ensemble()
    model._tokenizer.pad_token = None
    make_trainer(tmp_path, model, max_steps=1).train()
    assert model.tokenizer.pad_token is None
