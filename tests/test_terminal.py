"""Preferences as they are typed, and what is counted of answers."""

import argparse

import pytest
import torch

from modeling_pcm_ensemble.terminal import _up_to_end, parse_preference

NAMES = ["friendly", "concise"]


def test_preferences_are_read_as_they_are_typed():
    assert parse_preference("friendly", NAMES).weights == {"friendly": 1.0}
    assert parse_preference("concise=0.5, friendly=-1", NAMES, adds_up=True).weights == {
        "friendly": -1.0,
        "concise": 0.5,
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("friendly=", "'friendly=' must be an expert, or expert=number"),
        ("friendly,concise=much", "'concise=much' must be"),
        ("frendly", "Did you mean 'friendly'"),
        ("friendly=-1", "below 0 steers away"),
    ],
    ids=["no number", "a word", "unknown", "below 0"],
)
def test_what_cannot_be_read_is_named(text, words):
    with pytest.raises(argparse.ArgumentTypeError, match=words):
        parse_preference(text, NAMES)


@pytest.mark.parametrize("end_ids", [2, [2, 9]], ids=["one end", "several"])
def test_an_answers_end_counts_and_what_pads_it_does_not(end_ids):
    tokens = torch.tensor([[5, 2, 2, 2], [5, 6, 7, 8], [5, 6, 2, 0]])
    expected = [[True, True, False, False], [True] * 4, [True, True, True, False]]
    assert _up_to_end(tokens, end_ids).tolist() == expected
    assert _up_to_end(tokens, None).all()
