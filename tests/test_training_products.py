"""RebelTrainer on products: exact gradients, what a rollout keeps, what a PCM learns, and what is refused."""

import math

import pytest
import torch
from conftest import tiny_llama
from test_training import (
    PROMPTS,
    alternating_trainer,
    brute_force_loss,
    make_trainer,
    sampled,
    tiny_ensemble,
    tiny_product,
    whole_log_probs,
)
from torch.testing import assert_close

from modeling_pcm_ensemble import PCMEnsembleForCausalLM, Preference
from modeling_pcm_ensemble.training.preference_sampling import ToldPreference


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("loss_type", ["rebel", "ppo"])
def test_the_gradient_of_a_product_equals_one_over_the_whole_vocabulary(loss_type, top_k, tmp_path):
    model = tiny_product().double()
    model.config.expert_top_k = top_k
    torch.nn.init.normal_(model.pcm.head.weight, std=0.3)  # no strength so near 0 that a forward leaves it out
    trainer = make_trainer(tmp_path, model, loss_type=loss_type, eta=2.0, epsilon=0.1, beta=0.3)
    wishes = [ToldPreference(Preference({"e0": 1.4, "e2": -0.6})), ToldPreference(Preference({"e1": 0.3}))]
    rollout, _ = sampled(trainer, wishes)
    rollout.rewards = rollout.rewards.double()
    mask = rollout.completion_mask.bool()
    assert_close(rollout.old_log_probs[mask], whole_log_probs(model, rollout)[mask].detach(), atol=1e-9, rtol=0)

    rollout.old_log_probs = rollout.old_log_probs + 0.2 * torch.randn(rollout.old_log_probs.shape)  # a later epoch
    model.zero_grad()
    trainer.compute_loss(model.pcm, rollout).backward()
    gradient = {name: p.grad.clone() for name, p in model.pcm.named_parameters() if p.requires_grad}
    model.zero_grad()
    brute_force_loss(model, rollout, loss_type, shares=False).backward()
    assert gradient["head.weight"].abs().max() > 1e-3
    for name, value in gradient.items():
        assert_close(value, model.pcm.get_parameter(name).grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("top_k", [None, 5])
def test_a_rollout_of_a_product_keeps_its_candidates_in_half_precision(top_k, tmp_path):
    model = tiny_product()
    model.config.expert_top_k = top_k
    torch.nn.init.normal_(model.pcm.head.weight)
    trainer = make_trainer(tmp_path, model)
    rollout, _ = sampled(trainer)
    mask = rollout.completion_mask.bool()
    assert rollout.recorded.dtype == torch.float16
    assert rollout.recorded.shape[2:] == (1 + (4 * 5 if top_k else model.config.vocab_size), 4)
    expected = whole_log_probs(model, rollout).detach()
    assert_close(rollout.old_log_probs[mask], expected[mask], atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    ("changes", "settings", "words"),
    [
        ({"merge": "logits"}, {}, "trains `merge` 'probabilities', 'product', 'adapters', got 'logits'"),
        ({"pcm_trained_for": "probabilities"}, {}, "was trained for `merge='probabilities'`"),
        ({"merge": "probabilities", "pcm_trained_for": "adapters"}, {}, "a mixture would teach it ratios alone"),
        ({}, {"entropy_coef": 0.1}, "are of shares, which a product has none of"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused_before_anything_runs(changes, settings, words, tmp_path):
    model = tiny_product()
    vars(model.config).update(changes)
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path, model, **settings)


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (tiny_ensemble, {"weight_distribution": "signed"}, "'signed' draws weights below 0"),
        (
            tiny_product,
            {"weight_distribution": "signed", "text_only_fraction": 0.5},
            "weights below 0, which are not told in words",
        ),
        (tiny_product, {"preference_sets": [{}]}, "wants no expert"),
        (
            tiny_product,
            {"columns": {"preference": [{"e0": 0.0}] * len(PROMPTS)}},
            "Row 0 of `train_dataset`.*no expert",
        ),
        (
            tiny_product,
            {"preference_sets": [{"e0": 1, "e1": -1}], "weight_distribution": "dirichlet"},
            "'dirichlet' draws shares, and e0=1 .*e1=-1 has a weight below 0",
        ),
    ],
    ids=["signed mixture", "signed words", "nobody", "nobody in a row", "dirichlet below 0"],
)
def test_preferences_that_nothing_can_be_drawn_around_are_refused(model, options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path, model(), **options)


def test_a_reference_is_not_rewarded(tmp_path):
    model = tiny_ensemble()
    model.config.merge, model.config.reference = "product", "e0"
    assert [wish.label for wish in make_trainer(tmp_path, model).preferences.sets] == ["e1 + e2"]
    with pytest.raises(ValueError, match="which is the `reference`"):
        make_trainer(tmp_path, model, preference_sets=[["e0", "e1"]])


def test_a_rollout_of_a_product_that_would_keep_a_vocabulary_is_refused(tmp_path):
    model = tiny_product()
    model.config.vocab_size = 49152
    settings = {"per_device_train_batch_size": 1024, "max_completion_length": 40, "num_generations": 8}
    with pytest.raises(ValueError, match=r"would keep \d+ GB.*`model.config.expert_top_k`"):
        make_trainer(tmp_path, model, prompts=PROMPTS[3:4], **settings)
    model.config.expert_top_k = 20
    make_trainer(tmp_path, model, prompts=PROMPTS[3:4], **settings)


def test_shares_of_a_mixture_may_be_of_any_size(tmp_path):
    trainer = make_trainer(tmp_path, preference_sets=[{"e0": 300, "e2": 200}], max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_token_that_a_model_makes_impossible_leaves_numbers(tmp_path):
    model = tiny_product()
    model.config.expert_top_k = 98  # so that the impossible one is the last that is kept
    model.backbones[0].lm_head.register_forward_hook(
        lambda module, inputs, output: output.index_fill(-1, torch.tensor([0, 50]), float("-inf"))
    )
    trainer = make_trainer(tmp_path, model)
    trainer.train()
    assert all(math.isfinite(entry["kl"]) for entry in trainer.state.log_history if "kl" in entry)
    assert all(parameter.isfinite().all() for parameter in model.pcm.parameters())


def test_training_says_what_the_pcm_was_trained_for(tmp_path):
    settings = {"exploration": 0.5, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, tiny_product(), **settings)
    assert trainer.ensemble.config.pcm_trained_for is None
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PCMEnsembleForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.config.pcm_trained_for == "product"
    ratios = [entry["relative_strength"] for entry in trainer.state.log_history if "kl" in entry]
    assert ratios[0] == pytest.approx(1)
    assert ratios[1] != pytest.approx(1, abs=1e-6)

    weights = str(tmp_path / "checkpoint-1" / "pcm.safetensors")
    fresh = tiny_product()
    fresh.load_pcm(weights)
    assert fresh.config.pcm_trained_for == "product"

    fresh.config.merge, fresh.config.pcm_trained_for = "probabilities", None
    with pytest.raises(ValueError, match="made with merge = 'product'"):
        make_trainer(tmp_path, fresh, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_products_pcm_learns_when_a_tilt_helps_and_when_it_harms(tmp_path):
    """Of two tilts that are rewarded at one place each, the one wanted for the letter goes up there."""
    trainer = alternating_trainer(
        tmp_path,
        others=[tiny_llama(7)],
        experts=[(0, [], [11]), (1, [], [12]), (2, [], [])],
        merge="product",
        reference="e2",
        max_steps=160,
        eta=4.0,
        num_iterations=2,
        learning_rate=1e-3,
        exploration=0.5,
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    trainer.args.exploration = 0.0
    learnt = [trainer._new_rollout(number).rewards.mean().item() for number in range(20)]
    assert sum(learnt) / 20 > rewards[0] + 0.15
