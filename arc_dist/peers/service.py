"""The part of a supervisor that sends, keeps, gives back and fetches copies of snapshots."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from arc_dist.errors import ArcError, StoreCorrupt
from arc_dist.peers.channel import PeerUnavailable
from arc_dist.peers.fetch import Order, arrived, fetch, give_back, orders
from arc_dist.peers.sender import CopySender, Partner
from arc_dist.peers.server import Job, PeerServer
from arc_dist.peers.shelf import Goods, Shelf
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
    """A fetch in a thread of its own. When `is_over`, `source` says where the state is, or `error` why it is not.

    Attributes:
        holder: the rank whose supervisor is asked; of several the one whose answer is missing, else the first.
        what: is fetched, in words.
    """

    holder: int
    what: str = ""
    is_over: bool = False
    is_cancelled: bool = False
    source: dict[str, Any] | None = None
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
        self._owners: dict[Goods, tuple[int, ...]] | None = None
        self._shelves = {goods: Shelf(shm_dir, goods) for goods in Goods}
        self._server = PeerServer(
            job, shm_dir, self._shelves, listen, generation=lambda: self._generation, timeout_s=timeout_s
        )
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
        kept = {
            goods: [{"owner": kept.owner, **dataclasses.asdict(kept.info)} for kept in shelf.kept()]
            for goods, shelf in self._shelves.items()
        }
        recorded, replica_key = recorded_steps(self.directory)
        return {
            "host": self._host,
            "port": self._server.port,
            "domain": self._settings.domain,
            "copies": self._settings.copies,
            "distance": self._settings.distance,
            "held": kept[Goods.COPY],
            "notes": kept[Goods.NOTE],
            "distrusted": sorted(self._distrusted),
            "recorded": recorded,
            "replica_key": replica_key,
        }

    def begin(self, generation: int, answer: Mapping[str, Any]) -> None:
        """A generation runs, and this rank has its state: from now on copies are sent as the coordinator says."""
        self._generation = generation
        self._owners = {
            goods: tuple(int(owner) for owner in answer.get(name, ()))
            for goods, name in ((Goods.COPY, "owners"), (Goods.NOTE, "noted"))
        }
        partners, keepers = ([Partner(**each) for each in answer.get(name, ())] for name in ("partners", "keepers"))
        self.sender.begin(generation, partners, keepers)

    def start_fetch(self, plan: Mapping[str, Any], holders: Sequence[Mapping[str, Any]]) -> Fetching | None:
        """Begins to fetch what a plan says that other supervisors have; None when there is nothing to fetch.

        Args:
            plan: of this generation.
            holders: where they listen, as the coordinator knows it.
        """
        give_back(self.directory)
        rank = self._job.rank
        source = plan.get("sources", {}).get(str(rank), {})
        named = [int(source[name]) for name in ("holder", "noted_by") if source.get(name) is not None]
        if not named:
            return None
        fetching = Fetching(holder=named[0])
        try:
            wanted = orders(rank, self.directory, [Partner(**each) for each in holders], source, int(plan["step"]))
        except PeerUnavailable as error:
            self._distrusted.update(set(named) - {int(each["rank"]) for each in holders})
            fetching.error, fetching.is_over = str(error), True
            return fetching
        fetching.what = " and ".join(map(str, wanted))
        threading.Thread(target=self._fetch, args=(fetching, wanted, source), daemon=True).start()
        return fetching

    def _fetch(self, fetching: Fetching, wanted: Sequence[Order], source: Mapping[str, Any]) -> None:
        slots: dict[Goods | None, tuple[Path, int]] = {}
        for order in wanted:
            fetching.holder = order.holder.rank
            slot = self._fetch_one(fetching, order)
            if slot is None:
                break
            slots[order.goods] = (order.directory, slot)
        else:
            fetching.holder = wanted[0].holder.rank
            fetching.source = arrived(source, slots)
        if fetching.source is None and not fetching.is_cancelled:
            self._distrusted.add(fetching.holder)
        fetching.is_over = True

    def _fetch_one(self, fetching: Fetching, order: Order) -> int | None:
        for attempt in range(_ATTEMPTS):
            if fetching.is_cancelled:
                break
            try:
                return fetch(self._job, order, self._timeout_s, fetching.connected)
            except (ArcError, OSError, MemoryError) as error:
                fetching.error = f"{type(error).__name__}: {error}"
                if not isinstance(error, (PeerUnavailable, StoreCorrupt)):
                    break
                logger.debug("attempt %d to fetch %s came to nothing: %s", attempt + 1, order, error)
        return None

    def _tidy(self) -> None:
        """Removes copies that nobody will ask for, once a generation has trusted snapshots of its own.

        Before that any copy may still be what another rank is fetching.
        """
        if self._owners is None:
            return
        own = [info for info in layout.inspect(self.directory) if info.certified and not info.parting]
        if any(info.generation >= self._generation for info in own):
            for goods, owners in self._owners.items():
                self._shelves[goods].retain(owners)
