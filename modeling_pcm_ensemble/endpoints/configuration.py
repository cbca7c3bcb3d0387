"""Where an expert is served, and how it is asked."""

from urllib.parse import urlsplit

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..checkpoint_trust import server_address
from ..configuration_pcm_ensemble import ENDPOINT
from .apis import APIS, REFUSED_APIS

ON_FAILURE = ("error", "drop")
MOST_ATTEMPTS, MOST_SECONDS = 10, 600


@strict
class EndpointConfig(PreTrainedConfig):
    r"""
    Configuration of an [`EndpointForCausalLM`]: what a checkpoint says of an expert that somebody else serves. It
    holds no key.

    Args:
        endpoint (`str`): the server's address, `"http://gpu-7:8000/v1"`, with or without `/v1`.
        served_model (`str`): the model's name there. llama.cpp needs none where it serves one model, nor does SGLang,
            where it is an adapter's name.
        api (`str`, defaults to `"vllm"`): how the server is asked, one of `APIS`.
        top_logprobs (`int`, defaults to 20): most probable tokens that it is asked for. vLLM's limit is its
            `--max-logprobs`, 20 where that is not given.
        vocab_size (`int`): tokens of the vocabulary.
        timeout (`float`, defaults to 30): seconds that a try may take.
        attempts (`int`, defaults to 4): tries of a request, with growing pauses between them.
        on_failure (`str`, defaults to `"error"`): what happens when they are used up: `"error"`, or `"drop"`, by which
            rows go on with their other experts. What no later try would mend is an error all the same.
        max_position_embeddings (`int`, *optional*): most tokens that the server reads.

    Raises:
        ValueError: if a field has a wrong value.

    Example:

    ```python
    >>> from modeling_pcm_ensemble.endpoints import EndpointConfig

    >>> EndpointConfig(endpoint="http://gpu-7:8000/v1/", served_model="friendly").address
    'http://gpu-7:8000'

    ```
    """

    model_type = ENDPOINT

    endpoint: str = "http://127.0.0.1:8000/v1"
    served_model: str = ""
    api: str = "vllm"
    top_logprobs: int = 20
    vocab_size: int = 1
    timeout: float | int = 30.0
    attempts: int = 4
    on_failure: str = "error"
    max_position_embeddings: int | None = None
    num_hidden_layers: int = 1  # of a cache, which holds the tokens that were read
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def validate_endpoint(self):
        """
        Check the address and the API.

        Raises:
            ValueError: if the address is no URL of HTTP, or holds a key; if the API cannot tell tokens by number.
        """
        if (
            "@" in self.endpoint or "?" in self.endpoint or "#" in self.endpoint
        ):  # which may hold a key: it is not shown
            raise ValueError("`endpoint` must be an address without a user, a key or a query. Give the key as `key`.")

        parts = urlsplit(self.endpoint)
        try:
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # of a port that is no number, or too large
            is_address = False
        if not is_address:
            raise ValueError(f"`endpoint` must be an address such as 'http://gpu-7:8000/v1', got {self.endpoint!r}.")

        if self.api in REFUSED_APIS:
            raise ValueError(f"`api` {self.api!r} cannot serve an expert: {REFUSED_APIS[self.api]}")
        if self.api not in APIS:
            raise ValueError(f"`api` must be one of {', '.join(map(repr, APIS))}, got {self.api!r}.")

    def validate_numbers(self):
        """
        Check what is counted.

        Raises:
            ValueError: if a number is out of range.
        """
        for name in ("top_logprobs", "vocab_size", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)!r}.")
        if self.attempts > MOST_ATTEMPTS or not 0 < self.timeout <= MOST_SECONDS:
            raise ValueError(
                f"`timeout` must be above 0 and at most {MOST_SECONDS} seconds, and `attempts` at most "
                f"{MOST_ATTEMPTS}; got {self.timeout!r} and {self.attempts!r}."
            )
        if self.on_failure not in ON_FAILURE:
            raise ValueError(f"`on_failure` must be 'error' or 'drop', got {self.on_failure!r}.")

    @property
    def address(self) -> str:
        """The server's, by which it is allowed, and behind which paths such as `/v1/models` stand."""
        return server_address(self.endpoint)


__all__ = ["EndpointConfig"]
