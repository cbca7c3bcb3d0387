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
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, TypeVar

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt
from tenacity.wait import wait_exponential, wait_random

PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds before the second try, and most before any
CONNECTIONS = 256
MOST_BYTES = 2**28  # of an answer: 64 prompts' whole vocabularies are about a hundred megabytes
Result = TypeVar("Result")

logger = logging.getLogger(__name__)
logging.getLogger("hpack").setLevel(logging.INFO)  # below, it logs encoded headers, and so the key


class EndpointError(RuntimeError):
    """
    An endpoint did not answer, or not as it should. `may_mend` says whether it might, later; `pause`, in seconds, when
    it wants to be asked again.
    """

    def __init__(self, message: str, may_mend: bool = False, pause: float = 0.0):
        super().__init__(message)
        self.may_mend, self.pause = may_mend, pause


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

    def value(self) -> str | None:
        """
        Read the key.

        Raises:
            ValueError: if the variable is not set, or the key is no line of printable characters.
        """
        source = self._source
        if source is None:
            return None
        value = ((os.environ.get(source) if isinstance(source, str) else source()) or "").strip()
        if not value:
            raise ValueError(
                "The environment variable that an endpoint's `key` names is not set, or the key is empty."
            )
        if not value.isascii() or not value.isprintable():
            raise ValueError("An endpoint's key must be one line of printable ASCII characters.")
        return value


@dataclass
class Usage:
    """
    What an endpoint was asked: calls, tries that failed, prompts and their tokens in all tries, and seconds waited;
    and how many contexts rows went on from without it.
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
        prompts (`int`), prompt_tokens (`int`): what the body holds.
    """

    url: str
    body: dict[str, Any] | None
    read: Callable[[Any], Any]
    key: Key
    timeout: float
    attempts: int
    usage: Usage
    prompts: int = 0
    prompt_tokens: int = 0

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
            before_sleep=self._log,
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

    def _log(self, state: RetryCallState):
        error = state.outcome.exception() if state.outcome is not None else None
        logger.info("%s failed at try %d (%s) and is asked again.", self.url, state.attempt_number, error)

    async def _try(self) -> Any:
        self.usage.prompts += self.prompts
        self.usage.prompt_tokens += self.prompt_tokens

        try:
            async with asyncio.timeout(self.timeout):  # of all; httpx's own is of each read
                key = await asyncio.to_thread(self.key.value)  # a function may take its time
                status, headers, content = await self._send(key)
                return await asyncio.to_thread(self._made, status, headers, content, key)

        except (httpx.HTTPError, TimeoutError) as error:
            self.usage.failed_tries += 1
            late = isinstance(error, (TimeoutError, httpx.TimeoutException))
            reason = f"nothing within {self.timeout:g} s" if late else str(error) or type(error).__name__
            raise _TryAgainError(reason) from None

        except (_TryAgainError, EndpointError):
            self.usage.failed_tries += 1
            raise

    async def _send(self, key: str | None) -> tuple[int, httpx.Headers, bytes]:
        client, method = _network().client, "GET" if self.body is None else "POST"
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        request = client.build_request(method, self.url, json=self.body, headers=headers, timeout=self.timeout)
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

    def _made(self, status: int, headers: httpx.Headers, content: bytes, key: str | None) -> Any:
        """Read an answer; tell what another try may mend from what it may not."""
        if status in (408, 425, 429) or status >= 500:
            pause = _seconds(headers.get("Retry-After"))
            if pause is not None and pause > LONGEST_PAUSE:
                raise EndpointError(f"{self.url} asks to wait for {pause:g} s (status {status}).", True, pause)
            raise _TryAgainError(f"status {status}", pause)
        if status != 200:
            where = f" to {headers.get('Location')!r}, which is not followed" if 300 <= status < 400 else ""
            text = _without(key, f"{where}: {content.decode(errors='replace')}")[:300]
            raise EndpointError(f"{self.url} answered with status {status}{text}")

        try:
            return self.read(json.loads(content))
        except Exception as error:
            text = _without(key, f"{type(error).__name__}: {error}")[:200]
            raise _TryAgainError(f"an answer that cannot be read ({text})") from None


def _without(key: str | None, text: str) -> str:
    """What a server has written, which may repeat the key."""
    return text.replace(key, "[key]") if key else text


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
        self.client = httpx.AsyncClient(
            follow_redirects=False,
            http2=True,  # where TLS agrees on it
            limits=httpx.Limits(max_connections=CONNECTIONS),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # what one key was given is no other key's
        )
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
