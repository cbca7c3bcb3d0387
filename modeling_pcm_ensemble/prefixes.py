"""Rows of [prefix | context]: what a submodel reads, while the user sees the context alone."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin
from transformers.utils import ModelOutput

from .compile_steps import compile_config, compiled_call, let_sizes_vary, turn
from .lora import AdapterSelection

# Fewer tokens saved do not pay for a call of its own (measured: SmolLM2 on 2 CPU cores breaks even at about 420).
MIN_TOKENS_SAVED = 512


@dataclass
class CachePart:
    r"""
    What one submodel remembers between forward passes. Without a `cache` it remembers nothing.

    Args:
        cache (`Cache`, *optional*): keys and values of the submodel's rows.
        max_length (`int`, *optional*): most tokens that a static cache holds, prefix included.
        length (`int`): cached tokens, prefix included. Counted here because recurrent layers do not know.
        attention_mask (`torch.LongTensor` of shape `(rows, cached tokens)`, *optional*): None while nothing is masked.
        orders (`list[tuple[int, torch.LongTensor]]`):
            (first token, order `(rows, tokens)`) of each stretch of cached tokens whose rows were closed up.
        prefix_length (`int`): cached tokens before the context, padding included.
        adapters (`AdapterSelection`, *optional*): each row's LoRA adapter, where it stays the same.
        sizes_vary (`bool`): whether the cache's tensors are marked for compiled steps.
    """

    cache: Cache | None = None
    max_length: int | None = None
    length: int = 0
    attention_mask: torch.LongTensor | None = None
    prefix_length: int = 0
    adapters: AdapterSelection | None = None
    orders: list[tuple[int, torch.LongTensor]] = field(default_factory=list)
    sizes_vary: bool = False

    def check_no_gaps(self, context_mask: torch.LongTensor, num_tokens: int):
        """
        Raises:
            ValueError: if `context_mask`, `(rows, cached context tokens + num_tokens)`, masks what a recurrent state
                could not leave out.
        """
        if self.length == 0:
            return
        past = self.past_mask(context_mask[:, :-num_tokens], len(context_mask), context_mask.device)
        known = torch.ones_like(past) if self.attention_mask is None else self.attention_mask
        if not context_mask[:, -num_tokens:].all() or not torch.equal(past.bool(), known.bool()):
            raise ValueError(
                "An expert's or the PCM's recurrent state cannot leave out padding that comes after the first call. "
                "Continue rows of one length, or start without `past_key_values` and `prefill_chunk_size`."
            )

    def past_mask(
        self, context_mask: torch.LongTensor | None, num_rows: int, device: torch.device
    ) -> torch.LongTensor:
        """
        The mask of the cached tokens, `(rows, cached tokens)`: what was masked, and what `context_mask`, of shape
        `(rows, cached context tokens)`, masks by now, such as the padding of a row that ended before the others.
        """
        mask = self.attention_mask
        if mask is None:
            mask = torch.ones(num_rows, self.length, dtype=torch.long, device=device)
        if context_mask is None or context_mask.shape[1] == 0:
            return mask
        given = torch.cat([context_mask.new_ones(num_rows, self.prefix_length), context_mask], dim=1)
        for start, order in self.orders:
            stretch = given[:, start : start + order.shape[1]]
            given = torch.cat([given[:, :start], stretch.gather(1, order), given[:, start + order.shape[1] :]], dim=1)
        return mask & given

    def crop(self, length: int):
        """
        Forget what was noted of the tokens beyond `length`, which the cache is about to drop.

        Raises:
            ValueError: if closing up had moved padding away from there, so that other tokens would go than was meant.
        """
        for start, order in self.orders:
            dropped = torch.arange(order.shape[1], device=order.device)[max(length - start, 0) :]
            if not (order[:, max(length - start, 0) :] == dropped).all():
                raise ValueError("A cache of rows that were padded on the right cannot be cropped. Pad on the left.")
        self.length = length
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask[:, :length]
        orders = [(start, order[:, : max(length - start, 0)]) for start, order in self.orders]
        self.orders = [(start, order) for start, order in orders if order.shape[1]]

    def copy_rows(self, rows: torch.LongTensor):
        """Make row `rows[i]` row i, in the cache too."""
        self.cache.batch_select_indices(rows)
        self.select(rows)

    def select(self, rows: torch.LongTensor):
        """Note row `rows[i]` as row i. The cache's own rows are the caller's."""
        self.sizes_vary = False
        self.orders = [(start, order[rows]) for start, order in self.orders]
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask[rows]
        if self.adapters is not None:
            self.adapters = self.adapters.rows(rows)


@dataclass
class SubmodelInputs:
    r"""
    A submodel's inputs for its rows.

    Args:
        input_ids (`torch.LongTensor` of shape `(rows, tokens)`): prefix, where it is not cached yet, then context.
        attention_mask (`torch.LongTensor` of shape `(rows, cached tokens + tokens)`, *optional*): None masks nothing.
        position_ids (`torch.LongTensor` of shape `(rows, tokens)` or `(1, tokens)`): unmasked tokens before each.
        kept (`int` or `torch.LongTensor`): the tokens to predict from, as transformers' `logits_to_keep`: the last
            `kept`, those at `(positions,)`, or in each row those at `(rows, positions)`.
        order (`torch.LongTensor` of shape `(rows, tokens)`, *optional*): where each token stood before closing up.
    """

    input_ids: torch.LongTensor
    attention_mask: torch.LongTensor | None
    position_ids: torch.LongTensor
    kept: int | torch.LongTensor
    order: torch.LongTensor | None = None

    def of_fixed_form(self, max_length: int) -> "SubmodelInputs":
        """The same with a mask as long as the cache and positions for each row, which compiled code need not ask."""
        rows, mask = len(self.input_ids), self.attention_mask
        mask = self.input_ids.new_ones(rows, 0) if mask is None else mask
        rest = mask.new_ones(rows, max_length - mask.shape[1])
        position_ids = self.position_ids.expand(rows, -1).contiguous()
        return replace(self, attention_mask=torch.cat([mask, rest], dim=1), position_ids=position_ids)


def is_recurrent(cache: Cache | None) -> bool:
    """Whether some layers keep a state, which fades over masked tokens too."""
    return cache is not None and any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)


def run_submodel(model: nn.Module, inputs: SubmodelInputs, part: CachePart, **kwargs) -> ModelOutput:
    """Call a submodel; where steps are compiled and this is one, a token into a static cache, by its compiled call."""
    config, compiled = compile_config(), nullcontext()
    call, num_tokens = model, inputs.input_ids.shape[1]
    if config is not None and num_tokens == 1 and part.max_length is not None:
        call, inputs, compiled = compiled_call(model, config), inputs.of_fixed_form(part.max_length), turn
    with compiled:
        if compiled is turn and not part.sizes_vary:
            let_sizes_vary(part.cache)
            part.sizes_vary = True
        output = call(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            position_ids=inputs.position_ids,
            use_cache=part.cache is not None,
            **{_cache_name(model): part.cache},
            **kwargs,
        )
    if part.cache is not None:
        part.length += num_tokens
    return output


def _cache_name(model: nn.Module) -> str:
    """What the model, which PEFT may have wrapped, calls its cache."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return _cache_argument(type(model).forward)


@cache
def _cache_argument(forward: Callable) -> str:
    return "cache_params" if "cache_params" in inspect.signature(forward).parameters else "past_key_values"


def pad_left(sequences: list[list[int]], device: torch.device | None = None) -> torch.LongTensor | None:
    """Stack token lists to `(rows, longest)`, padded on the left with -1; None where all are empty."""
    length = max(map(len, sequences), default=0)
    if not length:
        return None
    return torch.tensor([[-1] * (length - len(ids)) + list(ids) for ids in sequences], device=device)


def encode_description(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a preference's description, which ends in a line break so that descriptions can be joined."""
    return tokenizer(text.strip() + "\n", add_special_tokens=False)["input_ids"]


def submodel_inputs(
    input_ids: torch.LongTensor,
    attention_mask: torch.LongTensor | None,
    prefix_ids: torch.LongTensor | None,
    part: CachePart,
    logits_to_keep: int | torch.LongTensor = 0,
    bos_token_id: int | None = None,
) -> SubmodelInputs:
    r"""
    Put the prefixes before the context, and note on `part` what is masked.

    Rows are closed up: a row's padding, between prefix and context or behind the context, moves to its left end. So
    distances between tokens do not depend on the other rows, which sliding windows need. (Padding that comes after
    the first call stays where it is, so a sliding window counts it.)

    Args:
        input_ids (`torch.LongTensor` of shape `(rows, tokens)`): context tokens that are not cached yet.
        attention_mask (`torch.LongTensor` of shape `(rows, cached context tokens + tokens)`, *optional*): 1 = keep.
        prefix_ids (`torch.LongTensor` of shape `(rows, prefix tokens)`, *optional*): padded on the left with -1; for
            the first call. What the part holds already is the first of it.
        part (`CachePart`): the submodel's memory.
        logits_to_keep (`int` or `torch.LongTensor` of shape `(positions,)`): among the context tokens; 0 keeps all.
        bos_token_id (`int`, *optional*): masked out of a context whose prefix begins with it.
    """
    num_tokens, length = input_ids.shape[1], part.length
    context_mask = None
    if attention_mask is not None:
        context_mask, attention_mask = attention_mask[:, :-num_tokens], attention_mask[:, -num_tokens:]
    begins = length == 0 or prefix_ids is not None
    if prefix_ids is not None:
        input_ids, attention_mask = _join(prefix_ids, input_ids, attention_mask, bos_token_id, length)
        part.prefix_length = prefix_ids.shape[1]
    if begins and attention_mask is not None and attention_mask.all():
        attention_mask = None
    if attention_mask is None and part.attention_mask is None:
        kept = _last_positions(logits_to_keep, num_tokens, input_ids.shape[1])
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None] + length  # (1, tokens)
        return SubmodelInputs(input_ids, None, position_ids, kept)
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    kept, order = _last_positions(logits_to_keep, num_tokens, num_tokens), None
    if input_ids.shape[1] > 1:
        input_ids, attention_mask, kept, order = _close_up(input_ids, attention_mask, num_tokens, kept)
    past_mask = part.past_mask(context_mask, len(input_ids), input_ids.device)
    full_mask = torch.cat([past_mask, attention_mask], dim=1)  # (rows, cached tokens + tokens)
    if order is not None:
        part.orders.append((length, order))
    position_ids = (full_mask.cumsum(dim=1)[:, -input_ids.shape[1] :] - 1).clamp(min=0)
    part.attention_mask = full_mask
    return SubmodelInputs(input_ids, full_mask, position_ids, kept, order)


def encode_prefixes_once(
    prefix_ids: torch.LongTensor, groups: torch.LongTensor, part: CachePart, run: Callable[[SubmodelInputs], object]
):
    r"""
    Fill an empty part with the rows' prefixes, each distinct one encoded once and its keys and values copied. Each
    row's last prefix token is left to [`submodel_inputs`]: a masked first context token predicts what it predicts.

    Does nothing where too few tokens are saved, or without a dynamic cache of full attention: others cannot copy rows
    or would count the padding between prefixes.

    Args:
        prefix_ids (`torch.LongTensor` of shape `(rows, tokens)`): padded on the left with -1.
        groups (`torch.LongTensor` of shape `(rows,)`): rows with the same number, from 0 on, have the same prefix.
        part (`CachePart`): the submodel's memory.
        run (`Callable`): runs the submodel on the inputs of one row of each group.
    """
    numbers = groups.tolist()
    firsts = [numbers.index(group) for group in range(max(numbers) + 1)]
    length = prefix_ids.shape[1] - 1
    if (len(numbers) - len(firsts)) * length < max(MIN_TOKENS_SAVED, 1):
        return
    if not _copies_rows(part.cache) or any(part.cache.is_sliding):
        return
    distinct = prefix_ids[firsts, :length]
    mask = (distinct >= 0).long()
    run(SubmodelInputs(distinct.clamp(min=0), mask, (mask.cumsum(dim=1) - 1).clamp(min=0), 1))
    part.cache.batch_select_indices(groups)
    part.attention_mask = None if mask.all() else mask[groups]


def repeated_rows(part: CachePart, *inputs: torch.Tensor | None) -> tuple[torch.LongTensor, torch.LongTensor] | None:
    r"""
    Find the rows of a first call that read the same, as beams, return sequences and one prompt under many preferences
    do. Gives None where too few tokens are saved, or the cache is none that grows in place.

    Args:
        part (`CachePart`): the submodel's memory.
        inputs (`torch.Tensor` of shape `(rows, …)`, *optional*): all that a row's result depends on, its tokens last.

    Returns:
        The first of each set of equal rows, `(distinct,)`, and each row's set, `(rows,)`.
    """
    rows, tokens = inputs[-1].shape
    if part.length > 0 or (rows - 1) * tokens < MIN_TOKENS_SAVED or not _copies_rows(part.cache):
        return None
    values = torch.cat([value.long() for value in inputs if value is not None], dim=1)  # (rows, numbers)
    places: dict[int, int] = {}  # of distinct rows, in order of appearance
    numbers = values.unique(dim=0, return_inverse=True)[1].tolist()
    groups = [places.setdefault(number, len(places)) for number in numbers]
    if (rows - len(places)) * tokens < max(MIN_TOKENS_SAVED, 1):
        return None
    firsts = [groups.index(place) for place in range(len(places))]
    return torch.tensor(firsts, device=values.device), torch.tensor(groups, device=values.device)


def _copies_rows(cache: Cache | None) -> bool:
    return (
        type(cache) is DynamicCache
        and not cache.offloading
        and not is_recurrent(cache)
        and all(isinstance(layer, DynamicLayer) for layer in cache.layers)
    )


def _join(prefix_ids, input_ids, attention_mask, bos_token_id, length: int):
    """[prefix | context] without the `length` tokens that are cached, and its mask, both `(rows, tokens)`."""
    prefix_mask = (prefix_ids >= 0).long()
    context_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long().clone()
    if bos_token_id is not None:
        first = context_mask.argmax(dim=1, keepdim=True)  # (rows, 1), each row's first unmasked token
        begins = prefix_ids.gather(1, prefix_mask.argmax(dim=1, keepdim=True)) == bos_token_id  # (rows, 1)
        repeated = begins & (input_ids.gather(1, first) == bos_token_id)
        context_mask.scatter_(1, first, context_mask.gather(1, first) * ~repeated)
    joined = torch.cat([prefix_ids.clamp(min=0), input_ids], dim=1)[:, length:]
    return joined, torch.cat([prefix_mask, context_mask], dim=1)[:, length:]


def _last_positions(logits_to_keep, num_tokens: int, width: int) -> int | torch.LongTensor:
    """`logits_to_keep` of the last `num_tokens` tokens as one of all `width` tokens."""
    if isinstance(logits_to_keep, int):
        return min(logits_to_keep, num_tokens) or num_tokens
    return logits_to_keep % num_tokens + width - num_tokens


def _close_up(input_ids, attention_mask, num_tokens: int, kept):
    """Move padding to the left end of each row; `kept` becomes each row's own positions, `(rows, positions)`."""
    width = input_ids.shape[1]
    order = attention_mask.argsort(dim=1, stable=True)
    # Where each token stands afterwards; a masked token's place is taken by the unmasked one before it.
    ranks = attention_mask.cumsum(dim=1)  # (rows, width)
    places = (ranks + width - ranks[:, -1:] - 1).clamp(min=0)[:, -num_tokens:]  # (rows, context tokens)
    kept = places[:, -kept:] if isinstance(kept, int) else places[:, kept]
    return input_ids.gather(1, order), attention_mask.gather(1, order), kept, order


__all__ = ["CachePart", "SubmodelInputs"]
