"""An S3 server's proxy that holds, refuses, drops or loses requests, each addressed by its operation and its number."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import http.server
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterator

LIMIT_S = 120.0  # of every wait: what never comes must fail a test, not hang it


@dataclasses.dataclass(frozen=True)
class Refuse:
    """Answer with an error and do nothing; without a code there is no body, as load balancers answer."""

    status: int
    code: str = ""


@dataclasses.dataclass(frozen=True)
class Drop:
    """Close the connection; with `carried_out` after the server has done what was asked."""

    carried_out: bool = False


@dataclasses.dataclass(frozen=True)
class Request:
    """One request: the operation, the key, the part (0: none), and how often it has come already (0 at first)."""

    operation: str
    key: str
    part: int
    repeat: int


Rule = Callable[[Request], Refuse | Drop | None]


class Proxy:
    """What it saw, and what it is to do.

    Attributes:
        rule: asked about each request before anything of its body is read, in the request's own thread; it may wait.
        seen: all requests, in the order in which they came.
        most_parts: the highest number of parts that were in flight at once.
        strips_condition_of_completion: the server joins parts without a look at If-None-Match, as radosgw 16 does.
    """

    def __init__(self) -> None:
        self.url = ""
        self._parts = 0
        self._changed = threading.Condition()
        self.reset()

    def reset(self) -> None:
        """Forwards everything, and has seen nothing."""
        self.rule: Rule = lambda request: None
        self.seen: list[Request] = []
        self.most_parts = 0
        self.strips_condition_of_completion = False

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Waits for something that a request changes; False when it does not come."""
        with self._changed:
            return self._changed.wait_for(condition, LIMIT_S)

    def tell(self, change: Callable[[], None]) -> None:
        """Makes a change for which another request may wait."""
        with self._changed:
            change()
            self._changed.notify_all()

    @contextlib.contextmanager
    def entered(self, operation: str, key: str, part: int) -> Iterator[Request]:
        with self._changed:
            repeat = sum((r.operation, r.key, r.part) == (operation, key, part) for r in self.seen)
            request = Request(operation, key, part, repeat)
            self.seen.append(request)
            self._parts += part > 0
            self.most_parts = max(self.most_parts, self._parts)
            self._changed.notify_all()
        try:
            yield request
        finally:
            with self._changed:
                self._parts -= part > 0
                self._changed.notify_all()


def _operation(method: str, path: str) -> tuple[str, str, int]:
    split = urllib.parse.urlsplit(path)
    query = urllib.parse.parse_qs(split.query, keep_blank_values=True)
    key = urllib.parse.unquote(split.path).lstrip("/").partition("/")[2]
    if method == "PUT" and "partNumber" in query:
        return "part", key, int(query["partNumber"][0])
    if method == "POST" and "uploads" in query:
        return "begin", key, 0
    if "uploadId" in query:
        return {"POST": "complete", "DELETE": "abort"}.get(method, method), key, 0
    return method.lower(), key, 0


@contextlib.contextmanager
def s3_proxy(server: str) -> Iterator[Proxy]:
    """A proxy before the server, while the block runs."""
    target = urllib.parse.urlsplit(server)
    proxy = Proxy()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_expect_100(self) -> bool:
            return True  # said behind the rule

        def forward(self) -> None:
            with proxy.entered(*_operation(self.command, self.path)) as request:
                action = proxy.rule(request)
                if self.headers.get("Expect", "").lower() == "100-continue":
                    self.send_response_only(100)
                    self.end_headers()
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if isinstance(action, Refuse):
                    error = f"<Error><Code>{action.code}</Code><Message>no</Message></Error>" if action.code else ""
                    self.answer(action.status, {}, error.encode())
                    return
                answer = None if action == Drop() else self.ask(request, body)
                if answer is None or isinstance(action, Drop):
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.answer(*answer)

        def ask(self, request: Request, body: bytes) -> tuple[int, dict[str, str], bytes]:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            if proxy.strips_condition_of_completion and request.operation == "complete":
                headers = {name: value for name, value in headers.items() if name.lower() != "if-none-match"}
            with contextlib.closing(http.client.HTTPConnection(str(target.hostname), target.port)) as upstream:
                upstream.request(self.command, self.path, body, headers)
                answer = upstream.getresponse()
                return answer.status, dict(answer.getheaders()), answer.read()

        def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward  # noqa: N815

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that went away is no error of the proxy."""

    with Server(("127.0.0.1", 0), Handler) as listening:
        proxy.url = f"http://127.0.0.1:{listening.server_address[1]}"
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            listening.shutdown()
            thread.join()
