"""The Preference Control Model: a small causal LM with one output per expert in place of its LM head."""

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep

from .configuration_pcm_ensemble import PCMEnsembleConfig
from .prefix_store import KeptPrompts
from .prefixes import CachePart, SubmodelInputs, pad_left, repeated_rows, run_submodel, submodel_inputs


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
        self.kept_descriptions = KeptPrompts()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if module is self.head:
            nn.init.zeros_(module.weight)

    def set_head_rows(self, rows: list[int | None]):
        """Give the head one output for each entry: an old row by its index, or a zero one for None."""
        old = self.head.weight.data
        self.head = nn.Linear(old.shape[1], len(rows), bias=False, dtype=old.dtype, device=old.device)
        self.head.weight.data = torch.stack([old.new_zeros(old.shape[1]) if row is None else old[row] for row in rows])
        self.head._is_hf_initialized = True

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None,
        prefix_ids: torch.LongTensor | None,
        part: CachePart,
        logits_to_keep: int | torch.LongTensor = 0,
        **kwargs,
    ) -> tuple[torch.Tensor, BaseModelOutputWithPast]:
        r"""
        Compute h, the expert weight logits.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, seq)`): new context tokens.
            attention_mask (`torch.LongTensor` of shape `(batch, cached + seq)`, *optional*): the context's.
            prefix_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): descriptions, padded with -1.
            part (`CachePart`): the PCM's memory; an empty one is given the descriptions.
            logits_to_keep (`int` or `torch.LongTensor` of shape `(positions,)`): context positions to weight.

        Returns:
            h, `torch.Tensor` of shape `(batch, positions, experts)`, and the body's output over prefix and context,
            whose hidden states and attentions are there where they were asked for.
        """
        config = self.body.config
        looked_into = any(kwargs.values()) or config.output_hidden_states or config.output_attentions
        repeated = None if looked_into else repeated_rows(part, prefix_ids, attention_mask, input_ids)
        if repeated is not None:
            firsts, groups = repeated
            distinct = [None if x is None else x[firsts] for x in (input_ids, attention_mask, prefix_ids)]
            expert_weight_logits, output = self.forward(*distinct, part, logits_to_keep)
            part.copy_rows(groups)
            return expert_weight_logits[groups], output
        begins = prefix_ids is not None and part.length == 0 and part.cache is not None
        if begins and not looked_into and not torch.is_grad_enabled():
            texts = [((), tuple(token for token in row if token >= 0)) for row in prefix_ids.tolist()]
            if self.kept_descriptions.fill(part, texts, self.body, self._read, prefix_ids.device):
                prefix_ids = pad_left([ids for _, ids in texts], prefix_ids.device)  # as wide as what was filled
        inputs = submodel_inputs(
            input_ids, attention_mask, prefix_ids, part, logits_to_keep, self.config.prefix_bos_token_id
        )
        output = run_submodel(self.body, inputs, part, **kwargs)
        return self.head(slice_logits_to_keep(output.last_hidden_state, inputs.kept)), output

    def _read(self, expert: tuple[()], inputs: SubmodelInputs, part: CachePart):
        run_submodel(self.body, inputs, part)


__all__ = ["PreferenceControlModel"]
