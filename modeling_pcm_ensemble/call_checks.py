"""What a call may not ask for, refused before any model runs."""

import math
import operator
from collections.abc import Iterator

import torch
from transformers import DynamicCache
from transformers.utils import TransformersKwargs

from .cache import PCMEnsembleCache
from .call_arguments import INTEGERS, NUMBERS, check_kind, check_tensor, has_class
from .configuration_pcm_ensemble import PCMEnsembleConfig, max_positions
from .memory import Memory
from .routing import Route

# Known to models and losses of transformers, beside what `TransformersKwargs` lists
OTHER_ARGUMENTS = {"position_ids", "token_type_ids", "return_dict", "shift_labels", "ignore_index"}


def check_inputs(config: PCMEnsembleConfig, input_ids, inputs_embeds, cache, kwargs: dict) -> torch.Tensor:
    """Return `input_ids`, which a type checker then knows to be given, and refuse what `forward` cannot read."""
    if inputs_embeds is not None:
        raise ValueError("`inputs_embeds` cannot be used, because experts do not share embeddings. Pass `input_ids`.")
    unknown = kwargs.keys() - TransformersKwargs.__optional_keys__ - OTHER_ARGUMENTS
    if unknown:
        raise TypeError(f"`forward` got the unknown arguments {sorted(unknown)}.")
    if cache is not None:
        check_cache(config, cache)
    check_ids(config, "input_ids", input_ids, cache)
    return input_ids


def check_flags(normalize_logits, **optional):
    """Refuse what is no `bool`, with a `TypeError`."""
    check_kind("normalize_logits", normalize_logits, bool)
    for name, flag in optional.items():
        check_kind(name, flag, bool, optional=True)


def check_ids(config: PCMEnsembleConfig, name: str, ids, cache=None):
    """
    Raises:
        TypeError, ValueError: if argument `name` holds no token ids of shape `(batch, seq)`.
    """
    if ids is not None:
        check_tensor(name, ids, "token ids", (torch.int64, torch.int32))
    if ids is None or ids.dim() != 2 or ids.numel() == 0:
        shape = None if ids is None else tuple(ids.shape)
        raise ValueError(f"`{name}` must have the shape (batch, seq) with at least one token, got {shape}.")

    # One token behind a cache is mostly the ensemble's own choice, and on a GPU looking at it would wait for it.
    if ids.is_cpu or ids.shape[1] > 1 or cached_length(cache) == 0:
        low, high = (value.item() for value in ids.aminmax())
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"`{name}` holds {low if low < 0 else high}, but token ids are from 0 to {config.vocab_size - 1}. Use "
                "the ensemble's tokenizer, and `attention_mask` to leave tokens out."
            )


def check_cache(config: PCMEnsembleConfig, cache):
    """
    Raises:
        TypeError, ValueError: if it is no ensemble's cache, or one of other experts.
    """
    if not has_class(cache, "PCMEnsembleCache"):
        raise TypeError(
            f"`past_key_values` must be a `PCMEnsembleCache`, got {type(cache).__name__}. Leave it out of the first "
            "call and pass back the one it returns, or start with `PCMEnsembleCache(model.config)`."
        )

    if cache.route is not None and cache.route.weights.shape[1] != config.num_experts:
        raise ValueError(
            f"`past_key_values` was filled by an ensemble of {cache.route.weights.shape[1]} experts, and this one "
            f"has {config.num_experts}. Start without it."
        )


def check_mask(input_ids, attention_mask, cache, shapes: tuple = ()) -> torch.Tensor | None:
    """
    Give `attention_mask`, `(batch, cached + seq)` or of one of the other `shapes`, as 1 for what is read. As in any
    model of transformers that is what is not 0.

    Raises:
        TypeError, ValueError: if it is no tensor of numbers, or of another shape.
    """
    if attention_mask is None:
        return None
    check_tensor("attention_mask", attention_mask, "1 for tokens to read and 0 for others", NUMBERS)

    expected = (input_ids.shape[0], cached_length(cache) + input_ids.shape[1])
    if attention_mask.shape != expected and attention_mask.shape not in shapes:
        raise ValueError(
            f"`attention_mask` has the shape {tuple(attention_mask.shape)}, but cached and new tokens make "
            f"{tuple(map(int, expected))}."
        )
    return attention_mask.bool().long()


def check_positions(position_ids, attention_mask: torch.Tensor | None, batch_size: int, length: int):
    """
    Refuse `position_ids`, of the last of `length` tokens, that say anything else than `attention_mask`, `(batch,
    length)`, does. Submodels count by themselves: each has a prefix of its own.
    """
    if position_ids is None:
        return
    check_tensor("position_ids", position_ids, "positions")

    shape, follows = tuple(position_ids.shape), False
    if len(shape) == 2 and shape[0] in (1, batch_size) and 0 < shape[1] <= length:
        mask = position_ids.new_ones(1, length) if attention_mask is None else attention_mask.to(position_ids.device)
        expected = mask.cumsum(dim=1) - 1  # (batch or 1, length)
        wrong = (position_ids != expected[:, -shape[1] :]) & mask[:, -shape[1] :].bool()
        follows = not wrong.any()

    if not follows:
        raise ValueError(
            f"`position_ids`, of shape {shape}, cannot be used unless they count the tokens that `attention_mask` "
            "reads, because each submodel counts its own prefix. Leave them out."
        )


def check_logits_to_keep(logits_to_keep, num_tokens: int) -> int | torch.Tensor:
    """
    Give `logits_to_keep` as an `int`, or as positions from 0 on, `(positions,)`.

    Raises:
        TypeError, ValueError: if it is neither, or out of the range of `num_tokens`.
    """
    if isinstance(logits_to_keep, torch.Tensor):
        name, wanted = "logits_to_keep", "a number of tokens or a tensor of positions"
        if logits_to_keep.dim() != 1 or logits_to_keep.dtype not in INTEGERS or logits_to_keep.numel() == 0:
            raise ValueError(
                f"`{name}` must be {wanted} of shape (positions,), got {logits_to_keep.dtype} of shape "
                f"{tuple(logits_to_keep.shape)}."
            )
        check_tensor(name, logits_to_keep, "positions")
        low, high = (value.item() for value in logits_to_keep.aminmax())
        if low < -num_tokens or high >= num_tokens:
            raise ValueError(
                f"`{name}` holds the position {high if high >= num_tokens else low}, but there are {num_tokens} new "
                "tokens."
            )
        return logits_to_keep.long() % num_tokens

    try:
        kept = operator.index(logits_to_keep)
    except TypeError:
        raise TypeError(
            "`logits_to_keep` must be a number of tokens or a tensor of positions, got "
            f"{type(logits_to_keep).__name__}."
        ) from None
    if kept < 0:
        raise ValueError(f"`logits_to_keep` must be a number of tokens, 0 for all of them, got {kept}.")
    return min(kept, num_tokens)


def check_labels(config: PCMEnsembleConfig, labels, input_ids, logits_to_keep, ignored: int) -> torch.Tensor | None:
    """
    Give `labels` as `torch.long`, one for each token that has logits.

    Raises:
        TypeError, ValueError: if they are of another kind or shape, or neither token ids nor `ignored`.
    """
    if labels is None:
        return None
    check_tensor("labels", labels, "token ids")

    kept = len(logits_to_keep) if isinstance(logits_to_keep, torch.Tensor) else logits_to_keep or input_ids.shape[1]
    if labels.shape != (len(input_ids), kept):
        raise ValueError(
            f"`labels` has the shape {tuple(labels.shape)}, but the logits are of {(len(input_ids), kept)} tokens."
        )

    labels = labels.long()  # before it is compared: as a byte, -100 is 156
    wrong = (labels != ignored) & ((labels < 0) | (labels >= config.vocab_size))
    if wrong.any():
        raise ValueError(
            f"`labels` holds {labels[wrong][0].item()}, but token ids are from 0 to {config.vocab_size - 1}, and "
            f"{ignored} leaves a token out."
        )
    return labels


def cached_length(cache: PCMEnsembleCache | None) -> int:
    return 0 if cache is None else cache.get_seq_length()


def _limited(
    config: PCMEnsembleConfig, route: Route, cache: PCMEnsembleCache | None
) -> Iterator[tuple[str, int, int]]:
    """Every submodel that runs and has a limit: how to call it, its positions, and those that its prefix takes."""
    memories: dict[int | None, Memory] = {}
    if cache is not None:
        memories |= {None: cache.pcm} | cache.backbones
    readers: list[tuple[str, int | None, int]] = [("the PCM", None, max(map(len, route.descriptions)))]
    for backbone, entries in route.expert_rows.items():
        for entry in entries:
            if entry.expert is None:
                readers.append(("the experts' model", backbone, 0))
                continue
            expert = config.experts[entry.expert]
            readers.append((f"expert {expert['name']!r}", backbone, len(expert["prompt_ids"])))

    for reader, index, prefix_length in readers:
        part = config.pcm if index is None else config.backbones[index]
        limit = max_positions(part)
        if limit is None:
            continue
        memory = memories.get(index)
        if memory is not None and memory.length > 0:  # joined caches have what no row needs left out
            prefix_length = memory.prefix_length
        yield reader, limit, prefix_length


def longest_context(config: PCMEnsembleConfig, route: Route, cache: PCMEnsembleCache | None = None) -> float:
    """Return the most context tokens that a static cache holds and every submodel can read; infinity for any."""
    rooms = [limit - prefix_length for _, limit, prefix_length in _limited(config, route, cache)]
    if cache is not None and cache.get_max_length() >= 0:
        rooms.append(cache.get_max_length())
    return min(rooms, default=math.inf)


def check_length(config: PCMEnsembleConfig, route: Route, length: int, cache: PCMEnsembleCache | None = None):
    """Refuse a context longer than a static cache, or than the positions of a submodel that reads it and a prefix."""
    room = -1 if cache is None else cache.get_max_length()
    if 0 <= room < length:
        raise ValueError(
            f"The context of {length} tokens is too long for `past_key_values`, a static cache of {room}. Make it "
            "with a larger `max_length`, or leave it out, so that `generate` makes one that is long enough."
        )

    for reader, limit, prefix_length in _limited(config, route, cache):
        if prefix_length >= limit:
            raise ValueError(
                f"The {prefix_length} tokens that {reader} reads of its own are too long for its {limit} positions. "
                "Shorten the prompt, or what `preference_text`, `preference_ids` or the descriptions say."
            )
        if limit < length + prefix_length:
            raise ValueError(
                f"The context of {length} tokens is too long for {reader}, which has {limit} positions and reads "
                f"{prefix_length} tokens of its own first. Use at most {limit - prefix_length} tokens, prompt and "
                "new ones together."
            )


def check_no_sliding_windows(config: PCMEnsembleConfig, route: Route):
    """Padding that comes in a later chunk stays behind the prefix, where a sliding window would count it."""
    for backbone in route.expert_rows:
        if any(DynamicCache(config=config.backbones[backbone]).is_sliding):
            raise ValueError(
                "`prefill_chunk_size` cannot be used with padded rows where experts have sliding windows. Leave "
                "it out, or generate for rows of one length."
            )


__all__ = [
    "cached_length",
    "check_cache",
    "check_flags",
    "check_ids",
    "check_inputs",
    "check_labels",
    "check_length",
    "check_logits_to_keep",
    "check_mask",
    "check_no_sliding_windows",
    "check_positions",
    "longest_context",
]
