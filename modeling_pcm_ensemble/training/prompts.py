"""How prompts, preferences and answers are written: as text, as conversations, as tokens."""

from typing import cast

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..configuration_pcm_ensemble import PCMEnsembleConfig
from ..preference import description_of
from .preference_sampling import ToldPreference


def with_words(prompt, told: ToldPreference, config: PCMEnsembleConfig, tokenizer: PreTrainedTokenizerBase):
    """Return a prompt as experts and PCM get it: with the preference in it where that is how it is told."""
    if told.way != "system":
        return prompt

    preference = told.preference
    experts = [expert for expert in config.experts or [] if preference.weights.get(expert["name"], 0.0) > 0]
    words = [expert["description_ids"] for expert in experts]
    if preference.description_ids is not None:
        words = [list(preference.description_ids)]
    text = " ".join(cast(str, tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in words)
    if isinstance(prompt, str):
        return f"{text}\n\n{prompt}"
    if prompt[0]["role"] == "system":
        parts = filter(None, [prompt[0]["content"], text])
        return [{"role": "system", "content": "\n".join(parts)}, *prompt[1:]]
    return [{"role": "system", "content": text}, *prompt]


def descriptions(config: PCMEnsembleConfig, told: list[ToldPreference]) -> torch.Tensor:
    """
    Return what the PCM reads before each row's prompt, `(rows, tokens)`, padded on the left with -1: the preference's
    own words, or the descriptions of the experts that run, unless they stand in the prompt.
    """
    rows = []
    for wish in told:
        ids = () if wish.way == "system" else description_of(config, wish.preference)
        rows.append(torch.tensor(ids, dtype=torch.long))
    return pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left")


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: list) -> list[list[int]]:
    """Return the tokens of each prompt: of a text as it is, of a conversation with the opening of an answer."""
    return [_prompt_ids(tokenizer, prompt) for prompt in prompts]


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    encoded = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
    return cast(BatchEncoding, encoded)["input_ids"]


def as_completions(rows: list[dict], texts: list[str]) -> list:
    """Return answers as rewards get them: texts, or conversations where the prompts are."""
    return [
        text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
        for row, text in zip(rows, texts)
    ]
