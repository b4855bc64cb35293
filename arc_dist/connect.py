"""A rank's way to its coordinator: the supervisor's when there is one, else one inside rank 0's own process."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import Any

from arc_dist.config import Env
from arc_dist.coordinator.client import CoordinatorClient, LocalClient
from arc_dist.coordinator.following import follow
from arc_dist.coordinator.server import CoordinatorServer
from arc_dist.coordinator.service import Coordinator
from arc_dist.coordinator.tls import Certificate
from arc_dist.errors import ArcError, ConfigError, InfrastructureError
from arc_dist.telemetry.log import logger

_RETRY_S = 0.2
_RETRY_MAX_S = 5.0

Client = CoordinatorClient | LocalClient


def connect(
    env: Env, gather: Callable[[Any, int], list[Any]], rank: int, world_size: int
) -> tuple[Client, Callable[[], None]]:
    """A client, and what gives back what it took. Every rank must call this; it blocks.

    Without a supervisor nobody restarts anything, so this coordinator commits checkpoints and keeps no journal.
    """
    if env.coordinator is not None:
        return follow(env), _nothing
    if env.ray is not None:
        raise ConfigError(
            "ARC_COORDINATOR=ray needs supervisors, which find the actor and follow it. Start with arcrun, or with "
            "torchrun -m arc_dist; or unset it."
        )
    if world_size == 1:
        coordinator = Coordinator(1, job_id=env.job_id)
        return LocalClient(coordinator), coordinator.close
    server: CoordinatorServer | None = None
    where: list[str] | None = None
    if rank == 0:
        certificate = Certificate.of(env.tls_cert, env.tls_key)
        coordinator = Coordinator(world_size, job_id=env.job_id)
        server = CoordinatorServer(coordinator, host=_own_address(), certificate=certificate).start()
        where = [server.address, server.token]
    address, token = gather(where, 0)[0]
    return CoordinatorClient(address, token, authority=env.tls_ca), server.close if server is not None else _nothing


def tell_until_heard(say: Callable[[], object], is_over: Callable[[], bool]) -> None:
    """Says something that must not be lost to a coordinator that cannot be reached now; for a thread of its own.

    Args:
        say: raises InfrastructureError as long as nobody hears it.
        is_over: nobody needs to hear it any more.
    """
    pause_s = _RETRY_S
    while not is_over():
        time.sleep(pause_s)
        try:
            say()
            return
        except InfrastructureError as error:
            logger.debug("the coordinator was not told: %s", error)
        except ArcError as error:
            logger.warning("the coordinator refuses to be told: %s", error)
            return
        pause_s = min(2 * pause_s, _RETRY_MAX_S)


def _nothing() -> None:
    """A client closes its connections with its threads."""


def _own_address() -> str:
    """The interface that the other ranks reach: the one whose name is the rendezvous address, else the host's own."""
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    try:
        with socket.socket() as probe:
            probe.bind((socket.gethostbyname(master), 0))
        return master
    except OSError:
        return socket.gethostname()
