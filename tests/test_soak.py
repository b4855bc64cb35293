"""Weeks of faults in minutes: 100,000 steps and 300 restarts of one job; nothing may have grown, no step be lost."""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from bench_restart import Job, kill_one, running

KILLS = 300
STEPS_BETWEEN = 340  # 300 kills make 100,000 steps of it
WARM_UP = 30  # restarts after which everything has its size
GROWTH = 1.01


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_hundred_thousand_steps_with_hundreds_of_kills_lose_no_step_and_nothing_grows():
    rng = random.Random(1)
    options = argparse.Namespace(model="mlp", ranks=2, between=STEPS_BETWEEN, limit_s=120.0, store=True, extra=[])
    with running("arc", options) as job:
        for number in range(KILLS):
            restart = kill_one(job, rng.randrange(options.ranks), rng)
            assert restart.seconds is not None, f"kill {number}: training did not go on"
            assert restart.lost_steps == 0, f"kill {number}: {restart.lost_steps} committed steps were lost"
            if number == WARM_UP:
                early = usage(job)
        late = usage(job)
        steps = max(trainer.last_step for trainer in job.read())
    print(f"{steps} steps, {KILLS} kills\nearly: {early}\nlate:  {late}")
    assert steps >= 100_000
    for name in ("processes", "threads", "descriptors"):
        assert late[name] <= early[name], (name, early, late)
    for name in ("supervisors_bytes", "trainers_bytes", "shared_bytes", "store_bytes"):
        assert late[name] <= early[name] * GROWTH, (name, early, late)


def usage(job: Job) -> dict[str, int]:
    """What the job's processes and directories hold, at the same age of its trainers each time."""
    trainers = {trainer.pid for trainer in job.read()}
    everyone = descendants(job.process.pid)
    alive = [pid for pid in everyone if pid in trainers]
    others = [pid for pid in everyone if pid not in trainers]
    return {
        "processes": len(everyone),
        "threads": sum(len(os.listdir(f"/proc/{pid}/task")) for pid in everyone),
        "descriptors": sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in everyone),
        "supervisors_bytes": sum(map(resident_bytes, others)),
        "trainers_bytes": sum(map(resident_bytes, alive)),
        "shared_bytes": file_bytes(job.shm_root.rglob("*")),
        "store_bytes": bytes_between_saves(job.directory / "store"),
    }


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def file_bytes(paths: Iterable[Path]) -> int:
    total = 0
    for path in paths:
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue  # pruned while we look
    return total


def bytes_between_saves(store: Path) -> int:
    """A save, and what an interrupted one left, is there for a while: the least of many looks is without."""
    looks: list[int] = []
    while len(looks) < 40:
        looks.append(file_bytes(store.rglob("*")))
        time.sleep(0.05)
    return min(looks)


def descendants(pid: int) -> list[int]:
    """A process and everything below it."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found
