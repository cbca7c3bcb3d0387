"""Requests over HTTP that end: within their time, after some tries, in an answer or in an error that says whose."""

import asyncio
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import httpx
from tenacity import AsyncRetrying, RetryCallState, before_sleep_log, retry_if_exception_type, stop_after_attempt
from tenacity.wait import wait_exponential, wait_random

PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds before the second try, and most before any
CONNECTIONS = 256
MOST_BYTES = 2**28  # of an answer: 64 prompts' whole vocabularies are about a hundred megabytes
Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class EndpointError(RuntimeError):
    """An endpoint did not answer, or not as it should. `may_mend` says whether it might, later."""

    def __init__(self, message: str, may_mend: bool = False):
        super().__init__(message)
        self.may_mend = may_mend


class _TryAgainError(Exception):
    """What another try may mend. `pause` is what the server asks for, in seconds."""

    def __init__(self, message: str, pause: float | None = None):
        super().__init__(message)
        self.pause = pause


class Key:
    """
    A server's key, which no `repr` shows.

    Args:
        source (`str` or `Callable`, *optional*): the name of the environment variable that holds it, or a function
            that returns it.
    """

    def __init__(self, source: str | Callable[[], str] | None):
        if not (source is None or isinstance(source, str) or callable(source)):
            raise TypeError("A `key` must name an environment variable, or be a function that returns the key.")
        self._source = source

    def __eq__(self, other) -> bool:
        return isinstance(other, Key) and self._source == other._source

    def __hash__(self) -> int:
        return hash(self._source)

    def headers(self) -> dict[str, str]:
        """
        Return what a request brings.

        Raises:
            ValueError: if the variable is not set, or the key is no line of printable characters.
        """
        value = self._value()
        return {} if value is None else {"Authorization": f"Bearer {value}"}

    def hidden_in(self, text: str) -> str:
        """Return `text`, which a server may have written, without the key."""
        value = self._value()
        return text.replace(value, "[key]") if value else text

    def _value(self) -> str | None:
        source = self._source
        if source is None:
            return None
        value = os.environ.get(source) if isinstance(source, str) else source()
        if value is None:
            raise ValueError("The environment variable that an endpoint's `key` names is not set.")
        value = value.strip()
        if not value.isascii() or not value.isprintable():
            raise ValueError("An endpoint's key must be one line of printable ASCII characters.")
        return value


@dataclass
class Usage:
    """
    What an endpoint was asked: calls, tries that failed, prompts and their tokens, and seconds waited; and how many
    contexts rows went on from without it.
    """

    calls: int = 0
    failed_tries: int = 0
    prompts: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0
    dropped: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass
class Call:
    r"""
    A request and what is made of its answer.

    Args:
        url (`str`): where it goes.
        body (`dict`, *optional*): JSON that is posted; None gets.
        read (`Callable`): makes of JSON what is wanted; whatever it raises is an answer that cannot be read.
        key (`Key`): the server's.
        timeout (`float`): seconds of a try.
        attempts (`int`): tries.
        usage (`Usage`): where it is counted.
    """

    url: str
    body: dict[str, Any] | None
    read: Callable[[Any], Any]
    key: Key
    timeout: float
    attempts: int
    usage: Usage

    async def answer(self) -> Any:
        """
        Send, and again where that may help.

        Raises:
            EndpointError: if the server refuses, or no try has given an answer that can be read.
        """
        start = time.perf_counter()
        self.usage.calls += 1

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_TryAgainError),
            stop=stop_after_attempt(self.attempts),
            wait=_pause,
            before_sleep=before_sleep_log(logger, logging.INFO),
            reraise=True,
        )

        try:
            async for attempt in retrying:
                with attempt:
                    return await self._try()
        except _TryAgainError as error:
            tries = f"{self.attempts} tries" if self.attempts > 1 else "one try"
            raise EndpointError(f"{self.url} did not answer in {tries}: {error}.", may_mend=True) from None
        finally:
            self.usage.seconds += time.perf_counter() - start

    async def _try(self) -> Any:
        try:
            async with asyncio.timeout(self.timeout):  # of all; httpx's own is of each read
                status, headers, content = await self._send()
                return await asyncio.to_thread(self._made, status, headers, content)
        except (httpx.HTTPError, TimeoutError) as error:
            self.usage.failed_tries += 1
            late = isinstance(error, (TimeoutError, httpx.TimeoutException))
            reason = f"nothing within {self.timeout:g} s" if late else str(error) or type(error).__name__
            raise _TryAgainError(reason) from None
        except _TryAgainError:
            self.usage.failed_tries += 1
            raise

    async def _send(self) -> tuple[int, httpx.Headers, bytes]:
        client, method = _network().client, "GET" if self.body is None else "POST"
        request = client.build_request(
            method, self.url, json=self.body, headers=self.key.headers(), timeout=self.timeout
        )
        got = await client.send(request, stream=True)
        try:
            content = bytearray()
            async for part in got.aiter_bytes():
                content += part
                if len(content) > MOST_BYTES:
                    raise EndpointError(f"{self.url} answers with more than {MOST_BYTES} bytes.")
            return got.status_code, got.headers, bytes(content)
        finally:
            await got.aclose()

    def _made(self, status: int, headers: httpx.Headers, content: bytes) -> Any:
        """Read an answer; tell what another try may mend from what it may not."""
        if status in (408, 425, 429) or status >= 500:
            pause = _seconds(headers.get("Retry-After"))
            if pause is not None and pause > LONGEST_PAUSE:
                raise EndpointError(f"{self.url} asks to wait for {pause:g} s (status {status}).", may_mend=True)
            raise _TryAgainError(f"status {status}", pause)
        if status != 200:
            text = self.key.hidden_in(content[:200].decode(errors="replace"))
            where = f" to {headers.get('Location')!r}, which is not followed" if 300 <= status < 400 else ""
            raise EndpointError(f"{self.url} answered with status {status}{where}: {text}")

        try:
            return self.read(json.loads(content))
        except Exception as error:
            text = self.key.hidden_in(f"{type(error).__name__}: {error}")[:200]
            raise _TryAgainError(f"an answer that cannot be read ({text})") from None


def _seconds(text: str | None) -> float | None:
    """Read a Retry-After; dates are left out."""
    try:
        seconds = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def _pause(state: RetryCallState) -> float:
    """Seconds until the next try: what the server asks for, or more each time."""
    error = state.outcome.exception() if state.outcome is not None else None
    asked = error.pause if isinstance(error, _TryAgainError) else None
    growing = wait_exponential(multiplier=PAUSE, max=LONGEST_PAUSE) + wait_random(0, PAUSE)
    return growing(state) if asked is None else asked


# One loop and one client for a process, in a thread of their own: connections are kept, and any thread may ask.


class _Network:
    def __init__(self):
        self.process = os.getpid()  # a forked one has none of its parent's threads
        self.loop = asyncio.new_event_loop()
        limits = httpx.Limits(max_connections=CONNECTIONS)
        self.client = httpx.AsyncClient(follow_redirects=False, http2=True, limits=limits)  # where TLS agrees on it
        threading.Thread(target=self.loop.run_forever, name="endpoints", daemon=True).start()


_lock = threading.Lock()
_networks: list[_Network] = []


def _network() -> _Network:
    with _lock:
        if not _networks or _networks[-1].process != os.getpid():
            _networks[:] = [_Network()]
        return _networks[-1]


def send(call: Call) -> "Future[Any]":
    """Send a request, which goes on while the caller does; its answer is the result, and it can be cancelled."""
    return asyncio.run_coroutine_threadsafe(call.answer(), _network().loop)


__all__ = ["Call", "EndpointError", "Key", "Usage", "send"]
