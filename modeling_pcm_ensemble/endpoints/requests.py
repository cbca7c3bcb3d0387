"""Requests over HTTP that end: within their time, after some tries, in an answer or in an error that says whose."""

import asyncio
import functools
import json
import os
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt
from tenacity.wait import wait_exponential_jitter

PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds before the second try, and most before any
CONNECTIONS = 256
Result = TypeVar("Result")


class EndpointError(RuntimeError):
    """An endpoint did not answer, or not as it should."""


class _TryAgainError(Exception):
    """What another try may mend. `pause` is what the server asks for, in seconds."""

    def __init__(self, message: str, pause: float | None = None):
        super().__init__(message)
        self.pause = pause


@dataclass
class Usage:
    """What an endpoint was asked: calls, tries that failed, prompts and their tokens, and seconds waited."""

    calls: int = 0
    failed_tries: int = 0
    prompts: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0


def post(
    url: str,
    body: dict[str, Any],
    read: Callable[[Any], Result],
    key: str | None,
    timeout: float,
    attempts: int,
    usage: Usage,
) -> Result:
    """
    Post JSON and return what `read` makes of the answer. Other threads' requests go on meanwhile.

    Raises:
        EndpointError: if the server refuses, or no try has given an answer that can be read.
    """
    start = time.perf_counter()
    usage.calls += 1
    try:
        return _run(_post(url, body, read, key, timeout, attempts, usage))
    finally:
        usage.seconds += time.perf_counter() - start


async def _post(url, body, read, key, timeout, attempts, usage) -> Any:
    retrying = AsyncRetrying(
        retry=retry_if_exception_type(_TryAgainError), stop=stop_after_attempt(attempts), wait=_pause, reraise=True
    )
    try:
        async for attempt in retrying:
            with attempt:
                return await _try(url, body, read, key, timeout, usage)
    except _TryAgainError as error:
        raise EndpointError(f"{url} did not answer in {attempts} tries: {error}.") from None


async def _try(url, body, read, key, timeout, usage) -> Any:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        async with asyncio.timeout(timeout):  # of all; httpx's own is of each read
            response = await _client(os.getpid()).post(url, json=body, headers=headers, timeout=timeout)
        return _answer(url, response, read)
    except (httpx.HTTPError, TimeoutError) as error:
        usage.failed_tries += 1
        reason = (
            f"nothing within {timeout:g} s" if isinstance(error, (TimeoutError, httpx.TimeoutException)) else error
        )
        raise _TryAgainError(str(reason) or type(error).__name__) from error
    except _TryAgainError:
        usage.failed_tries += 1
        raise


def _answer(url: str, response: httpx.Response, read: Callable[[Any], Result]) -> Result:
    """Read an answer; tell what another try may mend from what it may not."""
    status = response.status_code
    if status in (408, 425, 429) or status >= 500:
        raise _TryAgainError(f"status {status}", _seconds(response.headers.get("Retry-After")))
    if status != 200:
        where = f" to {response.headers.get('Location')!r}, which is not followed" if response.is_redirect else ""
        raise EndpointError(f"{url} answered with status {status}{where}: {response.text[:200]}")

    try:
        return read(json.loads(response.content))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _TryAgainError(f"an answer that cannot be read ({type(error).__name__}: {error})") from error


def _seconds(text: str | None) -> float | None:
    """Read a Retry-After; dates are left out."""
    try:
        return max(float(text), 0.0) if text is not None else None
    except ValueError:
        return None


def _pause(state: RetryCallState) -> float:
    """Seconds until the next try: what the server asks for, or more each time."""
    error = state.outcome.exception() if state.outcome is not None else None
    asked = error.pause if isinstance(error, _TryAgainError) else None
    growing = wait_exponential_jitter(PAUSE, LONGEST_PAUSE, jitter=PAUSE)(state)
    return min(growing if asked is None else asked, LONGEST_PAUSE)


# One loop and one client for a process, in a thread of their own: connections are kept, and any thread may ask.


def _run(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run_coroutine_threadsafe(work, _loop(os.getpid())).result()


@functools.lru_cache(maxsize=1)
def _loop(process: int) -> asyncio.AbstractEventLoop:  # a forked process has none of its parent's threads
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="endpoints", daemon=True).start()
    return loop


@functools.lru_cache(maxsize=1)
def _client(process: int) -> httpx.AsyncClient:
    return httpx.AsyncClient(follow_redirects=False, limits=httpx.Limits(max_connections=CONNECTIONS))


__all__ = ["EndpointError", "Usage", "post"]
