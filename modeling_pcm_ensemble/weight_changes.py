"""Whether a model's weights are those that something was computed from."""

from functools import cache

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


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


__all__ = ["WeightSnapshot"]
