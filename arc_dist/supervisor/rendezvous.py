"""How supervisors find each other, and the store that each generation of trainers meets in.

Under torchrun the agent serves a TCPStore at MASTER_ADDR:MASTER_PORT (TORCHELASTIC_USE_AGENT_STORE=True). Without
such an agent, but with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment (mpirun, an Indexed Job), the
supervisor of rank 0 serves one there. With a world of one no store is needed. In that store rank 0 announces the
coordinator's address and token.

The trainers never use that store: keys of an earlier generation would still be in it (torchrun's own restart fails on
them). Each generation gets a fresh TCPStore in rank 0's supervisor, where no trainer's death can take it away.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable

from torch.distributed import PrefixStore, Store, TCPStore

from arc_dist.errors import ConfigError, InfrastructureError
from arc_dist.supervisor.membership import Membership
from arc_dist.telemetry.log import logger

_POLL_S = 0.02
_STORE_TIMEOUT_S = 300.0
_LEAVE_LIMIT_S = 2.0
_BRIEF_LOOK_S = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoordinatorAddress:
    """What rank 0 announces: where the coordinator is, and the token that it wants to see.

    Attributes:
        url: its address.
        token: what it wants to see.
        job_id: the job's name.
        run_dir: where its journal is.
        epoch: of the coordinator when it can move, as in Ray; 0 for one in rank 0's supervisor.
    """

    url: str
    token: str = dataclasses.field(repr=False)
    job_id: str
    run_dir: str
    epoch: int = 0

    @property
    def can_move(self) -> bool:
        """Whether another address may take the place of this one while rank 0's supervisor lives."""
        return self.epoch > 0


class Meeting:
    """The launcher's store, as far as supervisors use it: one key for each world that they form.

    The key does not carry the restart count, because that differs between agents when one joined late. A follower may
    therefore read what the rank 0 of an earlier attempt announced; it cannot connect there, and asks again.
    """

    def __init__(self, membership: Membership) -> None:
        if membership.store_host is None:
            raise ConfigError("a world of one without MASTER_ADDR has no store to meet in")
        serves = membership.rank == 0 and not membership.has_agent_store
        try:
            self._tcp_store = TCPStore(
                membership.store_host,
                membership.store_port,
                is_master=serves,
                wait_for_workers=False,
                timeout=datetime.timedelta(seconds=_STORE_TIMEOUT_S),
            )
        except RuntimeError as error:  # torch's DistNetworkError and DistStoreError
            verb = "served" if serves else "reached"
            raise InfrastructureError(
                f"rank {membership.rank}: the launcher's store at {membership.store_host}:{membership.store_port} "
                f"cannot be {verb}: {error}. Check MASTER_ADDR and MASTER_PORT.",
                rank=membership.rank,
            ) from error
        self._brief_look: threading.Thread | None = None
        self._store: Store = PrefixStore(f"arc/{membership.run_id or 'none'}", self._tcp_store)

    def announce(self, address: CoordinatorAddress, *, shrinks: int = 0) -> None:
        """Rank 0 says where the coordinator is, of the world that has become smaller so many times."""
        self._store.set(_key(shrinks), json.dumps(dataclasses.asdict(address)))

    def look_up(self, *, timeout_s: float, shrinks: int = 0) -> CoordinatorAddress | None:
        """The newest announcement, or None when there is none within `timeout_s`. Blocks in short steps only."""
        deadline = time.monotonic() + timeout_s
        while True:
            if self._store.check([_key(shrinks)]):
                return CoordinatorAddress(**json.loads(self._store.get(_key(shrinks))))
            if time.monotonic() >= deadline:
                return None
            time.sleep(_POLL_S)

    def look_up_briefly(self, *, shrinks: int = 0) -> CoordinatorAddress | None:
        """As `look_up`, for who must not wait for a store on a lost host; None also while an earlier look waits."""
        if self._brief_look is not None and self._brief_look.is_alive():
            return None
        found: list[CoordinatorAddress | None] = []

        def look() -> None:
            try:
                found.append(self.look_up(timeout_s=0.0, shrinks=shrinks))
            except RuntimeError as error:
                logger.debug("the launcher's store was not asked: %s", error)

        self._brief_look = _within(_BRIEF_LOOK_S, look)
        return found[0] if found else None

    def leave(self, token: str, membership: Membership) -> None:
        """Another rank than 0 says that it needs the coordinator no more. Best effort."""

        def say() -> None:
            try:
                self._store.add(self._left_key(token), 1)
            except RuntimeError as error:  # the launcher's store is gone, so everything is ending
                logger.debug("rank %d left without saying so: %s", membership.rank, error)

        _within(_LEAVE_LIMIT_S, say)

    def await_others(
        self, token: str, num_others: int, num_connections: Callable[[], int], *, timeout_s: float
    ) -> None:
        """Rank 0, which hosts the coordinator, waits until nobody needs it.

        Supervisors that were killed never say so, but their connections are closed; hosts that were lost do neither,
        and those that are not known to be lost are waited for `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s

        def wait() -> None:
            try:
                while num_connections() > 0 and time.monotonic() < deadline:
                    if self._store.add(self._left_key(token), 0) >= num_others:
                        return
                    time.sleep(_POLL_S)
            except RuntimeError as error:
                logger.debug("rank 0 did not wait for the others: %s", error)

        _within(timeout_s, wait)

    @staticmethod
    def _left_key(token: str) -> str:
        return f"left/{hashlib.sha256(token.encode()).hexdigest()[:16]}"


def _within(timeout_s: float, act: Callable[[], None]) -> threading.Thread:
    """Acts, but goes on after `timeout_s`: the store may be on a lost host, for which its client waits for minutes."""
    thread = threading.Thread(target=act, name="arc-meeting", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return thread


def _key(shrinks: int) -> str:
    return f"coordinator/{shrinks}" if shrinks else "coordinator"


class GenerationStores:
    """The fresh stores of rank 0's supervisor: one for each generation, the next one always ready ahead of time."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._stores: dict[int, TCPStore] = {}

    def prepare(self, generation: int) -> dict[str, str | int]:
        """Serves a store for `generation` if there is none yet, and returns ``{"host", "port"}``."""
        store = self._stores.get(generation)
        if store is None:
            store = TCPStore(self._host, 0, is_master=True, wait_for_workers=False)
            self._stores[generation] = store
        return {"host": self._host, "port": store.port}

    def retire(self, before_generation: int) -> None:
        """Closes the stores of generations that are over on all ranks."""
        for generation in [number for number in self._stores if number < before_generation]:
            del self._stores[generation]


def advertised_host(membership: Membership) -> tuple[str, str]:
    """The name under which other ranks reach this host, and the address to listen on.

    MASTER_ADDR when it is this host (the usual case), else this host's address on the way to it: agents may give rank
    0 to another host than the one that serves their store.

    Raises:
        InfrastructureError: MASTER_ADDR cannot be resolved or reached.
    """
    if membership.store_host is None:
        return "127.0.0.1", "127.0.0.1"
    try:
        family, _, _, _, address = socket.getaddrinfo(
            membership.store_host, membership.store_port or 1, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing; asks the routing table
            local = probe.getsockname()[0]
    except OSError as error:
        raise InfrastructureError(
            f"MASTER_ADDR={membership.store_host} cannot be resolved or reached: {error}. "
            f"Check the name and the network."
        ) from error
    return (membership.store_host if local == address[0] else local), local


def own_address(membership: Membership) -> tuple[str, str]:
    """As `advertised_host`, but never by MASTER_ADDR's name: the numeric address that other hosts reach this one by."""
    _, local = advertised_host(membership)
    return local, local


def host_identity() -> str:
    """Names this host: its boot id, because containers share host names and snapshots are found by host."""
    name = socket.gethostname()
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{name}-{file.read().strip()[:8]}-{os.stat('/dev/shm').st_dev}"
    except OSError:
        return name
