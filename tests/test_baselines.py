"""Baselines: each is what its name says, and leaves the model as it was."""

import pytest
import torch
from conftest import tiny_llama, tiny_tokenizer
from huggingface_hub.errors import StrictDataclassError
from test_lora import peft_adapter
from transformers import set_seed

from modeling_pcm_ensemble import PCMEnsembleForCausalLM
from modeling_pcm_ensemble.evaluation import Mixture, PlainModel, WeightAverage
from modeling_pcm_ensemble.evaluation.baselines import chat_inputs, sample_answers

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT's call
PROMPTS = [[{"role": "user", "content": text}] for text in ("what is it?", "a")]
PREFERENCES = [{"a": 1.0, "b": 3.0}, {"c": 1.0}]
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
    assert answers(Mixture("m", model, TOKENS)) == sampled(model, preference=PREFERENCES)


def test_parts_can_be_changed_and_are_put_back(model):
    whole, head = sampled(model, preference=PREFERENCES), model.pcm.head.weight.clone()
    variants = {
        "no PCM": Mixture("m", model, TOKENS, use_pcm=False),
        "logits": Mixture("m", model, TOKENS, use_pcm=False, merge="logits"),
        "soup": Mixture("m", model, TOKENS, use_pcm=False, merge="adapters"),
        "top 1": Mixture("m", model, TOKENS, expert_top_k=1),
        "no description": Mixture("m", model, TOKENS, use_description=False),
        "no context": Mixture("m", model, TOKENS, use_context=False),
    }
    written = {name: answers(variant) for name, variant in variants.items()}
    assert len({tuple(texts) for texts in written.values()}) == len(written), written
    assert torch.equal(model.pcm.head.weight, head)
    assert sampled(model, preference=PREFERENCES) == whole
    assert sampled(model, preference=PREFERENCES, top_k=1) == answers(Mixture("m", model, TOKENS, top_k=1)) != whole
    model.config.expert_top_k = 1  # of the ensemble itself: kept, but for whoever asks for all, or merges otherwise
    assert answers(Mixture("m", model, TOKENS)) == written["top 1"]
    assert answers(Mixture("m", model, TOKENS, expert_top_k=0)) == whole
    assert answers(Mixture("m", model, TOKENS, use_pcm=False, merge="logits")) == written["logits"]
    assert model.config.expert_top_k == 1
    model.config.expert_top_k = None
    torch.nn.init.zeros_(model.pcm.head.weight)
    assert written["no PCM"] == sampled(model, preference=PREFERENCES)
    model.config.merge = "adapters"
    assert written["soup"] == sampled(model, preference=PREFERENCES)


def test_without_context_alpha_is_what_the_description_alone_gives(model):
    inputs = chat_inputs(model, model.tokenizer, [[{"role": "user", "content": ""}]])
    expert_weights = model.compute_expert_weights(**inputs, preference=PREFERENCES[0])[0, -1].tolist()
    held = {name: weight for name, weight in zip("abc", expert_weights) if weight}
    still = Mixture("m", model, TOKENS, use_context=False)
    static = Mixture("m", model, TOKENS, use_pcm=False, weights={"a=1 + b=3": held, "c": {"c": 1.0}})
    assert answers(still) == answers(static)


def test_one_expert_alone_answers_only_where_it_is_wanted(model):
    alone = Mixture("m", model, TOKENS, only="a")
    assert (alone.applies({"a": 1.0, "b": 1.0}), alone.applies({"b": 1.0})) == (True, False)
    assert answers(alone) == sampled(model, preference="a")


def test_a_weight_average_of_one_adapter_is_that_expert(model, folders):
    average = WeightAverage("w", folders["base"], {n: folders[n] for n in "abc"}, tiny_tokenizer(), TOKENS)
    one, settings = [{"a": 1.0}, {"a": 1.0}], average.settings()
    set_seed(0)
    assert average.generate(PROMPTS, one) == sampled(model, preference="a")
    assert len(average.generate(PROMPTS, [{"a": 1.0, "b": 1.0}, {"c": 1.0}])) == 2
    assert average.settings() == settings  # what was averaged last does not matter


def test_a_weight_average_adds_the_factors_of_its_adapters(folders):
    average = WeightAverage("w", folders["base"], {n: folders[n] for n in "ab"}, tiny_tokenizer(), TOKENS)
    answers(average, [{"a": 1.0, "b": 3.0}] * 2)
    layer = average.model.base_model.model.model.layers[0].mlp.up_proj
    for factors in (layer.lora_A, layer.lora_B):  # alpha / r is 2 for both
        expected = sum((2 * share) ** 0.5 * factors[name].weight for name, share in (("a", 0.25), ("b", 0.75)))
        torch.testing.assert_close(factors["average"].weight, expected)
    assert not any(module.training for module in average.model.modules())


def test_prompting_says_what_is_wanted_in_the_system_turn(folders):
    base = tiny_llama(1, max_position_embeddings=256)
    prompting = PlainModel("p", base, tiny_tokenizer(), TOKENS, {"a": "be a", "b": "be b", "c": "be c"})
    set_seed(0)
    told = [[{"role": "system", "content": text}, *p] for text, p in zip(("be a be b", "be c"), PROMPTS)]
    expected = sample_answers(base, tiny_tokenizer(), told, TOKENS)
    assert answers(prompting) == expected != answers(PlainModel("v", base, tiny_tokenizer(), TOKENS))


def test_answers_of_other_settings_are_told_apart(model, folders):
    mixtures = [
        {},
        {"use_pcm": False},
        {"use_description": False},
        {"use_context": False},
        {"merge": "logits"},
        {"expert_top_k": 1},
        {"top_k": 1},
        {"weights": {"a": {"a": 2.0}}},
        {"words": {"a": "be a"}},
        {"only": "a"},
    ]
    settings = [Mixture("m", model, TOKENS, **options).settings() for options in mixtures]
    settings.append(Mixture("m", model, TOKENS + 1).settings())
    without_pcm = Mixture("m", model, TOKENS, use_pcm=False).settings()
    torch.nn.init.ones_(model.pcm.head.weight)
    settings.append(Mixture("m", model, TOKENS).settings())
    model.config.expert_top_k = 3
    settings.append(Mixture("m", model, TOKENS).settings())
    model.config.expert_top_k = None
    assert len(set(settings)) == len(settings)
    assert Mixture("m", model, TOKENS, use_pcm=False).settings() == without_pcm  # another PCM does not matter to it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": "a", "use_context": False}, "only and use_context, which exclude"),
        ({"weights": {"a": {"a": 1.0}}, "words": {"a": "x"}}, "weights and words, which exclude"),
        ({"merge": "logit"}, "`merge` must be one of"),
        ({"merge": "logits", "expert_top_k": 1}, "`expert_top_k` cannot be used"),
    ],
)
def test_what_excludes_each_other_is_refused(model, options, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        answers(Mixture("m", model, TOKENS, **options))
    assert (model.config.merge, model.config.expert_top_k) == ("probabilities", None)


def test_a_preference_told_in_words_leaves_the_choice_to_the_pcm(model):
    told = Mixture("m", model, TOKENS, words={"a=1 + b=3": "be a", "c": "be c"})
    assert answers(told) == sampled(model, preference_text=["be a", "be c"])
    with pytest.raises(ValueError, match="no description of b"):
        answers(PlainModel("p", model.backbones[0], tiny_tokenizer(), TOKENS, {"a": "be a", "c": "be c"}))
