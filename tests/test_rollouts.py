"""Rollouts: what is sampled, what is recorded of it, and how prompts and preferences reach the models."""

import pytest
import torch
from conftest import make_ensemble, tiny_llama, tiny_tokenizer
from test_training import PROMPTS, REWARDS, constant_expert, make_trainer, sampled, tiny_ensemble, whole_log_probs
from torch.testing import assert_close

from modeling_pcm_ensemble import Preference, submodel
from modeling_pcm_ensemble.training import rollouts
from modeling_pcm_ensemble.training.preference_sampling import ToldPreference
from modeling_pcm_ensemble.training.prompts import with_words
from modeling_pcm_ensemble.training.token_sampling import TokenSampler


@pytest.mark.parametrize("steps", [2, 12])
def test_experts_log_probs_are_recorded_while_sampling(steps, tmp_path, monkeypatch):
    monkeypatch.setattr(rollouts, "STEPS_OF_A_PIECE", steps)
    model, ends = tiny_ensemble(), range(2, 12)
    model.generation_config.eos_token_id = list(ends)
    trainer = make_trainer(tmp_path, model, max_completion_length=9)
    torch.nn.init.normal_(trainer.ensemble.pcm.head.weight)
    read = []  # shapes
    trainer.ensemble.pcm.register_forward_pre_hook(lambda module, args: read.append(args[0].shape))
    rollout, _ = sampled(trainer)
    rows = [batch for batch, tokens in read if tokens == 1]
    assert (rows[-1] < len(rollout)) == (steps == 2), "rows that have ended leave the batch after so many steps"
    mask = rollout.completion_mask.bool()
    expected = whole_log_probs(trainer.ensemble, rollout)
    assert_close(rollout.old_log_probs[mask], expected[mask].detach(), atol=1e-4, rtol=0)
    did_not_run = (rollout.weights == 0)[:, None].expand_as(rollout.recorded)
    assert torch.equal(rollout.recorded.isneginf()[mask], did_not_run[mask])
    for row, ids in enumerate(rollout.completion_ids.tolist()):
        written = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
        assert rollout.completion_mask[row].tolist() == [1] * written + [0] * (len(ids) - written)


def test_a_rollout_may_be_sampled_in_parts(tmp_path):
    model = tiny_ensemble()
    torch.nn.init.normal_(model.pcm.head.weight)
    trainer = make_trainer(tmp_path, model, generation_batch_size=3)
    rollout, _ = sampled(trainer)
    assert (rollout.prompt_mask == 0).any()  # parts of other widths
    mask = rollout.completion_mask.bool()
    expected = whole_log_probs(model, rollout).detach()
    assert_close(rollout.old_log_probs[mask], expected[mask], atol=1e-4, rtol=0)
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask)]
    assert prompts == [model.tokenizer(prompt)["input_ids"] for prompt in PROMPTS[:2] for _ in range(3)]


def test_rewards_are_compared_with_several_completions_of_the_chosen_base_model(tmp_path):
    model = make_ensemble([tiny_llama(1), constant_expert(20)], [(0, [], [11]), (1, [], [12])])
    model._tokenizer = tiny_tokenizer()
    options = {"preference_sets": [["e0", "e1"]], "num_references": 3}
    for backbone in (0, 1):
        trainer = make_trainer(tmp_path, model, reference_backbone=backbone, **options)
        _, scores = sampled(trainer, trainer.preferences.sets * 2)
        for references in trainer.scorer.references.values():
            assert len(references) == 3
            assert (set(references) == {tiny_tokenizer().decode([20] * 7)}) == (backbone == 1)
        assert all(round(win * 6, 6).is_integer() for win in scores.wins)  # of 3 references in 2 dimensions


def test_references_of_other_prompts_are_drawn_from_other_random_numbers(tmp_path):
    trainer = make_trainer(tmp_path, num_references=3)
    torch.nn.init.zeros_(trainer.ensemble.backbones[0].lm_head.weight)  # any token, whatever is read
    found = []
    for prompt in ("hello", "world", "hello"):
        trainer.scorer.references.clear()
        trainer.rollouts._add_references([{"prompt": prompt}])
        found += trainer.scorer.references.values()
    assert found[0] == found[2] != found[1]


def test_drawn_tokens_follow_the_distribution():
    torch.manual_seed(0)
    probs = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    scores = (probs.log() + 3.0).expand(30_000, -1)  # unnormalised
    drawn = TokenSampler()(None, scores)
    assert (drawn.isfinite().sum(dim=1) == 1).all()
    frequencies = drawn.argmax(dim=1).bincount(minlength=6) / len(drawn)
    assert_close(frequencies, probs, atol=0.01, rtol=0)
    assert frequencies[probs == 0].sum() == 0


def test_logits_that_are_not_numbers_are_not_sampled_from():
    with pytest.raises(ValueError, match="logits are not finite"):
        TokenSampler()(None, torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]))


@pytest.mark.parametrize("prompt", ["what is a cat?", "x"], ids=["many-tokens", "one-token"])
def test_a_prompts_completions_under_one_preference_share_its_reading(prompt, tmp_path, monkeypatch):
    monkeypatch.setattr(submodel, "MIN_TOKENS_SAVED", 1)
    model = tiny_ensemble()
    torch.nn.init.normal_(model.pcm.head.weight)
    trainer = make_trainer(tmp_path, model)
    rows_read, drawn_from = [], []
    model.backbones[1].register_forward_pre_hook(
        lambda module, args, kwargs: rows_read.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    model.register_forward_hook(lambda module, args, output: drawn_from.append(output.logits[:, -1].log_softmax(-1)))
    first, second = trainer.preferences.sets  # backbone 1 is that of an expert in the second alone
    rows = [{"prompt": prompt}] * 3 + [{"prompt": "hello"}] * 2 + [{"prompt": prompt}] * 2
    rollout, _ = trainer.rollouts.sample(rows, [second] * 5 + [first] * 2, seed=0)
    assert rows_read[0] == 2
    assert all(number == 5 for number in rows_read[1:])
    length, mask = rollout.completion_ids.shape[1], rollout.completion_mask.bool()
    log_probs = torch.stack(drawn_from[-length:], dim=1)  # (rows, seq, vocab)
    sampled = log_probs.gather(-1, rollout.completion_ids[..., None])[..., 0]
    assert_close(sampled[mask], whole_log_probs(model, rollout)[mask].detach(), atol=1e-4, rtol=0)


def test_exploration_leans_to_experts_for_a_completion_and_anew_for_its_pieces(tmp_path):
    tokenizer = tiny_tokenizer()
    a, b = tokenizer("ab", add_special_tokens=False)["input_ids"]
    model = make_ensemble([constant_expert(a), constant_expert(b)], [(0, [], [11]), (1, [], [12])])
    torch.nn.init.zeros_(model.pcm.head.weight)
    model._tokenizer = tokenizer
    rewards = dict.fromkeys(["e0", "e1"], REWARDS["e0"])
    trainer = make_trainer(tmp_path, model, rewards, preference_sets=[["e0", "e1"]], max_completion_length=24)
    rows, told = [{"prompt": "hello"}] * 200, trainer.preferences.sets * 200
    covariances = {}
    for exploration in (0.0, 3.0):
        rollout, _ = trainer.rollouts.sample(rows, told, seed=0, exploration=exploration)
        shares = (rollout.completion_ids == a).float().view(200, 2, 12).mean(dim=2)  # of the first expert, by piece
        covariances[exploration] = torch.cov(shares.T)
        assert (rollout.weights == 1).all()
    assert_close(covariances[0.0], torch.eye(2) * 0.25 / 12, atol=0.008, rtol=0)  # each token is of either expert
    assert (covariances[3.0] > 0.05).all()
    (first, both), (_, second) = covariances[3.0]
    assert first + second - 2 * both > 0.1  # if the pieces had the same weights, at most 0.04
    log_probs, _ = trainer._old_log_probs(rollout)  # under the preference itself
    assert_close(log_probs, whole_log_probs(model, rollout).detach(), atol=1e-4, rtol=0)


def test_training_explores_words_too_and_evaluations_do_not(tmp_path):
    trainer, noisy = (make_trainer(tmp_path, exploration=exploration) for exploration in (0.0, 3.0))
    assert noisy.evaluate() == trainer.evaluate()
    sampled_ids, explored_ids = (which._new_rollout(0).completion_ids for which in (trainer, noisy))
    assert not torch.equal(sampled_ids, explored_ids)
    told = [ToldPreference(Preference({"e0": 1.0}), "system")] * 4
    rows = [{"prompt": "hello"}] * 4
    first, again, without = (
        trainer.rollouts.sample(rows, told, seed=0, exploration=exploration)[0] for exploration in (3.0, 3.0, 0.0)
    )
    assert first.weights.tolist() == [[1.0] * 3] * 4
    assert torch.equal(first.completion_ids, again.completion_ids)
    assert not torch.equal(first.completion_ids, without.completion_ids)


def test_words_reach_the_pcm_or_the_prompt_with_every_expert_active(tmp_path):
    trainer = make_trainer(tmp_path)
    wanted = trainer.preferences.sets[0].preference
    weights, text, system = (ToldPreference(wanted, way) for way in ("weights", "preference_text", "system"))
    rows = [{"prompt": "hello"}] * 3
    rollout, _ = trainer.rollouts.sample(rows, [weights, text, system], seed=0)
    assert rollout.weights.tolist() == [[1.0, 0.0, 1.0], [1.0] * 3, [1.0] * 3]
    prefixes = [[token for token in row if token >= 0] for row in rollout.prefix_ids.tolist()]
    assert prefixes[0] == prefixes[1] != []
    assert prefixes[2] == []
    lengths = rollout.prompt_mask.sum(dim=1).tolist()
    assert lengths[0] == lengths[1] < lengths[2]


def test_conversations_go_through_the_chat_template_and_reach_rewards_as_such(tmp_path):
    seen = []

    def reward(prompts, completions, topic, **columns):
        seen.append((prompts, completions, topic))
        return [1.0] * len(prompts)

    prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    names = ("e0", "e1", "e2")
    model = tiny_ensemble()
    model._tokenizer = tiny_tokenizer("{% for m in messages %}{{ m['role'][0] + m['content'] }}{% endfor %}>")
    columns = {"topic": list("abcdef")}
    trainer = make_trainer(tmp_path, model, dict.fromkeys(names, reward), prompts, columns, max_steps=1)
    trainer.train()
    prompts, completions, topics = seen[0]
    assert prompts[0][0]["content"] in PROMPTS
    assert completions[0][0]["role"] == "assistant"
    assert topics[0] == "abcdef"[PROMPTS.index(prompts[0][0]["content"])]


def test_rollouts_leave_the_models_own_generation_settings_aside(tmp_path):
    plain = make_trainer(tmp_path)
    penalised = tiny_ensemble()
    for model in (penalised, *penalised.backbones):
        model.generation_config.update(repetition_penalty=50.0, min_p=0.5, no_repeat_ngram_size=1)
    trainer = make_trainer(tmp_path, penalised)
    assert torch.equal(sampled(plain)[0].completion_ids, sampled(trainer)[0].completion_ids)
    assert plain.scorer.references == trainer.scorer.references
    assert penalised.generation_config.repetition_penalty == 50.0


def test_a_system_turn_is_kept_when_the_preference_is_told_in_one():
    wish = ToldPreference(Preference({"e0": 1.0}), "system")
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    model = tiny_ensemble()
    told = with_words(prompt, wish, model.config, model.tokenizer)
    assert told[0]["role"] == "system"
    assert told[0]["content"].startswith("Be brief.\n")
    assert told[1:] == prompt[1:]
    assert len(prompt[0]["content"]) == 9

    empty = with_words([{"role": "system", "content": ""}, prompt[1]], wish, model.config, model.tokenizer)
    assert empty == with_words(prompt[1:], wish, model.config, model.tokenizer)
