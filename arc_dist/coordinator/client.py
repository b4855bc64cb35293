"""Talks to a coordinator: over HTTP, or to one in the same process. Both have the same methods.

Every call has a deadline. All messages are idempotent (see `protocol.generations`), so a call whose connection broke is
sent once more. A client remembers two things for its caller: the highest epoch it has heard of, so that an older
coordinator which wakes up is refused; and the order it last got about a generation, so that asking again waits for
another one.
"""

from __future__ import annotations

import http.client
import json
import threading
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arc_dist.coordinator.service import Coordinator
from arc_dist.coordinator.tls import client_context
from arc_dist.errors import ConfigError, CoordinatorUnavailable, Deposed, Fenced, LeftOut

_Json = dict[str, Any]
_CONFLICTS: dict[str, type[Fenced]] = {"left_out": LeftOut, "deposed": Deposed}  # status 409


class Methods:
    """The methods of the coordinator, on top of one way to send a message. Safe to use from several threads."""

    def __init__(self) -> None:
        """`call` sends through `_send`; who sends in another way uses `prepare` and `accept` around it."""
        self._guard = threading.Lock()
        self._epoch = 0
        self._sender: dict[int, str] = {}
        self._following: dict[tuple[int, int], str] = {}

    @property
    def patience_s(self) -> float:
        """How long the coordinator may be out of reach before it counts as lost: one that moves comes back."""
        return 0.0

    def _send(self, method: str, body: _Json, timeout_s: float) -> _Json:
        raise NotImplementedError

    @property
    def epoch(self) -> int:
        """The highest epoch that was heard of; 0 before the first answer."""
        return self._epoch

    def call(self, method: str, body: Mapping[str, Any] | None = None, *, wait_s: float = 0.0) -> _Json:
        """Sends one message; `wait_s` is how long the coordinator itself may take to answer.

        Raises:
            CoordinatorUnavailable: no answer within the deadline, or the coordinator failed.
            Fenced: the coordinator is an old one, or this supervisor was replaced.
            ConfigError: the message was not understood, or the token is wrong.
        """
        message = self.prepare(method, body or {})
        return self.accept(method, message, self._send(method, message, wait_s))

    def prepare(self, method: str, body: Mapping[str, Any]) -> _Json:
        """The message to send: `body` with what the coordinator knows this client by."""
        message = dict(body)
        with self._guard:
            message["epoch"] = self._epoch
            if "rank" in message and message["rank"] in self._sender and method != "join":
                message["sender"] = self._sender[message["rank"]]
        return message

    def accept(self, method: str, message: Mapping[str, Any], answer: _Json) -> _Json:
        """Takes the answer to `message`, and remembers of it what later messages need.

        Raises:
            Fenced: an old coordinator gave it.
        """
        epoch = int(answer.get("epoch", 0))
        with self._guard:
            if epoch < self._epoch:
                raise Fenced(
                    f"{method}: a coordinator of epoch {epoch} answered, but epoch {self._epoch} has begun", epoch=epoch
                )
            self._epoch = epoch
            if method == "join":
                self._sender[message["rank"]] = answer["sender"]
                self._following.clear()
            elif method == "ready":
                self._following.pop((message["rank"], message["generation"]), None)
            elif method == "directive" and answer["kind"] != "wait":
                self._following[message["rank"], message["generation"]] = answer["kind"]
        return answer

    def join(self, rank: int, world_size: int, host: str, pid: int, shm_dir: str) -> _Json:
        """A supervisor is there. Returns ``{"epoch", "generation"}``: the generation to be ready for."""
        body = {"rank": rank, "world_size": world_size, "host": host, "pid": pid, "shm_dir": shm_dir}
        return self.call("join", body)

    def ready(
        self,
        rank: int,
        generation: int,
        store: _Json | None,
        inventory: Sequence[Mapping[str, Any]],
        shm_dir: str,
        host: str,
        peer: Mapping[str, Any] | None = None,
    ) -> _Json:
        """No process of an older generation is left, and `generation` can be started.

        `peer`: where the supervisor listens for others, and the copies that it keeps; see `coordinator.peers`.
        """
        body = {
            "rank": rank,
            "generation": generation,
            "store": store,
            "inventory": list(inventory),
            "shm_dir": shm_dir,
            "host": host,
            "peer": None if peer is None else dict(peer),
        }
        return self.call("ready", body)

    def died(self, rank: int, generation: int, cause: Mapping[str, Any], step: int | None) -> _Json:
        """The rank's process of `generation` is gone; `cause` as in `protocol.budgets.Cause.from_dict`."""
        return self.call("died", {"rank": rank, "generation": generation, "cause": dict(cause), "step": step})

    def finished(self, rank: int, generation: int) -> _Json:
        """The rank's script ended with exit code 0."""
        return self.call("finished", {"rank": rank, "generation": generation})

    def directive(self, rank: int, generation: int, timeout_s: float, after: str | None = None) -> _Json:
        """Long poll for the order about `generation`: ``run``, ``end``, ``stop``, ``done``, or ``wait`` (ask again).

        Args:
            rank: the asking rank.
            generation: the one that it runs, or the one that it wants to start.
            timeout_s: how long to wait for an order.
            after: the kind of order that is followed already, so that only another one is an answer; default: the one
                that this client got last about `generation`.
        """
        with self._guard:
            known = self._following.get((rank, generation), "") if after is None else after
        body = {"rank": rank, "generation": generation, "timeout_s": timeout_s, "after": known}
        return self.call("directive", body, wait_s=timeout_s)

    def shard(
        self,
        rank: int,
        generation: int,
        step: int,
        url: str,
        manifest_part: Mapping[str, Any],
        certified: bool = True,
        tier: int = 0,
        why: str = "",
    ) -> _Json:
        """A rank's shard is durable. The last one's call writes the manifest, so it may take as long as the store.

        `why` says what is wrong with the tiers before `tier`. The status ``moved`` asks to write the shard again, to
        the answer's ``tier``, because some rank could not write to this one.
        """
        body = {
            "rank": rank,
            "generation": generation,
            "step": step,
            "url": url,
            "manifest_part": dict(manifest_part),
            "certified": certified,
            "tier": tier,
            "why": why,
        }
        return self.call("shard", body, wait_s=60.0)

    def give_up_save(self, rank: int, generation: int, step: int, error: str) -> _Json:
        """This rank cannot write its shard anywhere; the others need not wait for it."""
        body = {"rank": rank, "generation": generation, "step": step, "error": error}
        return self.call("give_up_save", body)

    def commit_status(self, step: int, generation: int, timeout_s: float = 0.0, tier: int = 0) -> _Json:
        """Long poll for the outcome of a save, ``{"status", "error", "tier"}``. `tier`: where the shard was written."""
        body = {"step": step, "generation": generation, "timeout_s": timeout_s, "tier": tier}
        return self.call("commit_status", body, wait_s=timeout_s)

    def progress(self, rank: int, generation: int, step: int) -> _Json:
        return self.call("progress", {"rank": rank, "generation": generation, "step": step})

    def report(
        self,
        rank: int,
        generation: int,
        step: int,
        quiet_s: float | None = None,
        held: Sequence[Mapping[str, Any]] = (),
    ) -> _Json:
        """How far the rank's process is, for people: nothing is decided by it."""
        body = {"rank": rank, "generation": generation, "step": step, "quiet_s": quiet_s, "held": list(held)}
        return self.call("report", body)

    def restored(self, rank: int, generation: int, step: int) -> _Json:
        """The ranks of `generation` went on from `step`: older than planned, or found where no plan was."""
        return self.call("restored", {"rank": rank, "generation": generation, "step": step})

    def poison(self, from_step: int, to_step: int, generation: int) -> _Json:
        """States of these steps, saved by `generation` or before, are never restored."""
        return self.call("poison", {"from_step": from_step, "to_step": to_step, "generation": generation})

    def hello_store(self, url: str, committed: Sequence[Mapping[str, Any]] = ()) -> _Json:
        """What a store holds: ``[{"step", "generation", "certified"}]``; replaces what was known of it."""
        return self.call("hello_store", {"url": url, "committed": [dict(entry) for entry in committed]})

    def worlds(self, ranks: Sequence[int]) -> _Json:
        """Numbers of ranks that the training could go on with."""
        return self.call("worlds", {"worlds": [{"ranks": number} for number in ranks]})

    def incident(self, incident: Mapping[str, Any] | None = None, **fields: Any) -> _Json:
        """Appends a line to the run's incident file."""
        return self.call("incident", {**(incident or {}), **fields})

    def preempt(self, rank: int) -> _Json:
        """The rank's host was told to go."""
        return self.call("preempt", {"rank": rank})

    def pulse(self, rank: int, node: int, leaving: bool = False) -> _Json:
        """The rank's supervisor lives, on that node; or ends as it should."""
        return self.call("pulse", {"rank": rank, "node": node, "leaving": leaving})

    def stand_by(self, host: str, pid: int, shm_dir: str, timeout_s: float) -> _Json:
        """Long poll of a spare: ``take`` (with ``rank``), ``done``, ``stop``, or ``wait``: ask again."""
        body = {"host": host, "pid": pid, "shm_dir": shm_dir, "timeout_s": timeout_s}
        return self.call("stand_by", body, wait_s=timeout_s)

    def watched(self, rank: int, generation: int, report: Mapping[str, Any]) -> _Json:
        """Where a rank is, and what it has spent; see `coordinator.hangs` for the answer."""
        return self.call("watched", {"rank": rank, "generation": generation, "report": dict(report)})

    def status(self) -> _Json:
        return self.call("status")


class CoordinatorClient(Methods):
    """A client over HTTP. Each thread that uses it has its own connection, kept alive.

    Args:
        address: ``http://host:port``, or ``https://host:port``.
        token: the job's token; over HTTPS it is sent only to who has shown the right certificate.
        timeout_s: for connecting and for an answer, beyond what the coordinator itself was allowed to wait.
        authority: a PEM file that vouches for the coordinator's certificate; None takes the system's authorities.
    """

    def __init__(self, address: str, token: str, timeout_s: float = 10.0, authority: Path | None = None) -> None:
        super().__init__()
        parts = urllib.parse.urlsplit(address)
        if parts.scheme not in ("http", "https") or parts.hostname is None or _port(parts) is None:
            raise ConfigError(f"the coordinator's address must be http://host:port, or https, got {address!r}")
        if not (token.isascii() and token.isprintable()):
            raise ConfigError("the coordinator's token holds characters that no token has; set ARC_TOKEN anew")
        self.address = address
        self._host = parts.hostname
        self._port = parts.port
        self._context = client_context(authority) if parts.scheme == "https" else None
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._timeout_s = timeout_s
        self._local = threading.local()

    def get(self, path: str) -> _Json:
        """Asks ``GET path`` for a JSON object; see `call` for the errors."""
        return self._exchange("GET", path, None, 0.0)

    def _send(self, method: str, body: _Json, timeout_s: float) -> _Json:
        data = json.dumps(body, separators=(",", ":")).encode()
        return self._exchange("POST", f"/v1/{method}", data, timeout_s)

    def _exchange(self, verb: str, path: str, data: bytes | None, timeout_s: float) -> _Json:
        method = path.removeprefix("/v1/")
        deadline_s = timeout_s + self._timeout_s
        fresh = False
        while True:
            connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
            if connection is None:
                connection, fresh = self._connection(), True
                self._local.connection = connection
            try:
                # A connection attempt must not take as long as a long poll may.
                if connection.sock is None:
                    connection.timeout = self._timeout_s
                    connection.connect()
                assert connection.sock is not None
                connection.sock.settimeout(deadline_s)
                connection.request(verb, path, body=data, headers=self._headers)
                response = connection.getresponse()
                text = response.read()
                break
            except TimeoutError as error:
                self._drop()
                raise self._unavailable(method, f"no answer within {deadline_s:g} s") from error
            except (OSError, http.client.HTTPException) as error:
                self._drop()
                if fresh:
                    raise self._unavailable(method, f"{type(error).__name__}: {error}") from error
                # A kept connection that the server has closed meanwhile: once more, on a new one.
        if response.will_close:
            self._drop()
        return self._understand(method, response.status, text)

    def _connection(self) -> http.client.HTTPConnection:
        if self._context is None:
            return http.client.HTTPConnection(self._host, self._port)
        return http.client.HTTPSConnection(self._host, self._port, context=self._context)

    def _understand(self, method: str, status: int, text: bytes) -> _Json:
        try:
            answer: object = json.loads(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise self._unavailable(method, f"HTTP {status} without a JSON object: something else listens there")
        fields: _Json = {str(key): value for key, value in answer.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        if status == 200:
            return fields
        message = f"{method}: {fields.get('message', f'HTTP {status}')}"
        if status == 409:
            raise _CONFLICTS.get(str(fields.get("error")), Fenced)(message)
        if status in (400, 401, 404, 405, 411, 413):
            raise ConfigError(message)
        raise self._unavailable(method, str(fields.get("message", f"HTTP {status}")))

    def _unavailable(self, method: str, why: str) -> CoordinatorUnavailable:
        return CoordinatorUnavailable(
            f"{method}: the coordinator at {self.address} cannot be reached: {why}", address=self.address
        )

    def _drop(self) -> None:
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None

    def close(self) -> None:
        """Closes the calling thread's connection; other threads' close with them."""
        self._drop()


def _port(parts: urllib.parse.SplitResult) -> int | None:
    try:
        return parts.port
    except ValueError:  # no number, or none that a port can have
        return None


class LocalClient(Methods):
    """The same methods for a coordinator in this process."""

    def __init__(self, coordinator: Coordinator) -> None:
        super().__init__()
        self._coordinator = coordinator

    def _send(self, method: str, body: _Json, timeout_s: float) -> _Json:
        return self._coordinator.call(method, body)

    def close(self) -> None:
        """Nothing is held open."""
