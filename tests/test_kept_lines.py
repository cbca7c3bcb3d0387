"""Answers that are kept: whatever a run was stopped in the middle of, the next one goes on."""

import json
import resource

import pytest
from interruptions import stopped_at

from modeling_pcm_ensemble.evaluation import KeptLines
from modeling_pcm_ensemble.evaluation.answers import open_kept_lines

LINES = [{"key": "ä", "answer": "é"}, {"key": "愛", "answer": "🦊\u2028\x85 „so“"}, {"key": "c", "answer": ""}]
ENCODED = [(json.dumps(line, ensure_ascii=False) + "\n").encode() for line in LINES]


@pytest.mark.parametrize("length", range(sum(map(len, ENCODED)) + 1))
def test_a_file_that_is_cut_anywhere_even_inside_a_character_is_gone_on_with(tmp_path, length):
    path = tmp_path / "answers-0.jsonl"
    path.write_bytes(b"".join(ENCODED)[:length])
    whole = b"".join(ENCODED)[:length].count(b"\n")
    known, mine = open_kept_lines(tmp_path, "answers", 1)  # another process reads it, and leaves it as it is
    assert (list(known.values()), mine.lines) == (LINES[:whole], {})
    assert path.stat().st_size == length
    KeptLines(path).add(LINES[whole:])
    assert path.read_bytes() == b"".join(ENCODED)
    assert list(KeptLines(path).lines.values()) == LINES


@pytest.mark.parametrize(
    "damaged",
    [
        pytest.param(b"\0" * 30, id="zeros-after-a-power-cut"),
        pytest.param(b'{"answer": 1}', id="no-key"),
        pytest.param(b'{"key": [1]}', id="a-key-that-is-a-list"),
        pytest.param(b'["key"]', id="no-object"),
        pytest.param(b"3", id="a-number"),
        pytest.param(b'"key"', id="a-string"),
        pytest.param(b'{"key": "a", "ans', id="half"),
        pytest.param(b'{"key": "\xc3"}', id="no-character"),
        pytest.param(b"", id="empty"),
    ],
)
def test_a_damaged_line_is_named_and_the_file_left_as_it_is(tmp_path, damaged):
    path = tmp_path / "answers-0.jsonl"
    path.write_bytes(ENCODED[0] + damaged + b"\n" + ENCODED[1] + ENCODED[2][:-3])
    before = path.read_bytes()
    for read in (KeptLines, lambda path: open_kept_lines(path.parent, "answers", 0)):
        with pytest.raises(ValueError, match=r"Line 2 of .*answers-0\.jsonl is damaged.* Remove that line"):
            read(path)
    assert path.read_bytes() == before


def test_lines_that_the_disk_has_no_room_for_are_not_begun(tmp_path):
    path = tmp_path / "answers-0.jsonl"
    kept = KeptLines(path)
    kept.add(LINES[:1])

    def fill_up():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(ENCODED[0]) + 5,) * 2)
        with pytest.raises(OSError, match="File too large"):
            kept.add(LINES[1:])
        assert list(kept.lines.values()) == LINES[:1]
        assert path.read_bytes() == ENCODED[0]

    assert stopped_at(999, "killed", fill_up)
    kept.add(LINES[1:])
    assert path.read_bytes() == b"".join(ENCODED)


def test_a_finished_file_is_only_read(tmp_path):
    path = tmp_path / "answers-0.jsonl"
    path.write_bytes(b"".join(ENCODED))
    before = path.stat()
    assert list(KeptLines(path).lines.values()) == LINES
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert "c" in KeptLines(path)
    assert KeptLines(path)["c"] == LINES[2]
    assert KeptLines(tmp_path / "new" / "answers.jsonl").lines == {}
