"""Chat templates: an expert's prompt as the system turn, and a template that adds no system turn of its own."""

import copy
import json
from contextlib import suppress

from transformers import PreTrainedTokenizerBase

try:
    from jinja2 import TemplateError
except ImportError:  # rendering a template without jinja2 fails with transformers' own message

    class TemplateError(Exception):
        pass


SYSTEM, USER, ASSISTANT = "1f0a6c", "8b2e4d", "c7d915"  # texts that no template contains


def leading_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS token that begins every text once, so that a prefix and a context would both bring it; else None."""
    bos = tokenizer.bos_token_id
    texts = [tokenizer("a")["input_ids"]]
    with suppress(TemplateError):  # a template that wants other chats than this one
        has_template = isinstance(tokenizer.chat_template, str)
        chat = _render(tokenizer, ("user", USER), ("assistant", ASSISTANT)) if has_template else ""
        texts.append(tokenizer(chat, add_special_tokens=False)["input_ids"])
    begins = bos is not None and any(ids[:1] == [bos] for ids in texts)
    return bos if begins and all(ids.count(bos) <= 1 for ids in texts) else None


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, bos: int | None) -> list[int]:
    """
    Tokens of an expert's prompt: the system turn of the chat template where it has one, else the text as it stands.
    """
    turns = _first_turns(tokenizer)
    if turns is None:
        return [bos] * (bos is not None) + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return tokenizer(turns[0].replace(SYSTEM, prompt), add_special_tokens=False)["input_ids"]


def without_default_system_turn(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy whose chat template writes a system turn only when the chat has one."""
    tokenizer = copy.deepcopy(tokenizer)
    turns = _first_turns(tokenizer)
    if turns is None or not turns[1]:
        return tokenizer
    # A chat without system message gets one, whose turn is then cut off. What stands before it, such as today's date,
    # need not be known; what stands behind it does.
    bos, end = turns[2], SYSTEM + turns[0].split(SYSTEM)[1]
    system, bos, end = (json.dumps(text, ensure_ascii=False) for text in (SYSTEM, bos, end))
    tokenizer.chat_template = (
        "{% set has_system = messages[0]['role'] == 'system' %}"
        "{% if not has_system %}"
        f"{{% set messages = [{{'role': 'system', 'content': {system}}}] + messages %}}"
        "{% endif %}"
        "{% set rendered_chat %}" + tokenizer.chat_template.removesuffix("\n") + "{% endset %}"
        f"{{{{ rendered_chat if has_system else {bos} + rendered_chat.split({end}, 1)[1] }}}}"
    )
    return tokenizer


def _first_turns(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str] | None:
    """
    What the chat template writes before the user's first turn: for a chat with the system message `SYSTEM`; by itself,
    less BOS, for one without; and that BOS. None where there is no template, or none with a system turn of its own.
    """
    if not isinstance(tokenizer.chat_template, str):
        return None
    try:
        exchange = _render(tokenizer, ("user", USER), ("assistant", ASSISTANT))
        user_turn = _render(tokenizer, ("user", USER), ("assistant", ASSISTANT), ("user", USER)).removeprefix(exchange)
        with_system = _render(tokenizer, ("system", SYSTEM), ("user", USER))
        without_system = _render(tokenizer, ("user", USER))
    except TemplateError:  # how templates refuse a system message
        return None
    if not (with_system.endswith(user_turn) and without_system.endswith(user_turn)):
        return None
    system_turn, default = with_system.removesuffix(user_turn), without_system.removesuffix(user_turn)
    if SYSTEM not in system_turn:
        return None
    bos = "" if leading_bos(tokenizer) is None or not default.startswith(tokenizer.bos_token) else tokenizer.bos_token
    return system_turn, default.removeprefix(bos), bos


def _render(tokenizer: PreTrainedTokenizerBase, *turns: tuple[str, str]) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    return tokenizer.apply_chat_template(messages, tokenize=False)


__all__ = ["leading_bos", "render_prompt", "without_default_system_turn"]
