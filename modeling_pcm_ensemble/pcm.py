"""The Preference Control Model: a small causal LM with one output per expert in place of its LM head."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoModel, CompileConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_pcm_ensemble import PCMEnsembleConfig
from .memory import Memory
from .rows import Rows
from .submodel import Submodel


class PreferenceControlModel(PreTrainedModel):
    r"""
    Reads [preference description | context] and gives each expert a weight logit at every token.

    Args:
        config (`PCMEnsembleConfig`): the ensemble's.
        body (`PreTrainedModel`, *optional*): a loaded causal LM without its head; made from `config.pcm` if not given.

    Source: arXiv 2407.04181. The head starts at zero, so that an untrained PCM leaves the user's weights as they are.
    """

    config: PCMEnsembleConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: PCMEnsembleConfig, body: PreTrainedModel | None = None):
        super().__init__(config)
        self.body = AutoModel.from_config(config.pcm) if body is None else body
        config.pcm = self.body.config
        self.head = nn.Linear(config.pcm.hidden_size, config.num_experts, bias=False, dtype=self.body.dtype)
        self.submodel = Submodel(config, has_lm_head=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if module is self.head:
            nn.init.zeros_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        return self.body.get_input_embeddings()

    def set_head_rows(self, rows: Sequence[int | None]):
        """Give the head one output for each entry: an old row by its index, or a zero one for None."""
        old = self.head.weight.data
        self.head = nn.Linear(old.shape[1], len(rows), bias=False, dtype=old.dtype, device=old.device)
        self.head.weight.data = torch.stack([old.new_zeros(old.shape[1]) if row is None else old[row] for row in rows])
        self.head._is_hf_initialized = True  # type: ignore[assignment]  # transformers' mark, no tensor or module

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        descriptions: list[tuple[int, ...]] | None = None,
        memory: Memory | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        compile_config: CompileConfig | None = None,
        **options,
    ) -> tuple[torch.Tensor, ModelOutput]:
        r"""
        Compute h, the expert weight logits.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, seq)`): new context tokens.
            attention_mask (`torch.LongTensor` of shape `(batch, cached + seq)`, *optional*): the context's.
            descriptions (`list[tuple[int, ...]]`, *optional*): what is read before each row's context, in a first
                call.
            memory (`Memory`, *optional*): the PCM's; nothing is remembered without.
            logits_to_keep (`int` or `torch.LongTensor` of shape `(positions,)`): context positions to weight.
            compile_config (`CompileConfig`, *optional*): compiles the step, where it is one token.
            options: `output_hidden_states` and `output_attentions`, of the body.

        Returns:
            h, `torch.Tensor` of shape `(batch, positions, experts)`, and the body's output over prefix and context,
            whose hidden states and attentions are there where they were asked for.
        """
        rows = Rows(input_ids, attention_mask, descriptions)
        memory = Memory() if memory is None else memory
        hidden_states, output = self.submodel(self.body, rows, memory, logits_to_keep, compile_config, **options)
        return self.head(hidden_states), output  # (batch, positions, experts)


__all__ = ["PreferenceControlModel"]
