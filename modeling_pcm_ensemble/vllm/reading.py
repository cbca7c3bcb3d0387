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
        self._stacked.clear()

    def begin(self, wanted: list[Prefixes], record: Callable[[Prefix], None]):
        """Begin a step; `record` runs the model on a prefix that is new."""
        for prefix in itertools.chain.from_iterable(wanted):
            if prefix.tokens and prefix not in self.states:
                self.recorded = []
                record(prefix)
                self.states[prefix], self.recorded = self.recorded, None
            if prefix.tokens:
                self.states.move_to_end(prefix)
        self._drop_oldest(set(itertools.chain.from_iterable(wanted)))

        if wanted != self.wanted:
            self._stacked.clear()
        self.wanted, self._plan = list(wanted), None

    def _drop_oldest(self, needed: set[Prefix]):
        tokens = sum(len(prefix.tokens) for prefix in self.states)
        while tokens > MOST_TOKENS and (oldest := next(iter(self.states))) not in needed:
            del self.states[oldest]
            tokens -= len(oldest.tokens)

    def plan(self, metadata) -> "StepPlan":
        """Return the step's plan, which all layers share."""
        if self._plan is None or self._plan[0] is not metadata:
            self._plan = metadata, StepPlan(metadata, self.wanted)
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
        """Return which places of [`stacked`] hold tokens, `(rows, groups, width)`."""
        width = self.width(rows)
        lengths = torch.tensor([[len(prefix.tokens) for prefix in self.wanted[row]] for row in rows], device=device)
        return torch.arange(width, device=device) >= width - lengths[..., None]


class StepPlan:
    """Which requests of a step read one token, all at once then, and which read several, each by itself."""

    def __init__(self, metadata, wanted: list[Prefixes]):
        starts, self.lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
        counts = [end - start for start, end in itertools.pairwise(starts)][: len(wanted)]
        self.single = [row for row, count in enumerate(counts) if count == 1]
        self.longer = [(row, starts[row], count) for row, count in enumerate(counts) if count > 1]

        device = metadata.block_table.device
        self.rows = torch.tensor(self.single, device=device, dtype=torch.long)
        self.places = torch.tensor([starts[row] for row in self.single], device=device, dtype=torch.long)
        self.longest = max((self.lengths[row] for row in self.single), default=0)
        of_context = torch.tensor([self.lengths[row] for row in self.single], device=device)
        self.context = torch.arange(self.longest, device=device) < of_context[:, None]  # (rows, longest)


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
            for row, start, count in plan.longer:
                pages = attn_metadata.block_table[row]
                end = start + count
                output[start:end] = self._read_several(query[start:end], kv_cache, pages, row, plan.lengths[row])
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
            num_rows, dim, groups = len(plan.single), query.shape[-1], self.reading.groups
            pages = block_table[plan.rows, : -(-plan.longest // kv_cache.shape[2])].long()
            states = kv_cache[pages].transpose(1, 2).flatten(2, 3)  # (rows, kv heads, tokens, 2 · dim)
            states = states[:, :, : plan.longest]
            mask = plan.context[:, None].expand(-1, groups, -1)  # (rows, groups, tokens)
            if (before := self.reading.stacked(self.number, plan.single, keep=True)) is not None:
                states = torch.cat([before, states], dim=2)
                mask = torch.cat([self.reading.readable(plan.single, mask.device), mask], dim=2)

            # Heads that share keys stand where several tokens would.
            queries = query[plan.places].view(num_rows, self.num_kv_heads, -1, dim)
            mask = mask.repeat_interleave(self.num_kv_heads // groups, dim=1)[:, :, None]
            mask = mask.expand(-1, -1, queries.shape[2], -1)  # (rows, kv heads, heads of each, tokens)
            read = scaled_dot_product_attention(
                queries, states[..., :dim], states[..., dim:], attn_mask=mask, scale=self.scale
            )
            output[plan.places] = read.reshape(num_rows, -1, dim)

        def _read_several(self, query, kv_cache, pages, row: int, length: int) -> torch.Tensor:
            count, heads, dim = query.shape
            num_pages = -(-length // kv_cache.shape[2])
            states = kv_cache[pages[:num_pages].long()].transpose(0, 1).flatten(1, 2)[:, :length]
            positions = torch.arange(length, device=query.device)
            mask = (positions <= positions[length - count :, None]).expand(self.reading.groups, -1, -1)
            if (before := self.reading.stacked(self.number, [row])) is not None:
                states = torch.cat([before[0], states], dim=1)  # (kv heads, tokens, 2 · dim)
                readable = self.reading.readable([row], query.device)[0, :, None].expand(-1, count, -1)
                mask = torch.cat([readable, mask], dim=2)  # (groups, new tokens, tokens)

            read = scaled_dot_product_attention(
                query.transpose(0, 1)[None],
                states[None, ..., :dim],
                states[None, ..., dim:],
                attn_mask=mask.repeat_interleave(heads // self.reading.groups, dim=0),
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
