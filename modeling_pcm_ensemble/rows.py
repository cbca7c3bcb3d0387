"""Rows of [prefix | context]: what a submodel reads, while the user sees the context alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.utils.rnn import pad_sequence


@dataclass
class Rows:
    r"""
    What a submodel is to read in one call.

    Args:
        input_ids (`torch.LongTensor` of shape `(rows, tokens)`): context tokens that are not cached yet.
        attention_mask (`torch.LongTensor` of shape `(rows, cached context tokens + tokens)`, *optional*): 1 = keep.
        prefixes (`list[tuple[int, ...]]`, *optional*): what each row reads before its context, in a first call.
        adapters (`list[str | None]` or `torch.FloatTensor` of shape `(rows, tokens, experts)`, *optional*):
            the expert whose adapter each row runs under, by name, or strengths, to add all up at each token.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None
    prefixes: list[tuple[int, ...]] | None = None
    adapters: list[str | None] | torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def readings(self) -> list[tuple[str | None, tuple[int, ...]]]:
        """Return each row's adapter and prefix. Adapters that are mixed count as none."""
        adapters = self.adapters if isinstance(self.adapters, list) else [None] * len(self)
        prefixes = [()] * len(self) if self.prefixes is None else self.prefixes
        return list(zip(adapters, prefixes))

    def select(self, index: torch.Tensor) -> "Rows":
        """Return rows `index`, `(new rows,)`, in this order."""
        places, adapters = index.tolist(), self.adapters
        if isinstance(adapters, torch.Tensor):
            adapters = adapters[index]
        elif adapters is not None:
            adapters = [adapters[place] for place in places]

        return Rows(
            self.input_ids[index],
            None if self.attention_mask is None else self.attention_mask[index],
            None if self.prefixes is None else [self.prefixes[place] for place in places],
            adapters,
        )


@dataclass
class SubmodelInputs:
    r"""
    What a model is called with for its rows.

    Args:
        input_ids (`torch.LongTensor` of shape `(rows, tokens)`): prefix, where it is not cached yet, then context.
        attention_mask (`torch.LongTensor` of shape `(rows, cached tokens + tokens)`, *optional*): None masks nothing.
        position_ids (`torch.LongTensor` of shape `(rows, tokens)` or `(1, tokens)`): unmasked tokens before each.
        kept (`int` or `torch.LongTensor`): the tokens to predict from, as transformers' `logits_to_keep`: the last
            `kept`, those at `(positions,)`, or in each row those at `(rows, positions)`.
        order (`torch.LongTensor` of shape `(rows, tokens)`, *optional*): where each token stood before closing up.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor
    kept: int | torch.Tensor
    order: torch.Tensor | None = None

    def of_fixed_form(self, max_length: int) -> "SubmodelInputs":
        """Return the same with a mask as long as the cache and positions for each row, as compiled code needs them."""
        num_rows, mask = len(self.input_ids), self.attention_mask
        mask = self.input_ids.new_ones(num_rows, 0) if mask is None else mask
        rest = mask.new_ones(num_rows, max_length - mask.shape[1])

        position_ids = self.position_ids.expand(num_rows, -1).contiguous()
        return replace(self, attention_mask=torch.cat([mask, rest], dim=1), position_ids=position_ids)


def stack_padded(
    sequences: Sequence[Sequence[int]], device: torch.device | None = None, padding_side: str = "left"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack token lists to ids, padded with 0, and their mask, both `(rows, longest)`."""
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    ids = pad_sequence(rows, batch_first=True, padding_side=padding_side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=padding_side)
    return ids.to(device), mask.to(device)


def join_prefixes(
    prefixes: list[tuple[int, ...]],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    bos_token_id: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Put prefixes before contexts, `(rows, tokens)`.

    Args:
        prefixes (`list[tuple[int, ...]]`): one for each row.
        input_ids, attention_mask (`torch.LongTensor` of shape `(rows, tokens)`): the contexts.
        bos_token_id (`int`, *optional*): masked out of a context whose prefix begins with it.

    Returns:
        [prefix | context] and its mask, both `(rows, longest prefix + tokens)`.
    """
    prefix_ids, prefix_mask = stack_padded(prefixes, input_ids.device)
    context_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long().clone()

    if bos_token_id is not None:
        begins = torch.tensor([prefix[:1] == (bos_token_id,) for prefix in prefixes], device=input_ids.device)
        first = context_mask.argmax(dim=1, keepdim=True)  # (rows, 1), each row's first unmasked token
        repeated = begins[:, None] & (input_ids.gather(1, first) == bos_token_id)
        context_mask.scatter_(1, first, context_mask.gather(1, first) * ~repeated)

    return torch.cat([prefix_ids, input_ids], dim=1), torch.cat([prefix_mask, context_mask], dim=1)


def last_positions(logits_to_keep: int | torch.Tensor, num_tokens: int, width: int) -> int | torch.Tensor:
    """Return `logits_to_keep`, of the last `num_tokens` tokens, as one of all `width` tokens."""
    if isinstance(logits_to_keep, int):
        return min(logits_to_keep, num_tokens) or num_tokens
    return logits_to_keep % num_tokens + width - num_tokens


def close_up(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, num_tokens: int, kept: int | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Move padding to the left end of each row.

    Args:
        input_ids, attention_mask (`torch.LongTensor` of shape `(rows, width)`).
        num_tokens (`int`): how many of them are context.
        kept (`int` or `torch.LongTensor` of shape `(positions,)`): positions among the context tokens.

    Returns:
        Ids and mask, `(rows, width)`; the places of the kept positions in each row, `(rows, positions)`; and where
        each token stood, `(rows, width)`.
    """
    width = input_ids.shape[1]
    order = attention_mask.argsort(dim=1, stable=True)

    # Where each token stands afterwards; a masked token's place is taken by the unmasked one before it.
    ranks = attention_mask.cumsum(dim=1)  # (rows, width)
    places = (ranks + width - ranks[:, -1:] - 1).clamp(min=0)[:, -num_tokens:]  # (rows, context tokens)

    kept = places[:, -kept:] if isinstance(kept, int) else places[:, kept]
    return input_ids.gather(1, order), attention_mask.gather(1, order), kept, order


def equal_rows(rows: Rows) -> list[int]:
    """Return for each row the number of its set of rows that read the same; sets are numbered as they appear."""
    numbers: dict[tuple, int] = {}
    readings = [numbers.setdefault(reading, len(numbers)) for reading in rows.readings()]
    columns = [torch.tensor(readings, device=rows.input_ids.device)[:, None], rows.input_ids.long()]
    if rows.attention_mask is not None:
        columns.append(rows.attention_mask.long())

    values = torch.cat(columns, dim=1)  # (rows, all that a row's result depends on)
    sets: dict[int, int] = {}
    return [sets.setdefault(found, len(sets)) for found in values.unique(dim=0, return_inverse=True)[1].tolist()]


__all__ = ["Rows", "SubmodelInputs", "close_up", "equal_rows", "join_prefixes", "last_positions", "stack_padded"]
