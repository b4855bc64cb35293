"""Serves a coordinator over HTTP: ``POST /v1/<method>`` with a JSON object, answered by a JSON object.

One thread per connection, kept alive: supervisors are few per node, each keeps one or two connections, and most of
them wait in a long poll. ``GET /v1/status`` is for people; ``GET /healthz`` needs no token and says nothing.

===========  ======================================================
200          the answer
400          `ConfigError`: no such method, wrong fields, no JSON
401          no token, or a wrong one
404, 405     another path or verb
409          `Fenced`
411, 413     no length, or more bytes than `max_request_bytes`
500          a bug of ours; the log has it
===========  ======================================================
"""

from __future__ import annotations

import hmac
import json
import logging
import secrets
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from arc_dist.coordinator.service import Coordinator
from arc_dist.errors import ArcError, ConfigError, Fenced

logger = logging.getLogger("arc_dist.coordinator")

PREFIX = "/v1/"
MAX_REQUEST_BYTES = 32 << 20  # a shard's part of a manifest lists every tensor
_IDLE_TIMEOUT_S = 300.0  # between two requests, and for a request to arrive whole


class CoordinatorServer:
    """A server thread around a coordinator.

    Args:
        coordinator: answers; it is not closed with the server.
        host: the interface to listen on; its name is what `address` tells others.
        port: 0 takes a free one.
        token: what every caller must show; None makes a new one.
        max_request_bytes: larger requests are refused unread.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        max_request_bytes: int = MAX_REQUEST_BYTES,
    ) -> None:
        self.token = token or secrets.token_urlsafe(32)
        self._coordinator = coordinator
        self._host = host
        self._port = port
        self._max_request_bytes = max_request_bytes
        self._http: _Http | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> CoordinatorServer:
        """Binds and serves in a daemon thread.

        Raises:
            ConfigError: the interface or port cannot be bound.
        """
        try:
            self._http = _Http((self._host, self._port), self._coordinator, self.token, self._max_request_bytes)
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
        """``http://host:port``; for a server that was started."""
        if self._http is None:
            raise ConfigError("the coordinator's server was not started; call start() first")
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._http.server_address[1]}"

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

    def __init__(self, address: tuple[str, int], coordinator: Coordinator, token: str, max_request_bytes: int) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self.coordinator = coordinator
        self.token = token.encode()
        self.max_request_bytes = max_request_bytes
        self._connections: set[socket.socket] = set()
        self._guard = threading.Condition()
        self._num_busy = 0
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # Not HTTPServer's: it asks the resolver for this host's name, which can take seconds.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._guard:
            self._connections.add(request)
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
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # closed by its peer in this moment

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Connections break; that is a caller's affair and no error of the coordinator.
        logger.debug("the connection to %s ended", client_address)


def _is_open(connection: socket.socket) -> bool:
    """False once the peer has closed: its end of file is there to be read, also while a long poll is being served."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


class _Refused(Exception):
    """A request that is answered with an error status."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "arc-dist"
    sys_version = ""
    disable_nagle_algorithm = True
    wbufsize = 65_536  # header and body leave in one packet
    timeout = _IDLE_TIMEOUT_S

    def do_GET(self) -> None:
        if self.path == "/healthz":
            self._answer(200, {"ok": True})
            return
        try:
            self._authenticate()
            if self.path != f"{PREFIX}status":
                raise _Refused(404, "config", f"there is nothing at {self.path}")
            self._answer(200, self._http.coordinator.call("status", {}))
        except _Refused as refused:
            self._refuse(refused)
        except Fenced as error:
            self._refuse(_Refused(409, "fenced", error.message))

    def do_POST(self) -> None:
        self._http.busy(1)
        try:
            self._post()
        finally:
            self._http.busy(-1)

    def _post(self) -> None:
        try:
            self._answer(200, self._serve())
        except _Refused as refused:
            self._refuse(refused)
        except Fenced as error:
            self._refuse(_Refused(409, "fenced", error.message))
        except ConfigError as error:
            self._refuse(_Refused(400, "config", error.message))
        except (ArcError, OSError) as error:
            self._refuse(_Refused(500, "internal", str(error)))
        except Exception as error:
            logger.exception("%s failed", self.path)
            self._refuse(_Refused(500, "internal", f"{type(error).__name__}: {error}"))

    def _serve(self) -> dict[str, Any]:
        self._authenticate()
        if not self.path.startswith(PREFIX):
            raise _Refused(404, "config", f"there is nothing at {self.path}")
        text = self._read_body()
        try:
            body: object = json.loads(text) if text else {}
        except (ValueError, RecursionError) as error:
            raise _Refused(400, "config", f"the body is not JSON: {error}") from None
        if not isinstance(body, dict):
            raise _Refused(400, "config", "the body is not a JSON object")
        return self._http.coordinator.call(self.path[len(PREFIX) :], cast("dict[str, Any]", body))

    def _authenticate(self) -> None:
        shown = self.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(shown, b"Bearer " + self._http.token):
            raise _Refused(401, "config", "the token is missing or wrong; ARC_TOKEN of this job is needed")

    def _read_body(self) -> bytes:
        length_text = self.headers.get("Content-Length", "")
        if not (length_text.isascii() and length_text.isdigit()):
            raise _Refused(411, "config", "Content-Length is missing")
        length = int(length_text)
        if length > self._http.max_request_bytes:
            raise _Refused(
                413, "config", f"the request has {length} bytes, at most {self._http.max_request_bytes} are taken"
            )
        return self.rfile.read(length)

    def _refuse(self, refused: _Refused) -> None:
        # What is left of the request was not read, so the connection cannot be used again.
        self.close_connection = self.close_connection or refused.status in (401, 404, 411, 413)
        self._answer(refused.status, {"error": refused.kind, "message": refused.message})

    def _answer(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer, separators=(",", ":"), default=str).encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    @property
    def _http(self) -> _Http:
        return cast("_Http", self.server)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # http.server's name
        logger.debug("http: " + format, *args)  # noqa: G003
