"""Peak memory of a process that generates, and the weights of every part. Compiled code was made by an earlier one."""

import json
import resource
from statistics import median
from tempfile import TemporaryDirectory

import torch
from tqdm import tqdm
from transformers import CompileConfig

from .common import DEVICE, ENSEMBLES, in_own_process, load_backbone, write_results

BATCH = 8
VARIANTS = {  # name: (kind, experts)
    "nothing but imports": (None, 0),
    "one plain model": ("plain", 1),
    "three prompted experts and the PCM": ("prompted", 3),
    "three LoRA experts and the PCM": ("lora", 3),
    "six LoRA experts and the PCM": ("lora", 6),
    "three LoRA experts and the PCM, compiled": ("lora", 3),
}


def add_arguments(parser):
    parser.add_argument("--tokens", type=int, default=96, help="that each request decodes")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each variant, of which the median counts")
    parser.add_argument("--variant", choices=list(VARIANTS), help="measure one variant in this process, and print it")


@torch.no_grad()
def run(arguments):
    if arguments.variant is not None:
        print(json.dumps(measure(arguments)))
        return

    rows = []
    for variant in tqdm(VARIANTS):
        command = ["memory", "--variant", variant, "--tokens", str(arguments.tokens)]
        with TemporaryDirectory() as folder:  # what other processes compiled is not found
            kept = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/code", "TMPDIR": folder}
            if variant.endswith("compiled"):
                in_own_process(command, arguments, **kept)
            found = [in_own_process(command, arguments, **kept) for _ in range(arguments.rounds)]
        rows.append({"name": variant} | {name: median(one[name] for one in found) for name in found[0]})

    empty = rows[0]["peak_mb"]
    rows = [row | {"over_empty_mb": row["peak_mb"] - empty} for row in rows]
    write_results("memory", rows, ["name", "over_empty_mb", "weights_mb", "expected_weights_mb"], arguments)


def measure(arguments) -> dict:
    """Return peak memory and bytes of weights, held and expected. It runs in a process of its own."""
    kind, experts = VARIANTS[arguments.variant]
    weights = expected = 0
    if kind is not None:
        backbone = load_backbone(arguments)
        model = backbone if kind == "plain" else ENSEMBLES[kind](backbone, experts)
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
        weights, expected = sum(storages.values()), sum(p.nbytes for p in backbone.parameters())
        if kind != "plain":
            expected += sum(p.nbytes for p in model.pcm.parameters())
            expected += sum(p.nbytes for p in model.backbones.adapters.parameters())

        ids = torch.randint(100, 40000, (BATCH, 32), device=DEVICE)
        options = {
            "max_new_tokens": arguments.tokens,
            "min_new_tokens": arguments.tokens,
            "do_sample": False,
            "pad_token_id": 0,
        }
        if arguments.variant.endswith("compiled"):
            options |= {"cache_implementation": "static", "compile_config": CompileConfig()}
        model.generate(ids, **options)

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"peak_mb": peak, "weights_mb": weights / 2**20, "expected_weights_mb": expected / 2**20}
