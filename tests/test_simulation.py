"""Whole jobs of the real service and store under a seeded scheduler and all kinds of faults."""

from __future__ import annotations

import collections
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

import stories
from arc_dist.coordinator import service
from arc_dist.testing import faults, invariants
from arc_dist.testing.exhaustive import Scope, explore
from arc_dist.testing.faults import Kind
from arc_dist.testing.job import Options
from arc_dist.testing.simulation import Result, shrink, simulate

SMALL = 1_000
LARGE = 2
STORIES = sorted(stories.DIRECTORY.glob("*.txt"))


def options_of(seed: int) -> Options:
    """Mostly up to 8 ranks, sometimes up to 64."""
    num_ranks = 2 + seed % 7 if seed % 100 else 16 + seed // 100 % 49
    return Options(num_ranks=num_ranks, num_faults=4 + seed % 9, shards=seed % 3)


def large(seed: int) -> Options:
    return Options(num_ranks=1000, ranks_per_node=8, num_faults=6, shards=seed % 3)


def play_all(seeds: Iterable[tuple[int, Options]]) -> collections.Counter[str]:
    """Plays them; a violation fails with a short story. Returns what was met."""
    met: collections.Counter[str] = collections.Counter()
    began, played = time.process_time(), 0
    for seed, options in seeds:
        result = simulate(seed, options)
        if result.violation is not None:
            pytest.fail(_story(result))
        played += 1
        met.update(result.met)
        met.update(result.counts)
    spent_s = time.process_time() - began
    print(
        f"{played} schedules, {played / max(spent_s, 1e-9):.1f} per second of one core; met: {dict(met.most_common())}"
    )
    return met


def _story(result: Result) -> str:
    short = shrink(result, max_plays=60)
    lines = [f"seed {result.seed}, {result.options}: {result.violation}", *map(str, short.faults), *short.trace[-60:]]
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_small_jobs_come_to_their_end_and_no_invariant_breaks():
    met = play_all((seed, options_of(seed)) for seed in range(SMALL))
    missing = [kind.value for kind in Kind if met[kind.value] < 10]
    assert not missing, f"these faults were hardly met: {missing}"
    assert min(met["plan memory"], met["plan checkpoint"], met["plan none"], met["ended 0"]) >= 20


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_large_jobs_come_to_their_end():
    play_all((seed, large(seed)) for seed in range(LARGE))


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_thousands_of_small_and_some_large_jobs_come_to_their_end():
    def every() -> Iterable[tuple[int, Options]]:
        yield from ((seed, options_of(seed)) for seed in range(SMALL, 3 * SMALL))
        yield from ((seed, large(seed)) for seed in range(LARGE, 10))

    met = play_all(every())
    assert met["flush"] >= 3, "memory was hardly ever saved by a generation of its own"


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_a_hundred_thousand_small_and_a_thousand_large_jobs():
    def every() -> Iterable[tuple[int, Options]]:
        for seed in range(100_000, 200_000):
            options = options_of(seed)
            yield seed, dataclasses.replace(options, num_faults=options.num_faults + 4)
        for seed in range(1000, 2000):
            yield seed, large(seed)

    met = play_all(every())
    assert sum(met[kind.value] for kind in Kind) >= 1_000_000


def test_a_seed_is_one_history_whatever_python_hashes(tmp_path: Path):
    program = (
        "from arc_dist.testing.job import Options\n"
        "from arc_dist.testing.simulation import simulate\n"
        "for seed in (3, 4, 5):\n"
        "    print(simulate(seed, Options(num_ranks=5, num_faults=12, shards=seed % 3)).digest)\n"
    )
    told = set()
    for hash_seed in ("1", "2"):
        environ = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True)
        told.add(done.stdout)
    assert len(told) == 1
    assert len(set(told.pop().split())) == 3


def test_a_failing_seed_becomes_a_short_story(monkeypatch: pytest.MonkeyPatch):
    """A supervisor that a restart forgot, with the remedy taken out, among faults that have nothing to do with it."""
    monkeypatch.setattr(service, "member_of", lambda *_: None)
    told = [
        "at 0.190 crash-coordinator 0 for 0.001",
        "at 0.244 freeze-supervisor 2 for 4.000",
        "at 0.304 crash-supervisor 0",
        "at 0.300 jump-wall-clock 0 for 1.000",
        "at 0.400 slow-rank 2 for 0.100",
    ]
    result = simulate(6, Options(), faults=[faults.parse(line) for line in told])
    assert result.violation is not None
    short = shrink(result)
    assert {fault.kind for fault in short.faults} == {
        Kind.CRASH_COORDINATOR,
        Kind.FREEZE_SUPERVISOR,
        Kind.CRASH_SUPERVISOR,
    }
    assert any("violation: S13" in line for line in short.trace)


@pytest.mark.parametrize("path", STORIES, ids=lambda path: path.stem)
def test_a_story_is_told_as_before(path: Path):
    story = stories.read(path)
    result = story.play()
    assert result.violation is None
    assert sum(result.met.values()) >= len(story.faults), "a fault of the story did not happen"
    assert result.trace == story.trace, f"look at the difference; if it is meant: python tests/stories.py {path}"


def test_faults_can_be_written_and_read():
    import random

    drawn = faults.draw(random.Random(1), num=3000, num_ranks=8, num_nodes=4, horizon_s=3.0)
    assert {fault.kind for fault in drawn} == set(Kind)
    assert [faults.parse(str(fault)) for fault in drawn] == drawn
    with pytest.raises(ValueError, match="not a fault"):
        faults.parse("something else")


def test_every_kind_of_fault_is_described():
    text = (Path(__file__).parent.parent / "docs" / "faults.md").read_text()
    assert not [kind.value for kind in Kind if f"`{kind.value}`" not in text]
    checkers = [name for name in dir(invariants) if name.startswith("s") and name[1].isdigit()]
    assert len(checkers) >= 14
    assert all(getattr(invariants, name).__doc__ for name in checkers)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "scope",
    [Scope(kills=0, zombies=0), Scope(num_ranks=2, kills=0), Scope(num_ranks=2, zombies=0)],
    ids=["3 ranks, a crash", "2 ranks, a crash, a zombie", "2 ranks, a kill, a crash"],
)
def test_every_state_of_a_small_job(scope: Scope):
    found = explore(scope)
    print(f"{scope}: {found.num_states} states, {found.num_transitions} transitions")
    assert found.is_complete
    assert found.num_states > 5_000
    assert found.num_done
    assert found.met["crash"] and bool(found.met["zombie"]) == bool(scope.zombies)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("max_states", [10_000, pytest.param(30_000, marks=pytest.mark.soak)])
def test_the_nearest_states_of_a_larger_job(max_states: int):
    """Too many to visit all; breadth first, so all that is reached by few events."""
    found = explore(Scope(max_states=max_states))
    print(f"{found.num_states} states, {found.num_transitions} transitions, complete: {found.is_complete}")
    assert found.met["kill"] and found.met["crash"] and found.met["replace"]


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_every_state_of_three_ranks_two_checkpoints_a_crash_and_a_zombie():
    found = explore(Scope(kills=0))
    print(f"{found.num_states} states, {found.num_transitions} transitions")
    assert found.is_complete
    assert found.num_states > 400_000
    assert found.met["zombie"]
