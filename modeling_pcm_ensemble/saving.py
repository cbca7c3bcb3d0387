"""Writing a checkpoint so that no half of one ever loads."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

CONFIG = "config.json"


@contextmanager
def staged_folder(target: str, variant: str | None = None) -> Iterator[str]:
    """
    Give a folder beside `target` to write a checkpoint to, and move its files into `target` at the end, in place of
    older weights of the same variant.

    Interrupted while writing, `target` stays as it was. Interrupted while moving, it has no config.json, without
    which nothing loads it.
    """
    target = os.path.abspath(target)
    parent, name = os.path.split(target)
    infix = "" if variant is None else re.escape(f".{variant}")
    stale = re.compile(rf"model{infix}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{infix}\.json")
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=parent) as staging:
        yield staging
        os.makedirs(target, exist_ok=True)
        for file in [CONFIG, *os.listdir(target)]:
            path = os.path.join(target, file)
            if (file == CONFIG or stale.fullmatch(file)) and os.path.exists(path):
                os.remove(path)
        for file in sorted(os.listdir(staging), key=lambda file: file == CONFIG):
            source, destination = os.path.join(staging, file), os.path.join(target, file)
            if os.path.isdir(source):
                shutil.copytree(source, destination, dirs_exist_ok=True)
            else:
                os.replace(source, destination)


__all__ = ["staged_folder"]
