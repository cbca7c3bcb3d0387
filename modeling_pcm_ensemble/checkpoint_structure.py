"""Whether models and weights are what their configurations make, so that a checkpoint can be loaded again."""

import copy
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


def check_structure(model: PreTrainedModel, label: str):
    """
    Compare a model with a fresh one of its configuration, which is what loading fills: class, modules, names and
    shapes of tensors, and which of them are one.

    Raises:
        ValueError: naming what differs. Of a quantised model, whose layers are others than its configuration's, only
            injected adapters are looked for.
    """
    check_not_injected(model, label)
    if getattr(model, "hf_quantizer", None) is not None:
        return

    modules = {name: type(module) for name, module in model.named_modules()}
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    if found := _first_difference(modules, {name: type(module) for name, module in fresh.named_modules()}):
        name, ours, theirs = found
        raise _differs(model, label, f"{name or 'the model'} is {_kind(ours)}, not {_kind(theirs)}")

    ours, theirs = model.state_dict(keep_vars=True), fresh.state_dict(keep_vars=True)
    for name, tensor in ours.items():
        if not _is_plain(tensor):
            raise _differs(model, label, f"{name} is a {type(tensor).__name__}, without a `quantization_config`")

    shapes = ({name: tuple(tensor.shape) for name, tensor in state.items()} for state in (ours, theirs))
    if found := _first_difference(*shapes):
        raise _differs(model, label, "the tensor {} has the shape {}, not {}".format(*found))

    found = _first_difference(_same_as(ours), _same_as(theirs))
    if found:
        names, wanted = (" and ".join(group or [found[0]]) for group in found[1:])
        raise _differs(model, label, f"{names} are one tensor" if found[1] else f"{wanted} are not one tensor")


def check_not_injected(model: PreTrainedModel, label: str):
    """
    Look for layers of PEFT's, which a fresh model of the configuration would not have.

    Raises:
        ValueError: if PEFT has put an adapter into the model's own layers.
    """
    injected = next((name for name, _ in model.named_modules() if name.endswith(".base_layer")), None)
    if injected is not None:
        raise _differs(model, label, f"it has an adapter on {injected.removesuffix('.base_layer')}")


def check_nothing_shared(models: Sequence[PreTrainedModel], labels: Sequence[str]):
    """
    Look for tensors that stand in the same memory.

    Raises:
        ValueError: naming a tensor that two models share in memory, which no checkpoint can hold.
    """
    owners: dict[tuple, tuple[str, str]] = {}
    for model, label in zip(models, labels):
        for name, tensor in model.state_dict(keep_vars=True).items():
            other = owners.setdefault(_place(tensor), (label, name))
            if other[0] != label:
                raise ValueError(
                    f"The models of {other[0]} and {label} share the tensor {name} in memory, which a checkpoint "
                    "cannot hold. Give one its own: `module.weight = torch.nn.Parameter(module.weight.clone())`."
                )


def load_with_info(load: Callable[..., Any], *args, **kwargs) -> tuple[Any, dict[str, Any]]:
    """
    Call a `from_pretrained`, and return the model and what was missing or left over.

    Its annotation knows nothing of `output_loading_info`, by which it gives a pair.
    """
    return load(*args, output_loading_info=True, **kwargs)


def check_loading(loading: dict[str, Any], names: Iterable[str], label: str):
    """
    Refuse weights that do not fill what the configuration makes, or of which it takes but a part: layers beyond its
    last, and adapters of experts that it does not name. Of other tensors that are left over, such as a value head,
    transformers warns.

    Args:
        loading (`dict`): what `from_pretrained(…, output_loading_info=True)` says.
        names (`Iterable[str]`): of the model's tensors.
        label (`str`): names the checkpoint in errors.

    Raises:
        ValueError: if there are such.
    """
    problems = {kind: sorted(map(str, loading[f"{kind}_keys"])) for kind in ("missing", "mismatched", "unexpected")}

    known = {_without_numbers(name) for name in names}
    problems["unexpected"] = [
        key
        for key in problems["unexpected"]
        if key.startswith("backbones.adapters.") or _without_numbers(key) in known
    ]

    found = [f"{len(keys)} {kind} (the first is {keys[0]})" for kind, keys in problems.items() if keys]
    if found:
        raise ValueError(
            f"Configuration and weights of {label} disagree: tensors {', '.join(found)}. Use the configuration that "
            "belongs to these weights."
        )


def _without_numbers(name: str) -> str:
    """Equal for tensors of different layers."""
    return re.sub(r"\d+", "#", name)


def _differs(model: PreTrainedModel, label: str, what: str) -> ValueError:
    return ValueError(
        f"The model of {label} is not what its configuration makes ({type(model).__name__}): {what}. A checkpoint of "
        "it could not be loaded again. Merge adapters first (`merge_and_unload()`), or give the base as `model` and "
        "the adapter as `adapter`; save other changes as a checkpoint that `AutoModelForCausalLM` loads."
    )


def _first_difference(ours: dict, theirs: dict) -> tuple | None:
    names = (name for name in ours | theirs if ours.get(name) != theirs.get(name))
    return next(((name, ours.get(name), theirs.get(name)) for name in names), None)


def _kind(module: type | None) -> str:
    return "missing" if module is None else f"a {module.__name__}"


def _same_as(state: dict[str, torch.Tensor]) -> dict[str, list[str]]:
    """Of each tensor that has more names than one, all its names."""
    names: dict[tuple, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(_place(tensor), []).append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter)


def _place(tensor: torch.Tensor) -> tuple:
    """Equal for two names of one tensor."""
    if tensor.is_meta or tensor.numel() == 0 or not _is_plain(tensor):
        return (id(tensor),)  # no memory of its own: on disk, or in a form of its own
    return (tensor.device, tensor.data_ptr())


__all__ = [
    "check_loading",
    "check_not_injected",
    "check_nothing_shared",
    "check_structure",
    "load_with_info",
]
