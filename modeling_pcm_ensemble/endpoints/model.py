"""A causal LM that asks an endpoint: a backbone like any, whose cache holds the tokens that were read."""

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import Cache, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from .apis import APIS, TopTokens, top_tokens
from .configuration import EndpointConfig
from .requests import EndpointError, Usage, post

Key = str | Callable[[], str] | None  # an environment variable's name, or what gives the key
REST = 30.0  # seconds in which an endpoint that has failed is not asked, where rows go on without it
PROBES = (
    "Hello, world!",
    "  two  spaces\n\n\ttab and 1234567890",
    "naïve façade – “quotes” … 日本語 русский עברית 🙂",
    "def f(x): return x**2  # {'a': [1, 2.5e-3]}",
)


class EndpointForCausalLM(PreTrainedModel, GenerationMixin):
    r"""
    An expert that somebody else serves. It has no weights: `forward` sends the tokens of each row, and returns the
    log-probabilities of the most probable next ones.

    Args:
        config (`EndpointConfig`): where it is served.
        key (`str` or `Callable`, *optional*): the name of the environment variable that holds the server's key, or a
            function that returns the key. It stands in no checkpoint, log or error.
        allowed (`bool`): whether it may connect. What a checkpoint names may not until a user allows it.
    """

    config: EndpointConfig
    config_class = EndpointConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: EndpointConfig, key: Key = None, allowed: bool = False):
        super().__init__(config)
        self.place: torch.Tensor  # which says where, and in which dtype
        self.register_buffer("place", torch.empty(0), persistent=False)
        self.key = key
        self.allowed = allowed
        self.usage = Usage()
        self.rests_until = 0.0
        self.post_init()

    @classmethod
    def of_expert(cls, name: str, fields: dict[str, Any]) -> "EndpointForCausalLM":
        """
        Make the model of an expert that a user describes, and may therefore be asked.

        Raises:
            TypeError, ValueError: naming the expert, if a field has a wrong value.
        """
        fields = dict(fields)
        key = fields.pop("key", None)
        if not (key is None or isinstance(key, str) or callable(key)):
            raise TypeError(f"`key` of expert {name!r} must name an environment variable, or return the key.")
        if not isinstance(fields.get("served_model"), str) or not fields["served_model"]:
            raise ValueError(f"Expert {name!r} needs `served_model`, the model's name at the endpoint.")
        try:
            return cls(EndpointConfig(**fields), key, allowed=True)
        except StrictDataclassError as error:
            raise ValueError(f"Expert {name!r}: {error}") from error

    def fit(self, pcm_body: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, label: str):
        """
        Take on the vocabulary, the device and the dtype of an ensemble's PCM, and check by some texts that the server
        reads them as its tokenizer does.

        Raises:
            ValueError: if it does not.
            EndpointError: if it does not tell.
        """
        self.config.vocab_size = pcm_body.config.get_text_config().vocab_size
        self.place = self.place.to(pcm_body.device, pcm_body.dtype)
        if tokenizer is None:
            raise ValueError(
                f"The model of {label} is behind an endpoint, and there is no tokenizer to compare with the server's. "
                "Pass `tokenizer=`."
            )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self.config, name, getattr(tokenizer, name))
            setattr(self.generation_config, name, getattr(tokenizer, name))

        for text in PROBES:
            here, there = tokenizer(text, add_special_tokens=False)["input_ids"], self.tokens_of(text)
            if here != there:
                raise ValueError(
                    f"All parts must share one vocabulary: {text!r} is {there} at {self.config.endpoint}, the model "
                    f"of {label}, but {here} for the ensemble's tokenizer. Use models with the same tokenizer."
                )

    @property
    def device(self) -> torch.device:
        return self.place.device

    @property
    def dtype(self) -> torch.dtype:
        return self.place.dtype

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs):
        """Know of more tokens, or of fewer; the server does not."""
        self.config.vocab_size = new_num_tokens or self.config.vocab_size

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        r"""
        Ask for what follows the kept tokens. Equal contexts are asked for once.

        Args:
            input_ids (`torch.LongTensor` of shape `(rows, tokens)`): tokens that are not in the cache.
            attention_mask (`torch.Tensor` of shape `(rows, cached + tokens)`, *optional*): 1 for tokens to send.
            past_key_values (`Cache`, *optional*): holds the tokens as its only layer's keys.
            logits_to_keep (`int` or `torch.LongTensor`): as for any model; or places `(rows, positions)` in each row.
                A request is made of each, where a model that runs here would read the text once.
            position_ids, use_cache, kwargs: not read: the server counts, and remembers, itself.

        Returns:
            `logits` of shape `(rows, positions, vocab)`: log-probabilities, in float32, -inf for tokens that were not
            told. With `on_failure="drop"`, NaN in all rows where the server has failed.

        Raises:
            PermissionError: if nobody has allowed the endpoint.
            EndpointError: if it fails, with `on_failure="error"`.
        """
        tokens = input_ids
        if past_key_values is not None:
            past = past_key_values.get_seq_length()
            keys, _ = past_key_values.update(input_ids[:, None, :, None], input_ids[:, None, :, None], 0)
            tokens = keys[:, 0, : past + input_ids.shape[1], 0]  # (rows, cached + tokens)

        contexts = _contexts(tokens, attention_mask, input_ids.shape[1], logits_to_keep)
        told = self._told(list(dict.fromkeys(context for row in contexts for context in row if context)))

        shape = (len(contexts), len(contexts[0]), self.config.vocab_size)
        logits = torch.full(shape, float("-inf") if told is not None else float("nan"), device=input_ids.device)
        for row, of_row in enumerate(contexts):
            for position, context in enumerate(of_row):
                if not context:
                    logits[row, position] = 0.0  # padding predicts nothing
                elif told is not None:
                    ids = torch.tensor(list(told[context]), device=logits.device)
                    logits[row, position, ids] = torch.tensor(list(told[context].values()), device=logits.device)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    def _told(self, contexts: list[tuple[int, ...]]) -> dict[tuple[int, ...], TopTokens] | None:
        """Ask for what follows each context; None where the server has failed, and rows go on without it."""
        config, api = self.config, APIS[self.config.api]
        if not self.allowed:
            raise PermissionError(
                f"The checkpoint names the endpoint {config.endpoint!r}, to which your texts would be sent. Allow it: "
                "`from_pretrained(…, allow_endpoints=[…])`."
            )

        def read(answer) -> list[TopTokens]:
            found = [top_tokens(entry, config.top_logprobs, config.vocab_size) for entry in api.read(answer)]
            if len(found) != len(contexts):
                raise ValueError(f"{len(found)} answers to {len(contexts)} prompts")
            return found

        if not contexts:
            return {}
        if time.monotonic() < self.rests_until:
            return None
        self.usage.prompts += len(contexts)
        self.usage.prompt_tokens += sum(map(len, contexts))
        body = api.body([list(context) for context in contexts], config.served_model, config.top_logprobs)
        try:
            answers = self._post(config.address + api.path, body, read)
        except EndpointError:
            if config.on_failure == "error":
                raise
            self.rests_until = time.monotonic() + REST
            return None
        return dict(zip(contexts, answers))

    def tokens_of(self, text: str) -> list[int]:
        """
        Ask the server for a text's tokens, without special ones.

        Raises:
            EndpointError: if it does not tell.
        """
        api = APIS[self.config.api]
        url, body = api.tokenize(self.config.address, self.config.served_model, text)
        return self._post(url, body, api.read_tokens)

    def _post(self, url: str, body: dict, read: Callable):
        config, key = self.config, self.key
        if isinstance(key, str):
            if key not in os.environ:
                raise ValueError(f"The environment variable {key!r}, which holds the endpoint's key, is not set.")
            key = os.environ[key]
        elif key is not None:
            key = key()
        return post(url, body, read, key, config.timeout, config.attempts, self.usage)


def _contexts(
    tokens: torch.Tensor, attention_mask: torch.Tensor | None, num_new: int, logits_to_keep: int | torch.Tensor
) -> list[list[tuple[int, ...]]]:
    """What each row has read at each kept place; nothing where that is padding."""
    kept = torch.arange(num_new, device=tokens.device)
    kept = kept[-logits_to_keep:] if isinstance(logits_to_keep, int) else logits_to_keep
    kept = kept.expand(len(tokens), -1) + tokens.shape[1] - num_new  # (rows, positions), among all tokens
    mask = torch.ones_like(tokens) if attention_mask is None else attention_mask[:, : tokens.shape[1]]

    contexts = []
    for ids, is_read, places in zip(tokens.tolist(), mask.bool().tolist(), kept.tolist()):
        contexts.append(
            [
                tuple(token for token, read in zip(ids[: place + 1], is_read) if read) if is_read[place] else ()
                for place in places
            ]
        )
    return contexts


__all__ = ["EndpointForCausalLM", "Key"]
