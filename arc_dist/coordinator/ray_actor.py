"""Hosts the coordinator in a detached Ray actor: Ray places it, restarts it, and finds it by name.

Thin so far: the caller is connected to Ray itself and hands the address on. No rank and no supervisor ever connects to
Ray; they talk HTTP to the server that the actor opens, exactly as with the embedded coordinator. After a restart by Ray
the actor reads its journal and has a new port and a higher epoch; ask `endpoint` again.

The journal must lie where a restarted actor can read it (a shared directory), or the actor must be bound to one node.
"""

from __future__ import annotations

import importlib
import os
import time
from pathlib import Path
from typing import Any

from arc_dist.coordinator.server import CoordinatorServer
from arc_dist.coordinator.service import Coordinator
from arc_dist.errors import ConfigError, CoordinatorUnavailable

NAMESPACE = "arc-dist"


class CoordinatorHost:
    """What runs inside the actor: a coordinator with its journal, and its server. A plain class; Ray is not needed.

    Args:
        world_size: number of ranks.
        job_id: names the job.
        run_dir: where the journal and the incidents are.
        token: what callers must show; the same after a restart.
        host: the interface to listen on; None takes the address of this machine's name.
        settings: more arguments of `Coordinator`.
    """

    def __init__(
        self, world_size: int, *, job_id: str, run_dir: str, token: str, host: str | None = None, **settings: Any
    ) -> None:
        self._coordinator = Coordinator.open(world_size, job_id=job_id, run_dir=Path(run_dir), **settings)
        interface = host if host is not None else _node_address()
        self._server = CoordinatorServer(self._coordinator, host=interface, token=token).start()

    def endpoint(self) -> dict[str, Any]:
        """``{"address", "epoch", "pid"}``."""
        return {"address": self._server.address, "epoch": self._coordinator.epoch, "pid": os.getpid()}

    def status(self) -> dict[str, Any]:
        return self._coordinator.call("status", {})

    def stop(self) -> None:
        """Closes the server and the journal; the actor itself is ended by `stop`."""
        self._server.close()
        self._coordinator.close()


def start(
    world_size: int,
    *,
    job_id: str,
    run_dir: str,
    token: str,
    host: str | None = None,
    timeout_s: float = 60.0,
    **settings: Any,
) -> dict[str, Any]:
    """Starts the job's coordinator actor, or finds it, and returns its endpoint. `ray.init` must have been called.

    Args:
        world_size: number of ranks.
        job_id: names the actor ``arc-coordinator-<job_id>`` in the namespace ``arc-dist``.
        run_dir: where the actor keeps the journal.
        token: what callers must show. Ray keeps it among the actor's arguments.
        host: the interface to listen on.
        timeout_s: until the actor must answer.
        settings: more arguments of `Coordinator`.

    Raises:
        ConfigError: Ray is not installed, or this process is not connected to it.
        CoordinatorUnavailable: the actor did not answer in time.
    """
    ray = _connected_ray()
    actor = (
        ray.remote(CoordinatorHost)
        .options(
            name=_actor_name(job_id),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=0,
        )
        .remote(world_size, job_id=job_id, run_dir=run_dir, token=token, host=host, **settings)
    )
    return _ask(ray, actor, job_id, timeout_s)


def endpoint(job_id: str, *, timeout_s: float = 30.0) -> dict[str, Any]:
    """Where the job's coordinator is now; asks again while Ray restarts it.

    Raises:
        ConfigError: Ray is not installed or not connected, or there is no such actor.
        CoordinatorUnavailable: it did not answer in time.
    """
    ray = _connected_ray()
    return _ask(ray, _find(ray, job_id), job_id, timeout_s)


def stop(job_id: str) -> None:
    """Ends the job's coordinator actor for good; a detached actor outlives its job otherwise."""
    ray = _connected_ray()
    ray.kill(_find(ray, job_id), no_restart=True)


def _actor_name(job_id: str) -> str:
    return f"arc-coordinator-{job_id}"


def _find(ray: Any, job_id: str) -> Any:
    try:
        return ray.get_actor(_actor_name(job_id), namespace=NAMESPACE)
    except ValueError as error:
        raise ConfigError(f"Ray has no coordinator for job {job_id!r}. Start it first.", job_id=job_id) from error


def _ask(ray: Any, actor: Any, job_id: str, timeout_s: float) -> dict[str, Any]:
    deadline_s = time.monotonic() + timeout_s
    while True:
        remaining_s = max(0.1, deadline_s - time.monotonic())
        try:
            return ray.get(actor.endpoint.remote(), timeout=remaining_s)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            # An actor that Ray is restarting refuses calls for a moment.
            if time.monotonic() + 0.2 > deadline_s:
                raise CoordinatorUnavailable(
                    f"the coordinator actor of job {job_id!r} did not answer within {timeout_s:g} s: {error}. "
                    "Look at its log in Ray's session directory.",
                    job_id=job_id,
                ) from error
            time.sleep(0.1)


def _connected_ray() -> Any:
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError("Ray is not installed. Install it with: pip install 'arc-dist[ray]'") from error
    if not ray.is_initialized():
        raise ConfigError("this process is not connected to Ray. Call ray.init(address=...) first.")
    return ray


def _node_address() -> str:
    ray: Any = importlib.import_module("ray")
    return ray.util.get_node_ip_address()
