"""LoRA adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors, in and out."""

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from .checkpoint_hub import fetch_file, find_file
from .checkpoint_staging import finish_save, staged_folder
from .checkpoint_trust import read_object
from .lora import adapted_layers, features, linear_layers
from .lora_config import adapter_config

CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
LORA_SUFFIXES = (".lora_A.weight", ".lora_B.weight")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLACE_FIELDS = ("repository", "revision", "subfolder")


def adapter_place(source, label: str, hub_options: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """
    Return where an adapter is, as a folder or repository and the options to find it there; None for one that is a
    mapping with its tensors.

    Args:
        source: as in [`read_adapter`].
        label (`str`): names the adapter in errors.
        hub_options (`dict`): where files come from, see [`~checkpoint_hub.HUB_OPTIONS`].

    Raises:
        TypeError, ValueError: if it is neither.
    """
    if isinstance(source, (str, os.PathLike)):
        source = {"repository": source}
    if not isinstance(source, Mapping):
        raise TypeError(f"{label} must be a folder, a repository or a mapping, got {type(source).__name__}.")
    if "repository" not in source:
        return None

    unknown = sorted(map(str, set(source) - set(PLACE_FIELDS)))
    if unknown:
        raise ValueError(f"{label} has the unknown fields {unknown} beside `repository`; known: {PLACE_FIELDS}.")
    given = {name: value for name, value in source.items() if value is not None}
    if not isinstance(given.get("repository"), (str, os.PathLike)):
        raise TypeError(f"`repository` of {label} must be a repository or folder, got {source['repository']!r}.")
    for name in ("revision", "subfolder"):
        if not isinstance(given.get(name, ""), str):
            raise TypeError(f"`{name}` of {label} must be a string, got {given[name]!r}.")
    return os.fspath(given.pop("repository")), hub_options | given


def read_adapter(source, label: str, hub_options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """
    Read an adapter.

    Args:
        source (`str`, `os.PathLike` or `Mapping`):
            A folder, a Hub repository, a mapping that names one (`repository`, and where there are `revision` and
            `subfolder`), or a mapping shaped as PEFT's `LoraConfig` with the tensors under `tensors`.
        label (`str`): names the adapter in errors.
        hub_options (`dict`): where files come from, see [`~checkpoint_hub.HUB_OPTIONS`].

    Returns:
        The configuration, see [`adapter_config`], and the tensors by their names without PEFT's prefix.

    Raises:
        TypeError, ValueError, OSError: if it is none of these, not safetensors, corrupt or not plain LoRA.
    """
    place = adapter_place(source, label, hub_options)
    if place is None:
        config = {name: value for name, value in source.items() if name != "tensors"}
        return adapter_config(config, label), _without_prefix(source.get("tensors", {}), label)

    folder, options = place
    label = f"{label} in {folder!r}"
    finish_save(os.path.join(folder, options.get("subfolder") or ""))
    config = adapter_config(read_object(fetch_file(folder, CONFIG_NAME, **options)), label)

    weights = find_file(folder, WEIGHTS_NAME, **options)
    if weights is None:
        has_pickle = find_file(folder, PICKLE_NAME, **options) is not None
        found = f"only {PICKLE_NAME}, a pickle, which is never loaded" if has_pickle else "no weights"
        raise ValueError(
            f"{label} has {found}. Save it as {WEIGHTS_NAME}, which PEFT does by default (`safe_serialization=True`)."
        )
    try:
        return config, _without_prefix(load_file(weights), label)
    except SafetensorError as error:
        raise ValueError(f"{weights} of {label} is not a readable safetensors file: {error}") from error


def fit_adapter(
    backbone: PreTrainedModel, config: dict[str, Any], tensors: Mapping[str, torch.Tensor], label: str
) -> dict[str, torch.Tensor]:
    """
    Return those of an adapter's tensors that are LoRA's: a pair for each layer of the backbone that the configuration
    names. What else is there must be what the backbone has itself, as PEFT saves embeddings beside an adapter.

    Args:
        backbone (`PreTrainedModel`): what the adapter was made for.
        config (`dict`), tensors (`Mapping[str, torch.Tensor]`): the adapter, see [`read_adapter`].
        label (`str`): names the adapter in errors.

    Raises:
        ValueError: naming the tensor that does not belong here.
    """
    expected = _expected_shapes(backbone, config, tensors, label)
    for key, shape in expected.items():
        if key not in tensors:
            raise ValueError(f"{label}: the tensor {key} is missing.{_elsewhere(key, tensors)}")
        if tuple(tensors[key].shape) != shape:
            raise ValueError(f"{label}: the tensor {key} has the shape {tuple(tensors[key].shape)}, not {shape}.")

    own = backbone.state_dict()
    for key in sorted(tensors.keys() - expected.keys()):
        _check_is_of_base(own.get(key.replace(".base_layer.", ".")), key, tensors[key], label)
    return {key: tensors[key] for key in expected}


def _expected_shapes(
    backbone: PreTrainedModel, config: dict[str, Any], tensors: Mapping[str, torch.Tensor], label: str
) -> dict[str, tuple[int, int]]:
    try:
        layers = adapted_layers(backbone, config)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error

    if not layers:
        some = [key for key in tensors if key.endswith(LORA_SUFFIXES[0])][:1]
        places = (f"{path}{LORA_SUFFIXES[0]}" for path in linear_layers(backbone))
        elsewhere = next((hint for key in places if (hint := _elsewhere(key, some))), "")
        raise ValueError(
            f"{label}: `target_modules` {config['target_modules']!r} matches no linear layer of "
            f"{type(backbone).__name__}. It was made for another architecture, or for other layers, such as "
            f"embeddings, which cannot be adapted here.{elsewhere}"
        )

    expected = {}
    for path, (rank, _) in layers.items():
        in_features, out_features = features(backbone.get_submodule(path))
        expected[f"{path}.lora_A.weight"] = (rank, in_features)
        expected[f"{path}.lora_B.weight"] = (out_features, rank)
    return expected


def _elsewhere(key: str, tensors: Iterable[str]) -> str:
    """A sentence on the tensor of the same layer, where it has another prefix; else an empty string."""
    parts = key.split(".")
    for start, first in enumerate(parts[:-2]):
        suffix = "." + ".".join(parts[start:])
        for other in tensors:
            if other != key and f".{other}".endswith(suffix):
                return (
                    f" It is there under another prefix, as {other}: the adapter was made for a model in which this "
                    "one is a part, or it is the other way round. Rename its tensors (and full paths in "
                    "`target_modules`), or give it the model that it was made for."
                )

        if first.isdigit():  # what follows belongs to one layer of many
            break
    return ""


def _check_is_of_base(own: torch.Tensor | None, key: str, tensor: torch.Tensor, label: str):
    if own is None and key.endswith(LORA_SUFFIXES):
        raise ValueError(f"{label}: the tensor {key} belongs to no layer that `target_modules` matches.")
    if own is None:
        raise ValueError(f"{label}: the tensor {key} is not one of LoRA on a linear layer.")

    if own.shape != tensor.shape:
        raise ValueError(
            f"{label}: its {key} has the shape {tuple(tensor.shape)}, the base's {tuple(own.shape)}: it was trained "
            "on another vocabulary, and brings that along. Let PEFT merge it into the base, resized as it was "
            "(`resize_token_embeddings`), and give the merged model as the expert's `model`."
        )

    tensor = tensor.to(own.device)
    if not torch.equal(tensor.to(own.dtype), own) and not torch.equal(tensor, own.to(tensor.dtype)):
        raise ValueError(
            f"{label}: its {key} is not the base's: it was trained too. Give the base that it belongs to, or let PEFT "
            "merge it and give the merged model as the expert's `model`."
        )


def write_adapter(
    folder: str | os.PathLike, config: dict[str, Any], tensors: Mapping[str, torch.Tensor], base_model: str
):
    """
    Write a folder that `PeftModel.from_pretrained` loads. An interruption leaves the old adapter or the new one.

    Args:
        folder (`str` or `os.PathLike`): to write to.
        config (`dict`), tensors (`Mapping[str, torch.Tensor]`): the adapter, see [`read_adapter`].
        base_model (`str`): the folder or repository of what it was made for.

    Raises:
        ValueError: if a model stands there, which would be loaded with this adapter.
    """
    if os.path.exists(os.path.join(folder, "config.json")):
        raise ValueError(
            f"{str(folder)!r} holds a model, config.json, which would be loaded with an adapter beside it. Give the "
            "adapter a folder of its own."
        )

    full = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": base_model,
    }
    tensors = {PREFIX + key: tensor.contiguous().cpu() for key, tensor in tensors.items()}

    with staged_folder(folder) as staging:
        save_file(tensors, os.path.join(staging, WEIGHTS_NAME), metadata={"format": "pt"})
        with open(os.path.join(staging, CONFIG_NAME), "w", encoding="utf-8") as file:
            json.dump(full | config, file, indent=2, sort_keys=True)


def _without_prefix(tensors, label: str) -> dict[str, torch.Tensor]:
    if not isinstance(tensors, Mapping):
        raise TypeError(f"`tensors` of {label} must map names to tensors, got {type(tensors).__name__}.")

    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"`tensors` of {label} must map names to tensors, got {type(tensor).__name__} for {key!r}."
            )
        if tensor.dtype not in DTYPES or tensor.layout is not torch.strided or tensor.is_meta:
            raise ValueError(
                f"{label}: the tensor {key} must be of floating-point numbers of at least 16 bits, got "
                f"{tensor.dtype} ({tensor.layout}, on {tensor.device})."
            )

    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


__all__ = ["adapter_place", "fit_adapter", "read_adapter", "write_adapter"]
