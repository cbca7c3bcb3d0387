r"""
A second proxy for each of the six preferences, of features that no expert and no PCM was trained on, so that a judge
other than the training rewards has a say. Nothing is subtracted for bad text: that is reported beside.

| feature | what it is | source |
|---|---|---|
| uncommon | share of words that are not among the 2,000 most frequent | wordfreq |
| abstract | share of words with a learned ending, such as -tion or -ology | list below |
| clauses | commas, semicolons and subordinators, each sentence | list below |
| compressed | log of the bytes that remain of the text when it is compressed | zlib |
| filler | share of words that say nothing, such as very or basically | list below |
| specifics | log of numbers, and of names within sentences | |
| polarity | TextBlob's, of the whole text; its lexicon is pattern.en's, not VADER's | textblob |
| contractions, questions | share of words such as it's; of sentences that end in a question mark | |
| negations | share of words such as not, never, don't | list below |
"""

import json
import re
import zlib
from collections.abc import Callable, Mapping
from functools import cache, lru_cache, partial
from math import log, log1p
from pathlib import Path

from textblob import TextBlob
from wordfreq import top_n_list

from ..rewards.proxies import moments, weighted_proxy
from ..rewards.quality import answer_texts

PROXIES: dict[str, dict[str, int]] = {
    "elementary": {"uncommon": -1, "abstract": -1, "clauses": -1},
    "knowledgeable": {"uncommon": 1, "abstract": 1, "clauses": 1},
    "concise": {"compressed": -2, "filler": -1},
    "informative": {"compressed": 2, "specifics": 1},
    "friendly": {"polarity": 2, "contractions": 1, "questions": 1},
    "unfriendly": {"polarity": -2, "negations": 1},
}
ABSTRACT = re.compile(r"\w{3,}(?:tion|sion|ity|ism|ology|ment|ance|ence|ive|ous|ical|esis)s?$")
SUBORDINATORS = frozenset(
    {"which", "that", "whereas", "although", "because", "while", "since", "whose", "wherein", "if", "unless"}
)
FILLER = frozenset(
    {"very", "really", "just", "quite", "basically", "actually", "simply", "various", "certain", "overall", "even"}
)
NEGATIONS = frozenset({"no", "not", "never", "nothing", "nobody", "nor", "cannot", "without"})
CONSTANTS = Path(__file__).with_name("smollm2_held_out.json")


@lru_cache(maxsize=8192)
def held_out_features(text: str) -> dict[str, float]:
    """Compute the features in the table above for one answer."""
    words = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", text.lower().replace("’", "'"))
    sentences = [s for s in re.split(r"(?<=[.!?])\s+|\n+", text) if s.strip()] or [""]
    num_words, num_sentences = max(len(words), 1), len(sentences)
    names = sum(len(re.findall(r"(?<=\w )[A-Z]\w+", sentence)) for sentence in sentences)
    joints = len(re.findall("[,;]", text)) + sum(word in SUBORDINATORS for word in words)

    return {
        "uncommon": sum(word not in _common() for word in words) / num_words,
        "abstract": sum(bool(ABSTRACT.fullmatch(word)) for word in words) / num_words,
        "clauses": joints / num_sentences,
        "compressed": log(len(zlib.compress(text.encode(), 9))),
        "filler": sum(word in FILLER for word in words) / num_words,
        "specifics": log1p(len(re.findall(r"\d+", text)) + names),
        "polarity": TextBlob(text).sentiment.polarity,
        "contractions": sum("'" in word for word in words) / num_words,
        "questions": sum(sentence.rstrip().endswith("?") for sentence in sentences) / num_sentences,
        "negations": sum(word in NEGATIONS or word.endswith("n't") for word in words) / num_words,
    }


@cache
def _common() -> frozenset[str]:
    return frozenset(top_n_list("en", 2000))


def held_out_rewards(constants: Mapping[str, tuple[float, float]] | None = None) -> dict[str, Callable]:
    r"""
    Build the six held-out rewards, by preference: `(prompts, completions) → list[float]`, in standard deviations of
    the base model's answers.

    Args:
        constants (`Mapping`, *optional*): from [`held_out_constants`]; defaults to those of SmolLM2-135M-Instruct.
    """
    constants = constants or json.loads(CONSTANTS.read_text())
    return {name: partial(_held_out_reward, name, constants) for name in PROXIES}


def _held_out_reward(
    name: str, constants: Mapping[str, tuple[float, float]], prompts: list, completions: list, **columns
) -> list[float]:
    mean, deviation = constants[name]
    texts = answer_texts(completions)
    values = [weighted_proxy(PROXIES[name], held_out_features(text), constants) for text in texts]
    return [(value - mean) / deviation for value in values]


def held_out_constants(completions: list[str]) -> dict[str, tuple[float, float]]:
    """Compute mean and standard deviation of every feature and proxy over a base model's answers."""
    features = [held_out_features(text) for text in completions]
    constants = {}
    for name in features[0]:
        constants[name] = moments([entry[name] for entry in features])
    for name, weights in PROXIES.items():
        constants[name] = moments([weighted_proxy(weights, entry, constants) for entry in features])
    return constants


__all__ = ["PROXIES", "held_out_constants", "held_out_features", "held_out_rewards"]
