"""A file of lines that survives a kill."""

import json
from collections.abc import Iterable
from pathlib import Path


class KeptLines:
    """A JSONL file of lines with a key: whatever a killed run had written whole is there again."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.lines = path, {}
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # cut off in the middle of a line
            path.with_suffix(".part").write_text(whole)
            path.with_suffix(".part").replace(path)
        for line in map(json.loads, whole.splitlines()):
            self.lines[line["key"]] = line

    def __contains__(self, key: str) -> bool:
        return key in self.lines

    def __getitem__(self, key: str) -> dict:
        return self.lines[key]

    def add(self, lines: Iterable[dict]):
        with self.path.open("a") as file:
            for line in lines:
                self.lines[line["key"]] = line
                file.write(json.dumps(line) + "\n")
