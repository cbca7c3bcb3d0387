"""The only place that runs a model: the PCM's body or a backbone, on rows that have a memory and adapters."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import nn
from transformers import CompileConfig, DynamicCache, PreTrainedModel, modeling_utils
from transformers.utils import ModelOutput

from .compile_steps import CompiledStep
from .configuration_pcm_ensemble import PCMEnsembleConfig
from .lora import AdapterSelection, LoraBank, clear_traced, run_traced
from .memory import LayerStates, Memory
from .prefix_store import PrefixStore, Reading
from .requirements import check_runs
from .rows import Rows, SubmodelInputs, equal_rows, stack_padded
from .weight_changes import WeightSnapshot, module_settings

# Tokens that must be saved for a call of its own to pay: SmolLM2 on 2 CPU cores breaks even at about 420.
MIN_TOKENS_SAVED = 512
# Tokens of all prefixes of a call that are worth to be kept from call to call, and read apart for that.
MIN_TOKENS_KEPT = 128
# Tokens of the prefixes used last that are kept: descriptions may be anything that users write.
MOST_TOKENS_KEPT = 16384


class SubmodelOutput(NamedTuple):
    """What was predicted, `(rows, positions, vocab)` or, without an LM head, `(rows, positions, hidden)`; and all."""

    values: torch.Tensor
    output: ModelOutput


@dataclass
class ReadingPlan:
    r"""
    What of a first call is read once and copied.

    Args:
        row_sets (`list[int]`): each row's set of rows that read the same; empty where every row is read.
        firsts (`list[int]`): the first row of each set, which is read.
        prefixes_apart (`list[Reading]`):
            the distinct prefixes, without their last tokens, that are read before the contexts.
        keeps_prefixes (`bool`): whether these are kept from call to call.
    """

    row_sets: list[int] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)
    prefixes_apart: list[Reading] = field(default_factory=list)
    keeps_prefixes: bool = False


class Submodel:
    r"""
    What the ensemble knows of one of its causal LMs beside the model, which each call gives: users may wrap or replace
    it.

    Args:
        config (`PCMEnsembleConfig`): the ensemble's.
        has_lm_head (`bool`): whether it predicts tokens, or gives hidden states.
        bank (`LoraBank`, *optional*): the adapters on it.
    """

    def __init__(self, config: PCMEnsembleConfig, has_lm_head: bool, bank: LoraBank | None = None):
        check_runs()
        self.config = config
        self.has_lm_head = has_lm_head
        self.bank = bank
        self.store = PrefixStore()
        self.compiled_step: CompiledStep | None = None
        self.weights_change = False

    def __call__(
        self,
        model: PreTrainedModel,
        rows: Rows,
        memory: Memory,
        logits_to_keep: int | torch.Tensor = 0,
        compile_config: CompileConfig | None = None,
        **options,
    ) -> SubmodelOutput:
        r"""
        Read rows, and predict what follows them.

        Args:
            model (`PreTrainedModel`): what reads.
            rows (`Rows`): a first call gives their prefixes too.
            memory (`Memory`): of these rows; an empty one begins.
            logits_to_keep (`int` or `torch.LongTensor` of shape `(positions,)`): context positions to predict from.
            compile_config (`CompileConfig`, *optional*): compiles the step, where it is one token into a static cache.
            options: the model's own, such as `output_hidden_states`. Whoever looks inside sees each row read whole.

        Returns:
            [`SubmodelOutput`]; its `output` is of the rows that were read.
        """
        looks_inside = any(options.values()) or model.config.output_hidden_states or model.config.output_attentions
        plan = ReadingPlan() if looks_inside else plan_reading(rows, memory, model)

        device = rows.input_ids.device
        if plan.row_sets:
            rows = rows.select(torch.tensor(plan.firsts, device=device))
        if plan.prefixes_apart:
            self._read_apart(model, rows, memory, plan)

        inputs = memory.arrange(rows, logits_to_keep, self.config.prefix_bos_token_id)
        selection = self._selection(rows, memory, inputs)
        read = self._run(model, inputs, memory, selection, compile_config, **options)
        if not plan.row_sets:
            return read
        row_sets = torch.tensor(plan.row_sets, device=device)
        memory.copy_rows(row_sets)
        return SubmodelOutput(read.values[row_sets], read.output)

    def _run(
        self,
        model: PreTrainedModel,
        inputs: SubmodelInputs,
        memory: Memory,
        selection: AdapterSelection | None,
        compile_config: CompileConfig | None = None,
        **options,
    ) -> SubmodelOutput:
        """Call the model, or its compiled step."""
        num_tokens, kept = inputs.input_ids.shape[1], inputs.kept
        call: Callable[..., ModelOutput] = model
        if compile_config is not None and num_tokens == 1 and memory.max_length is not None:
            inputs = inputs.of_fixed_form(memory.max_length)
            masks = [] if self.bank is None or selection is None else self.bank.kind_masks(selection)
            call = partial(self._compiled(model, memory, compile_config), masks)

        if self.has_lm_head:
            if isinstance(kept, int) and kept < num_tokens:
                # A slice of the hidden states is no block of memory: torch would multiply it by a copy of the LM head
                # for each row, gigabytes at a large batch. What an index picks is a block.
                kept = torch.arange(num_tokens - kept, num_tokens, device=inputs.input_ids.device)
            options["logits_to_keep"] = kept

        with self._selected(selection):
            output = call(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                position_ids=inputs.position_ids,
                use_cache=memory.cache is not None,
                **{_cache_name(model): memory.cache},
                **options,
            )
        if memory.cache is not None:
            memory.length += num_tokens
        if self.has_lm_head:
            return SubmodelOutput(output["logits"], output)
        return SubmodelOutput(modeling_utils.slice_logits_to_keep(output["last_hidden_state"], kept), output)

    # Prefixes

    @torch.no_grad()
    def _read_apart(self, model: PreTrainedModel, rows: Rows, memory: Memory, plan: ReadingPlan):
        """Begin an empty memory with the rows' prefixes but for their last tokens, after which contexts are read."""
        device, distinct = rows.input_ids.device, plan.prefixes_apart
        if plan.keeps_prefixes:
            some = [reading for reading in distinct if reading[1]]

            def snapshot() -> tuple[WeightSnapshot, list]:
                return WeightSnapshot(model, self.bank), module_settings(model)

            def read(reading: Reading) -> LayerStates:
                return self._states(model, [reading], device)[0]

            states = self.store.get(some, snapshot, read, MOST_TOKENS_KEPT)
        else:
            states = dict(zip(distinct, self._states(model, distinct, device)))

        readings = _without_last_token(rows.readings())
        memory.fill([states.get(reading) for reading in readings], [len(prefix) for _, prefix in readings], device)

    def _states(self, model: PreTrainedModel, readings: list[Reading], device: torch.device) -> list[LayerStates]:
        """Read prefixes in one call."""
        memory = Memory(DynamicCache(config=model.config))
        ids, mask = stack_padded([prefix for _, prefix in readings], device)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        inputs = SubmodelInputs(ids, None if mask.all() else mask, positions, 1)

        rows = Rows(ids, adapters=[adapter for adapter, _ in readings])
        self._run(model, inputs, memory, self._selection(rows, memory, inputs))
        starts = [ids.shape[1] - len(prefix) for _, prefix in readings]
        return [
            [(layer.keys[row, :, start:], layer.values[row, :, start:]) for layer in memory.layers]
            for row, start in enumerate(starts)
        ]

    # Adapters

    def _selection(self, rows: Rows, memory: Memory, inputs: SubmodelInputs) -> AdapterSelection | None:
        """The adapters of a call's rows; where they stay the same, they are worked out once for a memory."""
        if self.bank is None:
            return None
        if isinstance(rows.adapters, torch.Tensor):
            weights = rows.adapters  # (rows, tokens, experts)
            if inputs.order is not None:
                weights = weights.take_along_dim(inputs.order[..., None], dim=1)
            names = self.config.expert_names
            return AdapterSelection(self.bank.number, weights[..., [names.index(name) for name in self.bank.names]])

        known = memory.adapters
        if isinstance(known, AdapterSelection):
            return known
        if rows.adapters is None:
            return None
        memory.adapters = selection = self.bank.selection(rows.adapters, rows.input_ids.device)
        return selection

    def _selected(self, selection: AdapterSelection | None) -> AbstractContextManager:
        return nullcontext() if selection is None else selection.active()

    # Compiled steps

    def _compiled(self, model: PreTrainedModel, memory: Memory, config: CompileConfig) -> CompiledStep:
        """The compiled step; compiled anew where it is of another model, or of weights that have changed since."""
        step, begins = self.compiled_step, not memory.is_marked
        if step is not None and begins and not step.holds_weights_of(model, self.bank):
            self.forget_weights()
        if step is not None and begins and not step.holds_blocks_of(model, self.bank):
            self.forget_compiled()
        if step is not None and (step.config != config or step.model is not model):
            self.forget_compiled()

        step = self.compiled_step
        if step is None:
            run = partial(run_traced, self.bank)
            weights = None if self.weights_change else WeightSnapshot(model, self.bank)
            step = self.compiled_step = CompiledStep(model, run, clear_traced, config, weights, self.bank)
        if not memory.is_marked:
            step.begin(memory.layers)
            memory.is_marked = True
        return step

    def forget_compiled(self):
        """Compile anew at the next step."""
        if self.compiled_step is not None:
            self.compiled_step.forget()
        self.compiled_step = None

    def forget_weights(self):
        """Forget what was computed from the weights; and compile them in no more, since they change."""
        self.store = PrefixStore()
        if self.compiled_step is not None and self.compiled_step.weights is not None:
            self.weights_change = True
            self.forget_compiled()


def plan_reading(rows: Rows, memory: Memory, model: PreTrainedModel) -> ReadingPlan:
    """
    Decide what a first call reads once: rows that read the same, as beams, return sequences and one prompt under many
    preferences do; and prefixes that several rows or many calls begin with.
    """
    plan = ReadingPlan()
    if memory.length > 0 or isinstance(rows.adapters, torch.Tensor):
        return plan

    readings = rows.readings()
    if memory.copies_rows:
        plan.row_sets, plan.firsts = _rows_read_once(rows)
        if plan.firsts:
            readings = [readings[first] for first in plan.firsts]

    # Owners of shards must make the same calls, and each sees its own rows. An endpoint reads nothing ahead.
    weights = list(model.parameters())
    sharded = any(hasattr(weight, "to_local") for weight in weights)
    if memory.takes_prefixes and weights and not sharded and not torch.is_grad_enabled():
        # Under autocast, and under dropout, the same weights make other states.
        makes_others = model.training or torch.is_autocast_enabled(rows.input_ids.device.type)
        plan.prefixes_apart, plan.keeps_prefixes = _prefixes_read_once(readings, may_keep=not makes_others)
    return plan


def _rows_read_once(rows: Rows) -> tuple[list[int], list[int]]:
    """The set of equal rows that each row is of, and each set's first row; none where that saves too little."""
    num_tokens = rows.input_ids.shape[1]
    if not _is_worth_it((len(rows) - 1) * num_tokens):  # the most that could be saved
        return [], []

    row_sets = equal_rows(rows)
    firsts = [row_sets.index(number) for number in range(max(row_sets) + 1)]
    saved = (len(rows) - len(firsts)) * num_tokens
    return (row_sets, firsts) if _is_worth_it(saved) else ([], [])


def _prefixes_read_once(readings: list[Reading], may_keep: bool) -> tuple[list[Reading], bool]:
    """The distinct prefixes, none where reading them apart saves too little; and whether later calls find them."""
    shortened = _without_last_token(readings)
    distinct = list(dict.fromkeys(shortened))
    lengths = [len(prefix) for _, prefix in distinct]

    keeps = may_keep and sum(lengths) >= MIN_TOKENS_KEPT
    saved = (len(shortened) - len(distinct)) * max(lengths)
    return (distinct if keeps or _is_worth_it(saved) else []), keeps


def _is_worth_it(saved: int) -> bool:
    """Whether so many tokens outweigh the work of finding and copying what is the same."""
    return saved > 0 and saved >= MIN_TOKENS_SAVED


def _without_last_token(readings: list[Reading]) -> list[Reading]:
    """A prefix's last token is read with the context: where that begins with padding, it predicts in its place."""
    return [(adapter, prefix[:-1]) for adapter, prefix in readings]


def _cache_name(model: nn.Module) -> str:
    """What the model, which PEFT may have wrapped, calls its cache."""
    base_model = getattr(model, "get_base_model", None)
    return _cache_argument(type(model if base_model is None else base_model()).forward)


@cache
def _cache_argument(forward: Callable) -> str:
    return "cache_params" if "cache_params" in inspect.signature(forward).parameters else "past_key_values"


__all__ = ["Submodel", "SubmodelOutput"]
