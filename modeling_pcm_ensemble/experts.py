"""Which experts an ensemble has: it is built from them, they come and go, and a call is routed to some."""

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .backbones import ExpertBackbones
from .cache import PCMEnsembleCache
from .checkpoint_build import all_end_tokens, build_expert, build_parts, joined_end_tokens, set_end_tokens
from .checkpoint_io import PCMEnsemblePreTrainedModel
from .configuration_pcm_ensemble import ADAPTERS, PRODUCT, PCMEnsembleConfig
from .lora_peft_format import write_adapter
from .pcm import PreferenceControlModel
from .preference import Preference, check_config
from .routing import Route
from .submodel import Submodel
from .weight_changes import mark_initialized


class PCMEnsembleExperts(PCMEnsemblePreTrainedModel):
    """An ensemble's parts: the PCM, the backbones, and the experts on them."""

    def __init__(
        self,
        config: PCMEnsembleConfig,
        backbones: list[PreTrainedModel] | None = None,
        pcm: PreTrainedModel | None = None,
    ):
        if not config.experts or config.pcm is None:
            raise ValueError(
                "An ensemble needs at least one entry in `config.experts`, and `config.pcm`. Build one with "
                "`PCMEnsembleForCausalLM.from_experts`."
            )
        check_config(config)

        super().__init__(config)
        for part in (pcm, *(backbones or [])):
            if part is not None:
                mark_initialized(part)
        self.pcm = PreferenceControlModel(config, pcm)
        self.backbones = ExpertBackbones(config, backbones)

        parts = (self.pcm.body, *self.backbones)
        self._is_stateful = any(part._is_stateful for part in parts)
        self._keep_own_generation_settings()
        self.post_init()

    def _keep_own_generation_settings(self):
        """Keep a preference in it when it is loaded: transformers drops what it takes for the model's own settings."""
        self.generation_config._from_model_config = False

    def forget_weights(self):
        """
        Forget what was computed from the weights: compiled steps, and prompts and descriptions that are kept. Only
        needed after weights were written through `.data`, which leaves no trace; other changes are noticed.
        """
        for submodel in self.submodels:
            submodel.forget_weights()

    @property
    def served_experts(self) -> list[int]:
        """The experts that are behind endpoints, by index."""
        endpoints = self.backbones.endpoints
        return [index for index, expert in enumerate(self.config.experts) if expert["backbone"] in endpoints]

    @property
    def endpoint_usage(self) -> dict[str, Any]:
        """What endpoints were asked so far, by address and the model's name there: see `endpoints.Usage`."""
        found: dict[str, Any] = {}
        for model in self.backbones.endpoints.values():
            name = f"{model.config.address} {model.config.served_model}".rstrip()
            found[name] = found[name] + model.usage if name in found else copy.copy(model.usage)  # asked in two ways
        return found

    @property
    def submodels(self) -> list[Submodel]:
        """The PCM's body and every backbone."""
        return [self.pcm.submodel, *self.backbones.submodels]

    @classmethod
    def from_experts(
        cls,
        experts: Mapping,
        pcm: str | os.PathLike | PreTrainedModel | PreTrainedConfig,
        *,
        pcm_layers: int | None = None,
        tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
        default_preference: str | list | Mapping | None = None,
        merge: str = "probabilities",
        reference: str | None = None,
        expert_top_k: int | None = None,
        **model_kwargs,
    ) -> Self:
        r"""
        Build an ensemble from its parts.

        Args:
            experts (`Mapping`):
                Each expert's name → a Hub repository, a folder, a loaded `PreTrainedModel` (used as it is, and
                frozen), or a mapping with `model` (one of these), `adapter` (a LoRA that PEFT saved: a folder, a
                repository, a mapping with `repository`, and `revision` or `subfolder` of its own, or one shaped as
                PEFT's `LoraConfig` with `tensors`), `prompt` (what this expert reads before the context, as system
                turn where the chat template has one), `description` (what tells the PCM that this expert is wanted;
                defaults to the prompt, else the name) and `dimension` (the axis of preference it stands on). Experts
                that name the same model share it. In place of `model` and `adapter`, `endpoint` and `served_model` say
                who serves the expert elsewhere; what goes with them, see [`~endpoints.EndpointConfig`], and `key`.
            pcm (`str`, `os.PathLike`, `PreTrainedModel` or `PreTrainedConfig`):
                The causal LM that the PCM's body is copied from, or a configuration for random weights.
            pcm_layers (`int`, *optional*): take the first layers only; None takes all.
            tokenizer (`str`, `os.PathLike` or `PreTrainedTokenizerBase`, *optional*):
                Defaults to that of the first part which has one, and which all others must have too. One that is given
                may have more or fewer tokens than theirs, but none of another meaning.
            default_preference (`str`, `list` or `Mapping`, *optional*):
                The preference of calls without one; None is every expert at weight 1, but the reference.
            merge (`str`):
                How experts are merged. They share tokens under `"probabilities"`, Σ α_i π_i, and `"logits"`, π ∝ exp
                Σ α_i logits_i, the paper's ablation. Their wishes add up under `"product"`, log π ∝ log π_0 +
                Σ s_i (log π_i − log π_0), and `"adapters"`, one model with the weights W + Σ s_i (α/r)_i B_i A_i, for
                experts that are LoRA adapters on one backbone.
            reference (`str`, *optional*):
                The expert that is π_0 of a product, and has no weight; None is the bare backbone, if all experts are
                on one.
            expert_top_k (`int`, *optional*): keep each expert's k most probable tokens.
            model_kwargs:
                Passed to `from_pretrained` of every model: `dtype`, `device_map`, `attn_implementation`, `token`, …

        Returns:
            [`PCMEnsembleForCausalLM`] in evaluation mode.

        Raises:
            TypeError: if an argument is of the wrong kind.
            ValueError: if there are no experts, models are not causal LMs, do not share one vocabulary, are not what
                their configurations make (as with an adapter inside), or come from a checkpoint whose configuration
                and weights disagree, an adapter is not plain LoRA on its base as it is, or an argument has a value out
                of range.

        Example:

        ```python
        >>> # `base` is a causal LM: a repository, a folder or a loaded model
        >>> experts = {"concise": {"model": base, "description": "Be concise."}, "friendly": base}
        >>> model = PCMEnsembleForCausalLM.from_experts(experts, pcm=base, pcm_layers=1, tokenizer=tokenizer)
        >>> model.config.expert_names
        ['concise', 'friendly']

        ```
        """
        parts = build_parts(
            experts,
            pcm,
            pcm_layers,
            tokenizer,
            model_kwargs,
            merge=merge,
            reference=reference,
            expert_top_k=expert_top_k,
            default_preference=default_preference,
        )

        model = cls(parts.config, parts.backbones, parts.pcm)
        for name, tensors in parts.adapters.items():
            model.backbones.bank_of(name).load(name, tensors)

        model.generation_config = copy.deepcopy(parts.generation_config)
        set_end_tokens(model.generation_config, parts.config.eos_token_id)
        model._keep_own_generation_settings()
        model._tokenizer = parts.tokenizer
        return model.eval()

    def add_expert(self, name: str, expert, **model_kwargs):
        r"""
        Add an expert. The PCM keeps what it has learnt of the others; the new one starts at the user's weight.

        Args:
            name (`str`): its name.
            expert: what [`from_experts`] takes for one; a model that the ensemble already has is shared.
            model_kwargs: passed to `from_pretrained`.

        Raises:
            TypeError, ValueError: as [`from_experts`], or if the name is taken, the model is there at another
                `revision`, a default preference is a list of as many weights as experts, or tensor parallelism has
                split the ensemble; it stays as it was.

        Example:

        ```python
        >>> model.add_expert("witty", base)
        >>> model.config.expert_names
        ['concise', 'friendly', 'witty']
        >>> model.remove_expert("witty")

        ```
        """
        if (self.tp_size or 1) > 1:
            raise ValueError(
                "Tensor parallelism has split this ensemble, and would not split what is added. Add the expert first, "
                "save, and load it with `distributed_config`."
            )

        entry, parts = build_expert(self, name, expert, model_kwargs)
        names = [*self.config.expert_names, name]
        self._check_defaults(names, f"with {len(names)} experts")
        if new := parts.backbones[len(self.backbones) :]:
            # Of the others those that the ensemble has, which may be a user's own
            ends = self.generation_config.eos_token_id
            self.config.eos_token_id = joined_end_tokens([ends, *(b.generation_config.eos_token_id for b in new)])
            set_end_tokens(self.generation_config, self.config.eos_token_id)

        head_rows = [*range(self.config.num_experts), None]
        self._set_experts([*self.config.experts, entry], parts.backbones, head_rows, parts.adapters)
        self._tokenizer = parts.tokenizer

    def remove_expert(self, name: str):
        """
        Remove an expert, with its adapter, its row of the PCM's head and a backbone that no other expert needs. Where
        the end tokens are those of all backbones, they become those of the ones that stay.

        Raises:
            ValueError: if there is no such expert, it is the last or the reference, or the default preference names
                it.

        Example: see [`add_expert`].
        """
        names = self.config.expert_names
        if name not in names:
            raise ValueError(f"`name` is the unknown expert {name!r}. The experts are {', '.join(names)}.")
        kept = [index for index, other in enumerate(names) if other != name]
        if not kept or (self.config.merge == PRODUCT and [names[index] for index in kept] == [self.config.reference]):
            raise ValueError(f"Expert {name!r} is the only one. An ensemble needs at least one expert.")
        if name == self.config.reference:
            raise ValueError(f"Expert {name!r} is the `reference` of `config`. Change that first.")
        self._check_defaults([names[index] for index in kept], f"without expert {name!r}")

        experts = [self.config.experts[index] for index in kept]
        used = sorted({expert["backbone"] for expert in experts})
        if joined_end_tokens([self.generation_config.eos_token_id]) == all_end_tokens(list(self.backbones)):
            self.config.eos_token_id = all_end_tokens([self.backbones[index] for index in used])
            set_end_tokens(self.generation_config, self.config.eos_token_id)

        experts = [expert | {"backbone": used.index(expert["backbone"])} for expert in experts]
        self._set_experts(experts, [self.backbones[index] for index in used], kept, {})

    def _check_defaults(self, names: list[str], change: str):
        """Refuse a change of experts that default preferences do not go with."""
        defaults = {
            "config.default_preference": self.config.default_preference,
            "generation_config.preference": getattr(self.generation_config, "preference", None),
        }
        for place, preference in defaults.items():
            rows = [preference]  # a list may hold one for each row of a batch, or names or weights
            if isinstance(preference, list) and preference and not isinstance(preference[0], (str, int, float)):
                rows = preference
            for of_row in rows:
                try:
                    given = of_row if isinstance(of_row, torch.Tensor) or of_row else names[0]
                    Preference.parse(given, names, self.config.adds_up)
                except (TypeError, ValueError) as error:
                    raise ValueError(f"`{place}` does not go {change}: {error} Change it first.") from error

    @torch.no_grad()
    def _set_experts(
        self, experts: list[dict], backbones: list[PreTrainedModel], head_rows: Sequence[int | None], new: dict
    ):
        """Rebuild what depends on the experts. `head_rows` are rows of the old head, None for a zero one."""
        names = [expert["name"] for expert in experts]
        adapters = {}
        for bank in self.backbones.banks.values():
            for name in set(bank.names) & set(names):
                adapters[name] = {key: tensor.clone() for key, tensor in bank.tensors(name).items()}
            bank.detach()
        for submodel in self.backbones.submodels:
            submodel.forget_compiled()  # the compiler does not notice that hooks come and go

        size, largest = self.config.vocab_size, min(self.config.part_sizes().values())
        self.config.experts, self.config.backbones = experts, [backbone.config for backbone in backbones]
        chosen = [size] if size < largest else []  # by a user, which another part does not change
        self.config.vocab_size = min([*chosen, *self.config.part_sizes().values()])
        for part in (self.pcm, *backbones):
            mark_initialized(part)
        self.backbones = ExpertBackbones(self.config, backbones)

        for name, tensors in (adapters | new).items():
            self.backbones.bank_of(name).load(name, tensors)
        self.pcm.set_head_rows(head_rows)
        self.post_init()

    def export_adapter(self, name: str, folder: str | os.PathLike):
        """
        Write an expert's LoRA adapter as PEFT does: `PeftModel.from_pretrained(backbone, folder)` loads it.

        Raises:
            ValueError: if there is no such expert, or it has no adapter.

        Example:

        ```python
        >>> model.export_adapter("concise", folder)
        >>> sorted(os.listdir(folder))
        ['adapter_config.json', 'adapter_model.safetensors']

        ```
        """
        Preference.parse(name, self.config.expert_names)
        expert = self.config.experts[self.config.expert_names.index(name)]
        if expert["adapter"] is None:
            raise ValueError(f"Expert {name!r} has no adapter to export.")
        base_model = self.config.backbones[expert["backbone"]].name_or_path
        write_adapter(folder, expert["adapter"], self.backbones.bank_of(name).tensors(name), base_model)

    # Routing

    def _route(self, batch_size: int, cache: PCMEnsembleCache | None, preferences: list[Preference] | None) -> Route:
        """The route of a call: the cache's, which preferences given again must not change, or a new one."""
        if self.config.merge == ADAPTERS and self.training:
            raise ValueError(
                'Through `merge="adapters"` the PCM would get no gradient. Call `eval()`, train with `RebelTrainer`, '
                'or train with `merge="product"`, in which strengths mean the same.'
            )
        known = None if cache is None else cache.route
        if known is not None:
            known.check_config(self.config)
        if known is not None and preferences is None:
            if known.batch_size != batch_size:
                raise ValueError(f"`past_key_values` has {known.batch_size} rows, but `input_ids` has {batch_size}.")
            return known

        if preferences is None:
            preferences = self._preferences(batch_size)
        if known is None:
            return Route(self.config, preferences, self.pcm.head.weight.device)
        if not known.is_of(preferences):
            raise ValueError(
                "`past_key_values` was filled under another preference than the one given. Leave the preference out "
                "to go on with the first one, or start without `past_key_values`."
            )
        return known

    def _preferences(
        self, batch_size: int, preference=None, preference_text=None, preference_ids=None, tokenizer=None
    ) -> list[Preference]:
        """What each row asks for, read from any form."""
        self.config.validate_merge()  # which anybody may set between calls
        if preference_text is not None and tokenizer is None:
            tokenizer = self.tokenizer
        return Preference.parse_batch(self.config, batch_size, preference, preference_text, preference_ids, tokenizer)


__all__ = ["PCMEnsembleExperts"]
