"""Keeps a node told where the coordinator is, when Ray hosts it; one supervisor of each node does this.

A bridge process asks Ray (`ray_bridge`); when it dies, another is started. What it reports goes into a file that all
supervisors and training processes of the node follow (`coordinator/following.py`). Only a higher epoch replaces an
address, so that an old coordinator that comes back is never followed.

No job depends on Ray. When the coordinator has not answered for some seconds, rank 0's supervisor opens the journal
itself and stands in, with the next epoch; the actor, should it come back, cannot open the journal, or is fenced by it.
Rank 0 also announces every address in the launcher's store, which other nodes read when their own bridge is of no help.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from arc_dist.coordinator import endpoint as endpoints
from arc_dist.coordinator.client import CoordinatorClient
from arc_dist.coordinator.endpoint import Endpoint
from arc_dist.coordinator.hosting import HostSpec
from arc_dist.coordinator.server import CoordinatorServer
from arc_dist.coordinator.service import Coordinator
from arc_dist.errors import ArcError, ConfigError, CoordinatorUnavailable, Deposed
from arc_dist.supervisor.ray_link import Link
from arc_dist.supervisor.rendezvous import host_identity
from arc_dist.telemetry.log import logger

_TICK_S = 0.5
_PROBE_EVERY_S = 1.0
_PROBE_TIMEOUT_S = 2.0
_UNREACHED_LIMIT_S = 20.0  # at the start, of Ray
_START_LIMIT_S = 180.0  # at the start, of an actor on a cluster that was reached
_RETRY_FIRST_S = 0.5
_RETRY_MAX_S = 15.0
_STOP_LIMIT_S = 10.0

Report = dict[str, Any]


def node_file(run_dir: Path) -> Path:
    """The file that tells this node where the coordinator is; the run directory may be shared with other nodes."""
    return run_dir / f"coordinator-{host_identity()}.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """What a node needs to know to find the coordinator in Ray.

    Attributes:
        ray: Ray's ``host:port``, or ``auto``.
        job_id: the job's name.
        run_dir: where the node's file is.
        authority: the PEM file that vouches for the coordinator's certificate.
        directories: where else the address is written, for people.
        stand_in_s: silence of the coordinator after which rank 0's supervisor stands in; Ray restarts an actor within
            one to three seconds.
    """

    ray: str
    job_id: str
    run_dir: Path
    authority: Path | None = None
    directories: Sequence[Path] = ()
    stand_in_s: float = 6.0


class RayHost:
    """See the module's text. Use it in a `with` statement; it blocks at the start until there is a coordinator.

    Args:
        place: how to find it.
        first: where it is, as rank 0 has announced; None on rank 0.
        spec: what the actor is to serve, on rank 0; None elsewhere.
        listen: rank 0's interface, for when it stands in.
        announce: tells other nodes of a new address; on rank 0.
        look_up: what rank 0 has announced last, or None; elsewhere.
    """

    def __init__(
        self,
        place: Place,
        *,
        first: Endpoint | None = None,
        spec: HostSpec | None = None,
        listen: str = "127.0.0.1",
        announce: Callable[[Endpoint], None] | None = None,
        look_up: Callable[[], Endpoint | None] | None = None,
    ) -> None:
        self._place = place
        self._spec = spec
        self._listen = listen
        self._announce = announce
        self._look_up = look_up
        self._has_run = spec is not None and spec.has_run
        self._endpoint = first
        self._found = threading.Event()
        self._closing = threading.Event()
        self._reports: queue.SimpleQueue[tuple[int, Report | None]] = queue.SimpleQueue()
        self._written: list[tuple[Path, Endpoint]] = []
        self._link: Link | None = None
        self._links = 0  # that were started; a report of an earlier one is no news
        self._is_connected = False
        self._retry_s, self._retry_at = _RETRY_FIRST_S, 0.0
        self._problem, self._is_final = "", False
        self._reached_at = time.monotonic()
        self._standing_in: tuple[Coordinator, CoordinatorServer] | None = None
        self._thread = threading.Thread(target=self._run, name="arc-ray-host", daemon=True)

    def __enter__(self) -> RayHost:
        try:
            self._place.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(
                f"{self._place.run_dir} cannot be made: {error}. Set ARC_RUN_DIR to another directory."
            ) from error
        if self._spec is not None:
            self._spec.leave_mark()
        if self._endpoint is not None:
            self._publish(self._endpoint)
        self._thread.start()
        try:
            self._await_first()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def endpoint(self) -> Endpoint:
        """Where the coordinator is now."""
        assert self._endpoint is not None  # since __enter__
        return self._endpoint

    @property
    def num_connections(self) -> int:
        """Connections to the coordinator, as far as this process knows: one at least to an actor."""
        return 1 if self._standing_in is None else self._standing_in[1].num_connections

    def close(self) -> None:
        """On rank 0 also ends the actor."""
        self._closing.set()
        self._thread.join(2 * _STOP_LIMIT_S)
        for path, endpoint in self._written:
            endpoint.remove(path)

    def _await_first(self) -> None:
        """Waits for a coordinator.

        Raises:
            ConfigError: there can be none: Ray is not installed, refuses this node, ...
            CoordinatorUnavailable: none came up in time.
        """
        began_at = time.monotonic()
        while not self._found.wait(_TICK_S):
            waited_s = time.monotonic() - began_at
            if self._is_final:
                raise ConfigError(f"--coordinator=ray: {self._problem}")
            limit_s = _START_LIMIT_S if self._is_connected or not self._problem else _UNREACHED_LIMIT_S
            if waited_s > limit_s + (self._place.stand_in_s if self._has_run else 0.0):
                raise CoordinatorUnavailable(
                    f"--coordinator=ray: no coordinator for {waited_s:.0f} s: {self._problem or 'Ray says nothing'}"
                )

    # ---- the thread

    def _run(self) -> None:
        if self._endpoint is not None:
            self._found.set()
        try:
            while not self._closing.is_set():
                self._tend_link()
                with contextlib.suppress(queue.Empty):
                    self._hear(*self._reports.get(timeout=_TICK_S))
                self._look_after()
        finally:
            self._end()

    def _tend_link(self) -> None:
        is_wanted = self._standing_in is None and not self._is_final
        if is_wanted and time.monotonic() >= self._retry_at:
            self._start_link()

    def _start_link(self) -> None:
        if self._link is not None:
            return
        self._links += 1
        number = self._links
        order: dict[str, Any] = {"do": "follow", "job_id": self._place.job_id, "address": self._place.ray}
        if self._spec is not None:
            order |= {"do": "host", "spec": dataclasses.asdict(self._spec)}
        log = self._place.run_dir / f"ray-{host_identity()}.log"
        self._link = Link(order, lambda report: self._reports.put((number, report)), log)

    def _hear(self, number: int, report: Report | None) -> None:
        if number != self._links:
            return
        if report is None:
            self._drop_link()
            self._retry_at = time.monotonic() + self._retry_s
            self._retry_s = min(2 * self._retry_s, _RETRY_MAX_S)
        elif "endpoint" in report:
            self._retry_s = _RETRY_FIRST_S
            authority = None if self._place.authority is None else str(self._place.authority)
            self._accept(dataclasses.replace(Endpoint(**report["endpoint"]), authority=authority))
        elif "problem" in report:
            self._problem, self._is_final = str(report["problem"]), bool(report["is_final"])
            is_news = self._standing_in is None and (self._is_final or self._endpoint is None)
            (logger.warning if is_news else logger.debug)("the coordinator in Ray: %s", self._problem)
        elif "connected" in report:
            self._is_connected = True

    def _accept(self, found: Endpoint) -> None:
        """Follows an address, unless it is another job's, or of an epoch that is over."""
        old = self._endpoint
        if found.job_id != self._place.job_id:
            logger.warning("an address of job %r was refused; this is job %r", found.job_id, self._place.job_id)
            return
        if old is not None and (found.epoch < old.epoch or (found.epoch, found.url) == (old.epoch, old.url)):
            if found.epoch < old.epoch:
                logger.debug("an address of epoch %d was refused; epoch %d has begun", found.epoch, old.epoch)
            return
        log = logger.info if old is None or self._spec is None else logger.warning
        log("the coordinator is at %s (%s, epoch %d)", found.url, found.host, found.epoch)
        self._reached_at = time.monotonic()
        self._publish(found)

    def _publish(self, found: Endpoint) -> None:
        self._endpoint = found
        file = node_file(self._place.run_dir)
        names = [(file.parent, file.name), *((directory, endpoints.NAME) for directory in self._place.directories)]
        written: list[tuple[Path, Endpoint]] = []
        for directory, name in names:
            try:
                written.append((found.write(directory, name), found))
            except ConfigError as error:
                logger.warning("%s", error)
        self._written = written
        self._found.set()
        if self._announce is not None:
            try:
                self._announce(found)
            except RuntimeError as error:  # torch's store errors: the launcher's store is lost, so the job is ending
                logger.debug("the coordinator's address was not announced: %s", error)

    def _look_after(self) -> None:
        """Finds out whether the coordinator answers, and what else can be done when it does not."""
        silent_s = time.monotonic() - self._reached_at
        if self._endpoint is not None:
            if silent_s < _PROBE_EVERY_S:
                return
            if self._answers(self._endpoint):
                self._reached_at = time.monotonic()
                return
        if self._spec is None:
            announced = self._look_up() if self._look_up is not None and silent_s > _TICK_S else None
            if announced is not None:
                self._accept(announced)
            return
        limit_s = self._place.stand_in_s if self._endpoint is not None else _UNREACHED_LIMIT_S
        is_known = self._endpoint is not None or (self._has_run and not self._is_final)
        if silent_s > limit_s and is_known and self._standing_in is None:
            self._stand_in(silent_s)

    def _answers(self, endpoint: Endpoint) -> bool:
        client = CoordinatorClient(endpoint.url, endpoint.token, _PROBE_TIMEOUT_S, self._place.authority)
        try:
            client.get("/healthz")
        except ArcError:
            return False
        finally:
            client.close()
        return True

    def _stand_in(self, silent_s: float) -> None:
        assert self._spec is not None
        with contextlib.ExitStack() as stack:
            try:
                self._spec.check_mark()
                coordinator = self._spec.open()
                stack.callback(coordinator.close)
                server = CoordinatorServer(
                    coordinator, host=self._listen, token=self._spec.token, certificate=self._spec.certificate
                ).start()
            except ArcError as error:
                # The actor lives and only its address is not known yet, or the disk is ill; it is tried again.
                logger.debug("rank 0's supervisor cannot stand in for the coordinator: %s", error)
                return
            stack.pop_all()
        self._standing_in = coordinator, server
        logger.warning(
            "the coordinator in Ray has not answered for %.0f s (%s): rank 0's supervisor stands in for it from the "
            "journal, until the job ends",
            silent_s,
            self._problem or "its process is gone",
        )
        if self._link is not None:
            self._link.stop()  # an actor that comes back has nothing to serve
        self._accept(
            Endpoint(
                url=server.address,
                token=self._spec.token,
                job_id=self._spec.job_id,
                run_dir=self._spec.run_dir,
                world_size=self._spec.world_size,
                host=host_identity(),
                pid=os.getpid(),
                authority=None if self._place.authority is None else str(self._place.authority),
                epoch=coordinator.epoch,
            )
        )

    def _end(self) -> None:
        """Ends the actor, when it is this node's to end, and the bridge; and what stood in."""
        deadline = time.monotonic() + _STOP_LIMIT_S
        if self._owns_actor():
            self._start_link()  # unless there is one
            assert self._link is not None
            self._link.stop()
            is_over = False
            while not is_over and time.monotonic() < deadline:
                with contextlib.suppress(queue.Empty):
                    number, report = self._reports.get(timeout=max(0.01, deadline - time.monotonic()))
                    is_over = number == self._links and (report is None or "done" in report)
            if not is_over:
                logger.warning("Ray was not reached to end the coordinator's actor; it ends by itself within minutes")
        self._drop_link()
        if self._standing_in is not None:
            coordinator, server = self._standing_in
            server.close()
            coordinator.close()

    def _owns_actor(self) -> bool:
        """Whether there may be an actor that is this process's to end."""
        if self._spec is None or not self._is_connected:
            return False
        try:
            self._spec.check_mark()
        except Deposed:
            return False  # a later start of the job has it
        except ConfigError as error:
            logger.debug("%s", error)
        return True

    def _drop_link(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None
