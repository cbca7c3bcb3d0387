"""A causal LM that asks an endpoint: a backbone like any, whose cache holds the tokens that were read."""

import logging
import math
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import Cache, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..failures import results
from .apis import APIS, TopTokens, top_tokens
from .configuration import EndpointConfig
from .requests import Call, EndpointError, Key, Usage, send

PROMPTS_AT_ONCE = 64  # of a request
REST, LONGEST_REST = 30.0, 600.0  # seconds in which an endpoint that has failed is not asked, where rows go on
LEAST_MISSING = 1e-9  # of the probability, that tokens which are not told share
PROBES = (
    "Hello, world!",
    "  two  spaces\n\n\ttab and 1234567890",
    "naïve façade – “quotes” … 日本語 русский עברית 🙂",
    "def f(x): return x**2  # {'a': [1, 2.5e-3]}",
)

_resting = threading.Lock()

logger = logging.getLogger(__name__)
Context = tuple[int, ...]


class EndpointForCausalLM(PreTrainedModel, GenerationMixin):
    r"""
    An expert that somebody else serves. It has no weights: `forward` sends the tokens of each row, and returns the
    log-probabilities of the most probable next ones.

    Args:
        config (`EndpointConfig`): where it is served.
        key (`Key`, *optional*): the server's. It stands in no checkpoint, log or error.
        allowed (`bool`): whether it may connect. What a checkpoint names may not until a user allows it.
    """

    config: EndpointConfig
    config_class = EndpointConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: EndpointConfig, key: Key | None = None, allowed: bool = False):
        super().__init__(config)
        self.place: torch.Tensor  # which says where, and in which dtype
        self.register_buffer("place", torch.empty(0), persistent=False)
        self.key = Key(None) if key is None else key
        self.allowed = allowed
        self.usage = Usage()
        self._rest, self._rests_until = 0.0, 0.0
        self._running: dict[Future, int] = {}  # requests on their way, and the threads that wait for them
        self.post_init()

    @classmethod
    def of_expert(cls, name: str, fields: dict[str, Any]) -> "EndpointForCausalLM":
        """
        Make the model of an expert that a user describes, and that may therefore be asked.

        Raises:
            TypeError, ValueError: naming the expert, if a field has a wrong value.
        """
        fields = dict(fields)
        try:
            key = Key(fields.pop("key", None))
            config = EndpointConfig(**fields)
            if APIS[config.api].needs_name and not config.served_model:
                raise ValueError("It needs `served_model`, the model's name at the endpoint.")
            return cls(config, key, allowed=True)
        except TypeError as error:
            raise TypeError(f"Expert {name!r}: {error}") from error
        except (StrictDataclassError, ValueError) as error:
            raise ValueError(f"Expert {name!r}: {error}") from error

    def asks_like(self, other: "EndpointForCausalLM") -> bool:
        """Whether both ask the same model in the same way, so that one is enough."""
        fields = ("address", "served_model", "api", "top_logprobs", "timeout", "attempts", "on_failure")
        return self.key == other.key and all(
            getattr(self.config, field) == getattr(other.config, field) for field in fields
        )

    def fit(self, pcm_body: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, label: str):
        """
        Take on the vocabulary, the device and the dtype of an ensemble's PCM; check by some texts that the server
        reads them as its tokenizer does; and ask it for a token, as every step will.

        Raises:
            ValueError: if the server reads texts otherwise, or there is no tokenizer to compare with.
            EndpointError: if it does not answer.
        """
        if tokenizer is None:
            raise ValueError(
                f"The model of {label} is behind an endpoint, and there is no tokenizer to compare with the server's. "
                "Pass `tokenizer=`."
            )
        config, api = self.config, APIS[self.config.api]
        config.vocab_size = pcm_body.config.get_text_config().vocab_size
        self.place = self.place.to(pcm_body.device, pcm_body.dtype)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
            setattr(self.generation_config, name, getattr(tokenizer, name))

        limit = self._send(api.models, None, lambda found: api.read_limit(found, config.served_model))
        most = limit.result()
        config.max_position_embeddings = None if most is None else most - 1  # one is for the next token
        for text in _probes(tokenizer):
            self._check_tokens(text, tokenizer(text, add_special_tokens=False)["input_ids"], label)
        self._answers([tuple(tokenizer(PROBES[0], add_special_tokens=False)["input_ids"])])

    def _check_tokens(self, text: str, here: list[int], label: str):
        config = self.config
        api = APIS[config.api]
        there = self._send(*api.tokens(text, config.served_model), api.read_tokens).result()
        if here != there:
            raise ValueError(
                f"All parts must share one vocabulary: {text[:60]!r} is {there} at {config.endpoint}, the model "
                f"of {label}, but {here} for the ensemble's tokenizer. Use models with the same tokenizer, and the "
                f"server's own `api`; this one is asked as {config.api!r}."
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
            past_key_values (`Cache`, *optional*): a dynamic one, which holds the tokens as its only layer's keys.
            logits_to_keep (`int` or `torch.LongTensor`): as for any model; or places `(rows, positions)` in each row.
                Each is a prompt of its own, where a model that runs here would read the text once.
            position_ids, use_cache, kwargs: not read: the server counts, and remembers, itself.

        Returns:
            `logits` of shape `(rows, positions, vocab)`: log-probabilities, in float32. Tokens that were not told
            share what is missing of the probability evenly. With `on_failure="drop"`, NaN in all rows where the
            server has failed.

        Raises:
            PermissionError: if nobody has allowed the endpoint.
            EndpointError: if it refuses, or fails with `on_failure="error"`.
        """
        tokens = input_ids
        if past_key_values is not None:
            keys, _ = past_key_values.update(input_ids[:, None, :, None], input_ids[:, None, :, None], 0)
            tokens = keys[:, 0, :, 0]  # (rows, cached + tokens)

        contexts = _contexts(tokens, attention_mask, input_ids.shape[1], logits_to_keep)
        told = self._told(list(dict.fromkeys(context for row in contexts for context in row if context)))

        shape = (len(contexts), len(contexts[0]), self.config.vocab_size)
        logits = torch.full(shape, float("nan"), device=input_ids.device)
        for row, of_row in enumerate(contexts):
            for position, context in enumerate(of_row):
                if not context:
                    logits[row, position] = 0.0  # padding predicts nothing
                elif told is not None:
                    _put(logits[row, position], told[context])
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    def _told(self, contexts: list[Context]) -> dict[Context, TopTokens] | None:
        """Ask for what follows each context; None where the server has failed, and rows go on without it."""
        if time.monotonic() < self._rests_until:
            with _resting:
                self.usage.dropped += len(contexts)
            return None

        try:
            answers = self._answers(contexts)
        except EndpointError as error:
            if self.config.on_failure == "error" or not error.may_mend:
                raise
            with _resting:
                self.usage.dropped += len(contexts)
                self._begin_rest(error)
            return None

        self._rest = 0.0
        return dict(zip(contexts, answers))

    def _begin_rest(self, error: EndpointError):
        now = time.monotonic()
        if now < self._rests_until:  # another call has met the same failure
            return
        self._rest = max(min(max(2 * self._rest, REST), LONGEST_REST), error.pause)
        self._rests_until = now + self._rest
        logger.warning("Rows go on without the expert for %g s: %s", self._rest, error)

    def _answers(self, contexts: list[Context]) -> list[TopTokens]:
        """Ask for what follows each context, in several requests at once where there are many."""
        config, api = self.config, APIS[self.config.api]

        def read(number: int) -> Callable[[Any], list[TopTokens]]:
            def read_answer(answer) -> list[TopTokens]:
                told = api.read_next_tokens(answer)
                if len(told) != number:
                    raise ValueError(f"{len(told)} answers to {number} prompts")
                return [top_tokens(entry, config.top_logprobs, config.vocab_size) for entry in told]

            return read_answer

        asked = []
        for start in range(0, len(contexts), PROMPTS_AT_ONCE):
            part = [list(context) for context in contexts[start : start + PROMPTS_AT_ONCE]]
            path, body = api.next_tokens(part, config.served_model, config.top_logprobs)
            asked.append(self._send(path, body, read(len(part)), len(part), sum(map(len, part))))
        try:
            return [answer for answers in results(asked) for answer in answers]
        except BaseException:
            for request in asked:
                request.cancel()
            raise

    def cancel(self, callers: Collection[int]):
        """Give up what these threads, by their identity, have asked: others' requests go on."""
        for request, caller in list(self._running.items()):
            if caller in callers:
                request.cancel()

    def _send(
        self,
        path: str,
        body: dict[str, Any] | None,
        read: Callable[[Any], Any],
        prompts: int = 0,
        prompt_tokens: int = 0,
    ) -> Future:
        config = self.config
        if not self.allowed:
            raise PermissionError(
                f"The checkpoint names the endpoint {config.endpoint!r}, to which your texts would be sent. Allow it: "
                "`from_pretrained(…, allow_endpoints=[…])`."
            )
        attempts = 1 if self._rest else config.attempts  # after a rest, one try decides
        url, timeout = config.address + path, config.timeout
        request = send(Call(url, body, read, self.key, timeout, attempts, self.usage, prompts, prompt_tokens))
        self._running[request] = threading.get_ident()
        request.add_done_callback(lambda request: self._running.pop(request, None))
        return request


def _probes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts by which vocabularies can be told apart: of all kinds, special tokens, and a chat."""
    added = sorted(tokenizer.get_added_vocab().items(), key=lambda entry: entry[1])
    probes = [*PROBES, "".join(token for token, _ in added)]
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": PROBES[0]}]
        probes.append(str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)))
    return [text for text in probes if text]


def _put(logits: torch.Tensor, told: TopTokens):
    """Write what is told, and what is left for each token that is not, to `(vocab,)`."""
    missing = max(1 - sum(map(math.exp, told.values())), LEAST_MISSING)
    others = max(len(logits) - len(told), 1)
    least = torch.tensor(min(told.values()), dtype=logits.dtype)  # which no token ties with that is not told
    below = torch.nextafter(least, torch.tensor(float("-inf"))).item()
    logits.fill_(min(math.log(missing / others), below))
    logits[list(told)] = torch.tensor(list(told.values()), device=logits.device)


def _contexts(
    tokens: torch.Tensor, attention_mask: torch.Tensor | None, num_new: int, logits_to_keep: int | torch.Tensor
) -> list[list[Context]]:
    """What each row has read at each kept place; nothing where that is padding."""
    kept = torch.arange(num_new, device=tokens.device)
    kept = kept[-logits_to_keep:] if isinstance(logits_to_keep, int) else logits_to_keep
    kept = kept.expand(len(tokens), -1) + tokens.shape[1] - num_new  # (rows, positions), among all tokens
    mask = torch.ones_like(tokens) if attention_mask is None else attention_mask[:, : tokens.shape[1]]

    contexts = []
    for ids, is_read, places in zip(tokens.tolist(), mask.bool().tolist(), kept.tolist()):
        of_row: list[Context] = []
        for place in places:
            seen = zip(ids[: place + 1], is_read)
            of_row.append(tuple(token for token, read in seen if read) if is_read[place] else ())
        contexts.append(of_row)
    return contexts


__all__ = ["EndpointForCausalLM"]
