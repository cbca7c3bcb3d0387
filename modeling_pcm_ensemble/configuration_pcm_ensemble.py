"""Configuration of a PCM ensemble: its backbones, its experts and its Preference Control Model."""

# First, before a name is imported that an older library lacks
from .versions import OLDEST  # noqa: F401

# isort: split
import os
from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, PreTrainedConfig

from .saving import finish_save

MERGES = ("probabilities", "logits", "adapters")
AUTO_MAP = {
    "AutoConfig": "configuration_pcm_ensemble.PCMEnsembleConfig",
    "AutoModel": "modeling_pcm_ensemble.PCMEnsembleForCausalLM",
    "AutoModelForCausalLM": "modeling_pcm_ensemble.PCMEnsembleForCausalLM",
}
EXPERT_FIELDS = {
    "name": None,
    "backbone": 0,
    "prompt": None,
    "prompt_ids": (),
    "description": None,
    "description_ids": (),
    "dimension": None,
    "adapter": None,
    "source": None,
}


@strict
class PCMEnsembleConfig(PreTrainedConfig):
    r"""
    Configuration of a [`PCMEnsembleForCausalLM`]. Usually made by [`PCMEnsembleForCausalLM.from_experts`].

    Args:
        backbones (`list[PreTrainedConfig | dict]`, *optional*):
            Configuration of each frozen causal LM. Experts on one backbone run as rows of one forward pass. A `source`
            in it says which `repository` and `revision` it was loaded from.
        experts (`list[dict]`, *optional*):
            One entry per expert, in the order of the PCM head's outputs: `name`; `backbone`, an index into `backbones`
            (default 0); `prompt` and `prompt_ids`, the text and tokens that this expert reads before the context;
            `description` and `description_ids`, the text and tokens that tell the PCM that this expert is wanted;
            `dimension`, the axis of preference it stands on; `adapter`, what PEFT's configuration says of its LoRA,
            and `source`, the `repository` and `revision` that it was loaded from.
        pcm (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the Preference Control Model's body.
        merge (`str`, *optional*, defaults to `"probabilities"`):
            What is mixed: `"probabilities"` (the method), `"logits"` (its ablation), or `"adapters"`: LoRA weights, as
            Personalized Soup does, for experts that are adapters on one backbone. Only the first goes with
            `expert_top_k`.
        expert_top_k (`int`, *optional*):
            Keep each expert's k most probable tokens and renormalise. `None` keeps all; a larger k is closer to that.
        default_preference (`str`, `list` or `dict`, *optional*):
            The preference when a call gives none. `None` means all experts at weight 1.
        vocab_size (`int`, *optional*):
            Tokens that every part knows, the width of `logits`; defaults to the smallest part's. What a larger part
            has beyond them is padding, which no other part could read back.
        prefix_bos_token_id (`int`, *optional*):
            The token that the tokenizer puts before every text. A prefix begins with it, and a context's own is
            masked out behind a prefix. `None` where the tokenizer adds none.
        thin (`dict`, *optional*):
            Written by `save_pretrained(..., thin=True)`: where the backbones are that this checkpoint does not hold.
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether forward returns a [`PCMEnsembleCache`] when not training.
    """

    model_type = "pcm_ensemble"
    base_model_fsdp_plan: ClassVar[dict] = {}  # every part has its own

    backbones: list[PreTrainedConfig | dict] | None = None
    experts: list[dict] | None = None
    pcm: PreTrainedConfig | dict | None = None
    merge: str = "probabilities"
    expert_top_k: int | None = None
    default_preference: str | list | dict | None = None
    vocab_size: int | None = None
    prefix_bos_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    thin: dict | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.experts = [_complete_expert(expert) for expert in self.experts or []]
        backbones = [_as_config(backbone) for backbone in self.backbones or []]
        pcm = _as_config(self.pcm) if self.pcm is not None else None
        # The base class resets the attention implementation of the sub-configs it sees, even where none is asked for.
        self.backbones, self.pcm = [], None
        super().__post_init__(**kwargs)
        self.backbones, self.pcm = backbones, pcm
        if self._attn_implementation is not None:  # one that was asked for; setting it passes it on
            self._attn_implementation = self._attn_implementation
        if self.vocab_size is None:
            parts = self.sub_config_items().values()
            self.vocab_size = min((part.get_text_config().vocab_size for part in parts), default=None)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> tuple[dict, dict]:
        """As for any model, of a folder after an interrupted save to it is finished."""
        finish_save(os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        return super().get_config_dict(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> "PCMEnsembleConfig":
        """As for any model. `AutoConfig` reads a folder itself, and gives its name and what it has read."""
        if (folder := kwargs.get("name_or_path")) and finish_save(folder):
            config_dict, _ = cls.get_config_dict(folder)
        return super().from_dict(config_dict, **kwargs)

    @property
    def expert_names(self) -> list[str]:
        return [expert["name"] for expert in self.experts]

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    @property
    def hidden_size(self) -> int:
        return self.pcm.get_text_config().hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self.pcm.get_text_config().num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        return self.pcm.get_text_config().num_attention_heads

    @property
    def max_position_embeddings(self) -> int | None:
        """Longest context that every expert and the PCM can read behind their longest prefix; None without a limit."""
        prompts = [(self.backbones[expert["backbone"]], len(expert["prompt_ids"])) for expert in self.experts]
        description = sum(len(expert["description_ids"]) for expert in self.experts)
        description += self.prefix_bos_token_id is not None
        limits = [
            part.max_position_embeddings - prefix_length
            for part, prefix_length in [*prompts, (self.pcm, description)]
            if (getattr(part, "max_position_embeddings", None) or -1) > 0
        ]
        return min(limits, default=None)

    def sub_config_items(self) -> dict[str, PreTrainedConfig]:
        """The parts' configurations by the name of the submodule that holds each part."""
        parts = {f"backbones.{index}": backbone for index, backbone in enumerate(self.backbones)}
        return parts | ({"pcm": self.pcm} if self.pcm is not None else {})

    # `dtype`, `attn_implementation` and the like reach sub-configs through this name only, which transformers reads as
    # a class attribute with fixed keys; here the keys depend on the number of backbones.
    @property
    def sub_configs(self) -> dict[str, type[PreTrainedConfig]]:
        return {name: type(config) for name, config in self.sub_config_items().items()}

    def __getattr__(self, name: str):
        if name.startswith("backbones.") and (config := self.sub_config_items().get(name)) is not None:
            return config
        raise AttributeError(f"`{type(self).__name__}` has no attribute `{name}`.")

    def to_dict(self) -> dict:
        output = super().to_dict()
        output["backbones"] = [backbone.to_dict() for backbone in self.backbones]
        output["auto_map"] = dict(AUTO_MAP)
        output["architectures"] = ["AutoModelForCausalLM"]  # `transformers serve` takes the name from the library
        return output

    def validate_experts(self):
        names = self.expert_names
        for position, expert in enumerate(self.experts):
            if not isinstance(expert["name"], str) or not expert["name"]:
                raise ValueError(f"`experts[{position}]` needs a `name`, a non-empty string; got {expert['name']!r}.")
            if expert["backbone"] not in range(len(self.backbones)):
                raise ValueError(
                    f"Expert `{expert['name']}` names backbone {expert['backbone']}, but there are "
                    f"{len(self.backbones)}. Use an index from 0 to {len(self.backbones) - 1}."
                )
        if len(set(names)) != len(names):
            raise ValueError(f"`experts` must have a name of its own each, got {names}.")

    def validate_thin(self):
        if self.thin is None:
            return
        entries, shared = self.thin.get("backbones"), self.thin.get("shared")
        fields = ("repository", "revision", "digest")
        named = isinstance(entries, list) and all(
            isinstance(entry, dict) and all(isinstance(entry.get(field), str) for field in fields) for entry in entries
        )
        if not named or len(entries) != len(self.backbones) or not isinstance(shared, dict):
            raise ValueError(
                f"`thin` must give {', '.join(fields)} for each of the {len(self.backbones)} `backbones`, and the "
                f"tensors `shared` with them; got {self.thin}."
            )

    def validate_merge(self):
        if self.merge not in MERGES:
            raise ValueError(f"`merge` must be one of {', '.join(map(repr, MERGES))}, got {self.merge!r}.")
        if self.expert_top_k is not None and self.expert_top_k < 1:
            raise ValueError(f"`expert_top_k` must be at least 1, or None to keep all, got {self.expert_top_k}.")
        if self.expert_top_k is not None and self.merge != "probabilities":
            raise ValueError(
                f"`expert_top_k` cannot be used with `merge={self.merge!r}`: it cuts the distributions that "
                '`merge="probabilities"` adds.'
            )


def _as_config(config: PreTrainedConfig | dict) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    if not isinstance(config, dict):
        raise TypeError(f"A part's configuration must be a `PreTrainedConfig` or a dict, got {type(config).__name__}.")
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"A part's configuration has `model_type` {model_type!r}, which transformers does not have. Parts must be "
            "models of the transformers library itself."
        )
    return CONFIG_MAPPING[model_type].from_dict(config)


def _complete_expert(expert: dict) -> dict:
    unknown = sorted(set(expert) - set(EXPERT_FIELDS))
    if unknown:
        raise ValueError(f"An expert has the unknown fields {unknown}; the known ones are {list(EXPERT_FIELDS)}.")
    completed = EXPERT_FIELDS | expert
    return completed | {field: list(completed[field]) for field in ("prompt_ids", "description_ids")}


__all__ = ["PCMEnsembleConfig"]
