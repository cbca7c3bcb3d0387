"""What servers are asked, and how their answers are read: tokens go out and come back by number, never as text."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

TopTokens = dict[int, float]  # the most probable next tokens, with their log-probabilities


class Api(NamedTuple):
    r"""
    How a kind of server is asked.

    Args:
        path (`str`): behind the endpoint's address.
        body (`Callable`): `(prompts, served_model, top_logprobs)` → what is sent.
        read (`Callable`): what has come → each prompt's tokens, in their order. It may raise anything where the answer
            has another form.
        tokenize (`Callable`): `(address, served_model, text)` → URL and body that ask for a text's tokens.
        read_tokens (`Callable`): what has come → these tokens.
        limit (`Callable`): `(address)` → URL that tells of models.
        read_limit (`Callable`): `(what has come, served_model)` → tokens of prompt and answer together, or None.
    """

    path: str
    body: Callable[[list[list[int]], str, int], dict[str, Any]]
    read: Callable[[Any], list[TopTokens]]
    tokenize: Callable[[str, str, str], tuple[str, dict[str, Any]]]
    read_tokens: Callable[[Any], list[int]]
    limit: Callable[[str], str]
    read_limit: Callable[[Any, str], int | None]


def top_tokens(found: TopTokens, top_logprobs: int, vocab_size: int) -> TopTokens:
    """
    Check what a server says of one next token, and return its `top_logprobs` most probable. Tokens beyond the
    vocabulary, which a padded model has, are left out.

    Raises:
        ValueError: if these are not log-probabilities of tokens, or fewer tokens than asked for although others have
            a part of the probability.
    """
    for token, log_prob in found.items():
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise ValueError(f"it told of token {token!r}")
        if not isinstance(log_prob, (int, float)) or not log_prob <= 1e-3:
            raise ValueError(f"it told {log_prob!r} as a log-probability")

    told = sum(map(math.exp, found.values()))
    if told > 1.01:
        raise ValueError(f"the probabilities that it told sum to {told:.3f}")
    if len(found) < min(top_logprobs, vocab_size) and told < 1 - 1e-4:
        raise ValueError(f"it told {len(found)} tokens of {top_logprobs}, with {told:.3f} of the probability")

    known = [(token, log_prob) for token, log_prob in found.items() if token < vocab_size]
    if not known:
        raise ValueError(f"it told of tokens {sorted(found)[:3]}, and there are {vocab_size}")
    return dict(sorted(known, key=lambda entry: -entry[1])[:top_logprobs])  # vLLM adds the token that it sampled


# vLLM

TOKEN = "token_id:"


def _vllm_body(prompts: list[list[int]], served_model: str, top_logprobs: int) -> dict[str, Any]:
    # A server that tells processed log-probabilities leaves them alone at these, whatever its model's defaults are.
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    return neutral | {
        "model": served_model,
        "prompt": prompts,
        "max_tokens": 1,
        "logprobs": top_logprobs,
        "return_tokens_as_token_ids": True,
    }


def _read_vllm(answer: Any) -> list[TopTokens]:
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    if [choice["index"] for choice in choices] != list(range(len(choices))):
        raise ValueError("its choices have other numbers than 0, 1, …")
    return [_by_number(choice["logprobs"]["top_logprobs"][0]) for choice in choices]


def _by_number(told: dict[str, float]) -> TopTokens:
    if not all(name.startswith(TOKEN) for name in told):
        raise ValueError("it told tokens as texts, and does not know `return_tokens_as_token_ids`")
    return {int(name.removeprefix(TOKEN)): log_prob for name, log_prob in told.items()}


def _vllm_tokenize(address: str, served_model: str, text: str) -> tuple[str, dict[str, Any]]:
    body = {"model": served_model, "prompt": text, "add_special_tokens": False}
    return f"{address.removesuffix('/v1')}/tokenize", body


def _vllm_limit(answer: Any, served_model: str) -> int | None:
    limits = {entry["id"]: entry.get("max_model_len") for entry in answer["data"]}
    if limits.get(served_model) is not None:
        return limits[served_model]
    return min((limit for limit in limits.values() if limit is not None), default=None)  # adapters tell none


APIS = {
    "vllm": Api(
        path="/completions",
        body=_vllm_body,
        read=_read_vllm,
        tokenize=_vllm_tokenize,
        read_tokens=lambda answer: answer["tokens"],
        limit=lambda address: f"{address}/models",
        read_limit=_vllm_limit,
    )
}
REFUSED_APIS = {
    "chat": "a chat's template is applied at the server, which cannot go on with an answer that has begun.",
    "openai": "it tells tokens as texts, of which different tokens may have the same.",
}

__all__ = ["APIS", "REFUSED_APIS", "Api", "TopTokens", "top_tokens"]
