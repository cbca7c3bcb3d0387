r"""
Rewards that run offline: a documented proxy for each of the six preferences, and a guard that keeps answers sane.

A proxy is a weighted mean of standardised text features, standardised again, so that 0 is an average completion of the
base model in style and 1 is one standard deviation above. The guard subtracts in that unit.

| feature | what it is | source |
|---|---|---|
| ari, coleman_liau, lix, rix | readability formulas; higher is harder | textstat |
| syllables | syllables a word | pyphen's hyphenation |
| rarity | how rare the content words are, in orders of magnitude of frequency | wordfreq's Zipf scale |
| brevity, content | minus log of words; log of distinct content words (Zipf below 6) | |
| density, redundancy | share of words that are content words; share of content words said before | |
| sentiment | mean compound sentiment of the sentences | VADER (Hutto and Gilbert, 2014) |
| address | share of words of talk, such as you, we, I | list below |
| warmth, rudeness | warm words and signs, rude words, each a sentence | lists below |
"""

import copy
import json
import re
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from math import log, log1p
from pathlib import Path
from statistics import fmean, pstdev

import pyphen
import textstat
import torch
from tqdm import tqdm
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
from wordfreq import zipf_frequency

# The proxy of each preference: the features whose weighted mean it is.
HARD = ("ari", "coleman_liau", "lix", "rix", "syllables", "rarity")
PROXIES: dict[str, dict[str, int]] = {
    "elementary": dict.fromkeys(HARD, -1),
    "knowledgeable": dict.fromkeys(HARD, 1),
    "concise": {"brevity": 3, "density": 1, "redundancy": -1},
    "informative": {"content": 3, "density": 1, "redundancy": -1},
    "friendly": {"sentiment": 1, "address": 1, "warmth": 1},
    "unfriendly": {"sentiment": -1, "rudeness": 1, "warmth": -1},
}
ADDRESS = frozenset(
    """
    you your yours you're you'll you've yourself we we'll let's us our i i'm i'll i'd me my
    """.split()  # noqa: SIM905
)
WARM = frozenset(
    """
    hey hi hello friend friends buddy pal dear glad happy love lovely awesome amazing fun funny haha wow yay
    cool enjoy delighted welcome thanks thank cheers smile joke laugh favorite fantastic wonderful great sure
    """.split()  # noqa: SIM905
)
RUDE = frozenset(
    """
    stupid dumb idiot idiotic fool foolish boring waste whatever annoying nonsense lazy useless pathetic
    ridiculous hate shut ignorant silly pointless clueless moron loser garbage terrible awful worst bother
    obviously incompetent dull sick tired wrong rude crap hell damn
    """.split()  # noqa: SIM905
)
SIGNS = re.compile(r"!|[:;]-?[)D]|[\U0001F300-\U0001FAFF\u2600-\u27BF]")

CLIP = 3.0  # standard deviations: one odd word or sign must not carry an answer
SHORTEST = 12  # words; a shorter answer costs one standard deviation for each WORDS_A_DEVIATION that it lacks
WORDS_A_DEVIATION = 4
# Standard deviations from the base model's mean: what it samples at temperature 1 is on average not fluent enough.
FLUENT = -1.0
MOST_KNOWN = 16384  # answers whose features a guard holds between calls
CONSTANTS = Path(__file__).with_name("smollm2_rewards.json")


@lru_cache(maxsize=8192)
def text_features(text: str) -> dict[str, float]:
    """Compute the features in the table above for one completion."""
    words = re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())
    sentences = [s for s in re.split(r"(?<=[.!?])\s+|\n+", text) if s.strip()] or [""]
    frequency = {word: zipf_frequency(word, "en") for word in set(words)}
    content = [word for word in words if frequency[word] < 6 and not word.isdigit()]
    num_words = max(len(words), 1)

    def listed(lexicon: frozenset) -> int:
        return sum(word.replace("’", "'") in lexicon for word in words)

    return {
        "ari": textstat.automated_readability_index(text),
        "coleman_liau": textstat.coleman_liau_index(text),
        "lix": textstat.lix(text),
        "rix": textstat.rix(text),
        "syllables": sum(map(_syllables, words)) / num_words,
        "rarity": -fmean([frequency[word] for word in content] or [6.0]),
        "brevity": -log(num_words),
        "content": log1p(len(set(content))),
        "density": len(content) / num_words,
        "redundancy": 1 - len(set(content)) / max(len(content), 1),
        "sentiment": fmean(_sentiment(sentence) for sentence in sentences),
        "address": listed(ADDRESS) / num_words,
        "warmth": min((listed(WARM) + len(SIGNS.findall(text))) / len(sentences), 2.0),
        "rudeness": min(listed(RUDE) / len(sentences), 2.0),
    }


@lru_cache(maxsize=65536)
def _syllables(word: str) -> int:
    return len(_hyphenation().positions(word)) + 1


@cache
def _hyphenation() -> pyphen.Pyphen:
    return pyphen.Pyphen(lang="en_US")


def _sentiment(sentence: str) -> float:
    return _vader().polarity_scores(sentence)["compound"]


@cache
def _vader() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


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


class ProxyReward:
    r"""
    The reward of one preference: its proxy, standardised, less the guard. A reward function as TRL's trainers take.

    Args:
        name (`str`): a key of `PROXIES`.
        guard (`Guard`): shared by the rewards of one base model.
        constants (`Mapping`): mean and standard deviation of each feature, and of the proxy by its name.
    """

    def __init__(self, name: str, guard: Guard, constants: Mapping[str, tuple[float, float]]):
        self.name, self.guard, self.constants = name, guard, constants
        self.__name__ = name

    def __call__(self, prompts: list, completions: list[str], **columns) -> list[float]:
        """Rewards of completions, in the base model's standard deviations: 0 is its average style, in fluent text."""
        mean, deviation = self.constants[self.name]
        texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
        proxies = [(proxy(self.name, text_features(text), self.constants) - mean) / deviation for text in texts]
        return [value - penalty for value, penalty in zip(proxies, self.guard(prompts, texts))]


def proxy(name: str, features: Mapping[str, float], constants: Mapping[str, tuple[float, float]]) -> float:
    """A preference's proxy of a completion with these features; `constants` standardise them."""
    return weighted_proxy(PROXIES[name], features, constants)


def weighted_proxy(
    weights: Mapping[str, int], features: Mapping[str, float], constants: Mapping[str, tuple[float, float]]
) -> float:
    """Compute the weighted mean of standardised features, each clipped at three deviations."""

    def standard(feature: str) -> float:
        mean, deviation = constants[feature]
        return min(max((features[feature] - mean) / deviation, -CLIP), CLIP)

    return sum(weight * standard(feature) for feature, weight in weights.items()) / sum(map(abs, weights.values()))


def reward_constants(guard: Guard, prompts: list, completions: list[str]) -> dict[str, tuple[float, float]]:
    """Compute mean and standard deviation of every feature and proxy over a base model's completions."""
    texts = [text_features(text) for text in completions]
    sanity = guard.features(prompts, completions)
    columns = {name: [entry[name] for entry in texts] for name in texts[0]}
    columns |= {name: [entry[name] for entry in sanity] for name in ("nll", "gain", "repetition")}
    constants = {name: moments(values) for name, values in columns.items()}
    for name in PROXIES:
        constants[name] = moments([proxy(name, entry, constants) for entry in texts])
    return constants


def moments(values: list[float]) -> tuple[float, float]:
    return fmean(values), max(pstdev(values), 1e-3)


def proxy_rewards(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    constants: Mapping[str, tuple[float, float]] | None = None,
    batch_size: int = 16,
) -> dict[str, Callable]:
    r"""
    Build the six rewards, by preference.

    Args:
        model (`PreTrainedModel`), tokenizer (`PreTrainedTokenizerBase`): the base model, for the guard.
        constants (`Mapping`, *optional*): from [`reward_constants`]; defaults to those of SmolLM2-135M-Instruct.
        batch_size (`int`): completions that the base model reads at once.
    """
    constants = constants or json.loads(CONSTANTS.read_text())
    guard = Guard(model, tokenizer, constants, batch_size)
    return {name: ProxyReward(name, guard, constants) for name in PROXIES}
