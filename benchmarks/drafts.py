"""
Greedy answers with drafts, by preference: by prompt lookup, the experts' base model, the first of the wanted experts,
the PCM's body. Beside them one plain model, and compiled steps, which transformers takes no drafts for.
"""

import copy
import itertools
from functools import partial

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, CompileConfig, PreTrainedModel

from modeling_pcm_ensemble import demo

from .common import DTYPE, grouped_bars, interleaved, koala_chats, load_backbone, summary, write_results

PREFERENCES = (["friendly"], ["knowledgeable", "informative"], ["elementary", "concise", "friendly"])
PLAIN, COMPILED, LOOKUP, BASE, EXPERT, PCM = (
    "no drafts",
    "no drafts, compiled",
    "prompt lookup",
    "base model",
    "one expert",
    "PCM through the LM head",
)
FAST = {"cache_implementation": "static", "compile_config": CompileConfig()}


def add_arguments(parser):
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--drafted", type=int, nargs="+", default=[2, 4, 8], help="tokens drafted at once")


@torch.no_grad()
def run(arguments):
    if arguments.layers is not None:
        raise SystemExit("drafts: random weights accept no drafts; leave --layers out.")

    backbone, model = load_backbone(arguments), demo.trained_ensemble(dtype=DTYPE)
    contexts = [
        model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        for chat in koala_chats(arguments.prompts)
    ]
    options = {"max_new_tokens": arguments.tokens, "min_new_tokens": arguments.tokens, "do_sample": False}
    passes, base = CountedPasses(model), model.backbones[0]  # its adapters are off when it is called on its own
    drafters = {BASE: base, PCM: pcm_drafter(model)}
    experts = {preference[0]: expert_drafter(preference[0], arguments) for preference in PREFERENCES}

    def plain():
        backbone.generate(**next(turns), **options)

    def answer(preference: list[str], name: str, number: int = 0):
        way = {"prompt_lookup_num_tokens": number} if name == LOOKUP else FAST if name == COMPILED else {}
        drafter = experts[preference[0]] if name == EXPERT else drafters.get(name)
        if drafter is not None:
            drafter.generation_config.num_assistant_tokens = number
            way = {"assistant_model": drafter}

        passes.number = 0
        model.generate(**next(turns), preference=preference, **options, **way)
        passes.of_answers.setdefault(f"{name}, {number}" if number else name, []).append(passes.number)

    rows = []
    for preference in PREFERENCES:
        model.generate(**contexts[0], preference=preference, **FAST, max_new_tokens=3)  # compiles
        passes.of_answers.clear()
        steps = {"one plain model": plain}
        steps |= {name: partial(answer, preference, name) for name in (PLAIN, COMPILED)}
        for name, number in itertools.product((LOOKUP, BASE, EXPERT, PCM), arguments.drafted):
            steps[f"{name}, {number}"] = partial(answer, preference, name, number)

        turns = itertools.cycle(context for context in contexts for _ in steps)
        title = " + ".join(preference)
        # The first prompt is answered twice: its first answers warm up.
        for row in summary(interleaved(steps, len(contexts), warm_up=1, title=title), PLAIN):
            numbers = passes.of_answers.get(row["name"], [])[1:]
            passed = arguments.tokens * len(numbers) / sum(numbers) if numbers else None
            rows.append(row | {"preference": title, "tokens a pass": passed})

    columns = ["preference", "name", "seconds", "ratio", "tokens a pass"]
    picture = partial(grouped_bars, rows=rows, group="preference", label="time without drafts")
    write_results("drafts", rows, columns, arguments, picture)


def expert_drafter(name: str, arguments) -> PreTrainedModel:
    """Make a model of its own with an expert's adapter merged into its weights."""
    return PeftModel.from_pretrained(load_backbone(arguments), demo.ARTIFACTS / name).merge_and_unload().eval()


def pcm_drafter(model) -> PreTrainedModel:
    """Make the PCM's body a language model of its own, by the LM head of the backbone that it was made from."""
    drafter = AutoModelForCausalLM.from_config(model.config.pcm, dtype=DTYPE).eval()
    drafter.model, drafter.lm_head = model.pcm.body, model.backbones[0].lm_head
    drafter.generation_config = copy.deepcopy(model.backbones[0].generation_config)
    return drafter


class CountedPasses:
    """How often the ensemble runs."""

    def __init__(self, model):
        self.number, self.of_answers = 0, {}
        model.register_forward_hook(self._count)

    def _count(self, *arguments):
        self.number += 1
