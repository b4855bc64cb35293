"""No crash loses a commit: every moment of a job's life on disk, with every kind of loss, restores a whole step."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from arc_dist.checkpoint_store import SaveAborted, Store, pruning
from arc_dist.checkpoint_store.backends import Backend, LocalBackend
from arc_dist.errors import StoreGone
from crash_disk import Disk, Killed, Op, Recorder, crash_states, fingerprint, materialise
from store_helpers import fsdp_cut, random_tensor, rows, same_bits, whole


class Job:
    """Saves through a recorder. Every save has bytes of its own, named in its objects, so that a mix shows."""

    def __init__(self, recorder: Recorder, base: Path) -> None:
        self.recorder = recorder
        self.root = base / "ckpt"
        self.saves = 0

    def start(self, owner: str) -> Store:
        store = Store(self.root, owner=owner)
        store.check_writable()
        return store

    def write(self, store: Store, step: int, *, generation: int = 0, world_size: int = 2, abort: bool = False) -> Any:
        self.saves += 1
        seed = 1000 * step + self.saves
        parts = {}
        for rank in range(world_size):
            parts[rank] = store.write_part(
                step,
                generation=generation,
                rank=rank,
                world_size=world_size,
                tensors=shards(seed, rank, world_size),
                objects={"seed": seed},
                should_abort=lambda rank=rank: abort and rank == world_size - 1,
            )
        return parts

    def save(self, store: Store, step: int, *, generation: int = 0, world_size: int = 2) -> None:
        parts = self.write(store, step, generation=generation, world_size=world_size)
        store.commit(step, generation, world_size, parts, {"certified": True})
        self.recorder.mark("acked", step)


def state_of(seed: int) -> dict[str, torch.Tensor]:
    return {"w": random_tensor((60, 40), "float32", seed), "b": random_tensor((9,), "bfloat16", seed + 1)}


def shards(seed: int, rank: int, world_size: int) -> list[Any]:
    tensors = state_of(seed)
    return [rows("w", tensors["w"], *fsdp_cut(60, rank, world_size)), whole("b", tensors["b"])]


_EXPECTED: dict[int, dict[str, torch.Tensor]] = {}


def check(root: Path, acked: set[int], may_go: set[int]) -> None:
    """What a job that starts on this disk finds."""
    store = Store(root, owner="reader")
    try:
        infos = store.steps(include_damaged=True)
    except StoreGone:
        assert not acked and not root.exists()
        assert not root.exists()
        return
    assert {info.step for info in infos} >= acked - may_go
    for info in infos:
        assert info.problem is None
        checkpoint = store.open(info.step, directory=info.directory)
        assert checkpoint.verify() == []
        (seed,) = {checkpoint.objects(rank)["seed"] for rank in range(info.world_size)}
        assert seed // 1000 == info.step
        expected = _EXPECTED.setdefault(seed, state_of(seed))
        names = list(expected)
        for name, tensor in zip(names, checkpoint.read([checkpoint.specs()[name] for name in names])):
            assert same_bits(tensor, expected[name]), (info.directory, name)
    newest = store.newest()
    assert (newest.step if newest else -1) == max((info.step for info in infos), default=-1)
    assert (newest.step if newest else -1) >= max(acked, default=-1)


class Search:
    """Goes through crash states; remembers which it has seen."""

    def __init__(self, scratch: Path, seed: int = 0, *, num_samples: int, go_on_every: int = 0) -> None:
        self.scratch = scratch
        self.rng = random.Random(seed)
        self.num_samples = num_samples
        self.go_on_every = go_on_every
        self.seen: set[bytes] = set()
        self.enumerated = 0
        self.went_on = 0

    def run(self, ops: list[Op], begin: int = 0) -> None:
        disk = Disk()
        acked: set[int] = set()
        may_go: set[int] = set()
        for number in range(len(ops) + 1):
            if number > 0:
                op = ops[number - 1]
                if op[0] == "mark":
                    acked |= {op[2]} if op[1] == "acked" else set()
                    may_go |= set(op[2]) if op[1] == "may_go" else set()
                else:
                    disk.apply(op)
            if number >= begin:
                for state in crash_states(disk, self.rng, self.num_samples):
                    self.look(state, acked, may_go, f"after call {number}: {str(ops[number - 1 : number])[:200]}")

    def look(self, state: dict[str, bytes | None], acked: set[int], may_go: set[int], where: str) -> None:
        self.enumerated += 1
        mark = fingerprint(state, (sorted(acked), sorted(may_go)))
        if mark in self.seen:
            return
        self.seen.add(mark)
        target = self.scratch / "state"
        materialise(state, target)
        try:
            check(target / "ckpt", acked, may_go)
            if self.go_on_every and len(self.seen) % self.go_on_every == 0 and acked:
                self.go_on(target / "ckpt", acked, may_go)
        except Exception as error:
            raise AssertionError(f"{where}, {len(state)} names, acknowledged {sorted(acked)}: {error!r}") from error
        finally:
            shutil.rmtree(target)

    def go_on(self, root: Path, acked: set[int], may_go: set[int]) -> None:
        """The job goes on from what it found: it saves the same step again, prunes, and restores."""
        self.went_on += 1
        job = Job(Recorder(root.parent), root.parent)
        job.saves = 500
        store = job.start("after the crash")
        step = max(acked)
        job.save(store, step, generation=0)
        job.save(store, step + 1)
        check(root, acked | {step + 1}, may_go)
        store.prune(keep_last=2)
        check(root, {step, step + 1}, may_go | acked)


def life(job: Job) -> None:
    """A job with all that happens to its disk: saves, roll backs, an abort, an abandoned save, two prunes."""
    store = job.start("a")
    job.save(store, 10)
    job.save(store, 20)
    job.save(store, 30, world_size=3)
    job.recorder.mark("may_go", [10])
    assert store.prune(keep_last=2) == [10]
    with pytest.raises(SaveAborted):
        job.write(store, 40, abort=True)
    assert store.discard(40, generation=0, world_size=2)
    job.write(store, 50)  # never committed
    job.save(store, 30, generation=1)  # rolled back to 20, comes to 30 again
    job.save(store, 50, generation=1)
    job.recorder.mark("may_go", [20])
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


def test_the_recorded_calls_rebuild_the_disk(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing lost, the model's disk is the real one, byte for byte; so the recorder misses no call."""
    ops = recorded(base, monkeypatch)
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
    search = Search(shm_root, num_samples=4, go_on_every=40)
    search.run(recorded(base, monkeypatch))
    report(search, record_property, capsys)
    assert len(search.seen) >= 400
    assert search.went_on >= 8


def test_a_power_cut_after_a_killed_process_was_replaced(
    base: Path, shm_root: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any, capsys: Any
) -> None:
    search = Search(shm_root, num_samples=0)
    for ops, begin in killed_and_restarted(base, monkeypatch, stride=13, offset=1):
        search.run(ops, begin)
    report(search, record_property, capsys)
    assert len(search.seen) >= 1_600  # with the test above about 2,400


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


# The search itself: stores that are careless in one way, each of which it must find.


def no_directory_sync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LocalBackend, "_sync", lambda self, directory: None)


def no_file_sync(patch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
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


def test_the_attempt_names_its_owner_after_a_crash(base: Path) -> None:
    """Two starts that save one step never write to one directory."""
    job = Job(Recorder(base), base)
    first, second = job.start("a"), job.start("b")
    one, two = job.write(first, 10), job.write(second, 10)
    assert one[0]["directory"] != two[0]["directory"]
    attempts = [json.loads(path.read_text())["owner"] for path in sorted((base / "ckpt").rglob("attempt.json"))]
    assert sorted(attempts) == ["a", "b"]
