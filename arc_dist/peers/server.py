"""Takes in copies of other ranks' snapshots, and gives them back: the side of a supervisor that is asked.

=======  ==========================================  ===============================================================
request  fields                                      answer
=======  ==========================================  ===============================================================
put      owner, generation, header, base_digest      ``{"have", "wants_base"}``; then the bytes come, then their
                                                     digests, and a second answer when the copy is whole
get      owner, step, generation                     ``{"header", facts}``, then the bytes
drop     owner, above                                ``{"dropped"}``
=======  ==========================================  ===============================================================

What it is about is said by `goods`: copies or notes of the owner's snapshots; or, for `get` without it, the snapshots
of this supervisor's own rank, which can stand in for a replica's.

Every request also carries the job (`lineage`) and the number of its ranks; those of another are refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import socketserver
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from arc_dist.errors import ArcError
from arc_dist.peers.channel import Channel, PeerUnavailable
from arc_dist.peers.image import Facts, Image, header_of
from arc_dist.peers.shelf import Goods, Kept, Shelf
from arc_dist.snapshot import layout
from arc_dist.snapshot.layout import SlotDamaged

_logger = logging.getLogger(__name__)

_MAX_CONNECTIONS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What a supervisor must know to be talked to.

    Attributes:
        token: of the job.
        lineage: names the job through all its restarts.
        rank: of this supervisor.
        world_size: number of ranks.
    """

    token: str = dataclasses.field(repr=False)
    lineage: str
    rank: int
    world_size: int


class PeerServer:
    """Listens until it is closed.

    Args:
        job: who may ask.
        directory: of this rank.
        shelves: what is kept for others.
        host: the interface to listen on.
        generation: the one that this supervisor runs; copies sent by an older one are refused.
        timeout_s: for each wait.
    """

    def __init__(
        self,
        job: Job,
        directory: Path,
        shelves: Mapping[Goods, Shelf],
        host: str,
        *,
        generation: Callable[[], int],
        timeout_s: float = 30.0,
    ) -> None:
        self._job = job
        self._directory = directory
        self._shelves = shelves
        self._generation = generation
        self._timeout_s = timeout_s
        self._handlers = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        self._server = _Listener((host, 0), self._serve)
        self.port = int(self._server.server_address[1])
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, name="arc-peers", daemon=True
        ).start()

    def close(self) -> None:
        """Stops listening. What is on its way ends with the process."""
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, sock: socket.socket, address: Any) -> None:
        if not self._handlers.acquire(blocking=False):
            _logger.warning("a connection from %s was closed: %d are open", address, _MAX_CONNECTIONS)
            return
        try:
            channel = Channel(
                sock, self._job.token, serves=True, timeout_s=self._timeout_s, peer=f"the supervisor at {address[0]}"
            )
            self._answer(channel, channel.receive())
        except PeerUnavailable as error:
            _logger.debug("a request of a peer came to nothing: %s", error)
        finally:
            self._handlers.release()

    def _answer(self, channel: Channel, request: Mapping[str, Any]) -> None:
        try:
            self._check(request)
            match request.get("do"):
                case "put":
                    self._put(channel, request)
                case "get":
                    self._get(channel, request)
                case "drop":
                    shelf = self._shelves[Goods(request["goods"])]
                    dropped = shelf.drop_above(int(request["owner"]), int(request["above"]))
                    channel.send({"dropped": dropped})
                case other:
                    raise PeerUnavailable(f"there is no request {other!r}")
        except (ArcError, OSError, MemoryError, ValueError, KeyError, TypeError) as error:
            if not isinstance(error, PeerUnavailable):
                _logger.warning("a copy could not be kept or given: %s: %s", type(error).__name__, error)
            with contextlib.suppress(PeerUnavailable):
                channel.send({"error": f"{type(error).__name__}: {error}"[:2000]})

    def _check(self, request: Mapping[str, Any]) -> None:
        job = (request.get("lineage"), request.get("world_size"))
        if job != (self._job.lineage, self._job.world_size):
            raise PeerUnavailable(f"job {job[0]} of {job[1]} ranks is not the one of this supervisor")
        owner = request.get("owner")
        if type(owner) is not int or not 0 <= owner < self._job.world_size:
            raise PeerUnavailable(f"there is no rank {owner!r}")

    def _put(self, channel: Channel, request: Mapping[str, Any]) -> None:
        owner = int(request["owner"])
        if int(request["generation"]) < self._generation():
            raise PeerUnavailable(
                f"fenced: a copy sent in generation {request['generation']}, this one runs {self._generation()}"
            )
        header = header_of(request["header"])
        shelf = self._shelves[Goods(request["goods"])]
        if shelf.has(owner, header):
            channel.send({"have": True, "wants_base": False})
            return
        with shelf.receiving(owner, header, str(request["base_digest"])) as draft:
            channel.send({"have": False, "wants_base": len(draft.parts) > 1})
            channel.receive_bytes(draft.parts)
            facts = Facts(**channel.receive()["facts"])
            draft.seal(facts)
        channel.send({"kept": True})

    def _get(self, channel: Channel, request: Mapping[str, Any]) -> None:
        owner, step, generation = int(request["owner"]), int(request["step"]), int(request["generation"])
        if request.get("goods") is not None:
            kept = self._shelves[Goods(request["goods"])].find(owner, step, generation)
        else:
            kept = self._own(owner, step, generation)
        if kept is None:
            raise PeerUnavailable(f"no copy of step {step} (generation {generation}) of rank {owner} is kept here")
        image = Image.open(kept.directory, kept.info.slot)
        facts = Facts.read(kept.directory, kept.info.slot, image.header) or image.facts()
        channel.send({"header": dataclasses.asdict(image.header), "facts": dataclasses.asdict(facts)})
        channel.send_bytes(image.parts(with_base=True), lambda block: None)
        if not image.is_unchanged():
            raise SlotDamaged(f"the copy of step {step} was overwritten while it was sent")
        channel.send({"whole": True})

    def _own(self, owner: int, step: int, generation: int) -> Kept | None:
        """A trusted snapshot of this supervisor's own rank."""
        held = layout.inspect(self._directory) if owner == self._job.rank else []
        held = [info for info in held if (info.step, info.generation) == (step, generation)]
        trusted = [info for info in held if info.certified or info.parting]
        newest = max(trusted, key=lambda info: info.sequence, default=None)
        return newest and Kept(owner=owner, directory=self._directory, info=newest)


class _Listener(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], serve: Callable[[socket.socket, Any], None]) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self._serve = serve
        super().__init__(address, socketserver.BaseRequestHandler)

    def finish_request(self, request: Any, client_address: Any) -> None:
        try:
            self._serve(request, client_address)
        except Exception:  # a thread of its own: nobody else would say it
            _logger.exception("a request of the peer at %s failed", client_address)
