"""The only place that runs a model: the PCM's body or a backbone, on rows that have a memory and adapters."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple, Protocol

import torch
from torch import nn
from transformers import CompileConfig, DynamicCache, PreTrainedModel
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import ModelOutput

from .compile_steps import CompiledStep
from .configuration_pcm_ensemble import PCMEnsembleConfig
from .lora import AdapterSelection, LoraBank, run_traced
from .memory import LayerStates, Memory
from .prefix_store import PrefixStore, Reader, may_keep
from .rows import Rows, SubmodelInputs, equal_rows, stack_padded

# Tokens that must be saved for a call of its own to pay: SmolLM2 on 2 CPU cores breaks even at about 420.
MIN_TOKENS_SAVED = 512
# Tokens of all prefixes of a call that are worth to be kept, and read apart for that.
MIN_TOKENS_KEPT = 128


class Owner(Protocol):
    """What holds a submodel by its name, and the ensemble's configuration."""

    config: PCMEnsembleConfig


class SubmodelOutput(NamedTuple):
    """What was predicted, `(rows, positions, vocab)` or, without an LM head, `(rows, positions, hidden)`; and all."""

    values: torch.Tensor
    output: ModelOutput


@dataclass
class ReadingPlan:
    r"""
    What of a first call is read once and copied.

    Args:
        sets (`list[int]`, *optional*): each row's set of rows that read the same; the first of each set runs.
        apart (`list[Reader]`, *optional*):
            the distinct prefixes, without their last tokens, that are read before the contexts.
        keeps (`bool`): whether they are kept from call to call.
    """

    sets: list[int] | None = None
    apart: list[Reader] | None = None
    keeps: bool = False


class Submodel:
    r"""
    One causal LM of an ensemble, with or without its LM head.

    Args:
        owner (`Owner`): the module that holds it and the ensemble's configuration.
        name (`str`): its name there, by which it is looked up at each call: users may wrap or replace it.
        has_lm_head (`bool`): whether it predicts tokens, or gives hidden states.
        bank (`LoraBank`, *optional*): the adapters on it.
    """

    def __init__(self, owner: Owner, name: str, has_lm_head: bool, bank: LoraBank | None = None):
        self.owner = owner
        self.name = name
        self.has_lm_head = has_lm_head
        self.bank = bank
        self.store = PrefixStore()
        self.compiled_step: CompiledStep | None = None
        self.weights_change = False

    @property
    def model(self) -> PreTrainedModel:
        return getattr(self.owner, self.name)

    def __call__(
        self,
        rows: Rows,
        memory: Memory,
        logits_to_keep: int | torch.Tensor = 0,
        compile_config: CompileConfig | None = None,
        **options,
    ) -> SubmodelOutput:
        r"""
        Read rows, and predict what follows them.

        Args:
            rows (`Rows`): a first call gives their prefixes too.
            memory (`Memory`): of these rows; an empty one begins.
            logits_to_keep (`int` or `torch.LongTensor` of shape `(positions,)`): context positions to predict from.
            compile_config (`CompileConfig`, *optional*): compiles the step, where it is one token into a static cache.
            options: the model's own, such as `output_hidden_states`. Whoever looks inside sees each row read whole.

        Returns:
            [`SubmodelOutput`]; its `output` is of the rows that ran.
        """
        looks_inside = any(options.values()) or self.model.config.output_hidden_states
        looks_inside = looks_inside or self.model.config.output_attentions
        plan = ReadingPlan() if looks_inside else plan_reading(rows, memory, self.model)

        if plan.sets is not None:
            sets = torch.tensor(plan.sets, device=rows.input_ids.device)
            firsts = [plan.sets.index(number) for number in range(max(plan.sets) + 1)]
            rows = rows.select(torch.tensor(firsts, device=sets.device))
        if plan.apart is not None:
            self._read_apart(rows, memory, plan.apart, plan.keeps)

        inputs = memory.arrange(rows, logits_to_keep, self.owner.config.prefix_bos_token_id)
        selection = self._selection(rows, memory, inputs)
        read = self._run(inputs, memory, selection, compile_config, **options)
        if plan.sets is None:
            return read
        memory.copy_rows(sets)
        return SubmodelOutput(read.values[sets], read.output)

    def _run(
        self,
        inputs: SubmodelInputs,
        memory: Memory,
        selection: AdapterSelection | None,
        compile_config: CompileConfig | None = None,
        **options,
    ) -> SubmodelOutput:
        """Call the model, or its compiled step."""
        model, num_tokens, kept = self.model, inputs.input_ids.shape[1], inputs.kept
        call: Callable[..., ModelOutput] = model
        if compile_config is not None and num_tokens == 1 and memory.max_length is not None:
            inputs = inputs.of_fixed_form(memory.max_length)
            masks = [] if self.bank is None or selection is None else self.bank.kind_masks(selection)
            call = partial(self._compiled(compile_config), masks)

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
        return SubmodelOutput(slice_logits_to_keep(output["last_hidden_state"], kept), output)

    # Prefixes

    @torch.no_grad()
    def _read_apart(self, rows: Rows, memory: Memory, distinct: list[Reader], keeps: bool):
        """Begin an empty memory with the rows' prefixes but for their last tokens, after which contexts are read."""
        device = rows.input_ids.device
        if keeps:
            some = [reader for reader in distinct if reader[1]]
            states = self.store.get(some, self.model, lambda reader: self._states([reader], device)[0])
        else:
            states = dict(zip(distinct, self._states(distinct, device)))

        readers = [(adapter, prefix[:-1]) for adapter, prefix in rows.readers()]
        memory.fill([states.get(reader) for reader in readers], [len(prefix) for _, prefix in readers], device)

    def _states(self, readers: list[Reader], device: torch.device) -> list[LayerStates]:
        """Read prefixes in one call."""
        memory = Memory(DynamicCache(config=self.model.config))
        ids, mask = stack_padded([prefix for _, prefix in readers], device)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        inputs = SubmodelInputs(ids, None if mask.all() else mask, positions, 1)

        rows = Rows(ids, adapters=[adapter for adapter, _ in readers])
        self._run(inputs, memory, self._selection(rows, memory, inputs))
        starts = [ids.shape[1] - len(prefix) for _, prefix in readers]
        return [
            [(layer.keys[row, :, start:], layer.values[row, :, start:]) for layer in memory.layers]
            for row, start in enumerate(starts)
        ]

    # Adapters

    def _selection(self, rows: Rows, memory: Memory, inputs: SubmodelInputs) -> AdapterSelection | None:
        """The adapters of a call's rows; where they stay the same, they are worked out once for a memory."""
        if self.bank is None or rows.adapters is None:
            return None
        if isinstance(rows.adapters, torch.Tensor):
            weights = rows.adapters  # (rows, tokens, experts)
            if inputs.order is not None:
                weights = weights.take_along_dim(inputs.order[..., None], dim=1)
            names = self.owner.config.expert_names
            return AdapterSelection(self.bank.number, weights[..., [names.index(name) for name in self.bank.names]])

        if not isinstance(memory.adapters, AdapterSelection):
            memory.adapters = self.bank.selection(rows.adapters, rows.input_ids.device)
        return memory.adapters

    def _selected(self, selection: AdapterSelection | None) -> AbstractContextManager:
        return nullcontext() if selection is None else selection.active()

    # Compiled steps

    def _compiled(self, config: CompileConfig) -> CompiledStep:
        if self.compiled_step is None or self.compiled_step.config != config:
            self.forget_compiled()
            run = partial(run_traced, self.model, self.bank)
            self.compiled_step = CompiledStep(self.model, run, config, self.weights_change)
        return self.compiled_step

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

    def forget_changed_weights(self):
        """Forget a compiled step whose weights are no longer as they were."""
        step = self.compiled_step
        if step is not None and step.weights is not None and not step.weights.is_of(self.model):
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

    num_tokens, readers = rows.input_ids.shape[1], rows.readers()
    if memory.copies_rows and (len(rows) - 1) * num_tokens >= MIN_TOKENS_SAVED:
        sets = equal_rows(rows)
        if (len(rows) - 1 - max(sets)) * num_tokens >= max(MIN_TOKENS_SAVED, 1):
            plan.sets = sets
            readers = [readers[sets.index(number)] for number in range(max(sets) + 1)]

    if torch.is_grad_enabled() or not memory.takes_prefixes:
        return plan
    shortened = [(adapter, prefix[:-1]) for adapter, prefix in readers]
    distinct = list(dict.fromkeys(shortened))
    lengths = [len(prefix) for _, prefix in distinct]
    longest, total = max(lengths), sum(lengths)
    plan.keeps = total >= MIN_TOKENS_KEPT and may_keep(model, rows.input_ids.device)
    if plan.keeps or (len(shortened) - len(distinct)) * longest >= max(MIN_TOKENS_SAVED, 1):
        plan.apart = distinct
    return plan


def _cache_name(model: nn.Module) -> str:
    """What the model, which PEFT may have wrapped, calls its cache."""
    base_model = getattr(model, "get_base_model", None)
    return _cache_argument(type(model if base_model is None else base_model()).forward)


@cache
def _cache_argument(forward: Callable) -> str:
    return "cache_params" if "cache_params" in inspect.signature(forward).parameters else "past_key_values"


__all__ = ["Submodel", "SubmodelOutput"]
