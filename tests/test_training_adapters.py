"""RebelTrainer on added adapters, where the strengths are the actions: what is recorded, exact gradients, learning."""

import copy

import pytest
import torch
from conftest import tiny_llama, tiny_tokenizer
from test_lora import lora_ensemble, peft_adapter
from test_training import PROMPTS, count_letters, make_trainer
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from modeling_pcm_ensemble import Preference
from modeling_pcm_ensemble.training.losses import strength_log_densities
from modeling_pcm_ensemble.training.policies import STEPS_OF_A_PIECE
from modeling_pcm_ensemble.training.preference_sampling import ToldPreference
from modeling_pcm_ensemble.training.rollouts import completion_weight_logits

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT's call
SIGMA = 0.5
WISHES = [ToldPreference(Preference({"a": 1.4, "b": -0.6})), ToldPreference(Preference({"b": 0.3}))]


@pytest.fixture
def model(tmp_path):
    backbone = tiny_llama(1)
    adapters = {name: peft_adapter(tmp_path / name, backbone, seed) for seed, name in enumerate("abc")}
    model = lora_ensemble(backbone, adapters)
    model.config.merge = "adapters"
    model._tokenizer = tiny_tokenizer()
    for expert, dimension in zip(model.config.experts, ("size", "size", "colour")):
        expert["dimension"] = dimension
    return model


REWARDS = {"a": count_letters("abcdefgh"), "b": count_letters("0123456789"), "c": count_letters("ABCDEFGHIJ")}


def make(folder, model, **settings):
    return make_trainer(
        folder, model, **{"rewards": REWARDS, "exploration": SIGMA, "max_completion_length": 20} | settings
    )


def explored(trainer):
    """A rollout of two prompts, three completions each, under two preferences, with noise on the strengths."""
    rows = [{"prompt": prompt} for prompt in PROMPTS[:2] for _ in range(3)]
    rollout, _ = trainer.rollouts.sample(rows, [wish for wish in WISHES for _ in range(3)], seed=3, exploration=SIGMA)
    rollout.old_log_probs, _ = trainer._old_log_probs(rollout)
    return rollout


def meant(model, rollout) -> torch.Tensor:
    """Strengths without noise, from plain forwards, `(rows, seq, experts)`."""
    rows = []
    for i, mask in enumerate(rollout.prompt_mask):
        prompt = rollout.prompt_ids[i][mask.bool()]
        ids = torch.cat([prompt, rollout.completion_ids[i]])[None]
        prefix = rollout.prefix_ids[i]
        words = {"preference_ids": prefix[None]} if (prefix >= 0).any() else {}
        found = model.compute_expert_weights(ids, preference=rollout.weights[i : i + 1], **words)
        rows.append(found[0, len(prompt) - 1 : -1])
    return torch.stack(rows)


def test_a_density_is_that_of_a_normal_distribution_of_logarithms():
    torch.manual_seed(0)
    means, acted = torch.rand(2, 5, 4, 3) + 0.1
    other = torch.rand(5, 4, 3) + 0.1

    def expected(mean):
        return Normal(mean.log(), SIGMA).log_prob(acted.log()).sum(dim=-1)

    found = strength_log_densities(means, acted, SIGMA) - strength_log_densities(other, acted, SIGMA)
    assert_close(found, expected(means) - expected(other))
    assert_close(strength_log_densities(-means, -acted, SIGMA), strength_log_densities(means, acted, SIGMA))


def test_the_strengths_that_acted_are_recorded_with_noise_that_stays_for_a_piece(model, tmp_path):
    rollout = explored(make(tmp_path, model))
    mask = rollout.completion_mask.bool()
    strengths = meant(model, rollout)
    assert (rollout.recorded[strengths == 0] == 0).all()
    assert (rollout.recorded.sign() == strengths.sign())[mask].all()

    runs = strengths[:, :1] != 0  # (rows, 1, experts)
    noise = (rollout.recorded / strengths).log()  # (rows, seq, experts)
    pieces = [noise[:, :STEPS_OF_A_PIECE], noise[:, STEPS_OF_A_PIECE:]]
    for piece in pieces:
        assert_close(
            piece[runs.expand_as(piece)], piece[:, :1].expand_as(piece)[runs.expand_as(piece)], atol=1e-4, rtol=0
        )
    changes = (pieces[0][:, 0] - pieces[1][:, 0])[runs[:, 0]]
    assert (changes.abs() > 1e-3).all()
    assert 0.1 < pieces[0][:, 0][runs[:, 0]].std() < 1.5


def test_the_gradient_equals_that_of_normal_distributions_pair_by_pair(model, tmp_path):
    model = model.double()
    trainer = make(tmp_path, model, eta=2.0)
    rollout = explored(trainer)
    rollout.rewards = rollout.rewards.double()
    rollout.old_log_probs = rollout.old_log_probs + 0.2 * torch.randn(rollout.old_log_probs.shape)  # a later epoch
    model.zero_grad()
    trainer.compute_loss(model.pcm, rollout).backward()
    gradient = {name: p.grad.clone() for name, p in model.pcm.named_parameters() if p.requires_grad}

    model.zero_grad()
    opinions = completion_weight_logits(
        model.pcm,
        rollout.prompt_ids,
        rollout.prompt_mask,
        rollout.completion_ids,
        rollout.completion_mask,
        rollout.prefix_ids,
    )
    log_ratios = []
    for i in range(len(rollout)):
        total = 0.0
        for token in range(int(rollout.completion_mask[i].sum())):
            for expert, weight in enumerate(rollout.weights[i]):
                if weight != 0:
                    mean = (2 * opinions[i, token, expert].sigmoid()).log()
                    acted = (rollout.recorded[i, token, expert] / weight).log()
                    constant = Normal(0.0, SIGMA).log_prob(torch.tensor(0.0))
                    total = total + (Normal(mean, SIGMA).log_prob(acted) - constant) / STEPS_OF_A_PIECE
            total = total - rollout.old_log_probs[i, token]
        log_ratios.append(total)
    terms = [
        ((log_ratios[i] - log_ratios[j]) / 2.0 - (rollout.rewards[i] - rollout.rewards[j])) ** 2
        for group in ((0, 1, 2), (3, 4, 5))
        for i in group
        for j in group
        if j > i
    ]
    torch.stack(terms).mean().backward()
    assert gradient["head.weight"].abs().max() > 1e-3
    for name, value in gradient.items():
        assert_close(value, model.pcm.get_parameter(name).grad, atol=1e-6, rtol=1e-4)


def test_training_finds_which_strengths_are_rewarded(model, tmp_path):
    """What adapter a makes likelier is rewarded, and what it makes less likely; it goes up, or down."""
    torch.nn.init.zeros_(model.pcm.head.weight)
    prompt = model.tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        full, none = (model(prompt, preference={"a": strength}).logits[0, -1] for strength in (1.5, 0.1))
    likelier = set(model.tokenizer.convert_ids_to_tokens((full - none).topk(30).indices))

    found = {}
    for sign in (1, -1):
        reward = {
            "a": lambda prompts, completions, sign=sign, **columns: [
                sign * sum(c in likelier for c in text) for text in completions
            ]
        }
        torch.nn.init.zeros_(model.pcm.head.weight)
        trainer = make(
            tmp_path / str(sign),
            model,
            rewards=reward,
            prompts=PROMPTS[:1],
            preference_sets=[{"a": 0.5}],
            max_completion_length=6,
            per_device_train_batch_size=64,
            num_generations=32,
            max_steps=40,
            eta=8.0,
            num_iterations=2,
            learning_rate=3e-3,
        )
        trainer.train()
        found[sign] = model.compute_expert_weights(prompt, preference={"a": 0.5})[0, -1, 0].item()
    assert found[1] > 0.6 > 0.4 > found[-1], found


def test_the_kl_divergence_is_that_of_normal_distributions_and_finite_under_little_noise(model, tmp_path):
    trainer = make(tmp_path, model, exploration=0.01)
    torch.manual_seed(0)
    opinions, weights = torch.randn(2, 5, 3), torch.tensor([[1.4, -0.6, 0.0], [0.0, 0.3, 0.0]])
    found = trainer.policy.kl(torch.zeros(2, 5), opinions, weights, torch.zeros(2, 5, 3))
    gates = (2 * opinions.sigmoid()).log()  # (rows, seq, experts)
    expected = kl_divergence(Normal(gates, 0.01), Normal(torch.zeros_like(gates), 0.01))
    assert_close(found, (expected * (weights != 0)[:, None]).sum(dim=-1) / STEPS_OF_A_PIECE)

    rollout = explored(trainer)
    torch.nn.init.normal_(model.pcm.head.weight)  # far from where it was sampled
    assert trainer.compute_loss(model.pcm, rollout).isfinite()


def test_a_run_goes_on_in_the_middle_of_a_rollout(model, tmp_path):
    settings = {"max_steps": 4, "num_iterations": 2, "save_strategy": "steps", "save_steps": 1}
    torch.nn.init.zeros_(model.pcm.head.weight)
    beginning = copy.deepcopy(model)
    whole = make(tmp_path, model, **settings)
    whole.train()

    resumed = make(tmp_path, beginning, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    learnt = model.pcm.head.weight
    assert learnt.abs().max() > 1e-3
    assert_close(beginning.pcm.head.weight, learnt)


def test_an_evaluation_is_without_noise(model, tmp_path):
    trainer = make(tmp_path, model, preference_sets=[["a"], ["b", "c"]])
    drawn = []
    model.register_forward_hook(lambda module, args, output: drawn.append(output.expert_weights))
    torch.nn.init.zeros_(model.pcm.head.weight)
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_reward"] <= 1
    assert {weight for weights in drawn for weight in weights.unique().tolist()} == {0.0, 1.0}


def test_strengths_of_rows_that_go_on_are_recorded_where_others_have_ended(model, tmp_path):
    model.generation_config.eos_token_id = list(range(2, 12))
    rollout = explored(make(tmp_path, model, max_completion_length=30))
    lengths = rollout.completion_mask.sum(dim=1)
    assert lengths.min() <= STEPS_OF_A_PIECE < lengths.max()
    runs = (rollout.weights != 0)[:, None] & rollout.completion_mask.bool()[..., None]
    assert (rollout.recorded[runs] != 0).all()
    assert make(tmp_path, model).compute_loss(model.pcm, rollout).isfinite()


def test_strengths_without_noise_are_refused_since_nothing_could_be_learnt_of_them(model, tmp_path):
    with pytest.raises(ValueError, match=r'`merge="adapters"` is trained on how answers change.*Set `exploration`'):
        make(tmp_path, model, exploration=0.0)


def test_an_ensemble_in_bfloat16_starts_an_update_where_it_was_sampled(model, tmp_path):
    torch.nn.init.normal_(model.pcm.head.weight, std=0.3)
    trainer = make(tmp_path, model.to(torch.bfloat16), bf16=True)
    rows = [{"prompt": prompt} for prompt in PROMPTS[:2]]
    rollout, _ = trainer.rollouts.sample(rows, WISHES, seed=3, exploration=0.0)  # without noise: what was meant
    with trainer.compute_loss_context_manager():
        h = trainer._expert_weight_logits(trainer.model, rollout)
    found = trainer.policy.expert_weights(h, rollout.weights) * rollout.completion_mask[..., None]

    assert (found.amax(dim=1) - found.amin(dim=1)).max() > 0.1  # it depends on the token
    assert_close(found.float(), rollout.recorded.float(), atol=0.02, rtol=0.02)

    before = model.pcm.head.weight.clone()
    trainer.train()
    assert model.pcm.head.weight.isfinite().all()
    assert not torch.equal(model.pcm.head.weight, before)
