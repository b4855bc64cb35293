"""A disk that is really full, at every possible moment: StoreFull, nothing half-written, and all is well with space."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from arc_dist.checkpoint_store import Store
from arc_dist.errors import StoreError, StoreFull
from store_helpers import files_of, same_bits, whole

PAGE_BYTES = 4096
DISK_BYTES = 24 << 20
SMALL_ELEMENTS = 12_000  # 47 KiB: a sweep over all its pages is quick

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a file system")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB with a directory of checkpoints."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=700", "tmpfs", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"needs root with the right to mount: {done.stderr.strip()}")
    try:
        # A test that believed in a mount that is not there would fill the machine's own disk.
        assert os.path.ismount(path)
        total = os.statvfs(path)
        assert total.f_blocks * total.f_frsize == DISK_BYTES
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture(params=[True, False], ids=["reserved", "met while writing"])
def reserving(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:  # as on file systems without fallocate
        monkeypatch.setattr("arc_dist.checkpoint_store.backends.local._reserve", lambda descriptor, nbytes: None)
    return request.param


def free_pages(disk: Path) -> int:
    found = os.statvfs(disk)
    return found.f_bavail * found.f_frsize // PAGE_BYTES


def leave_free(disk: Path, num_pages: int) -> None:
    """Fills the disk but for some pages."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    nbytes = (free_pages(disk) - num_pages) * PAGE_BYTES
    assert 0 <= nbytes <= DISK_BYTES
    descriptor = os.open(filler, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, max(nbytes, 1))
    finally:
        os.close(descriptor)
    assert free_pages(disk) == num_pages


def tensor_of(step: int, elements: int) -> torch.Tensor:
    return torch.arange(elements, dtype=torch.float32) + step


def write(store: Store, step: int, elements: int) -> dict[int, Any]:
    tensors = [whole("w", tensor_of(step, elements))]
    return {0: store.write_part(step, generation=0, rank=0, world_size=1, tensors=tensors, objects={"step": step})}


def save(store: Store, step: int, elements: int) -> None:
    store.commit(step, 0, 1, write(store, step, elements), {"certified": True})


def assert_restores(store: Store, step: int, elements: int) -> None:
    newest = store.newest()
    assert newest is not None and newest.step == step
    checkpoint = store.open(step)
    assert checkpoint.verify() == []
    (loaded,) = checkpoint.read([checkpoint.specs()["w"]])
    assert same_bits(loaded, tensor_of(step, elements))
    assert checkpoint.objects(0) == {"step": step}


def test_a_save_that_does_not_fit(disk: Path, reserving: bool) -> None:
    elements = 2 << 20  # 8 MiB
    store = Store(disk / "ckpt", owner="a")
    store.check_writable()
    save(store, 1, elements)
    save(store, 2, elements)
    before, free = files_of(disk), free_pages(disk)
    for _ in range(3):  # nothing adds up
        with pytest.raises(StoreFull) as caught:
            write(store, 3, elements)
        assert "Free space" in str(caught.value) and "rank-00000.safetensors" in str(caught.value)
        assert [f.name for f in files_of(disk) if f not in before] == ["attempt.json"]
        assert free - free_pages(disk) <= 2
        assert_restores(Store(disk / "ckpt"), 2, elements)
    store.discard(3, generation=0, world_size=1)
    assert files_of(disk) == before
    # The older step makes room.
    store._catalog.delete("step-00000001")
    save(store, 3, elements)
    assert_restores(Store(disk / "ckpt"), 3, elements)


def test_every_amount_of_free_space(disk: Path, reserving: bool) -> None:
    """From no free page to more than a save needs: it fails as StoreFull or is whole, and the older step stays."""
    store = Store(disk / "ckpt", owner="a")
    store.check_writable()
    save(store, 1, SMALL_ELEMENTS)
    start = free_pages(disk)
    save(store, 2, SMALL_ELEMENTS)
    need = start - free_pages(disk)
    outcomes: list[bool] = []
    where: set[str] = set()
    for num_pages in range(need + 3):
        step = 10 + num_pages
        newest = store.newest()
        assert newest is not None
        leave_free(disk, num_pages)
        parts: dict[int, Any] = {}
        try:
            parts = write(store, step, SMALL_ELEMENTS)
            store.commit(step, 0, 1, parts, {"certified": True})
        except StoreFull as error:
            outcomes.append(False)
            where.add(Path(str(error.fields["file"])).name)
            assert_restores(Store(disk / "ckpt"), newest.step, SMALL_ELEMENTS)
            left = [f for f in files_of(disk / "ckpt") if f.name.startswith(".")]
            assert left == []
            directory = disk / "ckpt" / "run" / f"step-{step:08d}"
            if not parts:
                assert {f.name for f in files_of(directory)} <= {"attempt.json"}
            leave_free(disk, need + 8)
            if parts:
                store.commit(step, 0, 1, parts, {"certified": True})
            else:
                save(store, step, SMALL_ELEMENTS)
        else:
            outcomes.append(True)
        assert_restores(Store(disk / "ckpt"), step, SMALL_ELEMENTS)
        store._catalog.delete(newest.directory)  # the sweep itself must not fill the disk
    # Below what it needs a save fails, above it does not, and each of its files was the one that did not fit.
    assert outcomes == sorted(outcomes)
    assert outcomes[0] is False and outcomes[-1] is True and outcomes.count(False) >= need - 2
    assert {"rank-00000.safetensors", "rank-00000.json", "manifest.json"} <= where


def test_pruning_needs_no_space(disk: Path) -> None:
    store = Store(disk / "ckpt", owner="a")
    store.check_writable()
    for step in (1, 2, 3):
        save(store, step, SMALL_ELEMENTS)
    leave_free(disk, 0)
    with pytest.raises(StoreError):
        write(store, 4, SMALL_ELEMENTS)
    assert store.prune(keep_last=2) == [1]
    assert_restores(store, 3, SMALL_ELEMENTS)
    save(store, 4, SMALL_ELEMENTS // 2)
    assert store.open(4).verify() == []
