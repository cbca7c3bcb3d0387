"""One decode step against the number of experts, the batch and the context."""

from functools import partial

import torch

from .common import (
    cached_step,
    grouped_bars,
    interleaved,
    load_backbone,
    one_token,
    random_lora_ensemble,
    summary,
    write_results,
)


def add_arguments(parser):
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 2, 3, 6, 12, 24])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=8)


@torch.no_grad()
def run(arguments):
    """From three experts, one request and the shortest context, each of the three grows alone."""
    backbone = load_backbone(arguments)
    context = min(arguments.contexts)
    points = [(experts, 1, context) for experts in arguments.experts]
    points += [(3, batch, context) for batch in arguments.batches if batch > 1]
    points += [(3, 1, length) for length in arguments.contexts if length > context]

    rows = []
    for experts, batch, length in points:
        token = one_token(batch)
        ensemble = random_lora_ensemble(backbone, experts)
        steps = {
            "plain model": cached_step(backbone, token, length),
            "LoRA experts": cached_step(ensemble, token, length),
        }

        title = f"{experts} experts, batch {batch}, context {length}"
        measured = summary(interleaved(steps, arguments.rounds, warm_up=2, title=title), "plain model")
        rows += [{"experts": experts, "batch": batch, "context": length, "point": title} | row for row in measured]

    by_experts = [row for row in rows if row["batch"] == 1 and row["context"] == context]
    columns = ["experts", "batch", "context", "name", "seconds", "ratio"]
    picture = partial(grouped_bars, rows=by_experts, group="experts", label="time of one plain step")
    write_results("scaling", rows, columns, arguments, picture)
