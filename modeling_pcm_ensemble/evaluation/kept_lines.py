"""A file of lines that survives a kill."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from threading import Lock


class KeptLines:
    """
    A JSONL file of lines with a key, for one writer: whatever a killed run had written whole is there again.

    Raises:
        ValueError: if a line is damaged, see [`read_lines`].
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.lines: dict[str, dict] = {}
        self._lock = Lock()
        if path.exists():
            self.lines, whole = read_lines(path)
            if path.stat().st_size > whole:  # cut off in the middle of a line
                os.truncate(path, whole)

    def __contains__(self, key: str) -> bool:
        return key in self.lines

    def __getitem__(self, key: str) -> dict:
        return self.lines[key]

    def add(self, lines: Iterable[dict]):
        """Append lines: all of them, or, where that fails, none."""
        new = {line["key"]: line for line in lines}
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in new.values())
        rest = memoryview(text.encode())

        with self._lock, self.path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except BaseException:
                file.truncate(before)  # or the next line would go on in the middle of this one
                raise
            self.lines |= new


def read_lines(path: Path) -> tuple[dict[str, dict], int]:
    """
    Read the whole lines of a JSONL file; what stands behind the last newline is still being written, or was cut off.

    Returns:
        The lines by their key, and how many bytes they take.

    Raises:
        ValueError: if a whole line is not a JSON object with a key, naming the file and the line.
    """
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1  # before decoding, for the cut may be inside a character

    lines: dict[str, dict] = {}
    for number, line in enumerate(content[:whole].split(b"\n")[:-1], start=1):
        try:
            entry = json.loads(line.decode())
            lines[entry["key"]] = entry
        except (ValueError, KeyError, TypeError) as error:  # not UTF-8 or JSON, no key, no object
            raise ValueError(
                f"Line {number} of {path} is damaged: it must be a JSON object with a `key`, and begins with "
                f"{line[:40]!r}. Remove that line; what it held is then made again."
            ) from error
    return lines, whole


__all__ = ["KeptLines", "read_lines"]
