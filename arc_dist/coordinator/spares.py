"""The part of the service that spares ask: they wait here until a rank is theirs, or the job is over."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

from arc_dist.coordinator.wire import MAX_POLL_S, Fields
from arc_dist.protocol import spares
from arc_dist.protocol.events import Event, Joined
from arc_dist.protocol.job import Job, Member, Phase

logger = logging.getLogger("arc_dist.coordinator")


class SpareDesk:
    """Who stands by. Everything is called under the service's lock.

    Args:
        patience_s: see `protocol.spares.lost_ranks`.
        clock: monotonic seconds.
        changed: the service's condition, notified when the job's state changes.
        note: records an incident.
    """

    def __init__(
        self,
        patience_s: float,
        clock: Callable[[], float],
        changed: threading.Condition,
        note: Callable[[dict[str, Any]], None],
    ) -> None:
        self._patience_s = patience_s
        self._clock = clock
        self._changed = changed
        self._note = note
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
        with self._standing_by(member):
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
                due_s = spares.due_s(present, self._seated_s, patience_s=self._patience_s)
                if due_s is not None:
                    remaining_s = min(remaining_s, max(0.01, due_s - self._clock()))
                self._changed.wait(remaining_s)

    @contextlib.contextmanager
    def _standing_by(self, member: Member) -> Iterator[None]:
        self._waiting.append(member)
        try:
            yield
        finally:
            self._waiting.remove(member)

    def _fill_places(self, job: Job, apply: Callable[[Event], None]) -> None:
        """Gives ranks that are lost to spares. The spare's own `join` finds that it is a member already."""
        now_s = self._clock()
        lost = spares.lost_ranks(job, self._seated_s, patience_s=self._patience_s, now_s=now_s)
        if not lost:
            return
        seated = set(job.members.values())
        standing_by = [member for member in self._waiting if member not in seated]
        seats = spares.assign(job.members, standing_by, lost=lost, unwanted=())
        for rank, member in sorted(seats.items()):
            before = job.members[rank]
            if member == before:
                continue
            self._seated_s[rank] = now_s
            cause = (
                f"the supervisor of rank {rank} on {before.host} (pid {before.pid}) is lost: it was not ready within "
                f"{self._patience_s:g} s; the spare on {member.host} (pid {member.pid}) takes its place"
            )
            logger.warning("%s", cause)
            self._note(
                {"kind": "spare_took_over", "ranks": [rank], "generation": job.generation, "cause": cause,
                 "seen_by": "coordinator"}
            )  # fmt: skip
            apply(Joined(rank=rank, member=member))
