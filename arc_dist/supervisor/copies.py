"""Before a generation's trainer is forked: brings its state here, if another supervisor keeps the only copy of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from arc_dist.config import Env
from arc_dist.errors import ArcError
from arc_dist.peers.server import Job
from arc_dist.peers.service import Fetching, Peers, PeerSettings
from arc_dist.protocol.partners import AUTO
from arc_dist.supervisor.cause import Cause
from arc_dist.supervisor.membership import Membership
from arc_dist.supervisor.rendezvous import host_identity, own_address
from arc_dist.telemetry.log import logger

_LOOK_EVERY_S = 0.05


class Wait(Protocol):
    """Handles the supervisor's events until a condition holds; False when `timeout_s` is over before."""

    def __call__(self, done: Callable[[], bool], *, timeout_s: float | None = None) -> bool: ...


class Client(Protocol):
    """What is asked of the coordinator."""

    def died(self, *, rank: int, generation: int, cause: dict[str, Any], step: int | None) -> dict[str, Any]: ...
    def incident(self, **line: Any) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restocker:
    """Fetches what a plan says that a peer keeps, while its supervisor goes on handling events.

    Attributes:
        peers: of this supervisor; None takes no part.
        rank: this rank.
        client: of the coordinator.
        wait: the supervisor's.
        insist: makes a call that must reach the coordinator.
        watch: asks for the order that ends a generation.
        is_over: whether that order came, or this supervisor has to go.
    """

    peers: Peers | None
    rank: int
    client: Client
    wait: Wait
    insist: Callable[[Callable[[], Any]], None]
    watch: Callable[[int], None]
    is_over: Callable[[], bool]

    def prepare(self, generation: int, directive: dict[str, Any]) -> bool:
        """Whether a trainer can be forked: its state is here, and the order's plan says where.

        A state that cannot be had ends the generation, and the next plan takes another source of it.
        """
        peers = self.peers
        if peers is None:
            return True
        plan: dict[str, Any] = dict(directive.get("plan") or {})
        told: dict[str, Any] = directive.get("peers") or {}
        fetching = peers.start_fetch(plan, told.get("holders") or [])
        if fetching is not None:
            self._await(fetching, generation)
            if fetching.is_cancelled:
                return False
            self._report(fetching, generation, int(plan["step"]))
            if fetching.source is None:
                cause = Cause(kind="lost", returncode=0, evidence=fetching.error).to_wire()
                self.insist(lambda: self.client.died(rank=self.rank, generation=generation, cause=cause, step=None))
                return False
            directive["plan"] = {**plan, "sources": {**plan["sources"], str(self.rank): fetching.source}}
        peers.begin(generation, told)
        return True

    def _await(self, fetching: Fetching, generation: int) -> None:
        self.watch(generation)
        began = time.monotonic()
        while not fetching.is_over:
            self.wait(lambda: fetching.is_over or self.is_over(), timeout_s=_LOOK_EVERY_S)
            if self.is_over() and not fetching.is_over:
                fetching.cancel()
                self.wait(lambda: fetching.is_over, timeout_s=_LOOK_EVERY_S)
        fetching.seconds = time.monotonic() - began

    def _report(self, fetching: Fetching, generation: int, step: int) -> None:
        arrived = fetching.source is not None
        if arrived:
            logger.warning("fetched %s in %.3f s", fetching.what, fetching.seconds)
        else:
            where = f"the supervisor of rank {fetching.holder}"
            logger.warning("step %d cannot be fetched from %s: %s", step, where, fetching.error)
        line = {
            "kind": "copy_fetched" if arrived else "copy_lost",
            "time": time.time(),
            "rank": self.rank,
            "ranks": [self.rank],
            "generation": generation,
            "step": step,
            "holder": fetching.holder,
            "cause": f"rank {self.rank} had lost step {step}" if arrived else fetching.error,
            "action": f"fetched {fetching.what}" if arrived else "another source",
            "seconds": round(fetching.seconds, 4),
        }
        try:
            self.client.incident(**line)
        except ArcError as error:
            logger.warning("the incident was not recorded: %s", error)


def open_peers(env: Env, membership: Membership, directory: Path, token: str, lineage: str, client: Client) -> Peers:
    """The part of this supervisor that deals in copies, listening."""

    def record(**line: Any) -> None:
        try:
            client.incident(time=time.time(), rank=membership.rank, **line)
        except ArcError as error:
            logger.warning("the incident was not recorded: %s", error)

    host, listen = own_address(membership)
    settings = PeerSettings(
        copies=AUTO if env.peer_copies is None else env.peer_copies,
        distance=env.peer_distance,
        domain=env.failure_domain or host_identity(),
        max_bytes_per_s=env.peer_max_bytes_per_s,
    )
    job = Job(token=token, lineage=lineage, rank=membership.rank, world_size=membership.world_size)
    return Peers(job, settings, directory, host=host, listen=listen, record=record)
