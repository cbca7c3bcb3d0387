"""Requests that come while others run: the rows of several caches in one."""

import torch
from torch.nn.functional import pad
from transformers.cache_utils import StaticLayer

from .cache import PCMEnsembleCache, takes_padding
from .preferences import Route
from .prefixes import CachePart


def join_caches(caches: list[PCMEnsembleCache], room: int | None = None) -> PCMEnsembleCache:
    r"""
    Put the rows of caches, which may differ in preference and length, into one, cache by cache. Columns that no row
    needs are left out, so that `join_caches([cache])` makes a cache smaller whose longest rows have gone.

    Args:
        caches (`list[PCMEnsembleCache]`): dynamic or static ones of one ensemble, each with a route. They stay as
            they are.
        room (`int`, *optional*): makes a static cache, for compiled steps, with room for so many tokens more;
            `join_caches([cache], room)` is one that has grown. Without it the cache is dynamic.

    Returns:
        [`PCMEnsembleCache`], whose rows are padded on the left. It knows what is masked: go on without an
        `attention_mask`. Its length counts what all parts have of prefixes as context.

    Raises:
        ValueError: if there are none, one is empty or of another ensemble than the first, `room` is below 1, or
            caches are quantised, offloaded, of sliding windows, or keep states.
    """
    if room is not None and room < 1:
        raise ValueError(f"`room` must be at least 1, or None for a cache that grows, got {room}.")
    if not caches or any(cache.route is None or cache.config is not caches[0].config for cache in caches):
        raise ValueError("`join_caches` takes one or more caches that one ensemble has filled.")
    for cache in caches:
        if not all(takes_padding(part.cache, StaticLayer) for part in cache.parts.values()):
            raise ValueError(
                "`join_caches` takes dynamic and static caches of full attention: others have no room for padding, "
                "or none that they could leave out."
            )
    names = dict.fromkeys(name for cache in caches for name in cache.parts)
    parts = {name: [cache.parts[name] for cache in caches if name in cache.parts] for name in names}
    masks = {name: [_mask(part) for part in entries] for name, entries in parts.items()}
    widths = {name: max(m.shape[1] - int(m.argmax(dim=1).min()) for m in entries) for name, entries in masks.items()}
    # Rows have prefixes of unlike lengths now. Contexts have one length in all parts: the shortest part's at most.
    context_length = min(widths.values())
    kind = {} if room is None else {"cache_implementation": "static", "max_length": context_length + room}
    joined = PCMEnsembleCache(caches[0].config, **kind)
    routes = [cache.route for cache in caches]
    joined.route = _join_routes(routes)
    for name, width in widths.items():
        part = joined.part(name, width - context_length)
        part.prefix_length = width - context_length
        _fill(part, parts[name], masks[name], width, _order(routes, name))
    return joined


def _join_routes(routes: list[Route]) -> Route:
    prefixes = [r.weights.new_zeros(r.batch_size, 0).long() if r.prefix_ids is None else r.prefix_ids for r in routes]
    width = max(ids.shape[1] for ids in prefixes)
    prefix_ids = torch.cat([pad(ids, (width - ids.shape[1], 0), value=-1) for ids in prefixes]) if width else None
    weights = torch.cat([route.weights for route in routes])
    return Route(weights, routes[0].backbone_of, prefix_ids, routes[0].merges_adapters)


def _order(routes: list[Route], name: str) -> list[int]:
    """Where each pair of the joined part stands among the parts' pairs, one part after the other."""
    pairs, offset = [], 0  # (expert, row of the joined batch)
    for route in routes:
        rows = range(route.batch_size)
        if name == "pcm":
            pairs += [(0, offset + row) for row in rows]
        else:
            for entry in route.expert_rows.get(int(name.rpartition(".")[2]), []):
                mine = rows if entry.rows is None else entry.rows.tolist()
                pairs += [(entry.expert, offset + row) for row in mine]
        offset += route.batch_size
    return sorted(range(len(pairs)), key=pairs.__getitem__)


def _mask(part: CachePart) -> torch.LongTensor:
    """Of all cached tokens, `(rows, tokens)`."""
    keys = part.cache.layers[0].keys
    return part.past_mask(None, keys.shape[0], keys.device)


def _fill(joined: CachePart, parts: list[CachePart], masks: list[torch.LongTensor], width: int, order: list[int]):
    mask = torch.cat([_of_width(mask, width, dim=1) for mask in masks])[order]
    for index, layer in enumerate(joined.cache.layers):
        keys, values = (
            torch.cat(
                [
                    _of_width(getattr(part.cache.layers[index], name)[:, :, : part.length], width, dim=2)
                    for part in parts
                ]
            )[order]
            for name in ("keys", "values")
        )
        layer.update(keys, values)
    joined.length, joined.attention_mask = width, None if mask.all() else mask


def _of_width(tensor: torch.Tensor, width: int, dim: int) -> torch.Tensor:
    """The last `width` columns, with zeros on the left where there are not as many."""
    missing = max(width - tensor.shape[dim], 0)
    tensor = tensor.narrow(dim, max(tensor.shape[dim] - width, 0), width - missing)
    return pad(tensor, (0, 0) * (tensor.dim() - 1 - dim) + (missing, 0))


__all__ = ["join_caches"]
