"""Steps of decoding by vLLM, beside plain vLLM and this library's own."""

import json
import os
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from modeling_pcm_ensemble import demo

from .common import (
    DTYPE,
    EXPERTS,
    cached_step,
    grouped_bars,
    interleaved,
    load_backbone,
    one_token,
    random_lora_ensemble,
    summary,
    write_results,
)

PLAIN = "plain vLLM"
BATCHES = (1, 8, 32)


def add_arguments(parser):
    parser.add_argument("--python", default=".venv-vllm/bin/python", help="of an environment with vLLM")
    parser.add_argument("--compiled", action="store_true", help="vLLM compiles steps; else all are eager")
    parser.add_argument("--tokens", type=int, default=24, help="that a measurement decodes")
    parser.add_argument("--rounds", type=int, default=5)


class Engine:
    """A process that serves a checkpoint by vLLM, and measures when it is asked to."""

    def __init__(self, python: str, folder: Path, options: dict):
        environment = os.environ | {
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        command = [python, "-P", str(Path(__file__).with_name("engine_process.py")), str(folder), json.dumps(options)]
        self.log = folder.with_suffix(".log")
        with self.log.open("w") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            self.process = subprocess.Popen(command, env=environment, text=True, **pipes)
        self._result()

    def step(self, batch: int, tokens: int) -> float:
        """Measure the seconds of a step."""
        self.process.stdin.write(f"{batch} {tokens}\n")
        self.process.stdin.flush()
        return float(self._result())

    def _result(self) -> str:
        for line in self.process.stdout:
            if line.startswith("RESULT"):
                return line.split()[1]
        raise RuntimeError(f"vLLM has ended:\n{self.log.read_text()}")

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def save_checkpoints(arguments, folder: Path) -> dict[str, Path]:
    """Write what engines serve: the backbone, and experts on it under two merges."""
    backbone = load_backbone(arguments)
    tokenizer = AutoTokenizer.from_pretrained(demo.fetch_smollm2())
    folders = {PLAIN: folder / "plain"}
    backbone.save_pretrained(folders[PLAIN])
    tokenizer.save_pretrained(folders[PLAIN])
    for name, merge in ((f"{EXPERTS} experts and the PCM", "probabilities"), ('merge="adapters"', "adapters")):
        folders[f"{name}, vLLM"] = folder / merge
        random_lora_ensemble(backbone, EXPERTS, merge=merge, tokenizer=tokenizer).save_pretrained(folder / merge)
    return folders


@torch.no_grad()
def run(arguments):
    """Measure all batches of all engines in turns."""
    with tempfile.TemporaryDirectory() as folder:
        folders = save_checkpoints(arguments, Path(folder))
        options = {"enforce_eager": not arguments.compiled, "dtype": str(DTYPE).removeprefix("torch.")}
        engines = {name: Engine(arguments.python, path, options) for name, path in folders.items()}
        own = random_lora_ensemble(load_backbone(arguments), EXPERTS)

        rows = []
        for batch in tqdm(BATCHES, desc="engine", leave=False):
            seconds: dict[str, list[float]] = {name: [] for name in engines}
            of_own: list[float] = []
            for done in range(arguments.rounds + 1):  # the first one warms up
                of_round = {name: engine.step(batch, arguments.tokens) for name, engine in engines.items()}
                own_step = cached_step(own, one_token(batch))  # anew, as the engines begin with a new context
                of_this = interleaved({"own": own_step}, arguments.tokens, warm_up=1)["own"]
                if done:
                    of_own.append(sum(of_this) / len(of_this))
                    for name, value in of_round.items():
                        seconds[name].append(value)
            rows += [{"batch": batch} | row for row in summary(seconds | {"this library": of_own}, PLAIN)]

        for engine in engines.values():
            engine.close()

    picture = partial(grouped_bars, rows=rows, group="batch", label="time of a step of plain vLLM")
    name = "engine-compiled" if arguments.compiled else "engine"
    write_results(name, rows, ["batch", "name", "seconds", "ratio", "quartiles"], arguments, picture)
