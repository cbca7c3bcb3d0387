"""pipeline("text-generation"): strings, chats and batches, with the preference of the call."""

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama, tiny_tokenizer
from transformers import pipeline

from modeling_pcm_ensemble import PCMEnsembleForCausalLM

GREEDY = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}


@pytest.fixture
def ensemble() -> PCMEnsembleForCausalLM:
    backbone = tiny_llama(1)
    model = PCMEnsembleForCausalLM.from_experts(
        {
            "a": {"model": backbone, "prompt": "Be brief."},
            "b": {"model": backbone, "prompt": "Be kind."},
            "c": tiny_gpt2(2),
        },
        pcm=tiny_llama(4),
        tokenizer=tiny_tokenizer(),
    )
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def pipe(ensemble):
    return pipeline("text-generation", model=ensemble, tokenizer=ensemble.tokenizer)


def answer(ensemble, text: str, preference) -> str:
    ids = ensemble.tokenizer(text, return_tensors="pt")["input_ids"]
    output = ensemble.generate(ids, preference=preference, max_new_tokens=6, do_sample=False)
    return ensemble.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("preference", ["a", {"a": 1.0, "c": 0.5}, ["b", "c"], torch.tensor([1.0, 0, 2])], ids=str)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_strings_alone_and_in_batches(ensemble, pipe, preference, batch_size):
    texts = ["Hello there", "Why?", "Once upon a time"]
    outputs = pipe(texts, preference=preference, batch_size=batch_size, **GREEDY)
    assert [output[0]["generated_text"] for output in outputs] == [answer(ensemble, t, preference) for t in texts]
    assert pipe(texts[0], preference=preference, **GREEDY)[0]["generated_text"] == outputs[0][0]["generated_text"]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_chats_alone_and_in_batches(ensemble, pipe, batch_size):
    chats = [[{"role": "user", "content": text}] for text in ("Hello there", "Why?")]
    outputs = pipe(chats, preference="b", batch_size=batch_size, **GREEDY | {"return_full_text": True})
    for chat, output in zip(chats, outputs):
        *question, reply = output[0]["generated_text"]
        assert question == chat
        rendered = f"<s>user\n{chat[0]['content']}<e>\n<s>assistant\n"
        assert reply == {"role": "assistant", "content": answer(ensemble, rendered, "b")}


def test_preference_text_and_sampling_options_pass_through(ensemble, pipe):
    beams = {"num_return_sequences": 3, "num_beams": 3}
    outputs = pipe("Hi", preference_text="be quick", **beams, **GREEDY)
    ids = ensemble.tokenizer("Hi", return_tensors="pt")["input_ids"]
    expected = ensemble.generate(ids, preference_text="be quick", max_new_tokens=6, do_sample=False, **beams)
    texts = ensemble.tokenizer.batch_decode(expected[:, 2:], skip_special_tokens=True)
    assert [output["generated_text"] for output in outputs] == texts


def test_a_saved_folder_makes_a_pipeline(ensemble, tmp_path):
    ensemble.save_pretrained(tmp_path)
    loaded = pipeline("text-generation", str(tmp_path), trust_remote_code=True)
    assert loaded("Hi", preference="a", **GREEDY)[0]["generated_text"] == answer(ensemble, "Hi", "a")


def test_no_message_is_logged(ensemble, transformers_log):
    pipeline("text-generation", model=ensemble, tokenizer=ensemble.tokenizer)("Hi", preference="a", **GREEDY)
    assert transformers_log() == []


def test_a_wrong_preference_is_refused(pipe):
    with pytest.raises(ValueError, match="unknown expert 'z'"):
        pipe("Hi", preference="z", **GREEDY)


@pytest.mark.parametrize(
    "given",
    [
        {"preference": [{"a": 1.0}, {"b": 1.0, "c": 0.5}, {"c": 1.0}]},
        {"preference": [["a"], ["b", "c"], ["c"]]},
        {"preference": torch.tensor([[1.0, 0, 0], [0, 1, 0.5], [0, 0, 1]])},
        {"preference_text": ["be quick", None, "tell me more"], "preference": [["a", "b"], ["b", "c"], ["a", "c"]]},
    ],
    ids=["mappings", "names", "tensor", "words"],
)
def test_each_prompt_has_its_own_preference_where_all_are_one_batch(ensemble, pipe, given):
    texts = ["Hello there", "Why?", "Once upon a time"]
    torch.nn.init.normal_(ensemble.pcm.head.weight)
    found = pipe(texts, batch_size=3, **given, **GREEDY)
    for row, text in enumerate(texts):
        mine = {name: [values[row]] if isinstance(values, list) else values[row] for name, values in given.items()}
        assert found[row] == pipe(text, **mine, **GREEDY)
    for batch_size in (1, 2):
        with pytest.raises(ValueError, match="A pipeline gives all entries to each of its batches"):
            pipe(texts, batch_size=batch_size, **given, **GREEDY)


def test_a_long_text_is_cut_to_what_prompted_experts_can_read(ensemble, pipe):
    text = "".join(chr(97 + i % 26) for i in range(100))
    found = pipe(text, preference="a", handle_long_generation="hole", **GREEDY)[0]["generated_text"]
    kept = ensemble.tokenizer.model_max_length - GREEDY["max_new_tokens"]
    assert kept < 64 - len("Be brief.")
    assert found == answer(ensemble, text[-kept:], "a")
