"""What the files of a checkpoint may ask for. Together with SECURITY.md."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from .checkpoint_hub import find_file
from .configuration_pcm_ensemble import ENDPOINT


def check_weight_names(source: str | os.PathLike, config: dict[str, Any], variant: str | None = None, **hub_options):
    """
    Refuse a checkpoint, of a folder or of the Hub, whose weights would not be the safetensors beside its config.json:
    named elsewhere, or, where PEFT is installed, those of another model and an adapter on it.

    Args:
        source (`str` or `os.PathLike`): the folder or repository.
        config (`dict`): what its config.json says.
        variant (`str`, *optional*): of the weights.
        hub_options: where files come from, see [`~checkpoint_hub.HUB_OPTIONS`].

    Raises:
        ValueError: naming the file and what it names.
    """
    if config.get("transformers_weights") is not None:
        raise ValueError(
            f"The configuration of {str(source)!r} names its weights itself, by `transformers_weights` "
            f"{config['transformers_weights']!r}. Rename that file to model.safetensors."
        )
    if find_file(source, "adapter_config.json", **hub_options) is not None:
        raise ValueError(
            f"{str(source)!r} holds a PEFT adapter. Give an expert its base as `model`, and it as `adapter`."
        )

    suffix = ".json" if variant is None else f".{variant}.json"
    index = find_file(source, SAFE_WEIGHTS_INDEX_NAME.replace(".json", suffix), **hub_options)
    if index is None:
        return

    for name in weight_files(index):
        if os.path.basename(name) != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names the weights {name!r}. They must be safetensors beside it.")


def server_address(endpoint: str) -> str:
    """Return an endpoint without a slash, and without the `/v1` of OpenAI's protocol, at its end."""
    return endpoint.rstrip("/").removesuffix("/v1")


def endpoint_addresses(name: str, given: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """
    Read endpoints' addresses, with or without `/v1` or a slash at their end.

    Raises:
        TypeError: if they are no list, or no mapping, of texts.
    """
    wanted = Mapping if name == "endpoint_keys" else Sequence
    if isinstance(given, str) or not isinstance(given, wanted) or not all(isinstance(entry, str) for entry in given):
        example = "{'http://gpu-7:8000': 'GPU_7_KEY'}" if wanted is Mapping else "['http://gpu-7:8000']"
        raise TypeError(f"`{name}` must hold addresses, such as {example}.")  # what was given may be a key
    return [server_address(address) for address in given]


def check_endpoints(backbones: list[Any], allowed: list[str] | None, label: str):
    """
    Refuse endpoints, of a checkpoint's configuration, that the user has not named too.

    Args:
        backbones (`list`): the configuration's, as objects or as they stand in config.json.
        allowed (`list[str]`, *optional*): from [`endpoint_addresses`]; None allows all.
        label (`str`): names the checkpoint in errors.

    Raises:
        PermissionError: naming the endpoint.
    """
    for backbone in backbones:
        fields = backbone.to_dict() if isinstance(backbone, PreTrainedConfig) else backbone
        if allowed is None or not isinstance(fields, dict) or fields.get("model_type") != ENDPOINT:
            continue
        if server_address(str(fields.get("endpoint"))) not in allowed:
            raise PermissionError(
                f"{label!r} names the endpoint {fields.get('endpoint')!r}, to which your texts would be sent. If you "
                f"know whose it is, load it with `allow_endpoints=[{fields.get('endpoint')!r}]`."
            )


def weight_files(index: str) -> list[str]:
    """
    Return the files that an index of weights names, sorted.

    Raises:
        ValueError: if it is none.
    """
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(
            f"{index} must be an object whose `weight_map` gives each tensor's file. Save the model again."
        )
    return sorted(set(places.values()))


def read_object(path: str | os.PathLike) -> dict:
    """
    Return the object that a JSON file holds.

    Raises:
        ValueError: naming the file, if that is no JSON object.
    """
    with open(path, encoding="utf-8") as file:
        try:
            content = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is no JSON file: {error}. Save or fetch it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {content!r:.60}. Save or fetch it again.")
    return content


def check_trust(model_kwargs: dict[str, Any]):
    """
    Refuse `trust_remote_code` for all parts of an ensemble at once.

    Raises:
        ValueError: if it is asked for.
    """
    if model_kwargs.get("trust_remote_code"):
        raise ValueError(
            "`trust_remote_code` is not passed on to experts, which must be models of the transformers library. For a "
            "tokenizer with code of its own, load it yourself and pass it as `tokenizer`."
        )


__all__ = [
    "check_endpoints",
    "check_trust",
    "check_weight_names",
    "endpoint_addresses",
    "read_object",
    "server_address",
    "weight_files",
]
