"""Every state that a crash may leave of a recorded life, looked at as a job that starts on that disk finds it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from arc_dist.checkpoint_store import Store
from arc_dist.errors import StoreGone
from crash_disk import Disk, Op, Recorder, crash_states, fingerprint, materialise
from crash_tiers import Known
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


def check_one(base: Path, known: Known) -> None:
    check(base / "ckpt", known.get("acked", set()), known.get("may_go", set()))


def go_on_with_one(base: Path, known: Known) -> None:
    """The job goes on from what it found: it saves the same step again, prunes, and restores."""
    acked, may_go = known.get("acked", set()), known.get("may_go", set())
    root = base / "ckpt"
    if not acked:
        return
    job = Job(Recorder(base), base)
    job.saves = 500
    store = job.start("after the crash")
    step = max(acked)
    job.save(store, step, generation=0)
    job.save(store, step + 1)
    check(root, acked | {step + 1}, may_go)
    store.prune(keep_last=2)
    check(root, {step, step + 1}, may_go | acked)


class Search:
    """Goes through crash states; remembers which it has seen.

    Args:
        scratch: for the disks.
        seed: of what is chosen at random.
        num_samples: how many random states are looked at after each call.
        go_on_every: in each so manieth state the job goes on; 0: never.
        every: looks after each so manieth call only.
        check: what a fresh job must find.
        go_on: what it must be able to do.
    """

    def __init__(
        self,
        scratch: Path,
        seed: int = 0,
        *,
        num_samples: int,
        go_on_every: int = 0,
        every: int = 1,
        check: Callable[[Path, Known], None] = check_one,
        go_on: Callable[[Path, Known], None] = go_on_with_one,
    ) -> None:
        self.scratch = scratch
        self.rng = random.Random(seed)
        self.num_samples = num_samples
        self.go_on_every = go_on_every
        self.every = every
        self.check, self.go_on = check, go_on
        self.seen: set[bytes] = set()
        self.enumerated = 0
        self.went_on = 0

    def run(self, ops: list[Op], begin: int = 0) -> None:
        disk = Disk()
        known: Known = {}
        for number in range(len(ops) + 1):
            if number > 0:
                op = ops[number - 1]
                if op[0] == "mark":
                    known = {**known, op[1]: known.get(op[1], set()) | set(op[2:])}
                else:
                    disk.apply(op)
            if number >= begin and number % self.every == 0:
                for state in crash_states(disk, self.rng, self.num_samples):
                    self.look(state, known, f"after call {number}: {str(ops[number - 1 : number])[:200]}")

    def look(self, state: dict[str, bytes | None], known: Known, where: str) -> None:
        self.enumerated += 1
        mark = fingerprint(state, sorted((what, sorted(told)) for what, told in known.items()))
        if mark in self.seen:
            return
        self.seen.add(mark)
        target = self.scratch / "state"
        materialise(state, target)
        try:
            self.check(target, known)
            if self.go_on_every and len(self.seen) % self.go_on_every == 0 and known:
                self.go_on(target, known)
                self.went_on += 1
        except Exception as error:
            raise AssertionError(f"{where}, {len(state)} names, told of {known}: {error!r}") from error
        finally:
            shutil.rmtree(target)
