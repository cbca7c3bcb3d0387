"""All times of a GPU in one run of a few minutes: decode steps, prompts, memory; eager, and as CUDA graphs."""

import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.utils import logging

from modeling_pcm_ensemble import PCMEnsembleForCausalLM, demo

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
from .fast import compiled_plain, compiled_plain_step, compiled_step

logger = logging.get_logger(__name__)

SMOLLM2 = "SmolLM2-135M"
LLAMAS = {  # random ones, of the sizes of Llama 3.2 1B, 3B and Llama 3.1 8B but that all tie their embeddings
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
PLAIN, PROMPTED, LORA = "plain model", "prompted", "LoRA"
MERGES = {'LoRA, merge="product"': "product", 'LoRA, merge="adapters"': "adapters", LORA: "probabilities"}
EXPERTS = 3  # where the number of them is not what is looked at
TESTS_LIMIT = 120  # seconds


def add_arguments(parser):
    parser.add_argument("--shapes", nargs="+", choices=[SMOLLM2, *LLAMAS], default=[SMOLLM2, "8B", "1B", "3B"])
    parser.add_argument("--experts", type=int, nargs="+", default=[3, 6, 1], help="the first number is measured first")
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
    missing = [] if DEVICE == "cpu" or tests_pass() else ["tests/test_gpu.py"]
    bandwidth = measure_bandwidth()

    rows: dict[str, list[dict]] = {shape: [] for shape in arguments.shapes}
    for shape, name, measure in parts(arguments):
        if time.monotonic() > deadline:
            missing.append(name)
            continue
        try:
            rows[shape] += with_bandwidth(measure(), bandwidth)
        except Exception as error:  # what comes after it is worth measuring all the same
            logger.warning(f"{name} has failed. {type(error).__name__}: {error}")
            missing.append(name)
        gc.collect()
        if rows[shape]:
            write_shape(shape, rows[shape], arguments)

    if missing:
        raise SystemExit(f"Failed, or left out after {arguments.seconds:g} seconds: {'; '.join(missing)}.")


def tests_pass() -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_gpu.py"]
    try:
        return subprocess.run(command, timeout=TESTS_LIMIT).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def parts(arguments) -> Iterator[tuple[str, str, Callable[[], list[dict]]]]:
    """Give each part's shape, its name, and how it is measured: first one of each kind, of the first two shapes."""
    first, *other_numbers = arguments.experts
    for shapes in (arguments.shapes[:2], arguments.shapes[2:]):
        for shape in shapes:
            yield shape, f"{shape}, {first} experts", partial(measure_decode, shape, first, arguments)
        for shape in shapes:
            yield shape, f"{shape}, compiled", partial(measure_compiled, shape, arguments)
        for shape in shapes:
            yield shape, f"{shape}, prompts", partial(measure_prompts, shape, arguments)
    for number in other_numbers:
        for shape in arguments.shapes:
            yield shape, f"{shape}, {number} experts", partial(measure_decode, shape, number, arguments)


def write_shape(shape: str, rows: list[dict], arguments):
    """Write a shape's results; the picture has its eager and compiled steps."""
    shown = [row for row in rows if row["what"] == "decode" and row["experts"] == arguments.experts[0]]
    picture = partial(grouped_bars, rows=shown, group="batch", label="time of one plain model in the same mode")
    columns = ["what", "mode", "batch", "name", "seconds", "ratio", "tokens a second", "share of bandwidth", "GB"]
    write_results(f"all-{shape}", rows, columns, arguments, picture if shown else None, model=shape)


# Models


def make_backbone(shape: str) -> PreTrainedModel:
    """Load SmolLM2, or make a random Llama of a shape, on the device."""
    torch.manual_seed(0)

    if shape == SMOLLM2:
        model = AutoModelForCausalLM.from_pretrained(demo.fetch_smollm2(), dtype=DTYPE)
    else:
        small = shape == "tiny"
        config = LlamaConfig(
            vocab_size=49152 if small else 128256,
            num_key_value_heads=1 if small else 8,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            **LLAMAS[shape],
        )
        with torch.device(DEVICE):
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPE)

    return model.to(DEVICE).eval().requires_grad_(False)


def make_models(shape: str, experts: int) -> dict[str, PreTrainedModel]:
    """Make a plain model, and ensembles; adapters hang on a backbone of their own, since their hooks take time."""
    backbone = make_backbone(shape)
    with torch.device(DEVICE):  # of the PCM too, which is made with random weights first
        return {
            PLAIN: backbone,
            PROMPTED: prompted_ensemble(backbone, experts),
            LORA: random_lora_ensemble(make_backbone(shape), experts),
        }


def under_each_merge(models: dict[str, PreTrainedModel], make_step: Callable) -> dict[str, tuple]:
    """Give each way's model, and what makes its step: each model's own, and the LoRA ensemble's under every merge."""
    ways = {name: (models[name], partial(make_step, models[name])) for name in (PLAIN, PROMPTED)}
    lora = models[LORA]
    return ways | {name: (lora, partial(merged_step, lora, merge, make_step)) for name, merge in MERGES.items()}


def merged_step(model: PCMEnsembleForCausalLM, merge: str, make_step: Callable) -> Callable:
    """Make a step of an ensemble that has other merges at other times."""
    model.config.merge = merge
    step = make_step(model)

    def run_merged():
        model.config.merge = merge
        return step()

    return run_merged


# Parts


def measure_decode(shape: str, experts: int, arguments) -> list[dict]:
    """Measure eager steps at all batch sizes."""
    models, rows = make_models(shape, experts), []
    for batch in arguments.batches:
        ways = under_each_merge(models, partial(cached_step, token=one_token(batch)))
        rows += measure({"what": "decode", "mode": "eager", "batch": batch, "experts": experts}, ways, arguments)
    return rows


def measure_prompts(shape: str, arguments) -> list[dict]:
    """Measure the first pass over prompts, which differ from row to row."""
    models, rows = make_models(shape, EXPERTS), []
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 8):
        ids = torch.randint(100, 40000, (batch, arguments.prompt), generator=generator).to(DEVICE)
        ways = under_each_merge(models, lambda model, ids=ids: partial(model, ids, use_cache=True, logits_to_keep=1))
        rows += measure({"what": "prompt", "mode": "eager", "batch": batch, "experts": EXPERTS}, ways, arguments)
    return rows


def measure_compiled(shape: str, arguments) -> list[dict]:
    """Measure compiled steps, which are CUDA graphs on a GPU."""
    backbone, rows = make_backbone(shape), []
    ensemble = random_lora_ensemble(make_backbone(shape), EXPERTS)
    plain = compiled_plain(backbone)

    mode = "CUDA graphs" if DEVICE == "cuda" else "compiled"
    for batch in arguments.batches:
        ways = {
            PLAIN: (backbone, partial(compiled_plain_step, plain, one_token(batch), arguments.rounds)),
            LORA: (ensemble, partial(compiled_step, ensemble, one_token(batch), arguments.rounds)),
        }
        rows += measure({"what": "decode", "mode": mode, "batch": batch, "experts": EXPERTS}, ways, arguments)
    return rows


def measure(where: dict, ways: dict[str, tuple], arguments) -> list[dict]:
    """Measure ways in turns: seconds, tokens a second, and gigabytes of weights, cache and one step."""
    steps, gigabytes = {}, {}
    for name, (model, make_step) in ways.items():
        steps[name], beside_weights = made_and_run(make_step)
        gigabytes[name] = None if beside_weights is None else (bytes_of(model) + beside_weights) / 2**30

    title = f"{where['what']}, {where['mode']}, batch {where['batch']}"
    rows = summary(interleaved(steps, arguments.rounds, title=title), PLAIN)
    for row in rows:
        name, (model, _) = row["name"], ways[row["name"]]
        row |= where | {"GB": gigabytes[name], "bytes read": bytes_of(model, read=True)}
        if name != PLAIN:
            row["name"] = f"{where['experts']} experts, {name}"
        if where["mode"] != "eager":
            row["name"] += f", {where['mode']}"
        if where["what"] == "decode":
            row["tokens a second"] = where["batch"] / row["seconds"]
    return rows


def made_and_run(make_step: Callable) -> tuple[Callable, int | None]:
    """Make a step, run it once, and give the bytes that its cache and the step itself took; None on a CPU."""
    if DEVICE == "cpu":
        return make_step(), None
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    step = make_step()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return step, torch.cuda.max_memory_allocated() - before


def bytes_of(model: PreTrainedModel, read: bool = False) -> int:
    """Count the bytes of a model's weights, or of those that a step reads: of a PCM's embeddings it looks rows up."""
    weights = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    if read and isinstance(model, PCMEnsembleForCausalLM):
        weights.pop(model.pcm.get_input_embeddings().weight.data_ptr(), None)
    return sum(weights.values())


def with_bandwidth(rows: list[dict], bandwidth: float) -> list[dict]:
    """Add the share of the memory's bandwidth that reading the weights once takes, to decode steps."""
    for row in rows:
        num_bytes = row.pop("bytes read")
        if row["what"] == "decode":
            row["share of bandwidth"] = num_bytes / row["seconds"] / bandwidth
    return rows


def measure_bandwidth() -> float:
    """Measure the bytes a second that a large copy reads and writes."""
    block = torch.zeros(2**28 if DEVICE == "cuda" else 2**25, device=DEVICE)
    seconds = interleaved({"copy": block.clone}, 10, title="bandwidth")["copy"]
    return 2 * block.nbytes / min(seconds)
