"""Every error at every call of a save and of a restore: a typed error, nothing that looks like a checkpoint, no leak.

The nth system call below the store fails, for every n; once, or it and every later call of its kind. So does a call
that was carried out but whose answer was lost, as NFS does it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from arc_dist.checkpoint_store import Store
from arc_dist.checkpoint_store.retry import Retries
from arc_dist.errors import (
    ArcError,
    Fenced,
    StoreCorrupt,
    StoreDenied,
    StoreFull,
    StoreGone,
    StoreTransient,
)
from os_calls import Call, OsCalls
from store_helpers import random_tensor, same_bits, whole

KINDS: dict[int, type[ArcError]] = {
    errno.ENOSPC: StoreFull,
    errno.EDQUOT: StoreFull,
    errno.EIO: StoreTransient,
    errno.ESTALE: StoreGone,
    errno.EINTR: StoreTransient,
    errno.EACCES: StoreDenied,
}
CODES = [pytest.param(code, id=errno.errorcode[code]) for code in KINDS]
NAMESPACE = {"mkdir", "rmdir", "rename", "link", "unlink"}
MAX_CALLS = 400
OLD, NEW = 1, 2


class Faults(OsCalls):
    """Fails the call number `at`."""

    def __init__(self, root: Path, at: int, code: int, *, for_ever: bool = False, lost: bool = False) -> None:
        super().__init__(root)
        self.at, self.code, self.for_ever, self.lost = at, code, for_ever, lost
        self.only: set[str] | None = None
        self.count = 0
        self.fired: list[Call] = []
        self.failed_fsyncs: set[int] = set()
        self.retried_fsyncs: list[str] = []

    def rule(self, call: Call) -> Callable[[], Any]:
        if call.name == "fsync" and call.descriptor in self.failed_fsyncs:
            self.retried_fsyncs.append(call.paths[0])
        if call.name == "close":
            self.failed_fsyncs.discard(call.descriptor or -1)
        if self.only is not None and call.name not in self.only:
            return super().rule(call)
        self.count += 1
        again = self.for_ever and self.fired and self.fired[0].name == call.name
        if self.count != self.at and not again:
            return super().rule(call)
        self.fired.append(call)
        return lambda: self.fail(call)

    def fail(self, call: Call) -> Any:
        if call.name == "fsync":
            assert call.descriptor is not None
            self.failed_fsyncs.add(call.descriptor)
        if call.name == "close" or self.lost:
            self.real[call.name](*call.arguments)
        raise OSError(self.code, os.strerror(self.code))


class Short(Faults):
    """A read or write does a part of what was asked; a read at `code` 0 says that the file has ended."""

    def fail(self, call: Call) -> Any:
        if call.name == "write":
            descriptor, data = call.arguments
            return self.real["write"](descriptor, bytes(data[: max(1, len(data) // 2)]))
        descriptor, (buffer,), *where = call.arguments
        if self.code == 0:
            return 0
        return self.real["preadv"](descriptor, [buffer[: max(1, len(buffer) // 2)]], *where)


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    return {"w": random_tensor((300,), "float32", step), "b": random_tensor((5,), "bfloat16", step)}


def save(store: Store, step: int, parts: dict[int, Any] | None = None) -> None:
    """Writes what is not yet in `parts`, and commits: the ranks repeat their parts, the coordinator its commit."""
    parts = {} if parts is None else parts
    if not parts:
        tensors = [whole(name, tensor) for name, tensor in tensors_of(step).items()]
        parts[0] = store.write_part(step, generation=0, rank=0, world_size=1, tensors=tensors, objects={"step": step})
    store.commit(step, 0, 1, parts, {"certified": True})


def restore(store: Store) -> int | None:
    """The step that a job would go on from, all of it read."""
    newest = store.newest()
    if newest is None:
        return None
    checkpoint = store.open(newest.step)
    expected = tensors_of(newest.step)
    names = list(expected)
    for name, tensor in zip(names, checkpoint.read([checkpoint.specs()[name] for name in names])):
        assert same_bits(tensor, expected[name])
    assert checkpoint.objects(0) == {"step": newest.step}
    return newest.step


def under(faults: Faults, monkeypatch: pytest.MonkeyPatch, action: Callable[[], Any]) -> tuple[Any, ArcError | None]:
    """What `action` returns or raises. Only our own errors are let through."""
    with monkeypatch.context() as patch:
        faults.install(patch)
        try:
            outcome: tuple[Any, ArcError | None] = (action(), None)
        except ArcError as error:
            outcome = (None, error)
    assert faults.open_paths == {}, f"{faults.fired}: descriptors leaked"
    assert faults.double_closes == [], f"{faults.fired}: a descriptor was closed twice"
    assert faults.retried_fsyncs == [], f"{faults.fired}: fsync was tried again on a descriptor that had failed"
    return outcome


def look_after_save(root: Path, faults: Faults, error: ArcError | None) -> None:
    reader = Store(root, owner="reader")
    infos = {info.step: info for info in reader.steps(include_damaged=True)}
    assert OLD in infos
    for step, info in infos.items():
        assert info.problem is None, (faults.fired, info)
        assert reader.open(step).verify() == []
    assert restore(reader) == max(infos)
    if error is None:
        assert NEW in infos, faults.fired
    cannot_remove = {"unlink", "rmdir"} & {call.name for call in faults.fired}
    if not cannot_remove:
        names = [p.name for p in root.rglob("*")]
        assert not [name for name in names if name.startswith(".")], (faults.fired, names)


def save_again(root: Path, store: Store, faults: Faults, parts: dict[int, Any]) -> None:
    """The same attempt at the same step, and then the next one, without a fault."""
    try:
        save(store, NEW, parts)
        assert Store(root).open(NEW).verify() == []
    except Fenced:
        # Its own file, which could not be removed, is in the way: this step is lost, but only this one.
        assert {"unlink", "rmdir"} & {call.name for call in faults.fired}, faults.fired
    save(store, NEW + 1)
    assert restore(Store(root)) == NEW + 1
    assert Store(root).open(NEW + 1).verify() == []


def fresh(tmp_path: Path, number: int) -> tuple[Path, Store]:
    root = tmp_path / f"{number}" / "ckpt"
    root.parent.mkdir()
    save_store = Store(root, owner="old")
    save_store.check_writable()
    save(save_store, OLD)
    return root, Store(root, owner="new", visible_timeout_s=0.0)  # nobody else writes here


def every_call_of_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path, int], Faults]
) -> set[str]:
    """Runs a save once for each of its calls; returns the names of the calls that failed."""
    fired: set[str] = set()
    for number in range(1, MAX_CALLS):
        root, store = fresh(tmp_path, number)
        faults = make(root, number)
        parts: dict[int, Any] = {}
        _, error = under(faults, monkeypatch, lambda store=store, parts=parts: save(store, NEW, parts))
        if not faults.fired:
            assert error is None and faults.count < number
            assert number > 8 if faults.only else number > 80
            return fired
        first = faults.fired[0]
        fired.add(first.name)
        if error is not None and faults.code in KINDS:
            assert type(error) is KINDS[faults.code], (first, error)
        if error is None and first.name != "close":
            assert isinstance(faults, Short) or faults.lost, (first, "an error was swallowed")
        look_after_save(root, faults, error)
        save_again(root, store, faults, parts)
    raise AssertionError("more calls than expected")


OF_A_SAVE = {
    "open",
    "mkdir",
    "rename",
    "link",
    "unlink",
    "scandir",
    "stat",
    "write",
    "fsync",
    "close",
    "fstat",
    "preadv",
}


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
def test_an_error_at_every_call_of_a_save(
    shm_root: Path, monkeypatch: pytest.MonkeyPatch, code: int, for_ever: bool
) -> None:
    fired = every_call_of_a_save(shm_root, monkeypatch, lambda root, at: Faults(root, at, code, for_ever=for_ever))
    assert fired == OF_A_SAVE | {"fallocate"}


@pytest.mark.parametrize("code", [pytest.param(errno.EIO, id="EIO"), pytest.param(errno.EINTR, id="EINTR")])
def test_a_lost_answer_at_every_call_of_a_save(shm_root: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def make(root: Path, at: int) -> Faults:
        faults = Faults(root, at, code, lost=True)
        faults.only = NAMESPACE
        return faults

    assert every_call_of_a_save(shm_root, monkeypatch, make) == {"mkdir", "rename", "link", "unlink"}


@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
def test_a_short_read_or_write_at_every_call_of_a_save(
    shm_root: Path, monkeypatch: pytest.MonkeyPatch, for_ever: bool
) -> None:
    def make(root: Path, at: int) -> Faults:
        faults = Short(root, at, -1, for_ever=for_ever)
        faults.only = {"write", "preadv"}
        return faults

    fired = every_call_of_a_save(shm_root, monkeypatch, make)
    assert fired == {"write", "preadv"}


def every_call_of_a_restore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path, int], Faults]
) -> tuple[set[str], list[tuple[Call, ArcError | None]]]:
    root, store = fresh(tmp_path, 0)
    save(store, NEW)
    fired: set[str] = set()
    outcomes: list[tuple[Call, ArcError | None]] = []
    for number in range(1, MAX_CALLS):
        faults = make(root, number)
        step, error = under(faults, monkeypatch, lambda: restore(Store(root)))
        if not faults.fired:
            assert step == NEW
            return fired, outcomes
        fired.add(faults.fired[0].name)
        outcomes.append((faults.fired[0], error))
        # Never an older step, and never a fresh start, because storage did not answer.
        assert error is not None or step == NEW, faults.fired
        if error is not None and faults.code in KINDS:
            assert type(error) is KINDS[faults.code], (faults.fired, error)
        assert restore(Store(root)) == NEW
    raise AssertionError("more calls than expected")


RETRIED = (errno.EIO, errno.EINTR)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
def test_an_error_at_every_call_of_a_restore(
    shm_root: Path, monkeypatch: pytest.MonkeyPatch, code: int, for_ever: bool
) -> None:
    fired, outcomes = every_call_of_a_restore(
        shm_root, monkeypatch, lambda root, at: Faults(root, at, code, for_ever=for_ever)
    )
    assert fired == {"open", "scandir", "stat", "fstat", "preadv", "close"}
    if for_ever:
        assert all(error is not None or call.name == "close" for call, error in outcomes)
    elif code in RETRIED:  # reading a file is tried again; listing is left to the caller
        assert any(error is None and call.name == "preadv" for call, error in outcomes)


def test_a_short_read_at_every_call_of_a_restore(shm_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(root: Path, at: int) -> Faults:
        faults = Short(root, at, -1)
        faults.only = {"preadv"}
        return faults

    _, outcomes = every_call_of_a_restore(shm_root, monkeypatch, make)
    assert len(outcomes) >= 4
    assert all(error is None for _, error in outcomes)


def test_a_file_that_ends_while_it_is_read(shm_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read of 0 bytes is the end of the file: damage, not a short read to be repeated for ever."""
    root, store = fresh(shm_root, 0)
    save(store, NEW)
    for number in range(1, MAX_CALLS):
        faults = Short(root, number, 0)
        faults.only = {"preadv"}
        step, error = under(faults, monkeypatch, lambda: restore(Store(root)))
        if not faults.fired:
            break
        (call,) = faults.fired
        if len(call.arguments) == 4:  # with flags: it asked whether the file is in memory, and uses no byte of it
            assert (step, error) == (NEW, None)
            continue
        # A manifest that has ended is damage: the older step is the right answer.
        manifest = call.paths[0].endswith("manifest.json")
        assert isinstance(error, StoreCorrupt) or (manifest and step == OLD), faults.fired
    assert number > 4


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
def test_storage_that_fails_while_a_step_is_verified_is_not_called_damage(
    shm_root: Path, monkeypatch: pytest.MonkeyPatch, code: int, for_ever: bool
) -> None:
    monkeypatch.setattr("arc_dist.checkpoint_store.verification._RETRIES", Retries(attempts=2, first_pause_s=0.0))
    root, store = fresh(shm_root, 0)
    checkpoint = store.open(OLD)
    seen: set[str] = set()
    for number in range(1, MAX_CALLS):
        faults = Faults(root, number, code, for_ever=for_ever)
        problems, error = under(faults, monkeypatch, checkpoint.verify)
        if not faults.fired:
            break
        name = faults.fired[0].name
        seen.add(name)
        if code in (errno.ENOSPC, errno.EDQUOT) or name == "close":
            continue  # no answer to a read; what closing says is not heard
        assert problems == [] if error is None else isinstance(error, KINDS[code]), faults.fired
        assert error is None or for_ever or code not in RETRIED, faults.fired
    assert seen >= {"open", "fstat", "preadv", "scandir"}
