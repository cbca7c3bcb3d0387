"""
Where torch keeps compiled code from process to process: whose the folders are, how large, how they are cleared.

    python -m modeling_pcm_ensemble.compile_cache           # where they are, and their size
    python -m modeling_pcm_ensemble.compile_cache --clear
"""

import argparse
import os
import re
import shutil
import stat
import sys
from contextlib import suppress
from pathlib import Path

# What torch makes in them: these, and folders by the first letters of a digest.
TORCHS = ("fxgraph", "aotautograd", "locks", "cache", "triton", "dynamo", "precompiled_headers")
DIGEST = re.compile(r"[a-z2-7]{2}")


def cache_folders() -> list[Path]:
    """Return torch's folders: one in the folder for temporary files, and `TORCHINDUCTOR_CACHE_DIR` if it is set."""
    # There is no public name; and it is slow to import
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folders = [default_cache_dir(), os.environ.get("TORCHINDUCTOR_CACHE_DIR")]  # headers are always in the first
    return [Path(folder).absolute() for folder in dict.fromkeys(folders) if folder]


def check_cache_folders():
    """
    Make the folders for this user alone, where there are none yet; see that nobody else can have put code into them.

    Raises:
        PermissionError: if one cannot be written to; or if one, something in it, or a folder or link on the way to it
            belongs to somebody else or can be written by others.
    """
    if not hasattr(os, "getuid"):  # Windows, where temporary folders are one user's
        return

    for folder in cache_folders():
        for path in (*reversed(folder.parents), folder):
            path.mkdir(mode=0o700, exist_ok=True)
        if _is_own(folder) and not any(folder.iterdir()):
            folder.chmod(0o700)  # importing torch may have made it, for everybody
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(
                f"torch keeps compiled code in {folder}, and this user cannot write there. Set "
                "TORCHINDUCTOR_CACHE_DIR and TMPDIR to folders where that is possible."
            )

        is_closed = not folder.stat().st_mode & 0o077  # then nobody gets to what is in it
        walk = [] if is_closed else os.walk(folder)
        inside = [Path(root, name) for root, folders, files in walk for name in (*folders, *files)]
        ways = {*folder.parents, *folder.resolve().parents}
        for path in (folder, folder.resolve(), *ways, *inside):
            if _others_can_write(path, is_way=path in ways):
                raise PermissionError(
                    f"torch keeps compiled code in {folder}, and others than this user can write to {path}: what they "
                    f"put there would be run. Call `chmod go-w {path}` and clear what is there (`python -m "
                    "modeling_pcm_ensemble.compile_cache --clear`), or set TORCHINDUCTOR_CACHE_DIR and TMPDIR to "
                    "folders that only you can write to."
                )


def _is_own(path: Path) -> bool:
    return path.stat().st_uid == os.getuid()


def _others_can_write(path: Path, is_way: bool) -> bool:
    """Whether others can change a file, put files into a folder or, on the way to it, another folder in its place."""
    try:
        status = path.lstat()
    except FileNotFoundError:  # a process that compiles meanwhile has deleted it
        return False
    if status.st_uid not in ({os.getuid(), 0} if is_way else {os.getuid()}):
        return True
    is_sticky = is_way and status.st_mode & stat.S_ISVTX  # as /tmp: only owners can rename or delete
    is_link = stat.S_ISLNK(status.st_mode)  # whose mode says nothing
    return not is_sticky and not is_link and bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clear", action="store_true", help="delete what is kept; it is compiled again when needed")
    is_cleared = parser.parse_args(arguments).clear

    folders = [folder for folder in cache_folders() if folder.exists()]
    for folder in folders:
        print(f"{folder}: {_size(folder) / 1e6:.0f} MB")
    if is_cleared:
        for folder in folders:
            _check_torchs(folder)
        for folder in folders:
            _clear(folder)


def _size(folder: Path) -> int:
    """Return the bytes of all files in it."""
    size = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # a process that compiles meanwhile has deleted it
            size += path.lstat().st_size if path.is_file() else 0
    return size


def _check_torchs(folder: Path):
    """End the program if there is something in a folder that is not torch's."""
    names = [path.name for path in folder.iterdir()]
    others = [name for name in names if name not in TORCHS and not DIGEST.fullmatch(name)]
    if others or (names and not set(names) & set(TORCHS)):
        sys.exit(f"Nothing was deleted: {', '.join(others[:3] or names[:3])} in {folder} is not torch's.")


def _clear(folder: Path):
    try:
        shutil.rmtree(folder)
    except OSError as error:
        sys.exit(f"{folder} could not be deleted: {error}")
    print(f"Cleared: {folder}")


__all__ = ["cache_folders", "check_cache_folders"]

if __name__ == "__main__":
    main()
