"""Where the supervisors listen for each other, and who keeps copies of whose snapshots. Kept in memory only.

It is told anew with every `ready`, so a coordinator that was restarted knows it when the next generation runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

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
        if not told:
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
        self._peers[rank] = peer
        return dataclasses.replace(
            inventory,
            copies=tuple(copies),
            distrusted=_numbers(told, "distrusted") or frozenset(),
            recorded=_numbers(told, "recorded"),
        )

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


def _numbers(told: Mapping[str, Any], name: str) -> frozenset[int] | None:
    """A set of whole numbers; None when it was not told."""
    values: object = told.get(name)
    if values is None:
        return None
    entries = cast("list[object]", values) if isinstance(values, list) else [None]
    numbers = [entry for entry in entries if isinstance(entry, int)]
    if len(numbers) != len(entries) or len(numbers) > _MAX_COPIES:
        raise ConfigError(f"ready: the field {name!r} must be a list of at most {_MAX_COPIES} whole numbers")
    return frozenset(numbers)
