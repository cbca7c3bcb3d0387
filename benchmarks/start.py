"""The first answer of a process and later ones: eager steps, compiled steps, and these again in the next process."""

import json
import time
from statistics import median
from tempfile import TemporaryDirectory

import torch
from tqdm import tqdm
from transformers import CompileConfig

from .common import ENSEMBLES, EXPERTS, LABELS, in_own_process, load_backbone, some_ids, write_results

WAYS = ("eager", "compiled, nothing kept", "compiled, next process")  # the last finds what is kept


def add_arguments(parser):
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--kinds", nargs="+", choices=list(ENSEMBLES), default=list(ENSEMBLES), help="of experts")
    parser.add_argument("--way", choices=WAYS, help="measure one kind in this process, and print it")


@torch.no_grad()
def run(arguments):
    if arguments.way is not None:
        print(json.dumps(measure(arguments)))
        return

    rows = []
    for kind in tqdm(arguments.kinds):
        command = ["start", "--kinds", kind, "--tokens", str(arguments.tokens), "--way"]
        with TemporaryDirectory() as folder:
            kept = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/code", "TMPDIR": folder}
            of_kind = {way: in_own_process([*command, way], arguments, **kept) for way in WAYS}

        eager = of_kind["eager"]
        for way, seconds in of_kind.items():
            saved = (eager["later"] - seconds["later"]) / arguments.tokens
            waited = seconds["first"] - seconds["later"]
            pays_after = waited / saved if way != "eager" and saved > 0 else None
            rows.append({"name": f"{LABELS[kind]}, {way}"} | seconds | {"pays after": pays_after})
    write_results("start", rows, ["name", "first", "later", "pays after"], arguments)


def measure(arguments) -> dict:
    """Return the seconds of the first answer of this process, compiling included, and of later ones."""
    model = ENSEMBLES[arguments.kinds[0]](load_backbone(arguments), EXPERTS)
    length = {"max_new_tokens": arguments.tokens, "min_new_tokens": arguments.tokens}
    options = length | {"do_sample": False, "pad_token_id": 0}
    if arguments.way != "eager":
        options |= {"cache_implementation": "static", "compile_config": CompileConfig()}

    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        model.generate(some_ids(1), **options)
        seconds.append(time.perf_counter() - start)
    return {"first": seconds[0], "later": median(seconds[1:])}
