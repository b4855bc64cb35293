"""Warm spares: a node is lost, a spare takes its rank, and the job ends with the bits of an undisturbed one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import sys
from pathlib import Path

import pytest

from arc_dist import Store
from hosts import Hosts
from ranks import Job, run_job, run_ranks
from toy import Toy, plain

SCRIPT = str(Path(__file__).parent / "scripts" / "train_toy.py")
LOST_HOST_SCRIPT = str(Path(__file__).parent / "scripts" / "lost_host.py")
LIMIT_S = 300.0
EVERY = 4
BLOCK_AT = 15  # 12 is the newest snapshot that is trusted then
pytestmark = pytest.mark.timeout(900)


def plain_body(rank, world_size, toy):
    return plain(toy)[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Nodes:
    """Three agents on this host, one per node, each with one worker: two ranks and a spare."""

    def __init__(self, out: Path, toy: Toy, **config: object) -> None:
        self.out = out
        self.port = free_port()
        self.config = {"toy": dataclasses.asdict(toy), "out": str(out), "store": str(out / "store"), **config}
        self.options = [
            "--nnodes=3", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{self.port}",
            "--rdzv-id=spares", "--arc-spares=1", "--arc-spare-after-s=2",
        ]  # fmt: skip

    def start(self) -> Job:
        argv = [sys.executable, "-m", "arc_dist.launch.arcrun", *self.options, SCRIPT, json.dumps(self.config)]
        return Job(argv, env={"ARC_RUN_DIR": str(self.out / "run")})

    def incidents(self, kind: str) -> list[dict[str, object]]:
        path = self.out / "run" / "incidents.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line["kind"] == kind]

    def trainers(self, rank: int) -> list[int]:
        return [int(path.name.partition("-")[2]) for path in (self.out / "trainers").glob(f"{rank}-*")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", pytest.param("ddp", marks=pytest.mark.soak)])
def test_a_spare_takes_the_rank_of_a_node_that_is_lost(tmp_path, kind):
    toy = Toy(kind=kind, steps=24)
    nodes = Nodes(tmp_path, toy, pauses={"1": 9}, settings={"checkpoint_every": 4})
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(nodes.start())  # the lowest process id: rank 0, which nothing replaces
        first.wait_for(lambda: accepts(nodes.port), LIMIT_S, "the rendezvous")
        others = [stack.enter_context(nodes.start()) for _ in range(2)]
        first.wait_for((tmp_path / "paused-1").exists, LIMIT_S, "rank 1 at its step")
        (pid,) = nodes.trainers(rank=1)
        (lost,) = [node for node in others if pid in node.pids()]
        (spare,) = [node for node in others if node is not lost]
        lost.kill()  # agent, supervisor, zygote and trainer at once
        ends = [first.wait(LIMIT_S), spare.wait(LIMIT_S)]
    assert [end.exit_code for end in ends] == [0, 0], ends
    (took,) = nodes.incidents("spare_took_over")
    assert took["ranks"] == [1]
    results = [json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in range(2)]
    assert [result["digest"] for result in results] == run_ranks(2, plain_body, toy), ends
    assert len(nodes.trainers(rank=1)) == 2, ends
    assert not list(tmp_path.glob("result-2.json")), "the spare trained as a rank of its own"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", pytest.param("ddp", marks=pytest.mark.soak)])
def test_a_spare_goes_on_from_what_other_hosts_keep_of_the_one_that_is_lost(tmp_path, shm_root, kind):
    """A copy, or under DDP a replica with a note. Not from the store, which has an older checkpoint."""
    toy = Toy(kind=kind, steps=24)
    settings = {"snapshot_every": EVERY, "checkpoint_every": 8}
    argument = {"toy": dataclasses.asdict(toy), "out": str(tmp_path / "out"), "settings": settings}
    argument |= {"store": str(tmp_path / "store"), "blocks": {"1": BLOCK_AT}}
    (tmp_path / "out").mkdir()
    env = {"ARC_SPARES": "1", "ARC_SPARE_AFTER_S": "2"}
    with Hosts(tmp_path, shm_root, LOST_HOST_SCRIPT, argument, env) as hosts:
        hosts.start({0: "a", 1: "b", 2: "c"}, world_size=3)
        hosts.wait_for((tmp_path / "out" / "blocked-1").exists, LIMIT_S, "the step of the fault")
        step = BLOCK_AT - 3
        kept = hosts.copies if kind == "fsdp" else hosts.notes
        hosts.wait_for(lambda: (1, step) in kept("a"), LIMIT_S, "what is kept of the newest trusted snapshot")
        hosts.wait_for(lambda: [info.step for info in Store(argument["store"]).steps()], LIMIT_S, "a checkpoint")
        hosts.lose("b")
        codes = hosts.wait(LIMIT_S)
    story = hosts.story(f"exit codes {codes}")
    assert codes == {0: 0, 2: 0}, story
    (took,) = hosts.incidents("spare_took_over")
    assert took["ranks"] == [1]
    (fetched,) = hosts.incidents("copy_fetched")
    assert (fetched["rank"], fetched["step"], fetched["holder"]) == (1, step, 0), story
    results = [json.loads((tmp_path / "out" / f"result-{rank}.json").read_text()) for rank in range(2)]
    assert [result["resumed"] for result in results] == [[step, "memory"]] * 2, story
    assert BLOCK_AT - 1 - step <= EVERY
    assert [result["digest"] for result in results] == run_ranks(2, plain_body, toy), story


@pytest.mark.soak
def test_a_spare_that_is_not_needed_ends_with_the_job(tmp_path):
    """On one node, where it replaces nobody, and that is said."""
    toy = Toy(kind="ddp", steps=4)
    config = {"toy": dataclasses.asdict(toy), "out": str(tmp_path)}
    argv = [sys.executable, "-m", "arc_dist.launch.arcrun", "--standalone", "--nproc-per-node=3", "--arc-spares=1"]
    done = run_job([*argv, SCRIPT, json.dumps(config)], env={"ARC_RUN_DIR": str(tmp_path / "run")}, timeout_s=LIMIT_S)
    assert done.exit_code == 0, done
    assert "spares on a single node replace nobody" in done.stderr
    results = [json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in range(2)]
    assert [result["digest"] for result in results] == run_ranks(2, plain_body, toy), done


def test_spares_that_leave_nobody_to_train():
    argv = [sys.executable, "-m", "arc_dist.launch.arcrun", "--standalone", "--nproc-per-node=2"]
    done = run_job([*argv, "--arc-spares=2", SCRIPT], timeout_s=LIMIT_S)
    assert done.exit_code == 78, done
    assert "2 of the 2 workers are to be spares" in done.stderr
