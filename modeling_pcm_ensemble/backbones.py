"""Frozen causal LMs, each serving the rows of all experts that are built on it."""

import re
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .compile_steps import forget_compiled
from .configuration_pcm_ensemble import PCMEnsembleConfig
from .lora import AdapterSelection, LoraBank, readable_by_compiled_code
from .merging import ExpertLogits
from .preferences import ExpertRows
from .prefix_store import KeptPrompts
from .prefixes import (
    CachePart,
    SubmodelInputs,
    encode_prefixes_once,
    pad_left,
    repeated_rows,
    run_submodel,
    submodel_inputs,
)


def run_rows(model: PreTrainedModel, inputs: SubmodelInputs, part: CachePart) -> torch.Tensor:
    """A causal LM's logits, `(rows, positions, vocab)`."""
    width, kept = inputs.input_ids.shape[1], inputs.kept
    if isinstance(kept, int) and kept < width:
        # A slice of the hidden states is no block of memory: torch would multiply it by a copy of the LM head for each
        # row, gigabytes at a large batch. What an index picks is a block.
        kept = torch.arange(width - kept, width, device=inputs.input_ids.device)
    return run_submodel(model, inputs, part, logits_to_keep=kept).logits


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
            forget_compiled(backbone)
        self.adapters = nn.ModuleDict()
        for index in range(len(self)):
            adapters = {e["name"]: e["adapter"] for e in config.experts if e["backbone"] == index and e["adapter"]}
            if adapters:
                self.adapters[str(index)] = LoraBank(self[index], adapters)
        self.kept_prompts: dict[int, KeptPrompts] = {}  # by backbone
        self.post_init()
        self.train(False)

    def __len__(self) -> int:
        return len(self.config.backbones)

    def __getitem__(self, index: int) -> PreTrainedModel:
        return self.get_submodule(str(range(len(self))[index]))

    def __iter__(self) -> Iterator[PreTrainedModel]:
        return (self[index] for index in range(len(self)))

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
        for backbone in self:
            plan = {name: self._tp_plan.get(f"*.{name}") for name in backbone.tp_plan}
            if plan != backbone.tp_plan:
                kinds = ", ".join(sorted({config.model_type for config in self.config.backbones}))
                raise ValueError(
                    f"Tensor parallelism would split layers of one name in different ways: the backbones are {kinds}. "
                    "Use `DistributedConfig(fsdp_size=…)` or `device_map`."
                )

    def train(self, mode: bool = True) -> "ExpertBackbones":
        """Stay in evaluation mode and frozen: loading replaces parameters and modules, and then calls `eval()`."""
        self.requires_grad_(False)
        for index, bank in self.adapters.items():
            bank.attach(self[int(index)])
        return super().train(False)

    def bank_of(self, name: str) -> LoraBank:
        """The bank that holds the adapter of an expert."""
        return next(bank for bank in self.adapters.values() if name in bank.names)

    @torch.no_grad()
    def forward(
        self,
        backbone: int,
        expert_rows: list[ExpertRows],
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None,
        part: CachePart,
        logits_to_keep: int | torch.LongTensor = 0,
        expert_weights: torch.Tensor | None = None,
    ) -> list[ExpertLogits]:
        r"""
        Run one backbone once on all its (row, expert) pairs; of pairs that read the same, on one.

        Args:
            backbone (`int`): its index.
            expert_rows (`list[ExpertRows]`): the batch rows of each of its active experts.
            input_ids (`torch.LongTensor` of shape `(pairs, seq)`): each pair's new context tokens.
            attention_mask (`torch.LongTensor` of shape `(pairs, cached + seq)`, *optional*): the context's.
            part (`CachePart`): the backbone's memory; an empty one is given the prompts.
            logits_to_keep (`int` or `torch.LongTensor` of shape `(positions,)`): context positions to predict from.
            expert_weights (`torch.FloatTensor` of shape `(pairs, seq, experts)`, *optional*):
                α, to mix the experts' adapters at each token instead of running each alone.

        Returns:
            `list[ExpertLogits]`: logits `(active rows, positions, vocab)` of each active expert.
        """
        repeated = None
        if part.length == 0 and expert_weights is None:
            entries = _entries(expert_rows).to(input_ids.device)
            repeated = repeated_rows(part, entries[:, None], attention_mask, input_ids)
        if repeated is None:
            logits = self._logits(
                backbone, expert_rows, input_ids, attention_mask, part, logits_to_keep, expert_weights
            )
        else:
            firsts, groups = repeated
            numbers = entries[firsts].bincount(minlength=len(expert_rows)).tolist()
            distinct = [entry._replace(num_rows=number) for entry, number in zip(expert_rows, numbers)]
            mask = None if attention_mask is None else attention_mask[firsts]
            logits = self._logits(backbone, distinct, input_ids[firsts], mask, part, logits_to_keep)[groups]
            part.copy_rows(groups)
        chunks = logits.split([entry.num_rows for entry in expert_rows])
        return [ExpertLogits(entry.expert, entry.rows, chunk) for entry, chunk in zip(expert_rows, chunks)]

    def _logits(
        self,
        backbone: int,
        expert_rows,
        input_ids,
        attention_mask,
        part: CachePart,
        logits_to_keep,
        expert_weights=None,
    ) -> torch.Tensor:
        """Logits of all pairs, `(pairs, positions, vocab)`; arguments as for `forward`."""
        prompts = self._prompts(expert_rows, input_ids.device) if part.length == 0 else None
        if prompts is not None:
            self._encode_prompts_once(backbone, expert_rows, prompts, part)
        inputs = submodel_inputs(
            input_ids,
            attention_mask,
            prompts,
            part,
            logits_to_keep,
            self.config.prefix_bos_token_id,
        )
        with self._selected(backbone, self._selection(backbone, expert_rows, part, inputs, expert_weights)):
            logits = run_rows(self[backbone], inputs, part)
        return logits[..., : self.config.vocab_size]

    def _encode_prompts_once(self, backbone: int, expert_rows: list[ExpertRows], prompts, part: CachePart):
        """Each expert's prompt on one row, kept from an earlier call or read now."""

        def read(experts: tuple[int, ...], inputs: SubmodelInputs, part: CachePart):
            selection = None
            if str(backbone) in self.adapters:
                names = [self.config.experts[expert]["name"] for expert in experts]
                selection = self.adapters[str(backbone)].selection(names, [1] * len(names), prompts.device)
            with self._selected(backbone, selection):
                run_rows(self[backbone], inputs, part)

        experts = tuple(entry.expert for entry in expert_rows)
        texts = {expert: ((expert,), tuple(self.config.experts[expert]["prompt_ids"])) for expert in experts}
        rows = [texts[entry.expert] for entry in expert_rows for _ in range(entry.num_rows)]
        kept = self.kept_prompts.setdefault(backbone, KeptPrompts())
        if not kept.fill(part, rows, self[backbone], read, prompts.device):
            groups = _entries(expert_rows).to(prompts.device)
            encode_prefixes_once(prompts, groups, part, partial(read, experts, part=part))

    def _selection(self, backbone: int, expert_rows, part: CachePart, inputs: SubmodelInputs, expert_weights):
        """The adapters of a call's rows; those of a cached part are worked out once."""
        if str(backbone) not in self.adapters:
            return None
        bank = self.adapters[str(backbone)]
        if expert_weights is not None:
            if inputs.order is not None:
                expert_weights = expert_weights.take_along_dim(inputs.order[..., None], dim=1)
            names = self.config.expert_names
            return AdapterSelection(expert_weights[..., [names.index(name) for name in bank.names]], bank.number)
        if part.adapters is None:
            names = [self.config.experts[entry.expert]["name"] for entry in expert_rows]
            part.adapters = bank.selection(names, [entry.num_rows for entry in expert_rows], inputs.input_ids.device)
        return part.adapters

    def _selected(self, backbone: int, selection: AdapterSelection | None):
        if selection is None:
            return readable_by_compiled_code(None, None)
        return self.adapters[str(backbone)].selected(selection)

    def _prompts(self, expert_rows: list[ExpertRows], device: torch.device) -> torch.LongTensor | None:
        """Each pair's prompt, `(pairs, longest)`, padded on the left with -1."""
        if expert_rows[0].expert < 0:  # rows that mix adapters, which have no prompts
            return None
        prompts = [self.config.experts[entry.expert]["prompt_ids"] for entry in expert_rows]
        return pad_left([ids for ids, entry in zip(prompts, expert_rows) for _ in range(entry.num_rows)], device)


def _entries(expert_rows: list[ExpertRows]) -> torch.LongTensor:
    """The entry of `expert_rows` that each pair belongs to, by index, `(pairs,)`."""
    return torch.arange(len(expert_rows)).repeat_interleave(torch.tensor([entry.num_rows for entry in expert_rows]))


__all__ = ["ExpertBackbones", "run_rows"]
