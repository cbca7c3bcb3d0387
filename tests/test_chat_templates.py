"""
Chat templates, all that TRL ships and those of SmolLM2, Llama-3, Qwen2.5 and Gemma: prompts as system turns, and
contexts that lose nothing.
"""

import copy
import time
from pathlib import Path

import pytest
import torch
import trl
from conftest import SYSTEM_TEMPLATE, tiny_llama, tiny_tokenizer
from datasets import Dataset
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from modeling_pcm_ensemble import PCMEnsembleForCausalLM, demo
from modeling_pcm_ensemble.chat_templates import check_prompt, leading_bos, render_prompt, without_default_system_turn
from modeling_pcm_ensemble.training import add_mixture_head

SHIPPED = {path.stem: path.read_text() for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")}
NAMES = ["smollm2", *sorted(SHIPPED)]
BOS = {"llama3": "<|begin_of_text|>", "cohere": "<BOS_TOKEN>", "gemma": "<bos>", "lfm2": "<|startoftext|>"}
MARKS = [
    *("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|USER_TOKEN|>", "<|SYSTEM_TOKEN|>"),
    *("<|user|>", "<|system|>", "<|assistant|>", "<｜User｜>", "<｜Assistant｜>", "<|turn>", "<turn|>"),
]
# Gemma's first refuses a system message, and its third writes it into the user's turn; the others read messages of
# parts alone.
WITHOUT_SYSTEM_TURN = {"gemma", "gemma3", "idefics3", "llava_next", "smolvlm"}
SWITCHES_IN_THE_SYSTEM_TURN = {"qwen3_8"}

SYSTEM = {"role": "system", "content": "Answer like a pirate.\n"}
USER = {"role": "user", "content": "What is gravity?"}
ANSWER = {"role": "assistant", "content": "A force."}
TOWN = {"type": "string", "description": "its name"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a town.",
        "parameters": {"type": "object", "properties": {"town": TOWN}, "required": ["town"]},
    },
}


class Tokenizers(dict):
    """
    SmolLM2's tokenizer with each template, and with the marks of its turns as tokens: to the tokenizers that the
    templates were written for, each is one token.
    """

    def __missing__(self, name: str) -> PreTrainedTokenizerBase:
        if name == "smollm2":
            self[name] = AutoTokenizer.from_pretrained(demo.fetch_smollm2())
        elif name in SHIPPED:
            bos = next((token for family, token in BOS.items() if name.startswith(family)), "<bos>")
            self[name] = copy.copy(self[bos])
            self[name].chat_template = SHIPPED[name]
        else:
            self[name] = copy.deepcopy(self["smollm2"])
            self[name].add_special_tokens({"bos_token": name})
            self[name].add_tokens([AddedToken(mark, special=True) for mark in MARKS])
        return self[name]


@pytest.fixture(scope="module")
def tokenizers() -> Tokenizers:
    return Tokenizers()


def family(name: str) -> str:
    return name.removesuffix("_training")


def render(tokenizer, messages, **options):
    """The text, or the kind of error that the template raises."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:
        return type(error)


def encode(tokenizer, messages, **options) -> list[int]:
    return tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"]


def without_bos(tokenizer, ids: list[int]) -> list[int]:
    bos = leading_bos(tokenizer)
    return ids[1:] if bos is not None and ids[:1] == [bos] else ids


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_and_a_chat_are_what_the_template_makes_of_both(tokenizers, name, transformers_log):
    tokenizer, prompt = tokenizers[name], SYSTEM["content"]
    bos, of_ensemble = leading_bos(tokenizer), without_default_system_turn(tokenizer)
    prompt_ids = render_prompt(tokenizer, prompt, bos)
    check_prompt(tokenizer, prompt, bos, "Expert 'a'")

    if family(name) in WITHOUT_SYSTEM_TURN:
        assert tokenizer.decode(without_bos(tokenizer, prompt_ids)) == prompt
        assert of_ensemble.chat_template == tokenizer.chat_template
        assert "no system turn" in transformers_log()[-1]
        return

    for chat in ([USER], [USER, ANSWER, USER], [USER, ANSWER]):
        for options in (
            {},
            {"add_generation_prompt": True},
            {"add_generation_prompt": True, "enable_thinking": False},
        ):
            if "enable_thinking" in options and family(name) in SWITCHES_IN_THE_SYSTEM_TURN:
                continue
            context = without_bos(tokenizer, encode(of_ensemble, chat, **options))
            assert prompt_ids + context == encode(tokenizer, [SYSTEM, *chat], **options)
    assert not [text for text in transformers_log() if "writes the date" not in text]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_the_template_renders_is_lost(tokenizers, name):
    """All but the default system turn, where neither a system message nor an argument has a part in it."""
    tokenizer = tokenizers[name]
    of_ensemble = without_default_system_turn(tokenizer)
    bos = "" if leading_bos(tokenizer) is None else tokenizer.bos_token
    plain, rest = str(render(tokenizer, [USER])), str(render(of_ensemble, [USER]))
    default = plain.removesuffix(rest.removeprefix(bos))

    arguments = [
        {"tools": [WEATHER]},
        {"documents": [{"title": "Towns", "text": "Bern is one.", "contents": "Bern is one."}]},
        {"enable_thinking": True},
        {"enable_thinking": False},
        {"reasoning_effort": "high"},
        {"reasoning_effort": "low", "tools": [WEATHER]},
        {"date_string": "1 May 1999"},
        {"model_identity": "You are a pirate."},
    ]
    for options in arguments:
        for chat in ([USER], [USER, ANSWER, USER], [SYSTEM, USER], [SYSTEM, USER, ANSWER]):
            original, found = render(tokenizer, chat, **options), render(of_ensemble, chat, **options)
            if found != original:
                assert chat[0] is USER
                assert default not in ("", bos)
                assert default + found.removeprefix(bos) == original


@pytest.mark.parametrize("name", [name for name in SHIPPED if "generation %}" in SHIPPED[name]])
def test_the_mask_of_the_assistants_text_marks_the_same_text(tokenizers, name):
    tokenizer = tokenizers[name]
    of_ensemble = without_default_system_turn(tokenizer)
    for chat in ([USER, ANSWER], [USER, ANSWER, USER, ANSWER | {"content": "Mass."}], [SYSTEM, USER, ANSWER]):
        rendered = render(tokenizer, chat)
        if not isinstance(rendered, str):  # the template refuses such a chat
            continue
        for options in ({}, {"tools": [WEATHER]}):
            marked = []
            for one in (tokenizer, of_ensemble):
                output = one.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True, **options)
                pairs = zip(output["input_ids"], output["assistant_masks"])
                marked.append(one.decode([token for token, mask in pairs if mask]))
            assert marked[0] == marked[1]
            assert chat[-1]["content"] in marked[0] or chat[-1]["content"] not in rendered


@pytest.mark.parametrize("name", ["qwen3", "phi3_5", "llama3", "gemma4", "deepseekv3"])
def test_templates_without_a_default_system_turn_stay_as_their_author_wrote_them(tokenizers, name):
    assert without_default_system_turn(tokenizers[name]).chat_template == SHIPPED[name]


def test_each_of_several_templates_loses_its_own_default_turn(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["qwen2_5"])
    tokenizer.chat_template = {"default": SHIPPED["qwen2_5"], "tool_use": SHIPPED["nemotron_3_nano"]}
    bos = leading_bos(tokenizer)
    prompt_ids = render_prompt(tokenizer, SYSTEM["content"], bos)
    of_ensemble = without_default_system_turn(tokenizer)
    assert set(of_ensemble.chat_template) == {"default", "tool_use"}
    expected = tokenizer.apply_chat_template([SYSTEM, USER], return_dict=True)["input_ids"]
    assert prompt_ids + of_ensemble.apply_chat_template([USER], return_dict=True)["input_ids"] == expected
    assert "get_weather" in render(of_ensemble, [USER], tools=[WEATHER])
    assert "system" not in render(of_ensemble, [USER], chat_template="tool_use")


def test_the_templates_of_an_ensemble_survive_saving_and_adding_an_expert(tokenizers, tmp_path):
    """An expert that is added later reads its prompt through a template that is wrapped already."""
    backbone = tiny_llama(1, vocab_size=len(tokenizers["qwen2_5"]), max_position_embeddings=2048)
    model = PCMEnsembleForCausalLM.from_experts(
        {"a": {"model": backbone, "prompt": "Be brief."}}, pcm=backbone, pcm_layers=1, tokenizer=tokenizers["qwen2_5"]
    )
    model.save_pretrained(tmp_path)
    loaded = PCMEnsembleForCausalLM.from_pretrained(tmp_path)
    loaded.add_expert("b", {"model": loaded.backbones[0], "prompt": SYSTEM["content"]})
    expected = render_prompt(tokenizers["qwen2_5"], SYSTEM["content"], None)
    assert loaded.config.experts[1]["prompt_ids"] == expected
    assert loaded.tokenizer.chat_template == model.tokenizer.chat_template
    assert "system" not in render(loaded.tokenizer, [USER])


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # TRL's own
def test_supervised_fine_tuning_learns_from_the_assistants_text_alone(tokenizers, tmp_path):
    tokenizer = copy.deepcopy(tokenizers["qwen2_5_training"])
    tokenizer.pad_token = "<|endoftext|>"
    backbone = tiny_llama(1, vocab_size=len(tokenizer), max_position_embeddings=2048)
    model = PCMEnsembleForCausalLM.from_experts(
        {"a": {"model": backbone, "prompt": "Be brief."}, "b": backbone},
        pcm=backbone,
        pcm_layers=1,
        tokenizer=tokenizer,
    )
    trainer = SFTTrainer(
        model,
        SFTConfig(str(tmp_path), assistant_only_loss=True, max_steps=1, report_to=[], use_cpu=True, max_length=None),
        train_dataset=Dataset.from_list([{"messages": [USER, ANSWER]}] * 2),
        processing_class=model.tokenizer,
    )
    add_mixture_head(trainer)
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch["labels"][0]
    assert tokenizer.decode(labels[labels != -100]) == "\nA force.<|im_end|>\n"  # as the template marks it
    loss = trainer.compute_loss(trainer.model, dict(batch))
    assert torch.isfinite(loss)


def test_a_dated_default_system_turn_stays_away_on_the_next_day(monkeypatch):
    template = SYSTEM_TEMPLATE.replace("You are a test.", "' + strftime_now('%d %H') + '")
    tokenizer, of_ensemble, hours = tiny_tokenizer(template), None, []
    for zone in ("UTC+11", "UTC-12"):  # a day, less an hour, apart
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        of_ensemble = of_ensemble or without_default_system_turn(tokenizer)
        hours.append(render(tokenizer, [USER]))
        assert render(of_ensemble, [USER]) == "<s>user\nWhat is gravity?<e>\n"
    monkeypatch.undo()
    time.tzset()
    assert hours[0] != hours[1]


def test_a_date_in_the_prompts_own_turn_is_said(tokenizers, transformers_log):
    check_prompt(tokenizers["llama3_2"], "Be brief.", leading_bos(tokenizers["llama3_2"]), "Expert 'a'")
    assert "The prompt of Expert 'a' keeps today's" in transformers_log()[-1]


def test_a_tokenizer_that_joins_the_turns_is_named(tokenizers, transformers_log):
    tokenizer = copy.copy(tokenizers["smollm2"])  # Llama-3's marks are many tokens to it, and merge
    tokenizer.chat_template = SHIPPED["llama3"]
    check_prompt(tokenizer, "Be brief.", leading_bos(tokenizer), "Expert 'a'")
    assert "does not separate the system turn" in transformers_log()[-1]


def test_a_prompt_is_the_system_turn_of_the_chat_template():
    tokenizer = tiny_tokenizer()
    model = PCMEnsembleForCausalLM.from_experts(
        {"a": {"model": tiny_llama(1), "prompt": "Be {{brief}}."}}, pcm=tiny_llama(2), tokenizer=tokenizer
    )
    assert tokenizer.decode(model.config.experts[0]["prompt_ids"]) == "<s>system\nBe {{brief}}.<e>\n"
    chat = [{"role": "user", "content": "Hi"}]
    rendered = model.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<s>user\nHi<e>\n<s>assistant\n"
    told = [{"role": "system", "content": "You are a test."}, *chat]
    assert model.tokenizer.apply_chat_template(told, tokenize=False) == tokenizer.apply_chat_template(
        chat, tokenize=False
    )
    assert tokenizer.chat_template == SYSTEM_TEMPLATE  # the caller's own is not touched


FOLDING = "{% for m in messages %}{{ '[' + m['content'] + ']' }}{% endfor %}"
REFUSING = "{{ raise_exception('no system') if messages[0]['role'] == 'system' }}{{ messages[0]['content'] }}"


@pytest.mark.parametrize("template", [None, FOLDING, REFUSING], ids=["none", "no-system-turn", "refuses-system"])
def test_a_prompt_is_plain_text_where_the_template_has_no_system_turn(template):
    if template == FOLDING:  # a template that writes the system message into the user's turn
        template = "{% if messages[0]['role'] == 'system' %}{{ '[' + messages[0]['content'] + '|' + messages[1]['content'] + ']' }}{% else %}" + FOLDING + "{% endif %}"  # fmt: skip  # noqa: E501
    tokenizer = tiny_tokenizer(template)
    model = PCMEnsembleForCausalLM.from_experts(
        {"a": {"model": tiny_llama(1), "prompt": "Be brief.\n"}}, pcm=tiny_llama(2), tokenizer=tokenizer
    )
    assert tokenizer.decode(model.config.experts[0]["prompt_ids"]) == "Be brief.\n"


VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{{ messages[0]['content'] }}"
    "{% else %}{% set rest = messages %}{{ 'A chat with a polite assistant.' }}{% endif %}"
    "{% for m in rest %}{{ (' USER: ' if m['role'] == 'user' else ' ASSISTANT: ') + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
FOLDED = (
    "{% for m in messages %}{% if m['role'] != 'system' %}"
    "{{ ('### Instruction:\n' if m['role'] == 'user' else '### Response:\n') }}"
    "{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n' }}{% endif %}"
    "{{ m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n### Response:\n' }}{% endif %}"
)
ONE_QUESTION = SYSTEM_TEMPLATE.replace(
    "{% for message", "{% if messages | length > 2 %}{{ raise_exception('one question') }}{% endif %}{% for message", 1
)


@pytest.mark.parametrize(
    ("template", "prompt", "context"),
    [
        pytest.param(VICUNA, "Be brief.", " USER: Hi ASSISTANT:", id="words-as-marks"),
        pytest.param(
            VICUNA.replace("{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}", ""),
            "Be brief.",
            " USER: Hi",
            id="no-generation-prompt",
        ),
        pytest.param(FOLDED, None, "### Instruction:\nHi\n\n### Response:\n", id="folded"),
        pytest.param(ONE_QUESTION, "<s>system\nBe brief.<e>\n", "<s>user\nHi<e>\n<s>assistant\n", id="one-question"),
    ],
)
def test_turns_without_marks_of_their_own_are_cut_where_they_begin(template, prompt, context, transformers_log):
    tokenizer = tiny_tokenizer(template)
    model = PCMEnsembleForCausalLM.from_experts(
        {"a": {"model": tiny_llama(1), "prompt": "Be brief."}}, pcm=tiny_llama(2), tokenizer=tokenizer
    )
    assert tokenizer.decode(model.config.experts[0]["prompt_ids"]) == (prompt or "Be brief.")
    rendered = render(model.tokenizer, [{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert rendered == context
    assert [text for text in transformers_log() if "no system turn" in text] == (
        [] if prompt else [transformers_log()[0]]
    )


def test_experts_that_lose_the_default_system_turn_are_named(transformers_log):
    backbone = tiny_llama(1)
    model = PCMEnsembleForCausalLM.from_experts(
        {"a": backbone, "b": backbone}, pcm=tiny_llama(2), tokenizer=tiny_tokenizer()
    )
    assert transformers_log() == []
    model.add_expert("c", {"model": backbone, "prompt": "Be brief."})
    assert "experts a, b have none, and read chats without any system turn" in transformers_log()[-1]
