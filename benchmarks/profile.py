"""Where a decode step goes: the operators of one model step, by time."""

import torch
from torch.profiler import ProfilerActivity, profile

from .common import load_backbone, lora_ensemble, prompted_ensemble
from .decode import EXPERTS, cached_step


def add_arguments(parser):
    parser.add_argument("--experts", choices=["prompted", "lora"], default="lora")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)


@torch.no_grad()
def run(arguments):
    make = {"prompted": prompted_ensemble, "lora": lora_ensemble}[arguments.experts]
    step = cached_step(make(load_backbone(arguments), EXPERTS), torch.full((arguments.batch, 1), 500))
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(arguments.steps):
            step()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))
