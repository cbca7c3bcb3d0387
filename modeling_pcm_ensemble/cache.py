"""The cache of an ensemble: one part for the PCM, one for each backbone in use, and the route; and many made one."""

import torch
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, PreTrainedConfig, QuantizedCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from .call_arguments import check_kind, has_class
from .configuration_pcm_ensemble import PCMEnsembleConfig
from .preferences import Route
from .prefixes import CachePart, is_recurrent

STATIC, QUANTIZED, OFFLOADED = ("static", "offloaded_static"), ("quantized",), ("offloaded", "offloaded_static")
STEPS_AHEAD = 64  # tokens that a growing layer makes room for, at least
MOST_TOKENS = 2**31 - 1


class GrowingLayer(DynamicLayer):
    """A dynamic layer with room for tokens to come: a step writes its own token where `torch.cat` would copy all."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.rooms: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # by name: the room, and what is used of it

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if self.get_seq_length() == 0 or key_states.requires_grad:
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def _append(self, name: str, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        length, total = old.shape[-2], old.shape[-2] + new.shape[-2]
        room, used = self.rooms.get(name, (None, None))
        # Other keys than the last step's (reordered, cropped, moved) have no room behind them.
        if used is not old or room.shape[-2] < total or room.is_inference() != torch.is_inference_mode_enabled():
            room = old.new_empty(*old.shape[:-2], total + max(total // 4, STEPS_AHEAD), old.shape[-1])
            room[..., :length, :] = old
        room[..., length:total, :] = new
        self.rooms[name] = room, room[..., :total, :]
        return self.rooms[name][1]

    def reset(self):
        super().reset()
        self.rooms.clear()


def takes_padding(cache: Cache, *layer_types: type) -> bool:
    """Whether rows may be padded behind others' backs: full attention in layers that grow, or of the types given."""
    known = (DynamicLayer, *layer_types)
    return not cache.offloading and all(type(x) in known or hasattr(x, "rooms") for x in cache.layers)


class PCMEnsembleCache(Cache):
    r"""
    Keys and values of every submodel, and the route, behind the interface of one model's cache.

    A batch row of this cache is a row of the PCM's part and one row in a backbone's part for each active expert.
    Lengths count context tokens only, without prefixes.

    Args:
        config (`PCMEnsembleConfig`): the ensemble's.
        cache_implementation (`str`, *optional*): the kind of every part, as `generate` names it: None or "dynamic",
            "offloaded", "static", "offloaded_static", "quantized".
        max_length (`int`, *optional*): most context tokens that static parts hold.
        cache_config (`dict`, *optional*): options of quantized parts.
    """

    def __init__(
        self,
        config: PCMEnsembleConfig,
        cache_implementation: str | None = None,
        max_length: int | None = None,
        cache_config: dict | None = None,
    ):
        kinds = ("dynamic", *STATIC, *QUANTIZED, *OFFLOADED)
        if not hasattr(config, "sub_config_items"):
            raise TypeError(f"`config` must be the ensemble's, `model.config`, got {type(config).__name__}.")
        check_kind("cache_implementation", cache_implementation, str, optional=True)
        check_kind("max_length", max_length, int, optional=True)
        check_kind("cache_config", cache_config, dict, optional=True)
        if cache_implementation is not None and cache_implementation not in kinds:
            raise ValueError(
                "`cache_implementation` must be None, 'dynamic', 'offloaded', 'static', 'offloaded_static' or "
                f"'quantized', got {cache_implementation!r}."
            )
        if cache_implementation in STATIC and max_length is None:
            raise ValueError("A static cache needs `max_length`, the most context tokens that it holds.")
        if max_length is not None and (
            max_length < 1 or (max_length > MOST_TOKENS and cache_implementation in STATIC)
        ):
            raise ValueError(f"`max_length` must be at least 1, and at most {MOST_TOKENS} tokens, got {max_length}.")
        if cache_implementation in OFFLOADED and not torch.accelerator.is_available():
            raise ValueError(
                f"{cache_implementation!r} moves keys and values off an accelerator, and there is none. Use 'dynamic' "
                "or 'static'."
            )
        self.config = config
        self.cache_implementation = cache_implementation
        self.max_length = max_length
        self.cache_config = cache_config or {}
        self.route: Route | None = None
        self.parts: dict[str, CachePart] = {}
        self.offloading = False
        self.layer_class_to_replicate = None
        self._records_past = False

    def part(self, name: str, prefix_length: int = 0) -> CachePart:
        """The part of submodel `name`, a key of `config.sub_config_items()`; made at its first use."""
        if name not in self.parts:
            self.parts[name] = CachePart(self._new_cache(self.config.sub_config_items()[name], prefix_length))
            if self.cache_implementation in STATIC:
                self.parts[name].max_length = self.max_length + prefix_length
            if self._records_past:
                self.parts[name].cache.activate_past_recording()
        return self.parts[name]

    def _new_cache(self, config: PreTrainedConfig, prefix_length: int) -> Cache:
        offloading = self.cache_implementation in OFFLOADED
        if self.cache_implementation in STATIC:
            return StaticCache(config, max_cache_len=self.max_length + prefix_length, offloading=offloading)
        if self.cache_implementation in QUANTIZED:
            options = {"backend": "quanto", "config": config} | self.cache_config
            return QuantizedCache(**options)
        cache = DynamicCache(config=config, offloading=offloading)
        if not offloading:
            cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return cache

    # Whatever `Cache` does layer by layer (reset, crop, is_sliding, …) it does to the layers of all parts.
    @property
    def layers(self) -> list:
        return [layer for part in self.parts.values() for layer in part.cache.layers]

    @property
    def is_compileable(self) -> bool:
        """Whether a step into it can be compiled, known before there are parts."""
        return self.cache_implementation == "static"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.parts})"

    @property
    def batch_size(self) -> int:
        return -1 if self.route is None else self.route.batch_size

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Context tokens in the cache."""
        part = next(iter(self.parts.values()), CachePart())
        return part.length - part.prefix_length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Most context tokens that fit; -1 without a limit."""
        return self.max_length if self.cache_implementation in STATIC else -1

    def check_no_gaps(self, attention_mask: torch.Tensor, num_tokens: int):
        """Refuse a mask of context tokens, the last `num_tokens` of them new, that a recurrent part cannot follow."""
        for name, part in self.parts.items():
            if not is_recurrent(part.cache):  # nothing to look at, at each step
                continue
            rows = slice(None) if name == "pcm" else self.route.pair_rows[int(name.rpartition(".")[2])]
            part.check_no_gaps(attention_mask[rows], num_tokens)

    def activate_past_recording(self):
        self._records_past = True
        super().activate_past_recording()

    def crop(self, tokens_to_remove: int):
        for part in self.parts.values():
            part.crop(part.length + tokens_to_remove)
        super().crop(tokens_to_remove)

    def reset(self):
        super().reset()
        self.route = None
        self.parts.clear()

    def reorder_cache(self, beam_idx: torch.LongTensor):
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor):
        self._select(torch.arange(self.batch_size, device=indices.device)[indices])

    def batch_repeat_interleave(self, repeats: int):
        rows = torch.arange(self.batch_size, device=self.route.weights.device)
        self._select(rows.repeat_interleave(repeats))

    def _select(self, rows: torch.LongTensor):
        """Make row `rows[i]` the cache's row i."""
        rows = rows.to(self.route.weights.device)
        self.route, pairs = self.route.select(rows)
        part_rows = {"pcm": rows} | {f"backbones.{backbone}": index for backbone, index in pairs.items()}
        self.parts = {name: part for name, part in self.parts.items() if name in part_rows}
        for name, part in self.parts.items():
            part.cache.reorder_cache(part_rows[name])  # which every kind has, and which takes any number of rows
            part.select(part_rows[name])

    @classmethod
    def join(cls, caches: list["PCMEnsembleCache"], room: int | None = None) -> "PCMEnsembleCache":
        r"""
        Put the rows of caches, which may differ in preference and length, into one. Columns that no row needs are left
        out, so that `join([cache])` makes a cache smaller whose longest rows have gone.

        Args:
            caches (`list[PCMEnsembleCache]`): dynamic or static ones of one ensemble, each with a route. They stay as
                they are.
            room (`int`, *optional*): makes a static cache, for compiled steps, with room for so many tokens more;
                without it the cache is dynamic.

        Returns:
            [`PCMEnsembleCache`], whose rows are padded on the left. It knows what is masked: go on by `forward`,
            without an `attention_mask`. Where the longest rows have gone, its length counts prefixes that all rows
            have as context.

        Raises:
            ValueError: if there are none, one is empty or of another ensemble than the first, `room` is below 1, or
                caches are quantised, offloaded, of sliding windows, or keep states.
        """
        check_kind("room", room, int, optional=True)
        if room is not None and not 0 < room <= MOST_TOKENS:
            raise ValueError(f"`room` must be at least 1, or None for a cache that grows, got {room}.")
        check_kind("caches", caches, (list, tuple))
        for cache in caches:
            if not has_class(cache, "PCMEnsembleCache"):
                raise TypeError(f"`caches` must be a list of `PCMEnsembleCache`, got a {type(cache).__name__} in it.")
        if not caches or any(cache.route is None or cache.config is not caches[0].config for cache in caches):
            raise ValueError("`caches` must be one or more caches that one ensemble has filled.")
        for cache in caches:
            if not all(takes_padding(part.cache, StaticLayer) for part in cache.parts.values()):
                raise ValueError(
                    "`join` takes dynamic and static caches of full attention: others have no room for padding, or "
                    "none that they could leave out."
                )
        names = dict.fromkeys(name for cache in caches for name in cache.parts)
        parts = {name: [cache.parts[name] for cache in caches if name in cache.parts] for name in names}
        masks = {name: [_mask(part) for part in entries] for name, entries in parts.items()}
        widths = {name: max(map(_needed, entries)) for name, entries in masks.items()}
        # Rows have prefixes of unlike lengths now. Contexts have one length in all parts.
        context_length = min(*widths.values(), max(cache.get_seq_length() for cache in caches))
        kind = {} if room is None else {"cache_implementation": "static", "max_length": context_length + room}
        joined, routes = cls(caches[0].config, **kind), [cache.route for cache in caches]
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


def _needed(mask: torch.LongTensor) -> int:
    """Columns from the first that a row reads."""
    return mask.shape[1] - int(mask.argmax(dim=1).min())


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


__all__ = ["PCMEnsembleCache"]
