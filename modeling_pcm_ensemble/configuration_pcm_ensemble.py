"""Configuration of a PCM ensemble: its backbones, its experts and its Preference Control Model."""

# First, before a name is imported that an older library lacks
from .requirements import OLDEST  # noqa: F401

# isort: split
import dataclasses
import os
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from .checkpoint_staging import finish_save
from .lora_config import adapter_config
from .merging import MIXTURES
from .requirements import endpoints

PRODUCT = "product"  # the value of `merge` that adds what experts change of a reference
ADAPTERS = "adapters"  # the value of `merge` that adds weights, not predictions
ADDITIVE = (PRODUCT, ADAPTERS)  # ways of merging in which weights are strengths, not shares
TOP_K_MERGES = ("probabilities", PRODUCT)
ENDPOINT = "pcm_endpoint"  # the `model_type` of a backbone that somebody else serves

AUTO_MAP = {
    "AutoConfig": "configuration_pcm_ensemble.PCMEnsembleConfig",
    "AutoModel": "modeling_pcm_ensemble.PCMEnsembleForCausalLM",
    "AutoModelForCausalLM": "modeling_pcm_ensemble.PCMEnsembleForCausalLM",
}
# Who loads it: `transformers serve` looks for the first name in its library, vLLM for any of them among its models.
ARCHITECTURES = ("AutoModelForCausalLM", "PCMEnsembleForCausalLM")
# What an entry of `experts` may hold, and what it holds where nothing is given.
EXPERT_FIELDS: dict[str, Any] = {
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
            and `source`, the `repository`, `revision` and, if it has one, `subfolder` that it was loaded from.
        pcm (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the Preference Control Model's body.
        merge (`str`, *optional*, defaults to `"probabilities"`):
            How experts are merged at each token. An ensemble can be changed between calls. In a mixture experts share
            the next token: α = softmax(h + log w), and only the ratios of weights count.

            - `"probabilities"`: their distributions, π = Σ_i α_i π_i. This is the paper's method.
            - `"logits"`: their logits, π ∝ exp Σ_i α_i logits_i. This is the paper's ablation.

            Where tilts add up, each wanted expert acts in full on every token: s = w · 2σ(h), so that a weight of 1 is
            the expert's full tilt, and one below 0 steers away from it.

            - `"product"`: what experts change of a reference, log π ∝ log π_0 + Σ_i s_i (log π_i − log π_0).
            - `"adapters"`: LoRA weights, W + Σ_i s_i (α/r)_i B_i A_i. It runs one model where the others run every
              expert, and needs experts that are adapters on one backbone and have no prompts. `RebelTrainer` alone
              trains its PCM. Weights that add up to 1 make Personalized Soup's average.
        reference (`str`, *optional*):
            The expert that is π_0 under `merge="product"`, where it can have no weight. `None` is the bare backbone,
            if all experts are on one.
        pcm_trained_for (`str`, *optional*):
            The `merge` that the PCM was trained for; `None` if it was not trained. One that was trained for
            `"product"` or `"adapters"` gives strengths, and serves every merge: in a mixture, α = w g / Σ w g with
            g = 2σ(h). It is trained where tilts add up. One that was trained for a mixture gives shares, which mean
            nothing there.
        expert_top_k (`int`, *optional*):
            Keep each expert's k most probable tokens, and renormalise. `None` keeps all; a larger k is closer to that.
            It goes with `merge="probabilities"`, and with `"product"`, see [`~tilts.product_log_probs`].
        default_preference (`str`, `list` or `dict`, *optional*):
            The preference when a call gives none. `None` means all experts at weight 1, but the reference.
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

    # A type checker is told what these fields hold once `__post_init__` has read them. `@strict` checks them when they
    # are set, where a file or a caller may give dicts, or nothing.
    if TYPE_CHECKING:
        backbones: list[PreTrainedConfig] = dataclasses.field(default_factory=list)
        experts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
        pcm: PreTrainedConfig = dataclasses.field(default_factory=PreTrainedConfig)
        vocab_size: int = 0
    else:
        backbones: list[PreTrainedConfig | dict] | None = None
        experts: list[dict] | None = None
        pcm: PreTrainedConfig | dict | None = None
        vocab_size: int | None = None
    merge: str = "probabilities"
    reference: str | None = None
    pcm_trained_for: str | None = None
    expert_top_k: int | None = None
    default_preference: str | list | dict | None = None
    prefix_bos_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    thin: dict | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.experts = [_complete_expert(f"experts[{i}]", expert) for i, expert in enumerate(self.experts or [])]
        backbones = [_as_config(f"backbones[{i}]", backbone) for i, backbone in enumerate(self.backbones or [])]
        pcm = _as_config("pcm", self.pcm) if self.pcm is not None else None

        # The base class resets the attention implementation of the parts that it sees, even where none is asked for.
        vars(self).update(backbones=[], pcm=None)
        super().__post_init__(**kwargs)
        vars(self).update(backbones=backbones, pcm=pcm)
        self.architectures = list(ARCHITECTURES)

        if self._attn_implementation is not None:  # one that was asked for; setting it passes it on
            self._attn_implementation = self._attn_implementation

        if self.vocab_size is None and (sizes := self.part_sizes()):
            self.vocab_size = min(sizes.values())

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> tuple[dict, dict]:
        """
        Read config.json as for any model, of a folder after an interrupted save to it is finished.

        Raises:
            OSError: if there is none, or the interrupted save cannot be finished.
        """
        finish_save(os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        return super().get_config_dict(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> "PCMEnsembleConfig":
        """
        Make the configuration that a file holds, as any.

        Raises:
            TypeError, ValueError: naming the field that has a wrong value.
        """
        # `AutoConfig` reads a folder itself, and gives its name and what it has read.
        if (folder := kwargs.get("name_or_path")) and finish_save(folder):
            config_dict, _ = cls.get_config_dict(folder)

        try:
            return super().from_dict(config_dict, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(str(error)) from error

    @property
    def expert_names(self) -> list[str]:
        """The experts' names, in the order of the PCM head's outputs."""
        return [expert["name"] for expert in self.experts]

    @property
    def num_experts(self) -> int:
        """Number of experts, the width of α."""
        return len(self.experts)

    @property
    def adds_up(self) -> bool:
        """Whether weights are strengths of tilts that add up, and not shares of a mixture."""
        return self.merge in ADDITIVE

    @property
    def reference_index(self) -> int | None:
        """The expert that is the reference of a product; None where that is the bare backbone, or there is none."""
        if self.merge != PRODUCT or self.reference is None:
            return None
        return self.expert_names.index(self.reference)

    @property
    def endpoint_facts(self) -> list[list]:
        """What answers depend on where backbones are behind endpoints: who is asked for what."""
        served = [backbone for backbone in self.backbones if backbone.model_type == ENDPOINT]
        return [[part.address, part.served_model, part.api, part.top_logprobs] for part in served]

    @property
    def weighted_names(self) -> list[str]:
        """The experts that a preference may give a weight: all but the reference."""
        return [name for index, name in enumerate(self.expert_names) if index != self.reference_index]

    @property
    def hidden_size(self) -> int:
        """The PCM's width."""
        return self.pcm.get_text_config().hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """The PCM's layers."""
        return self.pcm.get_text_config().num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        """The PCM's heads."""
        return self.pcm.get_text_config().num_attention_heads

    @property
    def max_position_embeddings(self) -> int | None:
        """Longest context that every expert and the PCM can read behind their longest prefix; None without a limit."""
        # The PCM's longest prefix: every expert's description, behind one BOS.
        description = sum(len(expert["description_ids"]) for expert in self.experts)
        description += 0 if self.prefix_bos_token_id is None else 1

        prefixes = [(self.backbones[expert["backbone"]], len(expert["prompt_ids"])) for expert in self.experts]
        prefixes.append((self.pcm, description))
        limits = [(max_positions(part), length) for part, length in prefixes]
        return min((limit - length for limit, length in limits if limit is not None), default=None)

    def sub_config_items(self) -> dict[str, PreTrainedConfig]:
        """Return the parts' configurations by the name of the submodule that holds each part."""
        parts = {f"backbones.{index}": backbone for index, backbone in enumerate(self.backbones)}
        return parts | ({"pcm": self.pcm} if self.pcm is not None else {})

    # `dtype`, `attn_implementation` and the like reach sub-configs through this name only, which transformers reads as
    # a class attribute with fixed keys; here the keys depend on the number of backbones.
    @property
    def sub_configs(self) -> dict[str, type[PreTrainedConfig]]:
        """The class of each part's configuration, by the same names."""
        return {name: type(config) for name, config in self.sub_config_items().items()}

    def __getattr__(self, name: str):
        """Give transformers a backbone's configuration by its name in `sub_configs`, `backbones.0`."""
        if name.startswith("backbones.") and (config := self.sub_config_items().get(name)) is not None:
            return config
        raise AttributeError(f"`{type(self).__name__}` has no attribute `{name}`.")

    def to_dict(self) -> dict:
        """Return what config.json holds: every part's configuration, and which code of the folder loads it."""
        output = super().to_dict()
        output["backbones"] = [backbone.to_dict() for backbone in self.backbones]
        output["auto_map"] = dict(AUTO_MAP)
        output["architectures"] = list(ARCHITECTURES)
        return output

    def part_sizes(self) -> dict[str, int]:
        """Return the vocabulary size of each part."""
        sizes = {}
        for name, part in self.sub_config_items().items():
            check_is_causal_lm(part, f"`{name}`")

            size = getattr(part.get_text_config(), "vocab_size", None)
            if not _is_integer(size) or size < 1:
                raise ValueError(
                    f"`{name}`, a {type(part).__name__}, has the `vocab_size` {size!r}. Parts must be language models."
                )
            sizes[name] = size
        return sizes

    def _check_vocabulary(self):
        largest = min(self.part_sizes().values(), default=None)
        if largest is not None and not (_is_integer(self.vocab_size) and 1 <= self.vocab_size <= largest):
            raise ValueError(
                f"`vocab_size` must be between 1 and {largest}, the smallest part's, got {self.vocab_size!r}."
            )
        if self.prefix_bos_token_id is not None:
            self._check_ids("prefix_bos_token_id", [self.prefix_bos_token_id])

    # `@strict` calls every `validate_*` once all fields are set.

    def validate_experts(self):
        """
        Check the experts, and before them the vocabulary, in which their tokens must be.

        Raises:
            ValueError: naming the field that has a wrong value.
        """
        self._check_vocabulary()

        for position, expert in enumerate(self.experts):
            label = f"experts[{position}]"
            self._check_fields(label, expert)
            for name in ("prompt_ids", "description_ids"):
                self._check_ids(f"{label}.{name}", expert[name])
            self._check_room(label, expert)
            if expert["adapter"] is not None:
                adapter_config(expert["adapter"], f"`{label}.adapter`")

        names = self.expert_names
        if len(set(names)) != len(names):
            raise ValueError(f"`experts` must have a name of its own each, got {names}.")

    def _check_fields(self, label: str, expert: dict):
        name, backbone, source = expert["name"], expert["backbone"], expert["source"]
        if not isinstance(name, str) or not name:
            raise ValueError(f"`{label}` needs a `name`, a non-empty string; got {name!r}.")
        if not _is_integer(backbone) or backbone not in range(len(self.backbones)):
            raise ValueError(
                f"Expert `{name}` names backbone {backbone!r}, but there are {len(self.backbones)}. Set "
                f"`{label}.backbone` to an index from 0 to {len(self.backbones) - 1}."
            )
        for field in ("prompt", "description", "dimension"):
            if not isinstance(expert[field], str | None):
                raise ValueError(f"`{label}.{field}` must be a string or None, got {expert[field]!r}.")

        if expert["prompt"] and not expert["prompt_ids"]:
            raise ValueError(f"`{label}.prompt_ids` must hold the tokens of its `prompt`, {expert['prompt']!r:.60}.")

        if source is not None and not (
            isinstance(source, dict)
            and isinstance(source.get("repository"), str)
            and all(isinstance(value, str | None) for value in source.values())
        ):
            raise ValueError(f"`{label}.source` must give a `repository` and `revision` as strings, got {source!r}.")

    def _check_room(self, label: str, expert: dict):
        """Refuse what leaves no position to the context."""
        readers = {"prompt_ids": self.backbones[expert["backbone"]], "description_ids": self.pcm}
        for name, reader in readers.items():
            limit = max_positions(reader)
            if limit is not None and limit <= len(expert[name]):
                raise ValueError(
                    f"`{label}.{name}` has {len(expert[name])} tokens, which leaves no room for a context in the "
                    f"{limit} positions of the model that reads them. Use a shorter text."
                )

    def _check_ids(self, label: str, ids: list[int]):
        if not isinstance(ids, list):
            raise ValueError(f"`{label}` must be a list of tokens, got {ids!r}.")
        for token in ids:
            if not _is_integer(token) or not 0 <= token < (self.vocab_size or 0):
                raise ValueError(
                    f"`{label}` must hold whole numbers of at least 0 and below the `vocab_size`, {self.vocab_size}; "
                    f"got {token!r}."
                )

    def validate_thin(self):
        """
        Check what a thin checkpoint says of its backbones.

        Raises:
            ValueError: if that is not a repository, revision and digest for each.
        """
        if self.thin is None:
            return

        entries, shared = self.thin.get("backbones"), self.thin.get("shared")
        fields = ("repository", "revision", "digest")

        def is_named(entry) -> bool:
            return isinstance(entry, dict) and all(isinstance(entry.get(field), str) for field in fields)

        named = isinstance(entries, list) and len(entries) == len(self.backbones) and all(map(is_named, entries))
        paired = isinstance(shared, dict) and all(isinstance(name, str) for name in [*shared, *shared.values()])
        if not named or not paired:
            raise ValueError(
                f"`thin` must give {', '.join(fields)} for each of the {len(self.backbones)} `backbones`, and the "
                f"tensors `shared` with them by name; got {self.thin}."
            )

    def validate_merge(self):
        """
        Check `merge` and what goes with it: `expert_top_k`, `reference`, and what the PCM was trained for.

        Raises:
            ValueError: if one has a value out of range, or they do not go together.
        """
        merges = (*MIXTURES, *ADDITIVE)
        for name in ("merge", "pcm_trained_for"):
            value = getattr(self, name)
            if value not in merges and not (name == "pcm_trained_for" and value is None):
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, merges))}, got {value!r}.")
        self._check_reference()

        trained_for = self.pcm_trained_for
        if trained_for is not None and trained_for not in ADDITIVE and self.adds_up:
            raise ValueError(
                f"The PCM was trained for `merge={trained_for!r}`: it gives shares of a mixture, and "
                f"`merge={self.merge!r}` needs strengths of tilts. Use the `merge` of its training, or a PCM that was "
                f"trained for {' or '.join(map(repr, ADDITIVE))}, which serves every merge."
            )

        if self.expert_top_k is not None and (not _is_integer(self.expert_top_k) or self.expert_top_k < 1):
            raise ValueError(f"`expert_top_k` must be at least 1, or None to keep all, got {self.expert_top_k!r}.")
        if self.expert_top_k is not None and self.merge not in TOP_K_MERGES:
            raise ValueError(
                f"`expert_top_k` cannot be used with `merge={self.merge!r}`; it goes with "
                f"{' and '.join(map(repr, TOP_K_MERGES))}. Set it to None here."
            )
        self._check_endpoints()

    def _check_endpoints(self):
        """Refuse to guess what an endpoint does not tell."""
        for backbone in self.backbones:
            if backbone.model_type != ENDPOINT or backbone.top_logprobs >= (self.vocab_size or 0):
                continue
            if self.expert_top_k is None or self.expert_top_k > backbone.top_logprobs:
                raise ValueError(
                    f"{backbone.endpoint} tells the {backbone.top_logprobs} most probable tokens alone. Set "
                    f"`expert_top_k` to at most {backbone.top_logprobs}, with a `merge` that takes it: "
                    f"{' or '.join(map(repr, TOP_K_MERGES))}."
                )

    def _check_reference(self):
        names = self.expert_names
        if self.reference is not None and self.reference not in names:
            raise ValueError(f"`reference` is {self.reference!r}, but the experts are {', '.join(names)}.")
        if self.merge != PRODUCT:
            return

        if self.reference is None and len(self.backbones) > 1:
            raise ValueError(
                f'`merge="product"` needs a `reference`, since the experts are on {len(self.backbones)} backbones: '
                "what experts change is measured against it. Name one of the experts "
                f"({', '.join(names)}), or add the base model as an expert and name that."
            )
        if names and names == [self.reference]:
            raise ValueError(f"`reference` is {self.reference!r}, the only expert. A product needs another one.")


def check_is_causal_lm(config: PreTrainedConfig, label: str):
    """
    Check that a model can be a part, by the kind of its configuration.

    Raises:
        ValueError: if it is an ensemble, an encoder-decoder, or no causal LM of transformers.
    """
    if config.model_type == PCMEnsembleConfig.model_type:
        raise ValueError(f"The model of {label} is an ensemble itself. Use its experts.")
    if config.is_encoder_decoder:
        raise ValueError(f"The model of {label} is an encoder-decoder ({config.model_type}). Use a causal LM.")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"The model of {label} (`model_type` {config.model_type!r}) is not a causal LM of the transformers "
            "library. Use one that `AutoModelForCausalLM` loads without code of its own."
        )


def max_positions(config: PreTrainedConfig) -> int | None:
    """Longest text that a part can read; None without a limit, which some configurations write as -1 or 0."""
    text = config.get_text_config() if isinstance(config, PreTrainedConfig) else None  # which is refused later on
    limit = getattr(text, "max_position_embeddings", None) or 0
    return limit if limit > 0 else None


def _as_config(label: str, config: PreTrainedConfig | dict) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    if not isinstance(config, dict):
        raise TypeError(f"`{label}` must be a `PreTrainedConfig` or a dict, got {type(config).__name__}.")
    model_type = config.get("model_type")
    if model_type == ENDPOINT:
        endpoints()
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"`{label}` has `model_type` {model_type!r}, which transformers does not have. Parts must be models of "
            "the transformers library itself."
        )

    try:
        return CONFIG_MAPPING[model_type].from_dict(config)
    except (StrictDataclassError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"`{label}` is no configuration of a {model_type!r}: {error}") from error


def _complete_expert(label: str, expert: dict) -> dict:
    unknown = sorted(map(str, set(expert) - set(EXPERT_FIELDS)))
    if unknown:
        raise ValueError(f"`{label}` has the unknown fields {unknown}; the known ones are {list(EXPERT_FIELDS)}.")

    completed = EXPERT_FIELDS | expert
    for field in ("prompt_ids", "description_ids"):
        if isinstance(completed[field], list | tuple):
            completed[field] = list(completed[field])
    if completed["adapter"] is not None:
        completed["adapter"] = adapter_config(completed["adapter"], f"`{label}.adapter`")
    return completed


def _is_integer(value) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


__all__ = ["PCMEnsembleConfig", "check_is_causal_lm"]
