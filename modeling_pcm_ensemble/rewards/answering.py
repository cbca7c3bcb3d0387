"""
A reward for answering the question: how much better the own prompt explains an answer than other prompts do.

What it measures is the pointwise mutual information of prompt and answer, with other prompts in place of the marginal:
J. Li et al., A Diversity-Promoting Objective Function for Neural Conversation Models, arXiv 1510.03055.
"""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from .proxies import CLIP, moments
from .quality import TextQuality, answer_texts, as_messages

CONSTANTS = Path(__file__).with_name("smollm2_answering.json")
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def prompt_text(prompt: str | list[dict]) -> str:
    """Return all that a prompt says."""
    return "\n".join(message["content"] for message in as_messages(prompt))


def copied_and_new(prompt: str, text: str) -> tuple[list[slice], list[slice]]:
    """Find the words of a text that its prompt has too, and those that it has not, as slices of the text."""
    known = {word.lower() for word in WORD.findall(prompt)}
    copied: list[slice] = []
    new: list[slice] = []
    for word in WORD.finditer(text):
        (copied if word[0].lower() in known else new).append(slice(*word.span()))
    return copied, new


class AnsweringReward:
    r"""
    The nats a token that an answer's own prompt saves the base model, compared with other prompts of a pool. Nothing
    is saved on chat that would suit any prompt, and only words that the prompt has not count, so that copying is no
    answer. A reward function as TRL's trainers take.

    Args:
        quality (`TextQuality`): reads answers with the base model.
        pool (`Sequence[str | list[dict]]`): prompts, as texts or conversations, such as those of the training. Each
            prompt is compared with the same ones of them in every call.
        others (`int`, defaults to 1): prompts that each is compared with. The base model reads an answer once after
            its own prompt, unless `quality` has, and once after each other one.
        constant (`tuple[float, float]`, *optional*): mean and standard deviation over the base model's answers, see
            [`answering_constant`]. Defaults to that of SmolLM2-135M-Instruct.

    Raises:
        ValueError: if `others` is below 1, the pool has not one more prompt than that, or the tokenizer is not fast.
    """

    def __init__(
        self,
        quality: TextQuality,
        pool: Sequence[str | list[dict]],
        others: int = 1,
        constant: tuple[float, float] | None = None,
    ):
        if not quality.tokenizer.is_fast:
            raise ValueError(
                "The reward of answering reads where tokens stand in a text, which "
                f"{type(quality.tokenizer).__name__} cannot say. Use a fast tokenizer."
            )

        self.pool = {json.dumps(as_messages(prompt)): prompt for prompt in pool}
        if not 1 <= others < len(self.pool):
            raise ValueError(
                f"Each prompt is compared with {others} others, out of a pool of {len(self.pool)} different prompts. "
                "`others` must be at least 1, and the pool larger."
            )

        self.quality = quality
        self.others = others
        self.constant = constant or json.loads(CONSTANTS.read_text())
        self.__name__ = "answering"

    @property
    def settings(self) -> dict:
        """What its values depend on beside the base model and the pool."""
        return {"others": self.others, "constant": list(self.constant)}

    def __call__(self, prompts: list, completions: list, **columns) -> list[float]:
        """
        Return each completion's reward, in the base model's standard deviations, at most three: 0 is its average
        answer. Completions are texts or conversations, of which the last message counts.
        """
        mean, deviation = self.constant
        texts = answer_texts(completions)
        return [min(max((saved - mean) / deviation, -CLIP), CLIP) for saved in self.saved(prompts, texts)]

    def saved(self, prompts: list, completions: list[str]) -> list[float]:
        """Return the nats a token of each completion that its own prompt saves."""
        step = 4 * self.quality.batch_size
        starts = range(0, len(completions), step)

        saved: list[float] = []
        for start in tqdm(starts, desc="answering", leave=False, disable=len(starts) < 8):
            batch = slice(start, start + step)
            saved += self._saved(prompts[batch], completions[batch])
        return saved

    def _saved(self, prompts: list, completions: list[str]) -> list[float]:
        own = self.quality.token_nll(prompts, completions)
        others = []
        for drawn in zip(*map(self._others, prompts)):  # one other prompt for each completion
            others.append(self.quality.token_nll(list(drawn), completions))

        saved = []
        for prompt, completion, of_own, *of_others in zip(prompts, completions, own, *others):
            of_tokens = torch.stack(of_others).mean(dim=0) - of_own  # (tokens,)
            counted = self._of_new_words(prompt, completion).to(of_tokens.device)
            saved.append((of_tokens * counted).mean().item())
        return saved

    def _others(self, prompt) -> list:
        """Draw the prompts that one is compared with."""
        key = json.dumps(as_messages(prompt))
        rest = [other for of_key, other in self.pool.items() if of_key != key]
        return random.Random(key).sample(rest, self.others)

    def _of_new_words(self, prompt, completion: str) -> torch.Tensor:
        """Return which tokens of a completion are of words that its prompt has not, `(tokens,)`."""
        of_new = torch.zeros(len(completion), dtype=torch.bool)  # (characters,)
        for word in copied_and_new(prompt_text(prompt), completion)[1]:
            of_new[word] = True

        encoded = self.quality.tokenizer(completion, add_special_tokens=False, return_offsets_mapping=True)
        counted = [bool(of_new[start:end].any()) for start, end in encoded["offset_mapping"]]
        return torch.tensor(counted or [False])  # an empty completion is an end token


def answering_constant(reward: AnsweringReward, prompts: list, completions: list[str]) -> tuple[float, float]:
    """Compute mean and standard deviation of what prompts save a base model's answers to them."""
    return moments(reward.saved(prompts, completions))
