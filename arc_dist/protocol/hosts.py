"""Which host to take out of a job: the one where ranks keep dying while they live elsewhere.

Only deaths count that say something about a host: not a script's own failures, not the echoes of other deaths, not what
a launcher replaced. One host alone can be compared with none, so a job on one host blames none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from arc_dist.protocol.budgets import Cause, CauseKind

MIN_DEATHS = 3
WINDOW_GENERATIONS = 20
_MAX_BLAMED = 64

_TELLING = frozenset({CauseKind.SIGNAL, CauseKind.OOM, CauseKind.LOST})
_TOLD_TO_GO = frozenset({1, 2, 3, 15})  # SIGHUP, SIGINT, SIGQUIT, SIGTERM: somebody asked for it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blamed:
    """A generation that ended by a death which its host may have caused."""

    generation: int
    host: str


def tells_of_host(cause: Cause) -> bool:
    """Whether a death with this cause counts against the host that it happened on."""
    return cause.kind in _TELLING and cause.signal not in _TOLD_TO_GO


def with_blamed(blamed: Sequence[Blamed], more: Blamed) -> tuple[Blamed, ...]:
    """The newest deaths, the new one included; one per generation and host, and never more than a bound."""
    return (*(entry for entry in blamed if entry != more), more)[-_MAX_BLAMED:]


def suspect(blamed: Sequence[Blamed], hosts: Collection[str], generation: int) -> tuple[str, int] | None:
    """The host to take out, and its number of deaths; None when there is none or too little is known.

    Args:
        blamed: what `with_blamed` collected.
        hosts: all hosts of the job.
        generation: the present one; what is `WINDOW_GENERATIONS` older is forgiven.
    """
    recent = {entry for entry in blamed if entry.generation > generation - WINDOW_GENERATIONS and entry.host in hosts}
    guilty = {entry.host for entry in recent}
    if len(guilty) != 1 or len(set(hosts)) < 2 or len(recent) < MIN_DEATHS:
        return None
    return guilty.pop(), len(recent)


def advice(host: str, num_deaths: int) -> str:
    """What to tell a person about the host that `suspect` names."""
    return (
        f"take host {host} out of the job: the last {num_deaths} deaths for reasons of infrastructure were all there, "
        f"none on another host"
    )
