"""What a process does that is killed at some call, and what the next one must find and be able to do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arc_dist.checkpoint_store import Store, transfer
from arc_dist.checkpoint_store.backends import LocalBackend
from arc_dist.checkpoint_store.drain import Drainer
from arc_dist.checkpoint_store.orphans import collect_orphans
from arc_dist.checkpoint_store.tiers import Tier, Tiers
from dedup_helpers import LARGE
from store_helpers import fsdp_cut, random_tensor, rows, same_bits, whole

WORLD_SIZE = 2
STEP = 3  # that the killed process saves
DAY_S = 86400.0
Say = Callable[..., Any]


def tiers_in(root: Path, owner: str) -> Tiers:
    slow = Tier(url=str(root / "slow"), keep="last=2")
    return Tiers([Tier(url=str(root / "fast")), slow], owner=owner, dedup=True)


def state_of(step: int, owner: str) -> dict[str, Any]:
    """`frozen` is the same from step 2 on, so steps refer to step 2."""
    seed = 1000 * step + sum(owner.encode())
    frozen = random_tensor(LARGE, "float32", min(step, 2))
    return {"w": random_tensor((60, 40), "float32", seed), "b": random_tensor((9,), "bfloat16", seed), "frozen": frozen}


def save(store: Store, step: int, owner: str) -> None:
    state = state_of(step, owner)
    parts = {}
    for rank in range(WORLD_SIZE):
        tensors = [rows("w", state["w"], *fsdp_cut(60, rank, WORLD_SIZE))]
        tensors += [whole(name, state[name]) for name in ("b", "frozen")]
        objects = {"owner": owner, "step": step}
        parts[rank] = store.write_part(
            step, generation=0, rank=rank, world_size=WORLD_SIZE, tensors=tensors, objects=objects
        )
    store.commit(step, 0, WORLD_SIZE, parts, {"certified": True})


def drain(tiers: Tiers) -> None:
    drainer = Drainer(tiers)
    drainer.start()
    assert drainer.close(finish_within_s=60.0)


def before(say: Say, root: Path) -> None:
    """Two steps in both tiers, by a process that ended well."""
    tiers = tiers_in(root, "first")
    tiers.check_writable()
    tiers.take_over()
    for step in (1, 2):
        save(tiers.stores[0], step, "first")
        drain(tiers)


def life(say: Say, root: Path) -> None:
    """Takes the run over, saves and commits, drains and prunes the slow tier, marks, prunes, restores."""
    transfer._NUM_STREAMS = 1  # or which of its threads makes the nth call would be left to chance
    tiers = tiers_in(root, "killed")
    tiers.check_writable()
    tiers.take_over()
    save(tiers.stores[0], STEP, "killed")
    say("acked", STEP)
    drain(tiers)
    tiers.quarantine(1, 1, "poisoned")
    assert tiers.stores[0].prune(keep_last=2) == [1]
    tiers.stores[0].pin(2, "kept")
    check_step(tiers, STEP)


def careless_life(say: Say, root: Path) -> None:
    """As `life`, of a store that writes manifests where they will be read, in two pieces."""

    def create_exclusive(self: LocalBackend, path: str, data: bytes) -> bool:
        if self.exists(path):
            return False
        descriptor = os.open(self.root / path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        for piece in (data[:512], data[512:]):
            os.write(descriptor, piece)
        os.fsync(descriptor)
        os.close(descriptor)
        return True

    LocalBackend.create_exclusive = create_exclusive  # this process lives for this alone
    life(say, root)


def check_step(tiers: Tiers, step: int) -> None:
    """One whole step of one owner, bit for bit, from all tiers and in each."""
    checkpoint = tiers.open(step)
    (owner,) = {checkpoint.objects(rank)["owner"] for rank in range(WORLD_SIZE)}
    expected = state_of(step, owner)
    loaded = checkpoint.read([checkpoint.specs()[name] for name in expected])
    assert all(same_bits(tensor, expected[name]) for name, tensor in zip(expected, loaded)), (step, owner)
    assert checkpoint.damage == []
    for store in tiers.stores:
        if step in {info.step for info in store.steps()}:
            assert store.open(step).verify() == []


def check_all(tiers: Tiers, newest: int) -> None:
    infos = tiers.steps(include_damaged=True)
    assert [info.problem for info in infos if info.problem is not None] == []
    for info in infos:
        check_step(tiers, info.step)
    assert max(info.step for info in infos if info.certified) >= newest


def after(say: Say, root: Path, acked: int) -> tuple[int, int]:
    """A fresh process: restores, goes on, and collects what the dead one left; how many orphans and loose files."""
    tiers = tiers_in(root, "next")
    fast, slow = tiers.stores
    check_all(tiers, acked)
    step = max(info.step for info in tiers.steps()) + 1
    tiers.check_writable()
    tiers.take_over()
    save(fast, step, "next")
    drain(tiers)
    assert slow.newest() == fast.newest() or slow.manifest(step).same_state(fast.manifest(step))
    fast.prune(keep_last=2)
    check_all(tiers, step)
    assert all(not o.removed or o.why == "its removal had begun" for s in tiers.stores for o in collect(s, 0.0))
    done = [orphan for store in tiers.stores for orphan in collect(store, 2 * DAY_S)]
    assert all(orphan.removed for orphan in done), done
    for store in tiers.stores:
        require_tidy(store)
    check_all(tiers, step)
    return sum(not o.drafts for o in done), sum(len(o.drafts) for o in done)


def collect(store: Store, after_s: float) -> list[Any]:
    return collect_orphans(store.backend, store.run, now=time.time() + after_s)


def require_tidy(store: Store) -> None:
    """Nothing is there but whole steps, marks and owners."""
    run = Path(store.url) / store.run
    wanted = {info.directory for info in store.steps()}
    for path in run.iterdir():
        if path.is_dir():
            assert path.name in wanted, path
            files = {file.name for file in store._catalog.manifest(path.name).files}
            assert {inner.name for inner in path.iterdir()} == files | {"manifest.json"}, path
        else:
            assert path.name.startswith(("marks-", "owner-")) and path.name.endswith(".json"), path
