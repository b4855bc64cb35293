"""What unfinished saves left is removed; a save in progress, a commit and foreign files never are."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from arc_dist.checkpoint_store import Store
from arc_dist.checkpoint_store import orphans as orphans_module
from arc_dist.checkpoint_store.backends import Backend
from arc_dist.checkpoint_store.orphans import MIN_GRACE_S, TOMBSTONE, collect_orphans, find_orphans
from arc_dist.checkpoint_store.pins import read_marks
from arc_dist.errors import ArcError, ConfigError
from store_helpers import random_tensor, save, whole

DAY = 86400.0


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    url = str(tmp_path / "ckpt") if request.param == "local" else f"memory://orphans-{uuid.uuid4().hex}"
    store = Store(url, owner="old job")
    store.check_writable()
    save(store, 1)
    return store


def begin(store: Store, step: int, *, generation: int = 0) -> dict[str, Any]:
    """All of a save but its commit."""
    tensors = [whole("model.w", random_tensor((64,)))]
    return store.write_part(step, generation=generation, rank=0, world_size=1, tensors=tensors, objects={})


def names(backend: Backend) -> set[str]:
    return {entry.name for entry in backend.list("run") if entry.is_directory}


def collect(store: Store, *, after_s: float, owner: str | None = None) -> list[tuple[str, bool]]:
    found = collect_orphans(store.backend, "run", now=time.time() + after_s, owner=owner)
    return [(orphan.directory, orphan.removed) for orphan in found]


def test_an_unfinished_save_is_removed_after_the_grace_period_and_not_before(store: Store) -> None:
    begin(store, 2)
    assert collect(store, after_s=0) == [("step-00000002", False)]
    assert collect(store, after_s=DAY - 60) == [("step-00000002", False)]
    assert names(store.backend) == {"step-00000001", "step-00000002"}
    assert collect(store, after_s=DAY + 60) == [("step-00000002", True)]
    assert names(store.backend) == {"step-00000001"}
    assert store.open(1).verify() == []
    assert collect(store, after_s=9 * DAY) == []
    assert read_marks(store.backend, "run").sightings == {}


def test_looking_changes_nothing_and_says_why(store: Store) -> None:
    begin(store, 2)
    (orphan,) = find_orphans(store.backend, "run")
    assert (orphan.directory, orphan.step, orphan.owner, orphan.due) == ("step-00000002", 2, "old job", False)
    assert orphan.nbytes > 256
    assert "may be a save in progress" in orphan.why
    assert read_marks(store.backend, "run").number == 0


def test_a_save_that_still_writes_is_never_removed(store: Store) -> None:
    """Days after it began: what counts is the last change, not the beginning."""
    backend = store.backend
    begin(store, 2)
    assert collect(store, after_s=0) == [("step-00000002", False)]
    later = time.time() + 3 * DAY
    if isinstance(store.url, str) and Path(store.url).is_dir():
        os.utime(Path(store.url) / "run" / "step-00000002" / "rank-00000.safetensors", (later, later))
    else:
        assert backend.create_exclusive("run/step-00000002/rank-00001.json", b"{}")
    assert collect(store, after_s=3 * DAY + 60) == [("step-00000002", False)]
    assert "step-00000002" in names(backend)


def test_a_job_never_collects_its_own_attempts(store: Store) -> None:
    begin(store, 2)
    collect(store, after_s=0)
    assert collect(store, after_s=9 * DAY, owner="old job") == [("step-00000002", False)]
    assert collect(store, after_s=9 * DAY, owner="new job") == [("step-00000002", True)]
    begin(store, 3)
    assert [orphan.why for orphan in store.collect_orphans()] == ["an attempt of this job"]


def test_a_commit_at_the_same_moment_wins(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    part = begin(store, 2)
    collect(store, after_s=0)
    found = orphans_module.find_orphans

    def find_then_commit(*args: Any, **options: Any) -> Any:
        orphans = found(*args, **options)
        store.commit(2, 0, 1, {0: part}, {"certified": True})
        return orphans

    monkeypatch.setattr(orphans_module, "find_orphans", find_then_commit)
    (orphan,) = collect_orphans(store.backend, "run", now=time.time() + 2 * DAY)
    assert (orphan.removed, orphan.why) == (False, "was committed at this moment")
    assert store.open(2).verify() == []


def test_a_save_that_wakes_up_during_the_removal_cannot_commit(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tombstone has the manifest's name before the first file goes; the files go before the tombstone."""
    monkeypatch.setattr(store, "_visible_timeout_s", 0.0)  # a commit waits for late files
    part = begin(store, 2)
    collect(store, after_s=0)
    seen: list[bool] = []
    backend = store.backend
    remove = backend.remove

    def remove_and_try(path: str) -> None:
        if path.startswith("run/step-00000002/") and not path.endswith("manifest.json"):
            assert backend.read("run/step-00000002/manifest.json", 4096) == TOMBSTONE
            with pytest.raises(ArcError):
                store.commit(2, 0, 1, {0: part}, {"certified": True})
            seen.append(True)
        remove(path)

    monkeypatch.setattr(backend, "remove", remove_and_try)
    assert collect(store, after_s=2 * DAY) == [("step-00000002", True)]
    assert len(seen) == 3
    assert names(backend) == {"step-00000001"}


def test_an_interrupted_removal_is_no_step_and_is_finished(store: Store) -> None:
    begin(store, 2)
    assert store.backend.create_exclusive("run/step-00000002/manifest.json", TOMBSTONE)
    store.backend.remove("run/step-00000002/rank-00000.safetensors")
    assert [info.step for info in store.steps()] == [1]
    newest = store.newest()
    assert newest is not None and newest.step == 1
    (orphan,) = find_orphans(store.backend, "run")
    assert orphan.due
    assert orphan.why == "its removal had begun"
    assert collect(store, after_s=0) == [("step-00000002", True)]
    assert names(store.backend) == {"step-00000001"}


def test_a_half_deleted_step_is_an_orphan(store: Store) -> None:
    save(store, 2)
    for name in ("manifest.json", "attempt.json"):
        store.backend.remove(f"run/step-00000002/{name}")
    collect(store, after_s=0)
    assert collect(store, after_s=2 * DAY) == [("step-00000002", True)]


def test_damaged_steps_and_foreign_files_stay(tmp_path: Path) -> None:
    store = Store(tmp_path / "ckpt", owner="old job")
    store.check_writable()
    for step in (1, 2, 3):
        begin(store, step) if step > 1 else save(store, step)
    run = tmp_path / "ckpt" / "run"
    (run / "step-00000001" / "manifest.json").write_bytes(b"{")
    (run / "step-00000002" / "notes.txt").write_text("mine")
    (run / "step-00000003" / ".cache").mkdir()
    (run / "mine").mkdir()
    assert collect(store, after_s=9 * DAY) == [("step-00000002", False), ("step-00000003", False)]
    found = find_orphans(store.backend, "run", now=time.time() + 9 * DAY)
    assert all("not ours" in orphan.why for orphan in found)
    assert names(store.backend) == {"step-00000001", "step-00000002", "step-00000003", "mine"}


def test_a_clock_in_the_past_removes_nothing(store: Store) -> None:
    begin(store, 2)
    assert collect(store, after_s=-9 * DAY) == [("step-00000002", False)]


def test_a_short_grace_period_is_refused(store: Store) -> None:
    for grace_s in (0.0, MIN_GRACE_S - 1, float("nan")):
        with pytest.raises(ConfigError, match="may pause that long"):
            collect_orphans(store.backend, "run", grace_s=grace_s)
    assert collect_orphans(store.backend, "other run") == []


def test_old_drafts_in_a_checkpoint_go_and_the_checkpoint_stays(tmp_path: Path) -> None:
    store = Store(tmp_path / "ckpt", owner="old job")
    store.check_writable()
    save(store, 1)
    directory = tmp_path / "ckpt" / "run" / "step-00000001"
    (directory / ".rank-00000.safetensors.77-0123abcd.tmp").write_bytes(b"half")
    assert collect(store, after_s=60) == []
    (orphan,) = find_orphans(store.backend, "run", now=time.time() + 2 * DAY)
    assert (orphan.due, orphan.nbytes, len(orphan.drafts)) == (True, 4, 1)
    assert collect(store, after_s=2 * DAY) == [("step-00000001", True)]
    assert not [path for path in directory.iterdir() if path.name.startswith(".")]
    assert store.open(1).verify() == []
    assert collect(store, after_s=2 * DAY) == []


def started(root: Path | str, owner: str) -> Store:
    store = Store(str(root), owner=owner)
    store.check_writable()
    store.take_over()
    return store


def test_a_job_removes_at_once_what_its_earlier_starts_left_unfinished_and_nothing_else(tmp_path: Path) -> None:
    first = started(tmp_path, "start 1")
    save(first, 1)
    begin(first, 2)
    begin(first, 3)  # a copy of it may be under way: another tier holds it
    begin(Store(str(tmp_path), owner="stranger"), 4)
    second = started(tmp_path, "start 2")
    begin(second, 5)
    assert first.collect_own() == []  # it was replaced, and is nobody to judge
    assert [orphan.directory for orphan in second.collect_own(held_elsewhere={3})] == ["step-00000002"]
    left = {f"step-{step:08d}" for step in (1, 3, 4, 5)}
    assert names(second.backend) == left
    assert second.collect_own(held_elsewhere={3}) == []
    assert second.open(1).verify() == []


def test_a_save_of_a_replaced_start_that_wakes_up_finds_nothing_to_commit(tmp_path: Path) -> None:
    first = started(tmp_path, "start 1")
    part = begin(first, 2)
    second = started(tmp_path, "start 2")
    assert len(second.collect_own()) == 1
    with pytest.raises(ArcError):
        first.commit(2, 0, 1, {0: part}, {"certified": True})
    assert names(second.backend) == set()


def test_on_an_object_store_a_commit_may_be_on_its_way_so_the_grace_period_is_kept() -> None:
    url = f"memory://orphans-{uuid.uuid4().hex}"
    begin(started(url, "start 1"), 2)
    second = started(url, "start 2")
    assert second.collect_own() == []
    assert names(second.backend) == {"step-00000002"}
