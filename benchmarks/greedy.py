"""Whether compiled steps choose the tokens of eager ones, on 50 prompts; and the time of whole answers."""

import time

import torch
from transformers import CompileConfig

from modeling_pcm_ensemble import demo

from .common import koala_chats, write_results

PREFERENCES = (["elementary", "concise", "friendly"], ["knowledgeable", "informative"], ["friendly"])
FAST = {"cache_implementation": "static", "compile_config": CompileConfig(dynamic=True)}


def add_arguments(parser):
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--batch", type=int, default=10)


@torch.no_grad()
def run(arguments):
    if arguments.layers is not None:
        raise SystemExit("greedy: takes the experts that ship; leave --layers out.")

    rows = [compare(dtype, koala_chats(), arguments) for dtype in (torch.float32, torch.bfloat16)]
    columns = ["dtype", "answers", "equal", "largest margin of another choice", "compiled to eager"]
    write_results("greedy", rows, columns, arguments)


def compare(dtype: torch.dtype, chats: list, arguments) -> dict:
    """
    Answer each chat by eager and by compiled steps, and count equal answers.

    A margin is by how much, in nats, eager steps preferred their token where compiled ones chose another first.
    """
    model = demo.trained_ensemble(dtype=dtype)
    options = {"max_new_tokens": arguments.tokens, "min_new_tokens": arguments.tokens, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    equal, margins, seconds = 0, [], {"eager": [], "compiled": []}

    for start in range(0, len(chats), arguments.batch):
        texts = chats[start : start + arguments.batch]
        inputs = model.tokenizer.apply_chat_template(
            texts, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True, padding_side="left"
        )
        inputs["preference"] = [PREFERENCES[(start + row) % len(PREFERENCES)] for row in range(len(texts))]

        found = {}
        for name, fast in (("eager", {}), ("compiled", FAST)):
            begun = time.perf_counter()
            found[name] = model.generate(**inputs, **options, **fast)
            seconds[name].append(time.perf_counter() - begun)

        new = {name: output.sequences[:, -arguments.tokens :] for name, output in found.items()}
        scores = torch.stack(found["eager"].scores, dim=1)  # (rows, tokens, vocab)
        for row, differs in enumerate(new["eager"] != new["compiled"]):
            if not differs.any():
                equal += 1
                continue
            first = differs.int().argmax()
            eager, compiled = (scores[row, first, tokens[row, first]] for tokens in new.values())
            margins.append(float(eager - compiled))

    return {
        "dtype": str(dtype).rpartition(".")[2],
        "answers": len(chats),
        "equal": equal,
        "largest margin of another choice": max(margins, default=0.0),
        "margins": margins,
        "compiled to eager": sum(seconds["compiled"][1:]) / sum(seconds["eager"][1:]),  # the first batch warms up
    }
