"""Rollouts: completions sampled from the ensemble, with what an update needs of each step recorded on the way."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from transformers import GenerationConfig

from ..modeling_pcm_ensemble import PCMEnsembleForCausalLM, PCMEnsembleOutput
from ..preference import MOST_STRENGTH
from .policies import STEPS_OF_A_PIECE, Policy
from .token_sampling import generate_from, is_end, written_tokens


@dataclass
class Rollout:
    r"""
    Sampled completions, and all that an update needs of the experts.

    Args:
        prompt_ids, prompt_mask (`torch.LongTensor` of shape `(rows, prompt tokens)`): padded on the left.
        completion_ids, completion_mask (`torch.LongTensor` of shape `(rows, seq)`): padded on the right.
        recorded (`torch.Tensor` of shape `(rows, seq, …)`): what an update needs of each token's step, see
            [`~policies.Policy`].
        weights (`torch.FloatTensor` of shape `(rows, experts)`): the weights w of the preference.
        prefix_ids (`torch.LongTensor` of shape `(rows, tokens)`): what the PCM read first, padded on the left with -1.
        old_log_probs (`torch.FloatTensor` of shape `(rows, seq)`): log π_t.
        shares (`torch.FloatTensor` of shape `(rows, experts)`): how much each expert's reward counts.
        rewards (`torch.FloatTensor` of shape `(rows,)`).
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    recorded: torch.Tensor
    weights: torch.Tensor
    prefix_ids: torch.Tensor
    old_log_probs: torch.Tensor | None = None
    shares: torch.Tensor | None = None
    rewards: torch.Tensor | None = None

    def rows(self, index: torch.Tensor | slice) -> "Rollout":
        """Return some rows."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        chosen: dict[str, Any] = {name: value if value is None else value[index] for name, value in values.items()}
        return Rollout(**chosen)

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @staticmethod
    def join(parts: list["Rollout"], pad_token_id: int) -> "Rollout":
        """Stack rollouts, padded to the longest."""
        padded_left = ("prompt_ids", "prompt_mask", "prefix_ids")
        fill = {"prompt_ids": pad_token_id, "completion_ids": pad_token_id, "prefix_ids": -1}

        joined = {}
        for field in fields(Rollout):
            values = [getattr(part, field.name) for part in parts]
            if values[0] is None:
                continue
            if field.name == "weights" or values[0].dim() == 1:  # of every row one width, or none
                joined[field.name] = torch.cat(values)
            else:
                joined[field.name] = _stack(values, field.name in padded_left, fill.get(field.name, 0))
        return Rollout(**joined)


def _stack(values: list[torch.Tensor], on_the_left: bool, fill: int) -> torch.Tensor:
    """Stack tensors `(rows, width, …)`, padded to the greatest width."""
    width = max(value.shape[1] for value in values)
    padded = []
    for value in values:
        room = value.new_full((len(value), width - value.shape[1], *value.shape[2:]), fill)
        padded.append(torch.cat([room, value] if on_the_left else [value, room], dim=1))
    return torch.cat(padded)


class StepRecorder:
    """
    While it is entered, records what a policy needs of each step of `generate`: a forward's output is kept until the
    next forward, or the end, tells which token was drawn from it.
    """

    def __init__(self, model: PCMEnsembleForCausalLM, policy: Policy):
        self.model = model
        self.policy = policy
        self.columns: list[torch.Tensor] = []  # each (rows, 1, …)
        self.output: PCMEnsembleOutput | None = None  # of which the next forward will read a token

    def __enter__(self) -> "StepRecorder":
        self.handle = self.model.register_forward_hook(self._after_forward, with_kwargs=True)
        return self

    def __exit__(self, *exception):
        self.handle.remove()

    def _after_forward(self, module, args, kwargs, output):
        if output.dropped_experts is not None:
            raise RuntimeError(
                "An endpoint has failed in a rollout, which would teach the PCM to do without its expert. Train with "
                '`on_failure="error"`: a run goes on from its last checkpoint.'
            )
        if self.output is not None:
            self.columns.append(self.policy.record(self.output, kwargs["input_ids"]))
        self.output = output

    def recorded(self, last_token_ids: torch.LongTensor) -> torch.Tensor:
        """Return `(rows, new tokens, …)`. `last_token_ids`, `(rows, 1)`, are those that no forward has read."""
        self.columns.append(self.policy.record(cast(PCMEnsembleOutput, self.output), last_token_ids))
        self.output = None
        return torch.cat(self.columns, dim=1)


@torch.no_grad()
def sample_rollout(
    model: PCMEnsembleForCausalLM,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    weights: torch.Tensor,
    prefix_ids: torch.Tensor,
    config: GenerationConfig,
    policy: Policy,
    exploration: float = 0.0,
) -> Rollout:
    """
    Complete each row once. Tensors are as in [`Rollout`], `config` is from [`rollout_config`], and `exploration` as in
    [`RebelConfig`].
    """
    device = prompt_ids.device
    weights, prefix_ids = weights.to(device), prefix_ids.to(device)
    explored = _exploration(weights, exploration, MOST_STRENGTH if model.config.adds_up else math.inf)
    completion_ids = torch.full((len(prompt_ids), config.max_new_tokens), config.pad_token_id, device=device)
    recorded: torch.Tensor | None = None  # (rows, longest completion, …)

    alive = torch.arange(len(prompt_ids), device=device)  # rows that have not ended
    sequences, mask = prompt_ids, prompt_mask  # of these rows, (alive, tokens)
    told = {"preference": explored(alive), "preference_ids": prefix_ids}
    end = 0
    for start in range(0, config.max_new_tokens, STEPS_OF_A_PIECE):
        piece = copy.copy(config)
        piece.max_new_tokens = min(STEPS_OF_A_PIECE, config.max_new_tokens - start)
        piece.return_dict_in_generate = True
        read = {"input_ids": sequences, "attention_mask": mask}
        with StepRecorder(model, policy) as recorder:
            output = generate_from(model, piece, **read, **told, output_expert_logits=policy.reads_experts)
        new_ids = output.sequences[:, sequences.shape[1] :]  # (alive, new tokens)
        end = start + new_ids.shape[1]
        completion_ids[alive, start:end] = new_ids
        piece_recorded = recorder.recorded(new_ids[:, -1:])
        if recorded is None:
            recorded = piece_recorded.new_zeros(*completion_ids.shape, *policy.width)
        recorded[alive, start:end] = piece_recorded

        # Rows that have ended leave the batch, which `generate` would carry on to the longest row's end.
        kept = (~is_end(new_ids, config).any(dim=1)).nonzero()[:, 0]
        if not len(kept):
            break
        cache = output.past_key_values
        if len(kept) < len(alive):
            cache.batch_select_indices(kept)
        alive, sequences = alive[kept], output.sequences[kept]
        mask = torch.cat([mask[kept], torch.ones_like(new_ids[kept])], dim=1)
        cache.reweight(explored(alive))
        told = {"past_key_values": cache}

    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids[:, :end],
        completion_mask=written_tokens(completion_ids[:, :end], config),
        recorded=cast(torch.Tensor, recorded)[:, :end],  # there was a first piece
        weights=weights,
        prefix_ids=prefix_ids,
    )


def _exploration(weights: torch.Tensor, deviation: float, most: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    Return a function from some rows' numbers to the weights, `(rows, experts)`, that their next piece is sampled
    under: `weights` with normal noise on the logarithms of their absolute values, which stay at most `most`.
    """
    if not deviation:
        return lambda rows: weights[rows]
    leaning = torch.randn(weights.shape, device=weights.device)  # of each completion, from its first token to its last

    def explored(rows: torch.Tensor) -> torch.Tensor:
        noise = (leaning[rows] + torch.randn_like(leaning[rows])) / 2**0.5
        return (weights[rows] * (deviation * noise).exp()).clamp(-most, most)

    return explored


def completion_weight_logits(
    pcm,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    prefix_ids: torch.Tensor,
) -> torch.Tensor:
    """
    Compute h where each completion token was predicted, `(rows, seq, experts)`. Tensors are as in [`Rollout`]; `pcm`
    may be wrapped.
    """
    expert_weight_logits, _ = pcm(
        torch.cat([prompt_ids, completion_ids], dim=1),
        torch.cat([prompt_mask, completion_mask], dim=1),
        descriptions=[tuple(token for token in row if token >= 0) for row in prefix_ids.tolist()],
        logits_to_keep=completion_ids.shape[1] + 1,
    )
    return expert_weight_logits[:, :-1]  # the last token predicts no other
