"""
Requests under different preferences that join and leave a running batch, against one batch at a time; eager steps and
compiled ones.

    python examples/continuous_batching.py
    python examples/continuous_batching.py --requests 64 --rate 2 --rows 16

A small scheduler over rows of one cache (`PCMEnsembleCache.join`). It is not transformers' own continuous
batching, whose paged cache gives each request the blocks of one model: here a request is a row of the PCM's cache and
one of a backbone's for each active expert.
"""

import argparse
import copy
import itertools
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, quantiles

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import CompileConfig

from modeling_pcm_ensemble import PCMEnsembleCache, PCMEnsembleForCausalLM, demo
from modeling_pcm_ensemble.call_checks import check_ids, check_length
from modeling_pcm_ensemble.preferences import Route, build_route

EXAMPLES = Path(__file__).parent


@dataclass(eq=False)  # two users may ask the same
class Request:
    """What a user asks, and what has become of it. Times are seconds from the start."""

    input_ids: list[int]
    preference: dict[str, float] | list | str | None  # in any form of one row's; None is the ensemble's default
    max_new_tokens: int
    arrival: float = 0.0
    tokens: list[int] = field(default_factory=list)
    first_token: float | None = None
    finished: float | None = None


class Scheduler:
    r"""
    Runs requests as rows of one batch, one token of each at a step.

    Args:
        model (`PCMEnsembleForCausalLM`): the ensemble.
        max_rows (`int`): most requests that run at once.
        joins (`bool`): whether requests join a running batch; else they wait until it has ended.
        compile_config (`CompileConfig`, *optional*): how steps are compiled; prompts are read by eager ones.
    """

    def __init__(
        self,
        model: PCMEnsembleForCausalLM,
        max_rows: int,
        joins: bool = True,
        compile_config: CompileConfig | None = None,
    ):
        self.model, self.max_rows, self.joins, self.compiled = model, max_rows, joins, compile_config is not None
        self.decode = model.get_compiled_call(compile_config) if self.compiled else model
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.ended: list[Request] = []  # that `step` has not returned yet
        self.cache: PCMEnsembleCache | None = None
        self.ends = set(torch.as_tensor(model.generation_config.eos_token_id or []).flatten().tolist())

    def add(self, request: Request):
        """
        Let a request wait for its turn.

        Raises:
            TypeError, ValueError: if it could not be answered. The others do not notice.
        """
        if any(request is other for other in self.waiting + self.running):
            raise ValueError("The request has been added already.")
        if type(request.max_new_tokens) is not int or request.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be a number from 1 on, got {request.max_new_tokens!r}.")
        if not isinstance(request.input_ids, list) or not all(type(token) is int for token in request.input_ids):
            raise TypeError(f"`input_ids` must be a list of token ids, got {request.input_ids!r}.")
        check_ids(self.model.config, "input_ids", torch.tensor([request.input_ids], dtype=torch.long))
        # The last token is not read.
        length = len(request.input_ids) + request.max_new_tokens - 1
        check_length(self.model.config, self._route(request), length)
        request.preference = copy.deepcopy(request.preference)  # what was checked is what will run
        self.waiting.append(request)

    def cancel(self, request: Request):
        """Forget a request, whose tokens so far it keeps. One that has ended, or was never added, changes nothing."""
        self.waiting = [other for other in self.waiting if other is not request]
        self._keep([other is not request for other in self.running])

    @torch.no_grad()
    def step(self) -> list[Request]:
        """Give every running request its next token, let waiting ones in, and return those that have ended by it."""
        if self.running:
            tokens = torch.tensor([[request.tokens[-1]] for request in self.running], device=self.model.device)
            self._take(self.running, self.decode(tokens, past_key_values=self.cache, logits_to_keep=1).logits)
            self._leave()

        room = self.max_rows - len(self.running) if self.joins or not self.running else 0
        if new := self.waiting[:room]:
            cache = PCMEnsembleCache(self.model.config)
            weights = torch.cat([self._route(request).weights for request in new])
            logits = self.model(
                **self._padded(new), past_key_values=cache, preference=weights, logits_to_keep=1
            ).logits
            self._join(new, cache)
            self._take(new, logits)
            self._leave()
        ended, self.ended = self.ended, []
        return ended

    def _route(self, request: Request) -> Route:
        return build_route(self.model.config, 1, request.preference)

    def _padded(self, requests: list[Request]) -> dict[str, torch.Tensor]:
        rows = {"input_ids": [request.input_ids for request in requests]}
        return self.model.tokenizer.pad(rows, padding_side="left", return_tensors="pt").to(self.model.device)

    def _take(self, requests: list[Request], logits: torch.Tensor):
        for request, token in zip(requests, logits[:, -1].argmax(dim=-1).tolist()):
            request.tokens.append(token)

    def _join(self, new: list[Request], cache: PCMEnsembleCache):
        running, caches = self.running + new, [self.cache, cache] if self.running else [cache]
        self.cache = PCMEnsembleCache.join(caches, self._room(running))
        self.running, self.waiting = running, self.waiting[len(new) :]

    def _room(self, requests: list[Request]) -> int | None:
        """Of a static cache, for compiled steps, the tokens that its rows may still need."""
        needed = [request.max_new_tokens - len(request.tokens) for request in requests]
        return max(1, *needed) if self.compiled else None

    def _leave(self):
        is_over = [len(r.tokens) >= r.max_new_tokens or r.tokens[-1] in self.ends for r in self.running]
        self.ended += [request for request, over in zip(self.running, is_over) if over]
        self._keep([not over for over in is_over])

    def _keep(self, wanted: list[bool]):
        """Let the other rows go, and with them the columns that they alone needed."""
        if all(wanted):
            return
        rows = [row for row, is_wanted in enumerate(wanted) if is_wanted]
        self.running = [self.running[row] for row in rows]
        if rows:
            self.cache.batch_select_indices(torch.tensor(rows, device=self.model.device))
            self.cache = PCMEnsembleCache.join([self.cache], self._room(self.running))


def serve(scheduler: Scheduler, requests: list[Request], title: str) -> float:
    """Let requests arrive at their times; gives the seconds until the last has ended."""
    coming, start = sorted(requests, key=lambda request: request.arrival), time.perf_counter()
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


def make_requests(model: PCMEnsembleForCausalLM, arguments) -> list[Request]:
    """Prompts and preferences by turns, lengths and arrivals by chance."""
    chance = random.Random(arguments.seed)
    prompts = json.loads((EXAMPLES / "data/evaluation_only/koala_eval_50.json").read_text())
    names = model.config.expert_names
    requests, arrival = [], 0.0
    for number in range(arguments.requests):
        arrival += chance.expovariate(arguments.rate)
        chat = [{"role": "user", "content": prompts[number % len(prompts)]["prompt"]}]
        ids = model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        preference = {name: chance.choice([0.5, 1.0, 2.0]) for name in chance.sample(names, 3)}
        requests.append(Request(ids, preference, chance.randint(8, arguments.tokens), arrival))
    return requests


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--rate", type=float, default=1.5, help="requests a second, on average")
    parser.add_argument("--rows", type=int, default=16, help="most requests that run at once")
    parser.add_argument("--tokens", type=int, default=64, help="most new tokens of a request; the fewest are 8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="a JSON file for the figures")
    arguments = parser.parse_args()
    if arguments.requests < 2 or arguments.rate <= 0 or arguments.rows < 1 or arguments.tokens < 8:
        parser.error("needs --requests of at least 2, --rate above 0, --rows of at least 1, --tokens of at least 8")
    model = demo.trained_ensemble(EXAMPLES / "artifacts", dtype=demo.fast_dtype())
    rows = []
    for compile_config, joins in itertools.product((None, CompileConfig()), (False, True)):
        title = "requests join and leave" if joins else "one batch at a time"
        title += ", compiled" if compile_config else ""
        for number in (1, 2):  # one row and several are compiled apart; eager steps read the weights once before
            first = [Request([1, 2, 3], {"concise": 1.0, "friendly": 1.0}, 3) for _ in range(number)]
            scheduler = Scheduler(model, number, joins, compile_config)
            scheduler.ends = set()
            serve(scheduler, first, "warm-up")
        requests = make_requests(model, arguments)
        seconds = serve(Scheduler(model, arguments.rows, joins, compile_config), requests, title)
        latency = [request.finished - request.arrival for request in requests]
        rows.append(
            {
                "name": title,
                "tokens a second": sum(len(request.tokens) for request in requests) / seconds,
                "first token, seconds": mean(request.first_token - request.arrival for request in requests),
                "whole answer, seconds": mean(latency),
                "slowest tenth, seconds": quantiles(latency, n=10)[-1],
            }
        )
    table = Table(*rows[0], title=f"{arguments.requests} requests, {arguments.rate} a second")
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:.2f}" for value in row.values()))
    Console().print(table)
    if arguments.output:
        settings = {name: value for name, value in vars(arguments).items() if name != "output"}
        Path(arguments.output).write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
