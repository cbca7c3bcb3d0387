"""What each request asks for: from `SamplingParams.extra_args` to tensors that the model reads at every step."""

import json
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.tokenizers.registry import cached_tokenizer_from_config
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2

from ..configuration_pcm_ensemble import PCMEnsembleConfig
from ..preference import Preference, description_of
from .settings import slots_of

KEYS = ("preference", "preference_text", "preference_ids")
MOST_KNOWN = 4096  # wishes that are kept as read

TABLE = "pcm_ensemble.requests"  # among what vLLM's forward passes find by name


class Wish(NamedTuple):
    r"""
    What one request asks for.

    Args:
        weights (`list[float]`): of every expert, 0 where it does not run.
        slots (`list[int]`): the expert in each slot, -1 in an empty one.
        description (`tuple[int, ...]`): tokens that the PCM reads first.
    """

    weights: list[float]
    slots: list[int]
    description: tuple[int, ...]


def asked_for(params: SamplingParams | None) -> dict[str, Any] | None:
    """Return what a request says of its preference; None where it says nothing."""
    extra_args = (params.extra_args if params is not None else None) or {}
    return {name: extra_args[name] for name in KEYS if extra_args.get(name) is not None} or None


class WishReader:
    """
    Reads what requests say, as `generate` reads its arguments; where JSON cannot carry a form, as JSON in a string.

    Args:
        vllm_config (`VllmConfig`): the engine's.
    """

    def __init__(self, vllm_config: VllmConfig):
        self.model_config = vllm_config.model_config
        self.config: PCMEnsembleConfig = self.model_config.hf_config
        self.slots = slots_of(vllm_config)
        self._known: dict[str, Wish] = {}

    def read(self, params: SamplingParams | None) -> Wish:
        """
        Read what a request asks for.

        Raises:
            ValueError: as `generate` does, or if the engine has too few slots, or no room for the description.
        """
        self._check_names(params)
        asked = asked_for(params) or {}
        key = json.dumps(asked, sort_keys=True, default=repr)
        if key not in self._known:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[key] = self._read(**asked)
        return self._known[key]

    def _check_names(self, params: SamplingParams | None):
        extra_args = (params.extra_args if params is not None else None) or {}
        if unknown := [name for name in extra_args if name.startswith("preference") and name not in KEYS]:
            raise ValueError(f"A request has no argument {unknown[0]!r}. There are {', '.join(map(repr, KEYS))}.")

    def _read(self, preference=None, preference_text=None, preference_ids=None) -> Wish:
        if isinstance(preference, str) and preference.lstrip().startswith(("{", "[")):
            preference = _from_json("preference", preference)
        if isinstance(preference_ids, str):
            preference_ids = _from_json("preference_ids", preference_ids)
        try:
            ids = None if preference_ids is None else torch.tensor(preference_ids)
            tokenizer = None if preference_text is None else cached_tokenizer_from_config(self.model_config)
            [read] = Preference.parse_batch(self.config, 1, preference, preference_text, ids, tokenizer)
        except (TypeError, RuntimeError) as error:  # vLLM answers a ValueError with 400
            raise ValueError(str(error)) from error

        wish = self._as_wish(read)
        self._check_room(wish)
        return wish

    def _as_wish(self, preference: Preference) -> Wish:
        weights = [preference.weights.get(name, 0.0) for name in self.config.expert_names]
        active = [index for index, weight in enumerate(weights) if weight]
        if self.slots is None:
            return Wish(weights, [], description_of(self.config, preference))

        if len(active) > self.slots:
            raise ValueError(
                f"The preference {preference.label} wants {len(active)} experts at once, and this engine runs "
                f"{self.slots} for a request. Ask for fewer, or start it with more `expert_slots`."
            )
        slots = active + [-1] * (self.slots - len(active))
        return Wish(weights, slots, description_of(self.config, preference))

    def _check_room(self, wish: Wish):
        limit = getattr(self.config.pcm.get_text_config(), "max_position_embeddings", None)
        longest = self.model_config.max_model_len + len(wish.description)
        if limit is not None and longest > limit:
            raise ValueError(
                f"The description has {len(wish.description)} tokens, which the PCM has no room for: it reads "
                f"{limit} tokens, of which this engine's `max_model_len` takes {self.model_config.max_model_len}. "
                "Use a shorter text, or start the engine with a smaller one."
            )


def _from_json(name: str, text: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`{name}` is no JSON: {text!r} ({error}).") from error


class Batch(NamedTuple):
    r"""
    What the requests of a step ask for.

    Args:
        weights (`torch.FloatTensor` of shape `(requests, experts)`): the user's.
        slots (`torch.LongTensor` of shape `(requests, slots)`): the expert in each slot, -1 in an empty one.
        descriptions (`list[tuple[int, ...]]`): what the PCM reads first.
        offsets (`torch.LongTensor` of shape `(requests,)`): their lengths.
    """

    weights: torch.Tensor
    slots: torch.Tensor
    descriptions: list[tuple[int, ...]]
    offsets: torch.Tensor


class RequestTable:
    """
    The wishes of all requests that run, by place: of a batch in the V1 runner, which moves requests, of the runner's
    own state in V2.

    Args:
        vllm_config (`VllmConfig`): the engine's.
        device (`torch.device`): the model's.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device):
        self.reader = WishReader(vllm_config)
        num_places = vllm_config.scheduler_config.max_num_seqs
        experts = self.reader.config.num_experts
        self.weights = torch.zeros(num_places, experts, device=device)
        self.slots = torch.full((num_places, self.reader.slots or 0), -1, device=device)
        self.offsets = torch.zeros(num_places, dtype=torch.long, device=device)
        self.descriptions: list[tuple[int, ...]] = [()] * num_places

        # Where no request stands, as in runs that only warm up, the first expert that may have a weight runs alone.
        first = self.reader.config.expert_names.index(self.reader.config.weighted_names[0])
        self.weights[:, first] = 1
        self.slots[:, :1] = first

    @classmethod
    def of(cls, vllm_config: VllmConfig, device: torch.device) -> "RequestTable":
        """
        Return an engine's table, which its model and its runner share. Both of them get its `vllm_config` alone; this
        dictionary of it belongs to the process, and enters no key of compiled code.
        """
        shared = vllm_config.compilation_config.static_forward_context
        if TABLE not in shared:
            shared[TABLE] = cls(vllm_config, device)
        return shared[TABLE]

    def set(self, place: int, params: SamplingParams | None):
        """Let a request stand at a place."""
        weights, slots, description = self.reader.read(params)
        self.weights[place] = torch.tensor(weights)
        self.slots[place] = torch.tensor(slots, dtype=torch.long)
        self.offsets[place] = len(description)
        self.descriptions[place] = description

    def move(self, source: int, target: int, swap: bool = False):
        """Move a request to another place; with `swap`, the one that stands there comes back."""
        taken, given = ([target, source], [source, target]) if swap else ([target], [source])
        for tensor in (self.weights, self.slots, self.offsets):
            tensor[taken] = tensor[given].clone()
        moved = [self.descriptions[place] for place in given]
        for place, description in zip(taken, moved):
            self.descriptions[place] = description

    def batch(self, places: Sequence[int] | int) -> Batch:
        """Return what requests at `places` ask for; at the first so many, for a number."""
        if isinstance(places, int):
            index: Any = slice(places)
            descriptions = self.descriptions[:places]
        else:
            index = torch.as_tensor(places, device=self.weights.device)
            descriptions = [self.descriptions[place] for place in places]
        return Batch(self.weights[index], self.slots[index], descriptions, self.offsets[index])


class RequestCheck:
    """Checks requests where they arrive: what raises there is answered with 400; in the engine it would end that."""

    reader: ClassVar[WishReader | None] = None  # of the engine, where its requests arrive

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams):
        """
        Check a request.

        Raises:
            ValueError: as [`WishReader.read`].
        """
        if cls.reader is not None:
            cls.reader.read(sampling_params)


class PreferenceProcessor(RequestCheck, LogitsProcessor):
    """Changes no logits. vLLM's V1 runner tells a logits processor, before each forward pass, who stands where."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        self.table = RequestTable.of(vllm_config, device)

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None):
        """Follow requests that come and move. One that goes leaves its wish behind, which nobody reads."""
        if batch_update is None:
            return
        for place, params, _, _ in batch_update.added:
            self.table.set(place, params)
        for source, target, direction in batch_update.moved:
            self.table.move(source, target, swap=direction == MoveDirectionality.SWAP)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


class PreferenceProcessorV2(RequestCheck, LogitsProcessorV2):
    """Changes no logits. The V2 runner tells [`~model_state.EnsembleModelState`] of requests."""

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        return False  # `apply` has nothing to do for it

    def apply(self, logits: torch.Tensor, ctx) -> torch.Tensor:
        return logits


class _Processors:
    """
    Processors by name, which is how vLLM hands them from process to process. Where requests arrive, a name is of an
    engine's own processor, which knows its ensemble; elsewhere, of one that learns it from the engine.
    """

    def __getattr__(self, name: str) -> type[RequestCheck]:
        for runner, processor in RUNNERS.items():
            if name.startswith(f"{runner}_"):
                return processor
        raise AttributeError(name)


RUNNERS: dict[str, type[RequestCheck]] = {"v1": PreferenceProcessor, "v2": PreferenceProcessorV2}
PROCESSORS = _Processors()


def front_end_processor(vllm_config: VllmConfig) -> str:
    """Make the processor that checks an engine's requests, and return the name that vLLM finds it by."""
    runner = "v2" if vllm_config.use_v2_model_runner else "v1"
    name = f"{runner}_{len(vars(PROCESSORS))}"
    setattr(PROCESSORS, name, type(name, (RUNNERS[runner],), {"reader": WishReader(vllm_config)}))
    return f"{__name__}:PROCESSORS.{name}"
