"""What prompts and descriptions leave in a cache, which is the same for every request: kept from call to call."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from threading import Lock

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import StaticLayer

from .cache import takes_padding
from .prefixes import CachePart, SubmodelInputs
from .weight_changes import WeightSnapshot

# Shorter texts, all of a call together, are read with the context: a call of their own would not soon pay.
MIN_TOKENS_KEPT = 128
MOST_KEPT = 16384  # tokens, of the texts used last: descriptions may be anything that users write

Text = tuple[tuple[int, ...], tuple[int, ...]]  # the expert that reads it, none for the PCM; and its tokens


class KeptPrompts:
    """Keys and values of what one model reads before the context, as long as its weights stay as they are."""

    def __init__(self):
        self.weights: WeightSnapshot | None = None
        self.states: OrderedDict[Text, list[tuple[torch.Tensor, torch.Tensor]]] = OrderedDict()
        self.changing = Lock()  # of `states`

    def __reduce__(self):
        return type(self), ()  # a copy's weights are others

    def fill(
        self,
        part: CachePart,
        texts: list[Text],
        model: PreTrainedModel,
        read: Callable[[tuple[int, ...], SubmodelInputs, CachePart], object],
        device: torch.device,
    ) -> bool:
        r"""
        Fill an empty part with each row's text but for its last token, which is left to [`~prefixes.submodel_inputs`].

        Args:
            part (`CachePart`): of the model.
            texts (`list[Text]`): one for each row.
            model (`PreTrainedModel`): what reads them.
            read (`Callable`): runs it on one row of an expert, or of the PCM.
            device (`torch.device`): of the context's tokens.

        Returns:
            `bool`: whether it has; not where texts are short, the cache has no place for padding between rows, weights
            are shards, whose owners must run together, or autocast makes other states of the same weights.
        """
        texts = [(expert, ids[:-1]) for expert, ids in texts]
        distinct = list(dict.fromkeys(texts))
        if sum(len(ids) for _, ids in distinct) < MIN_TOKENS_KEPT or part.cache is None:
            return False
        if not takes_padding(part.cache, StaticLayer) or torch.is_autocast_enabled(device.type):
            return False
        if any(hasattr(weight, "to_local") for weight in model.parameters()):
            return False
        if self.weights is None or not self.weights.is_of(model):
            self.states, self.weights = OrderedDict(), WeightSnapshot(model)  # in this order, for other threads
        kept = self.states  # another thread may begin anew
        states = {}
        for expert, ids in distinct:
            if ids:  # each alone, so that it does not depend on who came first
                found = kept.get((expert, ids))
                states[expert, ids] = found or _states_of(ids, model, partial(read, expert), device)
        with self.changing:
            for text, state in states.items():
                kept[text] = state
                kept.move_to_end(text)
            while sum(len(ids) for _, ids in kept) > MOST_KEPT:
                kept.popitem(last=False)
        width = max(len(ids) for _, ids in distinct)
        some = next(iter(states.values()))
        for index, layer in enumerate(part.cache.layers):
            nothing = [tensor[:, :0] for tensor in some[index]]
            rows = [states[text][index] if text[1] else nothing for text in texts]
            layer.update(*(torch.stack([_of_width(row[kind], width) for row in rows]) for kind in (0, 1)))
        part.length = width
        lengths = [len(ids) for _, ids in texts]
        if min(lengths) < width:
            part.attention_mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths], device=device)
        return True


def _states_of(ids: tuple[int, ...], model: PreTrainedModel, read: Callable, device: torch.device) -> list:
    """Keys and values `(heads, tokens, dim)` of each layer."""
    part, input_ids = CachePart(DynamicCache(config=model.config)), torch.tensor([list(ids)], device=device)
    read(SubmodelInputs(input_ids, None, torch.arange(len(ids), device=device)[None], 1), part)
    return [(layer.keys[0], layer.values[0]) for layer in part.cache.layers]


def _of_width(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """`(heads, tokens, dim)` padded on the left to `(heads, width, dim)`."""
    return pad(tensor, (0, 0, width - tensor.shape[1], 0))


__all__ = ["KeptPrompts"]
