"""What kind of value an argument may be."""

from numbers import Integral

import torch

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
NUMBERS = (*INTEGERS, torch.bool, torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensor(name: str, value, what: str, dtypes: tuple[torch.dtype, ...] = INTEGERS):
    r"""
    Refuse what is no tensor that can be read.

    Args:
        name (`str`): the argument's.
        value: what was given for it.
        what (`str`): what the tensor holds, for the message.
        dtypes (`tuple[torch.dtype]`): those that it may have.

    Raises:
        TypeError: if it is no tensor, of another dtype, sparse, or without data.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"`{name}` must be a tensor of {what}, got {type(value).__name__}.")

    if value.dtype not in dtypes:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"`{name}` must be a tensor of {what}, got {value.dtype}. Convert it to one of {known}.")
    if value.layout is not torch.strided or value.is_meta:
        raise TypeError(
            f"`{name}` must be a dense tensor with data, got {value.layout} on the device {value.device}. Use "
            "`to_dense()`, or a tensor of another device than meta."
        )


def check_kind(name: str, value, kind: type | tuple[type, ...], optional: bool = False):
    """Refuse what is not of the kind, with a `TypeError`. An `int` may be numpy's, and a `bool` is none."""
    if value is None and optional:
        return
    accepted = Integral if kind is int else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(f"`{one.__name__}`" for one in kinds) + (" or None" if optional else "")
        raise TypeError(f"`{name}` must be {wanted}, got {type(value).__name__}.")


def has_class(value, name: str) -> bool:
    """Whether it is of the class of this name, the package's or that of the code which came with a checkpoint."""
    return any(base.__name__ == name for base in type(value).__mro__)


__all__ = ["INTEGERS", "NUMBERS", "check_kind", "check_tensor", "has_class"]
