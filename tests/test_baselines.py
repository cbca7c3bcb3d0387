"""Baselines: each is what its name says, and leaves the model as it was."""

import json

import pytest
import torch
from conftest import tiny_llama, tiny_tokenizer
from huggingface_hub.errors import StrictDataclassError
from test_lora import peft_adapter
from transformers import set_seed

from modeling_pcm_ensemble import PCMEnsembleForCausalLM, Preference
from modeling_pcm_ensemble.evaluation import (
    PlainModel,
    PromptedModel,
    SingleExpert,
    StaticWeights,
    ToldInWords,
    TrainedEnsemble,
    WeightAverage,
    WithoutContext,
    WithoutDescription,
    collect_answers,
    make_cases,
    with_settings,
    without_pcm,
)
from modeling_pcm_ensemble.evaluation.baselines import chat_inputs, digest, sample_answers

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT's call
PROMPTS = [[{"role": "user", "content": text}] for text in ("what is it?", "a")]
WANTED = [{"a": 1.0, "b": 3.0}, {"c": 1.0}]
PREFERENCES = [Preference(weights) for weights in WANTED]
TOKENS = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    backbone = tiny_llama(1, max_position_embeddings=256)
    backbone.save_pretrained(folder / "base")
    adapters = {name: peft_adapter(folder / name, backbone, seed) for seed, name in enumerate("abc", start=1)}
    return {"base": str(folder / "base"), **adapters}


@pytest.fixture
def model(folders) -> PCMEnsembleForCausalLM:
    experts = {
        name: {"model": folders["base"], "adapter": folders[name], "description": f"be {name}"} for name in "abc"
    }
    body = tiny_llama(9, max_position_embeddings=256)
    model = PCMEnsembleForCausalLM.from_experts(experts, pcm=body, pcm_layers=1, tokenizer=tiny_tokenizer())
    torch.manual_seed(3)
    torch.nn.init.normal_(model.pcm.head.weight, std=3.0)
    return model


def answers(baseline, preferences=None) -> list[str]:
    set_seed(0)
    return baseline.generate(PROMPTS, preferences or PREFERENCES)


def sampled(model, **options) -> list[str]:
    set_seed(0)
    return sample_answers(model, tiny_tokenizer(), PROMPTS, TOKENS, **options)


def test_the_trained_mixture_is_the_model_itself(model):
    assert answers(TrainedEnsemble("m", model, TOKENS)) == sampled(model, preference=WANTED)


def test_parts_can_be_changed_and_are_put_back(model):
    whole, head = sampled(model, preference=WANTED), model.pcm.head.weight.clone()
    variants = {
        "no PCM": StaticWeights("m", model, TOKENS),
        "logits": StaticWeights("m", with_settings(model, merge="logits"), TOKENS),
        "added": StaticWeights("m", with_settings(model, merge="adapters"), TOKENS),
        "soup": StaticWeights("m", with_settings(model, merge="adapters"), TOKENS, average=True),
        "product": StaticWeights("m", with_settings(model, merge="product"), TOKENS),
        "top 1": TrainedEnsemble("m", with_settings(model, expert_top_k=1), TOKENS),
        "no description": WithoutDescription("m", model, TOKENS),
        "no context": WithoutContext("m", model, TOKENS),
    }
    written = {name: answers(variant) for name, variant in variants.items()}
    assert len({tuple(texts) for texts in written.values()}) == len(written), written
    assert torch.equal(model.pcm.head.weight, head)
    assert sampled(model, preference=WANTED) == whole
    assert sampled(model, preference=WANTED, top_k=1) == answers(TrainedEnsemble("m", model, TOKENS, top_k=1)) != whole
    model.config.expert_top_k = 1  # of the ensemble itself: kept, but for whoever asks for all, or merges otherwise
    assert answers(TrainedEnsemble("m", model, TOKENS)) == written["top 1"]
    assert answers(TrainedEnsemble("m", with_settings(model, expert_top_k=None), TOKENS)) == whole
    logits = with_settings(model, merge="logits", expert_top_k=None)
    assert answers(StaticWeights("m", logits, TOKENS)) == written["logits"]
    assert model.config.expert_top_k == 1
    model.config.expert_top_k = None
    torch.nn.init.zeros_(model.pcm.head.weight)
    assert written["no PCM"] == sampled(model, preference=WANTED)
    model.config.merge = "adapters"
    assert written["added"] == sampled(model, preference=WANTED)
    assert written["soup"] == sampled(model, preference=[{"a": 0.25, "b": 0.75}, {"c": 1.0}])
    model.config.merge = "product"
    assert written["product"] == sampled(model, preference=WANTED)
    # Weights that add up to 1 leave nothing of the reference: a mixture of logits, which is MOD's
    assert answers(StaticWeights("m", with_settings(model), TOKENS, average=True)) == written["logits"]


def test_an_expert_alone_has_its_full_tilt_whatever_the_pcm_says(model):
    product = with_settings(model, merge="product")
    found = answers(SingleExpert("a alone", product, TOKENS, "a"))
    torch.nn.init.zeros_(model.pcm.head.weight)
    assert found == sampled(product, preference=[{"a": 1.0}] * len(PROMPTS))


def test_an_average_needs_a_sum_above_0_and_a_pcm_of_another_space_does_not_get_in(model):
    away = StaticWeights("m", with_settings(model, merge="adapters"), TOKENS, average=True)
    with pytest.raises(ValueError, match="add up to -1, which no average has"):
        away.generate(PROMPTS, [Preference({"a": 1.0, "b": -2.0})] * len(PROMPTS))
    model.config.pcm_trained_for = "probabilities"
    with pytest.raises(Exception, match="was trained for"):
        with_settings(model, merge="adapters")
    assert with_settings(without_pcm(model), merge="adapters").config.pcm_trained_for is None
    assert model.config.pcm_trained_for == "probabilities"


def test_without_context_alpha_is_what_the_description_alone_gives(model):
    inputs = chat_inputs(model, model.tokenizer, [[{"role": "user", "content": ""}]])
    expert_weights = model.compute_expert_weights(**inputs, preference=WANTED[0])[0, -1].tolist()
    held = {name: weight for name, weight in zip("abc", expert_weights) if weight}
    still = WithoutContext("m", model, TOKENS)
    weights = {"a=1 + b=3": Preference(held), "c": Preference({"c": 1.0})}
    static = StaticWeights("m", model, TOKENS, weights=weights)
    assert answers(still) == answers(static)


def test_one_expert_alone_answers_only_where_it_is_wanted(model):
    alone = SingleExpert("m", model, TOKENS, "a")
    assert (alone.applies(Preference({"a": 1.0, "b": 1.0})), alone.applies(Preference({"b": 1.0}))) == (True, False)
    assert answers(alone) == sampled(model, preference="a")


def test_a_weight_average_of_one_adapter_is_that_expert(model, folders):
    average = WeightAverage("w", folders["base"], {n: folders[n] for n in "abc"}, tiny_tokenizer(), TOKENS)
    one, settings = [Preference({"a": 1.0}), Preference({"a": 1.0})], average.settings()
    set_seed(0)
    assert average.generate(PROMPTS, one) == sampled(model, preference="a")
    assert len(average.generate(PROMPTS, [Preference({"a": 1.0, "b": 1.0}), Preference({"c": 1.0})])) == 2
    assert average.settings() == settings  # what was averaged last does not matter


def test_a_weight_average_adds_the_factors_of_its_adapters(folders):
    average = WeightAverage("w", folders["base"], {n: folders[n] for n in "ab"}, tiny_tokenizer(), TOKENS)
    answers(average, [Preference({"a": 1.0, "b": 3.0})] * 2)
    layer = average.model.base_model.model.model.layers[0].mlp.up_proj
    for factors in (layer.lora_A, layer.lora_B):  # alpha / r is 2 for both
        expected = sum((2 * share) ** 0.5 * factors[name].weight for name, share in (("a", 0.25), ("b", 0.75)))
        torch.testing.assert_close(factors["average"].weight, expected)
    assert not any(module.training for module in average.model.modules())


def test_prompting_says_what_is_wanted_in_the_system_turn(folders):
    base = tiny_llama(1, max_position_embeddings=256)
    prompting = PromptedModel("p", base, tiny_tokenizer(), TOKENS, {"a": "be a", "b": "be b", "c": "be c"})
    set_seed(0)
    told = [[{"role": "system", "content": text}, *p] for text, p in zip(("be a be b", "be c"), PROMPTS)]
    expected = sample_answers(base, tiny_tokenizer(), told, TOKENS)
    assert answers(prompting) == expected != answers(PlainModel("v", base, tiny_tokenizer(), TOKENS))


def test_answers_of_other_settings_are_told_apart(model, folders):
    baselines = [
        TrainedEnsemble("m", model, TOKENS),
        StaticWeights("m", model, TOKENS),
        WithoutDescription("m", model, TOKENS),
        WithoutContext("m", model, TOKENS),
        TrainedEnsemble("m", with_settings(model, merge="logits"), TOKENS),
        TrainedEnsemble("m", with_settings(model, expert_top_k=1), TOKENS),
        TrainedEnsemble("m", model, TOKENS, top_k=1),
        TrainedEnsemble("m", model, TOKENS, weights={"a": Preference({"a": 2.0})}),
        TrainedEnsemble("m", model, TOKENS, weights={"a": Preference({"a": 2.0}, (5, 6))}),
        ToldInWords("m", model, TOKENS, {"a": "be a"}),
        SingleExpert("m", model, TOKENS, "a"),
        TrainedEnsemble("m", model, TOKENS + 1),
    ]
    settings = [baseline.settings() for baseline in baselines]
    without = StaticWeights("m", model, TOKENS).settings()
    torch.nn.init.ones_(model.pcm.head.weight)
    settings.append(TrainedEnsemble("m", model, TOKENS).settings())
    model.config.expert_top_k = 3
    settings.append(TrainedEnsemble("m", model, TOKENS).settings())
    model.config.expert_top_k = None
    assert len(set(settings)) == len(settings)
    assert StaticWeights("m", model, TOKENS).settings() == without  # another PCM does not matter to it


def test_answers_under_other_words_or_of_an_adapter_of_another_scale_are_not_reused(model, folders, tmp_path):
    cases = [make_cases(PROMPTS, [Preference({"a": 1.0}, words)]) for words in (None, (5, 6), (7, 8))]
    for number, asked in enumerate(cases, start=1):
        collect_answers(TrainedEnsemble("m", model, TOKENS), asked, tmp_path)
        assert len((tmp_path / "answers-0.jsonl").read_text().splitlines()) == number * len(PROMPTS)

    before = TrainedEnsemble("m", model, TOKENS).settings()
    entries = [
        {**entry, "adapter": entry["adapter"] and {**entry["adapter"], "lora_alpha": 99}}
        for entry in model.config.experts
    ]
    rescaled = with_settings(model)
    rescaled.config.experts = entries
    assert any(entry["adapter"] for entry in entries)
    assert TrainedEnsemble("m", rescaled, TOKENS).settings() != before


def test_settings_are_written_as_ever_so_that_kept_answers_are_found(model):
    options = {"name": "m", "max_new_tokens": 16, "use_pcm": False, "use_description": True, "use_context": True}
    options |= {"merge": "probabilities", "expert_top_k": None, "top_k": 0}
    options |= {"weights": {"a": {"a": 2.0}}, "words": None, "only": None}
    experts = [["a", 0, []], ["b", 0, []], ["c", 0, []]]
    static = StaticWeights("m", model, TOKENS, weights={"a": Preference({"a": 2.0})})
    assert static.settings() == json.dumps([options, experts, digest(model.backbones)])

    options = {"name": "m", "max_new_tokens": 16, "use_pcm": True, "use_description": False, "use_context": True}
    options |= {"merge": "logits", "expert_top_k": None, "top_k": 2, "weights": None, "words": None, "only": None}
    experts = [[e["name"], 0, [], e["description_ids"]] for e in model.config.experts]
    ablation = WithoutDescription("m", with_settings(model, merge="logits"), TOKENS, top_k=2)
    assert ablation.settings() == json.dumps([options, experts, digest(model)])


def test_an_ensemble_of_other_settings_shares_its_weights(model):
    other = with_settings(without_pcm(model), expert_top_k=2)
    weights = dict(model.named_parameters())
    for name, weight in other.named_parameters():
        assert (weight is weights[name]) == (name != "pcm.head.weight"), name
    assert not other.pcm.head.weight.any()
    assert model.pcm.head.weight.any()
    assert (model.config.expert_top_k, other.config.expert_top_k) == (None, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: SingleExpert("m", m, TOKENS, "a", weights={}), "unexpected keyword argument 'weights'"),
        (lambda m: ToldInWords("m", m, TOKENS, {}, weights={}), "unexpected keyword argument 'weights'"),
        (lambda m: TrainedEnsemble("m", with_settings(m, merge="logit"), TOKENS), "`merge` must be one of"),
        (
            lambda m: TrainedEnsemble("m", with_settings(m, merge="logits", expert_top_k=1), TOKENS),
            "`expert_top_k` cannot be used",
        ),
    ],
)
def test_what_excludes_each_other_is_refused(model, make, message):
    with pytest.raises((TypeError, StrictDataclassError), match=message):
        make(model)
    assert (model.config.merge, model.config.expert_top_k) == ("probabilities", None)


def test_a_preference_told_in_words_leaves_the_choice_to_the_pcm(model):
    told = ToldInWords("m", model, TOKENS, words={"a=1 + b=3": "be a", "c": "be c"})
    assert answers(told) == sampled(model, preference_text=["be a", "be c"])
    with pytest.raises(ValueError, match="no description of b"):
        answers(PromptedModel("p", model.backbones[0], tiny_tokenizer(), TOKENS, {"a": "be a", "c": "be c"}))
