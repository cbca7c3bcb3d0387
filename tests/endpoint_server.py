"""A server of vLLM's protocol on this machine, which tells what tiny models predict, and fails when it is told to."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_pcm_ensemble import PCMEnsembleForCausalLM

SLOW = 1.0  # seconds of a delay
RETRY_AFTER = 0.3
FAULTS = {  # by name: what the server answers in place of what it should; True is for its own
    "dropped": None,
    "slow": True,
    "500": (500, b"out of memory"),
    "429": (429, b"slow down"),  # for RETRY_AFTER seconds
    "garbage": (200, b"<html>"),
    "cut": (200, b'{"choices": [{"index": 0, "logp'),
    "empty": (200, b"{}"),
    "fewer answers": True,
    "fewer tokens": True,
    "wrong ids": True,
    "not a number": True,
    "too probable": True,
}
REFUSALS = {  # what no second try would mend
    "400": (400, b"no such model"),
    "401": True,  # it repeats what it was sent
    "redirect": True,
    "refused at once": (403, b"not you"),  # whatever others wait for
}


class EndpointServer:
    r"""
    Serves until the `with` block ends.

    Args:
        models (`Mapping[str, PreTrainedModel]`): by the name that requests ask for.
        tokenizer (`PreTrainedTokenizerBase`): the models'.
        key (`str`, *optional*): that requests must bring.
    """

    def __init__(
        self, models: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, key: str | None = None
    ):
        self.models, self.tokenizer, self.key = models, tokenizer, key
        self.fault: Callable[[int], str | None] = lambda number: None  # of each completion, from 0 on
        self.delay = 0.0
        self.asked: list[dict] = []  # completions
        self.requests: list[str] = []  # the paths of all requests
        self.cookies: list[str] = []
        self.connections = self.at_once = self.most_at_once = 0
        self.retry_after = RETRY_AFTER
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                with server._lock:
                    server.connections += 1

            def log_message(self, *args):
                pass

            def do_POST(self):
                server.requests.append(self.path)
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if server.key is not None and self.headers["Authorization"] != f"Bearer {server.key}":
                    self.answer(401, b"a key is missing")
                elif self.path == "/v1/completions":
                    self.complete(body)
                else:
                    self.answer(200, json.dumps(server.told(self.path, body)).encode())

            def do_GET(self):
                server.requests.append(self.path)
                self.answer(200, json.dumps(server.told(self.path, {})).encode())

            def complete(self, body: dict):
                with server._lock:
                    fault = server.fault(len(server.asked))
                    server.asked.append(body)
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                if fault != "refused at once":
                    time.sleep(SLOW if fault == "slow" else server.delay)
                with server._lock:
                    server.at_once -= 1
                if fault == "dropped":
                    self.close_connection = True
                elif fault == "401":
                    self.answer(401, b"." * 190 + str(self.headers["Authorization"]).encode())
                elif fault == "redirect":
                    self.answer(302, b"", f"http://127.0.0.1:9/?key={self.headers['Authorization']}")
                elif isinstance(found := (FAULTS | REFUSALS).get(fault), tuple):
                    self.answer(*found)
                else:
                    self.answer(200, json.dumps(server.completions(body, fault)).encode())

            def answer(self, status: int, content: bytes, location: str | None = None):
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Set-Cookie", "session=1")
                if self.headers["Cookie"] is not None:
                    server.cookies.append(self.headers["Cookie"])
                if status == 429:
                    self.send_header("Retry-After", str(server.retry_after))
                if location is not None:
                    self.send_header("Location", location)
                self.end_headers()
                self.wfile.write(content)

        return Handler

    def told(self, path: str, body: dict) -> dict:
        """Answer without a fault."""
        if path == "/v1/completions":
            return self.completions(body, None)
        if path == "/v1/models":
            return {"data": [{"id": name, "max_model_len": 128} for name in self.models]}
        return {"tokens": self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]}

    @torch.no_grad()
    def completions(self, body: dict, fault: str | None) -> dict:
        """Answer as vLLM does, with one token more where what it sampled is not among the most probable ones."""
        assert body["return_tokens_as_token_ids"]
        assert body["max_tokens"] == 1
        generator, choices = torch.Generator().manual_seed(0), []
        for index, prompt in enumerate(body["prompt"]):
            logits = self.models[body["model"]](torch.tensor([prompt])).logits[0, -1]
            log_probs = logits.log_softmax(dim=-1)
            sampled = int(torch.multinomial(log_probs.exp(), 1, generator=generator))
            top = log_probs.topk(min(body["logprobs"], len(log_probs))).indices.tolist()
            told = {f"token_id:{token}": log_probs[token].item() for token in [*top, sampled]}
            choices.insert(0, {"index": index, "text": "?", "logprobs": {"top_logprobs": [_spoilt(told, fault)]}})
        return {"choices": choices[1:] if fault == "fewer answers" else choices}


def save_one_here_one_there(server: EndpointServer, folder: Path):
    """Save an ensemble of the server's two models, of which `there` is asked with the key in PCM_TEST_KEY."""
    there = {"endpoint": server.endpoint, "served_model": "there", "key": "PCM_TEST_KEY"}
    model = PCMEnsembleForCausalLM.from_experts(
        {"here": server.models["here"], "there": there},
        pcm=server.models["here"],
        tokenizer=server.tokenizer,
        expert_top_k=20,
    )
    model.save_pretrained(folder)


def _spoilt(told: dict[str, float], fault: str | None) -> dict[str, float]:
    first = next(iter(told))
    if fault == "fewer tokens":
        return {first: min(told[first], -0.1)}
    if fault == "wrong ids":
        return {f"token_id:{int(name.removeprefix('token_id:')) + 1000}": value for name, value in told.items()}
    if fault == "not a number":
        return told | {first: float("nan")}
    if fault == "too probable":
        return {name: value + 1 for name, value in told.items()}
    return told
