"""Attention of several experts at once, by layers of vLLM that are made wider."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention


@contextmanager
def attention_made(change: Callable[[dict[str, Any]], None]) -> Iterator[list[Attention]]:
    """
    Let a model that is made inside have other attention layers: `change` may alter their arguments. A model of vLLM
    makes them itself, and takes no others. Gives the layers, once they are made.
    """
    layers: list[Attention] = []
    make = Attention.__init__
    signature = inspect.signature(make)

    @functools.wraps(make)
    def made(self, *args, **kwargs):
        arguments = signature.bind(self, *args, **kwargs).arguments
        arguments |= arguments.pop("extra_impl_args", {})
        change(arguments)
        make(**arguments)
        layers.append(self)

    Attention.__init__ = made
    try:
        yield layers
    finally:
        Attention.__init__ = make


def attention_layers(model: nn.Module) -> list[Attention]:
    """Return a model's attention layers, in their order."""
    return [module for module in model.modules() if isinstance(module, Attention)]


def check_attention(model: nn.Module, made: list[Attention]):
    """
    Check that a model calls its attention layers as modules, which hooks on them and their prefixes need.

    Raises:
        ValueError: if it has others than were `made` for it.
    """
    layers = attention_layers(model)
    if not layers or {id(layer) for layer in layers} != {id(layer) for layer in made}:
        raise ValueError(
            f"vLLM runs {type(model).__name__} without attention layers of its own, as models that it takes from "
            "transformers. An ensemble is served on models that vLLM has itself."
        )
    if any(layer.has_sink for layer in layers):
        raise ValueError("vLLM serves no ensemble whose models have attention sinks.")


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
