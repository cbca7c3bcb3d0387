"""Stops a process at a chosen file operation of what it does, in one of four ways."""

import errno
import os
import signal
import sys
from collections.abc import Callable

OPERATIONS = ("os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate")
WAYS = ("killed", "interrupted", "forbidden", "disk full")


def stopped_at(number: int, way: str, work: Callable[[], object]) -> bool:
    """
    Do something in a forked process that is stopped at its `number`-th file operation. A process that was forbidden
    that operation is forbidden all that follow, and on a full disk nothing more can be written, but the beginning.

    Returns:
        Whether it had fewer operations, and came to its end.
    """
    return _ends(work, _hook(number, way))


def killed_at(event: str, path: str, work: Callable[[], object]) -> None:
    """Do something in a forked process that is killed at its first `event` whose first argument ends in `path`."""

    def hook(happens: str, arguments: tuple):
        if happens == event and str(arguments[0]).endswith(path):
            os.kill(os.getpid(), signal.SIGKILL)

    assert not _ends(work, hook)


def _ends(work: Callable[[], object], hook: Callable[[str, tuple], None]) -> bool:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            sys.addaudithook(hook)
            work()
            code = 0
        finally:
            os._exit(code)
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert ended in (0, 1, -signal.SIGKILL), ended
    return ended == 0


def _hook(number: int, way: str) -> Callable[[str, tuple], None]:
    seen, inside = 0, False

    def hook(event: str, arguments: tuple):
        nonlocal seen, inside
        writes = event == "open" and _writes(*arguments[1:3])
        if inside or not (writes or event in OPERATIONS):
            return
        seen += 1
        if seen < number:
            return
        if way == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if way == "interrupted" and seen == number:
            raise KeyboardInterrupt
        if way == "forbidden":
            raise PermissionError(errno.EACCES, "forbidden by a test")
        if way == "disk full" and writes:
            if isinstance(arguments[1], str):  # a file of Python's own, which can be made but not be filled
                inside = True
                with open(arguments[0], "ab") as file:
                    file.write(b"{")
                inside = False
            raise OSError(errno.ENOSPC, "a test's disk is full")

    return hook


def _writes(mode: str | None, flags: int) -> bool:
    return bool(set(mode) & set("wxa+")) if isinstance(mode, str) else bool(flags & (os.O_WRONLY | os.O_RDWR))
