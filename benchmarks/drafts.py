"""Greedy answers with drafts: by prompt lookup, the experts' base model, the PCM's body; beside one plain model."""

import copy
import itertools
import json
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from modeling_pcm_ensemble import demo

from .common import DTYPE, grouped_bars, interleaved, load_backbone, summary, write_results

EXAMPLES = Path(__file__).parents[1] / "examples"
PREFERENCE = ["elementary", "concise", "friendly"]
PLAIN, LOOKUP, BASE, PCM = "no drafts", "prompt lookup", "base model", "PCM through the LM head"


def add_arguments(parser):
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--drafted", type=int, nargs="+", default=[2, 4, 8], help="tokens drafted at once")


@torch.no_grad()
def run(arguments):
    if arguments.layers is not None:
        raise SystemExit("drafts: random weights accept no drafts; leave --layers out.")
    backbone = load_backbone(arguments)
    model = demo.trained_ensemble(EXAMPLES / "artifacts", dtype=DTYPE)
    prompts = json.loads((EXAMPLES / "data/evaluation_only/koala_eval_50.json").read_text())
    chats = [[{"role": "user", "content": entry["prompt"]}] for entry in prompts[: arguments.prompts]]
    contexts = [
        model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        for chat in chats
    ]
    options = {"max_new_tokens": arguments.tokens, "min_new_tokens": arguments.tokens, "do_sample": False}
    passes, base = CountedPasses(model), model.backbones[0]  # its adapters are off when it is called on its own
    drafters = {BASE: base, PCM: pcm_drafter(model)}

    def answer(name: str, number: int = 0):
        drafts = {"prompt_lookup_num_tokens": number} if name == LOOKUP else {}
        if name in drafters:
            drafters[name].generation_config.num_assistant_tokens = number
            drafts = {"assistant_model": drafters[name]}
        passes.number = 0
        model.generate(**next(turns), preference=PREFERENCE, **options, **drafts)
        passes.of_answers.setdefault(f"{name}, {number}" if number else name, []).append(passes.number)

    steps = {"one plain model": lambda: backbone.generate(**next(turns), **options), PLAIN: lambda: answer(PLAIN)}
    for name, number in itertools.product((LOOKUP, BASE, PCM), arguments.drafted):
        steps[f"{name}, {number}"] = partial(answer, name, number)
    turns = itertools.cycle(context for context in contexts for _ in steps)
    rows = summary(interleaved(steps, len(contexts), warm_up=0, title="drafts"), PLAIN)
    for row in rows:
        numbers = passes.of_answers.get(row["name"])
        row |= {"batch": 1, "tokens a pass": numbers and arguments.tokens * len(numbers) / sum(numbers)}
    columns = ["name", "seconds", "ratio", "tokens a pass"]
    write_results("drafts", rows, columns, arguments, lambda axes: grouped_bars(axes, rows, "batch", "time without drafts"))  # fmt: skip  # noqa: E501


def pcm_drafter(model) -> PreTrainedModel:
    """The PCM's body as a language model of its own, by the LM head of the backbone that it was made from."""
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
