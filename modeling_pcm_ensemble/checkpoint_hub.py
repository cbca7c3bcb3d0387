"""Files and commits of a checkpoint, in a folder or in a repository of the Hub."""

import os
import re

from transformers.utils import cached_file
from transformers.utils.hub import resolve_revision

# Of `from_pretrained`'s arguments, those that say where files come from.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token", "trust_remote_code")

SNAPSHOT = re.compile(r"[/\\]models--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})$")  # a folder of the Hub's cache


def find_file(source: str | os.PathLike, name: str, **hub_options) -> str | None:
    """
    Return the path of a file that a folder or repository may hold; None where it holds none.

    Raises:
        OSError: if the repository cannot be reached, nor found in the cache.
    """
    # transformers has no public name for this: what is missing is None, and what cannot be reached is an error.
    return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub_options)


def fetch_file(source: str | os.PathLike, name: str, **hub_options) -> str:
    """
    Return the path of a file that a folder or repository must hold.

    Raises:
        OSError: if it is not there, or the repository cannot be reached, nor found in the cache.
    """
    path = cached_file(source, name, **hub_options)
    if path is None:  # not even looked for, as `cached_file` may be asked to
        raise FileNotFoundError(f"{str(source)!r} has no file {name}.")
    return path


def hub_source(name: str | os.PathLike | None, **hub_options) -> dict[str, str | None] | None:
    """
    Name what `from_pretrained(name)` loads from the Hub.

    Returns:
        `repository`, `revision` (its commit; None where it cannot be found out) and, where one is given, `subfolder`;
        None for a folder, unless it is one of the Hub's cache, as `snapshot_download` returns it.
    """
    if not name:
        return None

    if os.path.exists(name):
        snapshot = SNAPSHOT.search(os.path.abspath(name))
        if snapshot is None:
            return None
        source = {"repository": snapshot[1].replace("--", "/"), "revision": snapshot[2]}
    else:
        known = ("revision", "token", "local_files_only", "cache_dir")
        revision = resolve_revision(name, **{key: hub_options[key] for key in known if key in hub_options})
        source = {"repository": str(name), "revision": getattr(revision, "resolved", revision)}

    return source | ({"subfolder": hub_options["subfolder"]} if hub_options.get("subfolder") else {})


__all__ = ["HUB_OPTIONS", "fetch_file", "find_file", "hub_source"]
