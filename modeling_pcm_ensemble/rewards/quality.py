"""What an answer loses as text, whatever its style: by a base model's likelihoods, repetition and length."""

import copy
import json
from collections.abc import Mapping

import torch
from tqdm import tqdm
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from ..prefixes import pad_left

SHORTEST = 12  # words; a shorter answer costs one standard deviation for each WORDS_A_DEVIATION that it lacks
WORDS_A_DEVIATION = 4
# Standard deviations from the base model's mean: what it samples at temperature 1 is on average not fluent enough.
FLUENT = -1.0
MOST_KNOWN = 16384  # answers whose features a guard holds between calls


def repetition(text: str) -> float:
    """Share of a text's word triples that it has said before."""
    words = text.lower().split()
    triples = list(zip(words, words[1:], words[2:]))
    return 1 - len(set(triples)) / len(triples) if triples else 0.0


def as_messages(prompt: str | list[dict]) -> list[dict]:
    """A prompt, in TRL's plain or conversational form, as a conversation."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


class Guard:
    r"""
    What an answer loses as text: for being surprising to the base model given the prompt (fluency), for gaining less
    from the prompt (relevance) or repeating itself more than the base model's average completion, or for being hardly
    an answer. Cached, since all rewards of a completion share it.

    Args:
        model (`PreTrainedModel`): the base model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer, with a chat template.
        constants (`Mapping`, *optional*): mean and standard deviation of `nll`, `gain` and `repetition`.
        batch_size (`int`): completions that the base model reads at once, and prompts of up to four times as many.

    Attributes:
        known (`dict`): (prompt as JSON, completion) → its features.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        constants: Mapping[str, tuple[float, float]] | None = None,
        batch_size: int = 16,
    ):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.constants = constants
        self.known: dict[tuple[str, str], dict[str, float]] = {}

    def __call__(self, prompts: list, completions: list[str]) -> list[float]:
        """Standard deviations to subtract from each completion's rewards, at least 0."""
        return [self._penalty(entry) for entry in self.features(prompts, completions)]

    def _penalty(self, features: dict[str, float]) -> float:
        def excess(name: str, sign: int, allowed: float = 0.0) -> float:
            mean, deviation = self.constants[name]
            return max(sign * (features[name] - mean) / deviation - allowed, 0.0)

        missing = max(SHORTEST - features["words"], 0) / WORDS_A_DEVIATION
        return excess("nll", 1, FLUENT) + excess("gain", -1) + excess("repetition", 1) + missing

    def features(self, prompts: list, completions: list[str]) -> list[dict[str, float]]:
        """`nll`, the base model's nats a token; `gain`, nats a token that the prompt saves; `repetition`; `words`."""
        keys = [(json.dumps(as_messages(p)), c) for p, c in zip(prompts, completions)]
        new = sorted({key for key in keys if key not in self.known}, key=lambda key: (len(key[0]), *key))
        if new and len(self.known) > MOST_KNOWN:
            self.known = {key: self.known[key] for key in keys if key in self.known}
        step = 4 * self.batch_size  # completions of one prompt lie together: it is read once for many
        starts = range(0, len(new), step)
        for start in tqdm(starts, desc="guard", leave=False, disable=len(starts) < 32):
            batch = new[start : start + step]
            answers = [completion for _, completion in batch]
            given = self.nll([json.loads(prompt) for prompt, _ in batch], answers)
            alone = self.nll([""] * len(batch), answers)
            for key, with_prompt, without in zip(batch, given, alone):
                gain, words = without - with_prompt, len(key[1].split())
                self.known[key] = {
                    "nll": with_prompt, "gain": gain, "repetition": repetition(key[1]), "words": words
                }  # fmt: skip
        return [self.known[key] for key in keys]

    @torch.no_grad()
    def nll(self, prompts: list, completions: list[str]) -> list[float]:
        """The base model's mean negative log-likelihood of each completion's tokens, in nats."""
        keys = [json.dumps(as_messages(prompt)) for prompt in prompts]
        distinct = list(dict.fromkeys(keys))
        heads = [
            self.tokenizer.apply_chat_template(json.loads(key), add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
            for key in distinct
        ]
        rows = torch.tensor([distinct.index(key) for key in keys], device=self.model.device)
        past, mask = self._read([head[:-1] for head in heads])  # each distinct prompt once
        end = [self.tokenizer.eos_token_id]
        tails = [self.tokenizer(c, add_special_tokens=False)["input_ids"] or end for c in completions]
        last = torch.tensor([head[-1:] for head in heads], device=self.model.device)
        found = {}
        by_length = sorted(range(len(tails)), key=lambda i: len(tails[i]))
        for start in range(0, len(tails), self.batch_size):  # of like lengths, so that little is padding
            part = by_length[start : start + self.batch_size]
            read = copy.deepcopy(past)
            read.batch_select_indices(rows[part])
            values = self._tail_nll(read, mask[rows[part]], last[rows[part]], [tails[i] for i in part])
            found |= dict(zip(part, values))
        return [found[i] for i in range(len(tails))]

    def _tail_nll(
        self, past: Cache, mask: torch.LongTensor, last: torch.LongTensor, tails: list[list[int]]
    ) -> list[float]:
        """Mean loss of each tail's tokens after what is in the cache and one more token, `last`, `(tails, 1)`."""
        width, device = max(map(len, tails)), self.model.device
        targets = torch.tensor([tail + [-100] * (width - len(tail)) for tail in tails], device=device)
        logits = self.model(
            input_ids=torch.cat([last, targets[:, :-1].clamp(min=0)], dim=1),
            attention_mask=torch.cat([mask, torch.ones_like(targets)], dim=1),
            position_ids=mask.sum(dim=1, keepdim=True) + torch.arange(width, device=device),
            past_key_values=past,
        ).logits  # (tails, width, vocab)
        given = targets >= 0
        losses = torch.nn.functional.cross_entropy(logits[given].float(), targets[given], reduction="none")
        return [part.mean().item() for part in losses.split(given.sum(dim=1).tolist())]

    def _read(self, sequences: list[list[int]]) -> tuple[Cache, torch.LongTensor]:
        """Keys and values of the base model, and the mask of what it read, `(sequences, tokens)`."""
        ids = pad_left(sequences, self.model.device)
        mask = (ids >= 0).long()
        output = self.model.base_model(
            input_ids=ids.clamp(min=0),
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=True,
        )
        return output.past_key_values, mask
