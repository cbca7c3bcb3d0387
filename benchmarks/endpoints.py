"""Experts behind endpoints, beside the same experts here: tokens a second, and how far waiting and work overlap."""

import contextlib
import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch

from modeling_pcm_ensemble import PCMEnsembleForCausalLM, demo

from .common import PCM_LAYERS, grouped_bars, interleaved, koala_chats, summary, write_results
from .llama_server import convert
from .load import served

EXPERTS = ("elementary", "friendly", "concise")
TOP_K = 20
HERE = "3 experts here"
LONGEST = 512  # tokens of a text at a server


def add_arguments(parser):
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--python", help="of an environment with vLLM, which then serves, too")
    parser.add_argument("--threads", type=int, default=1, help="of this process, and of each server")
    parser.add_argument("--tokens", type=int, default=16, help="that a measurement decodes")
    parser.add_argument("--rounds", type=int, default=5)


@torch.no_grad()
def run(arguments):
    """Measure all ways in turns, in float32. Servers that are not asked wait, and take no time."""
    if arguments.layers is not None:
        raise SystemExit("`endpoints` measures the trained experts on SmolLM2, and takes no --layers.")
    if importlib.util.find_spec("xllamacpp") is None:
        raise SystemExit("llama.cpp's server is missing: `pip install -e '.[test]'`.")
    torch.set_num_threads(arguments.threads)

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        where, threads = Path(folder), arguments.threads
        specs = {"llama.cpp": serve_by_llamacpp(EXPERTS, where, running, max(arguments.batches), threads)}
        if arguments.python is not None:
            specs["vLLM"] = serve_by_vllm(arguments.python, EXPERTS, where, running, TOP_K, threads)

        models = {HERE: build({})}
        for server, number in product(specs, range(1, len(EXPERTS) + 1)):
            there = EXPERTS[-number:]
            models[f"{number} behind {server}"] = build({name: specs[server][name] for name in there})

        rows: list[dict] = []
        for batch in arguments.batches:
            rows += measure(models, batch, arguments)
            picture = partial(grouped_bars, rows=rows, group="batch", label=f"time of a token of {HERE}")
            columns = ["batch", "name", "tokens a second", "ratio", "request ms", "overlap"]
            write_results("endpoints", rows, columns, arguments, picture, torch.float32)


def serve_by_llamacpp(
    experts: Sequence[str], folder: Path, running: contextlib.ExitStack, slots: int, threads: int | None = None
) -> dict[str, dict]:
    """Start a server for each expert, with slots for so many rows, and say how `from_experts` names them."""
    smollm2 = demo.fetch_smollm2()
    model = convert("convert_hf_to_gguf.py", smollm2, folder / "smollm2.gguf")

    specs = {}
    for name in experts:
        adapter = convert("convert_lora_to_gguf.py", demo.ARTIFACTS / name, folder / f"{name}.gguf", "--base", smollm2)
        command = [sys.executable, "-m", "benchmarks.llama_server", "--model", str(model), "--lora", str(adapter)]
        command += ["--parallel", str(slots), "--ctx-size", str(slots * LONGEST)]
        command += [] if threads is None else ["--threads", str(threads)]
        url = running.enter_context(served(command, folder / f"{name}.log"))
        specs[name] = {"endpoint": url, "api": "llamacpp"}
    return specs


def serve_by_vllm(
    python: str,
    experts: Sequence[str],
    folder: Path,
    running: contextlib.ExitStack,
    max_logprobs: int,
    threads: int | None = None,
) -> dict[str, dict]:
    """Start one server for all experts, with the smallest blocks that it takes on CPUs; `max_logprobs` -1 is all."""
    options = {"model": demo.fetch_smollm2(), "dtype": "float32", "max-model-len": LONGEST, "block-size": 32}
    options |= {"max-logprobs": max_logprobs, "max-lora-rank": 16, "max-loras": len(experts)}
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", "--enable-lora"]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command += ["--lora-modules", *(f"{name}={demo.ARTIFACTS / name}" for name in experts)]

    settings = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    url = running.enter_context(served(command, folder / "vllm.log", settings))
    return {name: {"endpoint": f"{url}/v1", "served_model": name} for name in experts}


def build(there: dict[str, dict]) -> PCMEnsembleForCausalLM:
    """Build the ensemble with these experts behind endpoints, and an untrained PCM: time depends on shapes alone."""
    smollm2 = demo.fetch_smollm2()
    here = {name: {"model": smollm2, "adapter": str(demo.ARTIFACTS / name)} for name in EXPERTS if name not in there}
    experts = {name: here.get(name) or {"timeout": 120.0} | there[name] for name in EXPERTS}
    return PCMEnsembleForCausalLM.from_experts(
        experts, pcm=smollm2, pcm_layers=PCM_LAYERS, dtype=torch.float32, expert_top_k=TOP_K
    )


def measure(models: dict[str, PCMEnsembleForCausalLM], batch: int, arguments) -> list[dict]:
    """
    Rows of one batch: seconds of a token, of a request, and the share that overlaps of what could: of the shorter one
    of a request and what a token takes from the experts here alone.
    """
    tokenizer, numbers = models[HERE].tokenizer, itertools.count()

    def decoding(model: PCMEnsembleForCausalLM, names: list[str]):
        length = arguments.tokens
        options = {"preference": names, "do_sample": False, "min_new_tokens": length, "max_new_tokens": length}

        def decode():
            # What a server has read, it has kept: each call has prompts that begin with a number of its own.
            system = {"role": "system", "content": f"Conversation {next(numbers):05d}."}
            chats = tokenizer.apply_chat_template(
                [[system, *chat] for chat in koala_chats(batch)],
                add_generation_prompt=True,
                padding=True,
                return_dict=True,
                return_tensors="pt",
            )
            model.generate(**chats, **options)

        return decode

    steps = {}
    for name, model in models.items():
        steps[name] = decoding(model, list(EXPERTS))
        here = [expert for index, expert in enumerate(EXPERTS) if index not in model.served_experts]
        if 0 < len(here) < len(EXPERTS):
            steps[f"{name}, without them"] = decoding(model, here)

    before = {name: asked(model) for name, model in models.items()}
    times = interleaved(steps, arguments.rounds, warm_up=1, title=f"endpoints, batch {batch}")
    found = {row["name"]: row for row in summary(times, HERE)}
    rows = []
    for name, model in models.items():
        row = found[name] | {"batch": batch, "seconds": found[name]["seconds"] / arguments.tokens}
        row["tokens a second"] = batch / row["seconds"]
        calls, seconds = (after - earlier for after, earlier in zip(asked(model), before[name]))
        if calls:
            row["request ms"] = 1000 * seconds / calls
        if (alone := found.get(f"{name}, without them")) is not None:
            work, waiting = alone["seconds"] / arguments.tokens, seconds / calls
            row["overlap"] = (work + waiting - row["seconds"]) / min(work, waiting)
        rows.append(row)
    return rows


def asked(model: PCMEnsembleForCausalLM) -> tuple[int, float]:
    """Count the requests so far, and the seconds that they took."""
    usages = model.endpoint_usage.values()
    return sum(usage.calls for usage in usages), sum(usage.seconds for usage in usages)
