"""Pins and quarantine: what they do to a run, on disk and in memory, and what races and damage cannot do to them."""

from __future__ import annotations

import dataclasses
import threading
import uuid
from pathlib import Path

import pytest

from arc_dist.checkpoint_store import Store
from arc_dist.checkpoint_store import pins as marks_module
from arc_dist.checkpoint_store.catalog import Catalog
from arc_dist.checkpoint_store.pins import Marks, change_marks, pin, quarantine, read_marks, unpin
from arc_dist.checkpoint_store.pruning import plan_prune, prune, release_steps
from arc_dist.checkpoint_store.retention import Best, Retention
from arc_dist.errors import CheckpointMismatch, ConfigError, StoreCorrupt, StoreGone
from store_helpers import save


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    url = str(tmp_path / "ckpt") if request.param == "local" else f"memory://pins-{uuid.uuid4().hex}"
    store = Store(url, owner="a")
    store.check_writable()
    return store


def fill(store: Store, *steps: int, **meta: object) -> None:
    for step in steps:
        save(store, step, meta=dict(meta))


def present(store: Store) -> list[int]:
    return [info.step for info in store.steps()]


def test_a_run_without_marks_has_none(store: Store) -> None:
    assert read_marks(store.backend, "run") == Marks()
    fill(store, 1)
    assert read_marks(store.backend, "run") == Marks()


def test_marks_come_back_as_they_were_written(store: Store) -> None:
    fill(store, 1)

    def change(marks: Marks) -> Marks:
        marks = quarantine(pin(marks, 1, 'why "x"\n\x1b', 5.5), {"step-00000001": 0.1 + 0.2}, "NaN", 7.0)
        return dataclasses.replace(marks, sightings={"step-00000002": ("look", 3.25)})

    written = change_marks(store.backend, "run", change)
    assert written.number == 1
    assert read_marks(store.backend, "run") == written
    assert written.quarantine_of("step-00000001", 0.1 + 0.2) == "NaN"
    assert written.quarantine_of("step-00000001", 0.3) is None
    assert change_marks(store.backend, "run", lambda marks: marks).number == 1


def test_concurrent_changes_are_all_kept(store: Store) -> None:
    fill(store, 1)
    errors: list[Exception] = []

    def work(first: int) -> None:
        try:
            for step in range(first, first + 6):
                change_marks(store.backend, "run", lambda marks, step=step: pin(marks, step, "", 0.0))
        except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
            errors.append(error)

    threads = [threading.Thread(target=work, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    marks = read_marks(store.backend, "run")
    assert sorted(marks.pins) == [100 * n + i for n in range(4) for i in range(6)]
    assert marks.number == 24
    names = [entry.name for entry in store.backend.list("run") if entry.name.startswith("marks-")]
    assert len(names) <= 10


def test_a_writer_that_slept_through_many_changes_does_not_undo_them(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had read number 1; meanwhile 2 to 14 were made and the lower ones cleaned away, so number 2 is free again."""
    fill(store, 1)
    change_marks(store.backend, "run", lambda marks: pin(marks, 1, "", 0.0))
    old = read_marks(store.backend, "run")
    for step in range(2, 15):
        change_marks(store.backend, "run", lambda marks, step=step: pin(marks, step, "", 0.0))
    assert not store.backend.exists("run/marks-00000002.json")
    fresh = marks_module.read_marks
    stale = [old]
    monkeypatch.setattr(marks_module, "read_marks", lambda *args, **kw: stale.pop() if stale else fresh(*args, **kw))
    after = change_marks(store.backend, "run", lambda marks: pin(marks, 99, "", 0.0))
    monkeypatch.undo()
    assert sorted(after.pins) == [*range(1, 15), 99]
    assert read_marks(store.backend, "run") == after
    assert not store.backend.exists("run/marks-00000002.json")


def test_pinned_steps_survive_pruning_until_unpinned(store: Store) -> None:
    fill(store, 1, 2, 3, 4)
    store.pin(1, "the paper's figure 3")
    assert [info.pinned for info in store.steps()] == ["the paper's figure 3", None, None, None]
    assert store.prune(keep_last=2) == [2]
    assert store.unpin(1)
    assert not store.unpin(1)
    assert store.prune(Retention(last=2)) == [1]
    assert present(store) == [3, 4]


def test_only_what_is_there_can_be_pinned(store: Store) -> None:
    fill(store, 1)
    with pytest.raises(StoreGone, match="It has: 1"):
        store.pin(7)
    assert read_marks(store.backend, "run").number == 0


def test_quarantined_steps_are_not_restored_and_do_not_count(store: Store) -> None:
    fill(store, 1, 2, 3, 4)
    assert store.quarantine(3, 9, "loss diverged at step 4") == [3, 4]
    newest = store.newest()
    assert newest is not None and newest.step == 2
    newest = store.newest(certified=False)
    assert newest is not None and newest.step == 2
    assert [(info.step, info.certified) for info in store.steps()] == [(1, True), (2, True), (3, False), (4, False)]
    assert store.prune(keep_last=2) == []
    assert store.open(4).verify() == []  # whoever asks for it by number gets it: it is evidence
    assert release_steps(store.backend, "run", 4) == ["step-00000004"]
    newest = store.newest()
    assert newest is not None and newest.step == 4


def test_a_step_saved_again_after_the_rollback_is_sound(store: Store) -> None:
    fill(store, 1, 2)
    store.quarantine(2, 2, "diverged")
    save(store, 2, seed=5)  # the same generation comes to the step again
    newest = store.newest()
    assert newest is not None and (newest.step, newest.directory) == (2, "step-00000002.g0")
    assert [info.certified for info in store.steps()] == [True, True]
    # Also when the bad one was removed and its name is used again.
    Catalog(store.backend, "run").delete("step-00000002")
    Catalog(store.backend, "run").delete("step-00000002.g0")
    save(store, 2, seed=6)
    newest = store.newest()
    assert newest is not None and (newest.step, newest.directory) == (2, "step-00000002")


def test_of_two_commits_of_a_step_the_sound_one_is_opened(store: Store) -> None:
    fill(store, 1)
    save(store, 1, seed=5)
    later = store.open(1).manifest
    mark = {later.directory: later.committed_at}
    change_marks(store.backend, "run", lambda marks: quarantine(marks, mark, "diverged", 0.0))
    assert store.open(1).manifest.directory == "step-00000001"
    assert store.open(1, directory=later.directory).manifest == later
    (info,) = store.steps()
    assert (info.directory, info.certified) == ("step-00000001", True)


def test_quarantine_in_the_middle_of_a_prune_changes_its_mind(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 5 and 6 turn out to be poisoned after the decision to remove 1 to 4, and after 1 is gone."""
    fill(store, 1, 2, 3, 4, 5, 6)
    delete = Catalog.delete

    def delete_and_learn(catalog: Catalog, directory: str) -> None:
        delete(catalog, directory)
        store.quarantine(5, 6, "diverged")

    monkeypatch.setattr(Catalog, "delete", delete_and_learn)
    removed = prune(store.backend, "run", Retention(last=2))
    assert [row.step for row in removed.removed] == [1, 2]
    newest = store.newest()
    assert newest is not None and newest.step == 4


def test_a_plan_says_why_and_changes_nothing(store: Store) -> None:
    for step, loss in ((1, 0.5), (2, 0.1), (3, 0.7), (4, 0.6), (5, float("nan"))):
        fill(store, step, metrics={"loss": loss})
    plan = plan_prune(store.backend, "run", Retention(last=2, best=(Best(metric="loss"),)), 0.0)
    assert [(row.step, row.kept) for row in plan.rows] == [(1, False), (2, True), (3, False), (4, True), (5, True)]
    assert plan.rows[1].why == "loss 0.1, number 1 of the smallest"
    assert all(row.nbytes > 0 for row in plan.rows)
    assert present(store) == [1, 2, 3, 4, 5]
    removed = prune(store.backend, "run", Retention(last=2, best=(Best(metric="loss"),)))
    assert [row.step for row in removed.removed] == [1, 3]
    assert present(store) == [2, 4, 5]


def test_marks_of_removed_commits_go_too(store: Store) -> None:
    fill(store, 1, 2, 3, 4)
    store.quarantine(1, 1, "diverged")
    assert store.prune(keep_last=2) == [1, 2]
    assert read_marks(store.backend, "run").quarantined == {}


def test_two_that_prune_at_once(store: Store) -> None:
    fill(store, *range(1, 9))
    errors: list[Exception] = []

    def work() -> None:
        try:
            store.prune(keep_last=2)
        except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert present(store) == [7, 8]
    left = {entry.name for entry in store.backend.list("run") if entry.name.startswith("step-")}
    assert left == {"step-00000007", "step-00000008"}


def test_damaged_marks_stop_removal_but_not_restoring(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path / "ckpt", owner="a")
    store.check_writable()
    fill(store, 1, 2, 3, 4)
    store.quarantine(4, 4, "diverged")
    store.pin(1)
    path = tmp_path / "ckpt" / "run" / "marks-00000002.json"
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises((StoreCorrupt, CheckpointMismatch), match="marks-00000002"):
            read_marks(store.backend, "run")
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(StoreCorrupt, match="pin again"):
            read_marks(store.backend, "run")
    with pytest.raises(StoreCorrupt):
        store.prune(keep_last=2)
    with pytest.raises(StoreCorrupt):
        store.pin(2)
    assert present(store) == [1, 2, 3, 4]
    newest = store.newest()
    assert newest is not None and newest.step == 3  # the quarantine is in number 1, which is sound
    assert "marks-00000002" in caplog.text
    path.unlink()
    assert store.prune(keep_last=2) == [1]


def test_marks_of_a_newer_version_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "ckpt", owner="a")
    store.check_writable()
    fill(store, 1)
    body = b'{\n"format": "arc-dist-marks",\n"version": 2'
    digest = marks_module.digest_of(body)
    (tmp_path / "ckpt/run/marks-00000001.json").write_bytes(
        body + f',\n"marks_digest": "sha256:{digest}"\n}}\n'.encode()
    )
    with pytest.raises(CheckpointMismatch, match="Upgrade"):
        store.newest()


def test_unpin_and_pin_are_pure() -> None:
    marks = pin(Marks(), 3, "x" * 9999, 1.0)
    assert len(marks.pins[3].why) == 500
    assert unpin(marks, 3).pins == {}
    assert marks.pin_of(3) is not None


def test_prune_wants_one_policy(store: Store) -> None:
    for call in (store.prune, lambda: store.prune(Retention(), keep_last=3)):
        with pytest.raises(ConfigError, match="either"):
            call()
    with pytest.raises(ConfigError, match="nothing to restore"):
        store.prune(keep_last=0)
