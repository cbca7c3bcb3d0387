"""What `from_experts` does: fetch the parts, check that they fit together, give the configuration and the parts."""

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from json import JSONDecodeError
from types import SimpleNamespace

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file, logging

from .chat_templates import check_prompt, leading_bos, render_prompt, without_default_system_turn
from .checkpoint_structure import check_loading, check_nothing_shared, check_structure
from .checkpoint_thin import hub_source
from .checkpoint_trust import check_trust, check_weight_names
from .configuration_pcm_ensemble import PCMEnsembleConfig, check_is_causal_lm
from .lora_peft_format import adapter_place, fit_adapter, read_adapter
from .memory import Memory
from .preference import encode_description
from .rows import Rows
from .submodel import Submodel

logger = logging.get_logger(__name__)

SPEC_FIELDS = ("model", "adapter", "prompt", "description", "dimension")
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token", "trust_remote_code")


@dataclass
class Parts:
    """
    What an ensemble is assembled from. `pcm` is the PCM's body; `tokenizer` may be None; `adapters` are tensors by
    expert.
    """

    config: PCMEnsembleConfig
    backbones: list[PreTrainedModel]
    pcm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    adapters: dict[str, dict[str, torch.Tensor]]


def build_parts(
    experts: Mapping,
    pcm: str | os.PathLike | PreTrainedModel | PreTrainedConfig,
    pcm_layers: int | None = None,
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
    model_kwargs: dict | None = None,
    **config_kwargs,
) -> Parts:
    """Do the work of [`PCMEnsembleForCausalLM.from_experts`], which documents the arguments."""
    specs = expert_specs(experts)
    check_trust(model_kwargs or {})

    loader = _Loader(model_kwargs or {})
    backbone_of = [loader.backbone(spec["model"], f"expert {name!r}") for name, spec in specs.items()]
    body = loader.pcm_body(pcm, pcm_layers)
    tokenizer = loader.tokenizer(tokenizer)

    backbones = loader.backbones
    labels = [*loader.labels, "the PCM"]
    _check_vocabularies([*backbones, body], labels, tokenizer)
    _check_dtypes([*backbones, body], labels)
    check_nothing_shared(backbones, loader.labels)
    _check_generation_config(backbones[0].generation_config, loader.labels[0])

    bos = leading_bos(tokenizer) if tokenizer is not None else None
    adapters = {
        name: loader.adapter(spec["adapter"], index, f"The adapter of expert {name!r}")
        for (name, spec), index in zip(specs.items(), backbone_of)
        if spec.get("adapter") is not None
    }
    experts = [
        _expert_entry(name, spec, backbone, tokenizer, bos) | adapters.get(name, ({},))[0]
        for (name, spec), backbone in zip(specs.items(), backbone_of)
    ]

    generation_config = backbones[0].generation_config
    fields = {
        "backbones": [backbone.config for backbone in backbones],
        "pcm": body.config,
        "experts": experts,
        "prefix_bos_token_id": bos,
        "bos_token_id": generation_config.bos_token_id,
        "eos_token_id": all_end_tokens(backbones),
        "pad_token_id": generation_config.pad_token_id,
    }
    config = PCMEnsembleConfig.from_dict(fields | config_kwargs)  # checked as a file would be

    tokenizer = _for_contexts(tokenizer, experts)
    if tokenizer is not None and config.max_position_embeddings is not None:  # less than each model's, by its prefix
        tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    return Parts(config, backbones, body, tokenizer, {name: tensors for name, (_, tensors) in adapters.items()})


def build_expert(model, name: str, expert, model_kwargs: dict) -> tuple[dict, Parts]:
    """
    Do the work of [`PCMEnsembleForCausalLM.add_expert`] without touching the ensemble.

    Returns:
        The expert's entry in the configuration, and the parts with its own among them.
    """
    config = model.config
    ((name, spec),) = expert_specs({name: expert}).items()
    if name in config.expert_names:
        raise ValueError(f"The ensemble already has an expert {name!r}. Choose another name, or remove it first.")
    check_trust(model_kwargs)

    loader = _Loader(model_kwargs, list(model.backbones))
    for index, backbone in enumerate(model.backbones):
        loader.indexes |= {id(backbone): index} | ({_source_key(n): index} if (n := backbone.name_or_path) else {})
    index = loader.backbone(spec["model"], f"expert {name!r}")
    tokenizer = loader.tokenizer(model.tokenizer)

    labels = [f"backbone {i}" for i in range(len(model.backbones))] + loader.labels + ["the PCM"]
    _check_vocabularies([*loader.backbones, model.pcm.body], labels, tokenizer)
    _check_dtypes([*loader.backbones, model.pcm.body], labels)
    check_nothing_shared(loader.backbones, labels)

    entry, adapters = _expert_entry(name, spec, index, tokenizer, config.prefix_bos_token_id), {}
    if spec.get("adapter") is not None:
        of_adapter, adapters[name] = loader.adapter(spec["adapter"], index, f"The adapter of expert {name!r}")
        entry |= of_adapter
    tokenizer = _for_contexts(tokenizer, [*config.experts, entry])
    return entry, Parts(config, loader.backbones, model.pcm.body, tokenizer, adapters)


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


def all_end_tokens(backbones: list[PreTrainedModel]) -> int | list[int] | None:
    """Whatever token one of the experts ends a text with."""
    found = [backbone.generation_config.eos_token_id for backbone in backbones]
    ids = dict.fromkeys(i for entry in found for i in (entry if isinstance(entry, list) else [entry]) if i is not None)
    return None if not ids else next(iter(ids)) if len(ids) == 1 else list(ids)


def _check_generation_config(generation_config: GenerationConfig, label: str):
    """Refuse what transformers will not save; of one that is as it was published, it only warns."""
    if not _is_unchanged(generation_config):
        try:
            generation_config.validate(strict=True)
        except ValueError as error:
            raise ValueError(
                f"The `generation_config` of {label} could not be saved with the ensemble: {error}"
            ) from error


def set_end_tokens(generation_config: GenerationConfig, ids: int | list[int] | None):
    """Set the end tokens of a generation config, which stays one that may be saved as it was published."""
    unchanged = _is_unchanged(generation_config)
    generation_config.eos_token_id = ids
    if unchanged:
        generation_config._original_object_hash = hash(generation_config)


def _is_unchanged(generation_config: GenerationConfig) -> bool:
    return getattr(generation_config, "_original_object_hash", None) == hash(generation_config)


def expert_specs(experts: Mapping) -> dict[str, dict]:
    """Bring what `experts` may hold into one form: name → mapping with `model` and what else was given."""
    if not isinstance(experts, Mapping):
        raise TypeError(
            "`experts` must map names to a repository, folder, `PreTrainedModel` or mapping, got "
            f"{type(experts).__name__}."
        )
    if not experts:
        raise ValueError("`experts` is empty. An ensemble needs at least one expert.")
    return {_expert_name(name): _expert_spec(name, spec) for name, spec in experts.items()}


def _expert_name(name) -> str:
    if not isinstance(name, str) or not name:
        raise TypeError(f"Experts' names must be non-empty strings, got {name!r}.")
    return name


def _expert_spec(name: str, spec) -> dict:
    if not isinstance(spec, Mapping):
        spec = {"model": spec}
    unknown = sorted(set(spec) - set(SPEC_FIELDS))
    if unknown:
        raise ValueError(f"Expert {name!r} has the unknown fields {unknown}. Accepted are {', '.join(SPEC_FIELDS)}.")
    for text_field in ("prompt", "description", "dimension"):
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


@dataclass
class _Loader:
    """Loads each model once. `model_kwargs` are `from_pretrained`'s."""

    model_kwargs: dict
    backbones: list[PreTrainedModel] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    indexes: dict = field(default_factory=dict)
    sources: list = field(default_factory=list)

    def backbone(self, source, label: str) -> int:
        """Index of the backbone that `source` names."""
        key = _source_key(source)
        if key not in self.indexes:
            self.indexes[key] = len(self.backbones)
            self.backbones.append(self._causal_lm(source, label))
            self.labels.append(label)
            self.sources.append(source)
        return self.indexes[key]

    def _causal_lm(self, source, label: str, learns: bool = False) -> PreTrainedModel:
        if isinstance(source, PreTrainedModel):
            check_is_causal_lm(source.config, label)
            if not source.can_generate():
                raise ValueError(
                    f"The model of {label} is a {type(source).__name__}, which has no LM head. Load it with "
                    "`AutoModelForCausalLM`."
                )
            if not learns:  # the PCM is a copy
                check_structure(source, label)
            check_serves_rows(source, label)
            return source

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

        model, loading = AutoModelForCausalLM.from_pretrained(source, **options, output_loading_info=True)
        check_loading(loading, model.state_dict(), f"the checkpoint of {label}, {str(source)!r}")
        if found is not None:
            model.config.source = found
        check_serves_rows(model, label)
        return model

    def adapter(self, source, backbone: int, label: str) -> tuple[dict, dict[str, torch.Tensor]]:
        """What a LoRA adapter that fits a backbone adds to its expert's entry, and its tensors."""
        config, tensors = read_adapter(source, label, self._hub_options())
        tensors = fit_adapter(self.backbones[backbone], config, tensors, label)
        place = adapter_place(source, label, self._hub_options())
        found = None if place is None else hub_source(place[0], **place[1])
        return {"adapter": config, "source": found}, tensors

    def pcm_body(self, source, num_layers: int | None) -> PreTrainedModel:
        """The PCM's body: a causal LM's, cut to its first `num_layers`, with weights of its own."""
        if isinstance(source, PreTrainedConfig):
            config = _first_layers(source, num_layers)
            check_is_causal_lm(config, "the PCM")
            return AutoModel.from_config(config, dtype=self.backbones[0].dtype, **self._options("attn_implementation"))
        key = _source_key(source)
        shared = key in self.indexes and not getattr(self.backbones[self.indexes[key]], "is_quantized", False)
        model = self.backbones[self.indexes[key]] if shared else self._causal_lm(source, "the PCM", learns=True)
        if getattr(model, "is_quantized", False):
            raise ValueError(
                "The PCM is to learn, so that it cannot be made from a quantised model. Name its checkpoint."
            )
        self.sources.append(source)
        whole = model.base_model
        body = AutoModel.from_config(_first_layers(whole.config, num_layers), dtype=self.backbones[0].dtype).to(
            whole.device
        )
        weights = whole.state_dict()
        if missing := sorted(body.state_dict().keys() - weights.keys()):
            raise ValueError(
                f"The PCM cannot be made from a {type(model).__name__}: as a model without LM head it would need the "
                f"tensor {missing[0]}. Use another causal LM."
            )
        body.load_state_dict({name: weights[name] for name in body.state_dict()})
        return body.eval()

    def tokenizer(self, given) -> PreTrainedTokenizerBase | None:
        """The tokenizer given, else the first part's that has one; parts with another vocabulary are refused."""
        found = []
        if isinstance(given, PreTrainedTokenizerBase):
            found.append(("`tokenizer`", given))
        elif given is not None:
            found.append(("`tokenizer`", AutoTokenizer.from_pretrained(given, **self._hub_options())))
        names = [
            source.name_or_path if isinstance(source, PreTrainedModel) else str(source) for source in self.sources
        ]
        for name in dict.fromkeys(filter(None, names)):
            if (own := load_tokenizer(name, **self._hub_options())) is not None:
                found.append((repr(name), own))
        for label, other in found[1:]:
            _check_same_vocabulary(*found[0], label, other, may_differ_in_size=given is not None)
        return copy.deepcopy(found[0][1]) if found else None

    def _hub_options(self) -> dict:
        return self._options(*HUB_OPTIONS)

    def _options(self, *names: str) -> dict:
        return {name: self.model_kwargs[name] for name in names if name in self.model_kwargs}


def load_tokenizer(source: str, **options) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder or repository; None if it has none."""
    hub_options = {name: value for name, value in options.items() if name in (*HUB_OPTIONS, "subfolder")}
    hub_options.pop("trust_remote_code", None)
    hub_options["_raise_exceptions_for_missing_entries"] = False
    files = (cached_file(source, name, **hub_options) for name in ("tokenizer_config.json", "tokenizer.json"))
    if not any(files):
        return None
    try:
        return AutoTokenizer.from_pretrained(source, **{"trust_remote_code": False} | options)
    except (AttributeError, KeyError, TypeError, JSONDecodeError) as error:  # the first would vanish in a property
        raise ValueError(
            f"The tokenizer's files in {source!r} cannot be read ({type(error).__name__}: {error}). Save it again."
        ) from error


def _source_key(source):
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


@torch.no_grad()
def check_serves_rows(model: PreTrainedModel, label: str):
    """
    Try the model on two short rows, one of them padded, in two calls with a cache; refuse it if they differ from each
    row alone.

    This finds models that look ahead, whose state no mask reaches or no second text enters (some recurrent ones), that
    count positions in a way of their own, or that have no cache. No flag of transformers tells all of these.
    """
    model.eval()
    a, b, c, d = 3, 4, 5, 6
    ids, mask = torch.tensor([[a, b, c, d], [0, b, c, d]]), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    ids, mask = ids.to(model.device), mask.to(model.device)
    try:
        owner = SimpleNamespace(model=model, config=PCMEnsembleConfig())
        read = Submodel(owner, "model", has_lm_head=True)
        memory = Memory(DynamicCache(config=model.config))
        read(Rows(ids[:, :2], mask[:, :2]), memory)
        found = read(Rows(ids[:, 2:], mask), memory).values[:, -1].float()  # (2, vocab)
        alone = [model(input_ids=row).logits[0].float() for row in (ids[:1], ids[1:, 1:], ids[:1, :3])]
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"The model of {label}, a {type(model).__name__}, does not run with a mask, positions and a cache, as "
            f"every expert must ({type(error).__name__}: {error}). Use a causal LM with attention."
        ) from error
    pairs = [(found[0], alone[0][-1]), (found[1], alone[1][-1]), (alone[2][-1], alone[0][2])]
    # In 16 bits the differences between two orders of summation are near 0.01 of the logits' spread.
    tolerance = 0.005 if model.dtype in (torch.float32, torch.float64) else 0.1
    if any((one - other).std() > tolerance * other.std() for one, other in pairs):
        raise ValueError(
            f"The model of {label}, a {type(model).__name__}, predicts something else with padding and a cache than "
            "alone, or looks at later tokens. Use a causal LM with attention and ordinary positions."
        )


def _check_dtypes(models: list[PreTrainedModel], labels: list[str]):
    """A checkpoint is loaded in one dtype, so that an ensemble of several would come back as another."""
    if len({model.dtype for model in models}) > 1:
        found = ", ".join(f"{label} {model.dtype}" for label, model in zip(labels, models))
        raise ValueError(f"All parts must have one dtype, got {found}. Pass `dtype=`, or cast loaded models before.")


def _check_vocabularies(models: list[PreTrainedModel], labels: list[str], tokenizer):
    sizes = [model.config.get_text_config().vocab_size for model in models]
    if tokenizer is None and len(set(sizes)) > 1:
        found = ", ".join(f"{label} {size}" for label, size in zip(labels, sizes))
        raise ValueError(
            f"The models' vocabularies have different sizes ({found}), and there is no tokenizer to tell whether that "
            "is padding. Pass `tokenizer=`."
        )
    for label, size in zip(labels, sizes):
        if tokenizer is not None and size < len(tokenizer):
            raise ValueError(
                f"All parts must share one vocabulary: the tokenizer has {len(tokenizer)} tokens, but the model of "
                f"{label} only {size}. Use models with the same tokenizer. Where tokens were added to it, pass "
                f"`tokenizer=` without them, or load this model, call `resize_token_embeddings({len(tokenizer)})` "
                "and pass it as `model`."
            )


def _check_same_vocabulary(label: str, tokenizer, other_label: str, other, may_differ_in_size: bool):
    """A token that only one of them has is one that was added to it; who passes a tokenizer has chosen."""
    tokens, other_tokens = ({index: token for token, index in t.get_vocab().items()} for t in (tokenizer, other))
    for index in sorted(tokens | other_tokens):
        token, other_token = tokens.get(index), other_tokens.get(index)
        if token == other_token or (may_differ_in_size and None in (token, other_token)):
            continue
        hint = "Use models with the same tokenizer."
        if None in (token, other_token):
            hint += " If it was added for training, such as a padding token, pass the `tokenizer=` to use."
        raise ValueError(
            f"All parts must share one vocabulary: token {index} is {token!r} in {label}, but {other_token!r} in "
            f"{other_label}. {hint}"
        )


def _expert_entry(name: str, spec: dict, backbone: int, tokenizer, bos: int | None) -> dict:
    """The expert's entry in the configuration, its texts tokenised once and for all."""
    prompt, description = spec.get("prompt"), spec.get("description")
    if tokenizer is None and (prompt or description):
        raise ValueError(
            f"Expert {name!r} has a `{'prompt' if prompt else 'description'}`, but none of the models has a tokenizer "
            "to read it. Pass `tokenizer=`."
        )
    if prompt:
        check_prompt(tokenizer, prompt, bos, f"Expert {name!r}")
    description = description or prompt or name
    return {
        "name": name,
        "backbone": backbone,
        "prompt": prompt,
        "prompt_ids": render_prompt(tokenizer, prompt, bos) if prompt else [],
        "description": description,
        "description_ids": encode_description(tokenizer, description) if tokenizer is not None else [],
        "dimension": spec.get("dimension"),
        "adapter": None,
        "source": None,
    }


__all__ = [
    "Parts",
    "all_end_tokens",
    "build_expert",
    "build_parts",
    "load_tokenizer",
    "set_end_tokens",
]
