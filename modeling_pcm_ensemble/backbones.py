"""Frozen causal LMs, each serving the rows of all experts that are built on it."""

import re
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, CompileConfig, PreTrainedModel

from .configuration_pcm_ensemble import ENDPOINT, PCMEnsembleConfig
from .lora import LoraBank
from .memory import Memory
from .merging import ExpertLogits
from .routing import ExpertRows
from .rows import Rows
from .submodel import Submodel

BARE: dict = {"name": None, "prompt_ids": ()}  # a backbone without adapter and prompt, in the place of an expert


class ExpertBackbones(PreTrainedModel):
    r"""
    The ensemble's backbones, by index, in the order of `config.backbones`, and their experts' LoRA adapters in
    `adapters`, by the same index as a string. All are frozen.

    Args:
        config (`PCMEnsembleConfig`): the ensemble's.
        backbones (`list[PreTrainedModel]`, *optional*): loaded causal LMs; made from `config` if not given.
    """

    # A PreTrainedModel rather than a ModuleList, because only direct children that are one hand up what loading and
    # saving need: tied weights, modules that must not be split over devices, weights kept in float32.
    config: PCMEnsembleConfig
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: PCMEnsembleConfig, backbones: list[PreTrainedModel] | None = None):
        super().__init__(config)
        for index, backbone_config in enumerate(config.backbones):
            backbone = backbones[index] if backbones else AutoModelForCausalLM.from_config(backbone_config)
            config.backbones[index] = backbone.config
            self.add_module(str(index), backbone)

        self.adapters = nn.ModuleDict()
        for index in range(len(self)):
            adapters = {e["name"]: e["adapter"] for e in config.experts if e["backbone"] == index and e["adapter"]}
            if adapters:
                self.adapters[str(index)] = LoraBank(self[index], adapters)
        self.submodels = [Submodel(config, has_lm_head=True, bank=self.banks.get(i)) for i in range(len(self))]
        self.post_init()
        self.train(False)

    def __len__(self) -> int:
        return len(self.config.backbones)

    def __getitem__(self, index: int) -> PreTrainedModel:
        return getattr(self, str(range(len(self))[index]))

    def __iter__(self) -> Iterator[PreTrainedModel]:
        return (self[index] for index in range(len(self)))

    @property
    def endpoints(self) -> dict[int, PreTrainedModel]:
        """The backbones that somebody else serves, by index."""
        return {i: self[i] for i in range(len(self)) if self.config.backbones[i].model_type == ENDPOINT}

    def cancel_requests(self, callers: Collection[int]):
        """Give up what these threads, by their identity, have asked endpoints for."""
        served: list[Any] = list(self.endpoints.values())
        for endpoint in served:
            endpoint.cancel(callers)

    @property
    def banks(self) -> dict[int, LoraBank]:
        """The adapters, by their backbone's index."""
        return {int(index): bank for index, bank in self.adapters.items() if isinstance(bank, LoraBank)}

    def init_parallel_plans(self):
        """Take over the backbones' plans, with `*` for a backbone's number, as rules are looked up in transformers."""
        super().init_parallel_plans()
        for kind in ("_tp_plan", "_ep_plan", "_fsdp_plan"):
            setattr(self, kind, {re.sub(r"^\d+\.", "*.", name): style for name, style in getattr(self, kind).items()})

    def check_tensor_parallel(self):
        """
        Raises:
            ValueError: if there are adapters, or two backbones whose layers of one name are split in different ways.
        """
        if self.adapters:
            raise ValueError(
                "Tensor parallelism splits layers that adapters are added to, which is not supported. Use "
                "`DistributedConfig(fsdp_size=…)` or `device_map`, or experts that are checkpoints of their own."
            )

        plans = self._tp_plan or {}
        for backbone in self:
            plan = {name: plans.get(f"*.{name}") for name in backbone.tp_plan}
            if plan != backbone.tp_plan:
                kinds = ", ".join(sorted({config.model_type for config in self.config.backbones}))
                raise ValueError(
                    f"Tensor parallelism would split layers of one name in different ways: the backbones are {kinds}. "
                    "Use `DistributedConfig(fsdp_size=…)` or `device_map`."
                )

    def train(self, mode: bool = True) -> "ExpertBackbones":
        """Stay in evaluation mode and frozen: loading replaces parameters and modules, and then calls `eval()`."""
        self.requires_grad_(False)
        for index, bank in self.banks.items():
            bank.attach(self[index])
        return super().train(False)

    def bank_of(self, name: str) -> LoraBank:
        """The bank that holds the adapter of an expert."""
        return next(bank for bank in self.banks.values() if name in bank.names)

    @torch.no_grad()
    def forward(
        self,
        backbone: int,
        expert_rows: list[ExpertRows],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        memory: Memory | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        expert_weights: torch.Tensor | None = None,
        compile_config: CompileConfig | None = None,
    ) -> list[ExpertLogits]:
        r"""
        Run one backbone once on all its (row, expert) pairs.

        Args:
            backbone (`int`): its index.
            expert_rows (`list[ExpertRows]`): the batch rows of each of its active experts.
            input_ids (`torch.LongTensor` of shape `(pairs, seq)`): each pair's new context tokens.
            attention_mask (`torch.LongTensor` of shape `(pairs, cached + seq)`, *optional*): the context's.
            memory (`Memory`, *optional*): the backbone's; nothing is remembered without.
            logits_to_keep (`int` or `torch.LongTensor` of shape `(positions,)`): context positions to predict from.
            expert_weights (`torch.FloatTensor` of shape `(pairs, seq, experts)`, *optional*):
                Strengths, to add up the experts' adapters at each token instead of running each alone.
            compile_config (`CompileConfig`, *optional*): compiles the step, where it is one token.

        Returns:
            `list[ExpertLogits]`: logits `(active rows, positions, vocab)` of each active expert.
        """
        memory = Memory() if memory is None else memory
        submodel = self.submodels[backbone]
        rows = Rows(input_ids, attention_mask, adapters=expert_weights)

        # A memory knows its rows' adapters from the first call on, but for one that has just been joined.
        unknown = memory.length == 0 or (submodel.bank is not None and memory.adapters is None)
        if expert_weights is None and unknown:
            experts = []
            for index, _, num_rows in expert_rows:
                experts += [BARE if index is None else self.config.experts[index]] * num_rows
            rows.adapters = [expert["name"] for expert in experts]
            if memory.length == 0:
                rows.prefixes = [tuple(expert["prompt_ids"]) for expert in experts]

        logits = submodel(self[backbone], rows, memory, logits_to_keep, compile_config).values
        chunks = logits[..., : self.config.vocab_size].split([entry.num_rows for entry in expert_rows])
        return [ExpertLogits(entry.expert, entry.rows, chunk) for entry, chunk in zip(expert_rows, chunks)]


__all__ = ["ExpertBackbones"]
