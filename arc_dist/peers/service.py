"""The part of a supervisor that sends, keeps, gives back and fetches copies of snapshots."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from arc_dist.errors import ArcError, StoreCorrupt
from arc_dist.peers.channel import PeerUnavailable
from arc_dist.peers.fetch import fetch
from arc_dist.peers.sender import CopySender, Partner
from arc_dist.peers.server import Job, PeerServer
from arc_dist.peers.shelf import Shelf
from arc_dist.snapshot import layout
from arc_dist.snapshot.record import recorded_steps
from arc_dist.telemetry.log import logger

_ATTEMPTS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeerSettings:
    """How copies are made.

    Attributes:
        copies: of each snapshot; `protocol.partners.AUTO` for one where there are several failure domains.
        distance: of the first copy, in failure domains.
        domain: the failure domain of this rank.
        max_bytes_per_s: bound on the rate at which this rank's snapshots are sent; None for none.
    """

    copies: int
    distance: int
    domain: str
    max_bytes_per_s: float | None


@dataclasses.dataclass
class Fetching:
    """A fetch in a thread of its own. When `is_over`, `slot` says where the snapshot is, or `error` why it is not."""

    holder: int
    is_over: bool = False
    is_cancelled: bool = False
    slot: int | None = None
    error: str = ""
    seconds: float = 0.0
    sock: socket.socket | None = None

    def connected(self, sock: socket.socket) -> None:
        """The connection that `cancel` is to break."""
        self.sock = sock
        if self.is_cancelled:
            self.cancel()

    def cancel(self) -> None:
        """Makes it be over soon."""
        self.is_cancelled = True
        if self.sock is not None:
            with contextlib.suppress(OSError):  # it is over already
                self.sock.shutdown(socket.SHUT_RDWR)


class Peers:
    """See the module's text. Constructing it listens and starts threads.

    Args:
        job: of this supervisor.
        settings: see there.
        shm_dir: of this rank.
        host: under which other supervisors reach this one.
        listen: the interface to listen on.
        record: takes an incident; must not raise.
        timeout_s: for each wait for another supervisor.

    Attributes:
        directory: this rank's.
        shelf: the copies that are kept.
        sender: of this rank's snapshots.
    """

    def __init__(
        self,
        job: Job,
        settings: PeerSettings,
        shm_dir: Path,
        *,
        host: str,
        listen: str,
        record: Callable[..., None],
        timeout_s: float = 30.0,
    ) -> None:
        self._job = job
        self._settings = settings
        self.directory = shm_dir
        self._host = host
        self._timeout_s = timeout_s
        self._generation = 0
        self._distrusted: set[int] = set()
        self._owners: tuple[int, ...] | None = None
        self.shelf = Shelf(shm_dir)
        self._server = PeerServer(job, self.shelf, listen, generation=lambda: self._generation, timeout_s=timeout_s)
        self.sender = CopySender(
            job,
            shm_dir,
            max_bytes_per_s=settings.max_bytes_per_s,
            replicated_too=settings.copies > 0,
            record=record,
            timeout_s=timeout_s,
        )

    def close(self) -> None:
        """Ends all of it."""
        self.sender.close()
        self._server.close()

    def introduction(self) -> dict[str, Any]:
        """What the coordinator is told with each `ready`: where this is, what is wanted, and what is kept."""
        self.sender.pause()
        self._tidy()
        copies = [{"owner": kept.owner, **dataclasses.asdict(kept.info)} for kept in self.shelf.kept()]
        return {
            "host": self._host,
            "port": self._server.port,
            "domain": self._settings.domain,
            "copies": self._settings.copies,
            "distance": self._settings.distance,
            "held": copies,
            "distrusted": sorted(self._distrusted),
            "recorded": recorded_steps(self.directory),
        }

    def begin(self, generation: int, answer: Mapping[str, Any]) -> None:
        """A generation runs, and this rank has its state: from now on copies are sent as the coordinator says."""
        self._generation = generation
        self._owners = tuple(int(owner) for owner in answer.get("owners", ()))
        self.sender.begin(generation, [Partner(**partner) for partner in answer.get("partners", ())])

    def start_fetch(self, plan: Mapping[str, Any], holder: Mapping[str, Any] | None) -> Fetching | None:
        """Begins to fetch what a plan says that another supervisor keeps; None when there is nothing to fetch.

        Args:
            plan: of this generation.
            holder: where the holder listens, as the coordinator knows it.
        """
        source = plan.get("sources", {}).get(str(self._job.rank), {})
        if source.get("holder") is None:
            return None
        fetching = Fetching(holder=int(source["holder"]))
        if holder is None:
            self._distrusted.add(fetching.holder)
            fetching.error, fetching.is_over = "nobody knows where it listens", True
            return fetching
        threading.Thread(
            target=self._fetch, args=(fetching, Partner(**holder), source, int(plan["step"])), daemon=True
        ).start()
        return fetching

    def _fetch(self, fetching: Fetching, holder: Partner, source: Mapping[str, Any], step: int) -> None:
        for attempt in range(_ATTEMPTS):
            if fetching.is_cancelled:
                break
            try:
                fetching.slot = fetch(
                    self._job, self.directory, holder, source, step, self._timeout_s, fetching.connected
                )
                break
            except (ArcError, OSError, MemoryError) as error:
                fetching.error = f"{type(error).__name__}: {error}"
                if not isinstance(error, (PeerUnavailable, StoreCorrupt)):
                    break
                logger.debug("attempt %d to fetch step %d came to nothing: %s", attempt + 1, step, error)
        if fetching.slot is None and not fetching.is_cancelled:
            self._distrusted.add(fetching.holder)
        fetching.is_over = True

    def _tidy(self) -> None:
        """Removes copies that nobody will ask for, once a generation has trusted snapshots of its own.

        Before that any copy may still be what another rank is fetching.
        """
        if self._owners is None:
            return
        own = [info for info in layout.inspect(self.directory) if info.certified and not info.parting]
        if any(info.generation >= self._generation for info in own):
            self.shelf.retain(self._owners)
