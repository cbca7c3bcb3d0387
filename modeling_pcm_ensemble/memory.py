"""What one submodel remembers between calls: keys and values, and what of them is masked."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.nn.functional import pad
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin, StaticLayer

from .rows import Rows, SubmodelInputs, close_up, join_prefixes, last_positions

STEPS_AHEAD = 64  # tokens that a growing layer makes room for, at least

LayerStates = list[tuple[torch.Tensor, torch.Tensor]]  # of one row: keys and values (heads, tokens, dim) by layer


class GrowingLayer(DynamicLayer):
    """A dynamic layer with room for tokens to come: a step writes its own token where `torch.cat` would copy all."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.rooms: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # by name: the room, and what is used of it

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if self.get_seq_length() == 0 or torch.is_grad_enabled():  # which keeps keys for the gradients of queries
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys = self._append("keys", key_states)
        self.values = self._append("values", value_states)
        return self.keys, self.values

    def _append(self, name: str, new: torch.Tensor) -> torch.Tensor:
        old = getattr(self, name)
        length, total = old.shape[-2], old.shape[-2] + new.shape[-2]
        room, used = self.rooms.get(name, (old, None))

        # Other keys than the last step's (reordered, cropped, moved) have no room behind them.
        if used is not old or room.shape[-2] < total or room.is_inference() != torch.is_inference_mode_enabled():
            room = old.new_empty(*old.shape[:-2], total + max(total // 4, STEPS_AHEAD), old.shape[-1])
            room[..., :length, :] = old

        room[..., length:total, :] = new
        self.rooms[name] = room, room[..., :total, :]
        return self.rooms[name][1]

    def reset(self):
        super().reset()
        self.rooms.clear()


class NotedOfRows(Protocol):
    """Something that is noted of each row."""

    def rows(self, index: torch.Tensor) -> "NotedOfRows":
        """Return what is noted of rows `index`."""


@dataclass
class Memory:
    r"""
    What one submodel remembers between calls. Without a `cache` it remembers nothing.

    Args:
        cache (`Cache`, *optional*): keys and values of the submodel's rows.
        max_length (`int`, *optional*): most tokens that a static cache holds, prefix included.
        length (`int`): cached tokens, prefix included. Counted here because recurrent layers do not know.
        prefix_length (`int`): cached tokens before the context, padding included.
        attention_mask (`torch.LongTensor` of shape `(rows, cached tokens)`, *optional*): None while nothing is masked.
        orders (`list[tuple[int, torch.Tensor]]`):
            (first token, order `(rows, tokens)`) of each stretch of cached tokens whose rows were closed up.
        adapters (`NotedOfRows`, *optional*): which adapter each row runs under, as the submodel has worked it out.
        is_marked (`bool`): whether the cache's tensors are marked for compiled steps.
    """

    cache: Cache | None = None
    max_length: int | None = None
    length: int = 0
    prefix_length: int = 0
    attention_mask: torch.Tensor | None = None
    orders: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    adapters: NotedOfRows | None = None
    is_marked: bool = False

    # What the cache can do

    @property
    def layers(self) -> list[Any]:
        """The cache's, which are of many kinds."""
        return [] if self.cache is None else self.cache.layers

    @property
    def is_recurrent(self) -> bool:
        """Whether some layers keep a state, which fades over masked tokens too."""
        return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers)

    @property
    def copies_rows(self) -> bool:
        """Whether one row can become several: in layers that grow, sliding windows among them."""
        if type(self.cache) is not DynamicCache or self.cache.offloading or self.is_recurrent:
            return False
        return all(isinstance(layer, DynamicLayer) for layer in self.layers)

    @property
    def takes_prefixes(self) -> bool:
        """Whether states can be put in, with padding before them: full attention in layers that grow or are static."""
        if self.cache is None or self.cache.offloading:
            return False
        # By `rooms`, since a `GrowingLayer` may be of the code that came with a checkpoint
        return all(type(x) in (DynamicLayer, StaticLayer) or hasattr(x, "rooms") for x in self.layers)

    # Reading

    def arrange(
        self, rows: Rows, logits_to_keep: int | torch.Tensor = 0, bos_token_id: int | None = None
    ) -> SubmodelInputs:
        r"""
        Put the prefixes before the context, and note what is masked.

        Rows are closed up: a row's padding, between prefix and context or behind the context, moves to its left end.
        So distances between tokens do not depend on the other rows, which sliding windows need. (Padding that comes
        after the first call stays where it is, so a sliding window counts it.)

        Args:
            rows (`Rows`): of what is held of their prefixes already, the first tokens are left out.
            logits_to_keep (`int` or `torch.LongTensor` of shape `(positions,)`): among the context tokens; 0 keeps
                all.
            bos_token_id (`int`, *optional*): masked out of a context whose prefix begins with it.
        """
        num_tokens = rows.input_ids.shape[1]
        input_ids, attention_mask, context_mask = self._with_prefixes(rows, bos_token_id)
        if attention_mask is None and self.attention_mask is None:
            kept = last_positions(logits_to_keep, num_tokens, input_ids.shape[1])
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None] + self.length  # (1, tokens)
            return SubmodelInputs(input_ids, None, position_ids, kept)

        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        kept, order = last_positions(logits_to_keep, num_tokens, num_tokens), None
        if input_ids.shape[1] > 1:
            input_ids, attention_mask, kept, order = close_up(input_ids, attention_mask, num_tokens, kept)

        past_mask = self.past_mask(context_mask, len(input_ids), input_ids.device)
        self.attention_mask = torch.cat([past_mask, attention_mask], dim=1)  # (rows, cached tokens + tokens)
        if order is not None:
            self.orders.append((self.length, order))
        position_ids = (self.attention_mask.cumsum(dim=1)[:, -input_ids.shape[1] :] - 1).clamp(min=0)
        return SubmodelInputs(input_ids, self.attention_mask, position_ids, kept, order)

    def _with_prefixes(
        self, rows: Rows, bos_token_id: int | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Put the prefixes before the context, and note how wide they are.

        Returns:
            The tokens to read, of which what is held is left out; their mask, None where all of them count; and the
            mask of the cached context, None where none was given.
        """
        input_ids, attention_mask, context_mask = rows.input_ids, rows.attention_mask, None
        num_tokens = input_ids.shape[1]
        if attention_mask is not None:
            context_mask, attention_mask = attention_mask[:, :-num_tokens], attention_mask[:, -num_tokens:]

        prefixes = rows.prefixes or []
        has_prefixes = any(prefixes)
        if has_prefixes:
            joined, mask = join_prefixes(prefixes, input_ids, attention_mask, bos_token_id)
            self.prefix_length = joined.shape[1] - num_tokens
            input_ids, attention_mask = joined[:, self.length :], mask[:, self.length :]

        begins = self.length == 0 or has_prefixes
        if begins and attention_mask is not None and attention_mask.all():
            attention_mask = None
        return input_ids, attention_mask, context_mask

    def past_mask(self, context_mask: torch.Tensor | None, num_rows: int, device: torch.device) -> torch.Tensor:
        """
        Return the mask of the cached tokens, `(rows, cached tokens)`: what was masked, and what `context_mask`, of
        shape `(rows, cached context tokens)`, masks by now, such as the padding of a row that ended before the others.
        """
        mask = self.attention_mask
        if mask is None:
            mask = torch.ones(num_rows, self.length, dtype=torch.long, device=device)
        if context_mask is None or context_mask.shape[1] == 0:
            return mask

        given = torch.cat([context_mask.new_ones(num_rows, self.prefix_length), context_mask], dim=1)
        for start, order in self.orders:
            stop = start + order.shape[1]
            given = torch.cat([given[:, :start], given[:, start:stop].gather(1, order), given[:, stop:]], dim=1)
        return mask & given

    def check_no_gaps(self, context_mask: torch.Tensor, num_tokens: int):
        """
        Refuse what a recurrent state could not leave out.

        Raises:
            ValueError: if `context_mask`, `(rows, cached context tokens + num_tokens)`, masks such a token.
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

    # Writing

    def fill(self, states: list[LayerStates | None], lengths: list[int], device: torch.device):
        """Begin each row with states that were read elsewhere, `lengths[i]` tokens of row i, padded on the left."""
        width = max(lengths)
        some = next(row for row in states if row is not None)
        for index, layer in enumerate(self.layers):
            nothing = [tensor[:, :0] for tensor in some[index]]
            rows = [nothing if row is None else row[index] for row in states]
            layer.update(*(torch.stack([_pad_left(row[kind], width) for row in rows]) for kind in (0, 1)))

        self.length = width
        if min(lengths) < width:
            self.attention_mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths], device=device)

    def copy_rows(self, rows: torch.Tensor):
        """Make row `rows[i]` row i, in the cache too."""
        for layer in self.layers:
            layer.reorder_cache(rows)  # which every kind of layer has, and which takes any number of rows

        self.is_marked = False  # these are other tensors
        self.orders = [(start, order[rows]) for start, order in self.orders]
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask[rows]
        if self.adapters is not None:
            self.adapters = self.adapters.rows(rows)

    def check_crop(self, length: int):
        """
        Refuse to forget the tokens beyond `length`.

        Raises:
            ValueError: if closing up had moved padding away from there, so that other tokens would go than was meant.
        """
        for start, order in self.orders:
            dropped = torch.arange(order.shape[1], device=order.device)[max(length - start, 0) :]
            if not (order[:, max(length - start, 0) :] == dropped).all():
                raise ValueError("A cache of rows that were padded on the right cannot be cropped. Pad on the left.")

    def crop(self, length: int):
        """Forget what was noted of the tokens beyond `length`, which the cache has dropped; see [`check_crop`]."""
        self.length = length
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask[:, :length]
        orders = [(start, order[:, : max(length - start, 0)]) for start, order in self.orders]
        self.orders = [(start, order) for start, order in orders if order.shape[1]]


def _pad_left(states: torch.Tensor, width: int) -> torch.Tensor:
    """Pad `(heads, tokens, dim)` on the left to `(heads, width, dim)`."""
    return pad(states, (0, 0, width - states.shape[1], 0))


__all__ = ["GrowingLayer", "LayerStates", "Memory"]
