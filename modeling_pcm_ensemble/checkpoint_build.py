"""What `from_experts` does: fetch the parts, check that they fit together, give the configuration and the parts."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .chat_templates import check_prompt, leading_bos, render_prompt, without_default_system_turn
from .checkpoint_fit import check_fit
from .checkpoint_io import PCMEnsemblePreTrainedModel
from .checkpoint_sources import SourceLoader
from .checkpoint_trust import check_trust
from .configuration_pcm_ensemble import ENDPOINT, EXPERT_FIELDS, PCMEnsembleConfig
from .preference import encode_description
from .requirements import endpoints

logger = logging.get_logger(__name__)

BESIDE_MODEL = ("prompt", "description", "dimension")
SPEC_FIELDS = ("model", "adapter", *BESIDE_MODEL)
ENDPOINT_FIELDS = ("endpoint", "served_model", "api", "top_logprobs", "timeout", "attempts", "on_failure", "key")


@dataclass
class Parts:
    """
    What an ensemble is assembled from.

    Args:
        config (`PCMEnsembleConfig`): the ensemble's.
        backbones (`list[PreTrainedModel]`): the experts' models, each once.
        pcm (`PreTrainedModel`): the PCM's body.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): the contexts'.
        adapters (`dict[str, dict[str, torch.Tensor]]`): LoRA tensors, by expert.
        generation_config (`GenerationConfig`): the first backbone's that runs here.
    """

    config: PCMEnsembleConfig
    backbones: list[PreTrainedModel]
    pcm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    adapters: dict[str, dict[str, torch.Tensor]]
    generation_config: GenerationConfig


def build_parts(
    experts: Mapping,
    pcm: str | os.PathLike | PreTrainedModel | PreTrainedConfig,
    pcm_layers: int | None = None,
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
    model_kwargs: dict[str, Any] | None = None,
    **config_kwargs,
) -> Parts:
    """Do the work of [`PCMEnsembleForCausalLM.from_experts`], which documents the arguments."""
    specs = expert_specs(experts, config_kwargs.get("expert_top_k"))
    check_trust(model_kwargs or {})

    loader = SourceLoader(model_kwargs or {})
    backbone_of = {name: loader.backbone(spec["model"], f"expert {name!r}") for name, spec in specs.items()}
    body = loader.pcm_body(pcm, pcm_layers)
    of_ensemble = loader.tokenizer(tokenizer)

    backbones = loader.backbones
    _fit_endpoints(loader, body, of_ensemble)
    check_fit(backbones, loader.labels, body, of_ensemble)
    main = next((i for i, backbone in enumerate(backbones) if backbone.config.model_type != ENDPOINT), 0)
    _check_generation_config(backbones[main].generation_config, loader.labels[main])

    bos = leading_bos(of_ensemble) if of_ensemble is not None else None
    entries: list[dict[str, Any]] = []
    adapters: dict[str, dict[str, torch.Tensor]] = {}
    for name, spec in specs.items():
        entry, tensors = _expert_entry(loader, name, spec, backbone_of[name], of_ensemble, bos)
        entries.append(entry)
        adapters |= tensors

    generation_config = backbones[main].generation_config
    fields = {
        "backbones": [backbone.config for backbone in backbones],
        "pcm": body.config,
        "experts": entries,
        "prefix_bos_token_id": bos,
        "bos_token_id": generation_config.bos_token_id,
        "eos_token_id": all_end_tokens(backbones),
        "pad_token_id": generation_config.pad_token_id,
    }
    config = PCMEnsembleConfig.from_dict(fields | config_kwargs)  # checked as a file would be

    of_contexts = _for_contexts(of_ensemble, entries)
    if of_contexts is not None and config.max_position_embeddings is not None:  # less than each model's, by its prefix
        of_contexts.model_max_length = min(of_contexts.model_max_length, config.max_position_embeddings)
    return Parts(config, backbones, body, of_contexts, adapters, generation_config)


def build_expert(
    model: PCMEnsemblePreTrainedModel, name: str, expert, model_kwargs: dict[str, Any]
) -> tuple[dict[str, Any], Parts]:
    """
    Do the work of [`PCMEnsembleForCausalLM.add_expert`] without touching the ensemble.

    Returns:
        The expert's entry in the configuration, and the parts with its own among them.
    """
    config = model.config
    known = list(model.backbones.endpoints.values())
    ((name, spec),) = expert_specs({name: expert}, config.expert_top_k, known).items()
    if name in config.expert_names:
        raise ValueError(f"The ensemble already has an expert {name!r}. Choose another name, or remove it first.")
    check_trust(model_kwargs)

    loader = SourceLoader(model_kwargs, list(model.backbones))
    index = loader.backbone(spec["model"], f"expert {name!r}")
    if spec.get("adapter") is None:  # whose revision it would be, else
        loader.check_revision(spec["model"], index, f"expert {name!r}")
    tokenizer = loader.tokenizer(model.tokenizer)
    _fit_endpoints(loader, model.pcm.body, tokenizer, len(model.backbones))
    check_fit(loader.backbones, loader.labels, model.pcm.body, tokenizer)

    entry, adapters = _expert_entry(loader, name, spec, index, tokenizer, config.prefix_bos_token_id)
    backbones = [backbone.config for backbone in loader.backbones]
    fields = config.to_dict() | {"backbones": backbones, "experts": [*config.experts, entry], "vocab_size": None}
    entry = PCMEnsembleConfig.from_dict(fields).experts[-1]  # checked as a file would be

    tokenizer = _for_contexts(tokenizer, [*config.experts, entry])
    return entry, Parts(config, loader.backbones, model.pcm.body, tokenizer, adapters, model.generation_config)


def expert_specs(
    experts: Mapping, expert_top_k: int | None = None, known: Sequence[PreTrainedModel] = ()
) -> dict[str, dict[str, Any]]:
    """
    Bring what `experts` may hold into one form: name → mapping with `model` and what else was given. An endpoint is
    asked for the `expert_top_k` most probable tokens, if it does not say for how many; `known` ones are shared.

    Raises:
        TypeError, ValueError: naming the expert that is not as [`PCMEnsembleForCausalLM.from_experts`] says.
    """
    if not isinstance(experts, Mapping):
        raise TypeError(
            "`experts` must map names to a repository, folder, `PreTrainedModel` or mapping, got "
            f"{type(experts).__name__}."
        )
    if not experts:
        raise ValueError("`experts` is empty. An ensemble needs at least one expert.")

    asked = {} if expert_top_k is None else {"top_logprobs": expert_top_k}
    served: list[Any] = list(known)  # experts that name one endpoint alike share it
    specs = {}
    for name, spec in experts.items():
        name = _expert_name(name)
        if isinstance(spec, Mapping) and "endpoint" in spec:
            spec = _served_spec(name, {**asked, **spec}, served)
        specs[name] = _expert_spec(name, spec)
    return specs


def all_end_tokens(backbones: list[PreTrainedModel]) -> int | list[int] | None:
    """Return whatever token one of the experts ends a text with, as a generation config holds it."""
    return joined_end_tokens([backbone.generation_config.eos_token_id for backbone in backbones])


def joined_end_tokens(several: list[int | list[int] | None]) -> int | list[int] | None:
    """Join end tokens as generation configs hold them."""
    ids: list[int] = []
    for found in several:
        ids += found if isinstance(found, list) else [] if found is None else [found]

    ids = list(dict.fromkeys(ids))
    if not ids:
        return None
    return ids[0] if len(ids) == 1 else ids


def set_end_tokens(generation_config: GenerationConfig, ids: int | list[int] | None):
    """
    Set the end tokens of a generation config, which stays one that may be saved as it was published.

    transformers warns of settings that do not go together in a generation config that is as it was published, and
    refuses to save them in one that was changed. It tells the two apart by this attribute, and has no other way to say
    that a change is meant.
    """
    unchanged = _is_unchanged(generation_config)
    generation_config.eos_token_id = ids
    if unchanged:
        generation_config._original_object_hash = hash(generation_config)


def _check_generation_config(generation_config: GenerationConfig, label: str):
    """Refuse what transformers will not save; of one that is as it was published, it only warns."""
    if _is_unchanged(generation_config):
        return

    try:
        generation_config.validate(strict=True)
    except ValueError as error:
        raise ValueError(
            f"The `generation_config` of {label} could not be saved with the ensemble: {error}"
        ) from error


def _is_unchanged(generation_config: GenerationConfig) -> bool:
    return getattr(generation_config, "_original_object_hash", None) == hash(generation_config)


def _expert_name(name) -> str:
    if not isinstance(name, str) or not name:
        raise TypeError(f"Experts' names must be non-empty strings, got {name!r}.")
    return name


def _served_spec(name: str, spec: dict[str, Any], served: list[Any]) -> dict[str, Any]:
    """Put a model that asks the endpoint in the place of what describes it."""
    if "model" in spec or "adapter" in spec:
        raise ValueError(
            f"Expert {name!r} has an `endpoint`, where its model and adapter are. Leave `model` and `adapter` out; "
            "`served_model` is its name there."
        )

    _check_fields(name, spec, ENDPOINT_FIELDS + BESIDE_MODEL)
    fields = {field: spec[field] for field in ENDPOINT_FIELDS if field in spec}
    new = endpoints().EndpointForCausalLM.of_expert(name, fields)
    same = next((other for other in served if other.allowed and new.asks_like(other)), new)
    if same is new:
        served.append(new)
    others = {field: value for field, value in spec.items() if field not in ENDPOINT_FIELDS}
    return others | {"model": same}


def _fit_endpoints(
    loader: SourceLoader, body: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, start: int = 0
):
    """Let endpoints, from backbone `start` on, know the vocabulary, and check that they read texts as it has them."""
    served: list[tuple[str, Any]] = list(zip(loader.labels, loader.backbones))[start:]
    for label, backbone in served:
        if backbone.config.model_type == ENDPOINT:
            backbone.fit(body, tokenizer, label)


def _check_fields(name: str, spec: Mapping[str, Any], accepted: tuple[str, ...]):
    if unknown := sorted(set(spec) - set(accepted)):
        raise ValueError(f"Expert {name!r} has the unknown fields {unknown}. Accepted are {', '.join(accepted)}.")


def _expert_spec(name: str, spec) -> dict[str, Any]:
    if not isinstance(spec, Mapping):
        spec = {"model": spec}
    _check_fields(name, spec, SPEC_FIELDS)

    for text_field in BESIDE_MODEL:
        if not isinstance(spec.get(text_field), str | None):
            raise TypeError(f"`{text_field}` of expert {name!r} must be a string, got {spec[text_field]!r}.")

    if hasattr(spec.get("model"), "merge_and_unload"):
        raise TypeError(
            f"`model` of expert {name!r} is a PEFT model. Give its base as `model` and its folder as `adapter`, or "
            "merge it: `merge_and_unload()`."
        )
    if not isinstance(spec.get("model"), (str, os.PathLike, PreTrainedModel)):
        raise TypeError(
            f"`model` of expert {name!r} must be a repository, folder or `PreTrainedModel`, got "
            f"{type(spec.get('model')).__name__}."
        )
    return dict(spec)


def _expert_entry(
    loader: SourceLoader,
    name: str,
    spec: Mapping[str, Any],
    backbone: int,
    tokenizer: PreTrainedTokenizerBase | None,
    bos: int | None,
) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    """The expert's entry in the configuration, its texts tokenised once and for all; and its adapter, by its name."""
    prompt, description = spec.get("prompt"), spec.get("description")
    if tokenizer is None and (prompt or description):
        raise ValueError(
            f"Expert {name!r} has a `{'prompt' if prompt else 'description'}`, but none of the models has a tokenizer "
            "to read it. Pass `tokenizer=`."
        )

    description = description or prompt or name
    entry: dict[str, Any] = EXPERT_FIELDS | {
        "name": name,
        "backbone": backbone,
        "prompt": prompt,
        "description": description,
        "dimension": spec.get("dimension"),
    }
    if tokenizer is not None:
        entry["description_ids"] = encode_description(tokenizer, description)
    if tokenizer is not None and prompt:
        check_prompt(tokenizer, prompt, bos, f"Expert {name!r}")
        entry["prompt_ids"] = render_prompt(tokenizer, prompt, bos)

    if spec.get("adapter") is None:
        return entry, {}
    of_adapter, tensors = loader.adapter(spec["adapter"], backbone, f"The adapter of expert {name!r}")
    return entry | of_adapter, {name: tensors}


def _for_contexts(tokenizer: PreTrainedTokenizerBase | None, experts: list[dict]) -> PreTrainedTokenizerBase | None:
    """The tokenizer for the contexts of these experts: where one has a prompt, without a default system turn."""
    if tokenizer is None or not any(expert["prompt"] for expert in experts):
        return tokenizer

    of_ensemble = without_default_system_turn(tokenizer)
    unprompted = [expert["name"] for expert in experts if not expert["prompt"]]
    if unprompted and of_ensemble.chat_template != tokenizer.chat_template:
        logger.warning(
            f"The chat template writes a system turn of its own, which chats lose where an expert has a prompt. The "
            f"experts {', '.join(unprompted)} have none, and read chats without any system turn from now on, as the "
            "PCM does. To keep it for them, give them its text as their `prompt`."
        )
    return of_ensemble


__all__ = [
    "Parts",
    "all_end_tokens",
    "build_expert",
    "build_parts",
    "expert_specs",
    "joined_end_tokens",
    "set_end_tokens",
]
