"""Whether a model is still what something was computed from; and that its weights are kept."""

from copy import copy
from functools import cache

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

PLAIN = {bool, int, float, str}
COMPARED = PLAIN | {list, tuple, dict}


class WeightSnapshot:
    """
    A model's weights and stored buffers, and those of the adapters on it, as they are now. Two are equal where nothing
    has changed in between. What is written through `.data` leaves no trace; see
    [`~PCMEnsembleForCausalLM.forget_weights`].

    Args:
        model (`nn.Module`): the model.
        bank (`nn.Module`, *optional*): its adapters.
    """

    def __init__(self, model: nn.Module, bank: nn.Module | None = None):
        _count_optimizer_steps()
        self.weights = list(model.state_dict(keep_vars=True).values())  # held, so that no other takes the place of one
        self.weights += [] if bank is None else bank.parameters()
        self.states = [_state(weight) for weight in self.weights]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WeightSnapshot) or len(other.weights) != len(self.weights):
            return False
        return all(one is two for one, two in zip(self.weights, other.weights)) and self.states == other.states

    __hash__ = None  # type: ignore[assignment]  # weights change


def module_settings(model: nn.Module) -> list:
    """
    Hooks of all modules, and their attributes that are numbers or text: what libraries switch a model by beside its
    weights, as PEFT's `disable_adapters` does. Two are equal where nothing has changed in between.
    """
    settings: list = []
    for module in model.modules():
        plain = {name: _copied(value) for name, value in vars(module).items() if type(value) in COMPARED}
        settings.append((plain, [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]))
    return settings


def _copied(value):
    """A number or a text; a copy of a collection of them; None for other collections, such as those of parameters."""
    if type(value) in PLAIN:
        return value
    items = value.values() if isinstance(value, dict) else value
    return copy(value) if all(type(item) in PLAIN for item in items) else None


def mark_initialized(model: nn.Module):
    """
    Let `post_init` keep these weights. It draws those of modules without transformers' mark, as are adapters of PEFT
    and what a user has put into a model.
    """
    for module in model.modules():
        module._is_hf_initialized = True  # type: ignore[assignment]  # no tensor or module


def _state(weight: torch.Tensor) -> tuple[int, int]:
    version = -1 if weight.is_inference() else weight._version
    return version, weight.data_ptr() if type(weight) in (torch.Tensor, nn.Parameter) else 0  # shards have no place


@cache
def _count_optimizer_steps():
    """
    Let optimizers' steps count as changes, from the first snapshot on: fused ones write weights without counting that.
    torch has no hook for one optimizer that somebody else will make, so this one is of the whole process.
    """
    register_optimizer_step_post_hook(_count_step)


def _count_step(optimizer: Optimizer, *_):
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    changed = [weight for weight in weights if weight.grad is not None and not weight.is_inference()]
    torch.autograd.graph.increment_version(changed)


__all__ = ["WeightSnapshot", "mark_initialized", "module_settings"]
