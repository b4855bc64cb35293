"""Hours of faults in minutes: many restarts of one job, after which nothing may have grown and no step be lost."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from bench_restart import WORLD_SIZE, Job, kill_one, running

KILLS = 300
WARM_UP = 20  # restarts after which the supervisors' memory has settled
LIMIT_S = 60.0


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_hundreds_of_kills_lose_no_step_and_nothing_grows():
    rng = random.Random(1)
    with running("arc") as job:
        for number in range(KILLS):
            restart = kill_one(job, rng.randrange(WORLD_SIZE), rng, LIMIT_S)
            assert restart.seconds is not None, f"kill {number}: training did not go on within {LIMIT_S} s"
            assert restart.lost_steps == 0, f"kill {number}: {restart.lost_steps} committed steps were lost"
            if number == WARM_UP:
                early = usage(job)
        late = usage(job)
    assert late["descriptors"] <= early["descriptors"] + 8, (early, late)
    assert late["resident_bytes"] <= early["resident_bytes"] * 1.1 + (32 << 20), (early, late)
    assert late["processes"] == early["processes"], (early, late)
    assert late["shared_files"] <= early["shared_files"] + 2, (early, late)


def usage(job: Job) -> dict[str, int]:
    """What the launcher, the supervisors and their zygotes hold; trainers are new each time and are left out."""
    trainers = {trainer.pid for trainer in job.read()}
    pids = [pid for pid in descendants(job.process.pid) if pid not in trainers]
    shm = Path(os.environ.get("ARC_SHM_ROOT", "/dev/shm"))
    return {
        "processes": len(pids),
        "descriptors": sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids),
        "resident_bytes": sum(resident_bytes(pid) for pid in pids),
        "shared_files": sum(1 for path in shm.rglob("*") if path.is_file()),
    }


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descendants(pid: int) -> list[int]:
    """A process and everything below it."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found
