"""The time to the first token of long prompts, as a ratio to one plain model's."""

from functools import partial

import torch

from .common import (
    DEVICE,
    ENSEMBLES,
    EXPERTS,
    LABELS,
    grouped_bars,
    interleaved,
    load_backbone,
    summary,
    write_results,
)

PLAIN = "plain model"


def add_arguments(parser):
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, default=1024, help="tokens of each prompt")
    parser.add_argument("--rounds", type=int, default=5)


@torch.no_grad()
def run(arguments):
    models = {PLAIN: load_backbone(arguments)}
    models |= {LABELS[kind]: make(load_backbone(arguments), EXPERTS) for kind, make in ENSEMBLES.items()}

    rows = []
    for batch in arguments.batches:
        steps = {name: first_token(model, batch, arguments.context) for name, model in models.items()}
        measured = interleaved(steps, arguments.rounds, warm_up=1, title=f"batch {batch}")
        rows += [{"batch": batch, "context": arguments.context} | row for row in summary(measured, PLAIN)]

    picture = partial(grouped_bars, rows=rows, group="batch", label="time of one plain model's first token")
    write_results("prefill", rows, ["batch", "context", "name", "seconds", "ratio"], arguments, picture)


def first_token(model, batch: int, context: int):
    """Return a call of `generate` for one token after prompts that differ."""
    ids = torch.randint(100, 40000, (batch, context), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return lambda: model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
