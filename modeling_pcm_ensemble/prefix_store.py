"""What prompts and descriptions leave in a cache, which is the same for every request: kept from call to call."""

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

import torch
from transformers import PreTrainedModel

from .memory import LayerStates
from .weight_changes import WeightSnapshot

MOST_TOKENS_KEPT = 16384  # of the prefixes used last: descriptions may be anything that users write

Reader = tuple[str | None, tuple[int, ...]]  # the expert whose adapter a row runs under, and its prefix


class PrefixStore:
    """Keys and values of what one model reads before the context, as long as its weights stay as they are."""

    def __init__(self):
        self.weights: WeightSnapshot | None = None
        self.states: OrderedDict[Reader, LayerStates] = OrderedDict()
        self.changing = Lock()  # of `states`

    def __reduce__(self):
        return type(self), ()  # a copy's weights are others

    def get(
        self, readers: list[Reader], model: PreTrainedModel, read: Callable[[Reader], LayerStates]
    ) -> dict[Reader, LayerStates]:
        """
        Return the states of each prefix, kept from an earlier call or read now.

        Args:
            readers (`list[Reader]`): distinct ones, none with an empty prefix.
            model (`PreTrainedModel`): what reads them.
            read (`Callable`): reads one, alone, so that its states do not depend on who came with it.
        """
        if self.weights is None or not self.weights.is_of(model):
            self.states, self.weights = OrderedDict(), WeightSnapshot(model)  # in this order, for other threads

        kept = self.states  # another thread may begin anew
        states = {}
        for reader in readers:
            found = kept.get(reader)
            states[reader] = read(reader) if found is None else found

        with self.changing:
            for reader, state in states.items():
                kept[reader] = state
                kept.move_to_end(reader)
            while sum(len(prefix) for _, prefix in kept) > MOST_TOKENS_KEPT:
                kept.popitem(last=False)
        return states


def may_keep(model: PreTrainedModel, device: torch.device) -> bool:
    """
    Whether states may be kept: not where autocast makes other states of the same weights, nor of shards, whose owners
    must run together.
    """
    sharded = any(hasattr(weight, "to_local") for weight in model.parameters())
    return not sharded and not torch.is_autocast_enabled(device.type)


__all__ = ["PrefixStore", "Reader", "may_keep"]
