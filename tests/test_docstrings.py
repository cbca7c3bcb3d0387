"""Examples in docstrings run as they stand."""

import doctest
import importlib

import pytest

MODULES = ["merging"]


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name):
    module = importlib.import_module(f"modeling_pcm_ensemble.{name}")
    failed, attempted = doctest.testmod(module)
    assert attempted > 0
    assert failed == 0
