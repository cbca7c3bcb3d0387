"""Refuse libraries that are too old by name: a checkpoint's code meets whatever its user has installed."""

from transformers.utils.versions import require_version

# The lower bounds of pyproject.toml; tests/oldest_versions.py runs the tests with them.
OLDEST = {"torch": "2.13", "transformers": "5.21", "huggingface_hub": "1.31", "filelock": "3.24"}

for _name, _version in OLDEST.items():
    require_version(f"{_name}>={_version}", f"Run `pip install -U {_name}` to use a PCM ensemble.")

__all__ = ["OLDEST"]
