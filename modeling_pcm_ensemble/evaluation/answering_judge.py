"""Whether an answer is on its prompt at all, by sentence embeddings: nothing of it is in the rewards of training."""

import json
import re

import torch

from ..rewards.answering import copied_and_new, prompt_text
from .baselines import Conversation
from .embeddings import SentenceEmbedder
from .judges import FIRST, SECOND, TIE, Comparison, Judge, Verdict


class AnsweringJudge(Judge):
    r"""
    Judges which of two answers is nearer to its own prompt than to other prompts. Words that the prompt has too are
    taken out of an answer first, so that it does not come near by repeating the prompt.

    Args:
        prompts (`list[Conversation]`): the set that an answer's own prompt is looked for in, such as all prompts of an
            evaluation; at least two different ones.
        embedder (`SentenceEmbedder`, *optional*): defaults to all-MiniLM-L6-v2.

    Raises:
        ValueError: if there are not two different prompts.
    """

    name = "answers its prompt"

    def __init__(self, prompts: list[Conversation], embedder: SentenceEmbedder | None = None):
        self.prompts = list({json.dumps(prompt): prompt for prompt in prompts}.values())
        if len(self.prompts) < 2:
            raise ValueError(f"An answer's prompt is looked for among two or more, got {len(self.prompts)}.")
        self.embedder = embedder or SentenceEmbedder()

    def judge(self, comparisons: list[Comparison]) -> list[Verdict | None]:
        prompts = [c.prompt for c in comparisons]
        firsts = self.ranks(prompts, [c.first for c in comparisons])
        seconds = self.ranks(prompts, [c.second for c in comparisons])

        verdicts: list[Verdict | None] = []
        for first, second in zip(firsts, seconds):
            winner = TIE if first == second else FIRST if first > second else SECOND
            verdicts.append(Verdict(winner, {}))
        return verdicts

    def ranks(self, prompts: list[Conversation], answers: list[str]) -> list[float]:
        """
        Return the share of the set's other prompts that each answer is farther from than from its own, between 0 and
        1; by chance 0.5. An answer of nothing but its prompt's words gets 0.
        """
        own = [prompt_text(prompt) for prompt in prompts]
        rest = [without_copies(prompt, answer) for prompt, answer in zip(own, answers)]
        if not rest:
            return []

        embedded = self.embedder(rest)  # (answers, hidden)
        to_own = (embedded * self.embedder(own)).sum(dim=1)  # (answers,)
        to_set = embedded @ self.embedder([prompt_text(prompt) for prompt in self.prompts]).T  # (answers, prompts)

        others = torch.tensor([[prompt != other for other in self.prompts] for prompt in prompts])
        farther = (to_set < to_own[:, None]) & others
        shares = farther.sum(dim=1) / others.sum(dim=1)
        return [share if re.search(r"\w", text) else 0.0 for share, text in zip(shares.tolist(), rest)]


def without_copies(prompt: str, answer: str) -> str:
    """Return an answer without the words that its prompt has too."""
    parts, place = [], 0
    for word in copied_and_new(prompt, answer)[0]:
        parts.append(answer[place : word.start])
        place = word.stop
    return " ".join("".join([*parts, answer[place:]]).split())


__all__ = ["AnsweringJudge"]
