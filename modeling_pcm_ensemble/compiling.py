"""Whether the submodels' steps of decoding are compiled."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import RLock

import torch
from transformers import Cache, CompileConfig, PreTrainedModel

RECOMPILE_LIMIT = 64  # of a submodel

turn = RLock()  # threads take turns: what the compiler asks is whether any thread compiles

_config: ContextVar[CompileConfig | None] = ContextVar("compile_config", default=None)


@contextmanager
def compiled_steps(config: CompileConfig | None) -> Iterator[None]:
    """Compile what decodes inside; None takes the default of [`default_config`]."""
    token = _config.set(config or default_config())
    try:
        yield
    finally:
        _config.reset(token)


def default_config() -> CompileConfig:
    """Without CUDA graphs, in which one submodel's step would overwrite another's output."""
    return CompileConfig(mode="default")


def compile_config() -> CompileConfig | None:
    """How steps are compiled here; None where they are not."""
    return _config.get()


class CompiledCall:
    """A submodel's call, compiled. It stays with the submodel, but not with a copy, whose own it is not."""

    def __init__(self, model: PreTrainedModel, config: CompileConfig):
        self.config = config
        options = config.to_dict()
        if options["dynamic"] is None:
            options["dynamic"] = True  # routes change the number of rows from call to call
        options |= {"isolate_recompiles": True, "recompile_limit": RECOMPILE_LIMIT}  # submodels share code, not limits
        self.call = torch.compile(model.__call__, **options)

    def __reduce__(self):
        return type(None), ()


def compiled_call(model: PreTrainedModel, config: CompileConfig) -> Callable:
    """As transformers' `get_compiled_call`, which bodies without an LM head have not got."""
    known = getattr(model, "_compiled_step", None)
    if known is None or known.config != config:
        known = model._compiled_step = CompiledCall(model, config)
    return known.call


def forget_compiled(model: PreTrainedModel):
    """Compile anew at the next step; the compiler does not notice when hooks come and go."""
    model._compiled_step = None


def let_sizes_vary(cache: Cache):
    """Compile once for all numbers of rows (but one) and all lengths, which static layers would else fix."""
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, [0, 2])
                torch._dynamo.mark_static(tensor, [1, 3])  # heads, which may be as many as rows by chance


__all__ = ["compile_config", "compiled_call", "compiled_steps", "forget_compiled", "let_sizes_vary", "turn"]
