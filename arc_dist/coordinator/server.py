"""Serves a coordinator over HTTP or HTTPS: ``POST /v1/<method>`` with a JSON object, answered by a JSON object.

One thread per connection, kept alive: supervisors are few per node, each keeps one or two connections, and most of
them wait in a long poll. People read ``GET /v1/status`` and the page at ``/``; `api` lists everything.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
import select
import socket
import ssl
import threading
import time
from http.server import ThreadingHTTPServer
from typing import Any

from arc_dist.coordinator.handler import Handler
from arc_dist.coordinator.limits import Bucket, BucketPerAddress, Limits
from arc_dist.coordinator.service import Coordinator
from arc_dist.coordinator.tls import Certificate, server_context
from arc_dist.errors import ConfigError

logger = logging.getLogger("arc_dist.coordinator")

_GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR | select.POLLNVAL


class CoordinatorServer:
    """A server thread around a coordinator.

    Args:
        coordinator: answers; it is not closed with the server.
        host: the interface to listen on; its name is what `address` tells others.
        port: 0 takes a free one.
        token: what every caller must show; None makes a new one.
        certificate: what to show to callers, who then speak HTTPS; None serves plain HTTP.
        limits: bounds on what callers may take; None makes some for the size of the job.
        max_request_bytes: in place of the one in `limits`.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        certificate: Certificate | None = None,
        limits: Limits | None = None,
        max_request_bytes: int | None = None,
    ) -> None:
        self.token = token or secrets.token_urlsafe(32)
        self._coordinator = coordinator
        self._host = host
        self._port = port
        self._certificate = certificate
        limits = limits or Limits().for_world(coordinator.world_size)
        self._limits = (
            limits if max_request_bytes is None else dataclasses.replace(limits, request_bytes=max_request_bytes)
        )
        self._http: _Http | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> CoordinatorServer:
        """Binds and serves in a daemon thread.

        Raises:
            ConfigError: the interface or port cannot be bound, or the certificate cannot be used.
        """
        context = None if self._certificate is None else server_context(self._certificate)
        try:
            self._http = _Http((self._host, self._port), self._coordinator, self.token, self._limits, context)
        except OSError as error:
            raise ConfigError(
                f"the coordinator cannot listen on {self._host}:{self._port}: {error}. Name an interface of this host."
            ) from error
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.1}, name="arc-coordinator", daemon=True
        )
        self._thread.start()
        return self

    @property
    def address(self) -> str:
        """``http://host:port``, or ``https://``; for a server that was started."""
        if self._http is None:
            raise ConfigError("the coordinator's server was not started; call start() first")
        host = f"[{self._host}]" if ":" in self._host else self._host
        scheme = "http" if self._certificate is None else "https"
        return f"{scheme}://{host}:{self._http.server_address[1]}"

    def finish(self, timeout_s: float) -> bool:
        """Waits until every rank was told that the job is over and has its answer; then closes. True when all were."""
        deadline_s = time.monotonic() + timeout_s
        told = self._coordinator.wait_told(timeout_s)
        if self._http is not None:
            self._http.wait_idle(max(0.0, deadline_s - time.monotonic()))
        self.close()
        return told

    @property
    def num_connections(self) -> int:
        """Connections whose other end is still there, whatever their requests wait for."""
        return 0 if self._http is None else self._http.count_connections()

    def close(self) -> None:
        """Stops listening and cuts the connections."""
        if self._http is None or self._thread is None:
            return
        self._http.shutdown()
        self._http.server_close()
        self._http.cut_connections()
        self._thread.join()
        self._http = self._thread = None

    def __enter__(self) -> CoordinatorServer:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024

    def __init__(
        self,
        address: tuple[str, int],
        coordinator: Coordinator,
        token: str,
        limits: Limits,
        context: ssl.SSLContext | None,
    ) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self.coordinator = coordinator
        self.token = token.encode()
        self.limits = limits
        self.reads = Bucket(limits.reads_per_s)
        self.reports = Bucket(limits.reports_per_s)
        self.refusals = BucketPerAddress(limits.refusals_per_s)
        self._context = context
        self._connections: set[socket.socket] = set()
        self._guard = threading.Condition()
        self._num_busy = 0
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        # Not HTTPServer's: it asks the resolver for this host's name, which can take seconds.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = self.socket.accept()
        if self._context is not None:
            # The handshake is the handler's, in a thread of its own.
            connection = self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._guard:
            limit = self.limits.connections
            # One whose other end has closed is as good as gone, although its thread may not have noticed.
            is_full = len(self._connections) >= limit and sum(map(_is_open, self._connections)) >= limit
            if not is_full:
                self._connections.add(request)
        if is_full:
            logger.warning("a connection from %s was closed: %d are open", client_address, self.limits.connections)
            super().shutdown_request(request)
            return
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._guard:
            self._connections.discard(request)
        super().shutdown_request(request)

    def busy(self, change: int) -> None:
        """Counts requests whose answer has not left."""
        with self._guard:
            self._num_busy += change
            self._guard.notify_all()

    def wait_idle(self, timeout_s: float) -> None:
        with self._guard:
            self._guard.wait_for(lambda: self._num_busy == 0, timeout_s)

    def count_connections(self) -> int:
        with self._guard:
            connections = list(self._connections)
        return sum(_is_open(connection) for connection in connections)

    def cut_connections(self) -> None:
        with self._guard:
            connections = list(self._connections)
        for connection in connections:
            try:
                socket.socket.shutdown(connection, socket.SHUT_RDWR)  # an SSLSocket's own is for its own thread
            except OSError:
                pass  # closed by its peer in this moment

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Connections break; that is a caller's affair and no error of the coordinator.
        logger.debug("the connection to %s ended", client_address)


def _is_open(connection: socket.socket) -> bool:
    """False once the peer has closed its end, also while a long poll is being served."""
    poll = select.poll()
    try:
        poll.register(connection, _GONE)
    except ValueError:  # closed on this side in this moment
        return False
    return not poll.poll(0)
