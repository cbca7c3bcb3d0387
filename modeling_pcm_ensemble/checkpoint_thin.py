"""Thin checkpoints: PCM and adapters alone, each backbone named by repository and commit instead of stored."""

import hashlib
import os
import re

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import resolve_revision

from .checkpoint_trust import check_weight_names, read_object, weight_files

COMMIT = re.compile(r"[0-9a-f]{40}")
WEIGHT_FILES = ("config.json", "generation_config.json", "model*.safetensors", SAFE_WEIGHTS_INDEX_NAME)
DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")


def hub_source(name: str | os.PathLike, **hub_options) -> dict | None:
    """Repository, commit and subfolder, if one is given, of what `from_pretrained(name)` loads; None for a folder."""
    if not name or os.path.exists(name):
        return None
    known = ("revision", "token", "local_files_only", "cache_dir")
    revision = resolve_revision(name, **{key: hub_options[key] for key in known if key in hub_options})
    source = {"repository": str(name), "revision": getattr(revision, "resolved", revision)}
    return source | ({"subfolder": hub_options["subfolder"]} if hub_options.get("subfolder") else {})


def thin_checkpoint(model: PreTrainedModel, **hub_options) -> tuple[dict[str, torch.Tensor], dict]:
    r"""
    What a thin checkpoint of an ensemble holds.

    Returns:
        The tensors, and `config.thin`: each backbone's `repository`, `revision` (a commit) and `digest`, see
        [`weights_digest`]; and under `shared` the PCM's tensors that are not stored, because a backbone has them.

    Raises:
        ValueError: if a backbone is not what a Hub repository holds.
        OSError: if that repository cannot be reached, nor found in the cache.
    """
    backbones, owned, embeddings = [], set(), {}
    for index, backbone in enumerate(model.backbones):
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
        backbones.append(source | {"digest": weights_digest(folder)})
    shared = {
        f"pcm.body.{name}": other
        for name, tensor in _embeddings(model.pcm.body).items()
        for other, theirs in embeddings.items()
        if torch.equal(tensor, theirs)
    }
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in owned and name not in shared}
    return state, {"backbones": backbones, "shared": shared}


def whole_state(thin: dict, source: str, variant: str | None = None, **hub_options) -> dict[str, torch.Tensor]:
    """
    The tensors of the ensemble that a thin checkpoint stands for.

    Args:
        thin (`dict`): its `config.thin`.
        source (`str`): its folder or repository.

    Raises:
        ValueError: if a repository's weights are not those that it was saved with.
        OSError: if files cannot be fetched, nor found in the cache.
    """
    name = SAFE_WEIGHTS_NAME if variant is None else SAFE_WEIGHTS_NAME.replace(".safe", f".{variant}.safe")
    state = load_file(cached_file(source, name, **hub_options))
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
    """SHA-256 over the name, size and header of each safetensors file of a checkpoint; tensors are not read."""
    digest = hashlib.sha256()
    for path in _weight_files(folder):
        with open(path, "rb") as file:
            length, size = file.read(8), os.path.getsize(path)
            if int.from_bytes(length, "little") > size:
                raise ValueError(f"{path} is no safetensors file. Fetch it again: `force_download=True`.")
            header = file.read(int.from_bytes(length, "little"))
        digest.update(f"{os.path.basename(path)} {size}\n".encode() + length + header)
    return digest.hexdigest()


def _fetch(entry: dict, **hub_options) -> str:
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


__all__ = ["hub_source", "thin_checkpoint", "weights_digest", "whole_state"]
