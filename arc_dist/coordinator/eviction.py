"""Leaves hosts out that are suspected or slow, at a restart that happens anyway: for spares, else for a smaller world.

Everything is called under the service's lock.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from arc_dist.coordinator.hangs import HangDesk
from arc_dist.coordinator.hosts import HostDesk
from arc_dist.coordinator.records import identity_of
from arc_dist.coordinator.spares import SpareDesk
from arc_dist.coordinator.wire import Fields
from arc_dist.errors import LeftOut
from arc_dist.protocol import eviction, spares
from arc_dist.protocol.events import Event
from arc_dist.protocol.eviction import Outlook
from arc_dist.protocol.job import Job, JobConfig, Member, Phase

logger = logging.getLogger("arc_dist.coordinator")

_MAX_WORLDS = 4096


class EvictionDesk:
    """See the module's text.

    Args:
        evicts: whether anybody is left out at all.
        hosts: knows who could go on without a host.
        desk: where spares wait.
        hangs: knows who is slow.
        note: records an incident.
    """

    def __init__(
        self, evicts: bool, hosts: HostDesk, desk: SpareDesk, hangs: HangDesk, note: Callable[[dict[str, Any]], None]
    ) -> None:
        self._evicts = evicts
        self._hosts = hosts
        self._spares = desk
        self._hangs = hangs
        self._note = note
        self._worlds: frozenset[int] | None = None
        self._left_out: dict[str, str] = {}  # identities of supervisors, each with the reason
        self._told: dict[str, str] = {}  # why hosts stay, as it was said last

    def take_worlds(self, fields: Fields) -> None:
        """Notes with how many ranks the training could go on."""
        entries = fields.mappings("worlds", max_items=_MAX_WORLDS)
        self._worlds = frozenset(Fields("worlds", entry).integer("ranks", minimum=1) for entry in entries)

    def check(self, sender: str) -> None:
        """Refuses supervisors of hosts that were left out.

        Raises:
            LeftOut: this is one of them.
        """
        if sender in self._left_out:
            raise LeftOut(f"this host is left out of the job ({self._left_out[sender]})")

    def consider(self, rank: int, generation: int, job: Job, config: JobConfig, apply: Callable[[Event], None]) -> None:
        """Asked when a rank is ready for `generation`, so none of its processes is left, and before that counts."""
        if not self._evicts or job.phase is not Phase.ENDING or job.preempted or generation != job.awaited:
            return
        unwanted = spares.unwanted_hosts(job, self._hangs.slow_ranks)
        if not unwanted:
            return
        moved = self._spares.evict(rank, job, unwanted, apply)
        for member, why in moved:
            self._bar(member, f"{why}; a spare has taken its place")
        if moved or len(job.ready.keys() | {rank}) < config.world_size or not eviction.goes_on(config, job):
            return
        outlooks = {host: self._without(job, host) for host in unwanted}
        vanished, obstacles = eviction.choose(job, unwanted, outlooks, self._worlds)
        if vanished is None:
            self._say_why(job, unwanted, obstacles)
            return
        for lost in vanished.ranks:
            self._bar(job.members[lost], f"{vanished.reason}; the others go on without it")
        apply(vanished)

    def _bar(self, member: Member, why: str) -> None:
        self._left_out[identity_of(member)] = why

    def _without(self, job: Job, host: str) -> Outlook:
        return self._hosts.without([rank for rank, member in job.members.items() if member.host == host])

    def _say_why(self, job: Job, unwanted: dict[str, str], obstacles: dict[str, str]) -> None:
        """Once for each reason: a job may restart often."""
        for host, obstacle in obstacles.items():
            if self._told.get(host) == obstacle:
                continue
            self._told[host] = obstacle
            cause = f"host {host} is not left out though {unwanted[host]}: too few spares stand by, and {obstacle}"
            logger.warning("%s", cause)
            ranks = [rank for rank, member in sorted(job.members.items()) if member.host == host]
            line = {"kind": "host_kept", "ranks": ranks, "generation": job.generation, "cause": cause}
            self._note({**line, "seen_by": "coordinator"})
