"""The commands that keep, remove and copy, on S3: marks and tombstones are conditional PUTs there."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

pytest.importorskip("s3fs", reason='s3fs is not installed: pip install "arc-dist[s3]"')
pytest.importorskip("moto", reason='moto is not installed: pip install "moto[server]"')

from arc_dist.checkpoint_store import Store
from arc_dist.checkpoint_store.backends import open_backend
from arc_dist.checkpoint_store.commands import DAMAGED, OK
from arc_dist.checkpoint_store.orphans import collect_orphans
from arc_dist.checkpoint_store.pins import change_marks, pin, read_marks
from arc_dist.checkpoint_store.transfer import TransferAborted, copy_step
from store_helpers import save
from test_store_commands import arc
from test_store_s3 import bucket, keys, server

__all__ = ["bucket", "server"]  # fixtures
pytestmark = pytest.mark.slow


@pytest.fixture
def local(tmp_path: Path) -> Store:
    store = Store(tmp_path / "ckpt", owner="a")
    store.check_writable()
    for step in (1, 2, 3, 4):
        save(store, step, world_size=2)
    return store


def test_a_run_goes_there_and_back_with_its_pins(local: Store, bucket: str, tmp_path: Path) -> None:
    local.pin(1, "figure 3")
    local.quarantine(4, 4, "diverged")
    assert arc("copy", local.url, bucket, "--verify") == OK
    remote = Store(bucket, owner="b")
    assert remote.steps() == local.steps()
    newest = remote.newest()
    assert newest is not None and newest.step == 3
    assert remote.prune(keep_last=2) == []
    assert remote.unpin(1)
    assert remote.prune(keep_last=2) == [1]
    assert arc("copy", bucket, str(tmp_path / "back")) == OK
    assert [info.step for info in Store(tmp_path / "back").steps()] == [2, 3, 4]
    assert arc("diff", bucket, str(tmp_path / "back")) == OK
    assert arc("diff", local.url, bucket, "--step-b", "3") == DAMAGED


def test_a_copy_that_was_given_up_is_taken_up(local: Store, bucket: str) -> None:
    looks = iter(range(1_000_000))
    with pytest.raises(TransferAborted):
        copy_step(local.backend, "run", "step-00000004", open_backend(bucket), should_abort=lambda: next(looks) > 12)
    assert Store(bucket).steps() == []
    assert not any(key.endswith("manifest.json") for key in keys(bucket))
    assert copy_step(local.backend, "run", "step-00000004", open_backend(bucket)).committed
    assert Store(bucket).open(4).verify() == []


def test_orphans_are_noted_first_and_removed_later(local: Store, bucket: str) -> None:
    target = open_backend(bucket)
    copy_step(local.backend, "run", "step-00000004", target)
    target.remove("run/step-00000004/manifest.json")
    now = 1e9
    for seconds, removed in ((0, False), (86_000, False), (87_000, True)):
        (orphan,) = collect_orphans(target, "run", now=now + seconds)
        assert (orphan.directory, orphan.removed) == ("step-00000004", removed)
    assert not any("step-" in key for key in keys(bucket))


def test_marks_of_racing_writers_are_all_kept(bucket: str) -> None:
    backend = open_backend(bucket)
    errors: list[Exception] = []

    def work(first: int) -> None:
        try:
            for step in range(first, first + 3):
                change_marks(backend, "run", lambda marks, step=step: pin(marks, step, "", 0.0))
        except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
            errors.append(error)

    threads = [threading.Thread(target=work, args=(10 * n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert errors == []
    assert sorted(read_marks(backend, "run").pins) == [0, 1, 2, 10, 11, 12, 20, 21, 22]
