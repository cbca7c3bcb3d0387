"""A preference in a generation_config is the default, the call's own wins, a wrong one is refused wherever it is."""

import copy
import json
import threading

import pytest
import torch
from conftest import make_ensemble, tiny_gpt2, tiny_llama, tiny_tokenizer
from transformers import CompileConfig, GenerationConfig, pipeline

from modeling_pcm_ensemble import PCMEnsembleForCausalLM

IDS = torch.tensor([[21, 22, 23, 24]])
OPTIONS = {"max_new_tokens": 6, "do_sample": False}
VALUES = {  # three of each argument, under which a model answers in three ways
    "preference": ["e0", {"e1": 1.0}, ["e0", "e2"]],
    "preference_text": ["be quick", "Tell me a long story!", "zzz"],
    "preference_ids": [[33, 34, 35], [41, 42], [51]],
}


@pytest.fixture
def model() -> PCMEnsembleForCausalLM:
    model = make_ensemble([tiny_llama(1), tiny_gpt2(2)], [(0, [5, 6], [11]), (0, [], [13]), (1, [8], [14, 15])])
    model.pcm.head.weight.data *= 3  # so that words change answers
    model._tokenizer = tiny_tokenizer()
    return model


def answer(model, ids=IDS, **options) -> list[int]:
    return model.generate(ids, **OPTIONS | options).flatten().tolist()


def for_call(argument: str, value):
    return torch.tensor(value) if argument == "preference_ids" else value


@pytest.fixture
def answers(model) -> dict[str, list]:
    """By argument, where it is only an argument of the call."""
    found = {a: [answer(model, **{a: for_call(a, value)}) for value in values] for a, values in VALUES.items()}
    assert all(len({*map(tuple, of_values)}) == 3 for of_values in found.values())
    return found


PLACES = {  # from the last that is asked to the first
    "default": lambda model, options, argument, value: setattr(model.config, f"default_{argument}", value),
    "the model's": lambda model, options, argument, value: setattr(model.generation_config, argument, value),
    "the call's": lambda model, options, argument, value: options.update(
        generation_config=GenerationConfig(**{argument: value})
    ),
    "argument": lambda model, options, argument, value: options.update({argument: for_call(argument, value)}),
}


@pytest.mark.parametrize("argument", VALUES)
@pytest.mark.parametrize("first", list(PLACES)[1:])
@pytest.mark.parametrize("others", [0, 1, 2, 3])
def test_the_first_place_that_says_something_is_heard(model, answers, argument, first, others):
    options, before = {}, list(PLACES)[: list(PLACES).index(first)]
    for place in before[len(before) - others :]:
        if place != "default" or argument == "preference":
            PLACES[place](model, options, argument, VALUES[argument][1])
    PLACES[first](model, options, argument, VALUES[argument][0])
    held = copy.deepcopy(model.generation_config), copy.deepcopy(options.get("generation_config"))
    assert answer(model, **options) == answers[argument][0]
    assert (model.generation_config, options.get("generation_config")) == held


@pytest.mark.parametrize("argument", VALUES)
def test_what_is_not_said_in_the_call_is_taken_from_its_configuration_and_then_the_models(model, argument):
    expected = answer(model, preference=["e0", "e1"], preference_text="be quick")
    assert answer(model, preference=["e0", "e1"]) != expected
    model.generation_config.preference_text = "be quick"
    config = GenerationConfig(preference=["e0", "e1"])
    assert answer(model, preference=["e0", "e1"]) == expected
    assert answer(model, generation_config=config) == expected


def test_words_of_the_call_replace_tokens_of_a_configuration_and_tokens_words(model, answers):
    ids, text = VALUES["preference_ids"][0], VALUES["preference_text"][0]
    model.generation_config.preference_ids = ids
    assert answer(model, preference_text=text) == answers["preference_text"][0]
    model.generation_config = GenerationConfig(preference_text=text)
    assert answer(model, preference_ids=torch.tensor(ids)) == answers["preference_ids"][0]
    assert answer(model, generation_config=GenerationConfig(preference_ids=ids)) == answers["preference_ids"][0]


@pytest.mark.parametrize("argument", VALUES)
@pytest.mark.parametrize("values", ["one", "one for each row"])
@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"guidance_scale": 2.0, "negative_prompt_ids": torch.tensor([[33, 34], [35, 36]])},
        {"guidance_scale": 2.0, "negative_prompt_ids": torch.tensor([[33, 34], [35, 36]]), "use_cache": False},
        {"prefill_chunk_size": 2},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=lambda mode: "-".join(mode) or "greedy",
)
def test_the_calls_own_wins_in_every_mode(model, argument, values, mode):
    mode["pad_token_id"] = 0
    ids, value = torch.cat([IDS, IDS + 9]), VALUES[argument][0]
    if values != "one":
        value = [[33, 34], [35, 36]] if argument == "preference_ids" else [value, VALUES[argument][2]]
        value = [["e0"], ["e1", "e2"]] if argument == "preference" else value
    given = {argument: for_call(argument, value)}
    expected = answer(model, ids, **given, **mode)
    setattr(model.generation_config, argument, VALUES[argument][1])
    assert answer(model, ids, **given, **mode) == expected


def test_the_calls_own_wins_in_compiled_steps(model, answers):
    model.generation_config.preference_text = VALUES["preference_text"][1]
    compiled = {"cache_implementation": "static", "compile_config": CompileConfig(backend="eager")}
    assert answer(model, preference_text=VALUES["preference_text"][0], **compiled) == answers["preference_text"][0]


def test_a_draft_models_own_configuration_does_not_matter(model, answers):
    drafter = tiny_llama(3)
    drafter.generation_config.preference = model.generation_config.preference = "e1"
    assert answer(model, preference="e0", assistant_model=drafter) == answers["preference"][0]


@pytest.mark.parametrize("argument", VALUES)
def test_a_saved_default_is_loaded_and_gives_way(model, answers, argument, tmp_path):
    setattr(model.generation_config, argument, VALUES[argument][1])
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())[argument] == VALUES[argument][1]
    loaded = PCMEnsembleForCausalLM.from_pretrained(tmp_path)
    assert answer(loaded) == answers[argument][1]
    assert answer(loaded, **{argument: for_call(argument, VALUES[argument][0])}) == answers[argument][0]
    config = GenerationConfig(**{argument: VALUES[argument][2]})
    assert answer(loaded, generation_config=config) == answers[argument][2]


def test_a_default_is_kept_whoever_made_the_configuration_that_holds_it(tmp_path):
    """Those of plain models, which experts are, and those of earlier checkpoints say that they hold no more."""
    model = PCMEnsembleForCausalLM.from_experts({"a": tiny_llama(1), "b": tiny_llama(2)}, pcm=tiny_llama(3))
    assert model.backbones[0].generation_config._from_model_config
    for preference, folder in (("a", tmp_path / "made"), ("b", tmp_path / "loaded")):
        model.generation_config.preference = preference
        model.save_pretrained(folder)
        model = PCMEnsembleForCausalLM.from_pretrained(folder)
        assert model.generation_config.preference == preference
        path = folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"_from_model_config": True}))
        model = PCMEnsembleForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("argument", VALUES)
@pytest.mark.parametrize("place", ["construction", "construction's configuration", "call", "call's configuration"])
def test_a_pipeline_passes_it_on(model, argument, place):
    text, values = "Hello", VALUES[argument]
    value = for_call(argument, values[0])
    ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
    expected = model.tokenizer.decode(model.generate(ids, **{argument: value}, **OPTIONS)[0, ids.shape[1] :])
    setattr(model.generation_config, argument, values[1])
    if "configuration" in place:
        given = {"generation_config": GenerationConfig(**{argument: values[0]}, **OPTIONS)}
    else:
        given = {argument: value} | OPTIONS
    made, called = (given, {}) if "construction" in place else ({}, given)
    pipe = pipeline("text-generation", model=model, tokenizer=model.tokenizer, **made)
    found = pipe(text, return_full_text=False, skip_special_tokens=False, **called)
    assert found[0]["generated_text"] == expected


@pytest.mark.parametrize("place", list(PLACES)[1:])
@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("preference", "e9", "`preference` names the unknown expert 'e9'"),
        ("preference", {"e0": -1.0}, "`preference` gives expert 'e0' the weight -1.0"),
        ("preference_text", 3, "`preference_text` must be a string"),
        ("preference_ids", [[33], [34]], r"`preference_ids` has the shape \(2, 1\)"),
        ("preference_ids", [300], "`preference_ids` holds 300"),
    ],
)
def test_what_cannot_be_is_refused_in_every_place(model, place, argument, value, words):
    options = {}
    PLACES[place](model, options, argument, value)
    with pytest.raises((TypeError, ValueError), match=words):
        answer(model, **options)


@pytest.mark.parametrize("ids", ["33", [33, "34"], [[33], 34], [3.5], [2**40], [[], [2**70]]], ids=str)
def test_what_a_file_may_hold_that_is_no_list_of_tokens_is_refused(model, ids):
    with pytest.raises((TypeError, ValueError), match="`preference_ids`"):
        answer(model, generation_config=GenerationConfig(preference_ids=ids))


def test_lists_of_tokens_may_have_unlike_lengths(model):
    rows = torch.cat([IDS, IDS])
    expected = answer(model, rows, preference_ids=torch.tensor([[33, 34], [-1, 35]]))
    assert answer(model, rows, generation_config=GenerationConfig(preference_ids=[[33, 34], [35]])) == expected


def test_a_chat_goes_on_under_its_own_preference_not_the_models_default(model, answers):
    model.generation_config.preference = "e1"
    first = model.generate(IDS, preference="e0", return_dict_in_generate=True, **OPTIONS)
    assert first.sequences.flatten().tolist() == answers["preference"][0]
    more = torch.cat([first.sequences, torch.tensor([[61]])], dim=1)
    expected = answer(model, more, preference="e0")
    assert answer(model, more, past_key_values=first.past_key_values) == expected


def test_what_began_under_a_default_and_words_goes_on_when_the_words_are_given_again(model):
    model.generation_config.preference = ["e0", "e1"]
    first = model.generate(IDS, preference_text="be quick", return_dict_in_generate=True, **OPTIONS)
    more = torch.cat([first.sequences, torch.tensor([[61]])], dim=1)
    expected = answer(model, more, preference_text="be quick")
    assert answer(model, more, preference_text="be quick", past_key_values=first.past_key_values) == expected


def test_calls_of_many_threads_each_have_their_own(model, answers):
    model.generation_config.preference = "e1"
    found = [[] for _ in range(3)]

    def ask(number: int):
        for _ in range(5):
            found[number].append(answer(model, preference=VALUES["preference"][number]))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[expected] * 5 for expected in answers["preference"]]
