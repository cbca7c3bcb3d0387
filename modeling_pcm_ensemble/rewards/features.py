r"""
Features of a text's style, from which proxies of preferences are made.

| feature | what it is | source |
|---|---|---|
| ari, coleman_liau, lix, rix | readability formulas; higher is harder | textstat |
| syllables | syllables a word | pyphen's hyphenation |
| rarity | how rare the content words are, in orders of magnitude of frequency | wordfreq's Zipf scale |
| brevity, content | minus log of words; log of distinct content words (Zipf below 6) | |
| density, redundancy | share of words that are content words; of content words, said before (without any: 1) | |
| sentiment | mean compound sentiment of the sentences | VADER (Hutto and Gilbert, 2014) |
| address | share of words of talk, such as you, we, I | list below |
| warmth, rudeness | warm words and signs, rude words, each a sentence | lists below |
"""

import re
from functools import cache, lru_cache
from math import log, log1p
from statistics import fmean

import pyphen
import textstat
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
from wordfreq import zipf_frequency

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


@lru_cache(maxsize=8192)
def text_features(text: str) -> dict[str, float]:
    """Compute the features in the table above for one completion."""
    words = re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())
    sentences = [s for s in re.split(r"(?<=[.!?])\s+|\n+", text) if s.strip()] or [""]

    frequency = {word: zipf_frequency(word, "en") for word in set(words)}
    content = [word for word in words if frequency[word] < 6 and not word.isdigit()]
    num_words = max(len(words), 1)

    def listed(lexicon: frozenset[str]) -> int:
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
