"""Preferences as they are typed, and what is counted of answers."""

import argparse
import io

import pytest
import torch
from conftest import tiny_tokenizer
from rich.console import Console
from rich.live import Live

from modeling_pcm_ensemble.terminal import AnswerTable, _up_to_end, parse_preference

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
        ("friendly=2, friendly=0.5", "'friendly' is there twice"),
    ],
    ids=["no number", "a word", "unknown", "below 0", "twice"],
)
def test_what_cannot_be_read_is_named(text, words):
    with pytest.raises(argparse.ArgumentTypeError, match=words):
        parse_preference(text, NAMES)


def test_brackets_of_an_answer_and_of_a_title_are_drawn_as_they_are():
    drawn = io.StringIO()
    with Live(console=Console(file=drawn, width=100), auto_refresh=False) as live:
        table = AnswerTable(tiny_tokenizer(), ["told [b]this[/b]"], live, {"before": "see a[i] [/INST] [citation]"})
        table.put(torch.tensor([[5]]))
        table.put(torch.tensor([7]))
        table.end()
    for text in ("told [b]this[/b]", "see a[i] [/INST] [citation]"):
        assert text in drawn.getvalue()


@pytest.mark.parametrize("end_ids", [2, [2, 9]], ids=["one end", "several"])
def test_an_answers_end_counts_and_what_pads_it_does_not(end_ids):
    tokens = torch.tensor([[5, 2, 2, 2], [5, 6, 7, 8], [5, 6, 2, 0]])
    expected = [[True, True, False, False], [True] * 4, [True, True, True, False]]
    assert _up_to_end(tokens, end_ids).tolist() == expected
    assert _up_to_end(tokens, None).all()
