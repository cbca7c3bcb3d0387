"""Thin checkpoints: PCM and adapters alone, each backbone named by repository and commit instead of stored."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .checkpoint_hub import fetch_file, hub_source
from .checkpoint_trust import check_weight_names, read_object, weight_files
from .configuration_pcm_ensemble import ENDPOINT

COMMIT = re.compile(r"[0-9a-f]{40}")
WEIGHT_FILES = ["config.json", "generation_config.json", "model*.safetensors", SAFE_WEIGHTS_INDEX_NAME]
DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")


def thin_checkpoint(
    state: Mapping[str, torch.Tensor], backbones: Iterable[PreTrainedModel], pcm_body: PreTrainedModel, **hub_options
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    r"""
    Make what a thin checkpoint of an ensemble holds.

    Args:
        state (`Mapping[str, torch.Tensor]`): the ensemble's `state_dict`.
        backbones (`Iterable[PreTrainedModel]`): those of the ensemble, in their order.
        pcm_body (`PreTrainedModel`): the PCM's.
        hub_options: where files come from, see [`~checkpoint_hub.HUB_OPTIONS`].

    Returns:
        The tensors, and `config.thin`: each backbone's `repository`, `revision` (a commit) and `digest`, see
        [`weights_digest`]; and under `shared` the PCM's tensors that are not stored, because a backbone has them.

    Raises:
        ValueError: if a backbone is not what a Hub repository holds.
        OSError: if that repository cannot be reached, nor found in the cache.
    """
    sources: list[dict[str, Any]] = []
    owned: set[str] = set()  # names of the tensors that backbones bring
    embeddings: dict[str, torch.Tensor] = {}
    for index, backbone in enumerate(backbones):
        if backbone.config.model_type == ENDPOINT:
            raise ValueError(
                "An ensemble with experts behind endpoints is saved whole, which holds none of their weights. Use "
                "`thin=False`."
            )
        source = getattr(backbone.config, "source", None) or hub_source(backbone.name_or_path, **hub_options)
        if source is None:
            raise ValueError(
                f"Backbone {index} ({backbone.name_or_path or type(backbone).__name__}) is not from a Hub repository, "
                "which a thin checkpoint could name. Push it and build the ensemble from there, or save with "
                "`thin=False`."
            )
        if source["revision"] is None:
            raise OSError(
                f"The commit of {source['repository']}, which a thin checkpoint names, could not be found out. Is the "
                "Hub within reach, and may you read that repository?"
            )

        folder = _fetch(source, **hub_options)
        original = _load(folder, backbone.dtype)
        _check_equal(
            backbone, original, f"Backbone {index} is not what {source['repository']} holds at {source['revision']}"
        )
        owned |= {f"backbones.{index}.{name}" for name in original.state_dict()}
        embeddings |= {f"backbones.{index}.{name}": tensor for name, tensor in _embeddings(backbone).items()}
        sources.append(source | {"digest": weights_digest(folder)})

    shared = {}
    for name, tensor in _embeddings(pcm_body).items():
        equal = [other for other, theirs in embeddings.items() if torch.equal(tensor, theirs)]
        if equal:
            shared[f"pcm.body.{name}"] = equal[-1]

    stored = {name: tensor for name, tensor in state.items() if name not in owned and name not in shared}
    return stored, {"backbones": sources, "shared": shared}


def whole_state(
    thin: dict[str, Any], source: str | os.PathLike, variant: str | None = None, **hub_options
) -> dict[str, torch.Tensor]:
    """
    Collect the tensors of the ensemble that a thin checkpoint stands for.

    Args:
        thin (`dict`): its `config.thin`.
        source (`str` or `os.PathLike`): its folder or repository.
        variant (`str`, *optional*): of its weights.
        hub_options: where files come from, see [`~checkpoint_hub.HUB_OPTIONS`].

    Raises:
        ValueError: if a repository's weights are not those that it was saved with.
        OSError: if files cannot be fetched, nor found in the cache.
    """
    name = SAFE_WEIGHTS_NAME if variant is None else SAFE_WEIGHTS_NAME.replace(".safe", f".{variant}.safe")
    state = load_file(fetch_file(source, name, **hub_options))

    for index, entry in enumerate(thin["backbones"]):
        folder = _fetch(entry, **hub_options)
        if (digest := weights_digest(folder)) != entry["digest"]:
            raise ValueError(
                f"The weights of {entry['repository']} at {entry['revision']} are not those that this ensemble was "
                f"saved with: their digest is {digest}, not {entry['digest']}. Clear them from the cache if they were "
                "changed there, or ask the ensemble's author."
            )

        backbone = _load(folder, "auto")
        state |= {f"backbones.{index}.{name}": tensor for name, tensor in backbone.state_dict().items()}

    if unknown := sorted(set(thin["shared"].values()) - state.keys()):
        raise ValueError(f"`thin.shared` names the tensor {unknown[0]!r}, which no backbone has. Save it again.")
    return state | {name: state[other].clone() for name, other in thin["shared"].items()}


def weights_digest(folder: str) -> str:
    """
    Return the SHA-256 over the name, size and header of each safetensors file of a checkpoint; tensors are not read.

    Raises:
        ValueError: if one of them is no safetensors file.
    """
    digest = hashlib.sha256()
    for path in _weight_files(folder):
        with open(path, "rb") as file:
            length, size = file.read(8), os.path.getsize(path)
            if int.from_bytes(length, "little") > size:
                raise ValueError(f"{path} is no safetensors file. Fetch it again: `force_download=True`.")
            header = file.read(int.from_bytes(length, "little"))
        digest.update(f"{os.path.basename(path)} {size}\n".encode() + length + header)
    return digest.hexdigest()


def _fetch(entry: dict[str, Any], **hub_options) -> str:
    """The folder, in the cache, of a backbone's repository at its commit. Nothing else is ever read."""
    if not COMMIT.fullmatch(str(entry.get("revision"))):
        raise ValueError(
            f"A thin checkpoint names its backbones by commit, 40 hexadecimal digits; {entry.get('repository')!r} has "
            f"{entry.get('revision')!r}."
        )

    options = {name: hub_options[name] for name in DOWNLOAD_OPTIONS if name in hub_options}
    folder = snapshot_download(entry["repository"], revision=entry["revision"], allow_patterns=WEIGHT_FILES, **options)
    check_weight_names(folder, read_object(os.path.join(folder, "config.json")))
    return folder


def _load(folder: str, dtype) -> PreTrainedModel:
    """The model of the files that [`weights_digest`] has read."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, trust_remote_code=False)


def _weight_files(folder: str) -> list[str]:
    """What `from_pretrained` loads: one file where there is one, else all that the index names."""
    single, index = (os.path.join(folder, name) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    if os.path.exists(single):
        return [single]
    return [os.path.join(folder, name) for name in weight_files(index)]


def _embeddings(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    weight = model.get_input_embeddings().weight
    return {name: tensor for name, tensor in model.named_parameters() if tensor is weight}


def _check_equal(backbone: PreTrainedModel, original: PreTrainedModel, message: str):
    ours = backbone.state_dict()
    for name, tensor in original.state_dict().items():
        if name not in ours or not torch.equal(ours[name].cpu(), tensor):
            raise ValueError(
                f"{message}: the tensor {name} differs. Load it from there by name, or save with `thin=False`."
            )


__all__ = ["thin_checkpoint", "weights_digest", "whole_state"]
