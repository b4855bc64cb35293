"""The journal: what a crash may leave, and what no crash leaves."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from arc_dist.coordinator import journal as module
from arc_dist.coordinator.journal import Journal
from arc_dist.errors import ConfigError, Fenced, StoreCorrupt, StoreError


def write(path: Path, *numbers: int) -> None:
    journal = Journal.open(path)
    for number in numbers:
        journal.append({"n": number})
    journal.close()


def test_the_last_state_comes_back_with_a_higher_epoch(tmp_path: Path):
    path = tmp_path / "deeper" / "journal.log"
    first = Journal.open(path)
    assert (first.epoch, first.last) == (1, None)
    first.append({"n": 1})
    first.append({"n": 2})
    first.close()
    second = Journal.open(path)
    assert (second.epoch, second.last) == (2, {"n": 2})
    second.close()
    third = Journal.open(path)  # nothing was appended in between
    assert (third.epoch, third.last) == (3, {"n": 2})
    assert path.read_bytes().count(b"\n") == 1


def test_a_line_cut_anywhere_is_as_if_it_had_not_been_written(tmp_path: Path):
    path = tmp_path / "journal.log"
    write(path, 1, 2)
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(last, len(whole)):
        path.write_bytes(whole[:cut])
        journal = Journal.open(path)
        assert journal.last == ({"n": 1} if cut < len(whole) - 1 else {"n": 2}), cut
        journal.close()


def test_an_altered_line_in_the_middle_is_refused(tmp_path: Path):
    path = tmp_path / "journal.log"
    write(path, 1, 2)
    whole = bytearray(path.read_bytes())
    whole[whole.find(b'"n":1') + 4] ^= 1
    path.write_bytes(whole)
    with pytest.raises(StoreCorrupt, match="line 2 was altered"):
        Journal.open(path)
    assert path.read_bytes() == whole
    with pytest.raises(StoreCorrupt):  # and the lock was given back
        Journal.open(path)


def test_a_failed_append_is_told_and_leaves_the_journal_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "journal.log"
    journal = Journal.open(path)
    journal.append({"n": 1})
    honest = os.write

    def half(file: int, data: bytes) -> int:
        if len(data) > 5:
            return honest(file, bytes(data)[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "write", lambda file, data: half(file, data[:6] if len(data) > 6 else b""))
    with pytest.raises(StoreError, match="No space left"):
        journal.append({"n": 2})
    monkeypatch.undo()
    journal.append({"n": 3})
    journal.close()
    assert Journal.open(path).last == {"n": 3}


def test_a_sync_that_fails_is_a_failed_append(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal = Journal.open(tmp_path / "journal.log")

    def fails(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(module.os, "fdatasync", fails)
    with pytest.raises(StoreError, match="Input/output"):
        journal.append({"n": 1})
    journal.close()
    assert Journal.open(tmp_path / "journal.log").last is None


def test_it_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_COMPACT_BYTES", 2000)
    path = tmp_path / "journal.log"
    journal = Journal.open(path)
    for number in range(300):
        journal.append({"n": number})
        assert path.stat().st_size < 2200
    journal.close()
    assert Journal.open(path).last == {"n": 299}


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="ARC_RUN_DIR"):
        Journal.open(tmp_path / "file" / "journal.log")


def test_a_journal_that_was_taken_over_is_not_written(tmp_path: Path):
    path = tmp_path / "journal.log"
    journal = Journal.open(path)
    journal.append({"n": 1})
    (tmp_path / "other").write_bytes(path.read_bytes())
    (tmp_path / "other").replace(path)  # as its successor does where the lock was lost
    with pytest.raises(Fenced, match="taken over"):
        journal.append({"n": 2})
    journal.close()
    assert Journal.open(path).last == {"n": 1}
