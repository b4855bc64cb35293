"""A job's life with two tiers: what it does to both disks, and what must be found on them after any crash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from arc_dist.checkpoint_store import Store, references
from arc_dist.checkpoint_store.catalog import Catalog
from arc_dist.checkpoint_store.drain import Drainer
from arc_dist.checkpoint_store.owners import require_owner
from arc_dist.checkpoint_store.pins import read_marks
from arc_dist.checkpoint_store.tiers import Tier, Tiers
from arc_dist.checkpoint_store.transfer import copy_step
from arc_dist.errors import Fenced, StoreGone
from crash_disk import Recorder
from store_helpers import fsdp_cut, random_tensor, rows, same_bits, whole

Known = dict[str, set[Any]]
NAMES = ("fast", "slow")


def tiers_in(base: Path, owner: str) -> Tiers:
    fast, slow = (str(base / name) for name in NAMES)
    return Tiers([Tier(url=fast), Tier(url=slow, keep="last=2")], owner=owner, dedup=True)


def state_of(seed: int) -> dict[str, torch.Tensor]:
    """`frozen` is the same in all, so every step but the first refers to it."""
    tensors = {"w": random_tensor((30, 20), "float32", seed), "frozen": random_tensor((40, 20), "float32", 7)}
    return {**tensors, "b": random_tensor((9,), "bfloat16", seed + 1)}


class TieredJob:
    """Saves through a recorder. Every save has bytes of its own, named in its objects, so that a mix shows."""

    def __init__(self, recorder: Recorder, base: Path) -> None:
        self.recorder, self.base, self.saves = recorder, base, 0

    def start(self, owner: str) -> Tiers:
        tiers = tiers_in(self.base, owner)
        tiers.check_writable()
        tiers.take_over()
        self.recorder.mark("owner", owner)
        return tiers

    def save(self, tiers: Tiers, step: int, *, generation: int = 0, world_size: int = 2) -> None:
        self.saves += 1
        store, seed, parts = tiers.stores[0], 1000 * step + self.saves, {}
        state = state_of(seed)
        for rank in range(world_size):
            parts[rank] = store.write_part(
                step, generation=generation, rank=rank, world_size=world_size, objects={"seed": seed},
                tensors=[rows("w", state["w"], *fsdp_cut(30, rank, world_size))]
                + [whole(name, state[name]) for name in ("frozen", "b")],
            )  # fmt: skip
        store.commit(step, generation, world_size, parts, {"certified": True})
        self.recorder.mark("fast", step)

    def drain(self, tiers: Tiers, step: int) -> None:
        Drainer(tiers)._drain(False)  # in this thread, so that errors are seen; its copies have threads of their own
        self.recorder.mark("slow", step)

    def quarantine(self, tiers: Tiers, step: int) -> None:
        present = [info.directory for store in tiers.stores for info in store.steps() if info.step == step]
        tiers.quarantine(step, step, "poisoned")
        self.recorder.mark("quarantined", *present)


def tiered_life(job: TieredJob) -> None:
    """References, drains, a rollback with its quarantine, a pin, two prunes, a copy by hand, and a second owner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(references, "MIN_REFERRED_BYTES", 256)
        tiers = job.start("a")
        fast, slow = tiers.stores
        job.save(tiers, 10)
        job.drain(tiers, 10)
        job.save(tiers, 20)
        job.save(tiers, 30, world_size=3)
        job.drain(tiers, 30)
        job.quarantine(tiers, 30)
        job.save(tiers, 30, generation=1)
        assert fast.manifest(30).refers_to == ("step-00000010",)
        job.drain(tiers, 30)
        fast.pin(10, "kept")
        job.recorder.mark("pinned", 10)
        copy_step(fast.backend, "run", "step-00000020", slow.backend)
        job.recorder.mark("slow", 20)
        restarted = job.start("b")
        job.save(restarted, 40)
        job.recorder.mark("may_go_fast", 20)
        assert fast.prune(keep_last=2) == [20]
        job.recorder.mark("may_go_slow", 10, 20)
        job.drain(restarted, 40)
        assert [info.step for info in slow.steps()] == [30, 40]


def check_tiers(base: Path, known: Known) -> None:
    """What a job that starts on these disks finds: in each tier whole steps, and everything that it was told of."""
    tiers = tiers_in(base, "reader")
    for name, store in zip(NAMES, tiers.stores):
        acked = known.get(name, set())
        try:
            marks = read_marks(store.backend, "run")
            infos = Catalog(store.backend, "run").infos(marks)
        except StoreGone:
            assert not acked
            assert not (base / name).exists()
            continue
        assert {info.step for info in infos} >= acked - known.get(f"may_go_{name}", set())
        for info in infos:
            assert info.problem is None
            check_commit(store, info.step, info.directory)
            assert info.quarantined is not None or info.directory not in known.get("quarantined", set())
        assert name == "slow" or set(marks.pins) >= known.get("pinned", set())
        newest = store.newest()
        assert newest is None or newest.directory not in known.get("quarantined", set())
        if "b" in known.get("owner", set()):
            with pytest.raises(Fenced):
                require_owner(store.backend, "run", "a")


def check_commit(store: Store, step: int, directory: str) -> None:
    checkpoint = store.open(step, directory=directory)
    assert checkpoint.verify() == []
    (seed,) = {checkpoint.objects(rank)["seed"] for rank in range(checkpoint.world_size)}
    assert seed // 1000 == step
    expected = state_of(seed)
    loaded = checkpoint.read([checkpoint.specs()[name] for name in expected])
    assert all(same_bits(tensor, expected[name]) for name, tensor in zip(expected, loaded)), directory


def go_on(base: Path, known: Known) -> None:
    """The job goes on from what it found: it takes the run over, saves, drains, prunes; nothing told is lost by it."""
    job = TieredJob(Recorder(base), base)
    job.saves = 500
    tiers = job.start("after the crash")
    step = max(known.get("fast", {0})) + 1
    for number in range(2):
        job.save(tiers, step + number)
    Drainer(tiers)._drain(False)
    tiers.stores[0].prune(keep_last=2)
    steps = {step, step + 1}
    gone = {f"may_go_{name}": set(range(step)) for name in NAMES}
    check_tiers(base, {**known, "fast": steps, "slow": {step + 1}, **gone})
