"""Finds or makes the coordinator that a training process talks to."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from arc_dist.config import Env
from arc_dist.coordinator.client import CoordinatorClient, LocalClient
from arc_dist.coordinator.server import CoordinatorServer
from arc_dist.coordinator.service import Coordinator
from arc_dist.errors import ConfigError


def connect(
    env: Env, gather: Callable[[Any, int], list[Any]], rank: int, world_size: int
) -> tuple[CoordinatorClient | LocalClient, Callable[[], None]]:
    """The client of this process, and what closes it. Every rank must call this; it blocks.

    Under a supervisor the coordinator is there already. Without one, the first rank serves one for as long as the
    process lives: enough to commit checkpoints, and no journal, because a restart is a new job.

    Args:
        env: says whether there is a supervisor.
        gather: ``(item, step) -> items of all ranks``; a collective.
        rank: of this process.
        world_size: number of processes.

    Raises:
        ConfigError: the supervisor gave no address or token, or the first rank cannot listen.
    """
    if env.supervised:
        if env.coordinator is None or env.token is None:
            raise ConfigError("ARC_COORDINATOR and ARC_TOKEN are missing although ARC_SUPERVISED is set; unset it.")
        client = CoordinatorClient(env.coordinator, env.token)
        return client, client.close
    if world_size == 1:
        coordinator = Coordinator(1, job_id=env.job_id)
        return LocalClient(coordinator), coordinator.close
    return _serve_from_first(env, gather, rank, world_size)


def _serve_from_first(
    env: Env, gather: Callable[[Any, int], list[Any]], rank: int, world_size: int
) -> tuple[CoordinatorClient | LocalClient, Callable[[], None]]:
    hosts = gather(socket.gethostname(), 0)
    server: CoordinatorServer | None = None
    announced: list[str] | None = None
    problem: ConfigError | None = None
    if rank == 0:
        try:
            # Nobody outside needs it when all ranks are on this host.
            host = "127.0.0.1" if len(set(hosts)) == 1 else _own_address()
            server = CoordinatorServer(Coordinator(world_size, job_id=env.job_id), host=host).start()
            announced = [server.address, server.token]
        except ConfigError as error:
            problem = error
    announced = gather(announced, 0)[0]
    if problem is not None:
        raise problem
    if announced is None:
        raise ConfigError("rank 0 could not serve the coordinator; its own message says why.")
    address, token = announced
    client = CoordinatorClient(address, token)

    def close() -> None:
        client.close()
        if server is not None:
            server.close()

    return client, close


def _own_address() -> str:
    """The address that this host's name stands for, which is what other hosts reach it by."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError as error:
        raise ConfigError(f"the name of this host cannot be resolved: {error}. Add it to /etc/hosts.") from error
