"""What killed processes left outside of steps is removed after the grace time; what is in use is never half removed."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arc_dist.checkpoint_store import Store
from arc_dist.checkpoint_store.orphans import Orphan, collect_orphans, find_orphans
from arc_dist.checkpoint_store.pins import read_marks
from arc_dist.cli import main as arc
from arc_dist.errors import Fenced, StoreGone
from crash_disk import Killed
from os_calls import NAMESPACE_AND_DATA, Call, OsCalls
from store_helpers import save

DAY = 86400.0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "ckpt", owner="job")
    store.check_writable()
    save(store, 1)
    return store


def run_of(store: Store) -> Path:
    return Path(store.url) / "run"


def collect(store: Store, after_s: float) -> list[Orphan]:
    return collect_orphans(store.backend, "run", now=time.time() + after_s)


def hidden(store: Store) -> list[str]:
    return sorted(path.name for path in run_of(store).iterdir() if path.name.startswith(".") or "claim" in path.name)


class At(OsCalls):
    """Does something instead of, or before, the first call that fits; without hard links if so wanted."""

    def __init__(self, store: Store, name: str, part: str, then: Callable[[], None], *, links: bool = True) -> None:
        super().__init__(Path(store.url))
        self.name, self.part, self.then, self.links = name, part, then, links
        self.fired = False

    def rule(self, call: Call) -> Callable[[], Any]:
        if not self.fired and call.name == self.name and self.part in call.paths[0]:
            self.fired = True
            self.then()
        if call.name == "link" and not self.links:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return super().rule(call)


def die() -> None:
    raise Killed


class Dies(At):
    """The process is dead from that call on: nothing that its handlers would clean up is cleaned up."""

    def rule(self, call: Call) -> Callable[[], Any]:
        if self.fired and call.name in NAMESPACE_AND_DATA:
            raise Killed
        return super().rule(call)


def killed_at(store: Store, name: str, part: str, action: Callable[[], Any], *, links: bool = True) -> None:
    at = Dies(store, name, part, die, links=links)
    with pytest.MonkeyPatch.context() as patch:
        at.install(patch)
        with pytest.raises(Killed):
            action()
    assert at.fired


LEFT = [
    ("rename", ".claim-", lambda store: save(store, 2), ".claim-"),
    ("open", "attempt.json", lambda store: save(store, 2), ".claim-"),
    ("link", ".marks-", lambda store: store.pin(1), ".marks-"),
    ("fsync", ".owner-", lambda store: store.take_over(), ".owner-"),
    ("link", ".probe-", lambda store: store.check_writable(), "..probe-"),
]


@pytest.mark.parametrize(("call", "part", "action", "left"), LEFT, ids=[f"{c}-{p}" for c, p, _, _ in LEFT])
def test_what_dead_processes_leave_goes_after_the_grace_time_and_not_before(
    store: Store, call: str, part: str, action: Callable[[Store], Any], left: str
) -> None:
    killed_at(store, call, part, lambda: action(store))
    (name,) = hidden(store)
    assert name.startswith(left)
    assert collect(store, after_s=DAY - 60) == []
    assert hidden(store) == [name]
    (found,) = find_orphans(store.backend, "run", now=time.time() + DAY + 60)
    assert (found.directory, found.step, found.due, found.drafts) == ("", None, True, (name,))
    (orphan,) = collect(store, after_s=DAY + 60)
    assert orphan.removed
    assert hidden(store) == []
    assert collect(store, after_s=9 * DAY) == []
    action(store)
    assert store.open(1).verify() == []


def test_a_probe_that_was_not_removed_goes(store: Store) -> None:
    (run_of(store) / f".probe-{'0f' * 16}").write_bytes(b"x")
    assert [orphan.removed for orphan in collect(store, after_s=2 * DAY)] == [True]
    assert hidden(store) == []


def test_names_that_are_not_ours_stay(store: Store) -> None:
    run = run_of(store)
    elsewhere = run.parent / "elsewhere"
    for path in (run / ".claim-mine", run / f".claim-{'0' * 32}", elsewhere):
        path.mkdir()
    (run / f".claim-{'0' * 32}" / "notes.txt").write_text("mine")
    (elsewhere / "attempt.json").write_text("mine")
    (run / f".claim-{'1' * 32}").symlink_to(elsewhere)
    for name in (".hidden", "draft.tmp", ".nfs000", f".probe-{'0' * 31}"):
        (run / name).write_text("mine")
    before = sorted(run.parent.rglob("*"))
    assert collect(store, after_s=9 * DAY) == []
    assert sorted(run.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("call", "part", "action"), [LEFT[0][:3], LEFT[2][:3], LEFT[3][:3]], ids=["claim", "marks", "owner"]
)
def test_a_process_that_slept_for_days_fails_and_leaves_nothing(
    store: Store, call: str, part: str, action: Callable[[Store], Any]
) -> None:
    """Its claim or draft is collected between two of its calls: no half step, no half mark; it may try again."""
    at = At(
        store, call, part, lambda: [orphan.removed for orphan in collect(store, after_s=2 * DAY)] == [True] or die()
    )
    with pytest.MonkeyPatch.context() as patch:
        at.install(patch)
        with pytest.raises(StoreGone):
            action(store)
    assert at.fired
    assert hidden(store) == []
    assert [path.name for path in run_of(store).glob("step-*")] == ["step-00000001"]
    assert read_marks(store.backend, "run").number == 0
    action(store)


def test_the_right_to_a_name_that_was_never_used_goes_too(store: Store) -> None:
    """Without hard links: who died between its claim and the rename would keep all others from taking the run over."""
    killed_at(store, "rename", ".owner-", store.take_over, links=False)
    assert [name.split(".")[-1] for name in hidden(store)] == ["tmp", "claim"]
    with pytest.MonkeyPatch.context() as patch:
        At(store, "none", "", die, links=False).install(patch)
        with pytest.raises(Fenced, match="take over run"):
            store.take_over()
        assert [orphan.removed for orphan in collect(store, after_s=2 * DAY)] == [True]
        assert hidden(store) == []
        store.take_over()


def test_a_right_that_was_used_stays(store: Store) -> None:
    at = At(store, "none", "", die, links=False)
    with pytest.MonkeyPatch.context() as patch:
        at.install(patch)
        store.take_over()
        store.pin(1)
    assert hidden(store) == ["marks-00000001.json.claim", "owner-00000001.json.claim"]
    assert collect(store, after_s=9 * DAY) == []


def test_a_commit_that_died_with_the_right_to_the_manifest_is_collected(store: Store) -> None:
    killed_at(store, "rename", ".manifest.json", lambda: save(store, 2), links=False)
    assert (run_of(store) / "step-00000002" / "manifest.json.claim").exists()
    with pytest.MonkeyPatch.context() as patch:
        At(store, "none", "", die, links=False).install(patch)
        (orphan,) = collect(store, after_s=2 * DAY)
    assert (orphan.directory, orphan.removed) == ("step-00000002", True)
    assert [path.name for path in run_of(store).glob("step-*")] == ["step-00000001"]


def test_the_command_line_says_what_it_removed(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    (run_of(store) / f".claim-{'0f' * 16}").mkdir()
    os.utime(run_of(store) / f".claim-{'0f' * 16}", (1.0, 1.0))
    assert arc(["prune", store.url, "--orphans", "--dry-run"]) == 0
    assert "run: would remove, 0 B, left over: 1 claims and drafts" in capsys.readouterr().out
    assert arc(["prune", store.url, "--orphans"]) == 0
    assert "run: removed" in capsys.readouterr().out
    assert hidden(store) == []
