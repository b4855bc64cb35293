"""Eviction with real processes: a host that is really slow is reported, and left out at the next restart.

The hosts are this machine's, each with a name, a failure domain and memory of its own. What is slow is the host,
whoever has the rank there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

import elastic_job
import netns
from elastic_job import Plan, skipped_turns, timeline
from hosts import Hosts
from ranks import Job, run_ranks
from toy import Toy, plain

SCRIPT = str(Path(__file__).parent / "scripts" / "slow_host.py")
WAIT_S = 240.0
# With these limits supervisors report every two seconds, and a step is far from hanging on a loaded machine.
WATCH = {"hang_min_s": 6.0, "hang_factor": 20.0}
STEPS = 400
SLOW_S = 0.15  # a minute in all, of which the report needs a quarter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.disk,  # hosts that have a memory file system each share nothing there
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: hosts with names of their own"),
]


def undisturbed(rank: int, world_size: int, toy: Toy) -> str:
    return plain(toy)[0]


def argument(directory: Path, toy: Toy, *, slow: list[Any], strike: int, **settings: Any) -> dict[str, Any]:
    out = directory / "out"
    out.mkdir()
    fields = {"toy": dataclasses.asdict(toy), "out": str(out), "store": str(directory / "store")}
    return {**fields, "slow": slow, "strike": strike, "settings": {**WATCH, **settings}}


def steps_of(hosts: Hosts, rank: int) -> list[dict[str, Any]]:
    lines = (hosts.directory / "out" / f"steps-{rank}").read_text().splitlines()
    return [json.loads(line) for line in lines]


def reported(hosts: Hosts, rank: int) -> dict[str, Any] | None:
    return next((line for line in hosts.incidents("straggler") if line["ranks"] == [rank]), None)


def results(hosts: Hosts, world_size: int) -> list[dict[str, Any]]:
    return [json.loads((hosts.directory / "out" / f"result-{rank}.json").read_text()) for rank in range(world_size)]


@pytest.mark.parametrize(
    ("kind", "part", "section"),
    [("ddp", "loss", "forward"), pytest.param("fsdp", "data", "data wait", marks=pytest.mark.soak)],
    ids=["ddp", "fsdp"],
)
def test_a_slow_host_is_left_out_for_a_spare_at_the_next_restart(kind, part, section, tmp_path, shm_root):
    toy = Toy(kind=kind, steps=STEPS)
    script = argument(tmp_path, toy, slow=["b", part, SLOW_S], strike=0, checkpoint_every=50)
    env = {"ARC_SPARES": "1", "ARC_EVICT": "1", "ARC_HOST_TIMEOUT_S": "60"}
    with Hosts(tmp_path, shm_root, SCRIPT, script, env, named=True) as hosts:
        hosts.start({0: "a", 1: "b", 2: "c"}, world_size=3)
        report = hosts.wait_for(lambda: reported(hosts, 1), WAIT_S, "the report of the slow rank")
        assert {line["host"] for line in steps_of(hosts, 1)} == {"b"}, "it was left out before there was a restart"
        (tmp_path / "out" / "strike").touch()
        codes = hosts.wait(WAIT_S)
    story = hosts.story(f"exit codes {codes}")
    assert (report["part"], report["ratio"] > 1.5) == (section, True), report
    assert (tmp_path / "out" / "struck-0").exists(), story
    assert codes == {0: 0, 1: 76, 2: 0}, story
    assert "[arc] LeftOut: " in story
    assert "left out of the job (rank 1 is persistently slow; a spare has taken its place)" in story
    (took,) = hosts.incidents("spare_took_over")
    assert took["ranks"] == [1], story
    assert "rank 1 is persistently slow" in took["cause"]
    trained = [(line["generation"], line["host"]) for line in steps_of(hosts, 1)]
    assert sorted(set(trained)) == [(0, "b"), (1, "c")], story
    ended = results(hosts, 2)
    assert [(result["generation"], result["host"]) for result in ended] == [(1, "a"), (1, "c")]
    assert [result["digest"] for result in ended] == run_ranks(2, undisturbed, toy), story


@pytest.mark.soak
def test_without_spares_a_slow_host_is_left_out_for_a_smaller_world(tmp_path, shm_root):
    """Where the launcher allows one; every sample is used once, in its step, on three ranks and then on two."""
    plan, until = Plan(kind="ddp", ranks=3, accumulate=2, checkpoint_every=10), 300
    script = {"plan": dataclasses.asdict(plan), "out": str(tmp_path), "life": 0, "until": until}
    script |= {"slow": ["b", SLOW_S / 2], "strike": 0, "settings": WATCH}
    env = {"ARC_MIN_NODES": "2", "ARC_EVICT": "1", "ARC_HOST_TIMEOUT_S": "60"}
    with Hosts(tmp_path, shm_root, elastic_job.SCRIPT, script, env, named=True) as hosts:
        hosts.start({0: "a", 1: "b", 2: "c"}, world_size=3)
        hosts.wait_for(lambda: reported(hosts, 1), WAIT_S, "the report of the slow rank")
        (tmp_path / "strike").touch()
        codes = hosts.wait(WAIT_S)
    story = hosts.story(f"exit codes {codes}")
    assert (tmp_path / "struck-0").exists(), story
    assert codes == {0: 0, 1: 76, 2: 0}, story
    assert "[arc] LeftOut: " in story
    (shrinks,) = hosts.incidents("world_shrinks")
    assert "is left out: rank 1 is persistently slow" in shrinks["cause"]
    worlds = {}
    for host in "abc":
        lines = [json.loads(line) for line in (tmp_path / f"steps-{host}").read_text().splitlines()]
        worlds[host] = sorted({line["ranks"] for line in lines})
    assert worlds == {"a": [2, 3], "b": [3], "c": [2, 3]}, story
    assert skipped_turns(plan, timeline(tmp_path, until=until), until=until) == []


@pytest.mark.soak
def test_the_agent_of_a_host_that_is_left_out_ends_and_the_others_go_on(tmp_path):
    """The real launcher, whose agents would use --max-restarts to bring a node back, or forbid all others to meet."""
    if netns.problem():
        pytest.skip(netns.problem())
    plan, until = Plan(kind="ddp", ranks=3, accumulate=2, checkpoint_every=10), 300
    config = {"plan": dataclasses.asdict(plan), "out": str(tmp_path), "life": 0, "until": until}
    config |= {"slow": ["host2", SLOW_S / 2], "strike": 0, "settings": WATCH}
    with netns.Network(3) as network, contextlib.ExitStack() as stack:
        jobs = [stack.enter_context(start(network, host, tmp_path, config)) for host in range(3)]
        jobs[0].wait_for(lambda: reported_in(tmp_path / "run"), WAIT_S, "the report of the slow rank")
        (tmp_path / "strike").touch()
        left = jobs[2].wait(WAIT_S)
        ends = [job.wait(WAIT_S) for job in jobs[:2]]
    assert (tmp_path / "struck-0").exists(), left
    assert left.exit_code == 76, left
    assert "[arc] LeftOut: " in left.stderr, left
    assert [end.exit_code for end in ends] == [0, 0], ends
    sizes = [json.loads(line)["ranks"] for line in (tmp_path / "steps-host0").read_text().splitlines()]
    assert [ranks for ranks, _ in itertools.groupby(sizes)] == [3, 2], "the host was brought back"
    assert skipped_turns(plan, timeline(tmp_path, until=until), until=until) == []


def start(network: netns.Network, host: int, out: Path, config: dict[str, Any]) -> Job:
    command = [
        sys.executable, "-m", "arc_dist.launch.arcrun", "--nnodes=2:3", "--nproc-per-node=1", "--max-restarts=5",
        "--rdzv-backend=c10d", f"--rdzv-endpoint={network.address(0)}:29400", "--rdzv-id=evict",
        f"--local-addr={network.address(host)}", "--arc-evict=1", "--arc-host-timeout-s=60",
        f"--rdzv-conf=is_host={int(host == 0)},join_timeout=300,read_timeout=20", elastic_job.SCRIPT,
        json.dumps(config),
    ]  # fmt: skip
    return network.start(host, command, env={"ARC_RUN_DIR": str(out / "run")})


def reported_in(run_dir: Path) -> bool:
    path = run_dir / "incidents.jsonl"
    return path.exists() and '"kind": "straggler"' in path.read_text()
