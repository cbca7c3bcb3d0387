"""What servers are asked, and how their answers are read: tokens go out and come back by number, never as text."""

import math
from abc import ABC, abstractmethod
from typing import Any

TopTokens = dict[int, float]  # the most probable next tokens, with their log-probabilities
MOST_BEYOND = 1e-3  # of the probability, for tokens that only padding has
Asked = tuple[str, dict[str, Any]]  # a path behind the server's address, and JSON that is posted there


def top_tokens(found: TopTokens, top_logprobs: int, vocab_size: int) -> TopTokens:
    """
    Check what a server says of one next token, and return its `top_logprobs` most probable. Tokens beyond the
    vocabulary, which a padded model has and next to never means, are left out.

    Raises:
        ValueError: if these are not log-probabilities of tokens, or fewer tokens than asked for although others have
            a part of the probability, or if tokens beyond the vocabulary have one.
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

    known = {token: log_prob for token, log_prob in found.items() if token < vocab_size}
    beyond = told - sum(map(math.exp, known.values()))
    if not known or beyond > MOST_BEYOND:
        raise ValueError(f"it gives {beyond:.3f} of the probability to tokens beyond the {vocab_size} that there are")
    # vLLM adds the token that it sampled.
    return dict(sorted(known.items(), key=lambda entry: -entry[1])[:top_logprobs])


class Api(ABC):
    """
    How a kind of server is asked. A read may raise anything where an answer has another form.

    Args:
        needs_name (`bool`): whether a request must say by `served_model` which model is meant.
    """

    needs_name = False
    models = "/v1/models"

    @abstractmethod
    def next_tokens(self, prompts: list[list[int]], served_model: str, top_logprobs: int) -> Asked:
        """Ask for the most probable tokens after each prompt."""

    @abstractmethod
    def read_next_tokens(self, answer: Any) -> list[TopTokens]:
        """Read each prompt's, in their order."""

    def tokens(self, text: str, served_model: str) -> Asked:
        """Ask for a text's tokens."""
        return "/tokenize", {"model": served_model, "prompt": text, "add_special_tokens": False}

    def read_tokens(self, answer: Any) -> list[int]:
        """Read them."""
        return answer["tokens"]

    def read_limit(self, answer: Any, served_model: str) -> int | None:
        """Read in the list of models how many tokens one reads and writes at most, if that is said."""
        limits = {entry["id"]: self._limit(entry) for entry in answer["data"]}
        if limits.get(served_model) is not None:
            return limits[served_model]
        return min((limit for limit in limits.values() if limit is not None), default=None)  # adapters tell none

    def _limit(self, entry: dict[str, Any]) -> int | None:
        return entry.get("max_model_len")


class Vllm(Api):
    """
    vLLM's `/v1/completions`.

    Source: https://docs.vllm.ai/en/stable/serving/openai_compatible_server.html
    """

    needs_name = True
    TOKEN = "token_id:"

    def next_tokens(self, prompts: list[list[int]], served_model: str, top_logprobs: int) -> Asked:
        # With these a server that tells processed log-probabilities leaves them alone, whatever its defaults are.
        neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        return "/v1/completions", neutral | {
            "model": served_model,
            "prompt": prompts,
            "max_tokens": 1,
            "logprobs": top_logprobs,
            "return_tokens_as_token_ids": True,
        }

    def read_next_tokens(self, answer: Any) -> list[TopTokens]:
        return [self._by_number(choice["logprobs"]["top_logprobs"][0]) for choice in _in_order(answer["choices"])]

    def _by_number(self, told: dict[str, float]) -> TopTokens:
        if not all(name.startswith(self.TOKEN) for name in told):
            raise ValueError("it told tokens as texts, and does not know `return_tokens_as_token_ids`")
        return {int(name.removeprefix(self.TOKEN)): log_prob for name, log_prob in told.items()}


class Sglang(Api):
    """
    SGLang's `/generate`. `served_model` names an adapter that it has loaded, or nothing, for the model itself.

    Source: https://docs.sglang.io/basic_usage/sampling_params.html
    """

    def next_tokens(self, prompts: list[list[int]], served_model: str, top_logprobs: int) -> Asked:
        body: dict[str, Any] = {
            "input_ids": prompts,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},  # whose log-probabilities are the model's
            "return_logprob": True,
            "top_logprobs_num": top_logprobs,
        }
        return "/generate", body | ({"lora_path": served_model} if served_model else {})

    def read_next_tokens(self, answer: Any) -> list[TopTokens]:
        told = [entry["meta_info"]["output_top_logprobs"][0] for entry in answer]
        return [{token: log_prob for log_prob, token, *_ in entry} for entry in told]


class LlamaCpp(Api):
    """
    llama.cpp's `/completion`.

    Source: https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md
    """

    def next_tokens(self, prompts: list[list[int]], served_model: str, top_logprobs: int) -> Asked:
        body: dict[str, Any] = {
            "prompt": prompts,
            "n_predict": 1,
            "n_probs": top_logprobs,
            "cache_prompt": True,
            # It tells nothing after a token that ends within a character, so that it must sample another one.
            "temperature": 0.0,
            "logit_bias": [["a", 1e4]],
            "response_fields": ["index", "completion_probabilities"],
        }
        return "/completion", body | ({"model": served_model} if served_model else {})

    def read_next_tokens(self, answer: Any) -> list[TopTokens]:
        answers = answer if isinstance(answer, list) else [answer]  # a list of one prompt is answered without one
        told = [entry["completion_probabilities"][0]["top_logprobs"] for entry in _in_order(answers)]
        return [{token["id"]: token["logprob"] for token in entry} for entry in told]

    def tokens(self, text: str, served_model: str) -> Asked:
        body = {"content": text, "add_special": False, "parse_special": True}
        return "/tokenize", body | ({"model": served_model} if served_model else {})

    def _limit(self, entry: dict[str, Any]) -> int | None:
        return (entry.get("meta") or {}).get("n_ctx")  # of each slot


def _in_order(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    entries = sorted(entries, key=lambda entry: entry["index"])
    if [entry["index"] for entry in entries] != list(range(len(entries))):
        raise ValueError("its answers have other numbers than 0, 1, …")
    return entries


APIS: dict[str, Api] = {"vllm": Vllm(), "sglang": Sglang(), "llamacpp": LlamaCpp()}
REFUSED_APIS = {
    "chat": "a chat's template is applied at the server, which cannot go on with an answer that has begun.",
    "openai": "it tells tokens as texts, of which different tokens may have the same.",
}

__all__ = ["APIS", "REFUSED_APIS", "Api", "TopTokens", "top_tokens"]
