"""What generate() asks of an ensemble: a preference, a cache of caches, compiled steps."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, wraps

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    CompileConfig,
    ExponentialDecayLengthPenalty,
    GenerationConfig,
    GenerationMixin,
    PreTrainedTokenizerBase,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.utils import GenerateOutput
from transformers.utils import logging

from .cache import PCMEnsembleCache
from .call_checks import (
    check_cache,
    check_ids,
    check_length,
    check_mask,
    check_no_sliding_windows,
    check_positions,
    longest_context,
)
from .experts import PCMEnsembleExperts
from .preference import Preference
from .requirements import check_compiles
from .routing import Route

logger = logging.get_logger(__name__)

# Processors that compute with the logits of tokens which are not among the best
NOT_WITH_TOP_K = {
    UnbatchedClassifierFreeGuidanceLogitsProcessor: "guidance_scale",
    ExponentialDecayLengthPenalty: "exponential_decay_length_penalty",
}
PREFERENCE = ("preference", "preference_text", "preference_ids")


@dataclass
class Lengths:
    """
    What is noted on `generate`'s own copy of the generation configuration, since transformers hands nothing else from
    the method that reads a call's lengths to the one that prepares its cache.

    Args:
        are_given (`bool`): whether the call says how long an answer may be.
        of_input (`int`): the prompts' tokens.
    """

    are_given: bool
    of_input: int = 0


# `type: ignore[misc]`: transformers annotates `self` with a protocol that is meant for another type checker.
# `type: ignore[override]`: it calls these methods by keywords, of which they name those that they read.
class PCMEnsembleGeneration(PCMEnsembleExperts, GenerationMixin):
    """`generate` under a preference; all modes are the library's own."""

    def generate(  # type: ignore[override]
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args,
        preference: str | Mapping[str, float] | Preference | list | torch.Tensor | None = None,
        preference_text: str | list[str | None] | None = None,
        preference_ids: torch.Tensor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ) -> GenerateOutput | torch.Tensor:
        r"""
        Generate as any model of transformers, under a preference.

        Each of the three ways to say a preference may also stand in a `generation_config`, `preference_ids` as a list
        there. The call's own argument comes first, then the call's `generation_config`, then the model's. Where
        `past_key_values` knows the preference and the call says nothing of it, the cache's holds. An answer ends at
        the longest context that a submodel can read, whatever greater length was asked for.

        Args:
            inputs (`torch.LongTensor` of shape `(batch, seq)`, *optional*): the prompts, or `input_ids`.
            generation_config (`GenerationConfig`, *optional*): as for any model.
            args, kwargs: as for any model: `max_new_tokens`, `do_sample`, `num_beams`, `streamer`, …
            preference (*optional*): whose experts are wanted, and how much.

                - `"concise"`: this expert alone;
                - `["concise", "friendly"]`: these, alike;
                - `{"concise": 1.0, "friendly": 0.5}`: these, by weights. In a mixture they are shares of at least 0,
                  of which only the ratios count. Where tilts add up (`merge="product"` or `"adapters"`) they are
                  strengths: 1 is an expert's full tilt, and one below 0 steers away;
                - N numbers, as a list or a tensor `(N,)`: one for each of the N experts;
                - a [`Preference`];
                - for each row its own: a list of mappings, of `Preference`s or of lists, or a tensor `(batch, N)`.

                None is `config.default_preference`, else every expert at weight 1, but a product's reference.
            preference_text (`str` or `list[str | None]`, *optional*):
                What the PCM reads in place of the descriptions of the experts that run, for all rows or one for
                each. Without a `preference` it chooses among all experts.
            preference_ids (`torch.LongTensor` of shape `(tokens,)` or `(batch, tokens)`, *optional*):
                The same as tokens; negative numbers are padding.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): reads `preference_text`, and what `generate` itself
                needs one for; the first defaults to the ensemble's own.

        Returns:
            As any model: token ids `(batch, prompt + new tokens)`, or an output with them as `sequences`.

        Raises:
            TypeError, ValueError: as [`forward`], before any model runs.

        Example:

        ```python
        >>> # `model` has the experts "concise" and "friendly"
        >>> ids = model.generate(prompt_ids, preference={"concise": 1.0, "friendly": 0.5}, max_new_tokens=4)
        >>> ids.shape[1] - prompt_ids.shape[1]
        4

        ```
        """
        batch_size = self._check_call(inputs, kwargs)
        told = {"preference": preference, "preference_text": preference_text, "preference_ids": preference_ids}
        told = filled_in(told, generation_config)

        cache = kwargs.get("past_key_values")
        cache_knows = cache is not None and cache.route is not None
        if not cache_knows or any(value is not None for value in told.values()):
            told = filled_in(told, self.generation_config)
            kwargs["preference"] = self._preferences(batch_size, **told, tokenizer=tokenizer)

        if tokenizer is not None:
            kwargs["tokenizer"] = tokenizer
        return super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]

    def adjust_generation_fn(self, *args, **kwargs):
        super().adjust_generation_fn(*args, **kwargs)  # type: ignore[misc]
        self._keep_own_generation_settings()

    def _check_call(self, inputs, kwargs: dict) -> int:
        """Refuse what transformers would stumble over before `forward` sees it; gives the number of rows."""
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("`inputs_embeds` cannot be used, because experts do not share embeddings. Pass `inputs`.")
        cache = kwargs.get("past_key_values")
        if cache is not None:
            check_cache(self.config, cache)

        name, ids = ("input_ids", kwargs.get("input_ids")) if inputs is None else ("inputs", inputs)
        if ids is None:  # transformers begins with the bos token
            return 1

        check_ids(self.config, name, ids)
        if kwargs.get("attention_mask") is not None:  # of the cached tokens too where `ids` begins with them
            kwargs["attention_mask"] = check_mask(ids, kwargs["attention_mask"], cache, shapes=(ids.shape,))
        return len(ids)

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs):
        """
        The library's, but for the preference. transformers would write the call's value into its copy of the model's
        configuration, wherever that has one too, and no forward pass would see it.
        """
        told = {name: kwargs.pop(name) for name in PREFERENCE if name in kwargs}
        given = [
            kwargs.get(name) or getattr(generation_config, name, None) for name in ("max_length", "max_new_tokens")
        ]

        prepared = super()._prepare_generation_config(generation_config, **kwargs)  # type: ignore[misc]
        generation_config, model_kwargs = prepared
        for name in PREFERENCE:
            vars(generation_config).pop(name, None)
        generation_config._lengths = Lengths(any(given))  # type: ignore[attr-defined]  # our note, see `Lengths`
        return generation_config, model_kwargs | told

    def _prepare_generated_length(  # type: ignore[override]
        self, generation_config: GenerationConfig, has_default_max_length: bool, *, input_ids_length: int, **kwargs
    ) -> GenerationConfig:
        """Note the length of the input, and leave it to the preference what its experts have room for."""
        default = generation_config.max_length
        generation_config = super()._prepare_generated_length(  # type: ignore[misc]
            generation_config, has_default_max_length, input_ids_length=input_ids_length, **kwargs
        )
        if has_default_max_length and generation_config.max_new_tokens is None:
            generation_config.max_length = default + input_ids_length
        generation_config._lengths.of_input = input_ids_length  # type: ignore[attr-defined]
        return generation_config

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """Put an ensemble's cache where `generate` would put one model's, with the route on it."""
        cache = model_kwargs.get("past_key_values")
        rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
        preferences = model_kwargs.pop("preference", None)
        if preferences is not None:  # beams and return sequences repeat rows
            repeats = rows // len(preferences)
            preferences = [preference for preference in preferences for _ in range(repeats)]

        route = self._route(rows, cache, preferences)
        max_cache_length = self._cut_length(generation_config, model_kwargs, route, rows)
        if generation_config.prefill_chunk_size is not None and model_kwargs.get("attention_mask") is not None:
            check_no_sliding_windows(self.config, route)

        if cache is not None:
            super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        elif generation_config.use_cache:
            cache = PCMEnsembleCache(
                self.config,
                generation_config.cache_implementation,
                int(max(max_cache_length, generation_config.max_cache_len or 0)),
                generation_config.cache_config,
            )
        if cache is None:
            model_kwargs["preference"] = preferences
            return

        if generation_config.is_assistant:
            cache.activate_past_recording()
        if cache.route is None:
            cache.start(route)
        model_kwargs["past_key_values"] = cache

    def _cut_length(self, generation_config, model_kwargs: dict, route: Route, rows: int) -> int:
        """
        Let generation end at the longest context that can be read, and refuse input that exceeds it. Gives the number
        of context tokens that will be read at most.
        """
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        new = generation_config._lengths.of_input
        # transformers notes the mask's length on its configuration where it has left the mask away
        length = getattr(generation_config, "_mask_length", new) if mask is None else mask.shape[1]
        # From here on each token's place follows from the mask
        check_positions(model_kwargs.pop("position_ids", None), mask, rows, length)
        check_length(self.config, route, length, cache)

        # `max_length` counts the last token, which nothing reads, and not what is cached and not passed again
        cached = length - new
        room = longest_context(self.config, route, cache)
        if room < math.inf:
            most = int(room) - cached + 1
            if generation_config.prompt_lookup_num_tokens:  # which may be read beyond the end
                most = max(most - generation_config.prompt_lookup_num_tokens + 1, new + 1)
            if most < generation_config.max_length and generation_config._lengths.are_given:
                logger.warning_once(
                    f"The answer has at most {most - new} tokens instead of {generation_config.max_length - new}: the "
                    f"longest context that the PCM and the experts of this preference can read has {int(room)}."
                )
            generation_config.max_length = min(most, generation_config.max_length)
        return generation_config.max_length - 1 + cached

    def _get_logits_processor(self, *args, model_kwargs: dict | None = None, **kwargs):
        """
        Classifier-free guidance calls the model once more, which must be under the same preference.

        Raises:
            ValueError: if a processor needs what `expert_top_k` cuts off.
        """
        processors = super()._get_logits_processor(*args, model_kwargs=model_kwargs, **kwargs)  # type: ignore[misc]
        model_kwargs = model_kwargs or {}
        cache = model_kwargs.get("past_key_values")
        preferences = model_kwargs.get("preference") if cache is None else cache.preferences

        for processor in processors:
            refused = next((name for kind, name in NOT_WITH_TOP_K.items() if isinstance(processor, kind)), None)
            if refused is not None and self.config.expert_top_k is not None:
                raise ValueError(
                    f"`{refused}` cannot be used with `expert_top_k`: it reads how improbable a token is, which the "
                    "experts may have cut off. Set `model.config.expert_top_k = None`."
                )
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                processor.model = partial(self, preference=preferences)
        return processors

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # `generate` reads from it which arguments there are
    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict:  # type: ignore[override]
        """
        Ask for logits with the experts' own zero, on which penalties and other logits processors depend, and for the
        sum that needs no gradients.
        """
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        return inputs | {"normalize_logits": False, "exact": False}

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None, **kwargs) -> torch.Tensor | None:
        """Leave the mask as the user gave it: each part has its own, with its prefix."""
        return attention_mask

    def _valid_auto_compile_criteria(self, model_kwargs: dict, generation_config) -> bool:
        """A `compile_config` (a copy: the user keeps theirs) asks to compile on a CPU too; a static cache does not."""
        if generation_config.compile_config is not None:
            config = generation_config.compile_config = copy.copy(generation_config.compile_config)
            config._compile_all_devices = True
        return super()._valid_auto_compile_criteria(model_kwargs, generation_config)  # type: ignore[misc]

    @property
    def init_continuous_batching(self):
        """Not there: servers ask for it, and without it run requests one after the other."""
        raise AttributeError

    def generate_batch(self, *args, **kwargs):
        """Refused: the paged cache of transformers' continuous batching is one model's."""
        raise NotImplementedError(
            "transformers' continuous batching pages one model's cache, and an ensemble has several. Pass a batch to "
            "`generate`, or let requests join and leave by `PCMEnsembleCache.join`, as "
            "`modeling_pcm_ensemble.scheduler.Scheduler` of the package does."
        )

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable:
        """
        Return the ensemble's call, with the steps of the PCM and of each backbone compiled; what joins them is not.

        Raises:
            ImportError: if torch is too old to compile them.
        """
        check_compiles()
        return partial(self, compile_config=compile_config or CompileConfig())


def filled_in(told: dict, config: GenerationConfig | None) -> dict:
    """`told`, by argument, where it says nothing with what `config` says; words and tokens are one thing."""
    held = {name: getattr(config, name, None) for name in PREFERENCE}
    if isinstance(held["preference_ids"], list):  # as in a file
        held["preference_ids"] = _as_tensor(held["preference_ids"])
    if told["preference_text"] is not None or told["preference_ids"] is not None:
        held = {"preference": held["preference"]}
    return {name: held.get(name) if value is None else value for name, value in told.items()}


def _as_tensor(ids: list) -> torch.Tensor | None:
    """Token ids `(tokens,)`, or `(rows, longest)` of lists of them, padded on the left."""
    is_nested = any(isinstance(row, list) for row in ids)
    rows = ids if is_nested else [ids]
    if not all(isinstance(row, list) and all(isinstance(token, int) for token in row) for row in rows):
        raise TypeError("`preference_ids` in a `generation_config` must be a list of token ids, or of such lists.")
    if (largest := max((token for row in rows for token in row), default=0)) >= 2**31:
        raise ValueError(f"`preference_ids` holds {largest}, which no vocabulary has.")
    tensors = [torch.tensor([max(token, -1) for token in row], dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=-1, padding_side="left") if is_nested else tensors[0]


__all__ = ["PCMEnsembleGeneration"]
