"""
Check an ensemble's folder, write its model card, upload both, and check what can then be pulled.

    python -m hub_upload FOLDER owner/name [--private] [--thin] [--revision BRANCH] [--results report.json]
        [--datasets owner/data] [--endpoints ADDRESS[=VARIABLE] …] [--dry-run]

A failed check uploads nothing. An interrupted upload can be run again: what has arrived is not sent twice.
"""

import argparse
import sys

from .upload import hub_upload


def endpoint(text: str) -> tuple[str, str | None]:
    """Read an address, and the variable behind it, if any."""
    address, _, variable = text.partition("=")
    return address, variable or None


def main():
    """Upload as the command line says; a failed check is one line."""
    parser = argparse.ArgumentParser(
        prog="python -m hub_upload", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="what `save_pretrained` wrote")
    parser.add_argument("repo_id", metavar="owner/name")
    parser.add_argument("--private", action="store_true", default=None, help="for a new repository")
    parser.add_argument("--thin", action="store_true", help="name the backbones by repository and commit")
    parser.add_argument("--revision", help="the branch to push to; made if it is not there")
    parser.add_argument("--results", help="report.json of an evaluation, for the card")
    parser.add_argument("--datasets", nargs="+", help="what the PCM was trained on, for the card")
    parser.add_argument(
        "--endpoints",
        nargs="+",
        type=endpoint,
        metavar="ADDRESS[=VARIABLE]",
        help="that experts are behind, which the checks may ask, with the environment variable that holds a key",
    )
    parser.add_argument("--dry-run", action="store_true", help="check, write the card and show, but upload nothing")

    arguments = vars(parser.parse_args())
    arguments["endpoints"] = dict(arguments["endpoints"] or ())
    try:
        hub_upload(**arguments)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
