"""Supervisors under torchrun: an unmodified DDP script survives the deaths of its ranks, wherever they hit."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ranks import Job, torchrun

pytestmark = pytest.mark.slow

SCRIPT = str(Path(__file__).parent / "scripts" / "plain_ddp.py")


@dataclasses.dataclass(frozen=True)
class Life:
    """One run of the script by one rank."""

    pid: int
    started_at: float
    steps: list[float]  # when each was made
    total: str | None  # the sum of the parameters at the end


def lives(directory: Path, rank: int) -> list[Life]:
    path = directory / f"rank-{rank}"
    found: list[Life] = []
    if not path.exists():
        return found
    for line in path.read_text().splitlines():
        match line.split():
            case ["start", pid, at]:
                found.append(Life(int(pid), float(at), [], None))
            case ["step", _, at]:
                found[-1].steps.append(float(at))
            case ["end", total, _]:
                found[-1] = dataclasses.replace(found[-1], total=total)
    return found


def current(directory: Path, generation: int, steps: int) -> Callable[[], list[Life] | None]:
    """The present lives of both ranks once each is in `generation` and has made `steps` steps there."""

    def look() -> list[Life] | None:
        now = [lives(directory, rank) for rank in (0, 1)]
        if any(len(one) != generation + 1 or len(one[-1].steps) < steps for one in now):
            return None
        return [one[-1] for one in now]

    return look


def job(directory: Path, *script_args: str, options: tuple[str, ...] = (), launcher: tuple[str, ...] = ()) -> Job:
    argv = torchrun(2, *launcher, "-m", "arc_dist", "--no-guard", *options, SCRIPT, str(directory), *script_args)
    return Job(argv)


def assert_finished(directory: Path, generations: int) -> None:
    ends = [lives(directory, rank) for rank in (0, 1)]
    assert [len(one) for one in ends] == [generations, generations]
    assert ends[0][-1].total is not None
    assert ends[0][-1].total == ends[1][-1].total
    pids = [life.pid for one in ends for life in one]
    assert len(set(pids)) == len(pids)


def test_ten_kills_in_a_row(tmp_path: Path) -> None:
    """Every kill hits a live rank, every restart works, and user code runs again within a moment."""
    until_code: list[float] = []
    until_step: list[float] = []
    with job(tmp_path, "--steps", "45") as running:
        for kill in range(10):
            now = running.wait_for(current(tmp_path, kill, 3 * kill + 3), 60, f"generation {kill}")
            killed_at = time.monotonic()
            os.kill(now[kill % 2].pid, signal.SIGKILL)
            after = running.wait_for(current(tmp_path, kill + 1, 1), 60, f"the restart after kill {kill}")
            assert {life.pid for life in after}.isdisjoint(life.pid for life in now)
            until_code.append(max(life.started_at for life in after) - killed_at)
            until_step.append(max(life.steps[0] for life in after) - killed_at)
        result = running.wait(60)
    assert result.exit_code == 0, str(result)
    assert_finished(tmp_path, 11)
    print(f"SIGKILL to user code: {sorted(until_code)}; to the first step: {sorted(until_step)}")
    assert sorted(until_code)[5] < 1.0  # a quiet machine needs 0.03-0.1 s; importing torch anew would take longer
    deaths = [entry for entry in incidents() if entry["kind"] == "rank_died"]
    assert [entry["rank"] for entry in deaths] == 5 * [0, 1]
    assert {entry["cause"] for entry in deaths} == {"killed by SIGKILL"}
    assert [entry["step"] for entry in deaths] >= [3 * kill + 3 for kill in range(10)]


def test_both_ranks_at_once(tmp_path: Path) -> None:
    with job(tmp_path) as running:
        now = running.wait_for(current(tmp_path, 0, 3), 60, "training")
        for number in (signal.SIGSTOP, signal.SIGKILL):  # a rank that runs on would end by the loss of the other
            for life in now:
                os.kill(life.pid, number)
        running.wait_for(current(tmp_path, 1, 1), 60, "the restart")
        result = running.wait(60)
    assert result.exit_code == 0, str(result)
    assert_finished(tmp_path, 2)


def test_a_rank_that_dies_during_the_recovery(tmp_path: Path) -> None:
    with job(tmp_path) as running:
        now = running.wait_for(current(tmp_path, 0, 3), 60, "training")
        os.kill(now[0].pid, signal.SIGKILL)
        # The other rank dies as soon as its new process exists, before or while the ranks meet.
        running.wait_for(lambda: len(lives(tmp_path, 1)) == 2, 60, "the new process")
        os.kill(lives(tmp_path, 1)[1].pid, signal.SIGKILL)
        result = running.wait(60)
    assert result.exit_code == 0, str(result)
    ends = [lives(tmp_path, rank) for rank in (0, 1)]
    assert ends[0][-1].total is not None
    assert ends[0][-1].total == ends[1][-1].total
    assert len(ends[1]) == 3


def test_a_killed_supervisor_is_replaced_by_torchruns_own_restart(tmp_path: Path) -> None:
    with job(tmp_path, launcher=("--max-restarts=2",)) as running:
        now = running.wait_for(current(tmp_path, 0, 3), 60, "training")
        os.kill(_supervisor_of(now[1].pid), signal.SIGKILL)
        running.wait_for(current(tmp_path, 1, 3), 60, "the restart by torchrun")
        # The fast restart works in what torchrun has started again.
        os.kill(lives(tmp_path, 0)[1].pid, signal.SIGKILL)
        running.wait_for(current(tmp_path, 2, 1), 60, "the fast restart")
        result = running.wait(60)
    assert result.exit_code == 0, str(result)
    assert_finished(tmp_path, 3)


def test_the_supervisor_that_hosts_the_coordinator_may_be_killed_too(tmp_path: Path) -> None:
    with job(tmp_path, launcher=("--max-restarts=1",)) as running:
        now = running.wait_for(current(tmp_path, 0, 3), 60, "training")
        os.kill(_supervisor_of(now[0].pid), signal.SIGKILL)
        result = running.wait(90)
    assert result.exit_code == 0, str(result)
    assert_finished(tmp_path, 2)


def test_without_torchrun_the_usual_variables_are_enough(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    argv = [sys.executable, "-m", "arc_dist", "--no-guard", SCRIPT, str(tmp_path)]
    with Job(argv, env={**env, "RANK": "0"}) as first, Job(argv, env={**env, "RANK": "1"}) as second:
        now = first.wait_for(current(tmp_path, 0, 3), 60, "training")
        os.kill(now[1].pid, signal.SIGKILL)
        results = [first.wait(60), second.wait(60)]
    assert [result.exit_code for result in results] == [0, 0], "\n".join(map(str, results))
    assert_finished(tmp_path, 2)


def test_a_store_that_the_agent_does_not_share(tmp_path: Path) -> None:
    """With TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 rank 0 is to serve the store; its supervisor does."""
    argv = torchrun(2, "-m", "arc_dist", "--no-guard", SCRIPT, str(tmp_path))
    with Job(argv, env={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}) as running:
        now = running.wait_for(current(tmp_path, 0, 3), 60, "training")
        os.kill(now[0].pid, signal.SIGKILL)
        result = running.wait(60)
    assert result.exit_code == 0, str(result)
    assert_finished(tmp_path, 2)


def test_a_guarded_script_recovers_too(tmp_path: Path) -> None:
    argv = torchrun(2, "-m", "arc_dist", SCRIPT, str(tmp_path))
    with Job(argv) as running:
        now = running.wait_for(current(tmp_path, 0, 3), 60, "training")
        os.kill(now[0].pid, signal.SIGKILL)
        result = running.wait(60)
    assert result.exit_code == 0, str(result)
    assert_finished(tmp_path, 2)


def _supervisor_of(trainer: int) -> int:
    def parent(pid: int) -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    return parent(parent(trainer))


def incidents() -> list[dict[str, object]]:
    path = Path(os.environ["ARC_RUN_DIR"]) / "incidents.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]
