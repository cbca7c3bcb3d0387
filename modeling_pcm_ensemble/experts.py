"""Which experts an ensemble has: it is built from them, and they come and go."""

import copy
import os
from collections.abc import Mapping
from typing import Self

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .backbones import ExpertBackbones
from .checkpoint_build import all_end_tokens, build_expert, build_parts, set_end_tokens
from .lora_peft_format import write_adapter
from .preference import Preference


class PCMEnsembleExpertsMixin:
    """Building an ensemble from experts; adding, removing and exporting them."""

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
                that name the same model share it.
            pcm (`str`, `os.PathLike`, `PreTrainedModel` or `PreTrainedConfig`):
                The causal LM that the PCM's body is copied from, or a configuration for random weights.
            pcm_layers (`int`, *optional*): take the first layers only; None takes all.
            tokenizer (`str`, `os.PathLike` or `PreTrainedTokenizerBase`, *optional*):
                Defaults to that of the first part which has one, and which all others must have too. One that is given
                may have more or fewer tokens than theirs, but none of another meaning.
            default_preference (`str`, `list` or `Mapping`, *optional*):
                The preference of calls without one; None is every expert at weight 1.
            merge (`str`):
                What is mixed: `"probabilities"`, Σ α_i π_i; `"logits"`, π ∝ exp Σ α_i logits_i, the paper's ablation;
                or `"adapters"`, one model with the weights W + Σ α_i s_i B_i A_i, for experts that are LoRA adapters
                on one backbone.
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
        """
        parts = build_parts(
            experts,
            pcm,
            pcm_layers,
            tokenizer,
            model_kwargs,
            merge=merge,
            expert_top_k=expert_top_k,
            default_preference=default_preference,
        )

        model = cls(parts.config, parts.backbones, parts.pcm)
        for name, tensors in parts.adapters.items():
            model.backbones.bank_of(name).load(name, tensors)

        model.generation_config = copy.deepcopy(parts.backbones[0].generation_config)
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
            TypeError, ValueError: as [`from_experts`], or if the name is taken, or tensor parallelism has split the
                ensemble; it stays as it was.
        """
        if (self.tp_size or 1) > 1:
            raise ValueError(
                "Tensor parallelism has split this ensemble, and would not split what is added. Add the expert first, "
                "save, and load it with `distributed_config`."
            )

        entry, parts = build_expert(self, name, expert, model_kwargs)
        if len(parts.backbones) > len(self.backbones):
            self.config.eos_token_id = all_end_tokens(parts.backbones)
            set_end_tokens(self.generation_config, self.config.eos_token_id)

        head_rows = [*range(self.config.num_experts), None]
        self._set_experts([*self.config.experts, entry], parts.backbones, head_rows, parts.adapters)
        self._tokenizer = parts.tokenizer

    def remove_expert(self, name: str):
        """
        Remove an expert, with its adapter, its row of the PCM's head and a backbone that no other expert needs.

        Raises:
            ValueError: if there is no such expert, it is the last, or the default preference names it.
        """
        names = self.config.expert_names
        if name not in names:
            raise ValueError(f"`name` is the unknown expert {name!r}. The experts are {', '.join(names)}.")
        kept = [index for index, other in enumerate(names) if other != name]
        if not kept:
            raise ValueError(f"Expert {name!r} is the only one. An ensemble needs at least one expert.")
        defaults = {
            "config.default_preference": self.config.default_preference,
            "generation_config.preference": getattr(self.generation_config, "preference", None),
        }
        for place, preference in defaults.items():
            try:
                Preference.parse(preference or names[kept[0]], [names[index] for index in kept])
            except ValueError as error:
                raise ValueError(f"`{place}` does not go without expert {name!r}: {error} Change it first.") from error

        experts = [self.config.experts[index] for index in kept]
        used = sorted({expert["backbone"] for expert in experts})
        experts = [expert | {"backbone": used.index(expert["backbone"])} for expert in experts]
        self._set_experts(experts, [self.backbones[index] for index in used], kept, {})

    @torch.no_grad()
    def _set_experts(
        self, experts: list[dict], backbones: list[PreTrainedModel], head_rows: list[int | None], new: dict
    ):
        """Rebuild what depends on the experts. `head_rows` are rows of the old head, None for a zero one."""
        names = [expert["name"] for expert in experts]
        adapters = {}
        for bank in self.backbones.adapters.values():
            for name in set(bank.names) & set(names):
                adapters[name] = {key: tensor.clone() for key, tensor in bank.tensors(name).items()}
            bank.detach()
        for submodel in self.backbones.submodels:
            submodel.forget_compiled()  # the compiler does not notice that hooks come and go

        self.config.experts, self.config.backbones = experts, [backbone.config for backbone in backbones]
        sizes = [part.get_text_config().vocab_size for part in self.config.sub_config_items().values()]
        self.config.vocab_size = min(sizes)
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
        """
        Preference.parse(name, self.config.expert_names)
        expert = self.config.experts[self.config.expert_names.index(name)]
        if expert["adapter"] is None:
            raise ValueError(f"Expert {name!r} has no adapter to export.")
        base_model = self.config.backbones[expert["backbone"]].name_or_path
        write_adapter(folder, expert["adapter"], self.backbones.bank_of(name).tensors(name), base_model)


__all__ = ["PCMEnsembleExpertsMixin"]
