"""LoRA adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors, in and out."""

import json
import os
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.utils import cached_file

from .lora import adapted_layers, features
from .saving import finish_save, staged_folder

CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."

# What decides the function that an adapter computes, with PEFT's defaults.
FIELDS = {
    "r": 8,
    "lora_alpha": 8,
    "use_rslora": False,
    "target_modules": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}
# What concerns training, initialisation or bookkeeping alone.
IGNORED = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip


def adapter_config(config: Mapping, label: str) -> dict:
    """
    Keep of a PEFT configuration what [`adapted_layers`] reads.

    Raises:
        ValueError: if the configuration asks for something else than plain LoRA on linear layers, by its name.
    """
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{label} is of the PEFT type {config['peft_type']!r}. Only LORA is supported.")
    for name, value in config.items():
        if name in FIELDS or name in IGNORED or not value or (name == "bias" and value == "none"):
            continue
        raise ValueError(f"{label} uses `{name}` ({value!r}), which is not supported. Only plain LoRA is.")
    kept = FIELDS | {name: config[name] for name in FIELDS if config.get(name) is not None}
    if not kept["target_modules"]:
        raise ValueError(f"{label} names no `target_modules`.")
    if not isinstance(kept["target_modules"], str):
        kept["target_modules"] = sorted(kept["target_modules"])
    return kept


def read_adapter(source, label: str, hub_options: dict) -> tuple[dict, dict[str, torch.Tensor]]:
    """
    Read an adapter from a folder, a Hub repository, or a mapping shaped as PEFT's `LoraConfig` with the tensors under
    `tensors`.

    Returns:
        The configuration, see [`adapter_config`], and the tensors by `<path>.lora_A.weight`, `<path>.lora_B.weight`.

    Raises:
        TypeError, ValueError, OSError: if it is none of these, not safetensors, corrupt or not plain LoRA.
    """
    if isinstance(source, Mapping):
        config = {name: value for name, value in source.items() if name != "tensors"}
        return adapter_config(config, label), _without_prefix(source.get("tensors", {}), label)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"{label} must be a folder, a repository or a mapping, got {type(source).__name__}.")
    source = os.fspath(source)
    finish_save(source)
    with open(cached_file(source, CONFIG_NAME, **hub_options), encoding="utf-8") as file:
        config = adapter_config(json.load(file), f"{label} in {source!r}")
    missing = {"_raise_exceptions_for_missing_entries": False}
    weights = cached_file(source, WEIGHTS_NAME, **hub_options, **missing)
    if weights is None:
        has_pickle = cached_file(source, PICKLE_NAME, **hub_options, **missing) is not None
        found = f"only {PICKLE_NAME}, a pickle, which is never loaded" if has_pickle else "no weights"
        raise ValueError(
            f"{label} in {source!r} has {found}. Save it as {WEIGHTS_NAME}, which PEFT does by default "
            "(`safe_serialization=True`)."
        )
    try:
        return config, _without_prefix(load_file(weights), f"{label} in {source!r}")
    except SafetensorError as error:
        raise ValueError(f"{weights} of {label} is not a readable safetensors file: {error}") from error


def check_adapter(backbone: PreTrainedModel, config: dict, tensors: Mapping[str, torch.Tensor], label: str):
    """Refuse tensors that are not those which the configuration asks for on this backbone, naming the layer."""
    layers = adapted_layers(backbone, config)
    if not layers:
        raise ValueError(
            f"{label}: `target_modules` {config['target_modules']!r} matches no linear layer of "
            f"{type(backbone).__name__}. It was made for another architecture."
        )
    expected = {}
    for path, (rank, _) in layers.items():
        in_features, out_features = features(backbone.get_submodule(path))
        expected[f"{path}.lora_A.weight"] = (rank, in_features)
        expected[f"{path}.lora_B.weight"] = (out_features, rank)
    for key, shape in expected.items():
        if key not in tensors:
            raise ValueError(f"{label}: the tensor {key} is missing.")
        if tuple(tensors[key].shape) != shape:
            raise ValueError(f"{label}: the tensor {key} has the shape {tuple(tensors[key].shape)}, not {shape}.")
    unexpected = sorted(tensors.keys() - expected.keys())
    if unexpected:
        raise ValueError(f"{label}: the tensor {unexpected[0]} belongs to no layer that `target_modules` matches.")


def write_adapter(folder: str | os.PathLike, config: dict, tensors: Mapping[str, torch.Tensor], base_model: str):
    """
    Write a folder that `PeftModel.from_pretrained` loads. An interruption leaves the old adapter or the new one.

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


def _without_prefix(tensors: Mapping[str, torch.Tensor], label: str) -> dict[str, torch.Tensor]:
    stripped = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    for key in stripped:
        if not key.endswith((".lora_A.weight", ".lora_B.weight")):
            raise ValueError(f"{label}: the tensor {key} is not one of LoRA on a linear layer.")
    return stripped


__all__ = ["adapter_config", "check_adapter", "read_adapter", "write_adapter"]
