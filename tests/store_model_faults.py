"""The model of a store's life with faults, and with a second tier that is drained to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from arc_dist.checkpoint_store.drain import Drainer
from arc_dist.errors import Fenced, StoreCorrupt, StoreGone
from crash_disk import Killed
from os_calls import NAMESPACE_AND_DATA, Call, OsCalls
from store_model import WORLDS, Life, Save, count, preferred, removable, require_restorable


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


class FaultyLife(Life):
    """Adds crashes within saves, and damage."""

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
            self.committed(save)  # whole, whether or not anybody was told
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
            flipped = content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]
            path.write_bytes(content[:place] if way == "cut" else flipped)
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


class TieredLife(FaultyLife):
    """Adds the slow tier: what it holds are copies, each whole and undamaged."""

    def __init__(self) -> None:
        super().__init__()
        self.slow: list[Save] = []

    def expected_copy(self, every: int | None) -> Save | None:
        held = {step: c for step, c in preferred(self.commits).items() if c.trusted}
        newest = max(held, default=-1)
        there = max((c.step for c in self.slow if c.trusted), default=-1)
        wanted = newest > there and (every is None or newest // every > there // every)
        return held[newest] if wanted else None

    def is_taken(self, save: Save) -> bool:
        """Whether the slow tier has begun, or has, another attempt in the directory of this name."""
        mine, other = (json.loads((tier / "run" / save.directory / "attempt.json").read_text()) for tier in self.roots)
        return mine != other

    @property
    def roots(self) -> tuple[Path, Path]:
        return self.root, self.base / "slow"

    @rule(every=st.sampled_from([None, None, 3]))
    def drain(self, every: int | None) -> None:
        wanted = self.expected_copy(every)
        try:
            Drainer(self.tiers(every))._drain(False)
        except (StoreCorrupt, StoreGone):
            assert wanted is not None and wanted.shard_damaged
            count("copy refused")
        except Fenced:
            assert wanted is not None and self.is_taken(wanted)
            count("copy fenced")
        else:
            if wanted is not None:
                assert not wanted.shard_damaged
                self.slow.append(dataclasses.replace(wanted))
                count("copy")
        gone = removable(self.roots[1], self.slow, set(), 3)
        self.slow = [c for c in self.slow if c.step not in gone]

    @rule(span=st.integers(0, 2))
    def quarantine(self, span: int) -> None:
        """A rollback gives up the newest steps, in every tier."""
        first = self.step - span
        self.tiers().quarantine(first, self.step, "poisoned")
        for save in [*self.commits, *self.slow]:
            if first <= save.step <= self.step and not save.manifest_damaged:
                save.quarantined = True
                count("quarantine")
        self.go_back(span + 1, False)

    @precondition(lambda self: self.slow)
    @rule(world=WORLDS, data=st.data())
    def restore_from_tiers(self, world: int, data: Any) -> None:
        """From the tier with the newest commit of a step; a damaged file from the other one, if that has the same."""
        fast, slow = preferred(self.commits), preferred(self.slow)
        assert [info.step for info in self.tiers().steps()] == sorted({*fast, *slow})
        step = data.draw(st.sampled_from(sorted({*fast, *slow})))
        both = [tier[step] for tier in (fast, slow) if step in tier]
        wanted = max(both, key=lambda save: save.order)
        helped = any(save.seed == wanted.seed and not save.shard_damaged for save in both)
        try:
            require_restorable(self.tiers().open(step), wanted, world)
        except (StoreCorrupt, StoreGone):
            assert not helped
        else:
            assert helped
            count("restore from tiers")
            count("repaired", wanted.shard_damaged)

    @invariant()
    def slow_tier_is_the_model(self) -> None:
        listed = {info.step: (info.directory, info.certified) for info in self.tiers().stores[1].steps()}
        assert listed == {save.step: (save.directory, save.trusted) for save in preferred(self.slow).values()}
