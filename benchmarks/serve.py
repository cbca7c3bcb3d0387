"""32 requests of different preferences over six LoRA experts, beside Personalized Soup, which merges for each."""

import copy
from functools import partial

import torch

from .common import (
    DEVICE,
    grouped_bars,
    interleaved,
    load_backbone,
    random_lora_ensemble,
    summary,
    write_results,
)

EXPERTS, ACTIVE = 6, 3


def add_arguments(parser):
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens of a request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--soup-requests", type=int, default=4, help="how many users a round serves by merging")


@torch.no_grad()
def run(arguments):
    """Seconds for each request. Users served by merging come one after another, so a few stand for all."""
    backbone = load_backbone(arguments)
    # On backbones of their own: the hooks of adapters take time.
    mixture = random_lora_ensemble(load_backbone(arguments), EXPERTS)
    adapters = random_lora_ensemble(load_backbone(arguments), EXPERTS, merge="adapters")

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 40000, (arguments.requests, arguments.prompt), generator=generator).to(DEVICE)
    weights = torch.zeros(arguments.requests, EXPERTS)
    for row in weights:
        row[torch.randperm(EXPERTS, generator=generator)[:ACTIVE]] = torch.rand(ACTIVE, generator=generator) + 0.1

    options = {
        "max_new_tokens": arguments.tokens,
        "min_new_tokens": arguments.tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }
    weights = weights / weights.sum(dim=1, keepdim=True)  # Soup's are averages
    soup = Soup(backbone, mixture)

    def merge_and_generate(users: int):
        for user in range(users):
            soup.merge(weights[user])
            soup.model.generate(ids[user : user + 1], **options)

    few, every = min(arguments.soup_requests, arguments.requests), arguments.requests
    runs = {
        "Personalized Soup, ideal merge": (few, lambda: merge_and_generate(few)),
        "this library": (every, lambda: mixture.generate(ids, preference=weights, **options)),
        'this library, merge="adapters"': (every, lambda: adapters.generate(ids, preference=weights, **options)),
        "one plain model": (every, lambda: backbone.generate(ids, **options)),
    }
    calls = {name: call for name, (_, call) in runs.items()}
    measured = interleaved(calls, arguments.rounds, warm_up=1, title="serve")
    seconds = {name: [whole / runs[name][0] for whole in times] for name, times in measured.items()}

    rows = summary(seconds, "one plain model")
    soup_seconds = next(row["seconds"] for row in rows if row["name"].startswith("Personalized"))
    rows = [{"requests": arguments.requests, "throughput": soup_seconds / row["seconds"]} | row for row in rows]
    picture = partial(grouped_bars, rows=rows, group="requests", label="time of one plain request in the batch")
    write_results("serve", rows, ["name", "seconds", "throughput", "ratio"], arguments, picture)


class Soup:
    """Personalized Soup with nothing but the arithmetic: W + Σ_i w_i B_i A_i, put into one model for each user."""

    def __init__(self, backbone, ensemble):
        self.model = copy.deepcopy(backbone)
        self.originals = {name: parameter.clone() for name, parameter in self.model.named_parameters()}
        tensors = [ensemble.backbones.bank_of(n).tensors(n) for n in ensemble.config.expert_names]
        self.paths = sorted({key.rsplit(".lora_", 1)[0] for key in tensors[0]})
        self.a = {p: torch.cat([t[f"{p}.lora_A.weight"] for t in tensors]) for p in self.paths}
        self.b = {p: torch.cat([t[f"{p}.lora_B.weight"] for t in tensors], dim=1) for p in self.paths}

    def merge(self, weights: torch.Tensor):
        """Put one user's weights, `(experts,)`, into the model."""
        for path in self.paths:
            scales = weights.repeat_interleave(len(self.a[path]) // len(weights)).to(self.a[path].dtype)
            merged = torch.addmm(self.originals[f"{path}.weight"], self.b[path] * scales, self.a[path])
            self.model.get_submodule(path).weight.data = merged
