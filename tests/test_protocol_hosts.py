"""Which host is to be taken out: the one where ranks keep dying while they live elsewhere."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arc_dist.protocol.budgets import Cause, CauseKind, Death
from arc_dist.protocol.events import Died, GenerationOver, Joined, Ready
from arc_dist.protocol.generations import apply
from arc_dist.protocol.hosts import WINDOW_GENERATIONS, Blamed, suspect, tells_of_host, with_blamed
from arc_dist.protocol.job import Job, JobConfig, Member, durable, revive
from arc_dist.protocol.sources import Inventory

HOSTS = ("a", "b", "c")
KILLED = Cause(kind=CauseKind.SIGNAL, signal=9)
BUG = Cause(kind=CauseKind.EXCEPTION, exit_code=1, exception_type="ValueError", message="no")
CONFIG = JobConfig(world_size=3)


def deaths_on(*hosts: str) -> tuple[Blamed, ...]:
    blamed: tuple[Blamed, ...] = ()
    for generation, host in enumerate(hosts):
        blamed = with_blamed(blamed, Blamed(generation=generation, host=host))
    return blamed


def test_three_deaths_on_one_host_and_none_elsewhere():
    assert suspect(deaths_on("b", "b"), HOSTS, 2) is None
    assert suspect(deaths_on("b", "b", "b"), HOSTS, 2) == ("b", 3)
    assert suspect(deaths_on("b", "b", "b", "a"), HOSTS, 3) is None


def test_one_host_alone_is_compared_with_none():
    assert suspect(deaths_on("a", "a", "a", "a"), ("a",), 3) is None


def test_what_is_long_ago_is_forgiven_and_a_host_that_left_is_not_named():
    assert suspect(deaths_on("a", "b", "b", "b"), HOSTS, WINDOW_GENERATIONS) == ("b", 3)
    assert suspect(deaths_on("b", "b", "b"), HOSTS, WINDOW_GENERATIONS) is None
    assert suspect(deaths_on("b", "b", "b"), ("a", "c"), 3) is None


@pytest.mark.parametrize(
    ("cause", "tells"),
    [
        (KILLED, True),
        (Cause(kind=CauseKind.OOM, signal=9), True),
        (Cause(kind=CauseKind.LOST), True),
        (Cause(kind=CauseKind.SIGNAL, signal=15), False),
        (Cause(kind=CauseKind.REPLACED), False),
        (BUG, False),
        (Cause(kind=CauseKind.EXIT, exit_code=3), False),
    ],
)
def test_only_deaths_that_say_something_about_a_host_count(cause: Cause, tells: bool):
    assert tells_of_host(cause) == tells


@given(st.lists(st.sampled_from(HOSTS), max_size=200))
def test_what_is_remembered_is_bounded_and_the_suspect_has_all_recent_deaths(hosts: list[str]):
    blamed = deaths_on(*hosts)
    assert len(blamed) <= 64
    found = suspect(blamed, HOSTS, len(hosts) - 1)
    recent = hosts[-WINDOW_GENERATIONS:]
    assert (found is not None) == (len(recent) >= 3 and len(set(recent)) == 1)


def generation_with(job: Job, *deaths: Death) -> tuple[Job, GenerationOver]:
    """Runs a generation, ends it with these deaths, and starts the next one."""
    number = job.generation
    over = None
    events = [Died(generation=number, death=death) for death in deaths]
    inventory = Inventory(host="h", shm_dir="/x", holdings=())
    for event in [*events, *(Ready(rank=rank, generation=number + 1, inventory=inventory) for rank in range(3))]:
        outcome = apply(CONFIG, job, event, 0.0)
        job = outcome.job
        over = next((action for action in outcome.actions if isinstance(action, GenerationOver)), over)
    assert over is not None
    return job, over


def test_a_job_says_which_host_to_take_out_also_after_its_coordinator_was_restarted():
    job = Job()
    for rank, host in enumerate(HOSTS):
        job = apply(CONFIG, job, Joined(rank=rank, member=Member(host=host, pid=rank, shm_dir="/x")), 0.0).job
    inventory = Inventory(host="h", shm_dir="/x", holdings=())
    for rank in range(3):
        job = apply(CONFIG, job, Ready(rank=rank, generation=0, inventory=inventory), 0.0).job
    echo = Cause(kind=CauseKind.EXCEPTION, exit_code=1, exception_type="PeerLost")
    for step in (1, 2):
        job, over = generation_with(job, Death(rank=0, cause=echo, step=step), Death(rank=1, cause=KILLED, step=step))
        assert over.advice == ""
        job, over = generation_with(job, Death(rank=0, cause=BUG, step=10 * step))
        assert over.advice == ""
        job = revive(CONFIG, json.loads(json.dumps(durable(job))), 0.0)
    job, over = generation_with(job, Death(rank=1, cause=KILLED, step=30))
    assert over.advice.startswith("take host b out of the job: the last 3 deaths")
    for _ in range(3):  # no step beyond 30: the job stops, and says so too
        job, over = generation_with(job, Death(rank=1, cause=KILLED, step=30))
        if job.stop is not None:
            break
    assert job.stop is not None
    assert "take host b out of the job" in job.stop.reason
