"""The ensemble as a transformers model: how it is built, and its forward."""

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import CompileConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .backbones import ExpertBackbones
from .cache import PCMEnsembleCache
from .call_arguments import check_kind
from .call_checks import (
    cached_length,
    check_inputs,
    check_labels,
    check_length,
    check_logits_to_keep,
    check_mask,
    check_positions,
    longest_context,
)
from .checkpoint_build import all_end_tokens, build_expert, build_parts, set_end_tokens
from .checkpoint_io import PCMEnsemblePreTrainedModel
from .configuration_pcm_ensemble import PCMEnsembleConfig
from .generation import PCMEnsembleGenerationMixin
from .lora_peft_format import write_adapter
from .merging import ExpertLogits, log_expert_weights, mixture_log_probs, precise, token_log_probs
from .pcm import PreferenceControlModel
from .preference import Preference, check_config
from .routing import Route
from .submodel import Submodel


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
            α. `[:, t]` weights the experts' predictions of token t + 1; 0 for inactive experts.
        expert_logits (`list[ExpertLogits]`, *optional*): what was merged, with `output_expert_logits=True`.
    """

    expert_weights: torch.FloatTensor | None = None
    expert_logits: list[ExpertLogits] | None = None


class PCMEnsembleForCausalLM(PCMEnsembleGenerationMixin, PCMEnsemblePreTrainedModel):
    r"""
    N frozen expert language models and a small Preference Control Model that mixes their next-token distributions.

    Args:
        config (`PCMEnsembleConfig`): the ensemble's.
        backbones (`list[PreTrainedModel]`, *optional*): loaded causal LMs; made from `config` if not given.
        pcm (`PreTrainedModel`, *optional*): the loaded body of the PCM; made from `config` if not given.

    Source: "Orchestrating LLMs with Different Personalizations", arXiv 2407.04181.
    """

    def __init__(
        self,
        config: PCMEnsembleConfig,
        backbones: list[PreTrainedModel] | None = None,
        pcm: PreTrainedModel | None = None,
    ):
        if not config.experts or config.pcm is None:
            raise ValueError(
                "An ensemble needs at least one entry in `config.experts`, and `config.pcm`. Build one with "
                "`PCMEnsembleForCausalLM.from_experts`."
            )
        check_config(config)
        super().__init__(config)
        self.pcm = PreferenceControlModel(config, pcm)
        self.backbones = ExpertBackbones(config, backbones)
        parts = (self.pcm.body, *self.backbones)
        self._is_stateful = any(part._is_stateful for part in parts)
        self._keep_own_generation_settings()
        self.post_init()

    # Building

    @classmethod
    def from_experts(
        cls,
        experts: Mapping,
        pcm: str | os.PathLike | PreTrainedModel | PreTrainedConfig,
        *,
        pcm_layers: int | None = None,
        tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
        default_preference: str | list | Mapping | None = None,
        merge: str = "probabilities",
        expert_top_k: int | None = None,
        **model_kwargs,
    ) -> "PCMEnsembleForCausalLM":
        r"""
        Build an ensemble from its parts.

        Args:
            experts (`Mapping`):
                Each expert's name → a Hub repository, a folder, a loaded `PreTrainedModel` (used as it is, and
                frozen), or a mapping with `model` (one of these), `adapter` (a LoRA that PEFT saved: a folder, a
                repository, a mapping with `repository`, and `revision` or `subfolder` of its own, or one shaped as
                PEFT's `LoraConfig` with `tensors`), `prompt` (what this expert reads before the context, as system
                turn where the chat template has one), `description` (what tells the PCM that this expert is wanted;
                defaults to the prompt, else the name) and `dimension` (the axis of preference it stands on). Experts
                that name the same model share it.
            pcm (`str`, `os.PathLike`, `PreTrainedModel` or `PreTrainedConfig`):
                The causal LM that the PCM's body is copied from, or a configuration for random weights.
            pcm_layers (`int`, *optional*): take the first layers only; None takes all.
            tokenizer (`str`, `os.PathLike` or `PreTrainedTokenizerBase`, *optional*):
                Defaults to that of the first part which has one, and which all others must have too. One that is given
                may have more or fewer tokens than theirs, but none of another meaning.
            default_preference (`str`, `list` or `Mapping`, *optional*):
                The preference of calls without one; None is every expert at weight 1.
            merge (`str`):
                What is mixed: `"probabilities"`, Σ α_i π_i; `"logits"`, π ∝ exp Σ α_i logits_i, the paper's ablation;
                or `"adapters"`, one model with the weights W + Σ α_i s_i B_i A_i, for experts that are LoRA adapters
                on one backbone.
            expert_top_k (`int`, *optional*): keep each expert's k most probable tokens.
            model_kwargs:
                Passed to `from_pretrained` of every model: `dtype`, `device_map`, `attn_implementation`, `token`, …

        Returns:
            [`PCMEnsembleForCausalLM`] in evaluation mode.

        Raises:
            TypeError: if an argument is of the wrong kind.
            ValueError: if there are no experts, models are not causal LMs, do not share one vocabulary, are not what
                their configurations make (as with an adapter inside), or come from a checkpoint whose configuration
                and weights disagree, an adapter is not plain LoRA on its base as it is, or an argument has a value out
                of range.
        """
        parts = build_parts(
            experts,
            pcm,
            pcm_layers,
            tokenizer,
            model_kwargs,
            merge=merge,
            expert_top_k=expert_top_k,
            default_preference=default_preference,
        )
        model = cls(parts.config, parts.backbones, parts.pcm)
        for name, tensors in parts.adapters.items():
            model.backbones.bank_of(name).load(name, tensors)
        model.generation_config = copy.deepcopy(parts.backbones[0].generation_config)
        set_end_tokens(model.generation_config, parts.config.eos_token_id)
        model._keep_own_generation_settings()
        model._tokenizer = parts.tokenizer
        return model.eval()

    def add_expert(self, name: str, expert, **model_kwargs):
        r"""
        Add an expert. The PCM keeps what it has learnt of the others; the new one starts at the user's weight.

        Args:
            name (`str`): its name.
            expert: what [`from_experts`] takes for one; a model that the ensemble already has is shared.
            model_kwargs: passed to `from_pretrained`.

        Raises:
            TypeError, ValueError: as [`from_experts`], or if the name is taken, or tensor parallelism has split the
                ensemble; it stays as it was.
        """
        if (self.tp_size or 1) > 1:
            raise ValueError(
                "Tensor parallelism has split this ensemble, and would not split what is added. Add the expert first, "
                "save, and load it with `distributed_config`."
            )
        entry, parts = build_expert(self, name, expert, model_kwargs)
        if len(parts.backbones) > len(self.backbones):
            self.config.eos_token_id = all_end_tokens(parts.backbones)
            set_end_tokens(self.generation_config, self.config.eos_token_id)
        head_rows = [*range(self.config.num_experts), None]
        self._set_experts([*self.config.experts, entry], parts.backbones, head_rows, parts.adapters)
        self._tokenizer = parts.tokenizer

    def remove_expert(self, name: str):
        """
        Remove an expert, with its adapter, its row of the PCM's head and a backbone that no other expert needs.

        Raises:
            ValueError: if there is no such expert, it is the last, or the default preference names it.
        """
        names = self.config.expert_names
        if name not in names:
            raise ValueError(f"`name` is the unknown expert {name!r}. The experts are {', '.join(names)}.")
        kept = [index for index, other in enumerate(names) if other != name]
        if not kept:
            raise ValueError(f"Expert {name!r} is the only one. An ensemble needs at least one expert.")
        defaults = {
            "config.default_preference": self.config.default_preference,
            "generation_config.preference": getattr(self.generation_config, "preference", None),
        }
        for place, preference in defaults.items():
            try:
                Preference.parse(preference or names[kept[0]], [names[index] for index in kept])
            except ValueError as error:
                raise ValueError(f"`{place}` does not go without expert {name!r}: {error} Change it first.") from error

        experts = [self.config.experts[index] for index in kept]
        used = sorted({expert["backbone"] for expert in experts})
        experts = [expert | {"backbone": used.index(expert["backbone"])} for expert in experts]
        self._set_experts(experts, [self.backbones[index] for index in used], kept, {})

    @torch.no_grad()
    def _set_experts(
        self, experts: list[dict], backbones: list[PreTrainedModel], head_rows: list[int | None], new: dict
    ):
        """Rebuild what depends on the experts. `head_rows` are rows of the old head, None for a zero one."""
        names = [expert["name"] for expert in experts]
        adapters = {}
        for bank in self.backbones.adapters.values():
            for name in set(bank.names) & set(names):
                adapters[name] = {key: tensor.clone() for key, tensor in bank.tensors(name).items()}
            bank.detach()
        for submodel in self.backbones.submodels:
            submodel.forget_compiled()  # the compiler does not notice that hooks come and go

        self.config.experts, self.config.backbones = experts, [backbone.config for backbone in backbones]
        sizes = [part.get_text_config().vocab_size for part in self.config.sub_config_items().values()]
        self.config.vocab_size = min(sizes)
        self.backbones = ExpertBackbones(self.config, backbones)

        for name, tensors in (adapters | new).items():
            self.backbones.bank_of(name).load(name, tensors)
        self.pcm.set_head_rows(head_rows)
        self.post_init()

    def export_adapter(self, name: str, folder: str | os.PathLike):
        """
        Write an expert's LoRA adapter as PEFT does: `PeftModel.from_pretrained(backbone, folder)` loads it.

        Raises:
            ValueError: if there is no such expert, or it has no adapter.
        """
        Preference.parse(name, self.config.expert_names)
        expert = self.config.experts[self.config.expert_names.index(name)]
        if expert["adapter"] is None:
            raise ValueError(f"Expert {name!r} has no adapter to export.")
        base_model = self.config.backbones[expert["backbone"]].name_or_path
        write_adapter(folder, expert["adapter"], self.backbones.bank_of(name).tensors(name), base_model)

    def forget_weights(self):
        """
        Forget what was computed from the weights: compiled steps, and prompts and descriptions that are kept. Only
        needed after weights were written through `.data`, which leaves no trace; other changes are noticed.
        """
        for submodel in self.submodels:
            submodel.forget_weights()

    @property
    def submodels(self) -> list[Submodel]:
        """The PCM's body and every backbone."""
        return [self.pcm.submodel, *self.backbones.submodels]

    # Forward

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: PCMEnsembleCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.LongTensor = 0,
        preference: str | Mapping | Preference | list | torch.Tensor | None = None,
        preference_text: str | list[str | None] | None = None,
        preference_ids: torch.LongTensor | None = None,
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
        Mix the experts' next-token distributions: log π = log Σ_i α_i π_i.

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
            output_expert_logits (`bool`): whether to give each active expert's logits too.
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
        """
        check_inputs(self.config, input_ids, inputs_embeds, past_key_values, kwargs)
        for name, flag in (
            ("use_cache", use_cache),
            ("output_hidden_states", output_hidden_states),
            ("output_attentions", output_attentions),
            ("output_expert_logits", output_expert_logits),
        ):
            check_kind(name, flag, bool, optional=True)
        check_kind("normalize_logits", normalize_logits, bool)

        length = cached_length(past_key_values) + input_ids.shape[1]
        attention_mask = check_mask(input_ids, attention_mask, past_key_values)
        check_positions(kwargs.get("position_ids"), attention_mask, len(input_ids), length)
        logits_to_keep = check_logits_to_keep(logits_to_keep, input_ids.shape[1])
        labels = check_labels(self.config, labels, input_ids, logits_to_keep, kwargs.get("ignore_index", -100))

        route = self._route(len(input_ids), past_key_values, preference, preference_text, preference_ids, tokenizer)
        cache = past_key_values
        if cache is None or cache.room is None or length > cache.room:
            check_length(self.config, route, length, cache)
        if cache is not None and attention_mask is not None:
            cache.check_no_gaps(attention_mask, input_ids.shape[1])

        if _or_default(use_cache, self.config.use_cache and not self.training) and cache is None:
            cache = PCMEnsembleCache(self.config)
        begins = cache is not None and cache.route is None
        if cache is not None and cache.room is None:
            cache.room = longest_context(self.config, route, cache)
        if begins:
            cache.start(route)

        try:
            log_weights, pcm_output = self._log_expert_weights(
                route,
                input_ids,
                attention_mask,
                cache,
                0 if route.mixes_adapters else logits_to_keep,
                compile_config,
                output_hidden_states=_or_default(output_hidden_states, self.config.output_hidden_states),
                output_attentions=_or_default(output_attentions, self.config.output_attentions),
            )
            expert_weights = log_weights.exp() if route.mixes_adapters else None
            expert_logits = self._expert_logits(
                route, input_ids, attention_mask, cache, logits_to_keep, expert_weights, compile_config
            )
        except BaseException:
            if begins:
                cache.reset()  # or it would go on with what was read of a call that failed
            raise

        if route.mixes_adapters:
            (mixed,) = expert_logits
            logits = precise(mixed.logits)
            logits = logits.log_softmax(dim=-1) if normalize_logits else logits
            log_weights, expert_logits = log_weights[:, _kept(logits_to_keep)], None
        else:
            logits = mixture_log_probs(
                expert_logits,
                log_weights,
                self.config.merge,
                self.config.expert_top_k,
                exact=_or_default(exact, torch.is_grad_enabled() or labels is not None),
                normalize=normalize_logits,
            )

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return PCMEnsembleOutput(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            hidden_states=pcm_output.hidden_states,
            attentions=pcm_output.get("attentions"),  # a recurrent body has none
            expert_weights=log_weights.exp(),
            expert_logits=expert_logits if output_expert_logits else None,
        )

    def _route(
        self,
        batch_size: int,
        cache: PCMEnsembleCache | None,
        preference=None,
        preference_text=None,
        preference_ids=None,
        tokenizer=None,
    ) -> Route:
        """The route of a call: the cache's, which a preference given again must not change, or a new one."""
        if self.config.merge == "adapters" and self.training:
            raise ValueError(
                '`merge="adapters"` is for inference: the PCM would get no gradient. Call `eval()`, or train with '
                '`merge="probabilities"`.'
            )
        started = cache is not None and cache.route is not None
        if started and preference is None and preference_text is None and preference_ids is None:
            if cache.batch_size != batch_size:
                raise ValueError(f"`past_key_values` has {cache.batch_size} rows, but `input_ids` has {batch_size}.")
            return cache.route

        preferences = self._preferences(batch_size, preference, preference_text, preference_ids, tokenizer)
        if not started:
            return Route(self.config, preferences, self.pcm.head.weight.device)
        if not cache.route.is_of(preferences):
            raise ValueError(
                "`past_key_values` was filled under another preference than the one given. Leave the preference out "
                "to go on with the first one, or start without `past_key_values`."
            )
        return cache.route

    def _preferences(
        self, batch_size: int, preference=None, preference_text=None, preference_ids=None, tokenizer=None
    ) -> list[Preference]:
        """What each row asks for, read from any form."""
        self.config.validate_merge()  # which anybody may set between calls
        if preference_text is not None and tokenizer is None:
            tokenizer = self.tokenizer
        return Preference.parse_batch(self.config, batch_size, preference, preference_text, preference_ids, tokenizer)

    def _log_expert_weights(
        self, route, input_ids, attention_mask, cache=None, logits_to_keep=0, compile_config=None, **options
    ):
        """log α, `(batch, positions, experts)`, and the PCM body's output."""
        memory = None if cache is None else cache.pcm
        begins = memory is None or memory.length == 0
        descriptions = route.descriptions if begins else None
        expert_weight_logits, output = self.pcm(
            input_ids, attention_mask, descriptions, memory, logits_to_keep, compile_config, **options
        )
        return log_expert_weights(expert_weight_logits, route.log_weights), output

    def _expert_logits(
        self, route, input_ids, attention_mask, cache, logits_to_keep, expert_weights, compile_config
    ) -> list[ExpertLogits]:
        """
        Logits of every active expert: each backbone that the route needs runs once, on all its pairs. With
        `expert_weights`, α, logits of the one model whose weights are W + Σ_i α_i s_i B_i A_i, α changing from token
        to token.
        """
        expert_logits = []
        for backbone, expert_rows in route.expert_rows.items():
            rows = route.pair_rows[backbone]
            mask = None if attention_mask is None else attention_mask[rows]
            memory = None if cache is None else cache.backbones[backbone]
            expert_logits += self.backbones(
                backbone, expert_rows, input_ids[rows], mask, memory, logits_to_keep, expert_weights, compile_config
            )
        return expert_logits

    # Insight

    def compute_expert_weights(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        preference: str | Mapping | Preference | list | torch.Tensor | None = None,
        preference_text: str | list[str | None] | None = None,
        preference_ids: torch.LongTensor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> torch.FloatTensor:
        r"""
        Compute α for a whole text in one pass of the PCM, without running an expert. Arguments as for `forward`.

        Returns:
            `torch.FloatTensor` of shape `(batch, seq, experts)`: `[:, t]` weights the predictions of token t + 1.
        """
        check_inputs(self.config, input_ids, None, None, {})
        mask = check_mask(input_ids, attention_mask, None)
        route = self._route(len(input_ids), None, preference, preference_text, preference_ids, tokenizer)
        check_length(self.config, route, input_ids.shape[1])
        return self._log_expert_weights(route, input_ids, mask)[0].exp()

    @torch.no_grad()
    def attribute(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        preference: str | Mapping | Preference | list | torch.Tensor | None = None,
        preference_text: str | list[str | None] | None = None,
        preference_ids: torch.LongTensor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> torch.FloatTensor:
        r"""
        Compute how much each expert contributed to the tokens of a text. Arguments as for `forward`.

        Returns:
            `torch.FloatTensor` of shape `(batch, seq - 1, experts)`: `[:, t]` is α_i π_i / Σ_j α_j π_j of the token
            that stands at t + 1; 0 where that token, or the one before it, is padding. Under `merge="logits"` too
            these are the shares in a mixture of probabilities.
        """
        if self.config.merge == "adapters":
            raise ValueError('`attribute` needs experts that run apart; `merge="adapters"` runs one model.')
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
        expert_logits = [entry._replace(logits=entry.logits[:, :-1]) for entry in output.expert_logits]
        tokens = input_ids[:, 1:].long()
        log_probs = token_log_probs(expert_logits, tokens, self.config.num_experts, self.config.expert_top_k)

        shares = (output.expert_weights[:, :-1].log() + log_probs).softmax(dim=-1)  # (batch, seq - 1, experts)
        shares = shares.nan_to_num()
        mask = check_mask(input_ids, attention_mask, None)
        return shares if mask is None else shares * (mask[:, 1:] * mask[:, :-1])[..., None]


def _or_default(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def _kept(logits_to_keep: int | torch.LongTensor) -> slice | torch.LongTensor:
    return slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep


PCMEnsembleConfig.register_for_auto_class()
PCMEnsembleForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["PCMEnsembleForCausalLM", "PCMEnsembleOutput"]
