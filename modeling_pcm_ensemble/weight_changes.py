"""Whether a model's weights are those that something was computed from."""

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


class WeightSnapshot:
    """
    A model's weights and stored buffers, and those of adapters that are hooked to it, as they are now. What is written
    through `.data` leaves no trace; see [`~PCMEnsembleForCausalLM.forget_weights`].
    """

    def __init__(self, model: nn.Module):
        self.weights = _weights(model)  # held, so that no other takes the place of one
        self.states = [_state(weight) for weight in self.weights]

    def is_of(self, model: nn.Module) -> bool:
        """Whether `model` has the same weights, unchanged."""
        weights = _weights(model)
        same = len(weights) == len(self.weights) and all(new is old for new, old in zip(weights, self.weights))
        return same and self.states == [_state(weight) for weight in weights]


def _weights(model: nn.Module) -> list[torch.Tensor]:
    hooks = (hook for module in model.modules() for hook in module._forward_hooks.values())
    hooked = (getattr(getattr(hook, "__self__", None), "adapter_weights", ()) for hook in hooks)
    return [*model.state_dict(keep_vars=True).values(), *(weight for weights in hooked for weight in weights)]


def _state(weight: torch.Tensor) -> tuple[int, int]:
    version = -1 if weight.is_inference() else weight._version
    return version, weight.data_ptr() if type(weight) in (torch.Tensor, nn.Parameter) else 0  # shards have no place


def _count_step(optimizer: Optimizer, *_):
    """Fused optimizers write weights without counting that as a change."""
    weights = (weight for group in optimizer.param_groups for weight in group["params"])
    torch.autograd.graph.increment_version([w for w in weights if w.grad is not None and not w.is_inference()])


register_optimizer_step_post_hook(_count_step)

__all__ = ["WeightSnapshot"]
