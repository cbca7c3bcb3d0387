"""Linear layers in compiled code: packed for the processor, and one product for those that read the same."""

from functools import cache

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# Packed weights are no constants of the compiled code but its inputs, which inductor cannot lower: an operator of our
# own hands them on. While code is traced, a packed weight looks like any other, so that all linear layers use it.


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return nn.functional.linear(x, weight, bias)


def _linear_shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_library = torch.library.Library("pcm_ensemble", "FRAGMENT")
if not hasattr(torch.ops.pcm_ensemble, "linear"):  # a checkpoint's own code may have come before
    _library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    _library.impl("linear", _linear, "CompositeExplicitAutograd")
    torch.library.register_fake("pcm_ensemble::linear", _linear_shape, lib=_library)


@cache
def call_products_directly():
    """Let compiled code call oneDNN where it would call our operator, which is Python."""
    from torch._inductor.lowering import fallback_handler, register_lowering  # slow to import

    product = fallback_handler(torch.ops.mkldnn._linear_pointwise.default, add_to_fallback_set=False)

    @register_lowering(torch.ops.pcm_ensemble.linear.default, type_promotion_kind=None)
    def lower(x, weight, bias):
        return product(x, weight, bias, "none", [], "")


class PackedLinears(TorchFunctionMode):
    r"""
    Inside, linear layers are products with packed weights, and those that read the same input are one.

    Args:
        weights (`dict[str, torch.Tensor]`): the layers' own weights, by which they are known.
        together (`list[list[str]]`): names of those that are packed one below the other; others are left alone.
        packed (`list[torch.Tensor]`): the packed weight of each of these lists.
    """

    def __init__(self, weights: dict[str, torch.Tensor], together: list[list[str]], packed: list[torch.Tensor]):
        super().__init__()
        self.weights = weights
        self.together = together
        self.packed = packed
        self.known: dict[int, tuple] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        for number, names in enumerate(self.together):
            for place, name in enumerate(names):
                if self.weights[name] is weight:
                    output = self._products(number, input)[place]
                    return output if bias is None else output + bias
        return nn.functional.linear(input, weight, bias)

    def _products(self, number: int, input: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The products with all weights of a list, `(..., out)` each; computed once for an input."""
        known = self.known.get(number)
        if known is None or known[0] is not input:
            product = torch.ops.pcm_ensemble.linear(input, self.packed[number], None)
            sizes = [self.weights[name].shape[0] for name in self.together[number]]
            known = self.known[number] = (input, product.split(sizes, dim=-1))
        return known[1]


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this processor has matrix products by packed weights of a dtype."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Pack a linear layer's weight, `(out, in)`, for this processor's matrix products."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)


__all__ = ["PackedLinears", "call_products_directly", "can_pack", "pack"]
