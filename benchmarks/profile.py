"""Where a decode step goes: the operators of one model step, by time."""

import json
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from .common import ENSEMBLES, EXPERTS, cached_step, describe_machine, load_backbone, model_stem, one_token
from .fast import compiled_step


def add_arguments(parser):
    parser.add_argument("--kind", choices=list(ENSEMBLES), default="lora", help="of experts")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--fast", action="store_true", help="a compiled step")


@torch.no_grad()
def run(arguments):
    model, token = ENSEMBLES[arguments.kind](load_backbone(arguments), EXPERTS), one_token(arguments.batch)
    step = compiled_step(model, token, arguments.steps) if arguments.fast else cached_step(model, token)
    for _ in range(2):  # what compiles, and what is left of it
        step()

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(arguments.steps):
            step()
    table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20)
    print(table)
    machine = json.dumps(describe_machine(arguments))

    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    name = model_stem(f"profile-{arguments.kind}-{arguments.batch}{'-fast' if arguments.fast else ''}", arguments)
    (folder / f"{name}.txt").write_text(f"{machine}\n{table}")
