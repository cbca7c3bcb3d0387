"""Attention over [prefix | context]: of the PCM behind a description, and of experts behind their prompts."""

import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport

MOST_TOKENS = 65536  # of all prefixes of which keys and values are kept; descriptions may be anything that users write


class Prefix(NamedTuple):
    """What is read before a context: tokens, and whose model reads them, since another expert's states are others."""

    reader: int
    tokens: tuple[int, ...]


Prefixes = tuple[Prefix, ...]  # of one request, one for each group of heads


class PrefixReading:
    r"""
    What attention layers read before each request's context: keys and values of prefixes, computed once for each.

    Args:
        groups (`int`): groups of heads that have a prefix of their own: slots of a backbone, or 1.
    """

    def __init__(self, groups: int = 1):
        self.groups = groups
        self.states: OrderedDict[Prefix, list[torch.Tensor]] = OrderedDict()  # by layer (kv heads, tokens, 2 · dim)
        self.wanted: list[Prefixes] = []  # of each request of the step
        self.recorded: list[torch.Tensor] | None = None
        self._plan: tuple[Any, StepPlan] | None = None
        self._stacked: dict[int, tuple[list[int], torch.Tensor]] = {}  # by layer: of which requests, and what

    def clear(self):
        """Forget what was read by other weights."""
        self.states.clear()
        self.wanted = []

    def begin(self, wanted: list[Prefixes], record: Callable[[Prefix], None]):
        """Begin a step; `record` runs the model on a prefix that is new."""
        self._plan = None
        if wanted == self.wanted:  # as in most steps
            return

        self._stacked.clear()
        needed = dict.fromkeys(prefix for prefix in itertools.chain.from_iterable(wanted) if prefix.tokens)
        self._drop_oldest(needed)
        for prefix in needed:
            if prefix not in self.states:
                self.recorded = []
                record(prefix)
                self.states[prefix], self.recorded = self.recorded, None
            self.states.move_to_end(prefix)
        self.wanted = wanted

    def _drop_oldest(self, needed: dict[Prefix, None]):
        """Make room for what is needed, which itself is never dropped."""
        tokens = sum(len(prefix.tokens) for prefix in self.states.keys() | needed.keys())
        for prefix in [prefix for prefix in self.states if prefix not in needed]:
            if tokens <= MOST_TOKENS:
                break
            del self.states[prefix]
            tokens -= len(prefix.tokens)

    def plan(self, metadata) -> "StepPlan":
        """Return the step's plan, which all layers share."""
        if self._plan is None or self._plan[0] is not metadata:
            self._plan = metadata, StepPlan(metadata, self)
        return self._plan[1]

    def width(self, rows: list[int]) -> int:
        """Return the tokens of the longest prefix of some requests."""
        return max(len(prefix.tokens) for row in rows for prefix in self.wanted[row])

    def stacked(self, layer: int, rows: list[int], keep: bool = False) -> torch.Tensor | None:
        """
        Return what requests read first, `(rows, groups · kv heads, width, 2 · dim)`, padded on the left with zeros;
        None where that is nothing. With `keep` it is kept for the next step of the same requests.
        """
        width = self.width(rows)
        if width == 0:
            return None
        if keep and layer in self._stacked and self._stacked[layer][0] == rows:
            return self._stacked[layer][1]

        like = next(iter(self.states.values()))[layer]
        padded = like.new_zeros(len(rows), self.groups, len(like), width, like.shape[-1])
        for place, row in enumerate(rows):
            for group, prefix in enumerate(self.wanted[row]):
                if prefix.tokens:
                    padded[place, group, :, width - len(prefix.tokens) :] = self.states[prefix][layer]
        stacked = padded.flatten(1, 2)
        if keep:
            self._stacked[layer] = rows, stacked
        return stacked

    def readable(self, rows: list[int], device: torch.device) -> torch.Tensor:
        """Return which places of [`stacked`] hold tokens, `(rows, groups, width)`; no places where that is nothing."""
        width = self.width(rows)
        lengths = torch.tensor([[len(prefix.tokens) for prefix in self.wanted[row]] for row in rows], device=device)
        return torch.arange(width, device=device) >= width - lengths[..., None]


class LongRow(NamedTuple):
    r"""
    A request that reads several tokens in a step.

    Args:
        row (`int`): its number; start, end (`int`): its tokens among the step's.
        length (`int`): tokens of its context by then.
        mask (`torch.BoolTensor` of shape `(groups, new tokens, prefix + context)`): what each may read.
    """

    row: int
    start: int
    end: int
    length: int
    mask: torch.Tensor


class StepPlan:
    r"""
    Which requests of a step read one token, all at once then, and which read several, each by itself; with the masks
    that all layers share.

    Args:
        metadata: vLLM's, of the step.
        reading (`PrefixReading`): what requests read first.
    """

    def __init__(self, metadata, reading: PrefixReading):
        starts, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
        spans = list(itertools.pairwise(starts))[: len(reading.wanted)]
        device = metadata.block_table.device

        self.single = [row for row, (start, end) in enumerate(spans) if end - start == 1]
        if self.single:
            self.rows = torch.tensor(self.single, device=device)
            self.places = torch.tensor([starts[row] for row in self.single], device=device)
            of_context = torch.tensor([lengths[row] for row in self.single], device=device)
            self.longest = max(lengths[row] for row in self.single)
            context = torch.arange(self.longest, device=device) < of_context[:, None]
            context = context[:, None].expand(-1, reading.groups, -1)
            self.mask = torch.cat([reading.readable(self.single, device), context], dim=2)  # (rows, groups, tokens)

        self.longer = []
        for row, (start, end) in enumerate(spans):
            if end - start > 1:
                mask = self._causal_mask(reading, row, end - start, lengths[row], device)
                self.longer.append(LongRow(row, start, end, lengths[row], mask))

    @staticmethod
    def _causal_mask(reading: PrefixReading, row: int, count: int, length: int, device: torch.device) -> torch.Tensor:
        positions = torch.arange(length, device=device)
        context = (positions <= positions[length - count :, None]).expand(reading.groups, -1, -1)
        readable = reading.readable([row], device)[0, :, None].expand(-1, count, -1)
        return torch.cat([readable, context], dim=2)  # (groups, new tokens, tokens)


@functools.cache
def reading_backend(base: type[AttentionBackend]) -> type[AttentionBackend]:
    """
    Make a backend whose layers read [prefix | context]. It keeps the platform's pages and metadata, in a plain layout,
    and computes by torch: no kernel of the platform gives what two parts can be joined by.
    """

    class Builder(base.get_builder_cls()):  # type: ignore[misc]
        _cudagraph_support: ClassVar = AttentionCGSupport.NEVER

    class ReadingAttention(base.get_impl_cls()):  # type: ignore[misc]
        reading: PrefixReading
        number: int  # of the layer

        def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
            """Write new tokens into pages, `(blocks, kv heads, block size, 2 · dim)`."""
            block_size = kv_cache.shape[2]
            states = torch.cat([key, value], dim=-1)[: len(slot_mapping)]
            kv_cache[slot_mapping // block_size, :, slot_mapping % block_size] = states.to(kv_cache.dtype)

        def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs):
            """Attend, `(tokens, heads, dim)`; without metadata a prefix alone is read, or nothing that counts."""
            if attn_metadata is None:
                return self._read_alone(query, key, value, output)

            plan = self.reading.plan(attn_metadata)
            if plan.single:
                self._read_one_token(query, kv_cache, attn_metadata.block_table, plan, output)
            for long in plan.longer:
                pages = attn_metadata.block_table[long.row]
                output[long.start : long.end] = self._read_several(query[long.start : long.end], kv_cache, pages, long)
            return output

        def _read_alone(self, query, key, value, output):
            if self.reading.recorded is None:
                return output.zero_()

            queries, keys, values = (x.transpose(0, 1) for x in (query, key, value))  # (heads, tokens, dim)
            of_one = self.num_kv_heads // self.reading.groups  # all groups read the same here
            self.reading.recorded.append(torch.cat([keys[:of_one], values[:of_one]], dim=-1).contiguous())
            read = scaled_dot_product_attention(
                queries[None], keys[None], values[None], is_causal=True, scale=self.scale, enable_gqa=True
            )
            return output.copy_(read[0].transpose(0, 1))

        def _read_one_token(self, query, kv_cache, block_table, plan: StepPlan, output):
            num_rows, dim = len(plan.single), query.shape[-1]
            pages = block_table[plan.rows, : -(-plan.longest // kv_cache.shape[2])].long()
            states = kv_cache[pages].transpose(1, 2).flatten(2, 3)  # (rows, kv heads, tokens, 2 · dim)
            states = states[:, :, : plan.longest]
            if (before := self.reading.stacked(self.number, plan.single, keep=True)) is not None:
                states = torch.cat([before, states], dim=2)

            # Heads that share keys stand where several tokens would.
            queries = query[plan.places].view(num_rows, self.num_kv_heads, -1, dim)
            mask = plan.mask.repeat_interleave(self.num_kv_heads // self.reading.groups, dim=1)[:, :, None]
            mask = mask.expand(-1, -1, queries.shape[2], -1)  # (rows, kv heads, heads of each, tokens)
            read = scaled_dot_product_attention(
                queries, states[..., :dim], states[..., dim:], attn_mask=mask, scale=self.scale
            )
            output[plan.places] = read.reshape(num_rows, -1, dim)

        def _read_several(self, query, kv_cache, pages, long: LongRow) -> torch.Tensor:
            _, heads, dim = query.shape
            num_pages = -(-long.length // kv_cache.shape[2])
            states = kv_cache[pages[:num_pages].long()].transpose(0, 1).flatten(1, 2)[:, : long.length]
            if (before := self.reading.stacked(self.number, [long.row])) is not None:
                states = torch.cat([before[0], states], dim=1)  # (kv heads, tokens, 2 · dim)

            # Torch's fast kernel takes masks of two or four dimensions alone.
            of_group = heads // self.reading.groups if self.reading.groups > 1 else 1
            mask = long.mask.repeat_interleave(of_group, dim=0)
            read = scaled_dot_product_attention(
                query.transpose(0, 1)[None],
                states[None, ..., :dim],
                states[None, ..., dim:],
                attn_mask=mask[None],
                scale=self.scale,
                enable_gqa=True,
            )
            return read[0].transpose(0, 1)

    class Backend(base):
        @staticmethod
        def get_impl_cls():
            return ReadingAttention

        @staticmethod
        def get_builder_cls():
            return Builder

    return Backend
