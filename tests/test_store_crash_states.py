"""No crash loses a commit: every moment of a job's life on disk, with every kind of loss, restores a whole step.

The default run looks at some 1,100 states. All of them, more than 10,000, are for `make soak`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from arc_dist.checkpoint_store import SaveAborted, pruning
from arc_dist.checkpoint_store.backends import Backend, LocalBackend
from crash_disk import Disk, Killed, Op, Recorder
from crash_search import Job, Search
from crash_tiers import TieredJob, check_tiers, go_on, tiered_life


def life(job: Job) -> None:
    """A job with all that happens to its disk: saves, roll backs, an abort, an abandoned save, two prunes."""
    store = job.start("a")
    job.save(store, 10)
    job.save(store, 20)
    job.save(store, 30, world_size=3)
    job.recorder.mark("may_go", 10)
    assert store.prune(keep_last=2) == [10]
    with pytest.raises(SaveAborted):
        job.write(store, 40, abort=True)
    assert store.discard(40, generation=0, world_size=2)
    job.write(store, 50)  # never committed
    job.save(store, 30, generation=1)  # rolled back to 20, comes to 30 again
    job.save(store, 50, generation=1)
    job.recorder.mark("may_go", 20)
    assert store.prune(keep_last=2) == [20]
    restarted = job.start("b")
    job.save(restarted, 60, world_size=1)


def recorded(base: Path, monkeypatch: pytest.MonkeyPatch) -> list[Op]:
    recorder = Recorder(base)
    with monkeypatch.context() as patch:
        recorder.install(patch)
        life(Job(recorder, base))
    assert recorder.open_paths == {} and recorder.double_closes == []
    return recorder.ops


def recorded_tiers(base: Path, monkeypatch: pytest.MonkeyPatch) -> list[Op]:
    recorder = Recorder(base)
    with monkeypatch.context() as patch:
        recorder.install(patch)
        tiered_life(TieredJob(recorder, base))
    assert recorder.open_paths == {} and recorder.double_closes == []
    return recorder.ops


@pytest.fixture
def base(shm_root: Path) -> Path:
    (shm_root / "disk").mkdir()
    return shm_root / "disk"


def killed_and_restarted(
    base: Path, monkeypatch: pytest.MonkeyPatch, stride: int, offset: int
) -> Iterator[tuple[list[Op], int]]:
    """Lives in which the process dies before some call and a new one starts on the disk as the kernel has it."""
    number = offset
    while True:
        shutil.rmtree(base)
        base.mkdir()
        recorder = Recorder(base)
        recorder.kill_at = number
        job = Job(recorder, base)
        died = False
        with monkeypatch.context() as patch:
            recorder.install(patch)
            try:
                first = job.start("a")
                job.save(first, 10)
                job.save(first, 20)
            except Killed:
                died = True
            recorder.kill_at = None
            begin = len(recorder.ops)
            second = job.start("b")
            job.save(second, 20)
            job.save(second, 30)
        if not died:
            return
        yield recorder.ops, begin
        number += stride


def report(search: Search, record: Any, capsys: pytest.CaptureFixture[str]) -> None:
    record("crash_states_checked", len(search.seen))
    with capsys.disabled():
        print(
            f" [{search.enumerated} crash states, {len(search.seen)} distinct, went on from {search.went_on}]", end=""
        )


@pytest.mark.parametrize("record", [recorded, recorded_tiers])
def test_the_recorded_calls_rebuild_the_disk(base: Path, monkeypatch: pytest.MonkeyPatch, record: Any) -> None:
    """With nothing lost, the model's disk is the real one, byte for byte; so the recorder misses no call."""
    ops = record(base, monkeypatch)
    disk = Disk()
    for op in ops:
        if op[0] != "mark":
            disk.apply(op)
    changes, _ = disk.unsafe()
    model = disk.state(set(changes), lambda inode, safe, newest: newest)
    real = {str(p.relative_to(base)): None if p.is_dir() else p.read_bytes() for p in base.rglob("*")}
    assert model == real
    assert {op[0] for op in ops} == {
        "create", "mkdir", "write", "size", "fsync", "rename", "link", "unlink", "mark",
    }  # fmt: skip


def test_a_power_cut_at_any_call(
    base: Path, shm_root: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any, capsys: Any
) -> None:
    search = Search(shm_root, num_samples=4, go_on_every=60)
    search.run(recorded(base, monkeypatch))
    report(search, record_property, capsys)
    assert len(search.seen) >= 400
    assert search.went_on >= 5


def test_a_power_cut_in_a_life_with_two_tiers(
    base: Path, shm_root: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any, capsys: Any
) -> None:
    search = Search(shm_root, num_samples=0, every=9, go_on_every=60, check=check_tiers, go_on=go_on)
    search.run(recorded_tiers(base, monkeypatch))
    report(search, record_property, capsys)
    assert len(search.seen) >= 150
    assert search.went_on >= 2


def test_a_power_cut_after_a_killed_process_was_replaced(
    base: Path, shm_root: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any, capsys: Any
) -> None:
    search = Search(shm_root, num_samples=0)
    for ops, begin in killed_and_restarted(base, monkeypatch, stride=47, offset=1):
        search.run(ops, begin)
    report(search, record_property, capsys)
    assert len(search.seen) >= 400  # with the two tests above more than 1,000


@pytest.mark.soak
def test_ten_thousand_power_cuts(
    base: Path, shm_root: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any, capsys: Any
) -> None:
    search = Search(shm_root, seed=1, num_samples=40, go_on_every=50)
    search.run(recorded(base, monkeypatch))
    for ops, begin in killed_and_restarted(base, monkeypatch, stride=1, offset=1):
        search.num_samples = 2
        search.run(ops, begin)
    report(search, record_property, capsys)
    assert len(search.seen) >= 10_000


@pytest.mark.soak
def test_every_power_cut_in_a_life_with_two_tiers(
    base: Path, shm_root: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any, capsys: Any
) -> None:
    search = Search(shm_root, seed=1, num_samples=30, go_on_every=50, check=check_tiers, go_on=go_on)
    search.run(recorded_tiers(base, monkeypatch))
    report(search, record_property, capsys)
    assert len(search.seen) >= 1_600


# The search itself: stores that are careless in one way, each of which it must find.


def no_directory_sync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LocalBackend, "_sync", lambda self, directory: None)


def no_file_sync(patch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            real(descriptor)

    patch.setattr(os, "fsync", fsync)


def careless_below(patch: pytest.MonkeyPatch, careless: Any, root: Path) -> None:
    """Drops the syncs of one tier only."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        kind = no_directory_sync if os.path.isdir(path) else no_file_sync
        if not (kind is careless and path.startswith(str(root))):
            real(descriptor)

    patch.setattr(os, "fsync", fsync)


def files_before_the_manifest(patch: pytest.MonkeyPatch) -> None:
    def remove_step(backend: Backend, run: str, directory: str) -> list[str]:
        path = f"{run}/{directory}"
        for entry in sorted(backend.list(path), key=lambda entry: entry.name == "manifest.json"):
            backend.remove(f"{path}/{entry.name}")
        backend.remove_directory(path)
        return []

    patch.setattr(pruning, "remove_step", remove_step)


def manifest_not_synced_before_files_go(patch: pytest.MonkeyPatch) -> None:
    def remove_step(backend: Backend, run: str, directory: str) -> list[str]:
        path = f"{run}/{directory}"
        backend.remove(f"{path}/manifest.json")
        for entry in backend.list(path):
            backend.remove(f"{path}/{entry.name}")
        backend.remove_directory(path)
        return []

    patch.setattr(pruning, "remove_step", remove_step)


def manifest_in_place(patch: pytest.MonkeyPatch) -> None:
    def create_exclusive(self: LocalBackend, path: str, data: bytes) -> bool:
        full = self.root / path
        try:
            descriptor = os.open(full, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return False
        for begin in range(0, len(data), 512):
            os.write(descriptor, data[begin : begin + 512])
        os.fsync(descriptor)
        os.close(descriptor)
        self._sync(full.parent)
        return True

    patch.setattr(LocalBackend, "create_exclusive", create_exclusive)


@pytest.mark.parametrize(
    "careless",
    [
        no_directory_sync,
        no_file_sync,
        files_before_the_manifest,
        manifest_not_synced_before_files_go,
        manifest_in_place,
    ],
    ids=lambda body: body.__name__,
)
def test_the_search_finds_a_careless_store(
    base: Path, shm_root: Path, monkeypatch: pytest.MonkeyPatch, careless: Any
) -> None:
    recorder = Recorder(base)
    with monkeypatch.context() as patch:
        recorder.install(patch)
        careless(patch)
        life(Job(recorder, base))
    with pytest.raises(AssertionError, match="after call"):
        Search(shm_root, num_samples=4).run(recorder.ops)


@pytest.mark.parametrize("careless", [no_directory_sync, no_file_sync], ids=lambda body: body.__name__)
def test_the_search_finds_a_careless_drain(
    base: Path, shm_root: Path, monkeypatch: pytest.MonkeyPatch, careless: Any
) -> None:
    """What is missing is missed in the slow tier alone: the copies and marks there are not made durable."""
    recorder = Recorder(base)
    with monkeypatch.context() as patch:
        recorder.install(patch)
        careless_below(patch, careless, base / "slow")
        tiered_life(TieredJob(recorder, base))
    with pytest.raises(AssertionError, match="after call"):
        Search(shm_root, num_samples=0, every=3, check=check_tiers).run(recorder.ops)


def test_the_attempt_names_its_owner_after_a_crash(base: Path) -> None:
    """Two starts that save one step never write to one directory."""
    job = Job(Recorder(base), base)
    first, second = job.start("a"), job.start("b")
    one, two = job.write(first, 10), job.write(second, 10)
    assert one[0]["directory"] != two[0]["directory"]
    attempts = [json.loads(path.read_text())["owner"] for path in sorted((base / "ckpt").rglob("attempt.json"))]
    assert sorted(attempts) == ["a", "b"]
