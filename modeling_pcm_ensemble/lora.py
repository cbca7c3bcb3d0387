"""Many LoRA adapters on one frozen model, selected or weighted for each batch row, and PEFT's format in and out."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import accumulate, count
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .lora_config import adapted_paths

logger = logging.get_logger(__name__)

# Linear layers beside one another that read the same input, so that their A products can be one. Only speed depends on
# this table.
SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("w1", "w3"),
)


class Columns(NamedTuple):
    """The part of a group's low-rank space that belongs to one adapter on one layer."""

    layer: str
    adapter: int
    rank: int
    scale: float


@dataclass
class AdapterSelection:
    r"""
    How much of each adapter every row gets.

    Args:
        bank (`int`): the number of the bank that holds them; two ensembles may share a backbone.
        weights (`torch.Tensor` of shape `(rows, 1 or seq, adapters)`):
            One-hot where a row runs one adapter, zeros where it runs none, any weights w for Σ_i w_i s_i B_i A_i.
    """

    bank: int
    weights: torch.Tensor
    masks: dict[tuple, torch.Tensor] = field(default_factory=dict)  # by columns and dtype
    product: tuple | None = None  # the last group that ran, its input, and its product with A

    def rows(self, index: torch.Tensor) -> "AdapterSelection":
        """Return the selection of a batch whose row i is this one's row `index[i]`."""
        return AdapterSelection(self.bank, self.weights[index])

    def mask(self, columns: tuple[Columns, ...], dtype: torch.dtype) -> torch.Tensor:
        """Each column's weight times scale, `(rows, 1 or seq, columns)`; built once for all layers that share it."""
        if (columns, dtype) not in self.masks:
            device = self.weights.device
            ranks = torch.tensor([entry.rank for entry in columns], device=device)
            adapters = torch.tensor([entry.adapter for entry in columns], device=device).repeat_interleave(ranks)
            scales = torch.tensor([entry.scale for entry in columns], device=device).repeat_interleave(ranks)
            self.masks[columns, dtype] = (self.weights[..., adapters] * scales).to(dtype)
        return self.masks[columns, dtype]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let forward passes inside run with these adapters."""
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)
            self.product = None


# A layer's hook is called with the layer's inputs and nothing else of the call, and threads call one model at once.
# So this is how a selection comes to it. (tests/test_lora.py fails when models hand arguments down to their layers.)
_active: ContextVar[AdapterSelection | None] = ContextVar("adapter_selection", default=None)


class _Traced:
    """
    What a step hands to the hooks in it while it is traced, since a context variable cannot be. It is set and read in
    traced code alone: to the compiled step it is an argument. [`clear_traced`] clears it where a step has failed.
    """

    def __init__(self):
        self.is_step = False
        self.bank: int | None = None
        self.masks: list[torch.Tensor] = []


_traced = _Traced()
_bank_numbers = count()


def run_traced(bank: "LoraBank | None", call: Callable, adapter_masks: list[torch.Tensor], *args, **inputs):
    """
    Call a model, or a part of it, under adapters, in code that is compiled.

    Args:
        bank (`LoraBank`, *optional*): whose adapters; hooks of others, on a backbone that ensembles share, do nothing.
        call (`Callable`): what runs.
        adapter_masks (`list[torch.Tensor]`): of [`LoraBank.kind_masks`]; none where no adapter runs.
        args, inputs: what it is called with.
    """
    _traced.is_step = True
    _traced.bank = bank.number if bank is not None and adapter_masks else None
    _traced.masks = adapter_masks

    output = call(*args, **inputs)

    clear_traced()
    return output


def clear_traced():
    """Let hooks find no traced step."""
    _traced.is_step = False
    _traced.bank = None
    _traced.masks = []


class LoraGroup(nn.Module):
    r"""
    All adapters on linear layers that read the same input: one product with every A, side by side; what belongs to
    other adapters than a row's is masked.

    Parameters: `lora_A` of shape `(columns, in)`, and for each layer `lora_B` of shape `(out, columns of the layer)`.
    """

    def __init__(self, linears: dict[str, Any], columns: list[Columns], bank: int, kinds: dict):
        super().__init__()
        self.first = next(iter(linears))  # one of the layers, by its name
        self.columns = tuple(sorted(columns, key=lambda entry: (entry.layer, entry.adapter)))
        self.kind = kinds.setdefault(self.columns, len(kinds))

        weight = next(iter(linears.values())).weight
        like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype if weight.is_floating_point() else None}
        in_features, _ = features(next(iter(linears.values())))
        self.lora_A = nn.Parameter(torch.zeros(sum(entry.rank for entry in columns), in_features, **like))

        for name, linear in linears.items():
            start, stop = self.span(name)
            lora_B = torch.zeros(features(linear)[1], stop - start, **like)  # noqa: N806
            self.add_module(name, LoraLayer(self, lora_B, start, stop, bank))

    def span(self, layer: str, adapter: int | None = None) -> tuple[int, int]:
        """First and last column (exclusive) of a layer, or of one adapter on it."""
        places = list(accumulate((entry.rank for entry in self.columns), initial=0))
        mine = [i for i, e in enumerate(self.columns) if e.layer == layer and adapter in (None, e.adapter)]
        return places[mine[0]], places[mine[-1] + 1]

    def forward(self, hidden_states: torch.Tensor, selection: AdapterSelection) -> torch.Tensor:
        """
        The masked product with A, `(rows * seq, columns)`; computed once for the layers of the group, and forgotten
        with the next one's, so that a layer's input does not stay until the call ends.
        """
        group, of_input, product = selection.product or (None, None, None)
        if group is self and of_input is hidden_states:
            return product

        low = nn.functional.linear(hidden_states, self.lora_A.to(hidden_states.dtype))  # (rows, seq, columns)
        low = low * selection.mask(self.columns, low.dtype)
        product = low.reshape(-1, low.shape[-1])
        selection.product = self, hidden_states, product
        return product


class LoraLayer(nn.Module):
    """One layer's share of a [`LoraGroup`]; adds B A x to the layer's output through a forward hook."""

    def __init__(self, group: LoraGroup, lora_B: torch.Tensor, start: int, stop: int, bank: int):  # noqa: N803
        super().__init__()
        self.bank = bank
        self.lora_B = nn.Parameter(lora_B)
        self.start, self.stop = start, stop
        self.group = (group,)  # in a tuple, so that it is not a submodule of its own child

    def add_to_output(self, linear: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_dynamo_compiling() and _traced.is_step:
            return self._add_traced(inputs[0], output) if self.bank == _traced.bank else output

        selection = _active.get()
        if selection is None or selection.bank != self.bank:
            return output
        low = self.group[0](inputs[0], selection)[:, self.start : self.stop]  # (rows * seq, columns of the layer)
        output.view(-1, output.shape[-1]).addmm_(low.to(output.dtype), self.lora_B.T.to(output.dtype))
        return output

    def _add_traced(self, hidden_states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The same for the compiler, which finds what layers of a group share."""
        group = self.group[0]
        low = nn.functional.linear(hidden_states, _cast(group.lora_A, hidden_states.dtype))  # (rows, seq, columns)
        low = (low * _cast(_traced.masks[group.kind], low.dtype)).flatten(0, 1)

        # In two dimensions: a product of parts of rows in three would not become a matrix product
        low = low[:, self.start : self.stop]  # (rows * seq, columns of the layer)
        return output + nn.functional.linear(low, _cast(self.lora_B, output.dtype)).view_as(output)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor itself where it has this dtype: compiled code knows packed weights by it."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


class LoraBank(nn.Module):
    r"""
    The adapters of all experts on one backbone. Its modules stand at the paths of the layers they belong to; the
    backbone itself stays as it is.

    Args:
        backbone (`PreTrainedModel`): the frozen model.
        adapters (`dict[str, dict]`): each expert's name → its adapter's configuration, see [`adapter_config`].
    """

    def __init__(self, backbone: PreTrainedModel, adapters: dict[str, dict]):
        super().__init__()
        self.number = next(_bank_numbers)
        self.names = list(adapters)
        self.hooked: list[nn.Module] = []  # layers of the backbone
        self.handles: list[RemovableHandle] = []
        self.kinds: dict[tuple[Columns, ...], int] = {}  # of groups, which have a mask each

        columns: dict[str, list[Columns]] = {}
        for index, adapter in enumerate(adapters.values()):
            for path, (rank, scale) in adapted_layers(backbone, adapter).items():
                columns.setdefault(path, []).append(Columns(path.rpartition(".")[2], index, rank, scale))

        for paths in same_input(list(columns)):
            linears = {path.rpartition(".")[2]: backbone.get_submodule(path) for path in paths}
            group = LoraGroup(linears, [entry for path in paths for entry in columns[path]], self.number, self.kinds)
            _add_at(self, paths[0].rpartition(".")[0], "_".join(linears), group)

    def attach(self, backbone: PreTrainedModel):
        """Hook every adapter layer to its layer of the backbone, anew where loading has replaced those modules."""
        linears = [backbone.get_submodule(path) for path, _ in self.layers()]
        if linears == self.hooked:
            return  # another thread may run, and would lose its adapter for a moment

        self.detach()
        self.hooked = linears
        self.handles = [
            linear.register_forward_hook(layer.add_to_output) for linear, (_, layer) in zip(linears, self.layers())
        ]

    def detach(self):
        """Take the hooks off again."""
        for handle in self.handles:
            handle.remove()
        self.hooked, self.handles = [], []

    def layers(self) -> Iterator[tuple[str, LoraLayer]]:
        """(path of the layer in the backbone, adapter layer)."""
        for path, module in self.named_modules():
            if isinstance(module, LoraLayer):
                parent, _, name = path.rpartition(".")
                yield f"{parent.rpartition('.')[0]}.{name}".lstrip("."), module

    def selection(self, names: list[str | None], device: torch.device) -> AdapterSelection:
        """Select for each row the adapter of expert `names[row]`, or none where the bank has none by that name."""
        weights = torch.zeros(len(names), 1, len(self.names))
        for row, name in enumerate(names):
            if name in self.names:
                weights[row, 0, self.names.index(name)] = 1
        return AdapterSelection(self.number, weights.to(device))

    def kind_masks(self, selection: AdapterSelection) -> list[torch.Tensor]:
        """Return the mask of each kind of group, which [`run_traced`] takes."""
        dtype = next(self.parameters()).dtype
        return [selection.mask(columns, dtype) for columns in self.kinds]

    @torch.no_grad()
    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """
        An expert's tensors by PEFT's names: `<path>.lora_A.weight` of shape `(rank, in)`, `<path>.lora_B.weight` of
        shape `(out, rank)`. They are views of the bank's parameters.
        """
        adapter, tensors = self.names.index(name), {}
        for path, layer in self.layers():
            group, layer_name = layer.group[0], path.rpartition(".")[2]
            if any(entry.layer == layer_name and entry.adapter == adapter for entry in group.columns):
                start, stop = group.span(layer_name, adapter)
                tensors[f"{path}.lora_A.weight"] = group.lora_A[start:stop]
                tensors[f"{path}.lora_B.weight"] = layer.lora_B[:, start - layer.start : stop - layer.start]
        return tensors

    @torch.no_grad()
    def load(self, name: str, tensors: Mapping[str, torch.Tensor]):
        """Fill one expert's adapter, see [`tensors`], in the backbone's dtype; say where that rounds."""
        rounded = False
        for key, place in self.tensors(name).items():  # views of the bank's own parameters
            place.copy_(tensors[key])
            rounded |= not torch.equal(place.to(tensors[key]), tensors[key])
        if rounded:
            logger.warning(
                f"The adapter of expert {name!r} is rounded from {tensors[key].dtype} to {place.dtype}, the dtype of "
                "its base. PEFT computes it in float32. Pass `dtype=torch.float32` for the same numbers."
            )

    @torch.no_grad()
    def fit(self, backbone: PreTrainedModel):
        """Give each layer's B as many rows as its layer has by now: new ones add nothing, others go."""
        for path, layer in self.layers():
            new_rows = features(backbone.get_submodule(path))[1] - len(layer.lora_B)
            if new_rows:
                layer.lora_B = nn.Parameter(nn.functional.pad(layer.lora_B, (0, 0, 0, new_rows)))


def adapted_layers(backbone: PreTrainedModel, adapter: dict) -> dict[str, tuple[int, float]]:
    """Path → (rank, scale) of each layer of the backbone that PEFT would adapt under this configuration."""
    linears, output = linear_layers(backbone), backbone.get_output_embeddings()
    output_path = next((path for path, module in linears.items() if module is output), None)
    return adapted_paths(list(linears), output_path, adapter)


def linear_layers(backbone: PreTrainedModel) -> dict[str, nn.Module]:
    """By path, the layers that an adapter can be on."""
    return {path: module for path, module in backbone.named_modules() if isinstance(module, (nn.Linear, Conv1D))}


def features(linear: Any) -> tuple[int, int]:
    """Return a linear layer's numbers of features, (in, out); quantised layers are of many classes."""
    if isinstance(linear, Conv1D):
        num_in, num_out = linear.weight.shape
        return num_in, num_out
    return linear.in_features, linear.out_features


def same_input(paths: list[str]) -> list[list[str]]:
    """Group paths of linear layers: those that stand beside one another and read the same input go together."""
    groups: dict[tuple, list[str]] = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        together = next((names for names in SAME_INPUT if name in names), (name,))
        groups.setdefault((parent, together), []).append(path)
    return list(groups.values())


def _add_at(root: nn.Module, path: str, name: str, module: nn.Module):
    for part in filter(None, path.split(".")):
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(name, module)


__all__ = [
    "AdapterSelection",
    "LoraBank",
    "LoraGroup",
    "LoraLayer",
    "adapted_layers",
    "features",
    "linear_layers",
    "run_traced",
    "same_input",
]
