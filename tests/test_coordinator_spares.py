"""The service around spares: who waits, who gets which rank and when, and what becomes of those who had it."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from arc_dist.coordinator.client import LocalClient
from arc_dist.coordinator.service import Coordinator
from arc_dist.errors import CoordinatorUnavailable, Fenced, LeftOut
from arc_dist.protocol.hangs import LABELS, Section
from arc_dist.protocol.stragglers import PATIENCE

KILLED = {"kind": "signal", "signal": 9, "exit_code": None, "exception": None}
HOSTS = ("host-a", "host-b", "host-c")
PATIENCE_S = 15.0
LIMIT_S = 60.0


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Job:
    """Three supervisors on three hosts around a coordinator, and spares that wait in threads."""

    def __init__(self, run_dir: Path, *, evicts: bool, hosts: tuple[str, ...] = HOSTS) -> None:
        self.clock = Clock()
        self.run_dir = run_dir
        self.coordinator = Coordinator.open(
            3, run_dir=run_dir, job_id="job", clock=self.clock, spare_after_s=PATIENCE_S, evicts=evicts
        )
        self.clients = [LocalClient(self.coordinator) for _ in range(3)]
        self.hosts = list(hosts)
        self.pids = [100, 101, 102]
        for rank in range(3):
            self.join(rank)
        self.all_ready(0)

    def join(self, rank: int) -> None:
        self.clients[rank].join(rank, 3, self.hosts[rank], self.pids[rank], f"/shm/{self.pids[rank]}")

    def ready(self, rank: int, generation: int) -> None:
        store = {"host": "h", "port": 1} if rank == 0 else None
        self.clients[rank].ready(rank, generation, store, [], f"/shm/{self.pids[rank]}", self.hosts[rank])

    def all_ready(self, generation: int) -> None:
        for rank in range(3):
            self.ready(rank, generation)
        assert self.coordinator.call("status", {})["phase"] == "running"

    def die(self, rank: int, generation: int, step: int) -> None:
        self.clients[rank].died(rank, generation, KILLED, step)

    def ask(self, host: str, pid: int, timeout_s: float) -> dict[str, Any]:
        return LocalClient(self.coordinator).stand_by(host, pid, f"/shm/{pid}", timeout_s)

    def took_over(self) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.run_dir / "incidents.jsonl").read_text().splitlines()]
        return [line for line in lines if line["kind"] == "spare_took_over"]

    def report_slow(self, slow: int, generation: int) -> None:
        """Work of as many windows as make a rank slow."""
        name = LABELS[Section.DATA]
        for window in range(PATIENCE + 1):
            for rank, client in enumerate(self.clients):
                work_ns = window * 10 * (50_000_000 if rank == slow else 5_000_000)
                seen = {"step": 12, "section": int(Section.DATA), "name": name, "elapsed_s": 0.1, "limit_s": 60.0}
                seen |= {"conduct": "S", "busy": 0.0, "collective": False, "compiling": False, "stack": "read"}
                spent = {"steps": 100 + 10 * window, "measured": 50 + 5 * window, "straggler_factor": 1.5}
                spent |= {"time_ns": {name: work_ns}, "cpu_ns": {}, "limit_ns": {}}
                client.watched(rank=rank, generation=generation, report={"seen": seen, "spent": spent})


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Makes jobs, and closes their coordinators."""
    with contextlib.ExitStack() as stack:

        def one(evicts: bool, hosts: tuple[str, ...] = HOSTS) -> Job:
            job = Job(tmp_path / f"{len(list(tmp_path.iterdir()))}", evicts=evicts, hosts=hosts)
            stack.callback(job.coordinator.close)
            return job

        yield one


class Spare:
    """Asks until it is told something."""

    def __init__(self, job: Job, host: str, pid: int) -> None:
        self.host, self.pid = host, pid
        self._thread = threading.Thread(target=self._wait, args=(job,), daemon=True)
        self._thread.start()
        while not any(member.pid == pid for member in job.coordinator._spares._waiting):
            assert self._thread.is_alive()

    def _wait(self, job: Job) -> None:
        self.answer: dict[str, Any] = {"kind": "wait"}
        with contextlib.suppress(CoordinatorUnavailable):  # the test is over
            while self.answer["kind"] == "wait":
                self.answer = job.ask(self.host, self.pid, 1e6)

    def told(self) -> dict[str, Any]:
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive(), "nothing was said to the spare"
        return {key: value for key, value in self.answer.items() if key != "epoch"}


def test_a_rank_that_is_silent_goes_to_a_spare_and_not_before_its_time(make):
    job = make(False)
    job.die(2, 0, step=5)
    job.ready(0, 1)
    job.ready(2, 1)
    job.clock.now += PATIENCE_S - 0.1
    assert job.ask("host-d", 200, 0.0)["kind"] == "wait"
    job.clock.now += 0.2
    answer = job.ask("host-d", 200, 0.0)
    assert (answer["kind"], answer["rank"]) == ("take", 1)
    assert job.ask("host-d", 200, 0.0)["rank"] == 1, "an answer that was lost is given again"
    with pytest.raises(Fenced, match="another supervisor has taken the place"):
        job.ready(1, 1)
    job.pids[1], job.hosts[1], job.clients[1] = 200, "host-d", LocalClient(job.coordinator)
    job.join(1)
    job.ready(1, 1)
    assert job.coordinator.job.phase.value == "running"
    (line,) = job.took_over()
    assert line["ranks"] == [1]
    assert "on host-b (pid 101) is lost" in line["cause"]
    assert job.ask("host-e", 201, 0.0)["kind"] == "wait"


def test_rank_0_is_not_replaced(make):
    job = make(False)
    job.die(2, 0, step=5)
    job.ready(1, 1)
    job.ready(2, 1)
    job.clock.now += 10 * PATIENCE_S
    assert job.ask("host-d", 200, 0.0)["kind"] == "wait"


def test_a_spare_is_told_how_the_job_ended(make):
    job = make(False)
    spare = Spare(job, "host-d", 200)
    for rank, client in enumerate(job.clients):
        client.finished(rank, 0)
    assert spare.told() == {"kind": "done"}
    other = make(False)
    spare = Spare(other, "host-d", 200)
    bug = {"kind": "exit", "signal": None, "exit_code": 3, "exception": None}
    other.clients[1].died(1, 0, bug, 0)
    for rank in range(3):
        other.ready(rank, 1)
    answer = spare.told()
    assert (answer["kind"], answer["exit_code"]) == ("stop", 3)


def kill_again_and_again(job: Job) -> None:
    """Three deaths on host-b; the ranks are about to be ready for generation 4."""
    for generation in range(4):
        job.die(1, generation, step=10 * (generation + 1))
        if generation < 3:
            job.all_ready(generation + 1)


@pytest.mark.parametrize("why", ["deaths", "slow"])
def test_an_unwanted_host_is_left_out_at_the_next_restart(make, why):
    job = make(True)
    if why == "deaths":
        kill_again_and_again(job)
        generation = 4
    else:
        job.report_slow(1, 0)
        job.die(0, 0, step=10)
        generation = 1
    spare = Spare(job, "host-d", 200)
    job.ready(0, generation)
    with pytest.raises(Fenced, match="this host is left out of the job"):
        job.ready(1, generation)
    assert spare.told() == {"kind": "take", "rank": 1}
    job.ready(2, generation)
    assert job.coordinator.job.phase.value == "ending", "the spare is not ready yet"
    job.pids[1], job.hosts[1], job.clients[1] = 200, "host-d", LocalClient(job.coordinator)
    job.join(1)
    job.ready(1, generation)
    assert job.coordinator.job.phase.value == "running"
    (line,) = job.took_over()
    assert ("persistently slow" if why == "slow" else "deaths for reasons of infrastructure") in line["cause"]
    Spare(job, "host-e", 201)
    job.die(2, generation, step=100)
    job.all_ready(generation + 1)  # what was held against the host is not held against its successor


@pytest.mark.parametrize("order", [(1, 2), (2, 1)], ids=["slow-first", "slow-last"])
def test_all_ranks_of_a_host_are_left_out_together_when_none_of_them_runs(make, order):
    """The agent of a node that loses one worker ends the others, which must not train then, nor count as told to go."""
    job = make(True, hosts=("host-a", "host-b", "host-b"))
    job.report_slow(1, 0)
    job.die(0, 0, step=10)
    taken = [Spare(job, "host-d", 200), Spare(job, "host-d", 201)]
    job.ready(0, 1)
    job.ready(order[0], 1)
    assert job.took_over() == [], "the other rank of the host still runs"
    asked: list[Exception] = []
    waiting = threading.Thread(target=ask_for_order, args=(job, order[0], asked), daemon=True)
    waiting.start()
    while len(job.coordinator._changed._waiters) < len(taken) + 1:
        assert waiting.is_alive()
    with pytest.raises(LeftOut):
        job.ready(order[1], 1)
    waiting.join(LIMIT_S)
    assert [type(error) for error in asked] == [LeftOut], "it is told at once, though it had waited for an order"
    assert sorted(spare.told()["rank"] for spare in taken) == [1, 2]
    with pytest.raises(LeftOut):
        job.clients[order[0]].preempt(order[0])
    assert not job.coordinator.job.preempted
    for rank, pid in zip((1, 2), (200, 201), strict=True):
        job.pids[rank], job.hosts[rank], job.clients[rank] = pid, "host-d", LocalClient(job.coordinator)
        job.join(rank)
        job.ready(rank, 1)
    assert job.coordinator.job.phase.value == "running"


def ask_for_order(job: Job, rank: int, asked: list[Exception]) -> None:
    try:
        job.clients[rank].directive(rank, 1, LIMIT_S)
    except LeftOut as error:
        asked.append(error)


@pytest.mark.parametrize("how", ["lost", "left out"])
def test_the_successor_of_a_slow_rank_is_not_held_to_be_slow(make, how):
    job = make(how == "left out")
    job.report_slow(1, 0)
    job.die(0, 0, step=10)
    spare = Spare(job, "host-d", 200)
    job.ready(0, 1)
    job.ready(2, 1)
    if how == "left out":
        with pytest.raises(LeftOut):
            job.ready(1, 1)
    else:
        job.clock.now += PATIENCE_S
        assert job.ask("host-e", 201, 0.0)["kind"] == "wait"
    assert spare.told() == {"kind": "take", "rank": 1}
    assert job.coordinator._hangs.slow_ranks == frozenset()


@pytest.mark.parametrize("spare_host", ["host-b", None])
@pytest.mark.parametrize("evicts", [True, False])
def test_nobody_is_left_out_without_permission_or_without_a_better_host(make, spare_host, evicts):
    job = make(evicts)
    kill_again_and_again(job)
    if spare_host is not None:
        Spare(job, spare_host, 200)
    elif not evicts:
        Spare(job, "host-d", 200)
    job.all_ready(4)
    assert job.took_over() == []
