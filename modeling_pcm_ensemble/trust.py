"""What the files of a checkpoint may ask for. Together with SECURITY.md."""

import glob
import json
import os


def check_shard_names(folder: str | os.PathLike):
    """
    Refuse a local checkpoint whose index names weights outside its folder, or none that are safetensors. In one from
    the Hub, huggingface_hub refuses such names itself.

    Raises:
        ValueError: naming the file and what it names.
    """
    for index in glob.glob(os.path.join(glob.escape(os.fspath(folder)), "*.index*.json")):
        with open(index, encoding="utf-8") as file:
            names = set(json.load(file)["weight_map"].values())
        for name in sorted(names):
            if os.path.basename(name) != name or not name.endswith(".safetensors"):
                raise ValueError(f"{index} names the weights {name!r}. They must be safetensors beside it.")


def check_trust(model_kwargs: dict):
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


__all__ = ["check_shard_names", "check_trust"]
