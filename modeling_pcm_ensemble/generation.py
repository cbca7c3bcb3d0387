"""What generate() asks of an ensemble: a preference, a cache of caches, compiled steps."""

import copy
from collections.abc import Callable
from functools import partial, wraps

import torch
from transformers import (
    CompileConfig,
    ExponentialDecayLengthPenalty,
    GenerationConfig,
    GenerationMixin,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
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
from .compile_steps import compiled_steps, forget_if_changed
from .prefixes import pad_left

logger = logging.get_logger(__name__)

# Processors that compute with the logits of tokens which are not among the best
NOT_WITH_TOP_K = {
    UnbatchedClassifierFreeGuidanceLogitsProcessor: "guidance_scale",
    ExponentialDecayLengthPenalty: "exponential_decay_length_penalty",
}
PREFERENCE = ("preference", "preference_text", "preference_ids")


class PCMEnsembleGenerationMixin(GenerationMixin):
    """`generate` under a preference; all modes are the library's own."""

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args,
        preference=None,
        preference_text=None,
        preference_ids=None,
        **kwargs,
    ):
        """
        Generate as any model, under a preference. `preference`, `preference_text` and `preference_ids` are those of
        [`~preferences.build_route`]; `tokenizer` reads the text and defaults to the ensemble's own.

        Each of the three may also stand in a `generation_config`, `preference_ids` as a list there. The call's own
        argument comes first, then the call's `generation_config`, then the model's. Where `past_key_values` knows the
        preference and the call says nothing of it, the cache's holds.

        An answer ends at the longest context that a submodel can read, whatever greater length was asked for.

        Raises:
            TypeError, ValueError: as `forward`, before any model runs.
        """
        config = kwargs.pop("generation_config", args[0] if args else None)
        batch_size = self._check_call(inputs, kwargs)
        told = {"preference": preference, "preference_text": preference_text, "preference_ids": preference_ids}
        told = _filled_in(told, config)
        cache = kwargs.get("past_key_values")
        if cache is None or cache.route is None or any(value is not None for value in told.values()):
            told = _filled_in(told, self.generation_config)

        if any(value is not None for value in told.values()):
            route = self._route(batch_size, None, **told, tokenizer=kwargs.get("tokenizer"))
            # As tensors, so that beams and return sequences repeat them row by row
            kwargs["preference"] = route.weights
            if told["preference_text"] is not None or told["preference_ids"] is not None:
                kwargs["preference_ids"] = route.prefix_ids
        return super().generate(inputs, config, *args[1:], **kwargs)

    def _keep_own_generation_settings(self):
        """Keep a preference in it when it is loaded: transformers drops what it takes for the model's own settings."""
        self.generation_config._from_model_config = False

    def adjust_generation_fn(self, *args, **kwargs):
        super().adjust_generation_fn(*args, **kwargs)
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
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        for name in PREFERENCE:
            vars(generation_config).pop(name, None)
        generation_config._length_was_given = any(given)
        return generation_config, model_kwargs | told

    def _prepare_generated_length(
        self, generation_config: GenerationConfig, has_default_max_length: bool, *, input_ids_length: int, **kwargs
    ) -> GenerationConfig:
        """Note the length of the input, and leave it to the preference what its experts have room for."""
        default = generation_config.max_length
        generation_config = super()._prepare_generated_length(
            generation_config, has_default_max_length, input_ids_length=input_ids_length, **kwargs
        )
        if has_default_max_length and generation_config.max_new_tokens is None:
            generation_config.max_length = default + input_ids_length
        generation_config._input_length = input_ids_length
        return generation_config

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """Put an ensemble's cache where `generate` would put one model's, with the route on it."""
        cache = model_kwargs.get("past_key_values")
        preference, preference_ids = (model_kwargs.get(name) for name in ("preference", "preference_ids"))
        rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
        route = self._route(rows, cache, preference, preference_ids=preference_ids)
        max_cache_length = self._cut_length(generation_config, model_kwargs, route, rows)
        if generation_config.prefill_chunk_size is not None and model_kwargs.get("attention_mask") is not None:
            check_no_sliding_windows(self.config, route)

        if cache is not None:
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        elif generation_config.use_cache:
            cache = PCMEnsembleCache(
                self.config,
                generation_config.cache_implementation,
                int(max(max_cache_length, generation_config.max_cache_len or 0)),
                generation_config.cache_config,
            )
        if cache is not None:
            cache.route = route
            for name in PREFERENCE:  # the cache knows; forward need not compare it at each token
                model_kwargs.pop(name, None)
            model_kwargs["past_key_values"] = cache
            if generation_config.is_assistant:
                cache.activate_past_recording()

    def _cut_length(self, generation_config, model_kwargs: dict, route, rows: int) -> int:
        """
        Let generation end at the longest context that can be read, and refuse input that exceeds it. Gives the number
        of context tokens that will be read at most.
        """
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        new = generation_config._input_length
        # transformers notes the mask's length on its configuration where it has left the mask away
        length = getattr(generation_config, "_mask_length", new) if mask is None else mask.shape[1]
        # From here on each token's place follows from the mask
        check_positions(model_kwargs.pop("position_ids", None), mask, rows, length)
        check_length(self.config, route, length, cache)

        # `max_length` counts the last token, which nothing reads, and not what is cached and not passed again
        cached = length - new
        room = longest_context(self.config, route, cache)
        if room is not None:
            most = room - cached + 1
            if generation_config.prompt_lookup_num_tokens:  # which may be read beyond the end
                most = max(most - generation_config.prompt_lookup_num_tokens + 1, new + 1)
            if most < generation_config.max_length and generation_config._length_was_given:
                logger.warning_once(
                    f"The answer has at most {most - new} tokens instead of {generation_config.max_length - new}: the "
                    f"longest context that the PCM and the experts of this preference can read has {room}."
                )
            generation_config.max_length = min(most, generation_config.max_length)
        return generation_config.max_length - 1 + cached

    def _get_logits_processor(self, *args, model_kwargs: dict | None = None, **kwargs):
        """
        Classifier-free guidance calls the model once more, which must be under the same preference.

        Raises:
            ValueError: if a processor needs what `expert_top_k` cuts off.
        """
        processors = super()._get_logits_processor(*args, model_kwargs=model_kwargs, **kwargs)
        preference = {name: (model_kwargs or {}).get(name) for name in ("preference", "preference_ids")}
        if (cache := (model_kwargs or {}).get("past_key_values")) is not None:
            preference = {"preference": cache.route.weights, "preference_ids": cache.route.prefix_ids}
        for processor in processors:
            refused = next((name for kind, name in NOT_WITH_TOP_K.items() if isinstance(processor, kind)), None)
            if refused is not None and self.config.expert_top_k is not None:
                raise ValueError(
                    f"`{refused}` cannot be used with `expert_top_k`: it reads how improbable a token is, which the "
                    "experts may have cut off. Set `model.config.expert_top_k = None`."
                )
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                processor.model = partial(self, **preference)
        return processors

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # `generate` reads from it which arguments there are
    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict:
        """Ask for logits with the experts' own zero, on which penalties and other logits processors depend."""
        return super().prepare_inputs_for_generation(*args, **kwargs) | {"normalize_logits": False}

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None, **kwargs) -> torch.Tensor | None:
        """Leave the mask as the user gave it: each part has its own, with its prefix."""
        return attention_mask

    def _valid_auto_compile_criteria(self, model_kwargs: dict, generation_config) -> bool:
        """A `compile_config` (a copy: the user keeps theirs) asks to compile on a CPU too; a static cache does not."""
        if generation_config.compile_config is not None:
            config = generation_config.compile_config = copy.copy(generation_config.compile_config)
            config._compile_all_devices = True
        return super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    @property
    def init_continuous_batching(self):
        """Not there: servers ask for it, and without it run requests one after the other."""
        raise AttributeError

    def generate_batch(self, *args, **kwargs):
        """Refused: the paged cache of transformers' continuous batching is one model's."""
        raise NotImplementedError(
            "transformers' continuous batching pages one model's cache, and an ensemble has several. Pass a batch to "
            "`generate`, or let requests join and leave by `PCMEnsembleCache.join` (the scheduler in "
            "examples/continuous_batching.py)."
        )

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable:
        """The ensemble's call, with the steps of the PCM and of each backbone compiled; what joins them is not."""
        for model in (self.pcm.body, *self.backbones):
            forget_if_changed(model)

        def call(*args, **kwargs):
            with compiled_steps(compile_config):
                return self(*args, **kwargs)

        return call


def _filled_in(told: dict, config: GenerationConfig | None) -> dict:
    """`told`, by argument, where it says nothing with what `config` says; words and tokens are one thing."""
    held = {name: getattr(config, name, None) for name in PREFERENCE}
    if isinstance(held["preference_ids"], list):  # as in a file
        held["preference_ids"] = _as_tensor(held["preference_ids"])
    if told["preference_text"] is not None or told["preference_ids"] is not None:
        held = {"preference": held["preference"]}
    return {name: held.get(name) if value is None else value for name, value in told.items()}


def _as_tensor(ids: list) -> torch.LongTensor | None:
    """Token ids `(tokens,)`, or `(rows, longest)` of lists of them, padded on the left."""
    is_nested = any(isinstance(row, list) for row in ids)
    rows = ids if is_nested else [ids]
    if not all(isinstance(row, list) and all(isinstance(token, int) for token in row) for row in rows):
        raise TypeError("`preference_ids` in a `generation_config` must be a list of token ids, or of such lists.")
    if (largest := max((token for row in rows for token in row), default=0)) >= 2**31:
        raise ValueError(f"`preference_ids` holds {largest}, which no vocabulary has.")
    tensor = pad_left([[max(token, -1) for token in row] for row in rows])
    return tensor if is_nested or tensor is None else tensor[0]


__all__ = ["PCMEnsembleGenerationMixin"]
