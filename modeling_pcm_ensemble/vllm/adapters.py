"""The experts' LoRA adapters on vLLM's layers, which hold several of transformers' layers side by side."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from ..configuration_pcm_ensemble import PCMEnsembleConfig
from ..lora import LoraBank, adapted_layers


@dataclass
class Part:
    r"""
    One expert's adapter on one layer of transformers' model.

    Args:
        layer (`str`): the layer's name, the last part of its path.
        expert (`int`): whose it is.
        scale (`float`): what its product is multiplied by.
        lora_A (`torch.Tensor` of shape `(rank, in)`), lora_B (`torch.Tensor` of shape `(out, rank)`).
    """

    layer: str
    expert: int
    scale: float
    lora_A: torch.Tensor  # noqa: N815
    lora_B: torch.Tensor  # noqa: N815


def read_parts(config: PCMEnsembleConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, list[Part]]:
    """
    Read the adapters of a checkpoint: by path of a layer in transformers' model, the parts of the experts on it.

    Args:
        config (`PCMEnsembleConfig`): the ensemble's.
        tensors (`Mapping[str, torch.Tensor]`): what a checkpoint holds under `backbones.adapters.0.`.
    """
    adapters = {expert["name"]: expert["adapter"] for expert in config.experts if expert["adapter"] is not None}
    with torch.device("meta"):  # the model's layers are asked for, and not its weights
        model = AutoModelForCausalLM.from_config(config.backbones[0])
        bank = LoraBank(model, adapters)
    bank.load_state_dict(tensors, assign=True)

    parts: dict[str, list[Part]] = {}
    for name, adapter in adapters.items():
        of_expert = bank.tensors(name)
        for path, (_, scale) in adapted_layers(model, adapter).items():
            lora_A, lora_B = (of_expert[f"{path}.lora_{which}.weight"] for which in "AB")  # noqa: N806
            layer = path.rpartition(".")[2]
            parts.setdefault(path, []).append(Part(layer, config.expert_names.index(name), scale, lora_A, lora_B))
    return parts


class AdapterMasks:
    r"""
    How much every column of the adapters' low-rank spaces counts in each row, in buffers that stay where they are:
    code that is compiled or captured reads them.

    Args:
        most_rows (`int`): of a step.
        dtype (`torch.dtype`), device (`torch.device`): the model's.
    """

    def __init__(self, most_rows: int, dtype: torch.dtype, device: torch.device):
        self.most_rows = most_rows
        self.like: dict[str, Any] = {"dtype": dtype, "device": device}
        self.kinds: dict[tuple, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def of(self, columns: list[tuple[int, float]]) -> torch.Tensor:
        """Return the buffer, `(most rows, columns)`, of layers whose columns are of these experts, at these scales."""
        kind = tuple(columns)
        if kind not in self.kinds:
            experts, scales = (torch.tensor(values, device=self.like["device"]) for values in zip(*columns))
            self.kinds[kind] = experts, scales, torch.zeros(self.most_rows, len(columns), **self.like)
        return self.kinds[kind][2]

    def write(self, weights: torch.Tensor):
        """Let each row have so much of each adapter, `(rows, experts)`."""
        for experts, scales, mask in self.kinds.values():
            mask[: len(weights)] = weights[:, experts] * scales


class PackedAdapters(nn.Module):
    r"""
    All adapters on one layer of vLLM's.

    Args:
        layer (`LinearBase`): the layer. Under tensor parallelism each process has its share of it, and of these.
        layer_names (`list[str]`): transformers' layers in it, in the order of their outputs.
        parts (`list[Part]`): what is on them.
        masks (`AdapterMasks`): the model's.
    """

    def __init__(self, layer: LinearBase, layer_names: list[str], parts: list[Part], masks: AdapterMasks):
        super().__init__()
        columns = [(part.expert, part.scale) for part in parts for _ in range(len(part.lora_A))]
        self.mask: torch.Tensor
        self.register_buffer("mask", masks.of(columns), persistent=False)  # (most rows, columns)
        # The sum over processes of what each has of the input; a layer that leaves sums to its model sums these too.
        self.sums_inputs = isinstance(layer, RowParallelLinear) and layer.tp_size > 1 and layer.reduce_results

        # vLLM's own layers: once loaded, it packs their weights for the processor.
        like = masks.like
        num_in, num_out = layer.input_size_per_partition, layer.output_size_per_partition
        self.lora_A = ReplicatedLinear(num_in, len(columns), bias=False, params_dtype=like["dtype"])
        self.lora_B = ReplicatedLinear(len(columns), num_out, bias=False, params_dtype=like["dtype"])

        # The layer's own loader knows where in it a layer of transformers lies, and which share is this process's.
        lora_A = torch.cat([part.lora_A for part in parts]).to(**like)  # noqa: N806  (columns, in)
        if isinstance(layer, RowParallelLinear):
            layer.weight_loader(self.lora_A.weight, lora_A)
            self.lora_B.weight.data.copy_(_side_by_side(parts, parts[0].layer))
            return
        self.lora_A.weight.data.copy_(lora_A)
        self.lora_B.weight.data.zero_()
        for place, name in enumerate(layer_names):
            if any(part.layer == name for part in parts):
                shard: list[Any] = [] if len(layer_names) == 1 else [_shard_id(layer, place)]
                layer.weight_loader(self.lora_B.weight, _side_by_side(parts, name).to(**like), *shard)

    def add_to_output(self, layer: nn.Module, inputs: tuple, output: tuple) -> tuple:
        """Add B A x to the layer's output; a forward hook."""
        hidden_states = inputs[0]
        low, _ = self.lora_A(hidden_states)  # (rows, columns)
        if self.sums_inputs:
            low = tensor_model_parallel_all_reduce(low)
        added, _ = self.lora_B(low * self.mask[: hidden_states.shape[0]])
        return output[0] + added, *output[1:]


def _side_by_side(parts: Iterable[Part], layer: str) -> torch.Tensor:
    """B of one layer, `(out, columns)`, zeros where a column is another layer's."""
    parts = list(parts)
    num_out = next(len(part.lora_B) for part in parts if part.layer == layer)
    return torch.cat(
        [part.lora_B if part.layer == layer else part.lora_B.new_zeros(num_out, len(part.lora_A)) for part in parts],
        dim=1,
    )


def _shard_id(layer: LinearBase, place: int) -> str | int:
    """What a packed layer's loader calls the layer that is number `place` in it."""
    return "qkv"[place] if isinstance(layer, QKVParallelLinear) else place


def attach_adapters(
    model: nn.Module, parts: Mapping[str, list[Part]], masks: AdapterMasks
) -> tuple[nn.ModuleList, list[RemovableHandle]]:
    """
    Hook adapters to the layers of vLLM's model that they belong to.

    Args:
        model (`nn.Module`): vLLM's.
        parts (`Mapping[str, list[Part]]`): from [`read_parts`].
        masks (`AdapterMasks`): the model's.

    Returns:
        The adapters, and their hooks.

    Raises:
        ValueError: if vLLM's model has no such layer, or it is none that an adapter can be on.
    """
    packed_in: dict[str, tuple[str, list[str]]] = {}  # transformers' layer → vLLM's, and the layers that are in that
    for packed, names in getattr(model, "packed_modules_mapping", {}).items():
        packed_in |= {name: (packed, list(names)) for name in names}

    by_layer: dict[str, tuple[list[str], list[Part]]] = {}
    for path, of_path in parts.items():
        parent, _, name = path.rpartition(".")
        packed, names = packed_in.get(name, (name, [name]))
        by_layer.setdefault(f"{parent}.{packed}".lstrip("."), (names, []))[1].extend(of_path)

    attached, hooks = nn.ModuleList(), []
    for path, (names, of_layer) in by_layer.items():
        layer = _layer_at(model, path, names)
        adapters = PackedAdapters(layer, names, of_layer, masks)
        hooks.append(layer.register_forward_hook(adapters.add_to_output))
        attached.append(adapters)
    return attached, hooks


def _layer_at(model: nn.Module, path: str, names: list[str]) -> LinearBase:
    """vLLM's layer at a path, which holds transformers' layers `names`."""
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        layer = None
    kinds = (ColumnParallelLinear, RowParallelLinear)
    is_fused = isinstance(layer, MergedColumnParallelLinear | QKVParallelLinear) and len(names) == 1
    if not isinstance(layer, kinds) or is_fused:
        found = "nothing" if layer is None else f"a {type(layer).__name__}"
        raise ValueError(
            f"An adapter is on {path}, where vLLM's {type(model).__name__} has {found}. vLLM serves adapters on "
            "linear layers between hidden states, and on none that transformers has fused."
        )
    return layer
