"""Tells the coordinator that this supervisor lives, and this supervisor that it is cut off from the coordinator.

Both sides have the same bound, so that a host that is cut off has ended its training process when the others go on.
"""

from __future__ import annotations

import socket
import threading
import time
from typing import Any, Protocol

from arc_dist.errors import ArcError, CoordinatorUnavailable
from arc_dist.protocol.pulse import AwakeClock
from arc_dist.supervisor.events import CutOff, Event, Events, Failed
from arc_dist.telemetry.log import logger

_EVERY_S = 1.0
_MAX_PULSES_PER_S = 500.0  # of all ranks together
_LEAST_PER_TIMEOUT = 5
_PROBE_TIMEOUT_S = 2.0


class Client(Protocol):
    """What is asked of the coordinator."""

    def pulse(self, *, rank: int, node: int, leaving: bool = False) -> dict[str, Any]: ...


class Pulse:
    """A thread that speaks about once a second until it is closed; it starts with the object.

    Args:
        rank: this rank.
        node: number of its node among those of the launcher.
        world_size: number of ranks.
        client: the coordinator's.
        timeout_s: of the coordinator's patience with a silent host, which sets the pace; 0 sends nothing.
        cut_off_s: without an answer for this long, the supervisor is told that it is cut off.
        events: where.
        lease: on the coordinator's host, what has to be looked after as often; None elsewhere.
    """

    def __init__(
        self,
        *,
        rank: int,
        node: int,
        world_size: int,
        client: Client,
        timeout_s: float,
        cut_off_s: float,
        events: Events[Event],
        lease: RendezvousLease | None = None,
    ) -> None:
        self._rank, self._node = rank, node
        self._client = client
        self._timeout_s = timeout_s
        self._cut_off_s = cut_off_s
        self._events = events
        self._lease = lease
        self._every_s = min(max(_EVERY_S, world_size / _MAX_PULSES_PER_S), timeout_s / _LEAST_PER_TIMEOUT)
        self._closing = threading.Event()
        if timeout_s:
            threading.Thread(target=self._run, name="arc-pulse", daemon=True).start()

    def close(self, *, says: bool) -> None:
        """Ends the thread; with `says`, tells the coordinator that this supervisor ends as it should, best effort."""
        self._closing.set()
        if self._timeout_s and says:
            try:
                self._client.pulse(rank=self._rank, node=self._node, leaving=True)
            except ArcError as error:
                logger.debug("rank %d left without saying so: %s", self._rank, error)

    def _run(self) -> None:
        clock = AwakeClock(self._timeout_s)
        heard_s = clock.look(time.monotonic())
        while not self._closing.wait(self._every_s):
            if self._lease is not None:
                self._lease.renew()
            try:
                self._client.pulse(rank=self._rank, node=self._node)
            except CoordinatorUnavailable as error:
                silent_s = clock.look(time.monotonic()) - heard_s
                if silent_s > self._cut_off_s and not self._closing.is_set():
                    why = f"no answer for {silent_s:.0f} s: {error}"
                    self._events.put(
                        CutOff(
                            f"rank {self._rank}: this host is cut off from the coordinator's, or that one is lost "
                            f"({why}). Training has ended here, since others may go on without this host."
                        )
                    )
                    return
            except ArcError as error:
                if not self._closing.is_set():
                    self._events.put(Failed(error))  # replaced by another supervisor, or of an earlier job
                return
            else:
                heard_s = clock.look(time.monotonic())


def reaches(endpoint: str) -> bool:
    """Whether something listens at ``host:port``; blocks for two seconds at most."""
    host, _, port = endpoint.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_TIMEOUT_S).close()
    except OSError as error:
        logger.debug("%s is not reached: %s", endpoint, error)
        return False
    return True


class RendezvousLease:
    """Whether the launcher's rendezvous was in reach all the time: see `protocol.pulse`.

    Args:
        endpoint: its ``host:port``.
        timeout_s: how long it may be out of reach.
    """

    def __init__(self, endpoint: str, timeout_s: float) -> None:
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._reached_at = time.monotonic()
        self._problem = ""

    def renew(self) -> None:
        """Tries to reach it; blocks for two seconds at most."""
        began_at = time.monotonic()
        self._judge(began_at)
        if reaches(self._endpoint):
            self._reached_at = began_at
        else:
            self._judge(time.monotonic())

    def _judge(self, now: float) -> None:
        if now - self._reached_at >= self._timeout_s:
            self._problem = (
                f"the launcher's rendezvous at {self._endpoint} was out of reach for {self._timeout_s:.0f} s"
            )

    def problem(self) -> str:
        """Why this side may not go on without the others; once lost, the lease stays so."""
        return self._problem
