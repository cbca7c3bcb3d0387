"""Loading what `from_experts` names: models, each once, the PCM's body, adapters and tokenizers."""

import copy
import os
from dataclasses import dataclass, field
from json import JSONDecodeError
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .checkpoint_fit import check_same_vocabulary, check_serves_rows
from .checkpoint_hub import HUB_OPTIONS, find_file, hub_source
from .checkpoint_structure import check_loading, check_structure, load_with_info
from .checkpoint_trust import check_weight_names
from .configuration_pcm_ensemble import ENDPOINT, check_is_causal_lm
from .lora_peft_format import adapter_place, fit_adapter, read_adapter


@dataclass
class SourceLoader:
    """
    Loads each model once.

    Args:
        model_kwargs (`dict`): `from_pretrained`'s.
        backbones (`list[PreTrainedModel]`, *optional*): those that are there already.
    """

    model_kwargs: dict[str, Any]
    backbones: list[PreTrainedModel] = field(default_factory=list)

    def __post_init__(self):
        self.labels = [f"backbone {index}" for index in range(len(self.backbones))]  # name each backbone in errors
        self._sources: list[str | os.PathLike | PreTrainedModel] = []  # of what is loaded, in this order
        self._indexes: dict[int | str, int] = {}  # of backbones, by source

        for index, backbone in enumerate(self.backbones):
            self._indexes[id(backbone)] = index
            if backbone.name_or_path:
                self._indexes[_source_key(backbone.name_or_path)] = index

    def backbone(self, source: str | os.PathLike | PreTrainedModel, label: str) -> int:
        """
        Return the index of the backbone that `source` names, which is loaded if it is not there yet.

        Raises:
            ValueError: if it cannot be an expert's, see [`~PCMEnsembleForCausalLM.from_experts`].
            OSError: if it cannot be fetched.
        """
        key = _source_key(source)
        if key not in self._indexes:
            self._indexes[key] = len(self.backbones)
            self.backbones.append(self._causal_lm(source, label))
            self.labels.append(label)
            self._sources.append(source)
        return self._indexes[key]

    def check_revision(self, source: str | os.PathLike | PreTrainedModel, index: int, label: str):
        """
        Refuse another revision than the one that is there: a repository's name stands for one backbone.

        Raises:
            ValueError: if `model_kwargs` ask for another one.
            OSError: if that cannot be found.
        """
        if isinstance(source, PreTrainedModel) or "revision" not in self.model_kwargs:
            return
        found, config = hub_source(source, **self._hub_options()), self.backbones[index].config
        there = (getattr(config, "source", None) or {}).get("revision") or getattr(config, "_commit_hash", None)
        if found is not None and (there is None or found["revision"] != there):
            raise ValueError(
                f"The model of {label}, {str(source)!r}, is there already at the revision {there or 'unknown'}, and "
                f"{found['revision']} is asked for. Load that one yourself, and pass the model."
            )

    def adapter(self, source, backbone: int, label: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """
        Return what a LoRA adapter that fits a backbone adds to its expert's entry, and its tensors.

        Raises:
            TypeError, ValueError, OSError: see [`read_adapter`] and [`fit_adapter`].
        """
        config, tensors = read_adapter(source, label, self._hub_options())
        tensors = fit_adapter(self.backbones[backbone], config, tensors, label)

        place = adapter_place(source, label, self._hub_options())
        found = None if place is None else hub_source(place[0], **place[1])
        return {"adapter": config, "source": found}, tensors

    def pcm_body(self, source: str | os.PathLike | PreTrainedModel | PreTrainedConfig, num_layers: int | None):
        """
        Return the PCM's body: a causal LM's, cut to its first `num_layers`, with weights of its own.

        Raises:
            TypeError, ValueError: if there is no such model, or its body is not to be had without its LM head.
            OSError: if it cannot be fetched.
        """
        if isinstance(source, PreTrainedConfig):
            config = _first_layers(source, num_layers)
            check_is_causal_lm(config, "the PCM")
            dtype = self._dtype or torch.get_default_dtype()
            return AutoModel.from_config(config, dtype=dtype, **self._options("attn_implementation"))

        model = self._pcm_model(source)
        self._sources.append(source)
        whole = model.base_model
        assert isinstance(whole, PreTrainedModel)  # which transformers' annotation leaves open
        body = AutoModel.from_config(_first_layers(whole.config, num_layers), dtype=self._dtype or whole.dtype)
        body = body.to(whole.device)

        weights = whole.state_dict()
        if missing := sorted(body.state_dict().keys() - weights.keys()):
            raise ValueError(
                f"The PCM cannot be made from a {type(model).__name__}: as a model without LM head it would need the "
                f"tensor {missing[0]}. Use another causal LM."
            )
        body.load_state_dict({name: weights[name] for name in body.state_dict()})
        return body.eval()

    def tokenizer(self, given: str | os.PathLike | PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase | None:
        """
        Return a copy of the tokenizer given, else of the first part's that has one; None without any.

        Raises:
            ValueError: if a part has another vocabulary.
        """
        found = []
        if isinstance(given, PreTrainedTokenizerBase):
            found.append(("`tokenizer`", given))
        elif given is not None:
            found.append(("`tokenizer`", AutoTokenizer.from_pretrained(given, **self._hub_options())))

        names = [s.name_or_path if isinstance(s, PreTrainedModel) else str(s) for s in self._sources]
        for name in dict.fromkeys(filter(None, names)):
            if (own := load_tokenizer(name, **self._hub_options())) is not None:
                found.append((repr(name), own))

        for label, other in found[1:]:
            check_same_vocabulary(*found[0], label, other, may_differ_in_size=given is not None)
        return copy.deepcopy(found[0][1]) if found else None

    def _causal_lm(self, source: str | os.PathLike | PreTrainedModel, label: str, learns: bool = False):
        if not isinstance(source, PreTrainedModel):
            return self._from_pretrained(source, label, learns)

        check_is_causal_lm(source.config, label)
        if not source.can_generate():
            raise ValueError(
                f"The model of {label} is a {type(source).__name__}, which has no LM head. Load it with "
                "`AutoModelForCausalLM`."
            )
        if not learns:  # the PCM is a copy
            check_structure(source, label)
        if source.config.model_type != ENDPOINT:  # which answers for itself
            check_serves_rows(source, label)
        return source

    def _from_pretrained(self, source: str | os.PathLike, label: str, learns: bool):
        options = {name: value for name, value in self._hub_options().items() if name != "trust_remote_code"}
        found = hub_source(source, **options)
        if found is not None:
            options["revision"] = found["revision"]  # what is named is what is loaded

        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
        check_is_causal_lm(config, label)
        check_weight_names(source, vars(config), self.model_kwargs.get("variant"), **options)

        options |= {"trust_remote_code": False}
        options = {"ignore_mismatched_sizes": True} | self.model_kwargs | options  # refused below, by name
        if learns:
            options.pop("quantization_config", None)
        if "gguf_file" not in options:
            options["use_safetensors"] = True

        model, loading = load_with_info(AutoModelForCausalLM.from_pretrained, source, **options)
        check_loading(loading, model.state_dict(), f"the checkpoint of {label}, {str(source)!r}")
        if found is not None:
            model.config.source = found
        check_serves_rows(model, label)
        return model

    def _pcm_model(self, source: str | os.PathLike | PreTrainedModel) -> PreTrainedModel:
        """The causal LM whose body the PCM copies: a backbone where it is one, unless that is quantised."""
        index = self._indexes.get(_source_key(source))
        backbone = None if index is None else self.backbones[index]
        if backbone is not None and not getattr(backbone, "is_quantized", False):
            return backbone

        model = self._causal_lm(source, "the PCM", learns=True)
        if getattr(model, "is_quantized", False):
            raise ValueError(
                "The PCM is to learn, so that it cannot be made from a quantised model. Name its checkpoint."
            )
        return model

    @property
    def _dtype(self) -> torch.dtype | None:
        """The backbones'; an endpoint has none of its own."""
        return next((b.dtype for b in self.backbones if b.config.model_type != ENDPOINT), None)

    def _hub_options(self) -> dict[str, Any]:
        return self._options(*HUB_OPTIONS)

    def _options(self, *names: str) -> dict[str, Any]:
        return {name: self.model_kwargs[name] for name in names if name in self.model_kwargs}


def load_tokenizer(source: str, **options) -> PreTrainedTokenizerBase | None:
    """
    Load the tokenizer of a folder or repository; None if it has none.

    Raises:
        ValueError: if its files cannot be read.
        OSError: if they cannot be fetched.
    """
    hub_options = {name: value for name, value in options.items() if name in (*HUB_OPTIONS, "subfolder")}
    hub_options.pop("trust_remote_code", None)
    if not any(find_file(source, name, **hub_options) for name in ("tokenizer_config.json", "tokenizer.json")):
        return None

    try:
        return AutoTokenizer.from_pretrained(source, **{"trust_remote_code": False} | options)
    except (AttributeError, KeyError, TypeError, JSONDecodeError) as error:  # the first would vanish in a property
        raise ValueError(
            f"The tokenizer's files in {source!r} cannot be read ({type(error).__name__}: {error}). Save it again."
        ) from error


def _source_key(source: str | os.PathLike | PreTrainedModel) -> int | str:
    """Equal for two sources that name the same model."""
    if isinstance(source, PreTrainedModel):
        return id(source)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            "`pcm` must be a repository, folder, `PreTrainedModel` or `PreTrainedConfig`, got "
            f"{type(source).__name__}."
        )
    return os.path.realpath(source) if os.path.isdir(source) else str(source)


def _first_layers(config: PreTrainedConfig, num_layers: int | None) -> PreTrainedConfig:
    """A copy of `config` with `num_layers` layers."""
    config = copy.deepcopy(config)
    if num_layers is None:
        return config

    whole = config.num_hidden_layers
    if not 1 <= num_layers <= whole:
        raise ValueError(
            f"`pcm_layers` must be between 1 and {whole}, the layers of the PCM's model; got {num_layers}."
        )
    for name, value in vars(config).items():
        if "layer" in name and isinstance(value, list) and len(value) == whole:  # such as `layer_types`
            setattr(config, name, value[:num_layers])
    config.num_hidden_layers = num_layers
    return config


__all__ = ["SourceLoader", "load_tokenizer"]
