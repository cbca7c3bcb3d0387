"""Sampling tokens from exactly what a model says, under no settings but those given."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel


class TokenSampler(LogitsProcessor):
    """
    Draws each row's token from the softmax of its logits, `(rows, vocab)`, and leaves `generate` that one to take.

    On a CPU one random number a row finds it in the cumulated probabilities; `torch.multinomial` draws a number for
    each token of the vocabulary, and takes twice as long for 64 rows of SmolLM2.

    Raises:
        ValueError: on a CPU, if logits are not finite; elsewhere that is torch's to say.
    """

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        probs = scores.softmax(dim=-1)
        tokens = self._search(probs) if probs.device.type == "cpu" else torch.multinomial(probs, 1)  # (rows, 1)
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens, 0.0)

    def _search(self, probs: torch.Tensor) -> torch.Tensor:
        cumulated = probs.cumsum(dim=-1, dtype=torch.float64)  # (rows, vocab)
        if not cumulated[:, -1].isfinite().all():
            raise ValueError("The mixture's logits are not finite, so that no token can be drawn. Check the weights.")
        drawn = torch.rand(len(probs), 1, dtype=torch.float64) * cumulated[:, -1:]
        return torch.searchsorted(cumulated, drawn, right=True).clamp(max=probs.shape[-1] - 1)


def rollout_config(model: PreTrainedModel, max_new_tokens: int, pad_token_id: int) -> GenerationConfig:
    """Return settings under which [`generate_from`] samples from π itself: temperature 1, nothing cut off."""
    return GenerationConfig(
        do_sample=False,  # the sampler is a logits processor
        max_new_tokens=max_new_tokens,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=pad_token_id,
    )


def generate_from(model: PreTrainedModel, config: GenerationConfig, **inputs):
    """
    Sample from `model` under `config` alone.

    transformers fills what a `generation_config` leaves open from the model's own, and not every setting (say
    `bad_words_ids`, or `max_time`) has a value that says "none". So a shallow copy generates, which shares weights,
    modules and hooks with `model`, and has `config` as its own.
    """
    view: Any = copy.copy(model)
    view.generation_config = config
    return view.generate(**inputs, logits_processor=[TokenSampler()])


@contextmanager
def random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from `seed` inside, and leave random numbers outside as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def is_end(completion_ids: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """Return which tokens end a completion, `(rows, seq)`."""
    if config.eos_token_id is None:
        return torch.zeros_like(completion_ids, dtype=torch.bool)
    ends = torch.tensor(config.eos_token_id, device=completion_ids.device).reshape(-1)
    return torch.isin(completion_ids, ends)


def written_tokens(completion_ids: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """Return 1 for the tokens up to the first end token, `(rows, seq)`."""
    ended = is_end(completion_ids, config).long()
    return (ended.cumsum(dim=1) - ended == 0).long()
