"""Whether the others go on as a smaller world without a host that is unwanted, where no spares take its ranks.

Which hosts are unwanted, `protocol.spares` says. One of them is left out at a time, at a restart that happens anyway,
once none of its processes is left. It must be safe (`protocol.pulse`: enough nodes, rank 0's among them, the rendezvous
in reach), and it must cost less than it gains, so:

- the world that is left must be one that the training can go on with, sample for sample;
- a checkpoint must be committed, because snapshots in memory are of no use to another world;
- the restart must be one that the budgets allow: a smaller world is no way round the end of a job.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from arc_dist.protocol import budgets
from arc_dist.protocol.budgets import Ended
from arc_dist.protocol.events import Vanished
from arc_dist.protocol.job import Job, JobConfig
from arc_dist.protocol.pick import newest_committed
from arc_dist.protocol.pulse import Survivors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outlook:
    """Who could go on without a host: (rank, node) of each; else why nobody may, and `survivors` is empty."""

    survivors: Survivors
    problem: str = ""


def goes_on(config: JobConfig, job: Job) -> bool:
    """Whether the budgets allow another generation, by what is known of how this one ended."""
    ended = Ended(first=job.generation == job.first, deaths=job.deaths, reached=job.reached, preempted=job.preempted)
    return budgets.judge(config.budget, job.ledger, ended)[1].stop_code is None


def obstacle(job: Job, host: str, outlook: Outlook, worlds: Collection[int] | None) -> str:
    """Why `host` stays; empty when nothing speaks against leaving it out.

    Args:
        job: its state.
        host: an unwanted one.
        outlook: without it.
        worlds: numbers of ranks that the training can go on with; None when it has not said so.
    """
    if job.members[0].host == host:
        return "rank 0's supervisor is there, and with it the coordinator"
    if not outlook.survivors:
        return outlook.problem
    left = len(outlook.survivors)
    if worlds is None:
        return "the script goes through its data by itself, so that nobody knows what another number of ranks would do"
    if left not in worlds:
        known = ", ".join(map(str, sorted(worlds)))
        return f"{left} ranks would be left, and the training can go on with {known} only"
    if newest_committed(job.known) is None:
        return "no checkpoint is committed from which a smaller world could go on"
    return ""


def without(job: Job, host: str, why: str, survivors: Survivors) -> Vanished:
    """What makes the others go on without `host`, and without whoever shares a node with its ranks."""
    left = {rank for rank, _ in survivors}
    return Vanished(
        ranks=tuple(rank for rank in sorted(job.members) if rank not in left),
        reason=f"host {host} is left out: {why}",
        survivors=survivors,
        is_eviction=True,
    )


def choose(
    job: Job, unwanted: Mapping[str, str], outlooks: Mapping[str, Outlook], worlds: Collection[int] | None
) -> tuple[Vanished | None, dict[str, str]]:
    """The event that leaves out one unwanted host, if one can be; and why others stay, by host.

    Args:
        job: its state.
        unwanted: hosts, each with the reason for people.
        outlooks: without each of them.
        worlds: see `obstacle`.
    """
    obstacles = {host: obstacle(job, host, outlooks[host], worlds) for host in unwanted}
    host = next((host for host in unwanted if not obstacles[host]), None)
    chosen = None if host is None else without(job, host, unwanted[host], outlooks[host].survivors)
    return chosen, {host: text for host, text in obstacles.items() if text}
