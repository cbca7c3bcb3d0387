"""The ensemble as a transformers model: its forward, and who wrote which token."""

if not __package__:  # Python looks into the folder that it runs in first, and a checkpoint brings this file
    raise ImportError(
        f"{__file__} is a checkpoint's code, and hides the package of the same name. Run Python in another folder, or "
        "as `python -P`. Without the package, load the folder by `AutoModelForCausalLM` with `trust_remote_code=True`."
    )

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from threading import get_ident

import torch
from transformers import CompileConfig, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .cache import PCMEnsembleCache
from .call_arguments import check_kind
from .call_checks import (
    cached_length,
    check_flags,
    check_inputs,
    check_labels,
    check_length,
    check_logits_to_keep,
    check_mask,
    check_positions,
    longest_context,
)
from .configuration_pcm_ensemble import ADAPTERS, PCMEnsembleConfig
from .failures import results, without_failed
from .generation import PCMEnsembleGeneration
from .merging import ExpertLogits, mixture_log_probs, precise, token_log_probs
from .preference import Preference
from .routing import Route
from .tilts import product_log_probs, token_tilts
from .weighting import joined_weights


@dataclass
class PCMEnsembleOutput(CausalLMOutputWithPast):
    r"""
    Output of [`PCMEnsembleForCausalLM`].

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*): next-token cross-entropy, when `labels` are given.
        logits (`torch.FloatTensor` of shape `(batch, seq, vocab)`):
            log π, the mixture's log-probabilities in nats; plus an offset with `normalize_logits=False`.
        past_key_values (`PCMEnsembleCache`, *optional*): to pass back with the next tokens.
        hidden_states, attentions (`tuple`, *optional*): the PCM's, over its prefix and the context.
        expert_weights (`torch.FloatTensor` of shape `(batch, seq, experts)`):
            α, or strengths where tilts add up. `[:, t]` is of the experts' predictions of token t + 1; 0 for inactive
            experts.
        expert_logits (`list[ExpertLogits]`, *optional*): what was merged, with `output_expert_logits=True`.
        dropped_experts (`torch.BoolTensor` of shape `(batch, experts)`, *optional*): where an expert's endpoint has
            failed and `on_failure="drop"` let the row go on without; None where none has.
    """

    expert_weights: torch.Tensor | None = None
    expert_logits: list[ExpertLogits] | None = None
    dropped_experts: torch.Tensor | None = None


class PCMEnsembleForCausalLM(PCMEnsembleGeneration):
    r"""
    N frozen expert language models and a small Preference Control Model that says at each token how much of each goes
    into the next-token distribution.

    Args:
        config (`PCMEnsembleConfig`): the ensemble's.
        backbones (`list[PreTrainedModel]`, *optional*): loaded causal LMs; made from `config` if not given.
        pcm (`PreTrainedModel`, *optional*): the loaded body of the PCM; made from `config` if not given.

    Source: "Orchestrating LLMs with Different Personalizations", arXiv 2407.04181.
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: PCMEnsembleCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        preference: str | Mapping | Preference | list | torch.Tensor | None = None,
        preference_text: str | list[str | None] | None = None,
        preference_ids: torch.Tensor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_expert_logits: bool = False,
        normalize_logits: bool = True,
        exact: bool | None = None,
        compile_config: CompileConfig | None = None,
        **kwargs,
    ) -> PCMEnsembleOutput:
        r"""
        Merge the experts' next-token distributions as `config.merge` says; by default log π = log Σ_i α_i π_i.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, seq)`): context tokens that are not in the cache.
            attention_mask (`torch.Tensor` of shape `(batch, cached + seq)`, *optional*):
                1 for tokens to read; any number but 0 is read as 1, as in other models.
            past_key_values (`PCMEnsembleCache`, *optional*): from an earlier call; it knows the preference.
            inputs_embeds: refused, because experts do not share embeddings.
            labels (`torch.LongTensor` of shape `(batch, seq)`, *optional*): -100 is ignored; the loss shifts them.
            use_cache (`bool`, *optional*): defaults to `config.use_cache` when not training.
            logits_to_keep (`int` or `torch.LongTensor` of shape `(positions,)`): 0 gives logits for all tokens.
                `labels` are of those that are kept.
            preference, preference_text, preference_ids (*optional*): what each row asks for, see
                [`~preference.Preference.parse_batch`].
            tokenizer (`PreTrainedTokenizerBase`, *optional*): reads `preference_text`; defaults to the ensemble's own.
            output_hidden_states, output_attentions (`bool`, *optional*): of the PCM.
            output_expert_logits (`bool`): whether to give each active expert's logits too; under `merge="adapters"`
                there are none.
            normalize_logits (`bool`): False adds the experts' log-normalizers, Σ_i α_i log Z_i, to log π, so that one
                active expert gives its own logits. `generate` asks for that, since some logits processors, such as
                repetition penalties, depend on where the zero is.
            exact (`bool`, *optional*): how probabilities are summed, see [`~merging.mixture_log_probs`]. None sums in
                log space where gradients or a loss are wanted; `generate` asks for False.
            compile_config (`CompileConfig`, *optional*): compiles the submodels' steps, where this call is one token
                into a static cache. `generate` passes its own.
            kwargs: what every model of transformers knows. `position_ids` must say what `attention_mask` says.

        Raises:
            TypeError, ValueError: on input that is not as above, before any model runs.

        Example:

        ```python
        >>> output = model(prompt_ids, preference="concise")
        >>> next_probs = output.logits[:, -1].exp()  # (batch, vocab)
        >>> round(next_probs.sum().item(), 3)
        1.0
        >>> step = model(prompt_ids[:, -1:], past_key_values=output.past_key_values)  # under the same preference

        ```
        """
        input_ids = check_inputs(self.config, input_ids, inputs_embeds, past_key_values, kwargs)
        check_flags(
            normalize_logits=normalize_logits,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_expert_logits=output_expert_logits,
            exact=exact,
        )
        check_kind("compile_config", compile_config, CompileConfig, optional=True)
        if output_expert_logits and self.config.merge == ADAPTERS:
            raise ValueError(
                '`output_expert_logits` needs experts that run apart; `merge="adapters"` runs one model. Use '
                '`merge="product"`.'
            )
        length = cached_length(past_key_values) + input_ids.shape[1]
        attention_mask = check_mask(input_ids, attention_mask, past_key_values)
        check_positions(kwargs.get("position_ids"), attention_mask, len(input_ids), length)
        logits_to_keep = check_logits_to_keep(logits_to_keep, input_ids.shape[1])
        labels = check_labels(self.config, labels, input_ids, logits_to_keep, kwargs.get("ignore_index", -100))

        cache = past_key_values
        preferences = None
        if preference is not None or preference_text is not None or preference_ids is not None:
            preferences = self._preferences(len(input_ids), preference, preference_text, preference_ids, tokenizer)
        route = self._route(len(input_ids), cache, preferences)
        if cache is None or cache.room is None or length > cache.room:
            check_length(self.config, route, length, cache)
        if cache is not None and attention_mask is not None:
            cache.check_no_gaps(attention_mask, input_ids.shape[1])
        if cache is None and _or_default(use_cache, self.config.use_cache and not self.training):
            cache = PCMEnsembleCache(self.config)
        if cache is not None and cache.room is None:
            cache.room = longest_context(self.config, route, cache)

        loss = dropped = None
        with nullcontext() if cache is None else cache.started(route):
            weights, pcm_output, expert_logits = self._predicted(
                route,
                input_ids,
                attention_mask,
                cache,
                logits_to_keep,
                compile_config,
                output_hidden_states=_or_default(output_hidden_states, self.config.output_hidden_states),
                output_attentions=_or_default(output_attentions, self.config.output_attentions),
            )
            if self.backbones.endpoints:
                expert_logits, weights, dropped = without_failed(
                    expert_logits, weights, self.served_experts, self.config.adds_up, self.config.reference_index
                )

            exact = _or_default(exact, torch.is_grad_enabled() or labels is not None)
            logits = self._merged(route, expert_logits, weights, exact, normalize_logits)
            if route.mixes_adapters:
                weights = weights[:, _kept(logits_to_keep)]
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)

        return PCMEnsembleOutput(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            hidden_states=pcm_output.hidden_states,
            attentions=pcm_output.get("attentions"),  # a recurrent body has none
            expert_weights=weights if self.config.adds_up else weights.exp(),
            expert_logits=expert_logits if output_expert_logits else None,
            dropped_experts=dropped,
        )

    def _predicted(
        self, route, input_ids, attention_mask, cache, logits_to_keep, compile_config, **options
    ) -> tuple[torch.Tensor, BaseModelOutput, list[ExpertLogits]]:
        """Run the PCM and all backbones that the route needs; what [`_weighted`] gives, and every expert's logits."""
        run = partial(self._run, route, input_ids, attention_mask, cache, logits_to_keep)

        with self._asked(route, run) as asked:  # endpoints, which answer while what is here runs
            kept = 0 if route.mixes_adapters else logits_to_keep  # added adapters have strengths at every token
            weights, pcm_output = self._weighted(
                route, input_ids, attention_mask, cache, kept, compile_config, **options
            )
            strengths = weights if route.mixes_adapters else None
            found = {here: run(here, strengths, compile_config) for here in route.expert_rows if here not in asked}
            found |= dict(zip(asked, results(asked.values())))

        return weights, pcm_output, list(chain.from_iterable(found[backbone] for backbone in route.expert_rows))

    def _weighted(
        self, route, input_ids, attention_mask, cache=None, logits_to_keep=0, compile_config=None, **options
    ):
        """log α, or strengths where tilts add up, `(batch, positions, experts)`; and the PCM body's output."""
        memory = None if cache is None else cache.pcm
        begins = memory is None or memory.length == 0
        descriptions = route.descriptions if begins else None
        expert_weight_logits, output = self.pcm(
            input_ids, attention_mask, descriptions, memory, logits_to_keep, compile_config, **options
        )
        return joined_weights(self.config, expert_weight_logits, route.weights), output

    @contextmanager
    def _asked(self, route: Route, run: Callable[[int], list[ExpertLogits]]) -> Iterator[dict[int, Future]]:
        """Ask all endpoints that the route needs, by backbone: they answer while the PCM and other backbones run."""
        endpoints = self.backbones.endpoints.keys() & route.expert_rows.keys()
        if not endpoints:
            yield {}
            return

        callers: list[int] = []  # threads that wait for endpoints
        with ThreadPoolExecutor(len(endpoints), initializer=lambda: callers.append(get_ident())) as threads:
            asked = {backbone: threads.submit(run, backbone) for backbone in endpoints}
            try:
                yield asked
            except BaseException:  # an interruption, or another one's failure, waits for no endpoint
                while wait(asked.values(), timeout=0.02).not_done:
                    self.backbones.cancel_requests(callers)
                raise

    def _run(
        self, route, input_ids, attention_mask, cache, logits_to_keep, backbone, strengths=None, compile_config=None
    ) -> list[ExpertLogits]:
        """
        Logits of a backbone's active experts: it runs once, on all its pairs. With `strengths`, which change from
        token to token, logits of the one model that the adapters are added to.
        """
        rows = route.pair_rows[backbone]
        mask = None if attention_mask is None else attention_mask[rows]
        memory = None if cache is None else cache.backbones[backbone]
        return self.backbones(
            backbone,
            route.expert_rows[backbone],
            input_ids[rows],
            mask,
            memory,
            logits_to_keep,
            strengths,
            compile_config,
        )

    def _merged(
        self,
        route: Route,
        expert_logits: list[ExpertLogits],
        weights: torch.Tensor,
        exact: bool,
        normalize: bool,
    ) -> torch.Tensor:
        """log π, `(batch, positions, vocab)`; of adapters that are added up already, the one model's."""
        if route.mixes_adapters:
            logits = precise(expert_logits[0].logits)
            return logits.log_softmax(dim=-1) if normalize else logits
        config = self.config
        if config.adds_up:
            return product_log_probs(
                expert_logits, weights, config.reference_index, config.expert_top_k, normalize=normalize
            )
        return mixture_log_probs(
            expert_logits, weights, config.merge, config.expert_top_k, exact=exact, normalize=normalize
        )

    # Insight

    def compute_expert_weights(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        preference: str | Mapping | Preference | list | torch.Tensor | None = None,
        preference_text: str | list[str | None] | None = None,
        preference_ids: torch.Tensor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> torch.Tensor:
        r"""
        Compute α, or strengths where tilts add up, for a whole text in one pass of the PCM, without running an expert.
        Arguments as for `forward`.

        Returns:
            `torch.FloatTensor` of shape `(batch, seq, experts)`: `[:, t]` weights the predictions of token t + 1.

        Example:

        ```python
        >>> expert_weights = model.compute_expert_weights(prompt_ids, preference={"concise": 3, "friendly": 1})
        >>> [round(weight, 2) for weight in expert_weights[0, -1].tolist()]  # an untrained PCM leaves the weights
        [0.75, 0.25]

        ```
        """
        check_inputs(self.config, input_ids, None, None, {})
        mask = check_mask(input_ids, attention_mask, None)
        preferences = self._preferences(len(input_ids), preference, preference_text, preference_ids, tokenizer)
        route = self._route(len(input_ids), None, preferences)
        check_length(self.config, route, input_ids.shape[1])
        weights, _ = self._weighted(route, input_ids, mask)
        return weights if self.config.adds_up else weights.exp()

    @torch.no_grad()
    def attribute(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        preference: str | Mapping | Preference | list | torch.Tensor | None = None,
        preference_text: str | list[str | None] | None = None,
        preference_ids: torch.Tensor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> torch.Tensor:
        r"""
        Compute how much each expert contributed to the tokens of a text. Arguments as for `forward`.

        Returns:
            `torch.FloatTensor` of shape `(batch, seq - 1, experts)`: `[:, t]` is of the token that stands at t + 1. In
            a mixture it is α_i π_i / Σ_j α_j π_j, a share (under `merge="logits"` too, as if probabilities were
            mixed). In a product it is s_i (log π_i − log π_0), the nats that an expert's tilt adds to the token, or
            takes from it. It is 0 where the token, or the one before it, is padding.

        Example:

        ```python
        >>> shares = model.attribute(prompt_ids, preference=["concise", "friendly"])
        >>> shares.shape == (1, prompt_ids.shape[1] - 1, 2)
        True

        ```
        """
        if self.config.merge == ADAPTERS:
            raise ValueError(
                '`attribute` needs experts that run apart; `merge="adapters"` runs one model. `merge="product"` adds '
                "the same wishes up with experts apart."
            )
        output = self(
            input_ids,
            attention_mask,
            use_cache=False,
            preference=preference,
            preference_text=preference_text,
            preference_ids=preference_ids,
            tokenizer=tokenizer,
            output_expert_logits=True,
            return_dict=True,
        )
        # One position, and what is merged, are computed for nothing: this is a call like any other.
        expert_logits = [entry._replace(logits=entry.logits[:, :-1]) for entry in output.expert_logits]
        expert_weights, tokens = output.expert_weights[:, :-1], input_ids[:, 1:].long()
        config = self.config
        if config.adds_up:
            _, tilts = token_tilts(
                expert_logits, tokens[..., None], config.num_experts, config.reference_index, config.expert_top_k
            )
            shares = expert_weights * tilts[:, :, 0]  # (batch, seq - 1, experts)
        else:
            log_probs = token_log_probs(expert_logits, tokens, config.num_experts, config.expert_top_k)
            shares = (expert_weights.log() + log_probs).softmax(dim=-1)  # (batch, seq - 1, experts)

        shares = shares.nan_to_num()
        mask = check_mask(input_ids, attention_mask, None)
        return shares if mask is None else shares * (mask[:, 1:] * mask[:, :-1])[..., None]


def _or_default(value: bool | None, default: bool | None) -> bool:
    return bool(default if value is None else value)


def _kept(logits_to_keep: int | torch.Tensor) -> slice | torch.Tensor:
    return slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep


PCMEnsembleConfig.register_for_auto_class()
PCMEnsembleForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["PCMEnsembleForCausalLM", "PCMEnsembleOutput"]
