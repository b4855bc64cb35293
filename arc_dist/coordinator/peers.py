"""Where the supervisors listen for each other, and who keeps copies of whose snapshots. Kept in memory only.

It is told anew with every `ready`, so a coordinator that was restarted knows it when the next generation runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from arc_dist.coordinator.records import read_holding
from arc_dist.coordinator.wire import Fields
from arc_dist.errors import ConfigError
from arc_dist.protocol.partners import AUTO, partners
from arc_dist.protocol.pick import Copy, Inventory, Plan

_MAX_COPIES = 4096
_MAX_PORT = 65535


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """A rank's supervisor, as others reach it, and the copies that it wants of its own snapshots."""

    host: str
    port: int
    domain: str
    copies: int
    distance: int

    def address(self, rank: int) -> dict[str, Any]:
        return {"rank": rank, "host": self.host, "port": self.port}


class PeerDesk:
    """Used under the service's lock."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._peers: dict[int, Peer] = {}
        self._table: tuple[tuple[tuple[int, ...], ...], dict[int, list[int]]] | None = None

    def take(self, rank: int, told: Mapping[str, Any] | None, inventory: Inventory) -> Inventory:
        """Notes what a rank said of itself, and returns its inventory with the copies that it keeps.

        Raises:
            ConfigError: it cannot be understood.
        """
        self._table = None
        if told is None:
            self._peers.pop(rank, None)
            return inventory
        fields = Fields("ready", told)
        peer = Peer(
            host=fields.text("host"),
            port=fields.integer("port", minimum=1),
            domain=fields.text("domain"),
            copies=fields.integer("copies", minimum=AUTO),
            distance=fields.integer("distance", minimum=1),
        )
        if peer.port > _MAX_PORT:
            raise ConfigError(f"ready: there is no port {peer.port}")
        copies: list[Copy] = []
        for entry in fields.mappings("held", max_items=_MAX_COPIES):
            owner = Fields("ready", entry).integer("owner")
            if owner < self._world_size:
                copies.append(Copy(owner=owner, holding=read_holding(entry)))
        distrusted = told.get("distrusted", ())
        if not isinstance(distrusted, (list, tuple)):
            raise ConfigError("ready: the field 'distrusted' must be a list of ranks")
        self._peers[rank] = peer
        ranks = frozenset(other for other in distrusted if isinstance(other, int))  # pyright: ignore[reportUnknownVariableType]
        return dataclasses.replace(inventory, copies=tuple(copies), distrusted=ranks)

    def directions(self, rank: int, plan: Plan) -> dict[str, Any]:
        """What a rank that runs a plan needs: who keeps its copies, whose it keeps, and where to fetch its state."""
        source = plan.sources.get(rank)
        holder = self._peers.get(source.holder) if source is not None and source.holder is not None else None
        answer: dict[str, Any] = {"partners": [], "owners": [], "holder": None}
        if source is not None and source.holder is not None and holder is not None:
            answer["holder"] = holder.address(source.holder)
        if len(self._peers) < self._world_size:
            return answer  # some supervisor takes no part, and nobody knows its domain
        if self._table is None:
            peers = [self._peers[other] for other in range(self._world_size)]
            table = partners([peer.domain for peer in peers], [(peer.copies, peer.distance) for peer in peers])
            owners: dict[int, list[int]] = {}
            for owner, chosen in enumerate(table):
                for other in chosen:
                    owners.setdefault(other, []).append(owner)
            self._table = table, owners
        table, owners = self._table
        answer["partners"] = [self._peers[other].address(other) for other in table[rank]]
        answer["owners"] = owners.get(rank, [])
        return answer
