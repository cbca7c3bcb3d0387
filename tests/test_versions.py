"""Libraries that are too old."""

import subprocess
import sys

import pytest
from oldest_versions import oldest

from modeling_pcm_ensemble.requirements import OLDEST

IMPORT = """
import importlib.metadata
version = importlib.metadata.version
importlib.metadata.version = lambda name: "0.1" if name == {name!r} else version(name)
import modeling_pcm_ensemble
"""


@pytest.mark.parametrize("name", OLDEST)
def test_a_library_that_is_too_old_is_named(name):
    found = subprocess.run([sys.executable, "-c", IMPORT.format(name=name)], capture_output=True, text=True)
    assert f"{name}>={OLDEST[name]} is required" in found.stderr
    assert f"pip install -U {name}" in found.stderr


def test_the_bounds_are_those_of_the_package():
    assert oldest().items() >= OLDEST.items()
