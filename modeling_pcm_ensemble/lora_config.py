"""What a LoRA adapter's configuration may say, wherever it comes from, and which layers it means."""

import copy
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from transformers.utils import logging

try:
    import regex  # unlike `re`, it can be stopped; transformers requires it too
except ImportError as error:
    raise ImportError("Adapters' layers are found with regex. Install it with `pip install regex`.") from error

logger = logging.get_logger(__name__)

# What decides the function that an adapter computes, with PEFT's defaults.
FIELDS: dict[str, Any] = {
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
    "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
# What makes an adapter more than plain LoRA on linear layers, unless it is left at nothing.
UNSUPPORTED = {
    "alora_invocation_tokens", "arrow_config", "bias", "kasa_config", "layer_replication", "lora_bias",
    "modules_to_save", "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora",
    "use_qalora", "velora_config",
}  # fmt: skip
# PEFT's other ones take what they start from off the base weights, which the adapter's file does not hold.
INITIALISATIONS = ("gaussian", "eva", "orthogonal", "mica")
NEWEST_PEFT = (0, 21)  # whose LoraConfig has the fields above and no others

PATTERN_SECONDS = 10.0  # for one adapter's regular expressions; with one for each of 882 layers they take two


def adapter_config(config: Mapping, label: str) -> dict[str, Any]:
    """
    Check a PEFT configuration, and keep of it what [`adapted_paths`] reads.

    Args:
        config (`Mapping`): shaped as PEFT's `LoraConfig`.
        label (`str`): names the adapter in errors.

    Raises:
        TypeError, ValueError: naming the field, if it has a value that PEFT could not use, or asks for something else
            than plain LoRA on linear layers of an unchanged base.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"{label} must be a mapping shaped as PEFT's `LoraConfig`, got {config!r}.")
    _check_kind(config, label)

    kept = copy.deepcopy(FIELDS) | {name: config[name] for name in FIELDS if config.get(name) is not None}
    for name in ("target_modules", "exclude_modules"):
        if isinstance(kept[name], (set, frozenset, tuple)):
            kept[name] = sorted(kept[name], key=str)
    if not kept["target_modules"]:
        raise ValueError(f"{label} names no `target_modules`.")

    for name, (is_valid, expected) in RULES.items():
        if not is_valid(kept[name]):
            raise ValueError(f"`{name}` of {label} must be {expected}, got {kept[name]!r}.")
    _check_patterns(kept, label)

    if isinstance(kept["target_modules"], list):
        kept["target_modules"] = sorted(kept["target_modules"])
    return kept


def _check_kind(config: Mapping, label: str):
    """Refuse what is not plain LoRA on the base as it is, and warn of what nobody knows."""
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{label} is of the PEFT type {config['peft_type']!r}. Only LORA is supported.")

    initialisation = config.get("init_lora_weights")
    if not _leaves_the_base(initialisation):
        raise ValueError(
            f"{label} has `init_lora_weights` {initialisation!r}, which changes the base's weights, while an ensemble "
            "keeps them. In PEFT, convert it to plain LoRA: `save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=…)`, or merge it and give the merged model as the expert's "
            "`model`."
        )

    used = {name: value for name, value in config.items() if value and not (name == "bias" and value == "none")}
    if unsupported := sorted(used.keys() & UNSUPPORTED):
        name = unsupported[0]
        raise ValueError(f"{label} uses `{name}` ({config[name]!r}), which is not supported. Only plain LoRA is.")

    unknown = [name for name in used if name not in {*FIELDS, *IGNORED, "peft_type", "init_lora_weights"}]
    if unknown and _version(config) > NEWEST_PEFT:
        raise ValueError(
            f"{label} uses `{unknown[0]}` ({config[unknown[0]]!r}), and PEFT {config['peft_version']}, which saved "
            "it, may know more than this library. Take the field out if it changes nothing."
        )
    if unknown:
        logger.warning(f"{label} has the fields {unknown}, which PEFT does not read. They are ignored.")


def _leaves_the_base(initialisation) -> bool:
    if isinstance(initialisation, str):
        return initialisation.lower() in INITIALISATIONS
    return isinstance(initialisation, bool | None)


def _version(config: Mapping) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", str(config.get("peft_version") or ""))[:2])


def _is_integer(value, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_rank(value) -> bool:
    return _is_integer(value, 1, 2**16)


def _is_scale(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 3.4e38  # NaN is not


def _is_names(value) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_mapping(value, is_valid: Callable[[Any], bool]) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) and is_valid(v) for key, v in value.items())


def _or_none(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_valid(value)


RANK, NAMES = "a whole number from 1 to 65536", "a string or a list of strings"
SCALE = "a number that float32 can hold"
# Of each field, what its value must be, and how to say so.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, RANK),
    "lora_alpha": (_is_scale, SCALE),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
    "target_modules": (_is_names, NAMES),
    "exclude_modules": (_or_none(_is_names), NAMES),
    "layers_to_transform": (
        lambda value: all(_is_integer(index, 0, 2**31) for index in _listed(value)),
        "a layer's number or a list of them",
    ),
    "layers_pattern": (_or_none(_is_names), NAMES),
    "rank_pattern": (lambda value: _is_mapping(value, _is_rank), f"a mapping, each value {RANK}"),
    "alpha_pattern": (lambda value: _is_mapping(value, _is_scale), f"a mapping, each value {SCALE}"),
}


def _check_patterns(config: dict, label: str):
    for name, patterns in _patterns(config).items():
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"`{name}` of {label} is no regular expression: {pattern!r} ({error}).") from error


def _patterns(config: dict) -> dict[str, list[str]]:
    """The regular expressions of each field."""
    names = {name: config[name] for name in ("target_modules", "exclude_modules", "layers_pattern")}
    found = {name: [value] for name, value in names.items() if isinstance(value, str)}
    found["layers_pattern"] = [_layer(pattern) for pattern in _listed(config["layers_pattern"])]
    return found | {name: [_ending(key) for key in config[name]] for name in ("rank_pattern", "alpha_pattern")}


def _listed(value) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]


def _layer(pattern: str) -> str:
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


class _Matcher:
    """Matches regular expressions, which may be a stranger's, for no longer than [`PATTERN_SECONDS`] in all."""

    def __init__(self):
        self.compiled: dict[str, regex.Pattern] = {}
        self.deadline = time.monotonic() + PATTERN_SECONDS

    def __call__(self, pattern: str, path: str, field: str, whole: bool = False) -> regex.Match | None:
        try:
            if pattern not in self.compiled:
                self.compiled[pattern] = regex.compile(pattern)

            match = self.compiled[pattern].fullmatch if whole else self.compiled[pattern].match
            if (seconds_left := self.deadline - time.monotonic()) <= 0:
                raise TimeoutError
            return match(path, timeout=seconds_left)
        except (TimeoutError, MemoryError, RecursionError, regex.error) as error:
            raise ValueError(
                f"`{field}` of an adapter has regular expressions that could not be matched within "
                f"{PATTERN_SECONDS:.0f} seconds: {pattern!r}. Name the layers instead."
            ) from error


def adapted_paths(paths: list[str], output_path: str | None, adapter: dict) -> dict[str, tuple[int, float]]:
    """
    Find the layers that PEFT would adapt.

    Args:
        paths (`list[str]`): of the model's linear layers.
        output_path (`str`, *optional*): of its output layer, which `"all-linear"` leaves out.
        adapter (`dict`): from [`adapter_config`].

    Returns:
        `dict[str, tuple[int, float]]`: path → (rank, scale).

    Raises:
        ValueError: if a regular expression takes too long.
    """
    match = _Matcher()

    def of_path(path: str, field: str, default):
        """The value of the first pattern that a path ends with."""
        values = (value for key, value in adapter[field].items() if match(_ending(key), path, field))
        return next(values, default)

    layers = {}
    for path in paths:
        if not _is_target(match, path, adapter, is_output=path == output_path):
            continue

        rank = of_path(path, "rank_pattern", adapter["r"])
        alpha = of_path(path, "alpha_pattern", adapter["lora_alpha"])
        layers[path] = (rank, alpha / (math.sqrt(rank) if adapter["use_rslora"] else rank))
    return layers


def _is_target(match: _Matcher, path: str, adapter: dict, is_output: bool) -> bool:
    target, excluded = adapter["target_modules"], adapter["exclude_modules"]
    if isinstance(excluded, str):
        if excluded and match(excluded, path, "exclude_modules", whole=True):
            return False
    elif excluded and _ends_with(path, excluded):
        return False

    if isinstance(target, str):
        if target.lower() == "all-linear":
            return not is_output
        return match(target, path, "target_modules", whole=True) is not None
    if path in target:
        return True
    return _ends_with(path, target) and _is_in_layers(match, path, adapter)


def _is_in_layers(match: _Matcher, path: str, adapter: dict) -> bool:
    indexes = _listed(adapter["layers_to_transform"])
    if not indexes:
        return True
    patterns = [_layer(pattern) for pattern in _listed(adapter["layers_pattern"] or None)]
    patterns = patterns or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    found = next((m for pattern in patterns if (m := match(pattern, path, "layers_pattern"))), None)
    return found is not None and int(found["idx"]) in indexes


def _ends_with(path: str, names: list[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


__all__ = ["adapted_paths", "adapter_config"]
