"""Sequence-classification models as reward functions."""

from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


class ModelReward:
    r"""
    A sequence-classification model with one output as a reward function.

    Args:
        model (`str` or `PreTrainedModel`): a repository, a folder, or a loaded model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): its tokenizer; loaded from the same place if not given.
        batch_size (`int`, defaults to 16): texts that it reads at once.

    Raises:
        ValueError: if the model has another number of outputs, or was loaded from nowhere and there is no tokenizer.
    """

    def __init__(
        self, model: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, batch_size: int = 16
    ):
        if tokenizer is None and not isinstance(model, str) and not model.config._name_or_path:
            raise ValueError(
                "A reward model that was loaded from nowhere needs a tokenizer: `ModelReward(model, tokenizer)`."
            )
        if isinstance(model, str):
            loaded = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
        else:
            loaded = model
        if loaded.config.num_labels != 1:
            raise ValueError(f"A reward model must have one output, got {loaded.config.num_labels}.")

        self.model = loaded.eval()
        self.batch_size = batch_size
        self.tokenizer = tokenizer or AutoTokenizer.from_pretrained(loaded.config._name_or_path)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        loaded.config.pad_token_id = self.tokenizer.pad_token_id
        self.max_length = learned_positions(loaded)

    @torch.no_grad()
    def __call__(self, prompts: list, completions: list, **columns) -> list[float]:
        """
        Return the model's output for each prompt and completion.

        Raises:
            ValueError: if a text is longer than a model with learned positions can read.
        """
        texts = [self._text(prompt, completion) for prompt, completion in zip(prompts, completions)]

        rewards: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            batch = self.tokenizer(
                texts[start : start + self.batch_size],
                add_special_tokens=isinstance(prompts[0], str),  # a chat template writes them itself
                padding=True,
                return_tensors="pt",
            ).to(self.model.device)
            self._check_length(batch["input_ids"].shape[1])
            logits = self.model(**batch).logits  # (batch, 1)
            rewards += logits[:, 0].float().tolist()
        return rewards

    def _check_length(self, length: int):
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"A prompt and its completion are {length} tokens, but the reward model reads at most "
                f"{self.max_length}. Leave out long prompts, or train with a smaller `max_completion_length`."
            )

    def _text(self, prompt, completion) -> str:
        if isinstance(prompt, str):
            return prompt + completion
        return cast(str, self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False))


def learned_positions(model: PreTrainedModel) -> int | None:
    """Return how many tokens a table of positions has room for; None for a model without one, as rotary ones are."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and ("position" in name or name.endswith("wpe")):
            # RoBERTa's positions begin behind the one of padding, OPT's behind an offset
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - getattr(module, "offset", unused)
    return None


def reward_function(name: str, reward, device: torch.device) -> Callable:
    """
    Return what a user may give as an expert's reward as a function of prompts, completions and columns.

    Args:
        name (`str`): the expert's, for the message.
        reward (`Callable`, `PreTrainedModel` or `str`): a function, or a sequence-classification model or repository.
        device (`torch.device`): where a model is moved to.

    Raises:
        TypeError: if it is none of these.
    """
    if isinstance(reward, (str, PreTrainedModel)):
        reward = ModelReward(reward)
        reward.model.to(device)
    if not callable(reward):
        raise TypeError(
            f"The reward of {name!r} must be a function of prompts and completions, a sequence-classification model "
            f"or its repository, got {type(reward).__name__}."
        )
    return reward
