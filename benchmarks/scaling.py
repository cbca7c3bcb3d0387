"""One decode step against the number of experts, the batch and the context, eager and compiled, above its floor."""

import gc
from functools import partial

import torch
from tqdm import tqdm

from .common import (
    EXPERTS,
    cached_step,
    interleaved,
    load_backbone,
    one_token,
    random_lora_ensemble,
    summary,
    write_results,
)
from .fast import compiled_plain, compiled_plain_step, compiled_step, static_length

PLAIN = "plain model"
FLOOR = "plain model of as many rows, compiled"  # all experts as rows of one batch, and nothing else
AXES = {"experts": "experts", "batch": "requests", "context": "tokens of context"}


def add_arguments(parser):
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 2, 3, 6, 12, 24])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 2048, 4096, 8000])
    parser.add_argument("--rounds", type=int, default=8)


@torch.no_grad()
def run(arguments):
    """From three experts, one request and the shortest context, each of the three grows alone."""
    backbone, compiled_backbone = load_backbone(arguments), load_backbone(arguments)
    plain = compiled_plain(compiled_backbone)

    needed = static_length(arguments.rounds, max(arguments.contexts))
    positions = backbone.config.max_position_embeddings
    if needed > positions:
        raise ValueError(f"--contexts: the longest and its rounds take {needed} tokens; the model has {positions}.")

    shortest = min(arguments.contexts)
    points = [(experts, 1, shortest) for experts in arguments.experts]
    points += [(EXPERTS, batch, shortest) for batch in arguments.batches if batch > 1]
    points += [(EXPERTS, 1, context) for context in arguments.contexts if context > shortest]

    rows = []
    for experts, batch, context in tqdm(points):
        gc.collect()  # until then, compiled submodels of the last point stay, with their packed weights
        token, rounds = one_token(batch), arguments.rounds
        ensemble = random_lora_ensemble(load_backbone(arguments), experts)
        steps = {
            PLAIN: cached_step(backbone, token, context),
            "LoRA experts, eager": cached_step(ensemble, token, context),
            "LoRA experts, compiled": compiled_step(ensemble, token, rounds, context),
            FLOOR: compiled_plain_step(plain, one_token(batch * experts), rounds, context),
        }
        title = f"{experts} experts, batch {batch}, context {context}"
        measured = summary(interleaved(steps, rounds, warm_up=2, title=title), PLAIN)
        rows += [{"experts": experts, "batch": batch, "context": context} | row for row in measured]
        del ensemble, steps

        columns = ["experts", "batch", "context", "name", "seconds", "ratio"]
        write_results("scaling", rows, columns, arguments, partial(draw, rows=rows), panels=len(AXES))


def draw(panels, rows: list[dict]):
    """Draw a line for each way over experts, requests and context, the two others as small as they were measured."""
    least = {axis: min(row[axis] for row in rows) for axis in AXES} | {"experts": EXPERTS}
    for axes, (axis, label) in zip(panels, AXES.items()):
        others = [other for other in AXES if other != axis]
        for name in dict.fromkeys(row["name"] for row in rows):
            shown = [row for row in rows if row["name"] == name and all(row[o] == least[o] for o in others)]
            shown.sort(key=lambda row: row[axis])
            style = ":" if name == FLOOR else "-"
            axes.plot([row[axis] for row in shown], [row["ratio"] for row in shown], style, marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set_xlabel(label)
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("time of one plain eager step")
    panels[0].legend(fontsize=7)
