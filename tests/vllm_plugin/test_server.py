"""The real server, over HTTP: many clients at once, bad requests among them, streams, and clients that go away."""

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from conftest import REFERENCES, Reference, references
from openai import AsyncOpenAI, OpenAI

CLIENTS = 50
LEAVING = 8
BAD = [
    {"preference": "nobody"},
    {"preference": '{"kind": -1}'},
    {"preference": "{"},
    {"preference_text": 5},
    {"preference_ids": [4000]},
]


@contextmanager
def served(log: Path, *options: str) -> Iterator[str]:
    """Run a server of a local folder, started as anybody would start it, and give its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(REFERENCES / "probabilities"),
    ]
    command += ["--served-model-name", "ensemble", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", *options]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        deadline = time.monotonic() + 180
        while not is_healthy(f"http://127.0.0.1:{port}"):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with served(tmp_path_factory.mktemp("server") / "log") as url:
        yield url


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def as_xargs(extra_args: dict) -> dict:
    """What HTTP carries: texts, numbers and flat lists; a mapping as JSON."""
    return {name: json.dumps(value) if isinstance(value, dict) else value for name, value in extra_args.items()}


def metric_lines(url: str) -> list[str]:
    return [line for line in httpx.get(f"{url}/metrics").text.splitlines() if not line.startswith("#")]


def metrics(url: str) -> dict[str, float]:
    """Each metric's value, summed over its labels."""
    values: dict[str, float] = {}
    for line in metric_lines(url):
        name, value = line.rsplit(" ", 1)
        name = name.partition("{")[0]
        values[name] = values.get(name, 0) + float(value)
    return values


async def complete(client: AsyncOpenAI, reference: Reference, **options):
    return await client.completions.create(
        model="ensemble",
        prompt=reference.prompt,
        max_tokens=len(reference.tokens),
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True, "vllm_xargs": as_xargs(reference.extra_args)},
        **options,
    )


def check_many_at_once(url: str):
    """Fifty clients at once get their own answers, and bad ones a 400."""
    generator, asked = random.Random(3), references("probabilities")
    good = [generator.choice(asked) for _ in range(CLIENTS - 10)]
    requests: list[tuple[Reference, bool]] = [(reference, True) for reference in good]
    for number in range(10):
        requests.append((Reference(BAD[number % len(BAD)], asked[0].prompt, asked[0].tokens, [], [], []), False))
    generator.shuffle(requests)

    async def run():
        client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        jobs = [complete(client, reference) for reference, _ in requests]
        return await asyncio.gather(*jobs, return_exceptions=True)

    for (reference, is_good), answer in zip(requests, asyncio.run(run()), strict=True):
        if is_good:
            assert answer.choices[0].token_ids == reference.tokens, reference.extra_args
        else:
            assert answer.status_code == 400, (reference.extra_args, answer)
            assert "preference" in str(answer)
    assert is_healthy(url)


def test_fifty_clients_at_once_get_their_own_answers_and_bad_ones_a_400(url):
    check_many_at_once(url)


def test_two_replicas_behind_one_address_answer_as_one_does(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    with served(tmp_path / "log", "--data-parallel-size", "2") as url:
        check_many_at_once(url)
        by_engine = [line for line in metric_lines(url) if line.startswith("vllm:generation_tokens_total{")]
    assert len(by_engine) == 2
    assert all(float(line.rsplit(" ", 1)[1]) > 0 for line in by_engine)


def test_a_chat_is_streamed_under_a_preference(url):
    client = OpenAI(base_url=f"{url}/v1", api_key="none")

    def chat(preference: str, stream: bool):
        return client.chat.completions.create(
            model="ensemble",
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=8,
            temperature=0,
            stream=stream,
            extra_body={"vllm_xargs": {"preference": preference}},
        )

    texts = {preference: chat(preference, False).choices[0].message.content for preference in ("kind", "rude")}
    assert texts["kind"] != texts["rude"]
    for preference, text in texts.items():
        chunks = [chunk.choices[0].delta.content or "" for chunk in chat(preference, True)]
        assert "".join(chunks) == text


def test_clients_that_go_away_leave_nothing_behind(url):
    reference = references("probabilities")[0]
    body = {"model": "ensemble", "prompt": reference.prompt, "max_tokens": 400, "ignore_eos": True, "stream": True}

    async def leave():
        address = f"{url}/v1/completions"
        async with httpx.AsyncClient(timeout=60) as client, client.stream("POST", address, json=body) as response:
            async for _ in response.aiter_lines():
                return

    async def leave_all():
        await asyncio.gather(*(leave() for _ in range(LEAVING)))

    before = metrics(url)["vllm:generation_tokens_total"]
    asyncio.run(leave_all())
    deadline = time.monotonic() + 30
    while metrics(url)["vllm:num_requests_running"] or metrics(url)["vllm:kv_cache_usage_perc"]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert metrics(url)["vllm:generation_tokens_total"] - before < LEAVING * body["max_tokens"] / 2

    async def again():
        client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
        return (await complete(client, reference)).choices[0].token_ids

    assert asyncio.run(again()) == reference.tokens
