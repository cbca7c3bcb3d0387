"""A submodel's step of decoding, compiled."""

from collections.abc import Callable
from functools import cached_property
from threading import RLock
from typing import Any

import torch
from torch import nn
from transformers import CompileConfig, PreTrainedModel
from transformers.utils import ModelOutput, logging
from transformers.utils.logging import tqdm

from .compile_attention import grouped_attention
from .compile_blocks import CompiledBlocks, find_blocks
from .compile_linears import can_pack
from .compile_start import prepare_compiler
from .requirements import check_compiles
from .weight_changes import WeightSnapshot

logger = logging.get_logger(__name__)

RECOMPILE_LIMIT = 64  # of a submodel
DOES_NOT_COMPILE = (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit)

# Threads take turns: the compiler's settings, and a model's attention while it is compiled, are not one thread's.
_one_at_a_time = RLock()


class CompiledStep:
    """
    A submodel's step, compiled; as it was, with one warning, where it does not compile. It stays with the submodel,
    but not with a copy, whose own it is not.

    On a CPU, where a model's blocks are alike, one is compiled for all (see [`CompiledBlocks`]); else the whole step.

    Args:
        model (`PreTrainedModel`): the submodel's.
        run (`Callable`): calls the model, or a part of it, in code that is compiled: `run(call, adapter_masks, …)`.
        clear (`Callable`): clears what `run` leaves behind where it fails.
        config (`CompileConfig`): how it is compiled.
        weights (`WeightSnapshot`, *optional*): weights that may be packed or compiled in; None where they change,
            since torch never frees what is compiled in.
        adapters (`nn.Module`, *optional*): adapters on the model, at the paths of its modules.

    Raises:
        ImportError: if torch is too old.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        run: Callable[..., Any],
        clear: Callable[[], None],
        config: CompileConfig,
        weights: WeightSnapshot | None,
        adapters: nn.Module | None = None,
    ):
        check_compiles()
        self.model = model
        self.clear = clear
        self.config = config
        self.settings = {} if weights is None else _inductor_settings(model, config)
        self.weights = weights if self.settings else None

        options = config.to_dict()
        if self.settings:
            options["fullgraph"] = True  # what does not compile must not have run in part
        if options["dynamic"] is None:
            options["dynamic"] = True  # routes change the number of rows from call to call
        options |= {"isolate_recompiles": True, "recompile_limit": RECOMPILE_LIMIT}
        with _one_at_a_time:
            blocks = find_blocks(model, adapters)
        self.blocks: CompiledBlocks | None = None
        self.blocks_fail = False
        if blocks is not None:
            packs = self.weights is not None and can_pack(model.dtype)
            self.blocks = CompiledBlocks(model, blocks, run, packs, options)

        def step(adapter_masks, **inputs) -> ModelOutput:  # of which the model's own hooks are a part
            return run(model, adapter_masks, **inputs)

        step.__code__ = step.__code__.replace()  # its own, so that what is compiled of it can be forgotten alone
        self.code = step.__code__
        self.call = torch.compile(step, **options)
        self.compiles = config.backend != "inductor" or _may_keep_code(model)
        self.has_run = {True: False, False: False}  # by whether it is for one row, which has code of its own

    def __call__(self, adapter_masks: list[torch.Tensor], **inputs) -> ModelOutput:
        """Run the step; `adapter_masks` are what [`~lora.run_traced`] takes, `inputs` the model's."""
        single = len(inputs["input_ids"]) == 1

        # A setting that torch has no public name for: a model's floats as constants. Without it, compiling and steps
        # are slower, no more.
        with (
            _one_at_a_time,
            torch._dynamo.config.patch(specialize_float=True),
            grouped_attention(self.model),
        ):
            try:
                output = self._run(single, adapter_masks, **inputs)
            except DOES_NOT_COMPILE as error:
                name = type(self.model).__name__
                logger.warning(f"{name} does not compile; its steps run uncompiled. {type(error).__name__}: {error}")
                self.compiles = False
                output = self.model(**inputs)
            finally:
                self.clear()

        self.has_run[single] = True
        return _copied(output) if self.model.device.type == "cuda" else output

    def _run(self, single: bool, adapter_masks: list[torch.Tensor], **inputs) -> ModelOutput:
        if not self.compiles:
            return self.model(**inputs)
        if self.has_run[single]:
            return self._compiled(adapter_masks, **inputs)

        rows = "one row" if single else "any number of rows"
        title = f"Compiling the step of {type(self.model).__name__} for {rows}, which may take a minute"
        with tqdm(total=1, desc=title, bar_format="{desc}"):  # a clock would stand still
            return self._compiled(adapter_masks, **inputs)

    def _compiled(self, adapter_masks: list[torch.Tensor], **inputs) -> ModelOutput:
        looks_inside = inputs.get("output_hidden_states") or inputs.get("output_attentions")
        is_plain = not (looks_inside or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
        if self.blocks is not None and is_plain:
            try:
                with torch._inductor.config.patch(self.vector_width), self.blocks.active(adapter_masks):
                    return self.model(**inputs)
            except DOES_NOT_COMPILE as error:
                if self.blocks.reached > 0:  # the caches of those before have been written to
                    raise RuntimeError("A compiled step failed half-way. Begin this answer anew.") from error
                self.blocks.forget()
                self.blocks, self.blocks_fail = None, True

        # Another setting without a public name: as an option of torch.compile, `freezing` is read too late.
        with torch._inductor.config.patch(self.vector_width | self.settings):
            return self.call(adapter_masks, **inputs)

    @cached_property
    def vector_width(self) -> dict[str, int]:
        """The setting that says for which vectors code is made; found out once, where the first step compiles."""
        return _vector_width(self.model, self.config)

    def holds_weights_of(self, model: PreTrainedModel, bank: nn.Module | None) -> bool:
        """Whether what is compiled in is, if anything, these weights as they are."""
        return self.weights is None or self.weights == WeightSnapshot(model, bank)

    def holds_blocks_of(self, model: PreTrainedModel, bank: nn.Module | None) -> bool:
        """Whether decoder layers that can be compiled as one are as they were, but for their weights."""
        with _one_at_a_time:
            found = find_blocks(model, bank)
        if self.blocks is None:
            return self.blocks_fail or found is None
        return self.blocks.blocks.are_still(found)

    def begin(self, layers: list):
        """Before the first step into a cache: let its sizes vary, and take weights that may have changed."""
        with _one_at_a_time:
            let_sizes_vary(layers)
            if self.blocks is not None and self.weights is None:
                self.blocks.read_parameters()

    def forget(self):
        """Drop what was compiled; the compiler does not notice when hooks come and go."""
        torch._dynamo.reset_code(self.code)
        if self.blocks is not None:
            self.blocks.forget()

    def __reduce__(self):
        return type(None), ()


def _copied(output: ModelOutput) -> ModelOutput:
    """Outputs that stay, where a CUDA graph would write the next step's."""
    for name, value in output.items():
        if isinstance(value, torch.Tensor):
            output[name] = value.clone()
        elif isinstance(value, tuple):
            output[name] = tuple(tensor.clone() for tensor in value)
    return output


def _may_keep_code(model: PreTrainedModel) -> bool:
    from .compile_cache import check_cache_folders  # late, or it could not be run as a program without a warning

    try:
        check_cache_folders()
    except OSError as error:
        logger.warning(f"The steps of {type(model).__name__} run uncompiled. {error}")
        return False
    return True


def _vector_width(model: PreTrainedModel, config: CompileConfig) -> dict[str, int]:
    """Kept code says no other way for which vectors it was made; a folder may be on more than one machine."""
    if model.device.type != "cpu" or config.backend != "inductor":
        return {}

    from torch._inductor.cpu_vec_isa import pick_vec_isa  # slow to import
    from torch._inductor.exc import InvalidCxxCompiler

    prepare_compiler()
    try:
        return {"cpp.simdlen": pick_vec_isa().bit_width()}
    except InvalidCxxCompiler:  # as compiling will say
        return {}


def _inductor_settings(model: PreTrainedModel, config: CompileConfig) -> dict:
    """On a CPU: weights compiled in, packed for its matrix products and side by side where they read the same."""
    if model.device.type != "cpu" or config.backend != "inductor" or not (config.options or {}).get("freezing", True):
        return {}
    return {"freezing": True, "cpp.enable_concat_linear": True}


def let_sizes_vary(layers: list):
    """Compile once for all numbers of rows (but one) and all lengths, which static layers would else fix."""
    for layer in layers:
        held = vars(layer)
        for owner in (held, *(value for value in held.values() if isinstance(value, dict))):
            for name, tensor in owner.items():
                if isinstance(tensor, torch.Tensor):
                    owner[name] = tensor.detach()  # without its mark as one that stays, which would be compiled in
                    if tensor.device.type == "cuda":  # another mark: a CUDA graph writes to where it is
                        torch._dynamo.mark_static_address(owner[name], guard=False)

        for name in ("keys", "values"):
            if held.get(name) is not None:
                torch._dynamo.mark_static(held[name], [1, 3])  # heads, which may be as many as rows by chance


__all__ = ["CompiledStep"]
