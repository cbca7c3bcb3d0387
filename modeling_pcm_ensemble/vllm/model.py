"""The ensemble as a model of vLLM: one backbone on several slots of every token, the PCM, and the merge."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig
from vllm.config import CompilationMode, VllmConfig
from vllm.forward_context import get_forward_context, set_forward_context
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.v1.attention.selector import get_attn_backend

from ..checkpoint_thin import whole_state
from ..configuration_pcm_ensemble import ADAPTERS, PRODUCT
from ..merging import ExpertLogits, mixture_log_probs
from ..tilts import product_log_probs
from ..weighting import joined_weights
from .adapters import AdapterMasks, attach_adapters, read_parts
from .attention import ActiveRows, attention_layers, attention_made, check_attention, widen_attention
from .reading import Prefix, PrefixReading, reading_backend
from .requests import MOST_DESCRIPTION_TOKENS, Batch, RequestTable

BACKBONE, ADAPTER, PCM_BODY, PCM_HEAD = "backbones.0.", "backbones.adapters.0.", "pcm.body.", "pcm.head."


class PCMEnsembleForCausalLM(nn.Module):
    r"""
    An ensemble of experts that are adapters or prompts on one backbone.

    Every token is read in S slots, one for each expert that its request wants (and one for the reference of a
    product), as rows of one batch; added adapters need one. The PCM reads every token once, behind the request's
    description. What experts count in the prediction travels beside the hidden states, so that `compute_logits` needs
    nothing of the batch.

    Args:
        vllm_config (`VllmConfig`): the engine's.
        prefix (`str`): of the names of its layers.
    """

    # vLLM would load every safetensors file of the folder, such as one of `save_pcm`, and without one a pickle.
    allow_patterns_overrides: ClassVar = ["model.safetensors", "model-[0-9]*-of-[0-9]*.safetensors"]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = self.config = vllm_config.model_config.hf_config
        self.vllm_config = vllm_config
        self.dtype = vllm_config.model_config.dtype
        self.device = vllm_config.device_config.device
        self.requests = RequestTable.of(vllm_config, self.device)

        self.adds_adapters = config.merge == ADAPTERS
        self.has_reference = config.merge == PRODUCT
        self.slots = (self.requests.reader.slots or 1) + self.has_reference
        # Empty slots are left out where the number of rows may be any: a graph has one, and a GPU would be waited for.
        is_eager = vllm_config.compilation_config.mode == CompilationMode.NONE
        self.skips_empty_slots = is_eager and self.device.type == "cpu"

        self.longest = vllm_config.model_config.max_model_len + MOST_DESCRIPTION_TOKENS  # tokens that are read
        self.active = ActiveRows()
        self.prompts = PrefixReading(self.slots)
        # Adapters are added without prompts: experts that have one cannot be asked for then.
        self.has_prompts = not self.adds_adapters and any(expert["prompt_ids"] for expert in config.experts)
        self.backbone = self._make_backbone(maybe_prefix(prefix, "backbone"))
        self.descriptions = PrefixReading()
        self.pcm = self._make_pcm(maybe_prefix(prefix, "pcm"))
        self.pcm_head = nn.Linear(config.pcm.hidden_size, config.num_experts, bias=False)

        longest = max(len(expert["prompt_ids"]) for expert in config.experts)  # which is read at once
        most_rows = max(vllm_config.scheduler_config.max_num_batched_tokens, longest) * self.slots
        self.masks = AdapterMasks(most_rows, self.dtype, self.device)
        self.adapters = nn.ModuleList()
        self.hooks: list[RemovableHandle] = []

    def _make_backbone(self, prefix: str) -> Any:  # vLLM's models have methods that no class of theirs declares
        config = self.config.backbones[0]

        def widen(arguments: dict[str, Any]):
            _keep_window(arguments, config, self.longest)
            kv_heads = arguments.get("num_kv_heads") or arguments["num_heads"]
            arguments |= {"num_heads": arguments["num_heads"] * self.slots, "num_kv_heads": kv_heads * self.slots}
            if arguments.get("alibi_slopes") is not None:
                arguments["alibi_slopes"] = list(arguments["alibi_slopes"]) * self.slots
            if self.has_prompts:
                self._let_read_first(arguments)

        with attention_made(widen) as made:
            model = init_vllm_registered_model(self.vllm_config, hf_config=config, prefix=prefix)
        check_attention(model, made)
        widen_attention(model, self.slots, self.active)
        if self.has_prompts:
            _tell(model, self.prompts)
        return model

    def _make_pcm(self, prefix: str) -> Any:
        def read_first(arguments: dict[str, Any]):
            _keep_window(arguments, self.config.pcm, self.longest)
            self._let_read_first(arguments)

        with attention_made(read_first) as made:
            model = init_vllm_registered_model(self.vllm_config, hf_config=self.config.pcm, prefix=prefix)
        check_attention(model, made)
        if not hasattr(model, "model"):
            raise ValueError(
                f"vLLM's {type(model).__name__} does not call its body `model`, so that no PCM of this architecture "
                "can be loaded into it. Use an ensemble whose PCM is of Llama's kind."
            )
        _tell(model, self.descriptions)
        model.lm_head = nn.Identity()  # it predicts no tokens
        return model

    def _let_read_first(self, arguments: dict[str, Any]):
        """Let an attention layer read prefixes."""
        for name in ("per_layer_sliding_window", "logits_soft_cap", "alibi_slopes"):
            if arguments.get(name):
                raise ValueError(
                    f"vLLM serves no PCM, and no backbone of experts with prompts, whose attention has `{name}`: what "
                    "they read first is attended to by a code that does not know it."
                )
        cache_dtype = self.vllm_config.cache_config.cache_dtype
        base = get_attn_backend(arguments["head_size"], torch.get_default_dtype(), cache_dtype)
        arguments["attn_backend"] = reading_backend(base)

    @staticmethod
    def get_model_state_cls():
        """Return how vLLM's V2 runner tells the model of its requests."""
        from .model_state import EnsembleModelState

        return EnsembleModelState

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.backbone.embed_input_ids(input_ids)

    # Forward

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors=None,
        inputs_embeds: torch.Tensor | None = None,
        batch: Batch | None = None,
        **kwargs,
    ) -> torch.Tensor:
        r"""
        Read new tokens.

        Args:
            input_ids, positions (`torch.LongTensor` of shape `(tokens,)`): of all requests, one after another.
            batch (`Batch`, *optional*): what these ask for; from the table of the V1 runner if not given.

        Returns:
            `(tokens, slots · hidden + what slots count)`: hidden states of each slot, and beside them log α or
            strengths of the experts in them, as float32 seen in the model's dtype.
        """
        step = self._step(len(input_ids), batch)
        weights = self._weights(input_ids, positions, step)  # (tokens, experts): log α, or strengths
        if self.adds_adapters:
            self.masks.write(weights)
            return self.backbone(input_ids, positions)

        if self.has_prompts:
            self.prompts.begin(step.prompts, self._read_prompt)
        self.masks.write(self._select_rows(step.slots))
        rows = self.active.pick(torch.arange(step.slots.numel(), device=input_ids.device))
        ids, places = _behind_prefixes(input_ids[:, None], positions[:, None], step.firsts[:, 1:], step.offsets[:, 1:])
        hidden_states = self.active.spread(self.backbone(ids.flatten()[rows], places.flatten()[rows]))

        nothing = 0.0 if self.config.adds_up else float("-inf")
        experts = step.slots[:, : self.slots - self.has_reference]
        of_slots = weights.gather(1, experts.clamp(min=0)).masked_fill(experts < 0, nothing)
        of_slots = of_slots.float().contiguous().view(hidden_states.dtype)
        return torch.cat([hidden_states.view(len(input_ids), -1), of_slots], dim=1)

    def _step(self, num_tokens: int, batch: Batch | None) -> Batch:
        """What each token's request asks for, `(tokens, …)` in place of `(requests, …)`."""
        metadata = get_forward_context().attn_metadata
        if not metadata:  # a run that measures memory or warms up
            batch = self.requests.batch(1)
            request_of = torch.zeros(num_tokens, dtype=torch.long, device=self.device)
        else:
            starts = next(iter(metadata.values())).query_start_loc
            batch = self.requests.batch(len(starts) - 1) if batch is None else batch
            tokens = torch.arange(num_tokens, device=self.device)
            request_of = torch.searchsorted(starts[1:].contiguous(), tokens, right=True)
            request_of = request_of.clamp(max=len(batch.descriptions) - 1)  # where the batch is padded
        of_tokens = {name: getattr(batch, name)[request_of] for name in ("weights", "slots", "offsets", "firsts")}
        return batch._replace(**of_tokens)

    def _weights(self, input_ids: torch.Tensor, positions: torch.Tensor, step: Batch) -> torch.Tensor:
        self.descriptions.begin(step.descriptions, self._read_description)
        hidden_states = self.pcm(*_behind_prefixes(input_ids, positions, step.firsts[:, 0], step.offsets[:, 0]))
        opinions = self.pcm_head(hidden_states)  # (tokens, experts)
        return joined_weights(self.config, opinions[:, None], step.weights)[:, 0]

    def _read_description(self, prefix: Prefix):
        """Let the PCM's attention layers record a description."""
        ids = torch.tensor(prefix.tokens, device=self.device)
        with set_forward_context(None, self.vllm_config):
            self.pcm(ids, torch.arange(len(ids), device=self.device))

    def _read_prompt(self, prefix: Prefix):
        """Let the backbone's attention layers record an expert's prompt, which all slots read at once."""
        ids = torch.tensor(prefix.tokens, device=self.device)
        self.masks.write(self._select_rows(torch.full((len(ids), self.slots), prefix.reader, device=self.device)))
        positions = torch.arange(len(ids), device=self.device)
        with set_forward_context(None, self.vllm_config):
            self.backbone(ids.repeat_interleave(self.slots), positions.repeat_interleave(self.slots))

    def _select_rows(self, slots: torch.Tensor) -> torch.Tensor:
        """Choose the rows that run, of `(tokens, slots)`, and give the adapter of each, one-hot, `(rows, experts)`."""
        experts = slots.flatten()
        index = None
        if self.skips_empty_slots and (experts < 0).any():
            index = (experts >= 0).nonzero()[:, 0]
        self.active.set(index, len(experts))
        numbers = torch.arange(self.config.num_experts, device=slots.device)
        return (self.active.pick(experts)[:, None] == numbers).float()

    # Prediction

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return the merged logits, `(rows, vocab)`, of what [`forward`] has given for some tokens."""
        if self.adds_adapters:
            return self._cut(self.backbone.compute_logits(hidden_states))

        width = self.slots * self.config.backbones[0].get_text_config().hidden_size
        weights = hidden_states[:, width:].contiguous().view(torch.float32)  # (rows, experts' slots)
        counts = weights != 0 if self.config.adds_up else weights > float("-inf")
        if self.has_reference:
            counts = torch.cat([counts, counts.new_ones(len(counts), 1)], dim=1)

        # Slot by slot, what counts alone goes through the LM head.
        slot_of, row_of = counts.T.nonzero(as_tuple=True)
        of_slots = hidden_states[:, :width].unflatten(1, (self.slots, -1))[row_of, slot_of]
        logits = self._cut(self.backbone.compute_logits(of_slots))
        if logits is None:  # under tensor parallelism one process has them
            return None
        return self._merge(self._by_slot(logits, counts, row_of), weights)

    def _by_slot(self, logits: torch.Tensor, counts: torch.Tensor, row_of: torch.Tensor) -> list[ExpertLogits]:
        """Logits `(pairs, vocab)` of rows and the slots that count in them, by slot; the reference is no expert."""
        sizes = counts.sum(dim=0).tolist()
        entries = []
        for slot, (of_slot, rows) in enumerate(zip(logits.split(sizes), row_of.split(sizes))):
            if len(rows) == 0:
                continue
            expert = None if self.has_reference and slot == self.slots - 1 else slot
            entries.append(ExpertLogits(expert, None if len(rows) == len(counts) else rows, of_slot[:, None]))
        return entries

    def _merge(self, entries: list[ExpertLogits], weights: torch.Tensor) -> torch.Tensor:
        """
        Merge as `generate` does, with the experts' own zero, on which penalties depend; each row of logits is a batch
        row of one position, each slot an expert.
        """
        config, weights = self.config, weights[:, None]
        if self.has_reference:
            return product_log_probs(entries, weights, None, config.expert_top_k, normalize=False)[:, 0]
        merged = mixture_log_probs(entries, weights, config.merge, config.expert_top_k, exact=False, normalize=False)
        return merged[:, 0]

    def _cut(self, logits: torch.Tensor | None) -> torch.Tensor | None:
        """The tokens that every part knows."""
        return None if logits is None else logits[:, : self.config.vocab_size]

    # Loading

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint's tensors; of a thin one, the backbone from where that is."""
        if self.config.thin is not None:
            source, cache = self.vllm_config.model_config, self.vllm_config.load_config.download_dir
            weights = whole_state(self.config.thin, source.model, revision=source.revision, cache_dir=cache).items()

        parts: dict[str, dict[str, torch.Tensor]] = {BACKBONE: {}, ADAPTER: {}, PCM_BODY: {}, PCM_HEAD: {}}
        for name, tensor in weights:
            start = next((prefix for prefix in parts if name.startswith(prefix)), None)
            if start is None:
                raise ValueError(f"The checkpoint has the tensor {name!r}, which no part of an ensemble is called.")
            own_name = name.removeprefix(start)
            if own_name in parts[start]:  # no index is looked at where files are chosen by patterns
                raise ValueError(f"The checkpoint has the tensor {name!r} twice. Remove shards of earlier saves.")
            parts[start][own_name] = tensor

        self.pcm_head.weight.data.copy_(parts[PCM_HEAD]["weight"])
        of_body = ((f"model.{name}", tensor) for name, tensor in parts[PCM_BODY].items())
        loaded = {f"pcm.{name}" for name in self.pcm.load_weights(of_body)}
        loaded |= {f"backbone.{name}" for name in self.backbone.load_weights(parts[BACKBONE].items())}

        for hook in self.hooks:
            hook.remove()
        tensors = {name: tensor.to(self.dtype) for name, tensor in parts[ADAPTER].items()}
        self.adapters, self.hooks = attach_adapters(self.backbone, read_parts(self.config, tensors), self.masks)
        self.descriptions.clear()
        self.prompts.clear()
        own = (name for name, _ in self.named_parameters() if name.startswith(("adapters.", "pcm_head.")))
        return loaded | set(own)


def _behind_prefixes(
    input_ids: torch.Tensor, positions: torch.Tensor, firsts: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and positions as they are read behind prefixes: the first one may be another, see [`~requests.Wish`]."""
    ids = torch.where((positions == 0) & (firsts >= 0), firsts, input_ids)
    return ids, positions + offsets


def _keep_window(arguments: dict[str, Any], config: PreTrainedConfig, longest: int):
    """
    Give an attention layer its model's sliding window, which vLLM looks for in the ensemble's configuration; none
    where the `longest` text that is read fits into it.
    """
    config = config.get_text_config()
    window = arguments.get("per_layer_sliding_window")
    if window is None and getattr(config, "layer_types", None) is None and getattr(config, "use_sliding_window", True):
        window = getattr(config, "sliding_window", None)
    arguments["per_layer_sliding_window"] = None if window is None or window >= longest else window


def _tell(model: nn.Module, reading: PrefixReading):
    """Tell attention layers what they read first. Prefixes are read without pages, which compiled code expects."""
    for number, layer in enumerate(attention_layers(model)):
        layer.impl.reading, layer.impl.number = reading, number
    for module in model.modules():
        if hasattr(module, "do_not_compile"):
            vars(module)["do_not_compile"] = True
