"""
Continuous batching: requests under different preferences that join and leave a running batch.

It is not transformers' own continuous batching, whose paged cache gives each request the blocks of one model: here a
request is a row of the PCM's cache and one of a backbone's for each active expert.
"""

import copy
from dataclasses import dataclass, field

import torch
from transformers import CompileConfig

from .cache import PCMEnsembleCache
from .call_checks import check_ids, check_length
from .generation import PREFERENCE, filled_in
from .modeling_pcm_ensemble import PCMEnsembleForCausalLM
from .preference import Preference
from .routing import Route
from .rows import stack_padded


@dataclass(eq=False)  # two users may ask the same
class Request:
    r"""
    What a user asks, and what has become of it.

    Args:
        input_ids (`list[int]`): the prompt's tokens.
        preference: in any form of one row's; None is the ensemble's default.
        max_new_tokens (`int`): most tokens of the answer.
        tokens (`list[int]`): the answer so far.
    """

    input_ids: list[int]
    preference: Preference | dict[str, float] | list | str | None
    max_new_tokens: int
    tokens: list[int] = field(default_factory=list)


class Scheduler:
    r"""
    Runs requests as rows of one batch, greedily, one token of each at a step.

    Args:
        model (`PCMEnsembleForCausalLM`): the ensemble.
        max_rows (`int`): most requests that run at once.
        joins (`bool`): whether requests join a running batch; else they wait until it has ended.
        compile_config (`CompileConfig`, *optional*): how steps are compiled; prompts are read by eager ones.

    Attributes:
        waiting, running (`list[Request]`): requests that have not ended.

    Example:

    ```python
    scheduler = Scheduler(model, max_rows=8)
    scheduler.add(Request(input_ids, {"friendly": 1.0}, max_new_tokens=32))
    while scheduler.waiting or scheduler.running:
        for request in scheduler.step():
            print(model.tokenizer.decode(request.tokens))
    ```
    """

    def __init__(
        self,
        model: PCMEnsembleForCausalLM,
        max_rows: int,
        joins: bool = True,
        compile_config: CompileConfig | None = None,
    ):
        self.model = model
        self.max_rows = max_rows
        self.joins = joins
        self.compiled = compile_config is not None
        self.decode = model.get_compiled_call(compile_config) if self.compiled else model

        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.ended: list[Request] = []  # that `step` has not returned yet
        self.cache: PCMEnsembleCache | None = None
        ends = model.generation_config.eos_token_id
        self.ends = set(torch.as_tensor([] if ends is None else ends).flatten().tolist())

    def add(self, request: Request):
        """
        Let a request wait for its turn. One that was cancelled goes on behind the tokens that it has.

        Raises:
            TypeError, ValueError: if it could not be answered, or has ended. The others do not notice.
        """
        if any(request is other for other in self.waiting + self.running):
            raise ValueError("The request has been added already.")
        if type(request.max_new_tokens) is not int or request.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be a number from 1 on, got {request.max_new_tokens!r}.")
        if not isinstance(request.input_ids, list) or not all(type(token) is int for token in request.input_ids):
            raise TypeError(f"`input_ids` must be a list of token ids, got {request.input_ids!r}.")

        if self._is_over(request):
            raise ValueError("The request has ended. To ask again, make another one.")

        check_ids(self.model.config, "input_ids", torch.tensor([request.input_ids], dtype=torch.long))
        length = len(request.input_ids) + request.max_new_tokens - 1  # the last token is not read
        check_length(self.model.config, Route(self.model.config, [self._preference(request)]), length)

        request.preference = copy.deepcopy(request.preference)  # what was checked is what will run
        self.waiting.append(request)

    def cancel(self, request: Request):
        """Forget a request, whose tokens so far it keeps. One that has ended, or was never added, changes nothing."""
        self.waiting = [other for other in self.waiting if other is not request]
        self._keep([other is not request for other in self.running])

    @torch.no_grad()
    def step(self) -> list[Request]:
        """
        Give every running request its next token, let waiting ones in, and return those that have ended by it. After a
        step that has failed, the next one reads the requests that were running anew.
        """
        if self.running:
            tokens = torch.tensor([[request.tokens[-1]] for request in self.running], device=self.model.device)
            try:
                logits = self.decode(tokens, past_key_values=self.cache, logits_to_keep=1).logits
            except BaseException:  # some submodels have read the tokens, and others have not
                self.waiting, self.running, self.cache = self.running + self.waiting, [], None
                raise
            self._take(self.running, logits)
            self._leave()

        room = self.max_rows - len(self.running) if self.joins or not self.running else 0
        if new := self.waiting[:room]:
            cache = PCMEnsembleCache(self.model.config)
            logits = self._read_prompts(new, cache)
            self._join(new, cache)
            self._take(new, logits)
            self._leave()

        ended, self.ended = self.ended, []
        return ended

    def _preference(self, request: Request) -> Preference:
        told = dict.fromkeys(PREFERENCE) | {"preference": request.preference}
        return self.model._preferences(1, **filled_in(told, self.model.generation_config))[0]

    def _read_prompts(self, requests: list[Request], cache: PCMEnsembleCache) -> torch.Tensor:
        """Fill a cache with what there is of requests; gives the logits of what comes next, `(requests, 1, vocab)`."""
        ids, mask = stack_padded([request.input_ids + request.tokens for request in requests], self.model.device)
        preferences = [self._preference(request) for request in requests]
        return self.model(ids, mask, past_key_values=cache, preference=preferences, logits_to_keep=1).logits

    def _take(self, requests: list[Request], logits: torch.Tensor):
        """Give each request its most probable token."""
        for request, token in zip(requests, logits[:, -1].argmax(dim=-1).tolist()):
            request.tokens.append(token)

    def _join(self, new: list[Request], cache: PCMEnsembleCache):
        running = self.running + new
        caches = [cache] if self.cache is None or not self.running else [self.cache, cache]
        self.cache = PCMEnsembleCache.join(caches, self._room(running))
        self.running = running
        self.waiting = self.waiting[len(new) :]

    def _room(self, requests: list[Request]) -> int | None:
        """Of a static cache, for compiled steps, the tokens that its rows may still need."""
        needed = [request.max_new_tokens - len(request.tokens) for request in requests]
        return max(1, *needed) if self.compiled else None

    def _leave(self):
        """Let requests go that are over."""
        is_over = [self._is_over(request) for request in self.running]
        self.ended += [request for request, over in zip(self.running, is_over) if over]
        self._keep([not over for over in is_over])

    def _is_over(self, request: Request) -> bool:
        return len(request.tokens) >= request.max_new_tokens or not self.ends.isdisjoint(request.tokens[-1:])

    def _keep(self, wanted: list[bool]):
        """Let the other rows go, and with them the columns that they alone needed."""
        if all(wanted):
            return
        rows = [row for row, is_wanted in enumerate(wanted) if is_wanted]
        self.running = [self.running[row] for row in rows]
        if not rows:
            self.cache = None
        elif self.cache is not None:
            self.cache.batch_select_indices(torch.tensor(rows, device=self.model.device))
            self.cache = PCMEnsembleCache.join([self.cache], self._room(self.running))


__all__ = ["Request", "Scheduler"]
