"""The cache of an ensemble: a memory of the PCM, one of each backbone in use, and the route; and many made one."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, PreTrainedConfig, QuantizedCache, StaticCache
from transformers.cache_utils import DynamicLayer

from .call_arguments import NUMBERS, check_kind, check_tensor, has_class
from .configuration_pcm_ensemble import ENDPOINT, PCMEnsembleConfig
from .memory import GrowingLayer, Memory
from .preference import Preference
from .routing import Route

STATIC, QUANTIZED, OFFLOADED = ("static", "offloaded_static"), ("quantized",), ("offloaded", "offloaded_static")
MOST_TOKENS = 2**31 - 1


class PCMEnsembleCache(Cache):
    r"""
    Keys and values of every submodel, and the route, behind the interface of one model's cache.

    A batch row of this cache is a row of the PCM's memory and one row in a backbone's memory for each active expert.
    Lengths count context tokens only, without prefixes.

    Args:
        config (`PCMEnsembleConfig`): the ensemble's.
        cache_implementation (`str`, *optional*): the kind of every memory, as `generate` names it: None or "dynamic",
            "offloaded", "static", "offloaded_static", "quantized".
        max_length (`int`, *optional*): most context tokens that static memories hold.
        cache_config (`dict`, *optional*): options of quantized memories.

    Attributes:
        route (`Route`, *optional*): which (row, expert) pairs run; None before the first call.
        pcm (`Memory`), backbones (`dict[int, Memory]`): the submodels' memories, from the first call on.
        room (`float`, *optional*): most context tokens that the submodels can read; None where it is not known yet.
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
        self.pcm = Memory()
        self.backbones: dict[int, Memory] = {}
        self.room: float | None = None
        self.is_broken = False
        self.offloading = False
        self.layer_class_to_replicate = None
        self._records_past = False

    def __deepcopy__(self, memo: dict) -> "PCMEnsembleCache":
        memo[id(self.config)] = self.config  # a copy goes on with the same ensemble
        copied = type(self).__new__(type(self))
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def start(self, route: Route):
        """Make an empty cache ready for a text under `route`."""
        self.route = route
        self.pcm = self._new_memory(self.config.pcm, max(map(len, route.descriptions)))
        self.backbones = {}
        for backbone, entries in route.expert_rows.items():
            experts = [self.config.experts[entry.expert] for entry in entries if entry.expert is not None]
            longest = max((len(expert["prompt_ids"]) for expert in experts), default=0)
            self.backbones[backbone] = self._new_memory(self.config.backbones[backbone], longest)

    @contextmanager
    def started(self, route: Route) -> Iterator[None]:
        """
        Start under `route` where that has not been done. If what runs inside fails, then begin anew or, in the middle
        of a text, which some submodels have read further than others, refuse to go on.
        """
        self.check_whole()
        begins = self.pcm.length == 0
        if self.route is None:
            self.start(route)
        try:
            yield
        except BaseException:
            if begins:
                self.reset()  # or the next call would go on with what the failed one has read
            else:
                self.is_broken = True
            raise

    def check_whole(self):
        """
        Refuse to go on with a text that some submodels have read further than others.

        Raises:
            RuntimeError: if the last call failed in the middle of a text.
        """
        if self.is_broken:
            raise RuntimeError("The last call with this cache failed on its way. Start the text anew, without it.")

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Change all memories alike, or refuse to go on with them."""
        self.check_whole()
        try:
            yield
        except BaseException:
            self.is_broken = True
            raise

    def _new_memory(self, config: PreTrainedConfig, prefix_length: int) -> Memory:
        if config.model_type == ENDPOINT:  # whose cache holds tokens, as they are and no more
            return Memory(DynamicCache(config=config))

        max_length = None
        if self.cache_implementation in STATIC and self.max_length is not None:
            max_length = self.max_length + prefix_length
        cache = self._new_cache(config, max_length)
        if self._records_past:
            cache.activate_past_recording()
        return Memory(cache, max_length)

    def _new_cache(self, config: PreTrainedConfig, max_length: int | None) -> Cache:
        offloading = self.cache_implementation in OFFLOADED
        if max_length is not None:
            return StaticCache(config, max_cache_len=max_length, offloading=offloading)
        if self.cache_implementation in QUANTIZED:
            options = {"backend": "quanto", "config": config} | self.cache_config
            return QuantizedCache(**options)

        cache = DynamicCache(config=config, offloading=offloading)
        if not offloading:
            cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return cache

    @property
    def memories(self) -> list[Memory]:
        """Of all submodels that run."""
        return [] if self.route is None else [self.pcm, *self.backbones.values()]

    @property
    def known_route(self) -> Route:
        """
        The route.

        Raises:
            ValueError: if the cache is empty, so that there is none.
        """
        if self.route is None:
            raise ValueError("The cache is empty. Fill it first: `model(input_ids, past_key_values=cache)`.")
        return self.route

    @property
    def preferences(self) -> list[Preference] | None:
        """Each row's."""
        return None if self.route is None else self.route.preferences

    def reweight(self, weights: torch.Tensor):
        """
        Go on under other weights. The PCM keeps what it has read of the first ones.

        Args:
            weights (`torch.FloatTensor` of shape `(batch, experts)`): above 0 for the experts that each row runs; of
                any sign where tilts add up.

        Raises:
            TypeError: if `weights` are no tensor.
            ValueError: if other experts would be wanted than before.

        Example:

        ```python
        >>> cache = model(prompt_ids, preference=["concise", "friendly"]).past_key_values
        >>> cache.reweight(torch.tensor([[3.0, 1.0]]))
        >>> cache.preferences[0].label
        'concise=3 + friendly=1'

        ```
        """
        check_tensor("weights", weights, "weights", NUMBERS)
        self.route = self.known_route.reweighted(weights)

    # Whatever `Cache` does layer by layer (reset, crop, is_sliding, …) it does to the layers of all memories.
    @property
    def layers(self) -> list:  # type: ignore[override]  # `Cache` sets it once, and these come and go
        return [layer for memory in self.memories for layer in memory.layers]

    @property
    def is_compileable(self) -> bool:
        """Whether a step into it can be compiled, known before there are memories."""
        return self.cache_implementation == "static"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.pcm}, {self.backbones})"

    @property
    def batch_size(self) -> int:
        return -1 if self.route is None else self.route.batch_size

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Context tokens in the cache."""
        return self.pcm.length - self.pcm.prefix_length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Most context tokens that fit; -1 without a limit."""
        return -1 if self.max_length is None or self.cache_implementation not in STATIC else self.max_length

    def check_no_gaps(self, attention_mask: torch.Tensor, num_tokens: int):
        """Refuse a mask of context tokens, the last `num_tokens` of them new, that a recurrent state cannot follow."""
        if self.pcm.is_recurrent:
            self.pcm.check_no_gaps(attention_mask, num_tokens)
        for backbone, memory in self.backbones.items():
            if memory.is_recurrent:
                memory.check_no_gaps(attention_mask[self.known_route.pair_rows[backbone]], num_tokens)

    def activate_past_recording(self):
        self._records_past = True
        super().activate_past_recording()

    def crop(self, tokens_to_remove: int):
        """
        Forget the last tokens.

        Args:
            tokens_to_remove (`int`): their number, negative, as for every cache of transformers.

        Raises:
            TypeError, ValueError: if it is another number than -1 to minus the cached tokens, or 0; if the cache is
                static or has rows that were padded on the right.
            RuntimeError: if layers keep states or windows, and `activate_past_recording` was not called.

        Example:

        ```python
        >>> cache = model(prompt_ids, preference="concise").past_key_values
        >>> cache.crop(-2)
        >>> cache.get_seq_length() == prompt_ids.shape[1] - 2
        True

        ```
        """
        check_kind("tokens_to_remove", tokens_to_remove, int)
        if not -self.get_seq_length() <= tokens_to_remove <= 0:
            raise ValueError(
                f"`tokens_to_remove` must be from -{self.get_seq_length()}, which is all that is cached, to 0, got "
                f"{tokens_to_remove}."
            )
        if tokens_to_remove and self.cache_implementation in STATIC:
            raise ValueError("A static cache cannot be cropped. Use a dynamic one, or start anew.")
        for memory in self.memories:
            memory.check_crop(memory.length + tokens_to_remove)

        with self._changing():
            super().crop(tokens_to_remove)
            for memory in self.memories:
                memory.crop(memory.length + tokens_to_remove)

    def reset(self):
        super().reset()
        self.route, self.room, self.is_broken = None, None, False
        self.pcm, self.backbones = Memory(), {}

    def reorder_cache(self, beam_idx: torch.Tensor):
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor):
        self._select(torch.arange(self.known_route.batch_size, device=indices.device)[indices])

    def batch_repeat_interleave(self, repeats: int):
        self._select(torch.arange(self.known_route.batch_size).repeat_interleave(repeats))

    def _select(self, rows: torch.Tensor):
        """Make row `rows[i]` the cache's row i."""
        rows = rows.to(self.known_route.weights.device)
        route, pairs = self.known_route.select(rows)

        with self._changing():
            self.route = route
            self.pcm.copy_rows(rows)
            self.backbones = {backbone: memory for backbone, memory in self.backbones.items() if backbone in pairs}
            for backbone, memory in self.backbones.items():
                memory.copy_rows(pairs[backbone])

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
            RuntimeError: if the last call with one failed in the middle of a text.

        Example:

        ```python
        >>> names = ("concise", "friendly")
        >>> caches = [model(prompt_ids, preference=name).past_key_values for name in names]
        >>> cache = PCMEnsembleCache.join(caches)
        >>> [preference.label for preference in cache.preferences]
        ['concise', 'friendly']

        ```
        """
        _check_joinable(caches, room)

        # By backbone, or None for the PCM
        parts: dict[int | None, list[Memory]] = {None: [cache.pcm for cache in caches]}
        for cache in caches:
            for backbone, memory in cache.backbones.items():
                parts.setdefault(backbone, []).append(memory)

        masks = {key: [_mask(memory) for memory in memories] for key, memories in parts.items()}
        widths = {key: max(map(_needed, of_parts)) for key, of_parts in masks.items()}

        # Rows have prefixes of unlike lengths now. Contexts have one length in all memories.
        context_length = min(*widths.values(), max(cache.get_seq_length() for cache in caches))
        joined = cls(caches[0].config)
        if room is not None:
            joined = cls(caches[0].config, "static", context_length + room)
        routes = [cache.known_route for cache in caches]
        joined.route = Route.join(routes)

        for key, width in widths.items():
            config = joined.config.pcm if key is None else joined.config.backbones[key]
            memory = joined._new_memory(config, width - context_length)
            memory.prefix_length = width - context_length
            _fill(memory, parts[key], masks[key], width, _order(routes, key))
            if key is None:
                joined.pcm = memory
            else:
                joined.backbones[key] = memory
        return joined


def _check_joinable(caches: list[PCMEnsembleCache], room: int | None):
    """Refuse what [`PCMEnsembleCache.join`] cannot take."""
    check_kind("room", room, int, optional=True)
    if room is not None and not 0 < room <= MOST_TOKENS:
        raise ValueError(f"`room` must be at least 1, or None for a cache that grows, got {room}.")

    check_kind("caches", caches, (list, tuple))
    for cache in caches:
        if not has_class(cache, "PCMEnsembleCache"):
            raise TypeError(f"`caches` must be a list of `PCMEnsembleCache`, got a {type(cache).__name__} in it.")

    if not caches or any(cache.route is None or cache.config is not caches[0].config for cache in caches):
        raise ValueError("`caches` must be one or more caches that one ensemble has filled.")
    if not all(memory.takes_prefixes for cache in caches for memory in cache.memories):
        raise ValueError(
            "`join` takes dynamic and static caches of full attention: others have no room for padding, or "
            "none that they could leave out."
        )

    for cache in caches:
        cache.check_whole()


def _order(routes: list[Route], backbone: int | None) -> list[int]:
    """Where each pair of the joined memory stands among its parts' pairs, one part after the other."""
    if backbone is None:
        return list(range(sum(route.batch_size for route in routes)))

    pairs: list[tuple[float, int]] = []  # (expert, row of the joined batch)
    offset = 0
    for route in routes:
        for entry in route.expert_rows.get(backbone, []):
            rows = range(route.batch_size) if entry.rows is None else entry.rows.tolist()
            expert = math.inf if entry.expert is None else entry.expert  # the bare backbone comes last
            pairs += [(expert, offset + row) for row in rows]
        offset += route.batch_size
    return sorted(range(len(pairs)), key=pairs.__getitem__)


def _mask(memory: Memory) -> torch.Tensor:
    """The mask of all cached tokens, `(rows, tokens)`."""
    keys = memory.layers[0].keys
    return memory.past_mask(None, keys.shape[0], keys.device)


def _needed(mask: torch.Tensor) -> int:
    """How many of the last columns a row reads, at most."""
    return mask.shape[1] - int(mask.argmax(dim=1).min())


def _fill(joined: Memory, parts: list[Memory], masks: list[torch.Tensor], width: int, order: list[int]):
    """Put the last `width` tokens of all parts' rows, in `order`, into an empty memory."""
    for index, layer in enumerate(joined.layers):
        states = []
        for name in ("keys", "values"):
            of_parts = [getattr(part.layers[index], name)[:, :, : part.length] for part in parts]
            states.append(torch.cat([_of_width(tensor, width, dim=2) for tensor in of_parts])[order])
        layer.update(*states)

    mask = torch.cat([_of_width(mask, width, dim=1) for mask in masks])[order]  # (rows, width)
    joined.length, joined.attention_mask = width, None if mask.all() else mask


def _of_width(tensor: torch.Tensor, width: int, dim: int) -> torch.Tensor:
    """The last `width` columns, with zeros on the left where there are not as many."""
    missing = max(width - tensor.shape[dim], 0)
    tensor = tensor.narrow(dim, max(tensor.shape[dim] - width, 0), width - missing)
    return pad(tensor, (0, 0) * (tensor.dim() - 1 - dim) + (missing, 0))


__all__ = ["PCMEnsembleCache"]
