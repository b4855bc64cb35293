"""The coordinator inside a detached Ray actor: Ray places it, restarts it, and finds it by its name.

Nobody in a job but a node's bridge (supervisor/ray_bridge.py) speaks to Ray. The actor opens the same HTTP server as
the embedded host; ranks and supervisors are told its address and token, and never that there is a Ray.

The actor holds nothing that is not in the journal. After Ray has restarted it, it waits to be told again what to serve,
reads the journal, and has a new address and a higher epoch. When nobody has spoken to it for a while it ends for good,
so that a job that ended without a word leaves no actor behind; whoever comes later starts another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from arc_dist.coordinator.endpoint import Endpoint
from arc_dist.coordinator.hosting import HostSpec
from arc_dist.coordinator.server import CoordinatorServer
from arc_dist.coordinator.service import Coordinator
from arc_dist.errors import ArcError, ConfigError, Deposed

NAMESPACE = "arc-dist"
IDLE_LIMIT_S = 120.0
_PREFIX = "arc-coordinator-"
_TICK_S = 1.0


def actor_name(job_id: str) -> str:
    """The name of a job's actor in the namespace `NAMESPACE`."""
    return f"{_PREFIX}{job_id}"


def job_of(name: str) -> str | None:
    """The job whose actor has this name; None when it is no coordinator."""
    return name.removeprefix(_PREFIX) if name.startswith(_PREFIX) else None


class CoordinatorHost:
    """What runs inside the actor. A plain class: Ray is asked only for its address and to end it.

    Args:
        job_id: the job that it is for.
        idle_limit_s: it ends itself when nobody has spoken to it, or to its server, for so long; 0 for never.
        host: the interface to listen on; None takes the one by which Ray knows this node.
    """

    def __init__(self, job_id: str, *, idle_limit_s: float = IDLE_LIMIT_S, host: str | None = None) -> None:
        self._job_id = job_id
        self._host = host
        self._guard = threading.Lock()
        self._spec: HostSpec | None = None
        self._coordinator: Coordinator | None = None
        self._server: CoordinatorServer | None = None
        self._asked_at = time.monotonic()
        self._started_at = time.time()
        if idle_limit_s:
            threading.Thread(target=self._watch, args=(idle_limit_s,), name="arc-idle", daemon=True).start()

    def serve(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Opens the coordinator of this start of the job, unless it is open; a later start takes the place of another.

        Args:
            fields: of a `HostSpec`.

        Returns:
            As `endpoint`, or ``{"problem", "kind"}``: ``place`` when the run directory is not reached from here,
            ``deposed`` when a later start has taken over, ``refused`` when the journal cannot be used.
        """
        self._asked_at = time.monotonic()
        with self._guard:
            try:
                spec = HostSpec.from_dict(fields)
                if spec.job_id != self._job_id:
                    raise ConfigError(f"this is the coordinator of job {self._job_id!r}, not of {spec.job_id!r}")
                spec.check_mark()
            except Deposed as error:
                return {"problem": error.message, "kind": "deposed"}
            except ConfigError as error:
                return {"problem": error.message, "kind": "place"}
            if self._spec != spec:
                self._close()
                try:
                    self._open(spec)
                except ArcError as error:
                    self._close()
                    return {"problem": error.message, "kind": "refused"}
            return self._endpoint()

    def endpoint(self) -> dict[str, Any]:
        """``{"endpoint": the fields of an `Endpoint`}``; or ``{"problem", "kind"}`` while nothing is served."""
        self._asked_at = time.monotonic()
        with self._guard:
            return self._endpoint()

    def about(self) -> dict[str, Any]:
        """For people: where it runs, since when (seconds since 1970), and the state of its job."""
        with self._guard:
            coordinator, server = self._coordinator, self._server
            about: dict[str, Any] = {"job_id": self._job_id, "node": os.uname().nodename, "pid": os.getpid()}
            about["started_at"] = self._started_at
            if coordinator is not None and server is not None:
                facts = coordinator.call("status", {})
                about |= {"url": server.address, "epoch": coordinator.epoch, "phase": facts["phase"]}
            return about

    def close(self) -> None:
        """Ends the server and closes the journal, so that another host can open it."""
        with self._guard:
            self._close()

    def _open(self, spec: HostSpec) -> None:
        self._coordinator = spec.open()
        interface = self._host if self._host is not None else _node_address()
        self._server = CoordinatorServer(
            self._coordinator, host=interface, token=spec.token, certificate=spec.certificate
        ).start()
        self._spec = spec

    def _close(self) -> None:
        self._spec = None
        if self._server is not None:
            self._server.close()
        if self._coordinator is not None:
            self._coordinator.close()
        self._server = self._coordinator = None

    def _endpoint(self) -> dict[str, Any]:
        spec, server, coordinator = self._spec, self._server, self._coordinator
        if spec is None or server is None or coordinator is None:
            return {"problem": "the coordinator was restarted and not told yet what to serve", "kind": "waiting"}
        found = Endpoint(
            url=server.address,
            token=spec.token,
            job_id=spec.job_id,
            run_dir=spec.run_dir,
            world_size=spec.world_size,
            host=os.uname().nodename,
            pid=os.getpid(),
            epoch=coordinator.epoch,
        )
        return {"endpoint": dataclasses.asdict(found)}

    def _watch(self, limit_s: float) -> None:
        while True:
            time.sleep(_TICK_S)
            server = self._server
            if server is not None and server.num_connections:
                self._asked_at = time.monotonic()
            if time.monotonic() - self._asked_at > limit_s:
                self.close()
                self._asked_at = time.monotonic()  # should Ray not be reached, it is tried again
                end_actor(self._job_id)


def end_actor(job_id: str) -> bool:
    """Ends a job's actor for good, from a process that is connected to Ray. False when there was none."""
    ray: Any = importlib.import_module("ray")
    try:
        actor = ray.get_actor(actor_name(job_id), namespace=NAMESPACE)
    except ValueError:
        return False
    with contextlib.suppress(ray.exceptions.RayError):  # it may be restarting, and ends all the same
        ray.get(actor.close.remote(), timeout=2.0)
    ray.kill(actor, no_restart=True)
    return True


def find_actor(job_id: str) -> Any | None:
    """The handle of a job's actor, from a process that is connected to Ray; None when there is none."""
    ray: Any = importlib.import_module("ray")
    try:
        return ray.get_actor(actor_name(job_id), namespace=NAMESPACE)
    except ValueError:
        return None


def create_actor(job_id: str, node_id: str | None, idle_limit_s: float = IDLE_LIMIT_S) -> Any:
    """Starts a job's actor, or finds it, and returns its handle.

    Args:
        job_id: the job's name.
        node_id: of the node where it is to run as long as that lives; None leaves it to Ray.
        idle_limit_s: see `CoordinatorHost`.
    """
    ray: Any = importlib.import_module("ray")
    strategies: Any = importlib.import_module("ray.util.scheduling_strategies")
    where = "DEFAULT" if node_id is None else strategies.NodeAffinitySchedulingStrategy(node_id=node_id, soft=True)
    options = {
        "name": actor_name(job_id),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": 0,
        "max_concurrency": 4,
        "scheduling_strategy": where,
    }
    return ray.remote(CoordinatorHost).options(**options).remote(job_id, idle_limit_s=idle_limit_s)


def choose_node(own_node_id: str) -> str:
    """Where the actor is best placed: away from the training, and where no host is lost that Ray itself survives.

    That is the node of Ray's control service when it is another one than this; else any other node; else this one.
    Without a control service Ray restarts nothing, so an actor that shares its node fails in no further way.
    """
    ray: Any = importlib.import_module("ray")
    alive = [node for node in ray.nodes() if node["Alive"]]
    others = [node for node in alive if node["NodeID"] != own_node_id]
    heads = [node for node in others if "node:__internal_head__" in node["Resources"]]
    best = (heads or others)[:1]
    return best[0]["NodeID"] if best else own_node_id


def _node_address() -> str:
    ray: Any = importlib.import_module("ray")
    return str(ray.util.get_node_ip_address())
