"""A JSON grammar, and the scoring of choices, on the ensemble that ships, whose experts keep their 20 best tokens."""

import json

import pytest
import torch
import xgrammar
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from modeling_pcm_ensemble import demo

pytestmark = pytest.mark.real_model
PREFERENCES = [{"elementary": 1.0}, {"friendly": 1.0, "concise": 0.5}, {"knowledgeable": 1.0, "informative": 2.0}]
SCHEMA = {
    "type": "object",
    "properties": {"town": {"type": "string", "maxLength": 12}, "people": {"type": "integer", "maximum": 9999}},
    "required": ["town", "people"],
    "additionalProperties": False,
}
CHOICES = {
    "The capital of France is": [" Paris", " London", " Berlin", " Rome"],
    "The largest planet in the solar system is": [" Jupiter", " Saturn", " Earth", " Mercury"],
    "Two plus two equals": [" four", " five", " twelve", " seven"],
    "A triangle has three": [" sides", " wheels", " colours", " parents"],
    "Gravity is a force that pulls objects": [" together", " apart", " sideways", " Tuesday"],
}


@pytest.fixture(scope="module")
def model():
    model = demo.trained_ensemble(dtype=torch.float32)
    assert model.config.expert_top_k == 20
    return model


@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"do_sample": True, "top_k": 0, "temperature": 1.2}],
    ids=["greedy", "sampled"],
)
def test_every_row_of_a_batch_is_valid_json_under_its_own_preference(model, options):
    tokenizer = model.tokenizer
    vocabulary = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=model.config.vocab_size)
    grammar = xgrammar.GrammarCompiler(vocabulary).compile_json_schema(json.dumps(SCHEMA), any_whitespace=False)
    chats = [
        [{"role": "user", "content": f"Describe a town in {land}, as JSON."}] for land in ("Peru", "Chad", "Laos")
    ]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    constraint = xgrammar.contrib.hf.LogitsProcessor(grammar)
    torch.manual_seed(0)
    output = model.generate(
        **inputs, preference=PREFERENCES, max_new_tokens=40, logits_processor=[constraint], **options
    )
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(set(answers)) == 3
    for answer in answers:
        described = json.loads(answer)
        assert set(described) == {"town", "people"}
        assert isinstance(described["people"], int)


@pytest.mark.parametrize("preference", [None, *PREFERENCES[:2]], ids=["all", "elementary", "friendly and concise"])
def test_choices_and_whole_texts_have_finite_likelihoods_in_the_order_of_the_whole_mixture(model, preference):
    model.config.default_preference = preference
    scorer = HFLM(pretrained=model, tokenizer=model.tokenizer, batch_size=4)
    requests = [
        Instance("loglikelihood", {}, (question, choice), index)
        for index, (question, choices) in enumerate(CHOICES.items())
        for choice in choices
    ]
    whole_text = Instance("loglikelihood_rolling", {}, ("Purple refrigerators sing quietly.",), 0)
    found = {}
    for top_k in (20, None):
        model.config.expert_top_k = top_k
        scores = [score for score, _ in scorer.loglikelihood(requests, disable_tqdm=True)]
        found[top_k] = torch.tensor(scores).view(len(CHOICES), 4)
        (rolling,) = scorer.loglikelihood_rolling([whole_text], disable_tqdm=True)
        assert torch.tensor(rolling).isfinite()
    model.config.expert_top_k, model.config.default_preference = 20, None

    assert found[20].isfinite().all()
    assert (found[20] < -100).any()  # a choice that no expert kept
    assert found[20].argsort(dim=1).tolist() == found[None].argsort(dim=1).tolist()
