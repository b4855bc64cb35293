"""Three hosts, each with its own network, memory and torchrun agent: lost, frozen, cut off, and back again.

No two sets of processes may ever train at the same time, whatever the network does; and the committed steps are those
of a run that nothing struck: every sample once, in its step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import netns
from arc_dist import Store
from elastic_job import SCRIPT, Plan, live, skipped_turns, timeline
from ranks import Job

# Each host has a memory file system of its own: what they share cannot lie there.
pytestmark = [pytest.mark.slow, pytest.mark.disk, pytest.mark.timeout(900)]

WAIT_S = 300.0
HOST_TIMEOUT_S = 8  # busy machines keep a supervisor waiting for seconds
PORT = 29400
FOREVER = 1_000_000


@functools.cache
def no_hosts() -> str:
    return netns.problem()


@dataclasses.dataclass(frozen=True)
class Step:
    """A step that a host has made."""

    at: float
    step: int
    generation: int
    store: str
    rank: int
    ranks: int
    host: int


class Cluster:
    """A job on three hosts. Host 0 serves the rendezvous, and its supervisor is rank 0's at first."""

    def __init__(self, network: netns.Network, out: Path, plan: Plan, *, nnodes: str, until: int) -> None:
        self.network = network
        self.out = out
        self.jobs: list[Job] = []
        self._stack = contextlib.ExitStack()
        self._config = json.dumps(
            {"plan": dataclasses.asdict(plan), "out": str(out), "life": 0, "until": until, "pause_s": 0.1}
        )
        self._nnodes = nnodes

    def start(self, host: int) -> Job:
        command = [
            sys.executable, "-m", "arc_dist.launch.arcrun", f"--nnodes={self._nnodes}", "--nproc-per-node=1",
            "--max-restarts=5", "--rdzv-backend=c10d", f"--rdzv-endpoint={self.network.address(0)}:{PORT}",
            "--rdzv-id=hosts", f"--local-addr={self.network.address(host)}", f"--arc-host-timeout-s={HOST_TIMEOUT_S}",
            f"--rdzv-conf=is_host={int(host == 0)},join_timeout=300,read_timeout=20",
            SCRIPT, self._config,
        ]  # fmt: skip
        job = self.network.start(host, command, env={"ARC_RUN_DIR": str(self.out / "run")})
        return self._stack.enter_context(job)

    def close(self) -> None:
        self._stack.close()

    def start_all(self) -> None:
        """Waits until the three train together, and a checkpoint says for ever that the job was begun by three."""
        self.jobs = [self.start(host) for host in range(3)]
        self.await_steps(0, ranks=3)
        self.jobs[0].wait_for(self.saved, WAIT_S, "a checkpoint")

    def saved(self) -> int:
        """The newest step in the store; 0 for none."""
        store = self.out / "store"
        return max((info.step for info in Store(str(store)).steps()), default=0) if store.exists() else 0

    def steps(self, host: int | None = None) -> list[Step]:
        """In the order of their times; all hosts read one clock."""
        found: list[Step] = []
        for number in range(3) if host is None else [host]:
            path = self.out / f"steps-host{number}"
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            found += [Step(**json.loads(line), host=number) for line in lines if line.endswith("\n")]
        return sorted(found, key=lambda step: step.at)

    def await_steps(self, host: int, *, ranks: int, count: int = 6) -> None:
        """Until that host has just made some steps in a world of `ranks`."""

        def arrived() -> bool:
            newest = self.steps(host)[-count:]
            return len(newest) == count and {step.ranks for step in newest} == {ranks} and is_one(newest)

        self.jobs[host].wait_for(arrived, WAIT_S, f"steps in a world of {ranks}")

    def end(self, hosts: tuple[int, ...]) -> list[Any]:
        for host in hosts:
            self.jobs[host].process.send_signal(signal.SIGTERM)
        return [self.jobs[host].wait(WAIT_S) for host in hosts]


def is_one(steps: list[Step]) -> bool:
    return len({step.store for step in steps}) == 1


@contextlib.contextmanager
def cluster(out: Path, plan: Plan, *, nnodes: str = "1:3", until: int = FOREVER) -> Iterator[Cluster]:
    if no_hosts():
        pytest.skip(no_hosts())
    with netns.Network(3) as network:
        made = Cluster(network, out, plan, nnodes=nnodes, until=until)
        try:
            yield made
        finally:
            made.close()


def check_never_two(made: Cluster) -> list[list[Step]]:
    """The sets of processes that trained, in their order: each made its last step before the next made its first."""
    worlds: dict[str, list[Step]] = {}
    for step in made.steps():
        worlds.setdefault(step.store, []).append(step)
    ordered = sorted(worlds.values(), key=lambda steps: steps[0].at)
    for earlier, later in itertools.pairwise(ordered):
        assert earlier[-1].at < later[0].at, f"two worlds trained at once: {earlier[-1]} and {later[0]}"
    for world in ordered:
        for number in {step.step for step in world}:
            made_by = [step.host for step in world if step.step == number]
            assert len(made_by) == len(set(made_by)), f"a host made step {number} twice in one world: {world}"
    return ordered


def check_samples(made: Cluster, plan: Plan) -> None:
    saved = made.saved()
    assert saved > 0
    assert skipped_turns(plan, timeline(made.out, until=saved), until=saved) == []


def sizes(worlds: list[list[Step]]) -> list[int]:
    """Of the worlds in their order, without restarts within one size."""
    return [ranks for ranks, _ in itertools.groupby(world[0].ranks for world in worlds)]


def plan_of(kind: str) -> Plan:
    return Plan(kind=kind, ranks=3, accumulate=2)


@pytest.mark.parametrize(
    ("kind", "lost"), [("ddp", 2), pytest.param("fsdp", 1, marks=pytest.mark.soak)], ids=["ddp", "fsdp"]
)
def test_a_host_loses_its_power_and_comes_back_late(tmp_path, kind, lost):
    plan = plan_of(kind)
    with cluster(tmp_path, plan) as made:
        made.start_all()
        made.network.cut(lost)
        made.jobs[lost].kill()
        made.await_steps(0, ranks=2)
        assert made.network.dropped(lost) > 0
        made.network.mend(lost)
        made.jobs[lost] = made.start(lost)
        made.await_steps(0, ranks=3)
        ends = made.end((0, 1, 2))
        assert [end.exit_code for end in ends] == [75, 75, 75], ends
        worlds = check_never_two(made)
        assert sizes(worlds) == [3, 2, 3], ends
        assert {step.host for step in worlds[1]} == {0, 1, 2} - {lost}
        check_samples(made, plan)


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_frozen_host_thaws_after_the_others_went_on(tmp_path, kind):
    plan = plan_of(kind)
    with cluster(tmp_path, plan) as made:
        made.start_all()
        frozen = netns.freeze(made.jobs[2])
        assert len(frozen) >= 4  # arcrun, supervisor, zygote, trainer
        made.await_steps(0, ranks=2)
        before = len(made.steps(2))
        netns.thaw(frozen)
        made.await_steps(0, ranks=3)
        ends = made.end((0, 1, 2))
        assert [end.exit_code for end in ends] == [75, 75, 75], ends
        worlds = check_never_two(made)
        assert sizes(worlds) == [3, 2, 3], ends
        assert all(step.store == worlds[-1][0].store for step in made.steps(2)[before:]), ends
        check_samples(made, plan)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("incoming", "outgoing"), [(True, True), (True, False), (False, True)], ids=["both", "incoming", "outgoing"]
)
def test_a_host_is_cut_off_for_good(tmp_path, incoming, outgoing):
    plan = plan_of("ddp")
    with cluster(tmp_path, plan) as made:
        made.start_all()
        made.network.cut(2, incoming=incoming, outgoing=outgoing)
        made.await_steps(0, ranks=2)
        alone = made.jobs[2].wait(WAIT_S)
        assert made.network.dropped(2) > 0
        assert alone.exit_code == 76, alone
        assert "cut off" in alone.stderr, alone
        made.await_steps(0, ranks=2)
        ends = made.end((0, 1))
        assert [end.exit_code for end in ends] == [75, 75], ends
        assert sizes(check_never_two(made)) == [3, 2], ends
        check_samples(made, plan)


@pytest.mark.soak
@pytest.mark.parametrize("lost", [0, 2])
def test_a_short_cut_costs_no_more_than_its_time(tmp_path, lost):
    plan, until = plan_of("ddp"), 60
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    done = live(plan, undisturbed, life=0, ranks=3, until=until, supervised=False)
    assert done.exit_code == 0, done
    with cluster(tmp_path, plan, until=until) as made:
        made.start_all()
        made.network.cut(lost)
        time.sleep(5.0)  # the fault itself
        assert made.network.dropped(lost) > 0
        made.network.mend(lost)
        ends = [job.wait(WAIT_S) for job in made.jobs]
        assert [end.exit_code for end in ends] == [0, 0, 0], ends
        assert sizes(check_never_two(made)) == [3], ends
        for rank in range(3):
            mine, theirs = (json.loads((out / f"result-0-{rank}.json").read_text()) for out in (tmp_path, undisturbed))
            assert mine["digest"] == theirs["digest"]


@pytest.mark.soak
@pytest.mark.parametrize(("nnodes", "worlds"), [("2:3", [3]), ("1:3", [3, 1])], ids=["too-few", "alone"])
def test_the_host_of_the_rendezvous_is_cut_off(tmp_path, nnodes, worlds):
    """The two cannot meet without it; it goes on by itself only where one node is enough."""
    plan = plan_of("ddp")
    with cluster(tmp_path, plan, nnodes=nnodes) as made:
        made.start_all()
        made.network.cut(0)
        ends = [made.jobs[host].wait(WAIT_S) for host in (1, 2)]
        assert [end.exit_code for end in ends] == [76, 76], ends
        assert all("cut off" in end.stderr for end in ends), ends
        made.jobs[0].wait_for(lambda: "its host is lost" in made.jobs[0].stderr(), WAIT_S, "the loss to be noticed")
        if len(worlds) > 1:
            made.await_steps(0, ranks=worlds[-1])
        made.end((0,))
        assert sizes(check_never_two(made)) == worlds
        check_samples(made, plan)
