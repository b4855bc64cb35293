"""Who is lost, who may go on, and that sleep of the one who listens is no silence of the others."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arc_dist.coordinator.hosts import HostDesk
from arc_dist.coordinator.service import Coordinator
from arc_dist.errors import Fenced
from arc_dist.protocol import generations
from arc_dist.protocol.events import Vanished
from arc_dist.protocol.job import Job, JobConfig, Phase
from arc_dist.protocol.pulse import PulseRules, Pulses
from arc_dist.supervisor.membership import Membership

RULES = PulseRules(timeout_s=10.0, min_nodes=1)


def test_who_is_not_heard_for_longer_than_the_timeout_is_lost():
    pulses = Pulses(RULES, 3)
    for second in range(30):
        for rank in (0, 1) if second > 5 else (0, 1, 2):
            pulses.hear(rank, rank, float(second))
        lost = pulses.silent(float(second))
        assert set(lost) == ({2} if second > 15 else set())
    assert lost[2] == 24.0


@pytest.mark.parametrize(("is_replaceable", "lost"), [(False, [2]), (True, [1, 2])])
def test_a_silent_rank_on_the_node_of_rank_0_is_its_agents_affair(is_replaceable, lost):
    pulses = Pulses(PulseRules(timeout_s=10.0, is_replaceable=is_replaceable), 3)
    for rank, node in enumerate((0, 0, 1)):
        pulses.hear(rank, node, 0.0)
    for second in range(1, 30):
        pulses.hear(0, 0, float(second))
    assert list(pulses.silent(30.0)) == lost


def test_sleep_of_the_listener_is_no_silence():
    pulses = Pulses(RULES, 2)
    pulses.hear(0, 0, 0.0)
    pulses.hear(1, 1, 0.0)
    assert pulses.silent(1000.0) == {}
    assert pulses.was_asleep
    pulses.hear(0, 0, 1000.0)
    for second in range(1001, 1008):
        pulses.hear(0, 0, float(second))
    assert set(pulses.silent(1008.0)) == {1}  # after what is left of its time


@given(st.lists(st.floats(0.0, 4.9), min_size=1, max_size=60), st.integers(0, 59))
def test_nobody_is_lost_before_the_timeout_and_everybody_after_it(gaps, heard_at):
    pulses, now, heard = Pulses(RULES, 2), 0.0, 0.0
    pulses.hear(1, 1, 0.0)
    for index, gap in enumerate(gaps):
        now += gap
        pulses.hear(0, 0, now)
        if index == heard_at:
            heard = now
            pulses.hear(1, 1, now)
        silence = now - heard
        if abs(silence - RULES.timeout_s) > 1e-6:
            assert set(pulses.silent(now)) == ({1} if silence > RULES.timeout_s else set())
    assert not pulses.was_asleep


def test_who_ended_as_it_should_or_was_never_heard_is_not_lost():
    pulses = Pulses(RULES, 3)
    pulses.hear(1, 1, 0.0)
    pulses.leave(1)
    for second in range(60):
        pulses.hear(0, 0, float(second))
    assert pulses.silent(60.0) == {}
    expecting = Pulses(PulseRules(timeout_s=10.0, expects_all=True), 3)
    for second in range(12):
        expecting.hear(0, 0, float(second))
    assert set(expecting.silent(12.0)) == {1, 2}


def heard_all(nodes: tuple[int, ...], rules: PulseRules) -> Pulses:
    pulses = Pulses(rules, len(nodes))
    for rank, node in enumerate(nodes):
        pulses.hear(rank, node, 0.0)
    return pulses


@pytest.mark.parametrize(
    ("nodes", "lost", "min_nodes", "left"),
    [
        ((0, 1, 2), {2}, 1, ((0, 0), (1, 1))),
        ((0, 1, 2), {1}, 2, ((0, 0), (2, 2))),
        ((0, 0, 1, 1), {3}, 1, ((0, 0), (1, 0))),  # the other rank of that node goes with it
        ((0, 1, 2), {1, 2}, 2, ()),
        ((0, 1, 2), {2}, 0, ()),  # the launcher allows no other number
        ((0, 0, 1, 1), {1}, 1, ()),  # rank 0's node
    ],
)
def test_who_may_go_on(nodes, lost, min_nodes, left):
    rules = PulseRules(timeout_s=10.0, min_nodes=min_nodes)
    assert heard_all(nodes, rules).survivors(lost) == left


def test_nobody_goes_on_alone_while_some_are_unknown_or_leave():
    pulses = Pulses(RULES, 3)
    pulses.hear(0, 0, 0.0)
    pulses.hear(1, 1, 0.0)
    assert pulses.survivors({1}) == ()
    pulses = heard_all((0, 1, 2), RULES)
    pulses.leave(1)
    assert pulses.survivors({2}) == ()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def desk_after(seconds: int, lease: str = "", rules: PulseRules = RULES) -> Vanished | None:
    clock = Clock()
    desk = HostDesk(3, rules, clock, lambda: lease)
    for rank in range(3):
        assert desk.hear(rank, rank, is_leaving=False) is None or lease
    for _ in range(seconds):
        clock.now += 1.0
        desk.hear(1, 1, is_leaving=False)
        vanished = desk.hear(0, 0, is_leaving=False)
    return vanished


def test_the_desk_says_who_is_lost_and_who_goes_on():
    assert desk_after(10) is None
    vanished = desk_after(11)
    assert vanished is not None
    assert (vanished.ranks, vanished.survivors) == ((2,), ((0, 0), (1, 1)))


def test_without_the_lease_all_must_end_at_once():
    vanished = desk_after(1, "the rendezvous is out of reach")
    assert vanished is not None
    assert (vanished.ranks, vanished.survivors) == ((), ())
    late = desk_after(11, "the rendezvous is out of reach")
    assert late is not None
    assert late.ranks == (2,)
    assert late.survivors == ()
    fixed = PulseRules(timeout_s=10.0)
    assert desk_after(1, "the rendezvous is out of reach", fixed) is None  # nobody else could have begun


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.RUNNING, Phase.ENDING])
def test_a_lost_host_ends_the_world_in_every_phase(phase):
    event = Vanished(ranks=(2,), reason="lost", survivors=((0, 0), (1, 1)))
    outcome = generations.apply(JobConfig(world_size=3), Job(phase=phase), event, 1.0)
    stop = outcome.job.stop
    assert outcome.job.phase is Phase.STOPPED
    assert stop is not None
    assert (stop.exit_code, stop.lost, stop.survivors) == (76, (2,), ((0, 0), (1, 1)))
    again = generations.apply(JobConfig(world_size=3), outcome.job, event, 2.0)
    assert again.job is outcome.job


def test_a_job_that_was_told_to_go_does_not_go_on():
    event = Vanished(ranks=(2,), reason="lost", survivors=((0, 0), (1, 1)))
    outcome = generations.apply(JobConfig(world_size=3), Job(phase=Phase.RUNNING, preempted=True), event, 1.0)
    assert outcome.job.stop is not None
    assert outcome.job.stop.survivors == ()


def test_where_a_launcher_starts_single_ranks_the_others_wait_for_it():
    event = Vanished(ranks=(2,), reason="lost", is_replaceable=True)
    config = JobConfig(world_size=3)
    ending = generations.apply(config, Job(phase=Phase.RUNNING), event, 1.0).job
    assert ending.phase is Phase.ENDING
    assert [death.rank for death in ending.deaths] == [2]
    assert generations.apply(config, ending, event, 2.0).job is ending


def test_the_service_tells_survivors_and_fences_replaced_supervisors():
    clock = Clock()
    coordinator = Coordinator(3, clock=clock, hosts=HostDesk(3, RULES, clock))
    where = {"world_size": 3, "host": "h", "shm_dir": "/x"}
    first = [coordinator.call("join", {"rank": rank, "pid": rank, **where}) for rank in range(3)]
    coordinator.call("join", {"rank": 1, "pid": 17, **where})
    with pytest.raises(Fenced, match="taken the place"):
        coordinator.call("pulse", {"rank": 1, "node": 1, "sender": first[1]["sender"]})
    for rank in range(3):
        coordinator.call("pulse", {"rank": rank, "node": rank})
    for _ in range(11):
        clock.now += 1.0
        for rank in (0, 1):
            coordinator.call("pulse", {"rank": rank, "node": rank})
    told = coordinator.call("directive", {"rank": 0, "generation": 0})
    assert (told["kind"], told["exit_code"], told["survivors"]) == ("stop", 76, [[0, 0], [1, 1]])


def test_membership_of_a_smaller_world():
    before = [Membership(rank=rank, world_size=6, node=rank // 2, num_launchers=3) for rank in range(6)]
    left = tuple((member.rank, member.node) for member in before if member.node != 1)
    after = [member.among(left) for member in before if member.node != 1]
    assert [(m.rank, m.world_size, m.node, m.num_launchers) for m in after] == [
        (0, 4, 0, 2), (1, 4, 0, 2), (2, 4, 1, 2), (3, 4, 1, 2)
    ]  # fmt: skip
    assert before[0].environ == {}
    assert after[3].environ == {
        "RANK": "3", "WORLD_SIZE": "4", "ROLE_RANK": "3", "ROLE_WORLD_SIZE": "4", "GROUP_RANK": "1",
        "GROUP_WORLD_SIZE": "2",
    }  # fmt: skip
    assert len({key for member in itertools.chain(before, after) for key in [member.shrinks]}) == 2


def test_a_rank_that_somebody_else_has_now_is_heard_from_then_on():
    pulses = Pulses(PulseRules(timeout_s=10.0, min_nodes=1), 2)
    for second in range(20):
        pulses.hear(0, 0, float(second))
        if second == 0:
            pulses.hear(1, 1, 0.0)
            pulses.leave(1)
        assert pulses.silent(float(second)) == {}  # it said that it leaves
    pulses.expect(1)
    for second in range(20, 29):
        pulses.hear(0, 0, float(second))
        assert pulses.silent(float(second)) == {}
    assert list(pulses.silent(31.0)) == [1]


def test_without_a_timeout_nobody_is_ever_lost():
    pulses = Pulses(PulseRules(timeout_s=0.0, min_nodes=1), 2)
    pulses.hear(1, 1, 0.0)
    assert pulses.silent(1e6) == {}
    assert not pulses.was_asleep
