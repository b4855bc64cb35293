"""SIGKILL at every system call that changes the store: a fresh process restores, goes on, and tidies up.

The default run kills at a few calls of each thread; `make soak` at all of them (about 190).
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import killed_life
import strace_kill
from strace_kill import Nursery, Point

THREADS = ("main", "arc-drain", "arc-copy")
_REASON = strace_kill.why_not()

pytestmark = [pytest.mark.slow, pytest.mark.skipif(_REASON is not None, reason=_REASON or "")]


class Victims:
    """Lives on copies of one store, and what became of them."""

    def __init__(self, nursery: Nursery, root: Path) -> None:
        self.nursery, self.start, self.root = nursery, root / "start", root / "store"
        self.start.mkdir()
        nursery.call(killed_life.before, self.start)
        self.num_killed = self.num_orphans = self.num_loose = 0
        self.acked: set[bool] = set()

    def fresh(self) -> Path:
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.start, self.root)
        return self.root

    def points(self, thread: str) -> list[Point]:
        return self.nursery.calls(thread, self.root, killed_life.life, self.fresh())

    def kill_and_go_on(self, points: Sequence[Point]) -> None:
        for point in points:
            root = self.fresh()
            said = self.nursery.kill(point, root, killed_life.life, root)
            acked = ("said", ("acked", killed_life.STEP)) in said
            try:
                orphans, loose = self.nursery.call(killed_life.after, root, killed_life.STEP if acked else 2)
            except AssertionError as error:
                raise AssertionError(f"after SIGKILL at {point}: {error}") from error
            self.num_killed += 1
            self.acked.add(acked)
            self.num_orphans += orphans
            self.num_loose += loose


@pytest.fixture
def victims(shm_root: Path, tmp_path: Path) -> Iterator[Victims]:
    with strace_kill.nursery(tmp_path) as nursery:
        yield Victims(nursery, shm_root)


def report(victims: Victims, num_points: int, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(
            f" [killed at {victims.num_killed} of {num_points} calls; left {victims.num_orphans} directories, "
            f"{victims.num_loose} loose files]",
            end="",
        )


def test_killed_at_some_calls(victims: Victims, capsys: pytest.CaptureFixture[str]) -> None:
    """The same calls in each run, as long as the store makes the same ones."""
    rng = random.Random(0)
    points = {thread: victims.points(thread) for thread in THREADS}
    num_points = sum(len(found) for found in points.values())
    chosen = [rng.choice(points["main"]) for _ in range(5)]
    chosen += [rng.choice(points[thread]) for thread in ("arc-drain", "arc-copy") for _ in range(2)]
    victims.kill_and_go_on(chosen)
    report(victims, num_points, capsys)
    assert victims.num_killed == 9
    assert victims.acked == {False, True}
    assert victims.num_orphans + victims.num_loose > 0


def test_a_store_that_writes_manifests_in_place_is_found_out(victims: Victims) -> None:
    life = killed_life.careless_life
    points = victims.nursery.calls("main", victims.root, life, victims.fresh())
    second = [p for p in points if p.call == "write" and "manifest.json" in p.line][1]
    root = victims.fresh()
    victims.nursery.kill(second, root, life, root)
    with pytest.raises(AssertionError, match=r"info\.problem"):
        victims.nursery.call(killed_life.after, root, 2)


@pytest.mark.soak
def test_killed_at_every_call(victims: Victims, capsys: pytest.CaptureFixture[str]) -> None:
    points = [point for thread in THREADS for point in victims.points(thread)]
    assert {point.thread for point in points} == set(THREADS)
    assert {"write", "fsync", "rename", "link", "unlink", "mkdir", "rmdir", "fallocate"} <= {p.call for p in points}
    victims.kill_and_go_on(points)
    report(victims, len(points), capsys)
    assert victims.num_killed == len(points) >= 150
    assert victims.num_orphans >= 20
    assert victims.num_loose >= 10
