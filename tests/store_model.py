"""The model of a store's life: saves, commits, roll backs, marks, prunes and restores, and what must be there after."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from arc_dist.checkpoint_store import Store, TensorSpec
from arc_dist.checkpoint_store.manifest import parse_manifest
from arc_dist.checkpoint_store.tiers import Tier, Tiers
from arc_dist.errors import Fenced, StoreCorrupt, StoreError, StoreGone
from dedup_helpers import LARGE
from store_helpers import fsdp_cut, random_tensor, rows, same_bits, whole

ROWS = 7
WORLDS = st.integers(1, 4)
counted: dict[str, int] = {}


@dataclasses.dataclass
class Save:
    """One attempt: what was written, and what became of it."""

    seed: int
    step: int
    owner: str
    generation: int
    world_size: int
    certified: bool
    parts: dict[int, Any]
    directory: str = ""
    order: int = 0  # of its commit; an attempt may be committed after one that was begun later
    manifest_damaged: bool = False
    shard_damaged: bool = False
    quarantined: bool = False

    @property
    def trusted(self) -> bool:
        return self.certified and not self.quarantined and not self.manifest_damaged


class Life(RuleBasedStateMachine):
    """The model: commits in their order, and attempts that could still be committed."""

    scratch: Path
    dedup = True

    def __init__(self) -> None:
        super().__init__()
        self.base = Path(tempfile.mkdtemp(dir=Life.scratch))
        self.root = self.base / "fast"
        self.numbers = itertools.count(1)
        self.step, self.generation, self.owner = 0, 0, "start 0"
        self.open: list[Save] = []  # written, not committed
        self.commits: list[Save] = []  # the newest last
        self.pins: set[int] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.base)

    @initialize()
    def begin(self) -> None:
        self.tiers().check_writable()

    def tiers(self, every: int | None = None) -> Tiers:
        slow = Tier(url=str(self.base / "slow"), every=every, keep="last=3")
        return Tiers([Tier(url=str(self.root)), slow], owner=self.owner, dedup=self.dedup)

    def store(self, owner: str | None = None) -> Store:
        return Store(self.root, owner=owner or self.owner, dedup=self.dedup)

    def write(self, save: Save, ranks: int) -> None:
        tensors = state_of(save.seed)
        for rank in range(ranks):
            parts = [rows("w", tensors["w"], *fsdp_cut(ROWS, rank, save.world_size))]
            save.parts[rank] = self.store(save.owner).write_part(
                save.step, generation=save.generation, rank=rank, world_size=save.world_size,
                tensors=[*parts, whole("b", tensors["b"]), whole("frozen", tensors["frozen"])],
                objects={"seed": save.seed},
            )  # fmt: skip
            save.directory = save.parts[rank]["directory"]

    def commit(self, save: Save) -> None:
        meta = {"certified": save.certified, "seed": save.seed}
        self.store(save.owner).commit(save.step, save.generation, save.world_size, save.parts, meta)

    def new(self, ahead: int, world: int, certified: bool) -> Save:
        self.step += ahead
        # An unfinished attempt of the same generation at the same step would be joined, not begun anew.
        now = (self.owner, self.generation, self.step)
        self.drop([s for s in self.open if (s.owner, s.generation, s.step) == now])
        return Save(next(self.numbers), self.step, self.owner, self.generation, world, certified, {})

    def committed(self, save: Save) -> None:
        save.order = next(self.numbers)
        self.commits.append(save)
        count("commit")
        count("referred", bool(refers_to(self.root, save.directory)))

    @rule(ahead=st.integers(0, 2), world=WORLDS, certified=st.booleans())
    def save(self, ahead: int, world: int, certified: bool) -> None:
        save = self.new(ahead, world, certified)
        self.write(save, world)
        self.open.append(save)
        count("save")

    @rule(ahead=st.integers(0, 3), world=WORLDS, certified=st.sampled_from([True, True, True, False]))
    def save_and_commit(self, ahead: int, world: int, certified: bool) -> None:
        self.save(ahead, world, certified)
        self.commit(self.open[-1])  # by the newest generation of the newest start: nothing may refuse it
        self.committed(self.open.pop())

    def drop(self, saves: list[Save]) -> None:
        for save in saves:
            assert self.store(save.owner).discard(save.step, generation=save.generation, world_size=save.world_size)
            self.open.remove(save)
            count("discard")

    def refers_to_damage(self, save: Save) -> bool:
        needed = {row["directory"] for part in save.parts.values() for row in part["tensors"] if "directory" in row}
        return any(c.manifest_damaged for c in self.commits if c.directory in needed)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def commit_one(self, data: Any) -> None:
        save = data.draw(st.sampled_from(self.open))
        later = [c for c in self.commits if c.owner == save.owner and c.generation > save.generation]
        must = any(c.step == save.step and not c.manifest_damaged for c in later)
        try:
            self.commit(save)
        except Fenced:
            assert later
            self.drop([save])
            count("fenced")
            return
        except StoreCorrupt:
            assert self.refers_to_damage(save)
            self.drop([save])
            count("fenced")
            return
        assert not must and not self.refers_to_damage(save)
        self.open.remove(save)
        self.committed(save)

    @precondition(lambda self: self.commits)
    @rule(data=st.data())
    def commit_again(self, data: Any) -> None:
        save = data.draw(st.sampled_from(self.commits))
        if not save.manifest_damaged and not save.shard_damaged and not self.refers_to_damage(save):
            try:
                self.commit(save)
            except Fenced:
                assert any(c.owner == save.owner and c.generation > save.generation for c in self.commits)
            count("commit again")

    @rule(back=st.integers(0, 4), restart=st.booleans())
    def go_back(self, back: int, restart: bool) -> None:
        """The ranks roll back in a new generation, or the job is started anew."""
        self.generation += 1
        if restart:
            self.owner, self.generation = f"start {next(self.numbers)}", 0
        self.step = max(0, self.step - back)
        count("restart" if restart else "roll back")

    @rule(world=WORLDS)
    def overtaken(self, world: int) -> None:
        """A rank of an old generation wakes up after the new one has committed the step."""
        self.save(0, world, True)
        old = self.open[-1]
        self.go_back(0, False)
        self.save_and_commit(0, world, True)
        with pytest.raises(Fenced):
            self.commit(old)
        self.drop([old])
        count("fenced")

    @precondition(lambda self: any(not c.manifest_damaged for c in self.commits))
    @rule(data=st.data())
    def pin(self, data: Any) -> None:
        step = data.draw(st.sampled_from(sorted({c.step for c in self.commits if not c.manifest_damaged})))
        if step in self.pins:
            assert self.store().unpin(step)
        else:
            self.store().pin(step, "kept")
        self.pins ^= {step}
        count("pin")

    @rule(keep=st.integers(2, 4))
    def prune(self, keep: int) -> None:
        gone = removable(self.root, self.commits, self.pins, keep)
        assert self.store().prune(keep_last=keep) == sorted(gone)
        self.commits = [c for c in self.commits if c.step not in gone or c.manifest_damaged]
        count("prune", len(gone))

    @rule(world=WORLDS)
    def restore(self, world: int) -> None:
        """As a job does it: the newest certified step, and the next older one when that is damaged."""
        below: int | None = None
        for wanted in [*self.restorable(), None]:
            info = self.store().newest(below=below)
            assert (info.step if info else None) == (wanted.step if wanted else None)
            if info is None or wanted is None:
                return
            assert info.directory == wanted.directory
            try:
                require_restorable(self.store().open(wanted.step, directory=wanted.directory), wanted, world)
            except (StoreCorrupt, StoreGone):
                assert wanted.shard_damaged
                below = wanted.step
                count("fell back")
            else:
                assert not wanted.shard_damaged
                count("restore")
                return

    def restorable(self) -> Iterator[Save]:
        chosen = {c.step: c for c in self.commits if c.trusted}
        return iter(chosen[step] for step in sorted(chosen, reverse=True))

    @invariant()
    def listing_is_the_model(self) -> None:
        count("step")
        infos = self.store().steps(include_damaged=True)
        listed = {info.step: (info.directory, info.certified) for info in infos if info.problem is None}
        assert listed == {s: (c.directory, c.trusted) for s, c in preferred(self.commits).items()}
        damaged = {info.directory for info in infos if info.problem is not None}
        assert damaged == {c.directory for c in self.commits if c.manifest_damaged}


def preferred(commits: list[Save]) -> dict[int, Save]:
    """The commit that stands for each step: the newest sound one, and one in quarantine only if there is no other."""
    ordered = sorted((c for c in commits if not c.manifest_damaged), key=lambda c: not c.quarantined)
    return {c.step: c for c in ordered}


def removable(root: Path, commits: list[Save], pins: set[int], keep: int) -> set[int]:
    """The steps that retention removes: old, not pinned, and nothing that stays refers to them."""
    sound = [c for c in commits if not c.manifest_damaged]
    trusted = sorted({c.step for c in sound if c.trusted})
    oldest = trusted[-keep] if len(trusted) >= keep else -1
    gone = {c.step for c in sound if c.step < oldest} - pins
    while True:
        going = {c.directory for c in sound if c.step in gone}
        staying = {path.name for path in (root / "run").glob("step-*")} - going
        needed = {name for directory in staying for name in refers_to(root, directory)}
        kept = {c.step for c in sound if c.step in gone and c.directory in needed}
        if not kept:
            return gone
        gone -= kept


def refers_to(root: Path, directory: str) -> set[str]:
    """What a step refers to; what an attempt, or a step with a damaged manifest, has announced."""
    path = root / "run" / directory
    try:
        names = parse_manifest((path / "manifest.json").read_bytes(), "m", directory).refers_to
    except (FileNotFoundError, StoreError):
        names = json.loads((path / "attempt.json").read_text()).get("refers", [])
    return set(names) - {directory}


def require_restorable(checkpoint: Any, save: Save, world: int) -> None:
    """Reads the step as `world` ranks do and compares every bit; raises what reading raises."""
    expected = state_of(save.seed)
    for rank in range(world):
        begin, end = fsdp_cut(ROWS, rank, world)
        spec = TensorSpec("w", "float32", (end - begin, 3), (ROWS, 3), (begin, 0))
        w, b, frozen = checkpoint.read([spec, checkpoint.specs()["b"], checkpoint.specs()["frozen"]])
        assert same_bits(w, expected["w"][begin:end]) and same_bits(b, expected["b"])
        assert same_bits(frozen, expected["frozen"])
    assert {checkpoint.objects(rank)["seed"] for rank in range(save.world_size)} == {save.seed}


@functools.lru_cache(maxsize=64)
def state_of(seed: int) -> dict[str, torch.Tensor]:
    """`frozen` is the same for several saves in a row, so that steps refer to it."""
    return {
        "w": random_tensor((ROWS, 3), "float32", seed),
        "b": random_tensor((2,), "bfloat16", seed + 7),
        "frozen": random_tensor(LARGE, "float32", 1000 + seed // 4),
    }


def count(what: str, number: int = 1) -> None:
    counted[what] = counted.get(what, 0) + number
