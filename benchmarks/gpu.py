"""All times of a GPU in one run of a few minutes: decode steps, prompts, memory; eager, and as CUDA graphs."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig, PreTrainedModel
from transformers.utils import logging

from modeling_pcm_ensemble import PCMEnsembleForCausalLM, demo
from modeling_pcm_ensemble.compile_steps import CompiledStep
from modeling_pcm_ensemble.lora import clear_traced

from .common import (
    DEVICE,
    DTYPE,
    cached_step,
    grouped_bars,
    interleaved,
    one_token,
    prompted_ensemble,
    random_lora_ensemble,
    summary,
    write_results,
)
from .fast import compiled_plain_step, compiled_step, run_without_adapters

logger = logging.get_logger(__name__)

SMOLLM2 = "SmolLM2-135M"
LLAMAS = {  # random ones; sizes of Llama 3.2 1B and 3B, and of Llama 3.1 8B
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
PLAIN = "plain model"
GRAPHS = "CUDA graphs"
GRAPH_EXPERTS = 3  # every number of experts would compile anew


def add_arguments(parser):
    parser.add_argument("--shapes", nargs="+", choices=[SMOLLM2, *LLAMAS], default=[SMOLLM2, "8B", "1B", "3B"])
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 3, 6])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of the prompts whose first pass is measured")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=330, help="after which no further part begins")


@torch.no_grad()
def run(arguments):
    """Test, then measure part by part, the most telling ones first; what is measured is written after each of them."""
    if arguments.layers is not None:
        raise SystemExit("`gpu` has shapes of its own (--shapes), and takes no --layers.")
    deadline = time.monotonic() + arguments.seconds
    if DEVICE == "cuda":
        subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/test_gpu.py"], check=True)

    bandwidth, rows = measure_bandwidth(), []
    for name, part in parts(arguments, bandwidth):
        if time.monotonic() > deadline:
            logger.warning(f"Left out, since {arguments.seconds:g} seconds are over: {name}")
            continue
        rows += part()

        columns = ["shape", "what", "mode", "batch", "name", "seconds", "ratio", "tokens a second", "bandwidth", "GB"]
        shown = [row for row in rows if row["name"] != PLAIN]
        picture = partial(grouped_bars, rows=shown, group="group", label="time of one plain model in the same mode")
        write_results("gpu", rows, columns, arguments, picture)


def parts(arguments, bandwidth: float) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    """Give each part's name, and how it is measured."""
    for shape in arguments.shapes:
        for experts in arguments.experts:
            decode = partial(measure_decode, shape, experts, arguments, bandwidth)
            yield f"{shape}, decoding with {experts} experts", decode
        yield f"{shape}, prompts", partial(measure_prompts, shape, arguments)
        yield f"{shape}, {GRAPHS}", partial(measure_graphs, shape, arguments, bandwidth)


def make_backbone(shape: str) -> PreTrainedModel:
    """Load SmolLM2, or make a random Llama of a shape, on the device."""
    torch.manual_seed(0)
    if shape == SMOLLM2:
        model = AutoModelForCausalLM.from_pretrained(demo.fetch_smollm2(), dtype=DTYPE)
    else:
        config = LlamaConfig(
            vocab_size=128256 if shape != "tiny" else 49152,
            num_key_value_heads=8 if shape != "tiny" else 1,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            **LLAMAS[shape],
        )
        with torch.device(DEVICE):
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    return model.to(DEVICE).eval().requires_grad_(False)


def make_models(shape: str, experts: int) -> dict[str, PreTrainedModel]:
    """Make a plain model and ensembles on one backbone, on which no adapters of other parts are hooked."""
    backbone = make_backbone(shape)
    return {
        PLAIN: backbone,
        "prompted": prompted_ensemble(backbone, experts),
        "LoRA": random_lora_ensemble(backbone, experts),
    }


def under_each_merge(models: dict[str, PreTrainedModel], make_step: Callable) -> dict[str, Callable]:
    """Make each model's step, and the LoRA ensemble's under other ways to merge."""
    steps = {name: make_step(model) for name, model in models.items()}
    lora = models["LoRA"]
    for merge in ("probabilities", "product", "adapters"):
        lora.config.merge = merge
        steps[name_of(merge)] = partial(merged, lora, merge, make_step(lora))
    return steps


def name_of(merge: str) -> str:
    return "LoRA" if merge == "probabilities" else f'LoRA, merge="{merge}"'


def merged(model: PCMEnsembleForCausalLM, merge: str, step: Callable):
    model.config.merge = merge
    return step()


def measure_decode(shape: str, experts: int, arguments, bandwidth: float) -> list[dict]:
    """Measure eager steps at all batch sizes."""
    models, rows = make_models(shape, experts), []
    for batch in arguments.batches:
        reset_memory()
        steps = under_each_merge(models, partial(cached_step, token=one_token(batch)))
        rows += described(steps, {"shape": shape, "what": "decode", "mode": "eager"}, batch, experts, arguments)
    return with_bandwidth(rows, models, bandwidth)


def measure_prompts(shape: str, arguments) -> list[dict]:
    """Measure the first pass over prompts, which differ from row to row."""
    models, rows = make_models(shape, GRAPH_EXPERTS), []
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 8):
        ids = torch.randint(100, 40000, (batch, arguments.prompt), generator=generator).to(DEVICE)
        reset_memory()
        steps = under_each_merge(models, lambda model, ids=ids: partial(model, ids, use_cache=True, logits_to_keep=1))
        where = {"shape": shape, "what": "prompt", "mode": "eager"}
        rows += described(steps, where, batch, GRAPH_EXPERTS, arguments)
    return rows


def measure_graphs(shape: str, arguments, bandwidth: float) -> list[dict]:
    """Measure compiled steps, CUDA graphs on a GPU, each on a backbone that no other ensemble has hooked."""
    config = CompileConfig(dynamic=True)
    backbone = make_backbone(shape)
    ensemble = random_lora_ensemble(make_backbone(shape), GRAPH_EXPERTS)
    plain = CompiledStep(backbone, partial(run_without_adapters, backbone), clear_traced, config, None)
    models = {PLAIN: backbone, "LoRA": ensemble}

    rows = []
    for batch in arguments.batches:
        reset_memory()
        steps = {
            PLAIN: compiled_plain_step(plain, one_token(batch), arguments.rounds),
            "LoRA": compiled_step(ensemble, one_token(batch), arguments.rounds),
        }
        where = {"shape": shape, "what": "decode", "mode": GRAPHS if DEVICE == "cuda" else "compiled"}
        rows += described(steps, where, batch, GRAPH_EXPERTS, arguments)
    return with_bandwidth(rows, models, bandwidth)


def described(steps: dict, where: dict, batch: int, experts: int, arguments) -> list[dict]:
    """Measure steps in turns, and say of each what it is, how fast it writes, and how much memory all of them took."""
    measured = summary(interleaved(steps, arguments.rounds, title=" ".join(where.values())), PLAIN)
    gigabytes = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None

    rows = []
    for row in measured:
        name = row["name"] if row["name"] == PLAIN else f"{experts} experts, {row['name']}"
        row |= where | {"batch": batch, "model": row["name"].partition(",")[0], "name": name, "GB": gigabytes}
        row["group"] = f"{where['shape']}, {where['what']}, {where['mode']}, {batch}"
        row["tokens a second"] = batch / row["seconds"] if where["what"] == "decode" else None
        rows.append(row)
    return rows


def with_bandwidth(rows: list[dict], models: dict, bandwidth: float) -> list[dict]:
    """Add the share of the memory's bandwidth that reading the weights once takes."""
    for row in rows:
        model = models[row["model"]]
        read = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
        row["bandwidth"] = sum(read.values()) / row["seconds"] / bandwidth
    return rows


def measure_bandwidth() -> float:
    """Measure the bytes a second that a large copy reads and writes."""
    block = torch.zeros(2**28 if DEVICE == "cuda" else 2**25, device=DEVICE)
    seconds = interleaved({"copy": block.clone}, 10, title="bandwidth")["copy"]
    return 2 * block.nbytes / min(seconds)


def reset_memory():
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
