"""Whether the submodels' steps of decoding are compiled."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import RLock

import torch
from transformers import Cache, CompileConfig, PreTrainedModel
from transformers.utils import ModelOutput, logging
from transformers.utils.logging import tqdm

from .compile_attention import grouped_attention
from .weight_changes import WeightSnapshot

logger = logging.get_logger(__name__)

RECOMPILE_LIMIT = 64  # of a submodel

turn = RLock()  # threads take turns: what the compiler asks is whether any thread compiles

_config: ContextVar[CompileConfig | None] = ContextVar("compile_config", default=None)


@contextmanager
def compiled_steps(config: CompileConfig | None) -> Iterator[None]:
    """Compile what decodes inside; None takes transformers' default, CUDA graphs where there is a GPU."""
    token = _config.set(config or CompileConfig())
    try:
        yield
    finally:
        _config.reset(token)


def compile_config() -> CompileConfig | None:
    """How steps are compiled here; None where they are not."""
    return _config.get()


class CompiledCall:
    """
    A submodel's step, compiled; as it was, with one warning, where it does not compile. It stays with the submodel,
    but not with a copy, whose own it is not.
    """

    def __init__(self, model: PreTrainedModel, config: CompileConfig):
        self.model, self.config = model, config
        self.settings = _inductor_settings(model, config)
        options = config.to_dict()
        if self.settings:
            options["fullgraph"] = True  # what does not compile must not have run in part
        if options["dynamic"] is None:
            options["dynamic"] = True  # routes change the number of rows from call to call
        options |= {"isolate_recompiles": True, "recompile_limit": RECOMPILE_LIMIT}

        def step(**inputs) -> ModelOutput:  # of which the model's own hooks are a part, as they are not of `__call__`
            return model(**inputs)

        step.__code__ = step.__code__.replace()  # its own, so that what is compiled of it can be forgotten alone
        self.code = step.__code__
        self.call = torch.compile(step, **options)
        self.weights = WeightSnapshot(model) if self.settings else None
        self.has_run = {True: False, False: False}  # by whether it is for one row, which has code of its own

    def __call__(self, input_ids: torch.LongTensor, **kwargs) -> ModelOutput:
        single = len(input_ids) == 1
        # Settings that torch has no public name for: weights compiled in (as an option of torch.compile `freezing` is
        # read too late), and a model's floats as constants. Without them compiling and steps are slower, no more.
        with (
            torch._inductor.config.patch(self.settings),
            torch._dynamo.config.patch(specialize_float=True),
            grouped_attention(self.model),
        ):
            try:
                output = self._run(single, input_ids=input_ids, **kwargs)
            except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
                name = type(self.model).__name__
                logger.warning(f"{name} does not compile; its steps run uncompiled. {type(error).__name__}: {error}")
                self.call = self.model
                output = self.call(input_ids=input_ids, **kwargs)
        self.has_run[single] = True
        return _copied(output) if self.model.device.type == "cuda" else output

    def _run(self, single: bool, **inputs) -> ModelOutput:
        if self.has_run[single] or self.call is self.model:
            return self.call(**inputs)
        rows = "one row" if single else "any number of rows"
        title = f"Compiling the step of {type(self.model).__name__} for {rows}"
        with tqdm(total=1, desc=title, bar_format="{desc}: {elapsed}"):
            return self.call(**inputs)

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


def _inductor_settings(model: PreTrainedModel, config: CompileConfig) -> dict:
    """On a CPU: weights compiled in, packed for its matrix products and side by side where they read the same."""
    if getattr(model, "_weights_change", False):  # torch never frees what is compiled in
        return {}
    if model.device.type != "cpu" or config.backend != "inductor" or not (config.options or {}).get("freezing", True):
        return {}
    return {"freezing": True, "cpp.enable_concat_linear": True}


def compiled_call(model: PreTrainedModel, config: CompileConfig) -> Callable:
    """As transformers' `get_compiled_call`, which bodies without an LM head have not got."""
    known = getattr(model, "_compiled_step", None)
    if known is None or known.config != config:
        forget_compiled(model)
        known = model._compiled_step = CompiledCall(model, config)
    return known


def forget_compiled(model: PreTrainedModel):
    """Compile anew at the next step; the compiler does not notice when hooks come and go."""
    known = getattr(model, "_compiled_step", None)
    if known is not None:
        torch._dynamo.reset_code(known.code)
    model._compiled_step = None


def forget_weights(model: PreTrainedModel):
    """Compile anew where weights are compiled in, and from now on without them, since they change."""
    known = getattr(model, "_compiled_step", None)
    if known is not None and known.weights is not None:
        model._weights_change = True
        forget_compiled(model)


def forget_if_changed(model: PreTrainedModel):
    """[`forget_weights`] where they are not as they were."""
    known = getattr(model, "_compiled_step", None)
    if known is not None and known.weights is not None and not known.weights.is_of(model):
        forget_weights(model)


def let_sizes_vary(cache: Cache):
    """Compile once for all numbers of rows (but one) and all lengths, which static layers would else fix."""
    for layer in cache.layers:
        held = vars(layer)
        for owner in (held, *(value for value in held.values() if isinstance(value, dict))):
            for name, tensor in owner.items():
                if isinstance(tensor, torch.Tensor):
                    owner[name] = tensor.detach()  # without its mark as one that stays, which would be compiled in
                    if tensor.device.type == "cuda":  # another mark: a CUDA graph writes to where it is
                        torch._dynamo.mark_static_address(owner[name], guard=False)
        for tensor in (held[name] for name in ("keys", "values") if held.get(name) is not None):
            torch._dynamo.mark_static(tensor, [1, 3])  # heads, which may be as many as rows by chance


__all__ = [
    "compile_config",
    "compiled_call",
    "compiled_steps",
    "forget_compiled",
    "forget_if_changed",
    "forget_weights",
    "let_sizes_vary",
    "turn",
]
