"""
Writing files so that an interruption leaves the old ones or the new ones, never half of either.

A save writes into a hidden folder in the folder that it saves to, and marks it as whole when all files are there. From
then on they are what has been saved, and whoever comes next can go on with moving them up.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from huggingface_hub.utils import WeakFileLock
from transformers.utils import logging

logger = logging.get_logger(__name__)

STAGING, MARK, LOCK = ".saving", ".whole", ".saving.lock"  # the mark stands in the staging folder
REPLACED = ".replaced-"  # a folder that was replaced, in the staging folder
PATIENCE = 1  # seconds before a writer says that it waits

WEIGHTS = re.compile(r"model(\.(?P<variant>.+?))?(-\d{5}-of-\d{5})?\.safetensors")
INDEX = re.compile(r"model\.safetensors\.index(\.(?P<variant>.+))?\.json")
# Whatever a tokenizer or processor of transformers reads.
TOKENIZER = re.compile(
    r"""additional_chat_templates | added_tokens\.json | bpe\.codes | byte_maps\.json | chat_template\.(jinja|json)
    | dict\.txt | emoji\.json | entity_vocab\.json | merges\.txt | normalizer\.json | (pre)?processor_config\.json
    | prophetnet\.tokenizer | sentencepiece(\.bpe)?\.model | (source|target)\.spm | special_tokens_map\.json
    | sp(iece|m|m_char)\.model | target_vocab\.json | tekken\.json | tiktoken\.model | tokenizer(\.[\w.-]+)?\.json
    | tokenizer_config\.json | tokenizer\.model(\.\w+)? | vocab(-src|-tgt)?\.json | vocab\.txt
    | word_(pronunciation|shape)\.json""",
    re.VERBOSE,
)
CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
# These files finish an interrupted save when a checkpoint is loaded by its own code. They move up first, so that no
# other new file ever stands beside an old one of them.
FIRST = ("checkpoint_staging.py", "requirements.py", "configuration_pcm_ensemble.py")


@contextmanager
def staged_folder(target: str | os.PathLike) -> Iterator[str]:
    """
    Give a folder to write to, and at the end put what was written into `target`, in place of what bears its names.
    Of a checkpoint that stood there, older weights of the same variant and tokenizer files go too.

    Interrupted while writing, `target` stays as it was. Interrupted while moving, [`finish_save`] goes on. Another
    writer of `target`, thread or process, waits. Folders are replaced as a whole.

    Raises:
        OSError: if it cannot be written to.
    """
    target = os.fspath(target) or os.curdir
    os.makedirs(target, exist_ok=True)

    with _one_writer(target):
        staging = os.path.join(target, STAGING)
        _move_up(target)
        if os.path.lexists(staging):
            shutil.rmtree(staging)  # of a writer that is dead, or the lock would be held
        os.mkdir(staging)

        try:
            yield staging
            _mark_whole(staging)
        except BaseException:
            with suppress(OSError):
                os.unlink(os.path.join(staging, MARK))  # first, for it would vouch for what is removed
            shutil.rmtree(staging, ignore_errors=True)
            raise

        _move_up(target)


def finish_save(folder: str | os.PathLike) -> bool:
    """
    Put what an interrupted save has left whole in `folder` into its place.

    Returns:
        Whether there was such a thing, so that what was read from `folder` before may be out of date.

    Raises:
        OSError: if it cannot be moved.
    """
    mark = os.path.join(folder, STAGING, MARK)
    if not os.path.exists(mark):
        return False

    try:
        with _one_writer(os.fspath(folder)):
            _move_up(folder)
    except OSError as error:
        raise OSError(
            f"A save to {str(folder)!r} was interrupted. What it wrote is whole, but in part still in "
            f"{os.path.dirname(mark)!r}, from where it could not be moved up: {error}. Load it once where that folder "
            "can be written to."
        ) from error
    return True


def last_saved(folder: str | None) -> tuple[int, int] | None:
    """
    Identify the save that a folder holds.

    Returns:
        What changes whenever an ensemble is saved there; None where there is none, as for a repository.
    """
    if folder is None or not os.path.exists(path := os.path.join(folder, CONFIG)):
        return None
    found = os.stat(path)
    return found.st_ino, found.st_mtime_ns


def write_text(path: str | os.PathLike, text: str):
    """Write a text file, in UTF-8, so that an interruption leaves the old one or the new one."""
    folder, name = os.path.split(path)
    with staged_folder(folder) as staging, open(os.path.join(staging, name), "w", encoding="utf-8") as file:
        file.write(text)


def check_no_adapter(folder: str | os.PathLike):
    """
    Refuse a folder that no ensemble could be loaded from, because loading would take it for an adapter's.

    Raises:
        ValueError: if it holds a PEFT adapter.
    """
    if os.path.exists(os.path.join(folder, ADAPTER_CONFIG)):
        raise ValueError(
            f"{str(folder)!r} holds a PEFT adapter, {ADAPTER_CONFIG}, beside which an ensemble could not be loaded. "
            "Save to another folder, or move the adapter elsewhere."
        )


@contextmanager
def _one_writer(folder: str) -> Iterator[None]:
    """Hold the folder's lock. The operating system takes it from a process that dies."""
    path = os.path.join(folder, LOCK)
    with ExitStack() as held:
        try:
            held.enter_context(WeakFileLock(path, timeout=PATIENCE))
        except TimeoutError:
            logger.warning(f"Another process or thread is saving to {folder!r}. This one waits until it is done.")
            held.enter_context(WeakFileLock(path))

        try:
            yield
        finally:
            with suppress(OSError):
                os.unlink(path)  # while it is held: whoever waits for this file finds it gone and begins anew


def _mark_whole(staging: str):
    """Say that all files are there: as readable as any new file, and on the disk before the mark is."""
    names, mark = os.listdir(staging), os.path.join(staging, MARK)
    with open(mark + ".part", "w", encoding="utf-8") as file:
        json.dump(names, file)

    mode = os.stat(mark + ".part").st_mode  # by the umask, which safetensors passes over
    for folder, _, files in os.walk(staging):
        for name in files:
            path = os.path.join(folder, name)
            os.chmod(path, mode)
            with open(path, "rb+") as file:
                os.fsync(file.fileno())

    os.replace(mark + ".part", mark)


def _move_up(target: str | os.PathLike):
    """Move what is marked as whole into its place. Interrupted anywhere, it goes on when it is called again."""
    staging = os.path.join(target, STAGING)
    mark = os.path.join(staging, MARK)
    if not os.path.exists(mark):
        return

    names = _marked(mark)
    waiting = [name for name in os.listdir(staging) if name in names]
    # New weights beside the old scale would load as an adapter that nobody made; without a scale nothing loads.
    if ADAPTER_CONFIG in waiting:
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(target, ADAPTER_CONFIG))

    for name in sorted(waiting, key=_turn):
        source, destination = os.path.join(staging, name), os.path.join(target, name)
        if os.path.isdir(source) and os.path.lexists(destination):
            os.replace(destination, os.path.join(staging, REPLACED + name))
        os.replace(source, destination)

    for name in _stale(os.listdir(target), names):
        path = os.path.join(target, name)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)

    os.unlink(mark)
    shutil.rmtree(staging)


def _marked(mark: str) -> list[str]:
    """The names that a mark vouches for."""
    with open(mark, encoding="utf-8") as file:
        try:
            names = json.load(file)
        except ValueError:
            names = None

    if not isinstance(names, list):
        raise ValueError(
            f"{mark} is damaged. Remove {os.path.dirname(mark)!r}, and save or fetch the checkpoint again."
        )
    return names


def _turn(name: str) -> tuple[bool, int, str]:
    """When a file is moved up, among others."""
    early = FIRST.index(name) if name in FIRST else len(FIRST) + (not name.endswith(".py"))
    return name == ADAPTER_CONFIG, early, name


def _stale(found: list[str], written: list[str]) -> list[str]:
    """What loading would read of the checkpoint that stood there before: nothing, if what was written is none."""
    variants = {match["variant"] for name in written if (match := WEIGHTS.fullmatch(name))}
    if not variants:
        return []

    def is_read(name: str) -> bool:
        match = WEIGHTS.fullmatch(name) or INDEX.fullmatch(name)
        return match["variant"] in variants if match else bool(TOKENIZER.fullmatch(name))

    return [name for name in found if name not in written and is_read(name)]


__all__ = ["TOKENIZER", "WEIGHTS", "check_no_adapter", "finish_save", "last_saved", "staged_folder", "write_text"]
