"""A client that goes where the coordinator goes, as a file on its node tells: for hosts that move, as a Ray actor does.

The file is written by whoever knows (supervisor/ray_host.py) and says an address, a token and an epoch. A higher epoch
is a later coordinator; one that is lower than the client has heard of is never asked, and never believed when it
answers. While no coordinator answers, calls fail as with any client, and are made again by who made them.
"""

from __future__ import annotations

import os
import socket
import threading
import urllib.parse
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arc_dist.config import Env
from arc_dist.coordinator import endpoint as endpoints
from arc_dist.coordinator.client import CoordinatorClient
from arc_dist.coordinator.endpoint import Endpoint
from arc_dist.errors import ConfigError, CoordinatorUnavailable, Deposed

if TYPE_CHECKING:
    import http.client

PATIENCE_S = 60.0  # Ray restarts an actor within seconds; a loaded host, or a node that takes over, takes longer


class FollowingClient(CoordinatorClient):
    """See the module's text. Threads share one; all of them go on with a new coordinator together.

    Args:
        first: where the coordinator is now.
        path: the file that tells where it is later; it need not be there yet.
        timeout_s: see `CoordinatorClient`.
    """

    def __init__(self, first: Endpoint, path: Path, timeout_s: float = 10.0) -> None:
        self._moving = threading.Lock()
        self._connections: weakref.WeakSet[http.client.HTTPConnection] = weakref.WeakSet()
        self._job_id = first.job_id
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._target = first
        super().__init__(first.url, first.token, timeout_s, _authority(first))

    @property
    def patience_s(self) -> float:
        """See `Methods.patience_s`."""
        return PATIENCE_S

    def _exchange(self, verb: str, path: str, data: bytes | None, timeout_s: float) -> dict[str, Any]:
        self._look()
        asked = self._target
        try:
            return self._ask(verb, path, data, timeout_s)
        except (CoordinatorUnavailable, ConfigError, Deposed) as error:
            # What refuses the token may be another program that has the port now.
            self._look()
            if self._target is not asked:
                return self._ask(verb, path, data, timeout_s)
            if isinstance(error, Deposed):
                raise CoordinatorUnavailable(f"{error.message}, and where that one is was not told yet") from error
            raise

    def _ask(self, verb: str, path: str, data: bytes | None, timeout_s: float) -> dict[str, Any]:
        if getattr(self._local, "address", None) != self.address:
            self._drop()
            self._local.address = self.address
        answer = super()._exchange(verb, path, data, timeout_s)
        epoch = answer.get("epoch")
        if isinstance(epoch, int) and epoch < self._epoch:
            raise CoordinatorUnavailable(
                f"the coordinator at {self.address} is one of epoch {epoch}, but epoch {self._epoch} has begun"
            )
        return answer

    def _connection(self) -> http.client.HTTPConnection:
        connection = super()._connection()
        with self._moving:
            self._connections.add(connection)
        return connection

    def _look(self) -> None:
        """Reads the file when it has changed."""
        try:
            about = os.stat(self._path)
            seen = (about.st_mtime_ns, about.st_ino)
            if seen == self._seen:
                return
            found = endpoints.read(self._path)
        except (OSError, ConfigError):
            return  # not there yet, or not to be believed; the present address stays
        with self._moving:
            self._seen = seen
            is_ours = found.job_id == self._job_id and found.epoch >= self._epoch
            if not is_ours or found.epoch <= self._target.epoch or found.url == self._target.url:
                return
            self._target = found
            parts = urllib.parse.urlsplit(found.url)
            self.address, self._host, self._port = found.url, parts.hostname or "", parts.port
            self._headers = {**self._headers, "Authorization": f"Bearer {found.token}"}
            left = list(self._connections)
            self._connections.clear()
        for connection in left:
            _cut(connection)


def follow(env: Env, timeout_s: float = 10.0) -> CoordinatorClient:
    """The client of a training process, from what its supervisor told it.

    Raises:
        ConfigError: the address or the token is none.
    """
    if env.coordinator is None or env.token is None:
        raise ConfigError("ARC_COORDINATOR is set but ARC_TOKEN is not. The supervisor sets both; unset both.")
    if env.coordinator_file is None:
        return CoordinatorClient(env.coordinator, env.token, timeout_s, env.tls_ca)
    first = Endpoint(
        url=env.coordinator,
        token=env.token,
        job_id=env.job_id,
        run_dir=str(env.run_dir),
        world_size=env.world_size,
        host="",
        pid=0,
        authority=None if env.tls_ca is None else str(env.tls_ca),
    )
    return FollowingClient(first, env.coordinator_file, timeout_s)


def _authority(endpoint: Endpoint) -> Path | None:
    return None if endpoint.authority is None else Path(endpoint.authority)


def _cut(connection: http.client.HTTPConnection) -> None:
    """Wakes a thread that waits for an answer of a coordinator that has been replaced, on a lost host for minutes."""
    sock = connection.sock
    if sock is not None:
        try:
            socket.socket.shutdown(sock, socket.SHUT_RDWR)  # an SSLSocket's own is for its own thread
        except OSError:
            pass  # closed in this moment
