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
        body (`Callable`): `(prompts, served_model, top_k)` → what is sent.
        read (`Callable`): what has come → each prompt's tokens, in their order. Raises what Python raises where the
            answer has another form.
        tokenize (`Callable`): `(endpoint, served_model, text)` → address and body that ask for a text's tokens.
        read_tokens (`Callable`): what has come → these tokens.
    """

    path: str
    body: Callable[[list[list[int]], str, int], dict[str, Any]]
    read: Callable[[Any], list[TopTokens]]
    tokenize: Callable[[str, str, str], tuple[str, dict[str, Any]]]
    read_tokens: Callable[[Any], list[int]]


def top_tokens(found: TopTokens, top_k: int, vocab_size: int) -> TopTokens:
    """
    Check what a server says of one next token, and return its `top_k` most probable.

    Raises:
        ValueError: if these are not log-probabilities of tokens, or fewer tokens than asked for although others have
            a part of the probability.
    """
    for token, log_prob in found.items():
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ValueError(f"it told of token {token!r}, and there are {vocab_size}")
        if not isinstance(log_prob, (int, float)) or math.isnan(log_prob) or log_prob > 1e-3:
            raise ValueError(f"it told {log_prob!r} as a log-probability")

    kept = dict(sorted(found.items(), key=lambda entry: -entry[1])[:top_k])  # vLLM adds the token that it sampled
    told = sum(map(math.exp, kept.values()))
    if told > 1.01:
        raise ValueError(f"the probabilities that it told sum to {told:.3f}")
    if len(kept) < min(top_k, vocab_size) and told < 1 - 1e-4:
        raise ValueError(f"it told {len(kept)} tokens of {top_k}, with {told:.3f} of the probability")
    return kept


def _vllm_body(prompts: list[list[int]], served_model: str, top_k: int) -> dict[str, Any]:
    return {
        "model": served_model,
        "prompt": prompts,
        "max_tokens": 1,
        "temperature": 1.0,  # by which a server that tells processed log-probabilities leaves them alone
        "logprobs": top_k,
        "return_tokens_as_token_ids": True,
    }


def _read_vllm(answer: Any) -> list[TopTokens]:
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    return [
        {
            int(name.removeprefix("token_id:")): log_prob
            for name, log_prob in choice["logprobs"]["top_logprobs"][0].items()
        }
        for choice in choices
    ]


def _vllm_tokenize(endpoint: str, served_model: str, text: str) -> tuple[str, dict[str, Any]]:
    body = {"model": served_model, "prompt": text, "add_special_tokens": False}
    return f"{endpoint.removesuffix('/v1')}/tokenize", body


APIS = {"vllm": Api("/completions", _vllm_body, _read_vllm, _vllm_tokenize, lambda answer: answer["tokens"])}
REFUSED_APIS = {
    "chat": "a chat's template is applied at the server, which cannot go on with an answer that has begun.",
    "openai": "it tells tokens as texts, of which different tokens may have the same.",
}

__all__ = ["APIS", "REFUSED_APIS", "Api", "TopTokens", "top_tokens"]
