"""Whether a model's weights are those that something was computed from."""

from functools import cache

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


class WeightSnapshot:
    """
    A model's weights and stored buffers, and those of adapters that are hooked to it, as they are now. What is written
    through `.data` leaves no trace; see [`~PCMEnsembleForCausalLM.forget_weights`].
    """

    def __init__(self, model: nn.Module):
        _count_optimizer_steps()
        self.weights = _weights(model)  # held, so that no other takes the place of one
        self.states = [_state(weight) for weight in self.weights]

    def is_of(self, model: nn.Module) -> bool:
        """Whether `model` has the same weights, unchanged."""
        weights = _weights(model)
        same = len(weights) == len(self.weights) and all(new is old for new, old in zip(weights, self.weights))
        return same and self.states == [_state(weight) for weight in weights]


def _weights(model: nn.Module) -> list[torch.Tensor]:
    weights = list(model.state_dict(keep_vars=True).values())
    for module in model.modules():
        for hook in module._forward_hooks.values():
            weights += getattr(getattr(hook, "__self__", None), "adapter_weights", ())
    return weights


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
