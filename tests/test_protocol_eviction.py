"""Who is left out for a smaller world, and why somebody stays; the service around it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from arc_dist.coordinator.client import LocalClient
from arc_dist.coordinator.hosts import HostDesk
from arc_dist.coordinator.service import Coordinator
from arc_dist.data.order import Order
from arc_dist.data.world import Share
from arc_dist.errors import LeftOut
from arc_dist.protocol.budgets import BudgetPolicy, Cause, CauseKind, Death
from arc_dist.protocol.cells import Origin
from arc_dist.protocol.eviction import Outlook, choose, goes_on, obstacle
from arc_dist.protocol.job import Job, JobConfig, Member, Phase
from arc_dist.protocol.pick import Committed, Known
from arc_dist.protocol.pulse import PulseRules
from arc_dist.protocol.spares import unwanted_hosts

HOSTS = ("a", "b", "b", "c")
KILLED = {"kind": "signal", "signal": 9, "exit_code": None, "exception": None}
STORED = Known(committed=frozenset({Committed(step=10, url="file:///s", generation=0)}))


def member(rank: int) -> Member:
    return Member(host=HOSTS[rank], pid=100 + rank, shm_dir=f"/shm/{rank}")


def ending(**changes: object) -> Job:
    death = Death(rank=3, cause=Cause(kind=CauseKind.SIGNAL, signal=9), step=12)
    members = {rank: member(rank) for rank in range(4)}
    job = Job(phase=Phase.ENDING, members=members, known=STORED, deaths=(death,), reached=12)
    return replace(job, **changes)


WITHOUT_B = Outlook(survivors=((0, 0), (3, 2)))


@pytest.mark.parametrize(
    ("job", "host", "outlook", "worlds", "why"),
    [
        (ending(), "b", WITHOUT_B, {1, 2, 4}, ""),
        (ending(), "a", Outlook(survivors=(), problem="x"), {1, 2, 4}, "rank 0's supervisor is there"),
        (ending(), "b", Outlook(survivors=(), problem="the number of nodes is fixed"), {2}, "nodes is fixed"),
        (ending(), "b", WITHOUT_B, {1, 4}, "2 ranks would be left, and the training can go on with 1, 4 only"),
        (ending(), "b", WITHOUT_B, None, "goes through its data by itself"),
        (ending(known=Known()), "b", WITHOUT_B, {2}, "no checkpoint is committed"),
    ],
)
def test_what_speaks_against_leaving_a_host_out(job, host, outlook, worlds, why):
    found = obstacle(job, host, outlook, worlds)
    assert why in found
    assert bool(found) == bool(why)


def test_one_host_is_left_out_at_a_time_with_all_ranks_of_its_nodes():
    outlooks = {"a": Outlook(survivors=()), "b": WITHOUT_B, "c": Outlook(survivors=((0, 0), (1, 1), (2, 1)))}
    unwanted = dict.fromkeys("abc", "rank r is persistently slow")
    vanished, obstacles = choose(ending(), unwanted, outlooks, {1, 2, 3, 4})
    assert vanished is not None
    assert (vanished.ranks, vanished.survivors, vanished.is_eviction) == ((1, 2), ((0, 0), (3, 2)), True)
    assert "host b is left out: rank r is persistently slow" in vanished.reason
    assert set(obstacles) == {"a"}


def test_a_smaller_world_is_no_way_round_the_end_of_a_job():
    bug = Death(rank=3, cause=Cause(kind=CauseKind.EXIT, exit_code=3))
    assert goes_on(JobConfig(world_size=4), ending())
    assert not goes_on(JobConfig(world_size=4, budget=BudgetPolicy(max_restarts=0)), ending())
    assert not goes_on(JobConfig(world_size=4), ending(deaths=(bug,), reached=0))


def test_a_slow_rank_makes_its_host_unwanted():
    assert unwanted_hosts(ending(), {2}) == {"b": "rank 2 is persistently slow"}


class Service:
    """Four supervisors on three hosts around a coordinator; ranks 1 and 2 are on one that is slow."""

    def __init__(self, run_dir: Path, *, min_nodes: int, evicts: bool = True) -> None:
        self.now = 1000.0
        self.run_dir = run_dir
        rules = PulseRules(timeout_s=15.0, min_nodes=min_nodes)
        self.coordinator = Coordinator.open(
            4,
            run_dir=run_dir,
            job_id="job",
            clock=lambda: self.now,
            hosts=HostDesk(4, rules, lambda: self.now),
            evicts=evicts,
        )
        self.clients = [LocalClient(self.coordinator) for _ in range(4)]
        for rank, client in enumerate(self.clients):
            client.join(rank, 4, HOSTS[rank], 100 + rank, f"/shm/{rank}")
            client.pulse(rank=rank, node="abc".index(HOSTS[rank]))
        for rank in range(4):
            self.ready(rank, 0)
        self.coordinator._hangs._streaks = replace(self.coordinator._hangs._streaks, counts={2: 3})

    def ready(self, rank: int, generation: int) -> None:
        store = {"host": "h", "port": 1} if rank == 0 else None
        self.clients[rank].ready(rank, generation, store, [], f"/shm/{rank}", HOSTS[rank])

    def is_told(self, worlds: tuple[int, ...] = (1, 2, 4)) -> None:
        self.clients[0].worlds(worlds)
        listed = [{"step": 10, "generation": 0, "certified": True}]
        self.clients[0].hello_store("file:///s", listed)

    def lines(self, kind: str) -> list[dict[str, object]]:
        lines = [json.loads(line) for line in (self.run_dir / "incidents.jsonl").read_text().splitlines()]
        return [line for line in lines if line["kind"] == kind]


@pytest.fixture
def make(tmp_path):
    made: list[Service] = []

    def one(**settings: object) -> Service:
        made.append(Service(tmp_path / str(len(made)), **settings))
        return made[-1]

    yield one
    for service in made:
        service.coordinator.close()


@pytest.mark.parametrize("last", [0, 1, 2, 3])
def test_the_others_go_on_without_a_slow_host_once_nothing_runs_any_more(make, last):
    service = make(min_nodes=2)
    service.is_told()
    service.clients[3].died(3, 0, KILLED, 12)
    for rank in [rank for rank in range(4) if rank != last]:
        service.ready(rank, 1)
    assert service.coordinator.job.phase is Phase.ENDING
    if last in (1, 2):
        with pytest.raises(LeftOut, match="rank 2 is persistently slow"):
            service.ready(last, 1)
    else:
        service.ready(last, 1)
    told = service.clients[0].directive(0, 1, 0.0)
    assert (told["kind"], told["exit_code"], told["survivors"]) == ("stop", 76, [[0, 0], [3, 2]])
    for rank in (1, 2):
        with pytest.raises(LeftOut):
            service.clients[rank].directive(rank, 1, 0.0)
        with pytest.raises(LeftOut):
            service.clients[rank].pulse(rank=rank, node=1)
    (line,) = service.lines("world_shrinks")
    assert "host b is left out" in str(line["cause"])


@pytest.mark.parametrize(
    ("min_nodes", "worlds", "why"),
    [(0, (1, 2, 4), "number of nodes is fixed"), (3, (1, 2, 4), "fewer than 3 nodes"), (2, (1, 4), "2 ranks would be")],
)
def test_a_host_that_must_stay_stays_and_why_is_said_once(make, min_nodes, worlds, why):
    service = make(min_nodes=min_nodes)
    service.is_told(worlds)
    for generation in range(2):
        service.clients[3].died(3, generation, KILLED, 12 + generation)
        for rank in range(4):
            service.ready(rank, generation + 1)
        assert service.coordinator.job.phase is Phase.RUNNING
    (line,) = service.lines("host_kept")
    assert why in str(line["cause"])
    assert "rank 2 is persistently slow" in str(line["cause"])
    assert line["ranks"] == [1, 2]


def test_nothing_is_considered_without_permission(make):
    service = make(min_nodes=2, evicts=False)
    service.is_told()
    service.clients[3].died(3, 0, KILLED, 12)
    for rank in range(4):
        service.ready(rank, 1)
    assert service.coordinator.job.phase is Phase.RUNNING
    assert not (service.run_dir / "incidents.jsonl").exists()


def order(samples: int) -> Order:
    named = {"sampler": "SeededSampler", "seed": 5, "shuffle": True, "drop_last": False, "drop_small": False}
    return Order(samples=samples, batch_size=2, **named)


@pytest.mark.parametrize(
    ("share_order", "epochs", "worlds"),
    [
        ("it is a list", None, [4]),
        (order(100), None, [1, 2, 3, 4, 6, 12]),
        (order(96), 1, [1, 2, 3, 4, 6, 12]),  # 12 batches of each rank of the origin: four whole turns
        (order(80), 1, [1, 2, 4]),  # 10 batches: one is left for a last turn of four cells
    ],
)
def test_what_a_training_says_it_can_go_on_with(share_order, epochs, worlds):
    share = Share(origin=Origin(4, 3), rank=0, ranks=4, since=0, order=share_order)
    assert share.fitting_worlds(epochs=epochs) == worlds
