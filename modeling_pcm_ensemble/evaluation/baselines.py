"""Ways to answer under a preference: what they all are, and those that are one plain model."""

import hashlib
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import (
    AutoModelForCausalLM,
    BatchEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..preference import Preference
from ..rows import stack_padded

Conversation = list[dict[str, str]]
USUAL_SCALE = 2.0  # lora_alpha / r, of an adapter whose scale is not written in settings
GenerativeModel = Any  # of transformers, or PEFT's around one: no type of theirs has `generate` and `device`


class Baseline(ABC):
    r"""
    A way to answer prompts under preferences: all that an evaluation knows of it.

    Attributes:
        name (`str`): stands in tables.
    """

    name: str

    @abstractmethod
    def generate(self, prompts: list[Conversation], preferences: list[Preference]) -> list[str]:
        """Answer each conversation once, under the preference beside it. Random numbers are seeded by the caller."""

    def applies(self, preference: Preference) -> bool:
        """Say whether it can be compared under a preference."""
        return True

    def settings(self) -> str:
        """Describe what answers depend on beside the name: those kept under another text are not taken for its."""
        return ""


@dataclass
class PlainModel(Baseline):
    r"""
    One model as it is, whatever the preference.

    Args:
        name (`str`): see [`Baseline`].
        model (`PreTrainedModel`), tokenizer (`PreTrainedTokenizerBase`): the model.
        max_new_tokens (`int`): most tokens of an answer.
        top_k (`int`): tokens that are sampled from; 0 for all.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    top_k: int = field(default=0, kw_only=True)

    def settings(self) -> str:
        return self._settings_with(None)

    def generate(self, prompts: list[Conversation], preferences: list[Preference]) -> list[str]:
        return sample_answers(self.model, self.tokenizer, prompts, self.max_new_tokens, top_k=self.top_k)

    def _settings_with(self, descriptions: Mapping[str, str | Sequence[str]] | None) -> str:
        return json.dumps([self.max_new_tokens, descriptions, self.top_k, digest(self.model)])


@dataclass
class PromptedModel(PlainModel):
    r"""
    One model that is told the preference in its system prompt.

    Args:
        descriptions (`Mapping[str, str]`): what is said for each wanted expert.
        others: as for [`PlainModel`].

    Raises:
        ValueError: from `generate`, if a wanted expert has no description.
    """

    descriptions: Mapping[str, str]

    def settings(self) -> str:
        return self._settings_with(self.descriptions)

    def generate(self, prompts: list[Conversation], preferences: list[Preference]) -> list[str]:
        wanted = {name for preference in preferences for name in preference.weights}
        if missing := wanted - set(self.descriptions):
            raise ValueError(f"Baseline {self.name!r} has no description of {', '.join(sorted(missing))}.")

        texts = [" ".join(self.descriptions[name] for name in preference.weights) for preference in preferences]
        return super().generate(_told(prompts, texts), preferences)


@dataclass
class PromptedInWords(PlainModel):
    r"""
    One model that is told in its system prompt, in words for each preference, what is wanted and how much.

    Args:
        words (`Mapping[str, str | Sequence[str]]`): what is said for each preference, see [`wordings`].
        others: as for [`PlainModel`].

    Raises:
        ValueError: from `generate`, if there are no words for a preference.
    """

    words: Mapping[str, str | Sequence[str]]

    def settings(self) -> str:
        return self._settings_with(self.words)

    def generate(self, prompts: list[Conversation], preferences: list[Preference]) -> list[str]:
        return super().generate(_told(prompts, wordings(self.name, self.words, prompts, preferences)), preferences)


def wordings(
    name: str,
    words: Mapping[str, str | Sequence[str]],
    prompts: list[Conversation],
    preferences: list[Preference],
) -> list[str]:
    r"""
    Return what is said for each prompt.

    Args:
        name (`str`): the baseline's.
        words (`Mapping[str, str | Sequence[str]]`): by a preference's label, one text, or several, of which a prompt
            gets always the same one.
        prompts (`list[Conversation]`), preferences (`list[Preference]`): one for each row.

    Raises:
        ValueError: if there are no words for a preference.
    """
    if missing := {preference.label for preference in preferences} - {label for label in words if words[label]}:
        raise ValueError(f"Baseline {name!r} has no words for {', '.join(map(repr, sorted(missing)))}.")

    texts = []
    for prompt, preference in zip(prompts, preferences):
        said = words[preference.label]
        place = zlib.crc32(json.dumps(prompt).encode()) % len(said)  # the same in every process
        texts.append(said if isinstance(said, str) else said[place])
    return texts


def _told(prompts: list[Conversation], texts: list[str]) -> list[Conversation]:
    """Each conversation behind its text as a system message."""
    return [[{"role": "system", "content": text}, *prompt] for prompt, text in zip(prompts, texts)]


class WeightAverage(Baseline):
    r"""
    PEFT's `linear` average of the adapters: one model for each preference, Personalized Soup as a user of PEFT makes
    it. Its factors A and B are averaged apart, so that the sum is not exactly Σ w_i B_i A_i (that is [`StaticWeights`]
    of an ensemble with `merge="adapters"`).

    Args:
        name (`str`): see [`Baseline`].
        model (`str`): the base model, a folder or repository.
        adapters (`Mapping[str, str]`): each expert's PEFT adapter.
        tokenizer (`PreTrainedTokenizerBase`), max_new_tokens, top_k (`int`): as for [`PlainModel`].
        model_kwargs: passed to `from_pretrained`.

    Source: arXiv 2310.11564.
    """

    def __init__(
        self,
        name: str,
        model: str,
        adapters: Mapping[str, str],
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        *,
        top_k: int = 0,
        **model_kwargs,
    ):
        from peft import PeftModel

        self.name = name
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.top_k = top_k

        first, *others = adapters
        base = AutoModelForCausalLM.from_pretrained(model, **model_kwargs)
        self.model = PeftModel.from_pretrained(base, adapters[first], adapter_name=first).eval()
        for expert in others:
            self.model.load_adapter(adapters[expert], adapter_name=expert)

    def settings(self) -> str:
        asked: list[Any] = [self.max_new_tokens, self.top_k, digest(self.model)]
        if scales := self._scales():
            asked.append(scales)
        return json.dumps(asked)

    def _scales(self) -> dict[str, list]:
        """What no weights say of the adapters' scales, where they are not the usual one; see `EnsembleBaseline`."""
        scales = {}
        for name, adapter in cast(dict[str, Any], self.model.peft_config).items():
            patterns = [adapter.use_rslora, adapter.rank_pattern, adapter.alpha_pattern]
            if name != "average" and (any(patterns) or adapter.lora_alpha / adapter.r != USUAL_SCALE):
                scales[name] = [adapter.r, adapter.lora_alpha, *patterns]
        return scales

    def generate(self, prompts: list[Conversation], preferences: list[Preference]) -> list[str]:
        rows_of: dict[str, list[int]] = {}
        for row, preference in enumerate(preferences):
            rows_of.setdefault(json.dumps(dict(preference.weights), sort_keys=True), []).append(row)

        answers = [""] * len(prompts)
        for rows in rows_of.values():
            self._average(preferences[rows[-1]])
            asked = [prompts[row] for row in rows]
            texts = sample_answers(self.model, self.tokenizer, asked, self.max_new_tokens, top_k=self.top_k)
            for row, text in zip(rows, texts):
                answers[row] = text
        return answers

    def _average(self, preference: Preference):
        names, weights = list(preference.weights), list(preference.weights.values())
        shares = [weight / sum(weights) for weight in weights]

        if "average" in self.model.peft_config:
            self.model.set_adapter(names[0])
            self.model.delete_adapter("average")
        with torch.random.fork_rng():  # it draws the weights that it then replaces
            self.model.add_weighted_adapter(names, shares, "average", combination_type="linear")

        self.model.set_adapter("average")
        self.model.eval()  # the new modules would drop out


def sample_answers(
    model: GenerativeModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Conversation],
    max_new_tokens: int,
    **options,
) -> list[str]:
    """Sample one answer to each conversation; arguments as for [`sample_tokens`]."""
    inputs = chat_inputs(model, tokenizer, prompts)
    return tokenizer.batch_decode(sample_tokens(model, inputs, max_new_tokens, **options), skip_special_tokens=True)


@torch.no_grad()
def sample_tokens(model: GenerativeModel, inputs: BatchEncoding, max_new_tokens: int, **options) -> torch.Tensor:
    """
    Sample what comes behind each row at temperature 1, from all tokens unless `options`, which are `generate`'s, say
    otherwise. Gives the new tokens alone, `(rows, tokens)`.
    """
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": max_new_tokens}
    sequences = model.generate(**inputs, **sampling | options)
    return sequences[:, inputs["input_ids"].shape[1] :]


def chat_inputs(
    model: GenerativeModel, tokenizer: PreTrainedTokenizerBase, prompts: list[Conversation]
) -> BatchEncoding:
    """Encode conversations up to where an answer begins, padded on the left."""
    encoded = cast(BatchEncoding, tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True))
    ids, mask = stack_padded(encoded["input_ids"])  # which needs no padding token
    return BatchEncoding({"input_ids": ids, "attention_mask": mask}).to(model.device)


def digest(module: torch.nn.Module) -> str:
    """Compute a hash of all weights of a module but PEFT's average, which comes and goes."""
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if ".average." not in name:
            found.update(name.encode())
            found.update(tensor.cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


__all__ = [
    "Baseline",
    "Conversation",
    "PlainModel",
    "PromptedInWords",
    "PromptedModel",
    "WeightAverage",
    "chat_inputs",
    "digest",
    "sample_answers",
    "sample_tokens",
    "wordings",
]
