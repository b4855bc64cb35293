"""The test tools themselves: a tool that hides a failure would hide everybody's."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist

from ranks import Job, RanksFailed, rank_outcomes, run_job, run_ranks


def add(rank: int, world_size: int, scale: int) -> tuple[int, torch.Tensor, str]:
    total = torch.tensor([rank * scale])
    dist.all_reduce(total)
    return int(total.item()), torch.full((2,), float(rank)), os.environ["COLOUR"]


def raise_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("rank 1 means it")
    dist.all_reduce(torch.zeros(1))


def die_on_one(rank: int, world_size: int) -> str:
    print(f"rank {rank} was here")
    dist.barrier()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.all_reduce(torch.zeros(1))
    except RuntimeError:
        return "saw the death"
    return "did not see it"


def sleep_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(600)


def fork_a_sleeper(rank: int, world_size: int) -> int:
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
    return child


def test_results_come_back_by_rank():
    results = run_ranks(2, add, 10, env={"COLOUR": "red"})
    assert [total for total, _, _ in results] == [10, 10]
    assert results[1][1].equal(torch.ones(2))
    assert results[0][2] == "red"


def test_a_raise_on_one_rank_fails_the_call_with_its_traceback():
    with pytest.raises(RanksFailed, match="rank 1 means it"):
        run_ranks(2, raise_on_one)


def test_a_death_is_an_outcome():
    dead, survivor = rank_outcomes(2, die_on_one)
    assert dead.exit_code == -signal.SIGKILL
    assert not dead.ok
    assert "rank 0 was here" in dead.output
    assert survivor.ok
    assert survivor.value == "saw the death"


def test_a_hang_is_killed_at_the_deadline_and_shows_its_stack():
    started = time.monotonic()
    with pytest.raises(RanksFailed, match="sleep_on_one") as failure:
        run_ranks(2, sleep_on_one, timeout_s=4)
    assert "did not return before the deadline" in str(failure.value)
    assert time.monotonic() - started < 30


def test_grandchildren_end_with_the_rank():
    (child,) = run_ranks(1, fork_a_sleeper, init=False)
    for _ in range(200):
        if not _alive(child):
            return
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the rank's child outlived it")


def test_a_job_takes_detached_processes_with_it():
    script = (
        "import subprocess, sys; "
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True).pid)"
    )
    with Job([sys.executable, "-c", script]) as job:
        assert job.process.wait(30) == 0
        sleeper = int(job.stdout())
        assert job.pids() == [sleeper]
    assert not _alive(sleeper)


def test_a_job_reports_its_exit_code_and_is_killed_at_its_deadline():
    assert run_job([sys.executable, "-c", "import sys; print('hi'); sys.exit(3)"]).exit_code == 3
    assert run_job([sys.executable, "-c", "import time; time.sleep(60)"], timeout_s=0.5).exit_code is None


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
