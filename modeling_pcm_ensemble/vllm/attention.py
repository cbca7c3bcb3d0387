"""Attention in vLLM: of several experts at once, and of a PCM that reads a description first."""

import functools
import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport

MOST_DESCRIPTIONS = 512  # of which keys and values are kept; descriptions may be anything that users write

Description = tuple[int, ...]


@contextmanager
def attention_made(change: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """
    Let a model that is made inside have other attention layers: `change` may alter their arguments. A model of vLLM
    makes them itself, and takes no others.
    """
    make = Attention.__init__
    signature = inspect.signature(make)

    @functools.wraps(make)
    def made(self, *args, **kwargs):
        arguments = signature.bind(self, *args, **kwargs).arguments
        arguments |= arguments.pop("extra_impl_args", {})
        change(arguments)
        make(**arguments)

    Attention.__init__ = made
    try:
        yield
    finally:
        Attention.__init__ = make


def attention_layers(model: nn.Module) -> list[Attention]:
    """Return a model's attention layers, in their order."""
    return [module for module in model.modules() if isinstance(module, Attention)]


# Several experts at once


def widen_attention(model: nn.Module, slots: int, is_active: "ActiveRows"):
    r"""
    Let attention layers that were made for the heads of all slots side by side take and give rows of one slot each:
    the slots of a token read the same pages, by the same metadata, in one call.

    Args:
        model (`nn.Module`): vLLM's, made inside [`attention_made`] with `slots` times as many heads.
        slots (`int`): S.
        is_active (`ActiveRows`): which rows there are.
    """

    def gather(layer: nn.Module, inputs: tuple) -> tuple:
        return tuple(is_active.spread(x).reshape(-1, slots * x.shape[-1]) for x in inputs[:3])

    def scatter(layer: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return is_active.pick(output.reshape(output.shape[0] * slots, -1))

    for layer in attention_layers(model):
        layer.register_forward_pre_hook(gather)
        layer.register_forward_hook(scatter)


class ActiveRows:
    """Which of a step's rows (token, slot) run: all of them, or those of an index."""

    def __init__(self):
        self.index: torch.Tensor | None = None  # (active rows,)
        self.number = 0  # of all rows

    def set(self, index: torch.Tensor | None, number: int):
        """Run the rows `index` of `number`; all with None."""
        self.index, self.number = index, number

    def pick(self, rows: torch.Tensor) -> torch.Tensor:
        """Take the active ones of all rows."""
        return rows if self.index is None else rows[self.index]

    def spread(self, rows: torch.Tensor) -> torch.Tensor:
        """Put the active rows at their places among all; the others are 0."""
        if self.index is None:
            return rows
        return rows.new_zeros(self.number, *rows.shape[1:]).index_copy_(0, self.index, rows)


# A PCM that reads a description first


class Descriptions:
    """
    What the PCM's attention layers read before each request's context: keys and values of its description, which are
    computed once for each.
    """

    def __init__(self):
        self.states: OrderedDict[Description, list[torch.Tensor]] = (
            OrderedDict()
        )  # by layer (kv heads, tokens, 2 · dim)
        self.wanted: list[Description] = []  # of each request of the step
        self.recorded: list[torch.Tensor] | None = None
        self._plan: tuple[Any, StepPlan] | None = None
        self._stacked: dict[tuple, torch.Tensor] = {}

    def begin(self, wanted: list[Description], record: Callable[[Description], None]):
        """Begin a step; `record` runs the PCM on a description that is new."""
        for description in wanted:
            if description not in self.states:
                self.recorded = []
                if description:
                    record(description)
                self.states[description], self.recorded = self.recorded, None
            self.states.move_to_end(description)

        while len(self.states) > max(MOST_DESCRIPTIONS, len(wanted)):
            self.states.popitem(last=False)
        if wanted != self.wanted:
            self._stacked.clear()
        self.wanted, self._plan = list(wanted), None

    def plan(self, metadata) -> "StepPlan":
        """Return the step's plan, which all layers share."""
        if self._plan is None or self._plan[0] is not metadata:
            self._plan = metadata, StepPlan(metadata, self.wanted)
        return self._plan[1]

    def stacked(self, layer: int, rows: list[int], width: int) -> torch.Tensor:
        """Return what requests read first, `(rows, kv heads, width, 2 · dim)`, padded on the left with zeros."""
        key = (layer, tuple(rows))
        if key not in self._stacked:
            states = [self.states[self.wanted[row]] for row in rows]
            like = next(state[layer] for state in states if state)
            padded = like.new_zeros(len(rows), like.shape[0], width, like.shape[2])
            for place, state in enumerate(states):
                if state:
                    padded[place, :, width - state[layer].shape[1] :] = state[layer]
            self._stacked[key] = padded
        return self._stacked[key]


class StepPlan:
    """Which requests of a step read one token, all at once then, and which read several, each by itself."""

    def __init__(self, metadata, wanted: list[Description]):
        starts, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
        counts = [end - start for start, end in itertools.pairwise(starts)]
        self.single = [row for row, count in enumerate(counts) if count == 1]
        self.longer = [(row, starts[row], counts[row], lengths[row]) for row, count in enumerate(counts) if count > 1]
        if not self.single:
            return

        device = metadata.block_table.device
        described = torch.tensor([len(wanted[row]) for row in self.single], device=device)
        of_context = torch.tensor([lengths[row] for row in self.single], device=device)
        self.rows = torch.tensor(self.single, device=device)
        self.places = torch.tensor([starts[row] for row in self.single], device=device)
        self.width = max(len(wanted[row]) for row in self.single)
        self.longest = max(lengths[row] for row in self.single)

        before = torch.arange(self.width, device=device) >= self.width - described[:, None]
        context = torch.arange(self.longest, device=device) < of_context[:, None]
        self.mask = torch.cat([before, context], dim=1)[:, None, None]  # (rows, 1, 1, width + longest)


@functools.cache
def reading_backend(base: type[AttentionBackend]) -> type[AttentionBackend]:
    """
    Make a backend whose layers read [description | context]. It keeps the platform's pages and metadata, in a plain
    layout, and computes by torch: no kernel of the platform gives what two parts can be joined by.
    """

    class Builder(base.get_builder_cls()):  # type: ignore[misc]
        _cudagraph_support: ClassVar = AttentionCGSupport.NEVER

    class ReadingAttention(base.get_impl_cls()):  # type: ignore[misc]
        descriptions: Descriptions
        number: int  # of the layer

        def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
            """Write new tokens into pages, `(blocks, kv heads, block size, 2 · dim)`."""
            block_size = kv_cache.shape[2]
            states = torch.cat([key, value], dim=-1)[: len(slot_mapping)]
            kv_cache[slot_mapping // block_size, :, slot_mapping % block_size] = states.to(kv_cache.dtype)

        def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs):
            """Attend, `(tokens, heads, dim)`; without metadata a description alone is read, or nothing that counts."""
            if attn_metadata is None:
                return self._read_alone(query, key, value, output)

            plan = self.descriptions.plan(attn_metadata)
            if plan.single:
                self._read_one_token(query, kv_cache, attn_metadata.block_table, plan, output)
            for row, start, count, length in plan.longer:
                table = attn_metadata.block_table[row]
                self._read_several(query[start : start + count], kv_cache, table, row, length, output[start:])
            return output

        def _read_alone(self, query, key, value, output):
            if self.descriptions.recorded is None:
                return output.zero_()

            queries, keys, values = (x.transpose(0, 1) for x in (query, key, value))  # (heads, tokens, dim)
            self.descriptions.recorded.append(torch.cat([keys, values], dim=-1).contiguous())
            read = scaled_dot_product_attention(
                queries[None], keys[None], values[None], is_causal=True, scale=self.scale, enable_gqa=True
            )
            return output.copy_(read[0].transpose(0, 1))

        def _read_one_token(self, query, kv_cache, block_table, plan: StepPlan, output):
            pages = block_table[plan.rows, : -(-plan.longest // kv_cache.shape[2])].long()
            states = (
                kv_cache[pages].transpose(1, 2).flatten(2, 3)[:, :, : plan.longest]
            )  # (rows, kv heads, …, 2 · dim)
            if plan.width:
                before = self.descriptions.stacked(self.number, plan.single, plan.width)
                states = torch.cat([before, states], dim=2)

            # Heads that share keys stand where several tokens would.
            _, heads, dim = query.shape
            queries = query[plan.places].view(len(plan.single), self.num_kv_heads, -1, dim)
            mask = plan.mask.expand(-1, -1, queries.shape[2], -1)
            read = scaled_dot_product_attention(
                queries, states[..., :dim], states[..., dim:], attn_mask=mask, scale=self.scale
            )
            output[plan.places] = read.reshape(len(plan.single), heads, dim)

        def _read_several(self, query, kv_cache, pages, row: int, length: int, output):
            num_pages = -(-length // kv_cache.shape[2])
            states = kv_cache[pages[:num_pages].long()].transpose(0, 1).flatten(1, 2)[:, :length]
            if before := self.descriptions.states[self.descriptions.wanted[row]]:
                states = torch.cat([before[self.number], states], dim=1)  # (kv heads, tokens, 2 · dim)

            count, dim = len(query), query.shape[-1]
            past = states.shape[1] - count
            positions = torch.arange(states.shape[1], device=query.device)
            mask = positions <= past + positions[:count, None]
            read = scaled_dot_product_attention(
                query.transpose(0, 1)[None],
                states[None, ..., :dim],
                states[None, ..., dim:],
                attn_mask=mask,
                scale=self.scale,
                enable_gqa=True,
            )
            output[:count] = read[0].transpose(0, 1)

    class Backend(base):
        @staticmethod
        def get_impl_cls():
            return ReadingAttention

        @staticmethod
        def get_builder_cls():
            return Builder

    return Backend
