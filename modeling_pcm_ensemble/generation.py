"""What generate() asks of an ensemble: a preference, a cache of caches, compiled steps."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from transformers import CompileConfig, GenerationMixin, UnbatchedClassifierFreeGuidanceLogitsProcessor

from .cache import PCMEnsembleCache
from .checks import check_cache, check_length, check_no_sliding_windows
from .compiling import compiled_steps, forget_if_changed


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
        [`~preferences.build_route`]; `tokenizer` reads the text and defaults to the ensemble's own. A
        `generation_config` may hold the first two, which is how they pass through servers.
        """
        config = copy.deepcopy(kwargs.pop("generation_config", args[0] if args else None))
        held = {} if config is None else vars(config)  # what stays in it would be taken from the arguments
        of_config = held.pop("preference", None), held.pop("preference_text", None)
        if preference is None and preference_text is None:
            preference, preference_text = of_config
        if preference is not None or preference_text is not None or preference_ids is not None:
            input_ids = inputs if inputs is not None else kwargs.get("input_ids")
            batch_size = 1 if input_ids is None else len(input_ids)
            route = self._route(batch_size, None, preference, preference_text, preference_ids, kwargs.get("tokenizer"))
            # As tensors, so that beams and return sequences repeat them row by row
            kwargs["preference"] = route.weights
            if preference_text is not None or preference_ids is not None:
                kwargs["preference_ids"] = route.prefix_ids
        return super().generate(inputs, config, *args[1:], **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """Put an ensemble's cache where `generate` would put one model's, with the route on it."""
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        elif generation_config.use_cache:
            cache = PCMEnsembleCache(
                self.config,
                generation_config.cache_implementation,
                max(max_cache_length, generation_config.max_cache_len or 0),
                generation_config.cache_config,
            )
        names = ("preference", "preference_ids")
        preference, preference_ids = (model_kwargs.get(name) for name in names)
        rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
        if cache is not None:
            check_cache(cache)
        route = self._route(rows, cache, preference, preference_ids=preference_ids)
        check_length(self.config, route, max_cache_length, cache)
        if generation_config.prefill_chunk_size is not None and model_kwargs.get("attention_mask") is not None:
            check_no_sliding_windows(self.config, route)
        if cache is not None:
            cache.route = route
            for name in names:  # the cache knows; forward need not compare it at each token
                model_kwargs.pop(name, None)
            model_kwargs["past_key_values"] = cache
            if generation_config.is_assistant:
                cache.activate_past_recording()

    def _get_logits_processor(self, *args, model_kwargs: dict | None = None, **kwargs):
        """Classifier-free guidance calls the model once more, which must be under the same preference."""
        processors = super()._get_logits_processor(*args, model_kwargs=model_kwargs, **kwargs)
        preference = {name: (model_kwargs or {}).get(name) for name in ("preference", "preference_ids")}
        if (cache := (model_kwargs or {}).get("past_key_values")) is not None:
            preference = {"preference": cache.route.weights, "preference_ids": cache.route.prefix_ids}
        for processor in processors:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                if self.config.expert_top_k is not None:
                    raise ValueError(
                        "`guidance_scale` cannot be used with `expert_top_k`: it compares what both branches say of a "
                        "token, which either may have cut off. Set `model.config.expert_top_k = None`."
                    )
                processor.model = partial(self, **preference)
        return processors

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


__all__ = ["PCMEnsembleGenerationMixin"]
