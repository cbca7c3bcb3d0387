"""A file of lines that survives a kill."""

import json
from collections.abc import Iterable
from pathlib import Path
from threading import Lock


class KeptLines:
    """A JSONL file of lines with a key, for one writer: whatever a killed run had written whole is there again."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.lines, self._lock = path, {}, Lock()
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # cut off in the middle of a line
            path.with_suffix(".part").write_text(whole, encoding="utf-8")
            path.with_suffix(".part").replace(path)
        self.lines = parse_lines(whole)

    def __contains__(self, key: str) -> bool:
        return key in self.lines

    def __getitem__(self, key: str) -> dict:
        return self.lines[key]

    def add(self, lines: Iterable[dict]):
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            for line in lines:
                self.lines[line["key"]] = line
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def parse_lines(text: str) -> dict[str, dict]:
    """Whole lines of a JSONL file by their key; one that is still being written is left out."""
    lines = map(json.loads, text[: text.rfind("\n") + 1].split("\n")[:-1])
    return {line["key"]: line for line in lines}
