"""What prompts and descriptions leave in a cache, which is the same for every request: kept from call to call."""

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

from .memory import LayerStates
from .weight_changes import WeightSnapshot

Reading = tuple[str | None, tuple[int, ...]]  # the expert whose adapter a row runs under, and its prefix


class PrefixStore:
    """Keys and values of what one model reads before the context, as long as the model stays as it is."""

    def __init__(self):
        self.model: tuple[WeightSnapshot, list] | None = None
        self.states: OrderedDict[Reading, LayerStates] = OrderedDict()
        self.changing = Lock()  # of `states`

    def __reduce__(self):
        return type(self), ()  # a copy's weights are others

    def get(
        self,
        readings: list[Reading],
        snapshot: Callable[[], tuple[WeightSnapshot, list]],
        read: Callable[[Reading], LayerStates],
        most_tokens: int,
    ) -> dict[Reading, LayerStates]:
        """
        Return the states of each prefix, kept from an earlier call or read now.

        Args:
            readings (`list[Reading]`): distinct ones, none with an empty prefix.
            snapshot (`Callable`): gives the weights and settings that they are read with.
            read (`Callable`): reads one, alone, so that its states do not depend on who came with it.
            most_tokens (`int`): how many tokens are kept, of the prefixes used last.
        """
        model = snapshot()
        if model != self.model:
            self.states, self.model = OrderedDict(), model  # in this order, for other threads

        kept = self.states  # another thread may begin anew
        states = {}
        for reading in readings:
            found = kept.get(reading)
            states[reading] = read(reading) if found is None else found

        with self.changing:
            for reading, state in states.items():
                kept[reading] = state
                kept.move_to_end(reading)
            while sum(len(prefix) for _, prefix in kept) > most_tokens:
                kept.popitem(last=False)
        return states


__all__ = ["PrefixStore", "Reading"]
