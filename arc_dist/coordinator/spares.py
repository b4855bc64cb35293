"""The part of the service that spares ask: they wait here until a rank is theirs, or the job is over."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Generator, Mapping
from typing import Any

from arc_dist.coordinator.wire import MAX_POLL_S, Fields
from arc_dist.protocol import spares
from arc_dist.protocol.events import Event, Joined, Vanished
from arc_dist.protocol.job import Job, Member, Phase

logger = logging.getLogger("arc_dist.coordinator")


class SpareDesk:
    """Who stands by. Everything is called under the service's lock.

    Args:
        patience_s: see `protocol.spares.lost_ranks`.
        clock: monotonic seconds.
        changed: the service's condition, notified when the job's state changes.
        note: records an incident.
        seated: told when a spare gets a rank.
    """

    def __init__(
        self,
        patience_s: float,
        clock: Callable[[], float],
        *,
        changed: threading.Condition,
        note: Callable[[dict[str, Any]], None],
        seated: Callable[[int], None],
    ) -> None:
        self._patience_s = patience_s
        self._clock = clock
        self._changed = changed
        self._note = note
        self._tell_seated = seated
        self._declared: set[int] = set()  # ranks whose hosts are known to be lost, until spares have them
        self._waiting: list[Member] = []  # those whose question is open, in the order of their arrival
        self._seated_s: dict[int, float] = {}

    def wait(
        self,
        fields: Fields,
        job: Callable[[], Job],
        apply: Callable[[Event], None],
        check_alive: Callable[[], None],
    ) -> dict[str, Any]:
        """Long poll of a spare: ``take`` a rank, ``done``, ``stop``, or ``wait``: ask again."""
        member = Member(host=fields.text("host"), pid=fields.integer("pid"), shm_dir=fields.text("shm_dir"))
        deadline_s = self._clock() + fields.number("timeout_s", default=0.0, maximum=MAX_POLL_S)
        with self._present(member):
            while True:
                check_alive()
                self._fill_places(job(), apply)
                present = job()
                if present.phase is Phase.DONE:
                    return {"kind": "done"}
                if present.phase is Phase.STOPPED and present.stop is not None:
                    return {"kind": "stop", "exit_code": present.stop.exit_code, "reason": present.stop.reason}
                rank = next((rank for rank, other in present.members.items() if other == member), None)
                if rank is not None:
                    return {"kind": "take", "rank": rank}
                remaining_s = deadline_s - self._clock()
                if remaining_s <= 0:
                    return {"kind": "wait"}
                due_s = spares.due_s(present, self._seated_s, self._declared, patience_s=self._patience_s)
                if due_s is not None:
                    remaining_s = min(remaining_s, max(0.01, due_s - self._clock()))
                self._changed.wait(remaining_s)

    def consider(self, vanished: Vanished) -> Vanished:
        """Hosts that are lost end nothing while there are spares for all of their ranks, and rank 0 is not one."""
        lost = set(vanished.ranks)
        if not lost or 0 in lost or len(self._waiting) < len(lost):
            return vanished
        self._declared |= lost
        return dataclasses.replace(vanished, survivors=(), is_replaceable=True)

    @contextlib.contextmanager
    def _present(self, member: Member) -> Generator[None, None, None]:
        self._waiting.append(member)
        try:
            yield
        finally:
            self._waiting.remove(member)

    def _fill_places(self, job: Job, apply: Callable[[Event], None]) -> None:
        """Gives ranks that are lost to spares. The spare's own `join` finds that it is a member already."""
        lost = spares.lost_ranks(job, self._seated_s, self._declared, patience_s=self._patience_s, now_s=self._clock())
        if not lost:
            return
        suspects = spares.unwanted_hosts(job, ())
        seats = spares.assign(job.members, self._standing_by(job), lost=lost, unwanted=suspects)
        for rank in sorted(lost & seats.keys()):
            why = "not heard any more" if rank in self._declared else f"not ready within {self._patience_s:g} s"
            self._seat(rank, seats[rank], job, apply, f"is lost: it was {why}")

    def evict(
        self, rank: int, job: Job, unwanted: Mapping[str, str], apply: Callable[[Event], None]
    ) -> list[tuple[Member, str]]:
        """Gives the ranks of the host of `rank` to spares, if it is unwanted; who had them, and why.

        Asked when `rank` is ready and while a generation ends. All ranks of a host go together, with the last one that
        is ready: a launcher's agent that loses one of its workers ends them all, and none of them may still train then.
        """
        host = job.members[rank].host
        ranks = [other for other, member in job.members.items() if member.host == host]
        if host not in unwanted or not job.ready.keys() >= {*ranks} - {rank}:
            return []
        seats = spares.assign(job.members, self._standing_by(job), lost=(), unwanted=unwanted)
        moved = [other for other in sorted(ranks) if seats[other] != job.members[other]]
        for other in moved:
            self._seat(other, seats[other], job, apply, f"is left out: {unwanted[host]}")
        return [(job.members[other], unwanted[host]) for other in moved]

    def _standing_by(self, job: Job) -> list[Member]:
        seated = set(job.members.values())
        return [member for member in self._waiting if member not in seated]

    def _seat(self, rank: int, spare: Member, job: Job, apply: Callable[[Event], None], why: str) -> None:
        before = job.members[rank]
        self._seated_s[rank] = self._clock()
        self._declared.discard(rank)
        self._tell_seated(rank)
        cause = (
            f"the supervisor of rank {rank} on {before.host} (pid {before.pid}) {why}; the spare on {spare.host} "
            f"(pid {spare.pid}) takes its place"
        )
        logger.warning("%s", cause)
        line = {"kind": "spare_took_over", "ranks": [rank], "generation": job.generation, "cause": cause}
        self._note({**line, "seen_by": "coordinator"})
        apply(Joined(rank=rank, member=spare))
