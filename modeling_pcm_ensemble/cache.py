"""The cache of an ensemble: one part for the PCM, one for each backbone in use, and the route."""

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, QuantizedCache, StaticCache
from transformers.cache_utils import DynamicLayer

from .configuration_pcm_ensemble import PCMEnsembleConfig
from .preferences import Route
from .prefixes import CachePart, is_recurrent

STATIC, QUANTIZED, OFFLOADED = ("static", "offloaded_static"), ("quantized",), ("offloaded", "offloaded_static")
STEPS_AHEAD = 64  # tokens that a growing layer makes room for, at least


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
    return not cache.offloading and all(type(x) in (DynamicLayer, GrowingLayer, *layer_types) for x in cache.layers)


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
        if cache_implementation not in (None, "dynamic", *STATIC, *QUANTIZED, *OFFLOADED):
            raise ValueError(
                "`cache_implementation` must be None, 'dynamic', 'offloaded', 'static', 'offloaded_static' or "
                f"'quantized', got {cache_implementation!r}."
            )
        if cache_implementation in STATIC and max_length is None:
            raise ValueError("A static cache needs `max_length`, the most context tokens that it holds.")
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


__all__ = ["PCMEnsembleCache"]
