"""
TRL's trainers on an ensemble: log-probabilities of the mixture where they expect those of one LM head.

TRL's trainers (1.16) give their model a `forward` of its own, which multiplies the last hidden states with the output
layer (`add_fused_lm_head`), and take no other; a mixture of models has neither. So `forward` is replaced here once
more, which no signature shows. A test fails when TRL stops doing so, or when its own `forward` fits.
"""

from functools import wraps
from types import MethodType

import torch
from transformers import Trainer
from trl.trainer.utils import FusedCausalLMOutput

from ..call_arguments import has_class


def add_mixture_head(trainer: Trainer, temperature: float | None = None):
    r"""
    Let a trainer of TRL (SFT, GRPO, RLOO, …) train an ensemble's PCM. Call it between building the trainer and
    `train()`. What TRL reads of a forward pass is computed from the mixture.

    Args:
        trainer (`Trainer`): of an ensemble. A reference model that it copied is served too.
        temperature (`float`, *optional*): what log π is divided by before it is normalised again; defaults to the
            trainer's `args.temperature`, else 1.

    Raises:
        TypeError: if the trainer's model is no ensemble.
    """
    model, reference = trainer.accelerator.unwrap_model(trainer.model), getattr(trainer, "ref_model", None)
    if not has_class(model, "PCMEnsembleForCausalLM"):
        raise TypeError(f"The trainer's model must be a `PCMEnsembleForCausalLM`, got {type(model).__name__}.")
    if temperature is None:
        temperature = getattr(trainer.args, "temperature", None) or 1.0

    model.forward = _mixture_forward(model, temperature)
    if reference is not None:
        reference.forward = _mixture_forward(reference, temperature)


def _mixture_forward(model, temperature: float) -> MethodType:
    """Return a `forward` of this model that takes and gives what TRL's does."""
    plain_forward = type(model).forward

    @wraps(plain_forward)  # `generate` reads from its signature which arguments there are
    def forward(self, *args, fused_lm_head=False, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs):
        if not fused_lm_head:
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            kwargs |= {name: value for name, value in given.items() if value is not None}
            return plain_forward(self, *args, **kwargs)

        log_probs = plain_forward(self, *args, **kwargs | {"use_cache": False}).logits / temperature
        if shift_labels is None:
            log_probs, shift_labels = log_probs[:, :-1], labels[:, 1:]
        return _score(log_probs.log_softmax(dim=-1), shift_labels, num_items_in_batch)

    return MethodType(forward, model)


def _score(log_probs: torch.Tensor, labels: torch.Tensor, num_items: int | torch.Tensor | None):
    """Compute what TRL reads from normalised `log_probs` of shape `(batch, seq, vocab)`."""
    kept = labels != -100  # (batch, seq)
    of_labels = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(~kept, 0)

    probs = log_probs.exp()
    scores = {
        "entropy": -(probs * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(dim=-1),
        "log_sum_sq_probs": (2 * log_probs).logsumexp(dim=-1).detach(),
        "mean_logits": log_probs.mean(dim=-1).detach(),
        "is_top1": log_probs.argmax(dim=-1) == labels,
    }  # each (batch, seq)
    return FusedCausalLMOutput(
        loss=-of_labels.sum() / (kept.sum().clamp(min=1) if num_items is None else num_items),
        log_probs=of_labels,
        label_mask=kept,
        **{name: score.masked_fill(~kept, 0) for name, score in scores.items()},
    )
