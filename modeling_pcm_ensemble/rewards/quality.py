"""What an answer is as text, whatever its style: by a base model's likelihoods, by repetition, by length."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm
from transformers import BatchEncoding, Cache, PreTrainedModel, PreTrainedTokenizerBase

from ..rows import stack_padded

CONSTANTS = Path(__file__).with_name("smollm2_rewards.json")
SHORTEST = 12  # words; a shorter answer costs one standard deviation for each WORDS_A_DEVIATION that it lacks
WORDS_A_DEVIATION = 4
# Standard deviations from the base model's mean: what it samples at temperature 1 is on average not fluent enough.
FLUENT = -1.0
MOST_KNOWN = 16384  # answers whose features, and readings whose losses, are held between calls


def repetition(text: str) -> float:
    """Return the share of a text's word triples that it has said before."""
    words = text.lower().split()
    triples = list(zip(words, words[1:], words[2:]))
    return 1 - len(set(triples)) / len(triples) if triples else 0.0


def as_messages(prompt: str | list[dict]) -> list[dict]:
    """Return a prompt, in TRL's plain or conversational form, as a conversation."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def answer_texts(completions: list) -> list[str]:
    """Return completions, in TRL's plain or conversational form, as texts."""
    return [entry if isinstance(entry, str) else entry[-1]["content"] for entry in completions]


class TextQuality:
    r"""
    Measures answers as text, and fines those that are worse than the base model's: for being surprising to it given
    the prompt (fluency), for gaining less from the prompt (relevance) or repeating themselves more than its average
    completion, or for being hardly an answer. Features are kept, since all rewards of a completion share them.

    Args:
        model (`PreTrainedModel`): the base model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer, with a chat template.
        constants (`Mapping[str, tuple[float, float]]`, *optional*):
            Mean and standard deviation of each feature over the base model's completions, and of each proxy (see
            [`reward_constants`]). Defaults to those of SmolLM2-135M-Instruct.
        batch_size (`int`, defaults to 16):
            Completions that the base model reads at once, and prompts of up to four times as many.

    Attributes:
        known (`dict[tuple[str, str], dict[str, float]]`): (prompt as JSON, completion) → its features.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        constants: Mapping[str, tuple[float, float]] | None = None,
        batch_size: int = 16,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.constants = constants or json.loads(CONSTANTS.read_text())
        self.batch_size = batch_size
        self.known: dict[tuple[str, str], dict[str, float]] = {}
        self._losses: dict[tuple[str, str], torch.Tensor] = {}  # as `known`, the loss of each token

    def penalties(self, prompts: list, completions: list[str]) -> list[float]:
        """Return the standard deviations, at least 0, that each completion's rewards lose."""
        return [self._penalty(features) for features in self.features(prompts, completions)]

    def _penalty(self, features: dict[str, float]) -> float:
        def excess(name: str, sign: int, allowed: float = 0.0) -> float:
            mean, deviation = self.constants[name]
            return max(sign * (features[name] - mean) / deviation - allowed, 0.0)

        missing = max(SHORTEST - features["words"], 0) / WORDS_A_DEVIATION
        return excess("nll", 1, FLUENT) + excess("gain", -1) + excess("repetition", 1) + missing

    def features(self, prompts: list, completions: list[str]) -> list[dict[str, float]]:
        """
        Return each completion's `nll`, the base model's nats a token; `gain`, the nats a token that the prompt saves;
        `repetition`, a share; and `words`, a number.
        """
        keys = [(_as_json(prompt), completion) for prompt, completion in zip(prompts, completions)]
        # Completions of one prompt lie together, so that it is read once for many.
        new = sorted({key for key in keys if key not in self.known}, key=lambda key: (len(key[0]), *key))
        if new and len(self.known) > MOST_KNOWN:
            self.known = _newest(self.known, keys)

        step = 4 * self.batch_size
        starts = range(0, len(new), step)
        for start in tqdm(starts, desc="text quality", leave=False, disable=len(starts) < 32):
            batch = new[start : start + step]
            self.known |= zip(batch, self._measured(batch))
        return [self.known[key] for key in keys]

    def _measured(self, pairs: list[tuple[str, str]]) -> list[dict[str, float]]:
        """Return the features of (prompt as JSON, completion)."""
        completions = [completion for _, completion in pairs]
        with_prompt = self.nll([json.loads(prompt) for prompt, _ in pairs], completions)
        without = self.nll([""] * len(pairs), completions)
        return [
            {"nll": given, "gain": alone - given, "repetition": repetition(text), "words": len(text.split())}
            for text, given, alone in zip(completions, with_prompt, without)
        ]

    def nll(self, prompts: list, completions: list[str]) -> list[float]:
        """Return the base model's mean negative log-likelihood of each completion's tokens, in nats."""
        return [of_tokens.mean().item() for of_tokens in self.token_nll(prompts, completions)]

    def token_nll(self, prompts: list, completions: list[str]) -> list[torch.Tensor]:
        """
        Return the base model's negative log-likelihood of each token of each completion, `(tokens,)`, in nats. What
        was read is held, since several rewards read the same.
        """
        keys = [(_as_json(prompt), completion) for prompt, completion in zip(prompts, completions)]
        new = [key for key in dict.fromkeys(keys) if key not in self._losses]
        if len(self._losses) + len(new) > MOST_KNOWN:
            self._losses = _newest(self._losses, keys)
        if new:
            self._losses |= zip(new, self._token_nll(new))
        return [self._losses[key] for key in keys]

    @torch.no_grad()
    def _token_nll(self, pairs: list[tuple[str, str]]) -> list[torch.Tensor]:
        """Read (prompt as JSON, completion)."""
        device = self.model.device
        keys, completions = zip(*pairs)
        distinct = list(dict.fromkeys(keys))
        prompt_ids = [self._prompt_ids(key) for key in distinct]
        completion_ids = [self._completion_ids(text) for text in completions]
        rows = torch.tensor([distinct.index(key) for key in keys], device=device)  # each completion's prompt

        # Each distinct prompt is read once, all but its last token, which predicts a completion's first.
        past, mask = self._read_prompts([ids[:-1] for ids in prompt_ids])
        last_ids = torch.tensor([ids[-1:] for ids in prompt_ids], device=device)  # (prompts, 1)

        nll = [torch.empty(0)] * len(completions)
        by_length = sorted(range(len(completions)), key=lambda i: len(completion_ids[i]))
        for start in range(0, len(by_length), self.batch_size):  # of like lengths, so that little is padding
            batch = by_length[start : start + self.batch_size]
            cache = copy.deepcopy(past)
            cache.batch_select_indices(rows[batch])

            continued = [completion_ids[i] for i in batch]
            values = self._continued_nll(cache, mask[rows[batch]], last_ids[rows[batch]], continued)
            for i, value in zip(batch, values):
                nll[i] = value
        return nll

    def _prompt_ids(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt, given as JSON, with the opening of an answer."""
        messages = json.loads(prompt)
        encoded = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return cast(BatchEncoding, encoded)["input_ids"]

    def _completion_ids(self, completion: str) -> list[int]:
        """Return a completion's tokens; an empty one is an end token."""
        return self.tokenizer(completion, add_special_tokens=False)["input_ids"] or [self.tokenizer.eos_token_id]

    def _read_prompts(self, sequences: list[list[int]]) -> tuple[Cache, torch.Tensor]:
        """Return keys and values of the base model, and the mask of what it read, `(sequences, tokens)`."""
        ids, mask = stack_padded(sequences, self.model.device)
        output = self.model.base_model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=True,
        )
        return output.past_key_values, mask

    def _continued_nll(
        self, past: Cache, mask: torch.Tensor, last_ids: torch.Tensor, completion_ids: list[list[int]]
    ) -> tuple[torch.Tensor, ...]:
        """
        Return the loss of each completion's tokens, `(tokens,)`, after what is in the cache, whose mask is
        `(rows, cached)`, and one more token, `(rows, 1)`.
        """
        device, width = self.model.device, max(map(len, completion_ids))
        padded = [ids + [-100] * (width - len(ids)) for ids in completion_ids]
        targets = torch.tensor(padded, device=device)  # (rows, width)

        logits = self.model(
            input_ids=torch.cat([last_ids, targets[:, :-1].clamp(min=0)], dim=1),
            attention_mask=torch.cat([mask, torch.ones_like(targets)], dim=1),
            position_ids=mask.sum(dim=1, keepdim=True) + torch.arange(width, device=device),
            past_key_values=past,
        ).logits  # (rows, width, vocab)

        written = targets >= 0
        losses = torch.nn.functional.cross_entropy(logits[written].float(), targets[written], reduction="none")
        return losses.split(written.sum(dim=1).tolist())


def _newest(known: dict[tuple[str, str], Any], keys: list[tuple[str, str]]) -> dict[tuple[str, str], Any]:
    """Keep the newer half of what is held, and what is asked for."""
    kept = set(list(known)[-MOST_KNOWN // 2 :]).union(keys)
    return {key: value for key, value in known.items() if key in kept}


def _as_json(prompt) -> str:
    return json.dumps(as_messages(prompt))
