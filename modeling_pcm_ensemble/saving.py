"""Writing a checkpoint so that no half of one ever loads."""

import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

CONFIG, STAGING = "config.json", ".saving-"


@contextmanager
def staged_folder(target: str, variant: str | None = None) -> Iterator[str]:
    """
    Give a folder inside `target` to write a checkpoint to, and move its files up at the end, in place of
    older weights of the same variant.

    Interrupted while writing, `target` stays as it was. Interrupted while moving, it has no config.json, without
    which nothing loads it.
    """
    os.makedirs(target, exist_ok=True)
    for left_behind in glob.glob(os.path.join(glob.escape(target), f"{STAGING}*")):
        shutil.rmtree(left_behind)
    infix = "" if variant is None else re.escape(f".{variant}")
    stale = re.compile(rf"model{infix}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{infix}\.json")
    with tempfile.TemporaryDirectory(prefix=STAGING, dir=target) as staging:
        yield staging
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
