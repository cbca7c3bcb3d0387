"""Requests under different preferences that join and leave a running batch, beside one batch at a time."""

import itertools
import random
import time
from dataclasses import dataclass
from statistics import mean, quantiles

from tqdm import tqdm
from transformers import CompileConfig

from modeling_pcm_ensemble import PCMEnsembleForCausalLM, demo
from modeling_pcm_ensemble.scheduler import Request, Scheduler

from .common import DEVICE, DTYPE, koala_chats, write_results

MEASURES = ("tokens a second", "first token, seconds", "whole answer, seconds", "slowest tenth, seconds")


def add_arguments(parser):
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--rate", type=float, default=1.5, help="requests a second, on average")
    parser.add_argument("--rows", type=int, default=16, help="most requests that run at once")
    parser.add_argument("--tokens", type=int, default=64, help="most new tokens of a request; the fewest are 8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="leave out compiled steps")


def run(arguments):
    if arguments.layers is not None:
        raise SystemExit("`continuous` measures the trained experts on SmolLM2, and takes no --layers.")
    if arguments.requests < 2 or arguments.rate <= 0 or arguments.rows < 1 or arguments.tokens < 8:
        raise SystemExit(
            "`continuous` takes --requests of at least 2, --rate above 0, --rows of at least 1, "
            "and --tokens of at least 8."
        )

    model = demo.trained_ensemble(dtype=DTYPE).to(DEVICE)
    compile_configs = [None] if arguments.eager else [None, CompileConfig()]
    ways = itertools.product(compile_configs, (False, True))
    rows = [measure(model, joins, compile_config, arguments) for compile_config, joins in ways]
    write_results("continuous", rows, ["name", *MEASURES], arguments)


@dataclass(eq=False)
class TimedRequest(Request):
    """A request and its times, in seconds from the start."""

    arrival: float = 0.0
    first_token: float | None = None
    finished: float | None = None


def serve(scheduler: Scheduler, requests: list[TimedRequest], title: str) -> float:
    """Let requests arrive at their times; gives the seconds until the last has ended."""
    coming = sorted(requests, key=lambda request: request.arrival)
    start = time.perf_counter()
    with tqdm(total=len(requests), desc=title) as bar:
        while coming or scheduler.waiting or scheduler.running:
            now = time.perf_counter() - start
            while coming and coming[0].arrival <= now:
                scheduler.add(coming.pop(0))
            if not scheduler.waiting and not scheduler.running:
                time.sleep(coming[0].arrival - now)
                continue

            ended = scheduler.step()
            now = time.perf_counter() - start
            for request in [*scheduler.running, *ended]:
                request.first_token = now if request.first_token is None else request.first_token
            for request in ended:
                request.finished = now
            bar.update(len(ended))
    return now


def make_requests(model: PCMEnsembleForCausalLM, arguments) -> list[TimedRequest]:
    """Make requests: prompts by turns; preferences, lengths and arrivals by chance."""
    chance = random.Random(arguments.seed)
    asked = koala_chats()
    names = model.config.expert_names

    requests, arrival = [], 0.0
    for number in range(arguments.requests):
        arrival += chance.expovariate(arguments.rate)
        chat = asked[number % len(asked)]
        ids = model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        preference = {name: chance.choice([0.5, 1.0, 2.0]) for name in chance.sample(names, 3)}
        length = chance.randint(8, arguments.tokens)
        requests.append(TimedRequest(ids, preference, length, arrival=arrival))
    return requests


def warm_up(model: PCMEnsembleForCausalLM, joins: bool, compile_config: CompileConfig | None):
    """Compile steps of one row and of several, which are apart; eager steps read the weights once."""
    for number in (1, 2):
        requests = [TimedRequest([1, 2, 3], {"concise": 1.0, "friendly": 1.0}, 3) for _ in range(number)]
        scheduler = Scheduler(model, number, joins, compile_config)
        scheduler.ends = set()
        serve(scheduler, requests, "warm-up")


def measure(model: PCMEnsembleForCausalLM, joins: bool, compile_config, arguments) -> dict:
    title = "requests join and leave" if joins else "one batch at a time"
    title += ", compiled" if compile_config else ""
    warm_up(model, joins, compile_config)

    requests = make_requests(model, arguments)
    seconds = serve(Scheduler(model, arguments.rows, joins, compile_config), requests, title)
    latency = [request.finished - request.arrival for request in requests]
    measured = (
        sum(len(request.tokens) for request in requests) / seconds,
        mean(request.first_token - request.arrival for request in requests),
        mean(latency),
        quantiles(latency, n=10, method="inclusive")[-1],
    )
    settings = {name: getattr(arguments, name) for name in ("requests", "rate", "rows", "tokens", "seed")}
    return {"name": title} | dict(zip(MEASURES, measured)) | settings
