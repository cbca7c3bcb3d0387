"""What experts' prompts leave in a cache, which is the same for every request: kept from call to call."""

from collections.abc import Callable
from functools import partial
from itertools import chain

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import StaticLayer

from .cache import takes_padding
from .prefixes import CachePart, SubmodelInputs
from .weights import WeightSnapshot

# Shorter prompts, all of a call together, are read with the context: a call of their own would not soon pay.
MIN_TOKENS_KEPT = 128


class KeptPrompts:
    """Keys and values of the prompts of experts on one backbone, as long as its weights stay as they are."""

    def __init__(self):
        self.weights: WeightSnapshot | None = None
        self.of_experts: dict[int, tuple[list[int], list[tuple[torch.Tensor, torch.Tensor]]]] = {}

    def __reduce__(self):
        return type(self), ()  # a copy's weights are others

    def fill(
        self,
        part: CachePart,
        prompts: dict[int, list[int]],
        num_rows: list[int],
        model: PreTrainedModel,
        read: Callable[[list[int], SubmodelInputs, CachePart], object],
        device: torch.device,
    ) -> bool:
        r"""
        Fill an empty part with each expert's prompt but for its last token, which is left to
        [`~prefixes.submodel_inputs`].

        Args:
            part (`CachePart`): of the backbone.
            prompts (`dict[int, list[int]]`): by expert.
            num_rows (`list[int]`): each expert's rows, in the same order.
            model (`PreTrainedModel`): the backbone.
            read (`Callable`): runs it on one row for each of the experts that it is given.
            device (`torch.device`): of the context's tokens.

        Returns:
            `bool`: whether it has; not where prompts are short, or the cache has no place for padding between rows.
        """
        texts = {expert: ids[:-1] for expert, ids in prompts.items()}
        if sum(map(len, texts.values())) < MIN_TOKENS_KEPT or part.cache is None:
            return False
        if not takes_padding(part.cache, StaticLayer):
            return False
        if self.weights is None or not self.weights.is_of(model):
            self.weights, self.of_experts = WeightSnapshot(model), {}
        kept = self.of_experts  # another thread may begin anew
        for expert, ids in texts.items():
            if ids and kept.get(expert, (None,))[0] != ids:  # alone, so that it does not depend on who came first
                kept[expert] = ids, _states_of(ids, model, partial(read, [expert]), device)
        width = max(map(len, texts.values()))
        some = next(kept[expert][1] for expert, ids in texts.items() if ids)
        for index, layer in enumerate(part.cache.layers):
            nothing = [tensor[:, :0] for tensor in some[index]]
            states = [kept[expert][1][index] if ids else nothing for expert, ids in texts.items()]
            layer.update(*(_rows([pair[kind] for pair in states], num_rows, width) for kind in (0, 1)))
        part.length = width
        lengths = [len(ids) for ids, rows in zip(texts.values(), num_rows) for _ in range(rows)]
        if min(lengths) < width:
            part.attention_mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths], device=device)
        return True


def _states_of(ids: list[int], model: PreTrainedModel, read: Callable, device: torch.device) -> list:
    """Keys and values `(heads, tokens, dim)` of each layer."""
    part, input_ids = CachePart(DynamicCache(config=model.config)), torch.tensor([ids], device=device)
    read(SubmodelInputs(input_ids, None, torch.arange(len(ids), device=device)[None], 1), part)
    return [(layer.keys[0], layer.values[0]) for layer in part.cache.layers]


def _rows(tensors: list[torch.Tensor], num_rows: list[int], width: int) -> torch.Tensor:
    """`(heads, tokens, dim)` of each expert to `(rows, heads, width, dim)`, padded on the left."""
    padded = [pad(tensor, (0, 0, width - tensor.shape[1], 0)) for tensor in tensors]
    return torch.stack(list(chain.from_iterable([tensor] * rows for tensor, rows in zip(padded, num_rows))))


__all__ = ["KeptPrompts"]
