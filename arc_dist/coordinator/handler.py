"""One connection to the server: reads requests, checks who asks, and answers. `api` lists what there is.

===========  ======================================================
200          the answer
400          `ConfigError`: no such method, wrong fields, no JSON
401          no token, or a wrong one
404, 405     another path or verb
409          `Fenced`
411, 413     no length, or more bytes than are taken
429          too many requests
500          a bug of ours; the log has it
===========  ======================================================
"""

from __future__ import annotations

import base64
import functools
import hashlib
import hmac
import importlib.resources
import io
import json
import logging
import math
import re
import socket
import ssl
import urllib.parse
from http.server import BaseHTTPRequestHandler
from typing import Any, Protocol, cast

from arc_dist.coordinator import api, metrics
from arc_dist.coordinator.limits import Bucket, BucketPerAddress, Limits, TimedStream
from arc_dist.coordinator.service import Coordinator
from arc_dist.coordinator.wire import MAX_INTEGER
from arc_dist.errors import ArcError, ConfigError, Deposed, Fenced, LeftOut

logger = logging.getLogger("arc_dist.coordinator")

_JSON = "application/json"
_HTML = "text/html; charset=utf-8"
_CONFLICTS: dict[type[Fenced], str] = {LeftOut: "left_out", Deposed: "deposed"}
_ROUTES = {(route.verb, route.path): route for route in api.ROUTES}
_MAX_INCIDENTS = 1000


class HostPort(Protocol):
    """What a handler asks of its server."""

    coordinator: Coordinator
    token: bytes
    limits: Limits
    reads: Bucket
    reports: Bucket
    refusals: BucketPerAddress

    def busy(self, change: int) -> None: ...


class Refused(Exception):
    """A request that is answered with an error status."""

    def __init__(self, status: int, kind: str, message: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message
        self.retry_after_s = retry_after_s


class Handler(BaseHTTPRequestHandler):
    """See the module's text."""

    protocol_version = "HTTP/1.1"
    server_version = "arc-dist"
    sys_version = ""
    disable_nagle_algorithm = True

    def setup(self) -> None:
        limits = self._host.limits
        if isinstance(self.request, ssl.SSLSocket):
            # Here and not where connections are accepted: a caller who says nothing holds up his own thread only.
            self.request.settimeout(limits.stranger_s)
            self.request.do_handshake()
        super().setup()
        self._stream = TimedStream(cast("socket.socket", self.connection), limits)
        self.rfile.close()
        self.rfile = io.BufferedReader(self._stream, 65_536)
        self.wfile = io.BufferedWriter(
            cast("io.RawIOBase", self._stream), 65_536
        )  # header and body leave in one packet
        self._is_known = False

    def handle_one_request(self) -> None:
        self._stream.await_request(is_known=self._is_known)
        self._stream.begin_answer()  # of the errors that http.server sends by itself
        super().handle_one_request()

    def do_POST(self) -> None:
        # What ranks ask is waited for at the job's end; a reader who takes no answer is not.
        self._host.busy(1)
        try:
            self._handle()
        finally:
            self._host.busy(-1)

    def _handle(self) -> None:
        try:
            self._serve()
        except Refused as refused:
            self._refuse(refused)
        except Fenced as error:
            self._refuse(Refused(409, _CONFLICTS.get(type(error), "fenced"), error.message))
        except ConfigError as error:
            self._refuse(Refused(400, "config", error.message))
        except (TimeoutError, ConnectionError):
            raise  # the caller's side of the connection; there is nobody to answer
        except (ArcError, OSError) as error:
            self._refuse(Refused(500, "internal", str(error)))
        except Exception as error:
            logger.exception("%s failed", self.path)
            self._refuse(Refused(500, "internal", f"{type(error).__name__}: {error}"))

    do_GET = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_HEAD = _handle  # noqa: N815  # http.server's names

    # ---- what is asked

    def _serve(self) -> None:
        verb = self.command or ""
        path, _, query = self.path.partition("?")
        route = _ROUTES.get((verb, path))
        if route is not None and not route.needs_token:
            self._serve_public(path)
            return
        self._authenticate()
        self._slow_down(self._host.reports if verb == "POST" else self._host.reads)
        if verb == "POST":
            self._answer_json(200, self._report(path))
        elif route is None:
            known = any(route.path == path for route in api.ROUTES)
            raise Refused(405 if known else 404, "config", f"{verb} {path[:200]}: see /openapi.json")
        else:
            self._read(path, urllib.parse.parse_qs(query, max_num_fields=20))

    def _serve_public(self, path: str) -> None:
        if path == "/healthz":
            self._answer_json(200, {"ok": True})
        else:
            body, policy = page()
            self._answer(200, _HTML, body, {"Content-Security-Policy": policy})

    def _read(self, path: str, query: dict[str, list[str]]) -> None:
        coordinator = self._host.coordinator
        if path == "/metrics":
            text = metrics.render(*coordinator.facts())
            self._answer(200, metrics.CONTENT_TYPE, text.encode("utf-8", "replace"))
        elif path == "/openapi.json":
            self._answer_json(200, api.openapi())
        elif path == "/v1/status":
            self._answer_json(200, coordinator.view())
        elif path == "/v1/history":
            self._answer_json(200, coordinator.history())
        else:
            limit = min(_integer(query, "limit", 100), _MAX_INCIDENTS)
            self._answer_json(200, coordinator.incidents(_integer(query, "after", 0), limit))

    def _report(self, path: str) -> dict[str, Any]:
        if not path.startswith(api.PREFIX):
            raise Refused(404, "config", f"there is nothing at {path[:200]}; this coordinator speaks {api.PREFIX}")
        text = self._read_body()
        try:
            body: object = json.loads(text) if text else {}
        except (ValueError, RecursionError) as error:
            raise Refused(400, "config", f"the body is not JSON: {error}") from None
        if not isinstance(body, dict):
            raise Refused(400, "config", "the body is not a JSON object")
        return self._host.coordinator.call(path[len(api.PREFIX) :], cast("dict[str, Any]", body))

    def _read_body(self) -> bytes:
        length_text = self.headers.get("Content-Length", "")
        if not (length_text.isascii() and length_text.isdigit()):
            raise Refused(411, "config", "Content-Length is missing")
        most = self._host.limits.request_bytes
        # The text before the number: int() of a million digits takes its time.
        if len(length_text) > 20 or int(length_text) > most:
            raise Refused(413, "config", f"the request has {length_text[:30]} bytes, at most {most} are taken")
        return self.rfile.read(int(length_text))

    # ---- who asks, and how often

    def _authenticate(self) -> None:
        shown = self.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if hmac.compare_digest(shown, b"Bearer " + self._host.token):
            self._is_known = True
            return
        wait_s = self._host.refusals.take(str(self.client_address[0]))
        if wait_s:
            raise Refused(429, "busy", "too many requests without the token", retry_after_s=wait_s)
        raise Refused(401, "config", "the token is missing or wrong; ARC_TOKEN of this job is needed")

    def _slow_down(self, bucket: Bucket) -> None:
        wait_s = bucket.take()
        if wait_s:
            raise Refused(429, "busy", "too many requests", retry_after_s=wait_s)

    # ---- the answer

    def _refuse(self, refused: Refused) -> None:
        # What is left of the request was not read, so the connection cannot be used again.
        self.close_connection = self.close_connection or refused.status in (401, 404, 405, 411, 413, 429)
        headers = {"Retry-After": str(math.ceil(refused.retry_after_s))} if refused.retry_after_s else {}
        self._answer_json(refused.status, {"error": refused.kind, "message": refused.message}, headers)

    def _answer_json(self, status: int, answer: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self._answer(status, _JSON, json.dumps(answer, separators=(",", ":"), default=str).encode(), headers)

    def _answer(self, status: int, media: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        self._stream.begin_answer()
        self.send_response_only(status)
        fixed = {
            "Content-Type": media,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        for name, value in (fixed | (headers or {})).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server refuses by itself: a broken request line or header, a verb that nobody knows."""
        self.close_connection = True
        self._answer_json(int(code), {"error": "config", "message": message or "the request is not understood"})

    @property
    def _host(self) -> HostPort:
        return cast("HostPort", self.server)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # http.server's name
        logger.debug("http: " + format, *args)  # noqa: G003


def _integer(query: dict[str, list[str]], name: str, default: int) -> int:
    text = query.get(name, [str(default)])[-1]
    if not (text.isascii() and text.isdigit() and len(text) < 20) or int(text) > MAX_INTEGER:
        raise Refused(400, "config", f"{name} must be a whole number, got {text[:40]!r}")
    return int(text)


@functools.cache
def page() -> tuple[bytes, str]:
    """The page and the policy that lets a browser run its own script and style, and nothing from elsewhere."""
    text = importlib.resources.files("arc_dist.coordinator").joinpath("page.html").read_text(encoding="utf-8")
    hashes = {
        kind: " ".join(
            f"'sha256-{_sha256(inner)}'" for inner in re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        )
        for kind in ("script", "style")
    }
    policy = (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), policy


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
