"""Which supervisor has which rank, when some are lost and others stand by.

A *spare* is a supervisor that has no rank. When the supervisor of a rank is lost, with its host for instance, a spare
gets that rank: the world keeps its size, so everything goes on bit for bit. What a spare is told is one decision of the
coordinator; whoever had the rank before is fenced off like any supervisor that was replaced (`protocol.generations`).

**The rule** (`assign`), in this order:

1. Who is neither lost nor unwanted keeps its rank.
2. Each lost rank gets a spare, the lowest rank first; a wanted spare if one is left, else an unwanted one, because a
   suspected host is better than none. Without any spare the rank stays empty.
3. The ranks of an unwanted host get wanted spares if there are enough for all of them, and stay where they are
   otherwise: a launcher's agent that loses one of its workers ends them all. Rank 0's host stays.

**Unwanted**, where the job allows eviction, is the host on which ranks keep dying (`protocol.hosts`), and one with a
rank that is persistently slow (`protocol.stragglers`). Its ranks change their supervisors only at a restart that
happens anyway, and only once all their processes are gone. Without enough spares see `protocol.eviction`.

**Lost** is whose host is not heard any more (`protocol.pulse`), and who is not ready `patience_s` after a generation
began to end (`lost_ranks`). Neither is a proof: a supervisor
may only have been slow. It is fenced then, so a mistake costs a spare, and no correctness. Rank 0 is never lost in this
sense, since the coordinator lives in its supervisor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from arc_dist.protocol import hosts
from arc_dist.protocol.job import Job, Member, Phase


def assign(
    members: Mapping[int, Member], spares: Sequence[Member], *, lost: Collection[int], unwanted: Collection[str]
) -> dict[int, Member]:
    """The supervisor of each rank; a rank for which nobody is left is missing.

    Args:
        members: who has each rank now.
        spares: who stands by, the first to be taken first; none of them has a rank.
        lost: ranks whose supervisors are lost.
        unwanted: hosts to be avoided.
    """
    wanted = [spare for spare in spares if spare.host not in unwanted]
    rest = [spare for spare in spares if spare.host in unwanted]
    seats = {rank: member for rank, member in members.items() if rank not in lost}
    for rank in sorted(rank for rank in members if rank in lost):
        if wanted or rest:
            seats[rank] = wanted.pop(0) if wanted else rest.pop(0)
    for host in dict.fromkeys(seats[rank].host for rank in sorted(seats)):
        ranks = [rank for rank in sorted(seats) if seats[rank].host == host and rank not in lost]
        if host in unwanted and 0 not in ranks and len(ranks) <= len(wanted):
            seats |= dict(zip(ranks, wanted, strict=False))
            wanted = wanted[len(ranks) :]
    return seats


def unwanted_hosts(job: Job, slow: Collection[int]) -> dict[str, str]:
    """Hosts to be left out, each with the reason for people.

    Args:
        job: its state.
        slow: ranks that are persistently slower than the others.
    """
    all_hosts = {member.host for member in job.members.values()}
    found = {
        job.members[rank].host: f"rank {rank} is persistently slow" for rank in sorted(slow) if rank in job.members
    }
    suspected = hosts.suspect(job.blamed, all_hosts, job.generation)
    if suspected is not None:
        found[suspected[0]] = f"the last {suspected[1]} deaths for reasons of infrastructure were there"
    return found


def lost_ranks(
    job: Job, seated_s: Mapping[int, float], declared: Collection[int] = (), *, patience_s: float, now_s: float
) -> frozenset[int]:
    """Ranks whose supervisors have been silent for too long while a generation ends or the next one starts.

    Args:
        job: its state.
        seated_s: when a spare last took a rank, on the clock of `now_s`: it has the same patience.
        declared: ranks that need no patience, because their hosts are known to be lost.
        patience_s: how long a rank may take to end its process and be ready.
        now_s: monotonic seconds.
    """
    return frozenset(
        rank
        for rank in _silent(job)
        if rank in declared or now_s - max(job.since_s, seated_s.get(rank, job.since_s)) >= patience_s
    )


def due_s(
    job: Job, seated_s: Mapping[int, float], declared: Collection[int] = (), *, patience_s: float
) -> float | None:
    """When `lost_ranks` may first have another answer, on the clock of `since_s`; None when only an event can."""
    due = [
        max(job.since_s, seated_s.get(rank, job.since_s)) + (0.0 if rank in declared else patience_s)
        for rank in _silent(job)
    ]
    return min(due, default=None)


def _silent(job: Job) -> list[int]:
    is_between = job.phase is Phase.ENDING or (job.phase is Phase.STARTING and job.generation > job.first)
    if not is_between or job.preempted:
        return []  # who was told to go ends anyway, and a first start has a patience of its own
    return [rank for rank in sorted(job.members) if rank != 0 and rank not in job.ready]
