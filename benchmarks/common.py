"""What the benchmarks share: the models, interleaved timing, and how results are written."""

import json
import os
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import matplotlib as mpl
import torch
import transformers
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from modeling_pcm_ensemble import PCMEnsembleCache, PCMEnsembleForCausalLM, demo
from modeling_pcm_ensemble.checkpoint_staging import write_text

mpl.use("Agg")
import matplotlib.pyplot as plt

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = demo.fast_dtype(DEVICE)
RANK = 16
PCM_LAYERS = 4
EXPERTS, CONTEXT = 3, 64


def load_backbone(arguments) -> PreTrainedModel:
    """Load SmolLM2-135M, or make a random Llama of the size asked for, in memory of its own; on a GPU if any."""
    torch.manual_seed(0)

    if arguments.layers is None:
        model = AutoModelForCausalLM.from_pretrained(demo.fetch_smollm2(), dtype=DTYPE)
    else:
        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=arguments.hidden,
            intermediate_size=4 * arguments.hidden,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.hidden // 64,
            num_key_value_heads=max(1, arguments.hidden // 256),
            max_position_embeddings=8192,  # as SmolLM2 has
            tie_word_embeddings=True,
        )
        with torch.device(DEVICE):
            model = LlamaForCausalLM(config).to(DTYPE)

    model.to(DEVICE)
    for parameter in model.parameters():  # a checkpoint is mapped from disk, which a first pass would have to read
        parameter.data = parameter.data.clone()
    return model.eval().requires_grad_(False)


def random_adapter(backbone: PreTrainedModel, seed: int) -> dict:
    """Make a LoRA on all linear layers, as `from_experts` takes it."""
    generator = torch.Generator("cpu").manual_seed(seed)
    tensors = {}
    for path, module in backbone.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not backbone.get_output_embeddings():
            a = torch.randn(RANK, module.in_features, generator=generator, device="cpu") * module.in_features**-0.5
            b = torch.randn(module.out_features, RANK, generator=generator, device="cpu") * 0.01
            tensors |= {f"{path}.lora_A.weight": a.to(DTYPE), f"{path}.lora_B.weight": b.to(DTYPE)}
    return {"r": RANK, "lora_alpha": RANK, "target_modules": "all-linear", "tensors": tensors}


def random_lora_ensemble(backbone: PreTrainedModel, num_experts: int, **kwargs) -> PCMEnsembleForCausalLM:
    """Build any number of LoRA experts, whose adapters are random: time depends on shapes only."""
    experts = {f"lora{i}": {"model": backbone, "adapter": random_adapter(backbone, i)} for i in range(num_experts)}
    return PCMEnsembleForCausalLM.from_experts(experts, pcm=backbone, pcm_layers=PCM_LAYERS, **kwargs).to(DEVICE)


def prompted_ensemble(backbone: PreTrainedModel, num_experts: int, prompt_length: int = 18) -> PCMEnsembleForCausalLM:
    """Build experts that differ by their prompts alone, of random tokens."""
    model = PCMEnsembleForCausalLM.from_experts(
        {f"prompted{i}": {"model": backbone} for i in range(num_experts)}, pcm=backbone, pcm_layers=PCM_LAYERS
    )
    for i, expert in enumerate(model.config.experts):
        expert["prompt_ids"] = [(i * 31 + j) % 40000 + 100 for j in range(prompt_length)]
    return model.to(DEVICE)


ENSEMBLES = {"prompted": prompted_ensemble, "lora": random_lora_ensemble}
LABELS = {"prompted": "prompted experts", "lora": "LoRA experts"}  # of their kinds, in tables


def koala_chats(number: int | None = None) -> list[list[dict[str, str]]]:
    """Return chats of one user turn each, the 50 evaluation prompts or the first few of them."""
    prompts = json.loads((demo.ARTIFACTS.parent / "data/evaluation_only/koala_eval_50.json").read_text())
    return [[{"role": "user", "content": entry["prompt"]}] for entry in prompts[:number]]


def some_ids(batch: int, context: int = CONTEXT) -> torch.LongTensor:
    """Return a context, the same for every row, `(batch, context)`. Decode time depends on shapes only."""
    ids = torch.randint(100, 40000, (1, context), generator=torch.Generator().manual_seed(0))
    return ids.expand(batch, -1).to(DEVICE)


def one_token(batch: int) -> torch.LongTensor:
    """Return what is decoded, `(batch, 1)`."""
    return torch.full((batch, 1), 500, device=DEVICE)


def cached_step(model, token: torch.Tensor, context: int = CONTEXT):
    """Return a step of `model` behind a context."""
    is_ensemble = isinstance(model, PCMEnsembleForCausalLM)
    cache = PCMEnsembleCache(model.config) if is_ensemble else DynamicCache(config=model.config)
    model(some_ids(1, context), past_key_values=cache, use_cache=True, logits_to_keep=1)
    if len(token) > 1:
        cache.batch_repeat_interleave(len(token))
    return lambda: model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)


def interleaved(
    steps: dict[str, Callable[[], None]], rounds: int, warm_up: int = 4, title: str = ""
) -> dict[str, list]:
    """
    Measure the seconds of each step in each round. All take turns, so that a slow moment hits all of them; in an order
    drawn anew for each round, so that none has to find the processor's caches as the same other one has left them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    generator = random.Random(0)
    for done in tqdm(range(rounds + warm_up), desc=title, leave=False):
        for name in generator.sample(list(steps), len(steps)):
            start = time.perf_counter()
            steps[name]()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

            if done >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: dict[str, list], reference: str) -> list[dict]:
    """Return median seconds, and the median and quartiles of the ratio to the reference in the same round."""
    rows = []
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds[reference])]
        low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else (ratios[0],) * 3
        times = {"seconds": median(values), "ratio": median(ratios), "quartiles": [low, high]}
        rows.append({"name": name, "rounds": len(values)} | times)
    return rows


def in_own_process(command: list[str], arguments, **environment: str) -> dict:
    """Run a command of `python -m benchmarks` on the same model in a process of its own; return the JSON it prints."""
    command = [sys.executable, "-m", "benchmarks", *command]
    if arguments.layers is not None:
        command += ["--layers", str(arguments.layers), "--hidden", str(arguments.hidden)]

    done = subprocess.run(command, env=os.environ | environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def write_results(
    name: str,
    rows: list[dict],
    columns: list[str],
    arguments,
    picture: Callable | None = None,
    dtype: torch.dtype = DTYPE,
    model: str | None = None,
    panels: int = 1,
):
    """
    Print a table, and write it as JSON with machine and versions, and as PNG where there is a picture: a function of
    its axes, or of the list of them where there are several panels.
    """
    machine = describe_machine(arguments, dtype, model)
    where = f"{machine['threads']} CPU threads" if DEVICE == "cpu" else machine["device"]
    title = f"{machine['model']}, {where}, {dtype}"
    table = Table(*columns, title=f"{name}: {title}")
    for row in rows:
        table.add_row(*(f"{row[c]:.3g}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns))
    Console().print(table)

    folder = Path(arguments.output)
    stem = model_stem(name, arguments)
    stem += "" if DEVICE == "cpu" else "-gpu"
    write_text(folder / f"{stem}.json", json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")

    if picture is not None:
        figure, axes = plt.subplots(1, panels, figsize=(8 if panels == 1 else 4 * panels, 4.5), layout="constrained")
        picture(axes)
        figure.suptitle(title)
        figure.savefig(folder / f"{stem}.png", dpi=120)
        plt.close(figure)


def model_stem(name: str, arguments) -> str:
    """Return a file's name without its ending, with the model in it where it is not SmolLM2."""
    return name if arguments.layers is None else f"{name}-llama-{arguments.layers}x{arguments.hidden}"


def describe_machine(arguments, dtype: torch.dtype = DTYPE, model: str | None = None) -> dict:
    """Return what measured times depend on: the processor, versions, dtype, and the model of the command line."""
    if model is None:
        model = (
            "SmolLM2-135M-Instruct" if arguments.layers is None else f"Llama {arguments.layers} x {arguments.hidden}"
        )

    return {
        # Without AVX-512, a step has other proportions
        "cpu": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "device": "cpu" if DEVICE == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(dtype),
        "model": model,
        "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
    }


def processor() -> str:
    """Return the processor's name, or its architecture where the system does not name it."""
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text() if cpuinfo.exists() else "", flags=re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def grouped_bars(axes, rows: list[dict], group: str, label: str):
    """Draw ratios as bars, one colour for each name, side by side in each group, with their quartiles."""
    groups = list(dict.fromkeys(row[group] for row in rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    width = 0.8 / len(names)
    axes.set_prop_cycle(color=plt.get_cmap("tab20" if len(names) > 10 else "tab10").colors)

    for i, name in enumerate(names):
        of_name = [row for row in rows if row["name"] == name]
        heights = [row["ratio"] for row in of_name]
        below = [abs(row["ratio"] - row["quartiles"][0]) for row in of_name]
        above = [abs(row["ratio"] - row["quartiles"][1]) for row in of_name]
        places = [groups.index(row[group]) + (i - len(names) / 2 + 0.5) * width for row in of_name]
        bars = axes.bar(places, heights, width, label=name, yerr=[below, above], error_kw={"linewidth": 0.8})
        axes.bar_label(bars, fmt="%.2f", fontsize=6, padding=2)

    axes.set_xticks(range(len(groups)), [f"{group} {value}".replace(" + ", "\n+ ") for value in groups])
    axes.set_ylabel(label)
    axes.axhline(1, color="black", linewidth=0.6)
    axes.figure.legend(loc="outside right upper", fontsize=7)
