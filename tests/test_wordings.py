"""Wordings of the demo's preferences: what is composed, and what it means."""

import random
import re
from collections.abc import Iterator

import pytest

from modeling_pcm_ensemble import Preference, demo
from modeling_pcm_ensemble.demo_wordings import (
    EXPERTS,
    KINDS,
    LEVELS,
    SPLITS,
    WORDINGS,
    compose,
    in_words,
    nearest_level,
)


def phrases(part, split: str) -> Iterator[str]:
    """The texts of a part of the data: a list, levels or experts with lists, or texts with their strengths."""
    entries = part[split]
    for entry in entries if isinstance(entries, list) else [text for texts in entries.values() for text in texts]:
        yield entry if isinstance(entry, str) else entry[0]


PARTS = {name: part for name, part in WORDINGS.items() if isinstance(part, dict)}


def words(text: str) -> str:
    """Its words alone, between blanks, so that no word is found within another."""
    return " " + " ".join(re.findall(r"[\w'-]+", text.lower())) + " "


@pytest.mark.parametrize("split", SPLITS)
def test_what_is_composed_depends_on_the_seed_alone(split):
    texts = [[compose(generator, split) for _ in range(50)] for generator in (random.Random(1), random.Random(1))]
    assert texts[0] == texts[1]
    assert compose(random.Random(2), split) != texts[0][0]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_texts_wish_for_one_to_four_experts_at_strengths_that_there_are(kind, split):
    generator = random.Random(0)
    for text, strengths in (compose(generator, split, kind) for _ in range(300)):
        assert set(strengths) <= set(demo.PREFERENCES)
        assert 1 <= sum(strength > 0 for strength in strengths.values()) <= 4
        assert all(0 <= strength < 2 for strength in strengths.values())
        assert "{" not in text
        assert text.strip() == text


def test_opposites_are_wished_for_together_and_experts_are_denied():
    generator = random.Random(0)
    told = [strengths for _, strengths in (compose(generator, "training") for _ in range(300))]
    assert any(strengths.get("friendly") and strengths.get("unfriendly") for strengths in told)
    for name in EXPERTS:
        assert any(strengths.get(name) == 0 for strengths in told), name


def pattern(phrase: str) -> str:
    """What finds a phrase in the words of a text, whatever stands in its blanks; empty for a blank alone."""
    pieces = [words(piece).strip() for piece in phrase.split("{}")]
    return " .+ ".join(re.escape(piece) for piece in pieces if piece)


def test_no_held_out_phrase_is_in_a_text_of_training():
    generator = random.Random(0)
    composed = [compose(generator, "training")[0] for _ in range(3000)]
    known = [phrase for part in PARTS.values() for phrase in phrases(part, "training")]
    told = "\n".join(map(words, composed + known))

    held_out = [pattern(phrase) for name, part in PARTS.items() for phrase in phrases(part, "held_out")]
    held_out = [phrase for phrase in held_out if phrase]
    assert len(held_out) > 150
    assert not [phrase for phrase in held_out if re.search(f" {phrase} ", told)]


def test_no_two_experts_share_a_phrase():
    for part in ("adjectives", "clauses", "denials", "sentences"):
        told = [words(phrase) for split in SPLITS for texts in WORDINGS[part][split].values() for phrase in texts]
        assert len(told) == len(set(told)), part


def test_what_one_expert_is_told_by_denies_no_other():
    clauses = {words(phrase) for split in SPLITS for phrase in phrases(PARTS["clauses"], split)}
    sentences = {words(phrase) for split in SPLITS for phrase in phrases(PARTS["sentences"], split)}
    denials = {words(phrase) for split in SPLITS for phrase in phrases(PARTS["denials"], split)}
    assert not denials & (clauses | sentences)


def test_as_many_personas_as_training_needs_and_others_to_judge_it():
    numbers = [sum(len(WORDINGS[part][split]) for part in ("readers", "situations")) for split in SPLITS]
    assert numbers[0] >= 200
    assert numbers[1] >= 20


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("part", ["degrees", "clause_degrees"])
def test_each_strength_has_degrees_of_its_own(part, split):
    degrees = WORDINGS[part][split]
    assert sorted(map(float, degrees)) == LEVELS
    told = [degree for texts in degrees.values() for degree in set(texts)]
    assert len(told) == len(set(told))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("seed", range(20))
def test_a_greater_weight_is_told_by_a_stronger_degree(seed, split):
    told = [
        level_of(in_words(Preference({"concise": weight}), split, seed), split)
        for weight in (0.2, 0.6, 1, 1.4, 1.8, 2.7)
    ]
    assert told == sorted(told) == [0.25, 0.5, 1.0, 1.5, 1.75, 1.9]


def level_of(text: str, split: str) -> float:
    """The strength at which a text wishes for conciseness."""
    parts = {name: part[split] for name, part in PARTS.items()}
    told = words(text)
    adjectives = [adjective for adjective in parts["adjectives"]["concise"] if words(adjective) in told]
    phrases_told = [
        (float(level), degree.format(adjective))
        for level, degrees in parts["degrees"].items()
        for degree in degrees
        for adjective in adjectives
        if words(degree.format(adjective)) in told
    ]
    frames = parts["frames"]
    (level,) = {
        level for level, phrase in phrases_told if any(words(frame.format(phrase)) == told for frame in frames)
    }
    return level


def test_a_preference_is_told_the_same_each_time_and_in_other_words_under_another_seed():
    preference = Preference({"concise": 1.6, "friendly": 0.4})
    texts = {in_words(preference, "held_out", seed) for seed in range(10)}
    assert len(texts) > 5
    assert in_words(preference) == in_words(preference)
    assert [nearest_level(weight) for weight in preference.weights.values()] == [1.5, 0.5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compose(random.Random(0), "test"), "`split` must be 'training' or 'held_out', got 'test'"),
        (lambda: compose(random.Random(0), "training", "odes"), "`kind` must be one of 'degrees'.* got 'odes'"),
        (lambda: in_words(Preference({"cheerful": 1.0})), "none of cheerful"),
        (lambda: in_words(Preference({"friendly": -1.0})), "Degrees tell weights above 0"),
        (lambda: in_words(Preference({})), "of one expert or more"),
    ],
)
def test_what_cannot_be_worded_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
