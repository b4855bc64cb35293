"""Random lives of a store, against a model of what must be there: saves, commits, crashes, damage, prunes, restores."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from arc_dist.checkpoint_store import Store, TensorSpec, pruning
from arc_dist.checkpoint_store.retention import Decision, Retention, StepFacts
from arc_dist.errors import Fenced, StoreCorrupt, StoreError, StoreGone
from crash_disk import Killed
from os_calls import NAMESPACE_AND_DATA, Call, OsCalls
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
    manifest_damaged: bool = False
    shard_damaged: bool = False


class Killer(OsCalls):
    """Ends the process before its nth call that changes the disk."""

    def __init__(self, root: Path, at: int) -> None:
        super().__init__(root)
        self.left, self.died = at, False

    def rule(self, call: Call) -> Callable[[], Any]:
        if call.name in NAMESPACE_AND_DATA:
            self.left -= 1
        if self.left < 0 and call.name != "close":
            self.died = True
            raise Killed
        return super().rule(call)


class Life(RuleBasedStateMachine):
    """The model: commits in their order, and attempts that could still be committed."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir=Life.scratch))
        self.numbers = itertools.count(1)
        self.step, self.generation, self.owner = 0, 0, "start 0"
        self.open: list[Save] = []  # written, not committed
        self.commits: list[Save] = []  # the newest last

    scratch: Path

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @initialize()
    def begin(self) -> None:
        self.store().check_writable()

    def store(self, owner: str | None = None) -> Store:
        return Store(self.root, owner=owner or self.owner)

    def write(self, save: Save, ranks: int) -> None:
        tensors = state_of(save.seed)
        for rank in range(ranks):
            save.parts[rank] = self.store(save.owner).write_part(
                save.step, generation=save.generation, rank=rank, world_size=save.world_size,
                tensors=[rows("w", tensors["w"], *fsdp_cut(ROWS, rank, save.world_size)), whole("b", tensors["b"])],
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
        self.open.remove(save)
        self.commits.append(save)
        count("commit")

    @rule(ahead=st.integers(0, 2), world=WORLDS, certified=st.booleans())
    def save(self, ahead: int, world: int, certified: bool) -> None:
        save = self.new(ahead, world, certified)
        self.write(save, world)
        self.open.append(save)
        count("save")

    @rule(ahead=st.integers(0, 3), world=WORLDS, certified=st.sampled_from([True, True, True, False]))
    def save_and_commit(self, ahead: int, world: int, certified: bool) -> None:
        save = self.new(ahead, world, certified)
        self.write(save, world)
        self.open.append(save)
        self.commit(save)  # by the newest generation of the newest start: nothing may refuse it
        self.committed(save)

    def drop(self, saves: list[Save]) -> None:
        for save in saves:
            assert self.store(save.owner).discard(save.step, generation=save.generation, world_size=save.world_size)
            self.open.remove(save)
            count("discard")

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
        assert not must
        self.committed(save)

    @precondition(lambda self: self.commits)
    @rule(data=st.data())
    def commit_again(self, data: Any) -> None:
        save = data.draw(st.sampled_from(self.commits))
        if not save.manifest_damaged and not save.shard_damaged:
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
        old = self.new(0, world, True)
        self.write(old, world)
        self.open.append(old)
        self.go_back(0, False)
        self.save_and_commit(0, world, True)
        with pytest.raises(Fenced):
            self.commit(old)
        self.drop([old])
        count("fenced")

    @rule(ahead=st.integers(0, 2), world=WORLDS, at=st.integers(0, 70), written=st.booleans())
    def crash(self, ahead: int, world: int, at: int, written: bool) -> None:
        """The process dies within a save, or within the commit; another start follows."""
        save = self.new(ahead, world, True)
        if written:
            self.write(save, world)
        killer = Killer(self.root, at)
        with pytest.MonkeyPatch.context() as patch:
            killer.install(patch)
            try:
                if not written:
                    self.write(save, world)
                self.commit(save)
            except Killed:
                pass
            except Fenced:
                assert any(c.owner == save.owner and c.generation > save.generation for c in self.commits)
        count("killed" if killer.died else "survived")
        if save.directory and (self.root / "run" / save.directory / "manifest.json").exists():
            self.commits.append(save)  # whole, whether or not anybody was told
        self.go_back(0, True)

    @precondition(lambda self: self.commits)
    @rule(
        data=st.data(), manifest=st.booleans(), way=st.sampled_from(["flip", "cut", "remove"]), at=st.integers(0, 9999)
    )
    def damage(self, data: Any, manifest: bool, way: str, at: int) -> None:
        save = data.draw(st.sampled_from(self.commits))
        directory = self.root / "run" / save.directory
        path = directory / ("manifest.json" if manifest else f"rank-{save.world_size - 1:05d}.json")
        content = path.read_bytes() if path.exists() else b""
        if save.manifest_damaged or save.shard_damaged or (manifest and way == "remove"):
            return
        if way == "remove":
            path.unlink()
        else:
            place = at % len(content)
            changed = (
                content[:place]
                if way == "cut"
                else content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]
            )
            path.write_bytes(changed)
        save.manifest_damaged, save.shard_damaged = manifest, not manifest
        count("damage")

    @rule(world=WORLDS)
    def newest_is_damaged(self, world: int) -> None:
        self.step = max((c.step for c in self.commits), default=self.step)
        self.save_and_commit(1, world, True)
        (self.root / "run" / self.commits[-1].directory / "rank-00000.safetensors").write_bytes(b"")
        self.commits[-1].shard_damaged = True
        self.restore(world)
        self.store()._catalog.delete(self.commits.pop().directory)  # or all later restores would begin here

    @rule(keep=st.integers(2, 4))
    def prune(self, keep: int) -> None:
        sound = [c for c in self.commits if not c.manifest_damaged]
        certified = sorted({c.step for c in sound if c.certified})
        limit = certified[-keep] if len(certified) > keep else -1
        gone = [c for c in sound if c.step < limit]
        assert self.store().prune(keep_last=keep) == sorted({c.step for c in gone})
        self.commits = [c for c in self.commits if c not in gone]
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
                self.read(wanted, world)
            except (StoreCorrupt, StoreGone):
                assert wanted.shard_damaged
                below = wanted.step
                count("fell back")
            else:
                assert not wanted.shard_damaged
                count("restore")
                return

    def restorable(self) -> Iterator[Save]:
        chosen = {c.step: c for c in self.commits if c.certified and not c.manifest_damaged}
        return iter(chosen[step] for step in sorted(chosen, reverse=True))

    def read(self, save: Save, world: int) -> None:
        checkpoint = self.store().open(save.step, directory=save.directory)
        expected = state_of(save.seed)
        for rank in range(world):
            begin, end = fsdp_cut(ROWS, rank, world)
            spec = TensorSpec("w", "float32", (end - begin, 3), (ROWS, 3), (begin, 0))
            w, b = checkpoint.read([spec, checkpoint.specs()["b"]])
            assert same_bits(w, expected["w"][begin:end]) and same_bits(b, expected["b"])
        assert {checkpoint.objects(rank)["seed"] for rank in range(save.world_size)} == {save.seed}

    @invariant()
    def listing_is_the_model(self) -> None:
        count("step")
        found = {info.step: info.directory for info in self.store().steps()}
        assert found == {c.step: c.directory for c in self.commits if not c.manifest_damaged}
        damaged = {info.directory for info in self.store().steps(include_damaged=True) if info.problem is not None}
        assert damaged == {c.directory for c in self.commits if c.manifest_damaged}


def state_of(seed: int) -> dict[str, torch.Tensor]:
    return {"w": random_tensor((ROWS, 3), "float32", seed), "b": random_tensor((2,), "bfloat16", seed + 7)}


def count(what: str, number: int = 1) -> None:
    counted[what] = counted.get(what, 0) + number


def live(scratch: Path, num_lives: int, num_steps: int, *, random_seed: bool, quick: bool = False) -> None:
    Life.scratch = scratch
    counted.clear()
    logging.getLogger("arc_dist.checkpoint_store.catalog").setLevel(logging.ERROR)  # it names every damaged step
    machine = settings(
        max_examples=num_lives,
        stateful_step_count=num_steps,
        deadline=None,
        derandomize=not random_seed,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate] if quick else [Phase.generate, Phase.shrink],
    )
    run_state_machine_as_test(Life, settings=machine)


def test_two_thousand_steps(shm_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live(shm_root, 30, 80, random_seed=False)
    with capsys.disabled():
        print(f" {counted}", end="")
    assert counted["step"] >= 2000
    happened = {"save", "commit", "commit again", "killed", "damage", "prune", "restore", "fell back", "fenced"}
    assert not {what for what in happened if not counted.get(what)}, counted


@pytest.mark.soak
def test_a_hundred_thousand_steps(shm_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live(shm_root, 1100, 100, random_seed=True)
    with capsys.disabled():
        print(f" {counted}", end="")
    assert counted["step"] >= 100_000


def test_the_model_finds_a_store_that_forgets(shm_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prune that counts uncertified steps among those it keeps."""
    decide = pruning.decide

    def trusting(facts: Sequence[StepFacts], policy: Retention, now: float) -> dict[int, Decision]:
        return decide([dataclasses.replace(fact, certified=True) for fact in facts], policy, now)

    monkeypatch.setattr(pruning, "decide", trusting)
    with pytest.raises((AssertionError, StoreError)):
        live(shm_root, 30, 80, random_seed=False, quick=True)
