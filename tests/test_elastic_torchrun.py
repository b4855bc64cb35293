"""torchrun --nnodes=1:2 with two real agents: nodes join, are lost for good and join again, and the job goes on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import signal
import socket
import sys
from pathlib import Path

import pytest

from arc_dist import Store
from elastic_job import SCRIPT, Plan, skipped_turns, timeline
from ranks import Job, run_job

# A node that joins must cost no restart of an agent, so the one that there is is left for the node that is lost.
WAIT_S = 240.0  # a lost node of rank 0 costs its time-out, and then torchrun's own rendezvous


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Nodes:
    """A job of agents on this host, one per node, each with one rank."""

    def __init__(self, out: Path, plan: Plan) -> None:
        self.out = out
        config = {"plan": dataclasses.asdict(plan), "out": str(out), "life": 0, "until": 1_000_000, "pause_s": 0.05}
        conf = "join_timeout=300,last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=5"
        self.command = [
            sys.executable, "-m", "arc_dist.launch.arcrun", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=1",
            "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=elastic-test",
            f"--rdzv-conf={conf}", SCRIPT, json.dumps(config),
        ]  # fmt: skip

    def start(self) -> Job:
        return Job(self.command, env={"ARC_RUN_DIR": str(self.out / "run")})

    def progress(self) -> list[tuple[int, int]]:
        """(step, ranks) as rank 0 went through them."""
        path = self.out / "progress-0"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(step), int(ranks)) for step, ranks in (line.split() for line in lines)]

    def await_world(self, watched: Job, ranks: int, changes: int) -> None:
        """Until some steps were made in a world of `ranks`, after so many changes of its size."""

        def arrived() -> bool:
            worlds = [world for _, world in self.progress()]
            seen = sum(1 for before, after in itertools.pairwise(worlds) if before != after)
            return seen == changes and worlds[-8:] == [ranks] * 8

        watched.wait_for(arrived, WAIT_S, f"steps in a world of {ranks}")


@pytest.mark.soak  # test_hosts.py does the like in network namespaces
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_nodes_join_are_lost_and_join_again(tmp_path, kind):
    plan = Plan(kind=kind, ranks=1, accumulate=2)
    nodes = Nodes(tmp_path, plan)
    with nodes.start() as first:
        nodes.await_world(first, 1, changes=0)
        with nodes.start() as second:
            nodes.await_world(first, 2, changes=1)
            second.kill()
        nodes.await_world(first, 1, changes=2)
        with nodes.start() as third:
            nodes.await_world(first, 2, changes=3)
            first.process.send_signal(signal.SIGTERM)
            third.process.send_signal(signal.SIGTERM)
            ends = [first.wait(WAIT_S), third.wait(WAIT_S)]
    assert [end.exit_code for end in ends] == [75, 75], ends
    saved = max(info.step for info in Store(str(tmp_path / "store")).steps())
    assert nodes.progress()[-1] == (saved, 2), ends
    assert skipped_turns(plan, timeline(tmp_path, until=saved), until=saved) == []


@pytest.mark.parametrize("nnodes", ["2:1", "0", "a:2", "1:2:3"])
def test_a_range_of_nodes_that_is_none(nnodes):
    launcher = [sys.executable, "-m", "arc_dist.launch.arcrun", f"--nnodes={nnodes}", "script.py"]
    done = run_job(launcher, timeout_s=100)
    assert done.exit_code == 78, done
    assert "MIN:MAX" in done.stderr
