"""Rows of [prefix | context]: what a submodel reads, while the user sees the context alone."""

from dataclasses import dataclass

import torch
from transformers import Cache, PreTrainedTokenizerBase

from .lora import AdapterSelection


@dataclass
class CachePart:
    r"""
    What one submodel remembers between forward passes. Without a `cache` it remembers nothing.

    Args:
        cache (`Cache`, *optional*): keys and values of the submodel's rows.
        attention_mask (`torch.LongTensor` of shape `(rows, cached tokens)`, *optional*): None while nothing is masked.
        prefix_length (`int`): cached tokens before the context, padding included.
        adapters (`AdapterSelection`, *optional*): each row's LoRA adapter, where it stays the same.
    """

    cache: Cache | None = None
    attention_mask: torch.LongTensor | None = None
    prefix_length: int = 0
    adapters: AdapterSelection | None = None

    @property
    def length(self) -> int:
        """Cached tokens, prefix included."""
        return 0 if self.cache is None else self.cache.get_seq_length()


@dataclass
class SubmodelInputs:
    r"""
    A submodel's inputs for its rows.

    Args:
        input_ids (`torch.LongTensor` of shape `(rows, tokens)`): prefix, where it is not cached yet, then context.
        attention_mask (`torch.LongTensor` of shape `(rows, cached tokens + tokens)`, *optional*): None masks nothing.
        position_ids (`torch.LongTensor` of shape `(rows, tokens)`, *optional*): None counts from the cache's length.
        kept (`int` or `torch.LongTensor`): the tokens to predict from, as transformers' `logits_to_keep`: the last
            `kept`, those at `(positions,)`, or in each row those at `(rows, positions)`.
        order (`torch.LongTensor` of shape `(rows, tokens)`, *optional*): where each token stood before closing up.
    """

    input_ids: torch.LongTensor
    attention_mask: torch.LongTensor | None
    position_ids: torch.LongTensor | None
    kept: int | torch.LongTensor
    order: torch.LongTensor | None = None


def pad_left(sequences: list[list[int]], device: torch.device | None = None) -> torch.LongTensor | None:
    """Stack token lists to `(rows, longest)`, padded on the left with -1; None where all are empty."""
    length = max(map(len, sequences), default=0)
    if not length:
        return None
    return torch.tensor([[-1] * (length - len(ids)) + list(ids) for ids in sequences], device=device)


def encode_description(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a preference's description, which ends in a line break so that descriptions can be joined."""
    return tokenizer(text.strip() + "\n", add_special_tokens=False)["input_ids"]


def submodel_inputs(
    input_ids: torch.LongTensor,
    attention_mask: torch.LongTensor | None,
    prefix_ids: torch.LongTensor | None,
    part: CachePart,
    logits_to_keep: int | torch.LongTensor = 0,
    bos_token_id: int | None = None,
) -> SubmodelInputs:
    r"""
    Put the prefixes before the context, and note on `part` what is masked.

    Rows are closed up: a row's padding, between prefix and context or behind the context, moves to its left end. So
    distances between tokens do not depend on the other rows, which sliding windows need. (Padding that comes after
    the first call stays where it is, so a sliding window counts it.)

    Args:
        input_ids (`torch.LongTensor` of shape `(rows, tokens)`): context tokens that are not cached yet.
        attention_mask (`torch.LongTensor` of shape `(rows, tokens)`, *optional*): theirs, 1 = keep.
        prefix_ids (`torch.LongTensor` of shape `(rows, prefix tokens)`, *optional*): padded on the left with -1.
        part (`CachePart`): the submodel's memory. Only an empty one takes a prefix.
        logits_to_keep (`int` or `torch.LongTensor` of shape `(positions,)`): among the context tokens; 0 keeps all.
        bos_token_id (`int`, *optional*): masked out of a context whose prefix begins with it.
    """
    num_tokens = input_ids.shape[1]
    if part.length == 0 and prefix_ids is not None:
        input_ids, attention_mask = _join(prefix_ids, input_ids, attention_mask, bos_token_id)
        part.prefix_length = prefix_ids.shape[1]
    if part.length == 0 and attention_mask is not None and attention_mask.all():
        attention_mask = None
    if attention_mask is None and part.attention_mask is None:
        return SubmodelInputs(input_ids, None, None, _last_positions(logits_to_keep, num_tokens, input_ids.shape[1]))
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    kept, order = _last_positions(logits_to_keep, num_tokens, num_tokens), None
    if input_ids.shape[1] > 1:
        input_ids, attention_mask, kept, order = _close_up(input_ids, attention_mask, num_tokens, kept)
    past_mask = part.attention_mask
    if past_mask is None:
        past_mask = attention_mask.new_ones(len(input_ids), part.length)
    full_mask = torch.cat([past_mask, attention_mask], dim=1)  # (rows, cached tokens + tokens)
    position_ids = (full_mask.cumsum(dim=1)[:, -input_ids.shape[1] :] - 1).clamp(min=0)
    part.attention_mask = full_mask
    return SubmodelInputs(input_ids, full_mask, position_ids, kept, order)


def _join(prefix_ids, input_ids, attention_mask, bos_token_id):
    """[prefix | context] and its mask, both `(rows, prefix tokens + tokens)`."""
    prefix_mask = (prefix_ids >= 0).long()
    context_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long().clone()
    if bos_token_id is not None:
        first = context_mask.argmax(dim=1, keepdim=True)  # (rows, 1), each row's first unmasked token
        repeated = (prefix_ids == bos_token_id).any(dim=1, keepdim=True) & (input_ids.gather(1, first) == bos_token_id)
        context_mask.scatter_(1, first, context_mask.gather(1, first) * ~repeated)
    return torch.cat([prefix_ids.clamp(min=0), input_ids], dim=1), torch.cat([prefix_mask, context_mask], dim=1)


def _last_positions(logits_to_keep, num_tokens: int, width: int) -> int | torch.LongTensor:
    """`logits_to_keep` of the last `num_tokens` tokens as one of all `width` tokens."""
    if isinstance(logits_to_keep, int):
        return min(logits_to_keep, num_tokens) or num_tokens
    return logits_to_keep % num_tokens + width - num_tokens


def _close_up(input_ids, attention_mask, num_tokens: int, kept):
    """Move padding to the left end of each row; `kept` becomes each row's own positions, `(rows, positions)`."""
    width = input_ids.shape[1]
    order = attention_mask.argsort(dim=1, stable=True)
    # Where each token stands afterwards; a masked token's place is taken by the unmasked one before it.
    ranks = attention_mask.cumsum(dim=1)  # (rows, width)
    places = (ranks + width - ranks[:, -1:] - 1).clamp(min=0)[:, -num_tokens:]  # (rows, context tokens)
    kept = places[:, -kept:] if isinstance(kept, int) else places[:, kept]
    return input_ids.gather(1, order), attention_mask.gather(1, order), kept, order


__all__ = ["CachePart", "SubmodelInputs"]
