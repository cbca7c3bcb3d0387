"""What each request asks for: from `SamplingParams.extra_args` to tensors that the model reads at every step."""

import json
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from transformers import GenerationConfig
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.tokenizers.registry import cached_tokenizer_from_config
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2

from ..configuration_pcm_ensemble import PRODUCT, PCMEnsembleConfig, max_positions
from ..generation import filled_in
from ..preference import Preference, description_of
from ..routing import adapters_backbone, mergeable_names
from .reading import MOST_TOKENS, Prefix, Prefixes
from .settings import slots_of

logger = init_logger(__name__)

KEYS = ("preference", "preference_text", "preference_ids")
MOST_KNOWN = 4096  # wishes that are kept as read
MOST_CHARACTERS = 20_000  # of what a request says, as JSON
MOST_DESCRIPTION_TOKENS = 1024  # all requests of a step wait while a new description is read

TABLE = "pcm_ensemble.requests"  # among what vLLM's forward passes find by name


class Wish(NamedTuple):
    r"""
    What one request asks for.

    Args:
        weights (`list[float]`): of every expert, 0 where it does not run.
        slots (`list[int]`): the expert in each slot, -1 in an empty one; last, for a product, the reference, which is
            no expert's number where it is the bare backbone.
        description (`Prefixes`): what the PCM reads first.
        prompts (`Prefixes`): what each slot reads first.
        firsts (`list[int]`): the token that the PCM, and then each slot, reads in place of the context's first one,
            see [`WishReader`]; -1 where it reads that.
    """

    weights: list[float]
    slots: list[int]
    description: Prefixes
    prompts: Prefixes
    firsts: list[int]

    @property
    def offsets(self) -> list[int]:
        """Tokens that the PCM, and then each slot, reads first."""
        return [len(prefix.tokens) for prefix in (*self.description, *self.prompts)]


def asked_for(params: SamplingParams | None) -> dict[str, Any] | None:
    """Return what a request says of its preference; None where it says nothing."""
    extra_args = (params.extra_args if params is not None else None) or {}
    return {name: extra_args[name] for name in KEYS if extra_args.get(name) is not None} or None


class WishReader:
    """
    Reads what requests say, as `generate` reads its arguments; where JSON cannot carry a form, as JSON in a string.

    Where prefix and context both begin with BOS, the context is read without its own. It has a place in the pages
    already, which the prefix's last token takes: it stands right before the rest of the context.

    Args:
        vllm_config (`VllmConfig`): the engine's.
    """

    def __init__(self, vllm_config: VllmConfig):
        self.model_config = vllm_config.model_config
        self.config: PCMEnsembleConfig = self.model_config.hf_config
        self.slots = slots_of(vllm_config)
        # What all requests of a step need is kept, whatever else is dropped.
        of_each = MOST_TOKENS // vllm_config.scheduler_config.max_num_seqs
        self.most_description_tokens = min(MOST_DESCRIPTION_TOKENS, of_each)
        self.defaults = GenerationConfig(**self.model_config.try_get_generation_config())
        self._known: dict[str, Wish] = {}

    def read(self, params: SamplingParams | None, first_token: int | None = None) -> Wish:
        """
        Read what a request asks for, whose context begins with `first_token`.

        Raises:
            ValueError: as `generate` does, or if the engine has too few slots, or no room for the description.
        """
        self._check_names(params)
        asked = asked_for(params) or {}
        has_bos = first_token is not None and first_token == self.config.prefix_bos_token_id
        key = _as_json([asked, has_bos])
        if key not in self._known:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            wish = self._read(**asked)
            self._known[key] = self._without_second_bos(wish) if has_bos else wish
        return self._known[key]

    def _without_second_bos(self, wish: Wish) -> Wish:
        prefixes, firsts = [], []
        for prefix in (*wish.description, *wish.prompts):
            begins = prefix.tokens[:1] == (self.config.prefix_bos_token_id,)
            prefixes.append(prefix._replace(tokens=prefix.tokens[:-1]) if begins else prefix)
            firsts.append(prefix.tokens[-1] if begins else -1)
        return wish._replace(description=tuple(prefixes[:1]), prompts=tuple(prefixes[1:]), firsts=firsts)

    def read_first_expert(self) -> Wish:
        """Return what wants the first expert that may have a weight, alone."""
        return self._as_wish(Preference({mergeable_names(self.config)[0]: 1.0}))

    def _check_names(self, params: SamplingParams | None):
        extra_args = (params.extra_args if params is not None else None) or {}
        if unknown := [name for name in extra_args if name.startswith("prefer") and name not in KEYS]:
            raise ValueError(f"A request has no argument {unknown[0]!r}. There are {', '.join(map(repr, KEYS))}.")

    def _read(self, preference=None, preference_text=None, preference_ids=None) -> Wish:
        if isinstance(preference, str) and preference.lstrip().startswith(("{", "[")):
            preference = _from_json("preference", preference)
        if isinstance(preference_ids, str):
            preference_ids = _from_json("preference_ids", preference_ids)
        try:
            ids = None if preference_ids is None else torch.tensor(preference_ids)
            told = {"preference": preference, "preference_text": preference_text, "preference_ids": ids}
            told = filled_in(told, self.defaults)
            tokenizer = None if told["preference_text"] is None else cached_tokenizer_from_config(self.model_config)
            [read] = Preference.parse_batch(self.config, 1, **told, tokenizer=tokenizer)
        except (TypeError, RuntimeError) as error:  # vLLM answers a ValueError with 400
            raise ValueError(str(error)) from error

        wish = self._as_wish(read)
        self._check_room(wish)
        return wish

    def _as_wish(self, preference: Preference) -> Wish:
        weights = [preference.weights.get(name, 0.0) for name in self.config.expert_names]
        active = [index for index, weight in enumerate(weights) if weight]
        description = (Prefix(0, tuple(description_of(self.config, preference))),)
        if self.slots is None:  # all adapters in one row
            adapters_backbone(self.config, torch.tensor([weights]) != 0)  # which refuses what is no adapter
            return Wish(weights, [-1], description, (Prefix(-1, ()),), [-1, -1])

        if len(active) > self.slots:
            raise ValueError(
                f"The preference {preference.label} wants {len(active)} experts at once, and this engine runs "
                f"{self.slots} for a request. Ask for fewer, or start it with more `expert_slots`."
            )
        slots = active + [-1] * (self.slots - len(active))
        if self.config.merge == PRODUCT:
            reference = self.config.reference_index
            slots.append(self.config.num_experts if reference is None else reference)
        prompts = tuple(map(self._prompt_of, slots))
        return Wish(weights, slots, description, prompts, [-1] * (1 + len(slots)))

    def _prompt_of(self, expert: int) -> Prefix:
        """What an expert reads first; nothing in an empty slot and before the bare backbone."""
        has_one = 0 <= expert < self.config.num_experts
        return Prefix(expert, tuple(self.config.experts[expert]["prompt_ids"]) if has_one else ())

    def _check_room(self, wish: Wish):
        num_tokens = len(wish.description[0].tokens)
        if num_tokens > self.most_description_tokens:
            raise ValueError(
                f"A description may have {self.most_description_tokens} tokens here ({MOST_TOKENS} / `max_num_seqs`, "
                f"and {MOST_DESCRIPTION_TOKENS} at most), and it has {num_tokens}. Use a shorter text."
            )

        limit = max_positions(self.config.pcm)
        longest = self.model_config.max_model_len + num_tokens
        if limit is not None and longest > limit:
            raise ValueError(
                f"The description has {num_tokens} tokens, which the PCM has no room for: it reads "
                f"{limit} tokens, of which this engine's `max_model_len` takes {self.model_config.max_model_len}. "
                "Use a shorter text, or start the engine with a smaller one."
            )


def _as_json(said) -> str:
    """What a request says, as text; JSON alone comes to the engine as it was said."""
    try:
        text = json.dumps(said, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"A preference must be what JSON carries: texts, numbers, lists and mappings. {error}"
        ) from error
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"A preference may have {MOST_CHARACTERS} characters as JSON, and this one has {len(text)}.")
    return text


def _from_json(name: str, text: str):
    try:
        return json.loads(text, object_pairs_hook=_once_each)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"`{name}` is no JSON: {text!r:.200} ({error}).") from error


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a name that is there twice, of which JSON would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r} is there twice. Give each expert one weight.")
    return found


def check_default(vllm_config: VllmConfig):
    """Warn where requests that say nothing cannot be served."""
    try:
        WishReader(vllm_config).read(None)
    except ValueError as error:
        logger.warning(
            "Requests without a preference will be refused, for they get the default one. %s Or give the checkpoint "
            "another default.",
            error,
        )


class Batch(NamedTuple):
    r"""
    What the requests of a step ask for.

    Args:
        weights (`torch.FloatTensor` of shape `(requests, experts)`): the user's.
        slots (`torch.LongTensor` of shape `(requests, slots)`): the expert in each slot, see [`Wish`].
        offsets (`torch.LongTensor` of shape `(requests, 1 + slots)`): tokens that the PCM, and then each slot, reads
            first.
        firsts (`torch.LongTensor` of shape `(requests, 1 + slots)`): see [`Wish`].
        descriptions, prompts (`list[Prefixes]`): those.
    """

    weights: torch.Tensor
    slots: torch.Tensor
    offsets: torch.Tensor
    firsts: torch.Tensor
    descriptions: list[Prefixes]
    prompts: list[Prefixes]


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

        # Where no request stands, as in runs that only warm up, the first expert that may have a weight runs alone.
        wish = self.reader.read_first_expert()
        self.wishes = [wish] * num_places
        # By itself the dtype would be the model's under the V2 runner.
        self.weights = torch.tensor([wish.weights] * num_places, dtype=torch.float32, device=device)
        self.slots = torch.tensor([wish.slots] * num_places, device=device)
        self.offsets = torch.tensor([wish.offsets] * num_places, device=device)
        self.firsts = torch.tensor([wish.firsts] * num_places, device=device)

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

    def set(self, place: int, params: SamplingParams | None, prompt: Sequence[int] | None):
        """Let a request, of these arguments and prompt tokens, stand at a place."""
        wish = self.wishes[place] = self.reader.read(params, prompt[0] if prompt else None)
        self.weights[place] = torch.tensor(wish.weights)
        self.slots[place] = torch.tensor(wish.slots)
        self.offsets[place] = torch.tensor(wish.offsets)
        self.firsts[place] = torch.tensor(wish.firsts)

    def move(self, source: int, target: int, swap: bool = False):
        """Move a request to another place; with `swap`, the one that stands there comes back."""
        taken, given = ([target, source], [source, target]) if swap else ([target], [source])
        for tensor in (self.weights, self.slots, self.offsets, self.firsts):
            tensor[taken] = tensor[given]  # an index makes a copy
        moved = [self.wishes[place] for place in given]
        for place, wish in zip(taken, moved):
            self.wishes[place] = wish

    def batch(self, places: Sequence[int] | int) -> Batch:
        """Return what requests at `places` ask for; at the first so many, for a number."""
        if isinstance(places, int):
            index: Any = slice(places)
            wishes = self.wishes[:places]
        else:
            index = torch.as_tensor(places, device=self.weights.device)
            wishes = [self.wishes[place] for place in places]

        descriptions, prompts = [wish.description for wish in wishes], [wish.prompts for wish in wishes]
        tensors = [tensor[index] for tensor in (self.weights, self.slots, self.offsets, self.firsts)]
        return Batch._make([*tensors, descriptions, prompts])


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
        for place, params, prompt, _ in batch_update.added:
            self.table.set(place, params, prompt)
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
