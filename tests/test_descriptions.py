"""Teaching a PCM what descriptions ask for."""

import copy
import itertools
import json
import random
from collections import Counter

import pytest
import torch
from datasets import Dataset
from test_training import tiny_ensemble
from torch.testing import assert_close
from transformers import TrainerCallback

from modeling_pcm_ensemble import PCMEnsembleForCausalLM, Preference
from modeling_pcm_ensemble.preference import description_of
from modeling_pcm_ensemble.training import DescriptionConfig, DescriptionTrainer
from modeling_pcm_ensemble.training.losses import (
    expert_strength_cross_entropy,
    expert_weight_cross_entropy,
    log_described_share,
)
from modeling_pcm_ensemble.training.preference_sampling import default_preference_sets
from modeling_pcm_ensemble.weighting import expert_strengths

TEXTS = {"prompt": ["what is a cat?", "hello", "tell me more", "why?"], "completion": ["an animal", "hi", "ok.", "so"]}


TRAINER_OPTIONS = ("eval_dataset", "callbacks", "optimizers", "preference_sets", "wordings")


def make_trainer(folder, model, dataset=None, **settings):
    options = {name: settings.pop(name) for name in TRAINER_OPTIONS if name in settings}
    settings = {"max_steps": 200, "learning_rate": 1e-2, "logging_steps": 20, "use_cpu": True} | settings
    config = DescriptionConfig(str(folder), **{"report_to": "none", "disable_tqdm": True} | settings)
    return DescriptionTrainer(model, config, dataset or Dataset.from_dict(TEXTS), **options)


def test_described_experts_are_chosen_and_no_expert_runs(tmp_path):
    model = tiny_ensemble()
    before = copy.deepcopy(model.backbones.state_dict())
    for backbone in model.backbones:
        backbone.register_forward_hook(lambda *_: pytest.fail("an expert ran"))
    trainer = make_trainer(tmp_path, model)
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in model.backbones.state_dict().items())
    shares = [entry["described_share"] for entry in trainer.state.log_history if "described_share" in entry]
    assert shares[-1] > 0.95 > shares[0]
    unseen, tokenizer = "another question", model.tokenizer
    ids = torch.tensor([tokenizer(unseen)["input_ids"]])
    names = [tokenizer.decode(expert["description_ids"]) for expert in model.config.experts]
    for wanted in ([0], [1, 2]):
        told = model.compute_expert_weights(ids, preference_text="".join(names[i] for i in wanted))[0, -1]
        assert told[wanted].sum() > 0.9
        assert told[wanted].min() > 0.15
    within = torch.tensor([tokenizer(f"{names[1].strip()}\n\n{TEXTS['prompt'][1]}")["input_ids"]])
    assert model.compute_expert_weights(within)[0, -1, 1] > 0.8


def test_a_machine_with_several_gpus_trains_on_one_unless_processes_are_launched(tmp_path):
    config = DescriptionConfig(str(tmp_path), report_to="none", use_cpu=True)
    config._n_gpu = 2
    assert DescriptionTrainer(tiny_ensemble(), config, Dataset.from_dict(TEXTS)).args.n_gpu == 1


def test_experts_are_chosen_from_other_words_and_from_their_descriptions(tmp_path):
    model = tiny_ensemble()
    names = [model.tokenizer.decode(expert["description_ids"]) for expert in model.config.experts]
    wordings = [("be big", {"e0": 1.0}), ("grow", {"e0": 1.0}), ("paint it", {"e2": 1.0, "e0": 0.0})]
    make_trainer(tmp_path, model, wordings=wordings, learning_rate=3e-3, max_steps=900).train()
    ids = torch.tensor([model.tokenizer("another question")["input_ids"]])
    told = {
        words: model.compute_expert_weights(ids, preference_text=words)[0, -1, expert].item()
        for expert, words in ((0, "be big"), (0, "grow"), (2, "paint it"), (0, names[0]))
    }
    assert min(told.values()) > 0.8, told


def adding_up(model: PCMEnsembleForCausalLM) -> PCMEnsembleForCausalLM:
    """The same, in a space where wishes add up. Its experts are no adapters, but none runs in training."""
    model.config.merge = "adapters"
    return model


DEGREES = {"bit ": 0.5, "": 1.0, "so ": 1.8, "no ": 0.0}


def test_a_pcm_learns_how_much_words_wish_for(tmp_path):
    told = {}
    for (first, big), (second, red) in itertools.product(DEGREES.items(), repeat=2):
        told[f"{first}big {second}red"] = (big, 0.0, red)
    unseen = ["so big bit red", "bit big so red", "big no red"]
    wordings = [
        (text, dict(zip(("e0", "e1", "e2"), strengths)))
        for text, strengths in told.items()
        if text not in unseen and any(strengths)
    ]

    model = adding_up(tiny_ensemble())
    make_trainer(tmp_path, model, wordings=wordings, learning_rate=3e-3, max_steps=1000).train()
    ids = torch.tensor([model.tokenizer(TEXTS["prompt"][0])["input_ids"]])

    def strengths(description_ids) -> torch.Tensor:
        with torch.no_grad():
            return expert_strengths(model.pcm(ids, descriptions=[description_ids])[0], torch.ones(1, 3))[0, -1]

    errors = {}
    for text in unseen:
        [preference] = Preference.parse_batch(model.config, 1, None, text, tokenizer=model.tokenizer)
        errors[text] = (strengths(preference.description_ids) - torch.tensor(told[text])).abs().mean().item()
    assert sum(errors.values()) / len(errors) < 0.25, errors  # 0.41 from the mean of what was told

    for wanted in (["e0"], ["e0", "e2"], ["e0", "e1", "e2"]):  # told in weights, these run at them
        of_weights = strengths(description_of(model.config, Preference(dict.fromkeys(wanted, 1.0))))
        assert_close(of_weights[[int(name[1]) for name in wanted]], torch.ones(len(wanted)), atol=0.1, rtol=0)


@pytest.mark.parametrize("space", [tiny_ensemble, lambda: adding_up(tiny_ensemble())])
def test_the_loss_is_that_of_each_token_by_itself(space, tmp_path):
    model = space()
    torch.manual_seed(0)
    torch.nn.init.normal_(model.pcm.head.weight, std=0.2)  # as if rewards had taught it
    wordings = [("be big, or red", {"e0": 1.5, "e2": 0.5}), ("grow!", {"e0": 0.25, "e1": 0.0})]
    trainer = make_trainer(tmp_path, model, wordings=wordings)
    before = copy.deepcopy(model.pcm)
    torch.nn.init.normal_(model.pcm.head.weight, std=0.2)

    rows = [dict(zip(TEXTS, texts)) for texts in zip(*TEXTS.values())] * 4
    told = [trainer._draw(random.Random(seed)) for seed in range(len(rows))]
    assert len({(wish.way, wish.preference.description_ids is None) for wish in told}) == 4
    tensors = trainer._told(rows, told)
    found, metrics = trainer.compute_loss(model.pcm, tensors, return_outputs=True)

    losses = [loss_by_hand(model, before, row, wish) for row, wish in zip(rows, told)]
    assert_close(found, torch.cat(losses).mean())
    assert metrics.shape == (len(rows), 2)


def test_a_batch_is_told_in_one_way_and_in_texts_of_about_one_length(tmp_path):
    wordings = [("grow" + "!" * (number % 15), {"e0": 1.0}) for number in range(400)]
    trainer = make_trainer(tmp_path, tiny_ensemble(), wordings=wordings)
    batches = [trainer._draw_batch(8) for _ in range(200)]
    lengths = [[len(wish.preference.description_ids or ()) for wish in batch] for batch in batches]
    told = [batch for batch in lengths if any(batch)]
    ways = [{wish.way for wish in batch} for batch, of_batch in zip(batches, lengths) if any(of_batch)]
    assert {len(of_batch) for of_batch in ways} == {1}
    assert set().union(*ways) == {"preference_text", "system"}
    assert all(all(batch) for batch in told), "descriptions and wordings are in batches of their own"
    assert 0.6 < len(told) / len(batches) < 0.8

    times = Counter(id(wish.preference) for batch in batches for wish in batch)
    drawn = [times[id(wording)] for wording in trainer.wordings]
    assert sum(drawn[:40]) == pytest.approx(sum(drawn) / 10, rel=0.5), "the shortest as often as others"

    longest = max(len(wording.description_ids) for wording in trainer.wordings)
    assert max(max(batch) - min(batch) for batch in told) < longest / 5
    assert {length for batch in told for length in batch} == {
        len(wording.description_ids) for wording in trainer.wordings
    }


def loss_by_hand(model, before, row: dict, wish) -> torch.Tensor:
    """The loss of each token of a row's prompt and completion, `(seq,)`, from the definitions alone."""
    tokenizer, config, preference = model.tokenizer, model.config, wish.preference
    read = tokenizer(row["prompt"] + row["completion"])["input_ids"]

    def h(pcm, words: list[int], prefix: tuple[int, ...]) -> torch.Tensor:
        return pcm(torch.tensor([words + read]), descriptions=[prefix])[0][0, -len(read) :]

    old = h(before, [], description_of(config, Preference(preference.weights)))
    if wish.way == "system":
        of_experts = [expert["description_ids"] for expert in config.experts if expert["name"] in preference.weights]
        texts = of_experts if preference.description_ids is None else [preference.description_ids]
        system = " ".join(tokenizer.decode(list(ids)).strip() for ids in texts)
        new = h(model.pcm, tokenizer(f"{system}\n\n")["input_ids"], ())
    else:
        new = h(model.pcm, [], description_of(config, preference))

    meant = torch.tensor([preference.weights.get(name, 0.0) for name in config.expert_names])
    if not config.adds_up:
        target = meant * old.exp() / (meant * old.exp()).sum(dim=-1, keepdim=True)
        return -(target * new.log_softmax(dim=-1)).sum(dim=-1)
    target = (meant / (1 + (-old).exp())).clamp(max=0.99)
    return -(target * new.sigmoid().log() + (1 - target) * (-new).sigmoid().log()).sum(dim=-1)


@pytest.mark.parametrize(
    ("wording", "words"),
    [
        ("be big", r"`wordings\[1\]` must be a text and a dict of strengths, got 'be big'"),
        (("be big",), r"`wordings\[1\]` must be a text and a dict"),
        (("be big", ["e0"]), r"`wordings\[1\]` must be a text and a dict"),
        ((" ", {"e0": 1.0}), r"`wordings\[1\]` has an empty text"),
        (("be big", {"e9": 1.0}), r"`wordings\[1\]`, 'be big': .* unknown expert 'e9'"),
        (("be big", {"e0": -1.0}), r"`wordings\[1\]`, 'be big': .* at least 0"),
        (("be big", {"e0": 0.0}), r"`wordings\[1\]`, 'be big': .* without an expert"),
        (("be big" * 40, {"e0": 1.0}), "Row 0 of `train_dataset` has a prompt of"),
    ],
)
def test_wordings_that_are_none_or_too_long_are_refused(wording, words, tmp_path):
    with pytest.raises((TypeError, ValueError), match=words):
        make_trainer(tmp_path, tiny_ensemble(), wordings=[("grow", {"e0": 1.0}), wording])


def test_words_stand_for_the_weights_of_the_preferences_that_are_given(tmp_path):
    model = tiny_ensemble()
    names = [model.tokenizer.decode(expert["description_ids"]) for expert in model.config.experts]
    make_trainer(tmp_path, model, preference_sets=[{"e0": 9.0, "e2": 1.0}]).train()
    ids = torch.tensor([model.tokenizer("another question")["input_ids"]])
    told = model.compute_expert_weights(ids, preference_text=names[0] + names[2])[0, -1]
    assert_close(told, torch.tensor([0.9, 0.0, 0.1]), atol=0.05, rtol=0)


def test_what_the_pcm_does_under_weights_it_keeps_and_does_when_told_in_words(tmp_path):
    model = tiny_ensemble()
    torch.nn.init.normal_(model.pcm.head.weight, std=0.2)  # as if rewards had taught it
    prefix_ids = torch.tensor([description_of(model.config, Preference({"e0": 1.0, "e2": 1.0}))])
    ids = torch.tensor([model.tokenizer(TEXTS["prompt"][0] + TEXTS["completion"][0])["input_ids"]])

    def answer(**told):
        return model.compute_expert_weights(ids, **told)[0, -len(TEXTS["completion"][0]) :, [0, 2]].detach()

    before = answer(preference=["e0", "e2"])
    assert before.std(dim=0).min() > 0.1  # it depends on the context
    make_trainer(tmp_path, model, learning_rate=3e-3, max_steps=600, logging_steps=600).train()
    for told in ({"preference": ["e0", "e2"]}, {"preference_ids": prefix_ids}):
        assert (answer(**told) - before).abs().mean() < 0.04, told


def test_a_reference_is_not_taught_and_has_no_share(tmp_path):
    model = tiny_ensemble()
    model.config.merge, model.config.reference = "product", "e1"
    trainer = make_trainer(tmp_path, model, preference_sets=[["e0"]], max_steps=40, logging_steps=1)
    trainer.train()

    first = next(entry for entry in trainer.state.log_history if "described_share" in entry)
    assert first["described_share"] == pytest.approx(0.5, abs=0.01)  # e0 and e2 alike, and no third
    head = model.pcm.head.weight
    assert not head[1].any()
    assert head[2].any()  # whom the words leave out


def test_the_losses_equal_their_formulas():
    logits = torch.tensor([[[1.0, 2.0, 3.0]]])
    probs = logits.softmax(-1)[0, 0]
    assert_close(log_described_share(logits, torch.tensor([[True, False, True]]))[0, 0], (probs[0] + probs[2]).log())
    expected = -(0.25 * probs[0].log() + 0.75 * probs[2].log())
    assert_close(expert_weight_cross_entropy(logits, torch.tensor([[[0.25, 0.0, 0.75]]]))[0, 0], expected)

    p, q = logits.sigmoid()[0, 0], (-logits).sigmoid()[0, 0]
    expected = -(0.25 * p[0].log() + 0.75 * q[0].log() + q[1].log() + 0.95 * p[2].log() + 0.05 * q[2].log())
    assert_close(expert_strength_cross_entropy(logits, torch.tensor([[[0.5, 0.0, 1.9]]]))[0, 0], expected)


def test_every_choice_of_at_most_one_expert_a_dimension_is_described(tmp_path):
    model = tiny_ensemble()
    assert default_preference_sets(model.config) == [["e0", "e2"], ["e1", "e2"]]
    described = [told.label for told in make_trainer(tmp_path, model).preferences.sets]
    assert described == ["e2", "e0", "e0 + e2", "e1", "e1 + e2", "e0 + e1 + e2"]


def test_teaching_leaves_the_ensemble_as_it_was_but_for_its_pcm(tmp_path):
    model = tiny_ensemble().bfloat16()
    trainer = make_trainer(tmp_path, model, max_steps=1, bf16=True)
    trainer.train()
    assert not model.pcm.training
    ids = torch.tensor([[5, 6, 7]])
    assert model(ids).past_key_values is not None  # `use_cache` is still the ensemble's own
    trainer.save_model(tmp_path / "saved")
    loaded = PCMEnsembleForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.dtype == torch.bfloat16
    assert_close(loaded.compute_expert_weights(ids), model.compute_expert_weights(ids), atol=0.01, rtol=0)
    facts = json.loads((tmp_path / "saved" / "pcm_training.json").read_text())  # for the model card
    assert (facts["trainer"], facts["steps"]) == ("DescriptionTrainer", 1)
    assert facts["settings"]["learning_rate"] == trainer.args.learning_rate
    assert str(tmp_path) not in json.dumps(facts)


def test_an_evaluation_gives_loss_and_described_share_and_leaves_training_as_it_was(tmp_path):
    prompts = [f"{prompt} {number}" for number in range(12) for prompt in TEXTS["prompt"]]
    dataset, model = Dataset.from_dict({"prompt": prompts, "completion": TEXTS["completion"] * 12}), tiny_ensemble()
    options = {"max_steps": 40, "logging_steps": 3, "per_device_eval_batch_size": 5, "eval_dataset": dataset}
    trainer = make_trainer(tmp_path / "evaluated", model, eval_strategy="steps", eval_steps=10, **options)
    before = trainer.evaluate()
    assert before == trainer.evaluate() | {name: before[name] for name in before if "_per_" in name or "time" in name}
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_described_share"] > before["eval_described_share"]

    other = make_trainer(tmp_path / "plain", tiny_ensemble(), **options)
    other.train()
    logs = [
        [(entry["loss"], entry["described_share"]) for entry in which.state.log_history if "loss" in entry]
        for which in (trainer, other)
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 13


def test_the_described_share_of_an_evaluation_is_the_mean_over_tokens_of_all_batches(tmp_path):
    model = tiny_ensemble()
    torch.nn.init.normal_(model.pcm.head.weight)
    shares = []
    for size in (1, 3, 4):
        options = {"eval_dataset": Dataset.from_dict(TEXTS), "per_device_eval_batch_size": size}
        shares.append(make_trainer(tmp_path, model, **options).evaluate()["eval_described_share"])
    assert shares[1:] == pytest.approx([shares[0]] * 2, abs=1e-5)


def test_callbacks_and_optimizers_are_those_that_are_given(tmp_path):
    class Counts(TrainerCallback):
        steps = 0

        def on_step_end(self, *args, **kwargs):
            self.steps += 1

    model, counts = tiny_ensemble(), Counts()
    optimizer = torch.optim.SGD(model.pcm.head.parameters(), lr=0.5)
    trainer = make_trainer(tmp_path, model, max_steps=3, callbacks=[counts], optimizers=(optimizer, None))
    body = copy.deepcopy(model.pcm.body.state_dict())
    trainer.train()
    assert counts.steps == 3
    assert model.pcm.head.weight.abs().max() > 0
    assert all(torch.equal(value, body[name]) for name, value in model.pcm.body.state_dict().items())


def test_noise_on_embeddings_is_that_of_any_trainer(tmp_path):
    losses = []
    for alpha in (None, 20.0):
        trainer = make_trainer(tmp_path, tiny_ensemble(), max_steps=3, logging_steps=1, neftune_noise_alpha=alpha)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0][0] == losses[1][0]  # a head of zeros does not see it
    assert losses[0][1:] != losses[1][1:]
    assert not trainer.model.get_input_embeddings()._forward_hooks


def test_settings_may_be_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = DescriptionTrainer(tiny_ensemble(), train_dataset=Dataset.from_dict(TEXTS))
    assert isinstance(trainer.args, DescriptionConfig)
    with pytest.raises(ValueError, match="Pass `train_dataset`"):
        DescriptionTrainer(tiny_ensemble()).train()


class InterruptAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_run_that_was_interrupted_goes_on_as_one_that_was_not(tmp_path):
    wordings = [("be big", {"e0": 1.0}), ("grow", {"e0": 1.5}), ("paint it", {"e2": 1.0, "e0": 0.0})]
    settings = {"wordings": wordings, "max_steps": 8, "per_device_train_batch_size": 2, "logging_steps": 1}
    settings |= {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}

    def trained_before() -> PCMEnsembleForCausalLM:  # what it did under weights is what words are taught to do
        model = tiny_ensemble()
        torch.nn.init.normal_(model.pcm.head.weight, generator=torch.Generator().manual_seed(0))
        return model

    whole = make_trainer(tmp_path / "whole", trained_before(), **settings)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "other", trained_before(), callbacks=[InterruptAt(5)], **settings).train()
    resumed = make_trainer(tmp_path / "other", trained_before(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-3"))

    for name, value in whole.ensemble.pcm.state_dict().items():
        assert torch.equal(value, resumed.ensemble.pcm.state_dict()[name]), name
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (whole, resumed)]
    assert losses[0] == losses[1]

    for changed in ({"model": tiny_ensemble()}, {"wordings": wordings[1:]}, {"seed": 3}):
        other = make_trainer(tmp_path / "other", **{"model": trained_before()} | settings | changed)
        with pytest.raises(ValueError, match=r"was made with (PCM before training|wordings|seed) = "):
            other.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-3"))


@pytest.mark.parametrize(
    ("model", "columns", "words"),
    [
        pytest.param(tiny_ensemble, {"prompt": ["a", "b"], "completion": ["c", ""]}, "Row 1 .* empty", id="empty"),
        pytest.param(tiny_ensemble, {"prompt": ["a"], "completion": ["b" * 900]}, "Row 0 .* exceeds", id="too-long"),
        pytest.param(None, TEXTS, "must be a PCMEnsembleForCausalLM, got NoneType", id="no-ensemble"),
        pytest.param(tiny_ensemble, {"prompt": ["a"]}, "lacks completion", id="no-completions"),
    ],
)
def test_what_cannot_be_taught_is_refused(model, columns, words, tmp_path):
    with pytest.raises((TypeError, ValueError), match=words):
        make_trainer(tmp_path, model and model(), Dataset.from_dict(columns))
