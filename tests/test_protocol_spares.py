"""Who gets which rank: each once, with little movement, never somebody unwanted while others are left."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arc_dist.protocol.hosts import MIN_DEATHS, Blamed
from arc_dist.protocol.job import Job, Member, Phase
from arc_dist.protocol.sources import Inventory
from arc_dist.protocol.spares import assign, due_s, lost_ranks, unwanted_hosts


def member(host: str, pid: int) -> Member:
    return Member(host=host, pid=pid, shm_dir=f"/dev/shm/{pid}")


@st.composite
def situations(draw: st.DrawFn) -> tuple[dict[int, Member], list[Member], set[int], set[str]]:
    hosts = st.sampled_from("abcd")
    members = {rank: member(draw(hosts), 100 + rank) for rank in range(draw(st.integers(1, 6)))}
    spares = [member(draw(hosts), 200 + number) for number in range(draw(st.integers(0, 5)))]
    return members, spares, draw(st.sets(st.sampled_from(sorted(members)))), draw(st.sets(hosts))


@given(situations())
def test_each_rank_has_one_supervisor_and_nobody_has_two(situation):
    members, spares, lost, unwanted = situation
    seats = assign(members, spares, lost=lost, unwanted=unwanted)
    assert len(set(seats.values())) == len(seats)
    assert set(seats) <= set(members)
    assert all(members[rank] != seat for rank, seat in seats.items() if rank in lost)
    missing = set(members) - set(seats)
    assert missing <= lost
    assert not missing or set(spares) <= set(seats.values())


@given(situations())
def test_nobody_moves_without_need(situation):
    members, spares, lost, unwanted = situation
    seats = assign(members, spares, lost=lost, unwanted=unwanted)
    for rank, present in members.items():
        if rank not in lost and present.host not in unwanted:
            assert seats[rank] == present
        if seats.get(rank) not in (None, present):
            assert seats[rank] in spares


@given(situations())
def test_nobody_unwanted_is_taken_or_kept_while_others_are_left(situation):
    members, spares, lost, unwanted = situation
    seats = assign(members, spares, lost=lost, unwanted=unwanted)
    left = [spare for spare in spares if spare not in seats.values() and spare.host not in unwanted]
    kept = [seats[rank].host for rank in seats if seats[rank] == members[rank] and seats[rank].host in unwanted]
    assert not left or not any(seats[rank].host in unwanted for rank in lost & set(seats))
    for host in set(kept) - {members[0].host if 0 not in lost else None}:
        assert len(left) < kept.count(host), "its ranks could all have moved"
    # A lost rank comes before one that is only unwanted.
    if any(rank in lost for rank in set(members) - set(seats)):
        assert all(seats[rank] == members[rank] for rank in seats if rank not in lost)


@given(situations())
def test_a_host_is_left_out_as_a_whole_and_never_rank_0s(situation):
    members, spares, lost, unwanted = situation
    seats = assign(members, spares, lost=lost, unwanted=unwanted)
    moved = {members[rank].host for rank in members if rank not in lost and seats[rank] != members[rank]}
    kept = {members[rank].host for rank in members if rank not in lost and seats[rank] == members[rank]}
    assert not moved & kept
    if 0 not in lost:
        assert seats[0] == members[0]


def job(phase: Phase, *, ready: set[int], generation: int = 3, first: int = 0) -> Job:
    return Job(
        phase=phase,
        generation=generation,
        first=first,
        members={rank: member("a", rank) for rank in range(3)},
        ready={rank: Inventory(host="a", shm_dir="") for rank in ready},
        since_s=100.0,
    )


@pytest.mark.parametrize("phase", [Phase.ENDING, Phase.STARTING])
def test_who_is_not_ready_in_time_is_lost(phase):
    present = job(phase, ready={0, 2})
    assert due_s(present, {}, patience_s=15) == 115
    assert lost_ranks(present, {}, patience_s=15, now_s=114.9) == frozenset()
    assert lost_ranks(present, {}, patience_s=15, now_s=115) == {1}
    # Its successor has the same patience.
    assert lost_ranks(present, {1: 115.0}, patience_s=15, now_s=129.9) == frozenset()
    assert lost_ranks(present, {1: 115.0}, patience_s=15, now_s=130) == {1}
    assert due_s(present, {1: 115.0}, patience_s=15) == 130


@pytest.mark.parametrize(
    "present",
    [
        job(Phase.RUNNING, ready=set()),
        job(Phase.DONE, ready=set()),
        job(Phase.STARTING, ready=set(), generation=0),
        job(Phase.ENDING, ready={1, 2}),  # rank 0 has the coordinator
        replace(job(Phase.ENDING, ready={0}), preempted=True),
    ],
)
def test_nobody_is_lost_while(present):
    assert lost_ranks(present, {}, patience_s=15, now_s=1e6) == frozenset()
    assert due_s(present, {}, patience_s=15) is None


def test_hosts_are_unwanted_for_being_slow_and_for_deaths_and_the_reason_is_told():
    members = {rank: member(host, rank) for rank, host in enumerate("abc")}
    blamed = tuple(Blamed(generation=generation, host="c") for generation in range(MIN_DEATHS))
    job = Job(generation=MIN_DEATHS, members=members, blamed=blamed)
    assert unwanted_hosts(replace(job, blamed=()), ()) == {}
    assert unwanted_hosts(replace(job, blamed=()), (1, 7)) == {"b": "rank 1 is persistently slow"}
    assert set(unwanted_hosts(job, (1,))) == {"b", "c"}
    assert f"last {MIN_DEATHS} deaths" in unwanted_hosts(job, ())["c"]
