"""One decoder layer, compiled for all of a model's: on a CPU, compiling takes as long however deep the model is."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from .compile_linears import PackedLinears, call_products_directly, pack
from .lora import LoraGroup, LoraLayer, same_input

# What is looked at before compiled code runs: what a call gives, and torch's own settings, which have no name. Walking
# over a block's modules for every layer took a fifth of a step; [`find_blocks`] does it once for an answer.
GUARDED = ("", "adapter_masks", "args", "kwargs")
# Of a module, what is compared by itself or does not matter.
NOT_COMPARED = {"_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_compiled_call_impl"}


@dataclass
class OneLayer:
    """A cache's layer for one block, which asks for it by its own number."""

    layer: Any

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        return self.layer.update(key_states, value_states, *args, **kwargs)


class Region(nn.Module):
    """A block and the adapters that hang on it, whose parameters are put in together."""

    def __init__(self, block: nn.Module, adapters: nn.Module | None):
        super().__init__()
        self.block = block
        self.adapters = adapters

    def forward(self, *args, **kwargs):
        return self.block._call_impl(*args, **kwargs)  # the block's hooks, and not what is compiled


class Blocks(NamedTuple):
    """A model's blocks, what they have in common, and its LM head if that is a linear layer and nothing more."""

    regions: list[Region]
    form: list
    head: nn.Linear | None

    def are_still(self, others: "Blocks | None") -> bool:
        """Whether others, found later, are these, and nothing about them has changed."""
        if others is None or self.form != others.form or self.head is not others.head:
            return False
        return all(mine.block is theirs.block for mine, theirs in zip(self.regions, others.regions))


class CompiledBlocks:
    r"""
    Calls of a model's blocks, all of them by what is compiled of the first: weights are arguments.

    Args:
        model (`PreTrainedModel`): the blocks' model.
        blocks (`Blocks`): see [`find_blocks`].
        run (`Callable`): as [`~compile_steps.CompiledStep`] takes it.
        packs (`bool`): pack weights, which do not change then.
        options: of `torch.compile`.
    """

    def __init__(self, model: PreTrainedModel, blocks: Blocks, run: Callable, packs: bool, options: dict[str, Any]):
        if packs:
            call_products_directly()
        self.blocks = blocks
        self.regions = regions = blocks.regions
        self.together = _together(regions[0], model.dtype) if packs else []
        self.packed = [[_packed(region, names) for names in self.together] for region in regions]
        self.parameters: list[dict[str, torch.Tensor]] = []
        self.read_parameters()

        self.calls = {region.block: partial(self._call, number) for number, region in enumerate(regions)}
        if packs and blocks.head is not None:
            self.calls[blocks.head] = partial(_call_head, pack(blocks.head.weight), blocks.head.bias)

        # Of the step that runs
        self.masks: list[torch.Tensor] = []
        self.reached = 0

        def region(parameters, packed, adapter_masks, args, kwargs):
            def call(*args, **kwargs):
                return torch.func.functional_call(regions[0], parameters, args, kwargs)

            with PackedLinears(parameters, self.together, packed) if packs else nullcontext():
                return run(call, adapter_masks, *args, **kwargs)

        region.__code__ = region.__code__.replace()  # its own, so that what is compiled of it can be forgotten alone
        self.code = region.__code__

        # torch takes a mode, or options
        mode, given = options["mode"], options["options"] or {}
        of_mode = {} if mode is None else torch._inductor.list_mode_options(mode)
        options = options | {"mode": None, "options": given | of_mode | {"guard_filter_fn": _kept_guards}}
        self.call = torch.compile(region, **(options | {"fullgraph": True}))

    @contextmanager
    def active(self, adapter_masks: list[torch.Tensor]) -> Iterator[None]:
        """Let the blocks run what is compiled."""
        try:
            self.masks, self.reached = adapter_masks, 0
            for mask in adapter_masks:
                _fix_all_but_rows(mask)
            for module, call in self.calls.items():
                # As torch's own `Module.compile()` does
                module._compiled_call_impl = partial(_in_thread, get_ident(), module, call)
            yield
        finally:
            self.masks = []
            for module in self.calls:
                vars(module).pop("_compiled_call_impl", None)

    def read_parameters(self):
        """Take the blocks' parameters as they are now."""
        self.parameters = list(map(_parameters, self.regions))

    def forget(self):
        """Drop what was compiled."""
        torch._dynamo.reset_code(self.code)

    def _call(self, number: int, *args, **kwargs):
        self.reached = number
        args = tuple(_argument(value, number) for value in args)
        kwargs = {name: _argument(value, number) for name, value in kwargs.items()}
        return self.call(self.parameters[number], self.packed[number], self.masks, args, kwargs)


def _kept_guards(guards) -> list[bool]:
    return [re.split(r"\W", guard.name)[0] in GUARDED for guard in guards]  # their names are as `args[0].shape`


def _in_thread(thread: int, module: nn.Module, call: Callable, *args, **kwargs):
    """Call what is compiled; what another thread runs meanwhile is not."""
    return call(*args, **kwargs) if get_ident() == thread else module._call_impl(*args, **kwargs)


def _call_head(weight: torch.Tensor, bias: torch.Tensor | None, hidden_states: torch.Tensor) -> torch.Tensor:
    return torch.ops.pcm_ensemble.linear(hidden_states, weight, bias)


# Which blocks are alike


def find_blocks(model: PreTrainedModel, adapters: nn.Module | None) -> "Blocks | None":
    """
    Return a model's blocks if they are alike but for their weights and number, so that the code of one is that of all;
    else None. Only modules of torch and transformers are looked into, which keep what they depend on where it is seen.
    """
    for path, blocks in model.named_modules():
        if isinstance(blocks, nn.ModuleList) and 0 < len(blocks) == getattr(model.config, "num_hidden_layers", None):
            regions = [Region(block, _at(adapters, f"{path}.{i}")) for i, block in enumerate(blocks)]
            if not all(map(_is_known, regions, range(len(regions)))):
                return None
            form, *others = map(_form, regions)
            return Blocks(regions, form, _plain_head(model)) if all(other == form for other in others) else None
    return None


def _at(adapters: nn.Module | None, path: str) -> nn.Module | None:
    try:
        return None if adapters is None else adapters.get_submodule(path)
    except AttributeError:
        return None


def _is_known(region: Region, number: int) -> bool:
    """Whether what a block depends on is seen by [`_form`]."""
    if region.block._compiled_call_impl is not None:
        return False
    adapters = set() if region.adapters is None else set(region.adapters.modules())
    for module in region.block.modules():
        library = type(module).__module__.partition(".")[0]
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if library not in ("torch", "transformers") or "forward" in vars(module) or module.training:
            return False
        if not all(_is_of_adapters(hook, adapters) for hook in hooks):
            return False
        if vars(module).get("layer_idx", number) != number:  # it would ask the cache for another layer
            return False

    tensors = [*region.parameters(), *region.buffers()]
    return all(type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type == "cpu" for tensor in tensors)


def _is_of_adapters(hook: Callable, adapters: set[nn.Module]) -> bool:
    """Whether a hook is of adapters that are put in with the block; those of another ensemble do nothing meanwhile."""
    layer = getattr(hook, "__self__", None)
    banks = {other.bank for other in adapters if isinstance(other, LoraLayer)}
    return isinstance(layer, LoraLayer) and (layer in adapters or layer.bank not in banks)


def _form(region: Region) -> list:
    """All that compiled code may depend on beside tensors' values, and a block's number."""
    found: list = []
    for path, module in region.named_modules():
        tensors = module._parameters | module._buffers
        shapes = {
            name: None if value is None else (value.shape, value.stride(), value.dtype)
            for name, value in tensors.items()
        }
        skipped = NOT_COMPARED | ({"group"} if isinstance(module, LoraLayer) else {"layer_idx"})
        attributes = {name: _comparable(value) for name, value in vars(module).items() if name not in skipped}
        hooks = [len(module._forward_hooks), len(module._forward_pre_hooks)]
        found.append((path, type(module), shapes, attributes, hooks))
    return found


def _comparable(value):
    """Numbers, text and collections of them by value, functions by what they call, everything else by identity."""
    if isinstance(value, partial):
        return [id(value.func), _comparable(value.args), _comparable(value.keywords)]
    if isinstance(value, MethodType):
        return id(value.__func__)
    if isinstance(value, (set, frozenset)):
        return frozenset(value)
    if isinstance(value, dict):
        return {key: _comparable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_comparable(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, torch.dtype)) else id(value)


def _plain_head(model: PreTrainedModel) -> nn.Linear | None:
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or "forward" in vars(head) or head._compiled_call_impl is not None:
        return None
    is_plain = type(head.weight) in (torch.Tensor, nn.Parameter) and head.weight.device.type == "cpu"
    is_hooked = head._forward_hooks or head._forward_pre_hooks
    return head if is_plain and head.weight.dtype == model.dtype and not is_hooked else None


# What is put in


def _parameters(region: Region) -> dict[str, torch.Tensor]:
    """A region's parameters and buffers, whose shapes compiled code knows."""
    tensors = {name: tensor.detach() for name, tensor in (*region.named_parameters(), *region.named_buffers())}
    for tensor in tensors.values():
        torch._dynamo.mark_static(tensor)
    return tensors


def _together(region: Region, dtype: torch.dtype) -> list[list[str]]:
    """Names of the weights that are packed together: of linear layers that read the same, and adapters on them."""
    linears = [name for name, module in region.named_modules() if type(module) is nn.Linear]
    groups = [[f"{path}.weight" for path in paths] for paths in same_input(linears)]

    for name, module in region.named_modules():
        if isinstance(module, LoraGroup):
            first = f"block{name.removeprefix('adapters').rpartition('.')[0]}.{module.first}.weight"
            for group in groups:  # of none where the adapter is on another kind of layer, which is not packed
                if first in group:
                    group.append(f"{name}.lora_A")
        if isinstance(module, LoraLayer):
            groups.append([f"{name}.lora_B"])

    groups = [[name for name in names if region.get_parameter(name).dtype == dtype] for names in groups]
    return list(filter(None, groups))


def _packed(region: Region, names: list[str]) -> torch.Tensor:
    packed = pack(torch.cat([region.get_parameter(name) for name in names]))
    torch._dynamo.mark_static(packed)
    return packed


def _argument(value, number: int):
    """An argument of a block as compiled code takes it: of the cache its layer; rows and lengths may vary."""
    if isinstance(value, Cache):
        return OneLayer(value.layers[number])
    if number == 0:  # which is compiled; later blocks get the same shapes
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, torch.Tensor):
                _fix_all_but_rows(tensor)
    return value


def _fix_all_but_rows(tensor: torch.Tensor):
    """Fix all sizes but the first and, of a mask, the last."""
    fixed = range(1, tensor.dim() if tensor.is_floating_point() and tensor.dim() < 4 else tensor.dim() - 1)
    torch._dynamo.mark_static(tensor, list(fixed))


__all__ = ["CompiledBlocks", "find_blocks"]
