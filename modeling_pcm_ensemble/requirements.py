"""Refuse what is too old or missing by name: a checkpoint's code meets whatever its user has installed."""

import importlib

from transformers.utils.versions import require_version

# The lower bounds of pyproject.toml; tests/oldest_versions.py runs the tests with them.
OLDEST = {"torch": "2.11", "transformers": "5.19", "huggingface_hub": "1.31", "filelock": "3.24"}
OLDEST_TO_RUN = "5.21"  # the first transformers whose models predict from positions of each row's own
OLDEST_TO_COMPILE = "2.13"  # the first torch whose `torch.compile` takes `isolate_recompiles`

for _name, _version in OLDEST.items():
    require_version(f"{_name}>={_version}", f"Run `pip install -U {_name}` to use a PCM ensemble.")


def check_runs():
    """
    Check that models can run with the transformers that is installed. An older one reads configurations and
    preferences, which is all that vLLM needs of it.

    Raises:
        ImportError: if it is older than 5.21.
    """
    require_version(
        f"transformers>={OLDEST_TO_RUN}",
        "Run `pip install -U transformers` to run an ensemble in this process; vLLM serves one with what it installs.",
    )


def check_compiles():
    """
    Check that steps can be compiled with the torch that is installed.

    Raises:
        ImportError: if it is older than 2.13, whose `torch.compile` keeps apart what it compiles for each submodel.
    """
    require_version(
        f"torch>={OLDEST_TO_COMPILE}",
        "Run `pip install -U torch` to compile steps, or pass `disable_compile=True` to `generate`.",
    )


def endpoints():
    """
    Import what asks endpoints. It is no part of the code that a checkpoint brings.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        return importlib.import_module("modeling_pcm_ensemble.endpoints")
    except ImportError as error:
        raise ImportError(
            "Experts behind an endpoint need the package with its extra: `pip install 'pcm-ensemble[endpoints]'` "
            f"({error})."
        ) from error


__all__ = ["OLDEST", "OLDEST_TO_COMPILE", "OLDEST_TO_RUN", "check_compiles", "check_runs", "endpoints"]
