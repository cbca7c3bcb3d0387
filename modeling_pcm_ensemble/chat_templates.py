"""Chat templates: an expert's prompt as the system turn, and templates that add no system turn of their own."""

import copy
import json
import re
from contextlib import suppress
from datetime import datetime
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

TEMPLATE_ERRORS: tuple[type[Exception], ...] = ()
try:
    from jinja2 import Environment, TemplateError, meta

    TEMPLATE_ERRORS = (TemplateError,)
except ImportError:  # rendering a template without jinja2 fails with transformers' own message
    pass

logger = logging.get_logger(__name__)

SYSTEM, USER, ASSISTANT = "1f0a6c", "8b2e4d", "c7d915"  # texts that no template contains
GENERATION, END = "<pcm-generation-5d7c1e>", "<pcm-endgeneration-5d7c1e>"
SHORTEST_MARK = 3  # characters; fewer agree by chance
ALWAYS_THERE = {"dict", "joiner", "cycler", "lipsum", "namespace", "range", "raise_exception", "strftime_now"}


class _Turns(NamedTuple):
    """
    What a chat template writes before the user's first turn, with the system message `SYSTEM` and without one, and
    what it writes from there on for a chat of the user's `USER` alone.
    """

    system: str
    default: str
    rest: str


def leading_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the BOS token that begins every text once, and would begin a prefix and a context; None without one."""
    bos = tokenizer.bos_token_id
    texts = [tokenizer("a")["input_ids"]]

    template = _templates(tokenizer).get("default")
    if template is not None:
        with suppress(*TEMPLATE_ERRORS):  # a template that wants other chats than this one
            chat = _render(tokenizer, template, ("user", USER), ("assistant", ASSISTANT))
            texts.append(_encode_text(tokenizer, chat))

    begins = bos is not None and any(ids[:1] == [bos] for ids in texts)
    return bos if begins and all(ids.count(bos) <= 1 for ids in texts) else None


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, bos: int | None) -> list[int]:
    """
    Tokenise an expert's prompt: as the system turn of the chat template where it has one, else as it stands.

    The template is handed the prompt as a system message, and writes of it what it always does; what it writes from
    the user's turn on is left to the context.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): as its author wrote it.
        prompt (`str`): an expert's.
        bos (`int`, *optional*): see [`leading_bos`].
    """
    template = _templates(tokenizer).get("default")
    if template is not None and (turns := _first_turns(tokenizer, template)) is not None:
        with_prompt = _render(tokenizer, template, ("system", prompt), ("user", USER))
        if with_prompt.endswith(turns.rest):
            return _encode_text(tokenizer, with_prompt.removesuffix(turns.rest))

    begin = [] if bos is None else [bos]
    return begin + _encode_text(tokenizer, prompt)


def without_default_system_turn(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """
    Return a copy whose chat templates write nothing but BOS before the user's first turn.

    What stands there stays where the chat begins with a system message, or tools, documents or other arguments change
    it. Templates that write nothing there stay as their author wrote them.
    """
    tokenizer = copy.copy(tokenizer)
    bos = (tokenizer.bos_token or "") if leading_bos(tokenizer) is not None else ""

    templates = _templates(tokenizer)
    for name, template in templates.items():
        turns = _first_turns(tokenizer, template)
        if turns is not None and turns.default not in ("", bos):
            begin = bos if turns.default.startswith(bos) else ""
            templates[name] = _wrapped(template, turns, begin, tokenizer.special_tokens_map)

    if templates:
        tokenizer.chat_template = templates if isinstance(tokenizer.chat_template, dict) else templates["default"]
    return tokenizer


def check_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, bos: int | None, label: str):
    """
    Warn unless [prompt | chat] is, token by token and on every day, what the tokenizer's chat template makes of the
    prompt as a system message and the chat.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): as its author wrote it.
        prompt (`str`): an expert's.
        bos (`int`, *optional*): see [`leading_bos`].
        label (`str`): the expert's, in the warning.
    """
    template = _templates(tokenizer).get("default")
    if template is None:
        return

    turns = _first_turns(tokenizer, template)
    if turns is None:
        logger.warning(
            f"The chat template has no system turn before the user's. {label} reads its prompt as plain text in front "
            "of a chat."
        )
        return

    of_ensemble, prompt_ids = without_default_system_turn(tokenizer), render_prompt(tokenizer, prompt, bos)
    question, answer = {"role": "user", "content": USER}, {"role": "assistant", "content": ASSISTANT}
    for chat in ([question], [question, answer, question]):
        with suppress(*TEMPLATE_ERRORS):  # one that takes no second question
            expected = _encode(tokenizer, [{"role": "system", "content": prompt}, *chat])
            context = _encode(of_ensemble, chat)
            if bos is not None and prompt_ids[:1] == context[:1] == [bos]:  # which the ensemble masks out
                context = context[1:]

            if prompt_ids + context != expected:
                logger.warning(
                    f"{label} reads its prompt and then a chat in other tokens than the chat template makes of both. "
                    "Either the template does not separate the system turn from the user's, or its marks are no "
                    "tokens of this tokenizer."
                )
                return

    if "strftime_now" in template and str(datetime.now().year) in turns.system:
        logger.warning(
            f"The chat template writes the date into the system turn. The prompt of {label} keeps today's. Build the "
            "ensemble again to renew it."
        )


def _encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _encode(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    return _encode_text(tokenizer, _apply(tokenizer, messages, add_generation_prompt=True))


def _templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """A copy of the chat templates by name; the only one is "default", as where there are several."""
    template = tokenizer.chat_template
    return {"default": template} if isinstance(template, str) else dict(template or {})


def _first_turns(tokenizer: PreTrainedTokenizerBase, template: str) -> _Turns | None:
    """None where the template has no system turn that ends before the user's begins."""
    try:
        system = _render(tokenizer, template, ("system", SYSTEM), ("user", USER))
        default = _render(tokenizer, template, ("user", USER))
    except TEMPLATE_ERRORS:  # how templates refuse a system message
        return None

    behind = system.partition(SYSTEM)[2]
    rest = _users_turn(tokenizer, template, default, behind)
    if not (behind.endswith(rest) and default.endswith(rest)):
        return None
    if not rest.partition(USER)[0]:  # nothing tells where the user's turn begins
        return None
    return _Turns(system.removesuffix(rest), default.removesuffix(rest), rest)


def _users_turn(tokenizer: PreTrainedTokenizerBase, template: str, default: str, behind: str) -> str:
    """
    The turn of a user's `USER` in `default`, the rendering of it alone, and in `behind`, what is written behind a
    system message; "" where it cannot be found.
    """
    bare = default.removeprefix(tokenizer.bos_token if leading_bos(tokenizer) is not None else "")
    if behind.endswith(bare):  # there is no default system turn
        return bare

    with suppress(*TEMPLATE_ERRORS):  # one that takes no second question
        exchange = _render(tokenizer, template, ("user", USER), ("assistant", ASSISTANT))
        again = _render(tokenizer, template, ("user", USER), ("assistant", ASSISTANT), ("user", USER))
        if again.startswith(exchange):
            return again.removeprefix(exchange)

    # The answer is rendered in another way when a question follows, so that its end does not tell.
    opened = _render(tokenizer, template, ("user", USER), add_generation_prompt=True)
    between = behind.partition(USER)[0]
    start = _start_of_turn(between, opened.removeprefix(default) if opened.startswith(default) else "")
    return "" if start is None else behind[start:]


def _start_of_turn(text: str, other_turn: str) -> int | None:
    """Where the last turn in `text` begins: what agrees longest, and by a mark, with another role's turn."""
    agreement = [_common_prefix(text[start:], other_turn) for start in range(len(text))]
    longest = max(agreement, default=0)
    if len(other_turn[:longest].strip()) < SHORTEST_MARK:
        return None
    return max(start for start, length in enumerate(agreement) if length == longest)


def _common_prefix(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _wrapped(template: str, turns: _Turns, bos: str, special_tokens: dict) -> str:
    """
    The template as a macro, and a cut: what it writes is compared with what it writes for a chat of one user's turn
    without any other argument, and loses what stands before that turn where both begin with the same.

    transformers finds the assistant's text by blocks marked `generation`, which it does not see inside a macro. They
    become marks in the text there, and blocks again outside.
    """
    for inside, outside in (("generation", "call pcm_generation()"), ("endgeneration", "endcall")):
        template = re.sub(rf"\{{%([-+]?)\s*{inside}\s*([-+]?)%\}}", rf"{{%\1 {outside} \2%}}", template)

    # The macro takes what the template reads from outside, but for what every template finds there.
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    free = meta.find_undeclared_variables(environment.parse(template)) | {"messages"}
    names = sorted(free - ALWAYS_THERE - set(special_tokens) - {"pcm_generation"})

    probe = json.dumps([{"role": "user", "content": USER}])
    nothing = "".join(f", {name}=none" for name in ("tools", "documents") if name in names)
    mark, end = json.dumps(GENERATION), json.dumps(END)

    return (
        f"{{% macro pcm_generation() %}}{{{{ {mark} + caller() + {end} }}}}{{% endmacro %}}"
        f"{{% macro pcm_original({', '.join(names)}) %}}\n" + template.removesuffix("\n") + "{{ '' }}{% endmacro %}"
        f"{{% set pcm_chat = pcm_original({', '.join(f'{name}={name}' for name in names)}) %}}"
        "{% if messages and messages[0]['role'] not in ['system', 'developer'] %}"
        f"{{% set pcm_default = pcm_original(messages={probe}{nothing}) %}}"
        f"{{% set pcm_default = pcm_default[:pcm_default | length - {len(turns.rest)}] %}}"
        "{% if pcm_chat.startswith(pcm_default) %}"
        f"{{% set pcm_chat = {json.dumps(bos)} + pcm_chat[pcm_default | length:] %}}"
        "{% endif %}{% endif %}"
        f"{{% set pcm_parts = pcm_chat.split({mark}) %}}{{{{ pcm_parts[0] }}}}"
        "{% for pcm_part in pcm_parts[1:] %}"
        f"{{% generation %}}{{{{ pcm_part.split({end})[0] }}}}{{% endgeneration %}}"
        f"{{{{ pcm_part.split({end})[1:] | join }}}}"
        "{% endfor %}"
    )


def _render(tokenizer: PreTrainedTokenizerBase, template: str, *turns: tuple[str, str], **options) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    return _apply(tokenizer, messages, chat_template=template, **options)


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert isinstance(text, str)  # of one chat, which transformers' annotation leaves open
    return text


__all__ = ["check_prompt", "leading_bos", "render_prompt", "without_default_system_turn"]
