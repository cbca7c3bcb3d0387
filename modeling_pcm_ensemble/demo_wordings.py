"""
Wordings of the six preferences of demo.py, with the strengths that they mean: 0 for what is denied, 0.5 for a little,
1 where no degree is told, up to 1.9 for as much as can be.

The texts, in demo_wordings.json, were written for this package. No phrase of the split `"held_out"` occurs in what is
composed of the split `"training"`: no adjective, degree, frame, clause, denial, sentence, reader or situation.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .preference import Preference

SPLITS = ("training", "held_out")
WORDINGS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
EXPERTS = list(WORDINGS["adjectives"]["training"])
DENIED = 0.0
LEVELS = sorted(map(float, WORDINGS["degrees"]["training"]))  # the strengths that degrees tell
WISHES = (1, 2, 3, 4)  # experts that a text wishes for
WISHES_SHARES = (0.3, 0.35, 0.2, 0.15)

Wording = tuple[str, dict[str, float]]  # a text, and the strengths of the experts that it names
Parts = dict[str, Any]  # the phrases of one split


def compose(generator: random.Random, split: str, kind: str | None = None) -> Wording:
    """
    Compose a text that wishes for one to four experts.

    Args:
        generator (`random.Random`): draws everything.
        split (`str`): `"training"` or `"held_out"`: whose phrases are used.
        kind (`str`, *optional*): one of `KINDS`; drawn by their shares if not given.

    Returns:
        The text, and the strength that it means for each expert that it names, 0 where it is denied. Experts that are
        not named are not wished for.

    Raises:
        ValueError: if there is no such split or kind.

    Example:

    ```python
    >>> import random
    >>> from modeling_pcm_ensemble.demo_wordings import compose

    >>> text, strengths = compose(random.Random(0), "training")

    ```
    """
    parts = _parts(split)
    if kind is None:
        kind = generator.choices(list(KINDS), [share for _, share in KINDS.values()])[0]
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(map(repr, KINDS))}, got {kind!r}.")
    return KINDS[kind][0](generator, parts)


def in_words(preference: Preference, split: str = "held_out", seed: int = 0) -> str:
    """
    Tell a preference's weights by degrees: `"Be very concise and a little friendly."`. A greater weight has a degree
    that is as strong or stronger; a weight above 1.9, the strongest.

    Args:
        preference (`Preference`): of experts of demo.py.
        split (`str`, defaults to `"held_out"`): whose phrases are used.
        seed (`int`, defaults to 0): another one has other words.

    Raises:
        ValueError: if there is no such split, an expert without adjectives, no expert, or a weight that is not above
            0: words deny, and do not steer away.
    """
    if unknown := set(preference.weights) - set(EXPERTS):
        raise ValueError(f"There are wordings of {', '.join(EXPERTS)}, and none of {', '.join(sorted(unknown))}.")

    if not preference.weights or min(preference.weights.values()) <= 0:
        raise ValueError(f"Degrees tell weights above 0, of one expert or more, got {preference.label!r}.")

    generator, parts = random.Random(seed), _parts(split)
    told = {name: nearest_level(weight) for name, weight in preference.weights.items()}
    return _framed(generator, parts, _phrases(generator, parts, told))


def nearest_level(weight: float) -> float:
    """Return the strength nearest to a weight above 0 that degrees can tell."""
    return min((level for level in LEVELS if level > DENIED), key=lambda level: abs(level - weight))


def _parts(split: str) -> Parts:
    if split not in SPLITS:
        raise ValueError(f"`split` must be 'training' or 'held_out', got {split!r}.")
    return {name: part[split] for name, part in WORDINGS.items() if isinstance(part, dict)}


# Phrases


def _phrases(generator: random.Random, parts: Parts, strengths: dict[str, float]) -> list[str]:
    """Put each expert at its strength: "very concise"."""
    return [
        generator.choice(parts["degrees"][f"{strength:g}"]).format(generator.choice(parts["adjectives"][name]))
        for name, strength in strengths.items()
    ]


def _framed(generator: random.Random, parts: Parts, phrases: list[str]) -> str:
    """Join phrases, and make a text of them."""
    *others, last = phrases
    text = generator.choice(parts["links"]).join([", ".join(others), last]) if others else last
    return _capitalised(generator.choice(parts["frames"]).format(text))


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith((".", "?", "!")) else f"{sentence}."


def _drawn_strengths(generator: random.Random, wished: int, denied: int = 0) -> dict[str, float]:
    """Draw experts, and a strength for each; in any order."""
    names = generator.sample(EXPERTS, wished + denied)
    wishes = {name: generator.choice([level for level in LEVELS if level > DENIED]) for name in names[:wished]}
    strengths = wishes | dict.fromkeys(names[wished:], DENIED)
    return dict(generator.sample(list(strengths.items()), len(strengths)))


# Kinds of texts


def _degrees(generator: random.Random, parts: Parts) -> Wording:
    """Adjectives with degrees: "Be very concise and a little friendly."."""
    strengths = _drawn_strengths(generator, *generator.choices(WISHES, WISHES_SHARES))
    return _framed(generator, parts, _phrases(generator, parts, strengths)), strengths


def _denied(generator: random.Random, parts: Parts) -> Wording:
    """The same, with one or two experts denied: "Be concise, but not friendly."."""
    strengths = _drawn_strengths(generator, wished=generator.choice([1, 2]), denied=generator.choice([1, 1, 2]))
    return _framed(generator, parts, _phrases(generator, parts, strengths)), strengths


def _comparison(generator: random.Random, parts: Parts) -> Wording:
    """Adjectives in an order: "Be more concise than friendly."."""
    pattern, levels = generator.choice(parts["comparisons"])
    names = generator.sample(EXPERTS, len(levels))
    adjectives = [generator.choice(parts["adjectives"][name]) for name in names]
    return _framed(generator, parts, [pattern.format(*adjectives)]), dict(zip(names, map(float, levels)))


def _clauses(generator: random.Random, parts: Parts) -> Wording:
    """Sentences with degrees: "Keep it short, but only a little."."""
    strengths = _drawn_strengths(generator, wished=generator.choice([1, 1, 2, 3]), denied=generator.choice([0, 0, 1]))
    sentences = []
    for name, strength in strengths.items():
        degree = generator.choice(parts["clause_degrees"][f"{strength:g}"])
        sentences.append(_capitalised(degree.format(generator.choice(parts["clauses"][name]))) + ".")
    return " ".join(sentences), strengths


def _denials(generator: random.Random, parts: Parts) -> Wording:
    """Sentences that deny, among wishes: "Be very concise. No jokes."."""
    strengths = _drawn_strengths(generator, wished=generator.choice([1, 2]), denied=generator.choice([1, 1, 2]))
    sentences = [
        _framed(generator, parts, _phrases(generator, parts, {name: strength}))
        if strength > DENIED
        else _capitalised(_denial(generator, parts, name))
        for name, strength in strengths.items()
    ]
    return " ".join(map(_ended, sentences)), strengths


def _denial(generator: random.Random, parts: Parts, name: str) -> str:
    """Deny an expert by what it does, or by an adjective."""
    ways = {
        "{}": parts["denials"],
        generator.choice(parts["denial_frames"]): parts["adjectives"],
        generator.choice(parts["clause_degrees"][f"{DENIED:g}"]): parts["clauses"],
    }
    way, phrases = generator.choice(list(ways.items()))
    return way.format(generator.choice(phrases[name]))


def _paraphrases(generator: random.Random, parts: Parts) -> Wording:
    """Whole sentences, without a degree."""
    names = generator.sample(EXPERTS, *generator.choices(WISHES, WISHES_SHARES))
    return " ".join(generator.choice(parts["sentences"][name]) for name in names), dict.fromkeys(names, 1.0)


def _persona(generator: random.Random, parts: Parts) -> Wording:
    """A reader or a situation, which implies wishes: "Explain it to my grandmother."."""
    if generator.random() < 0.5:
        text, strengths = generator.choice(parts["situations"])
    else:
        reader, strengths = generator.choice(parts["readers"])
        text = _capitalised(generator.choice(parts["reader_frames"]).format(reader))
    return text, {name: float(strength) for name, strength in strengths.items()}


def _persona_and_degrees(generator: random.Random, parts: Parts) -> Wording:
    """A persona, and a degree, which counts where both name an expert: "It is for an enemy. Be a little friendly."."""
    persona, implied = _persona(generator, parts)
    strengths = _drawn_strengths(generator, wished=1)
    told = _framed(generator, parts, _phrases(generator, parts, strengths))
    return " ".join(generator.sample([_ended(persona), _ended(told)], 2)), implied | strengths


KINDS: dict[str, tuple[Callable[[random.Random, Parts], Wording], float]] = {  # with their shares
    "degrees": (_degrees, 0.28),
    "denied": (_denied, 0.10),
    "comparisons": (_comparison, 0.10),
    "clauses": (_clauses, 0.14),
    "denials": (_denials, 0.10),
    "paraphrases": (_paraphrases, 0.09),
    "personas": (_persona, 0.12),
    "personas and degrees": (_persona_and_degrees, 0.07),
}
