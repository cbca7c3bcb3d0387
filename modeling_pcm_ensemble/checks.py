"""What a call may not ask for, refused before any model runs."""

import torch
from transformers import DynamicCache
from transformers.utils import TransformersKwargs

from .cache import PCMEnsembleCache
from .configuration_pcm_ensemble import PCMEnsembleConfig
from .preferences import Route

# Known to models and losses of transformers, beside what `TransformersKwargs` lists
OTHER_ARGUMENTS = {"position_ids", "token_type_ids", "return_dict", "shift_labels", "ignore_index"}


def check_inputs(input_ids, inputs_embeds, past_key_values, logits_to_keep, kwargs: dict):
    """Refuse what `forward` cannot use."""
    if inputs_embeds is not None:
        raise ValueError("`inputs_embeds` cannot be used, because experts do not share embeddings. Pass `input_ids`.")
    if input_ids is None or input_ids.dim() != 2 or input_ids.shape[1] == 0:
        shape = None if input_ids is None else tuple(input_ids.shape)
        raise ValueError(f"`input_ids` must have the shape (batch, seq) with at least one token, got {shape}.")
    unknown = kwargs.keys() - TransformersKwargs.__optional_keys__ - OTHER_ARGUMENTS
    if unknown:
        raise TypeError(f"`forward` got the unknown arguments {sorted(unknown)}.")
    if kwargs.get("position_ids") is not None:
        raise ValueError(
            "`position_ids` cannot be used, because each submodel counts its own prefix. They follow from "
            "`attention_mask`; leave them out."
        )
    if past_key_values is not None:
        check_cache(past_key_values)
    if isinstance(logits_to_keep, torch.Tensor) and (logits_to_keep.dim() != 1 or logits_to_keep.dtype == torch.bool):
        raise ValueError(
            "`logits_to_keep` must be a number of tokens or a tensor of positions of shape (positions,), got "
            f"{logits_to_keep.dtype} of shape {tuple(logits_to_keep.shape)}."
        )


def check_cache(cache):
    if not isinstance(cache, PCMEnsembleCache):
        raise TypeError(
            f"`past_key_values` must be a `PCMEnsembleCache`, got {type(cache).__name__}. Leave it out of the first "
            "call and pass back the one it returns, or start with `PCMEnsembleCache(model.config)`."
        )


def check_mask(input_ids, attention_mask, cache) -> torch.LongTensor | None:
    """`attention_mask`, `(batch, cached + seq)`, as integers."""
    if attention_mask is None:
        return None
    expected = (input_ids.shape[0], cached_length(cache) + input_ids.shape[1])
    if attention_mask.shape != expected:
        raise ValueError(
            f"`attention_mask` has the shape {tuple(attention_mask.shape)}, but cached and new tokens make "
            f"{tuple(map(int, expected))}."
        )
    return attention_mask.long()


def cached_length(cache: PCMEnsembleCache | None) -> int:
    return 0 if cache is None else cache.get_seq_length()


def check_length(config: PCMEnsembleConfig, route: Route, length: int, cache: PCMEnsembleCache | None = None):
    """Refuse a context longer than a static cache, or than the positions of a submodel that reads it and a prefix."""
    room = -1 if cache is None else cache.get_max_length()
    if 0 <= room < length:
        raise ValueError(
            f"The context of {length} tokens is too long for `past_key_values`, a static cache of {room}. Make it "
            "with a larger `max_length`, or leave it out, so that `generate` makes one that is long enough."
        )
    prefixes = [("the PCM", config.pcm, 0 if route.prefix_ids is None else route.prefix_ids.shape[1])]
    for backbone, expert_rows in route.expert_rows.items():
        for expert in (config.experts[entry.expert] for entry in expert_rows):
            prefixes.append((f"expert {expert['name']!r}", config.backbones[backbone], len(expert["prompt_ids"])))
    for reader, part, prefix_length in prefixes:
        limit = getattr(part, "max_position_embeddings", None)
        if limit is not None and 0 < limit < length + prefix_length:
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


__all__ = ["cached_length", "check_cache", "check_inputs", "check_length", "check_mask", "check_no_sliding_windows"]
