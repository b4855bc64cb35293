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
from arc_dist.protocol.pick import Plan
from arc_dist.protocol.sources import Copy, Inventory

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
        self._tables: tuple[_Table, _Table] | None = None  # of copies, and of notes

    def take(self, rank: int, told: Mapping[str, Any] | None, inventory: Inventory) -> Inventory:
        """Remembers what a rank said of itself, and returns its inventory with the copies and notes that it keeps.

        Raises:
            ConfigError: it cannot be understood.
        """
        self._tables = None
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
        self._peers[rank] = peer
        return dataclasses.replace(
            inventory,
            copies=self._kept(fields, "held"),
            notes=self._kept(fields, "notes"),
            distrusted=_numbers(told, "distrusted") or frozenset(),
            recorded=_numbers(told, "recorded"),
            replica_key=fields.integer("replica_key", default=0),
        )

    def _kept(self, fields: Fields, name: str) -> tuple[Copy, ...]:
        kept: list[Copy] = []
        for entry in fields.mappings(name, max_items=_MAX_COPIES):
            owner = Fields("ready", entry).integer("owner")
            if owner < self._world_size:
                kept.append(Copy(owner=owner, holding=read_holding(entry)))
        return tuple(kept)

    def directions(self, rank: int, plan: Plan) -> dict[str, Any]:
        """What a rank that runs a plan needs: who keeps its copies and notes, whose it keeps, and who has its state."""
        answer: dict[str, Any] = {"partners": [], "owners": [], "keepers": [], "noted": [], "holders": []}
        source = plan.sources.get(rank)
        for holder in () if source is None else (source.holder, source.noted_by):
            if holder is not None and holder in self._peers:
                answer["holders"].append(self._peers[holder].address(holder))
        if len(self._peers) < self._world_size:
            return answer  # some supervisor takes no part, and nobody knows its domain
        if self._tables is None:
            peers = [self._peers[other] for other in range(self._world_size)]
            domains = [peer.domain for peer in peers]
            self._tables = (
                _Table.of(partners(domains, [(peer.copies, peer.distance) for peer in peers])),
                # Notes are a few kilobytes: who wants no copies has them all the same.
                _Table.of(partners(domains, [(peer.copies or AUTO, peer.distance) for peer in peers])),
            )
        copies, notes = self._tables
        answer["partners"] = [self._peers[other].address(other) for other in copies.keepers[rank]]
        answer["owners"] = copies.owners.get(rank, [])
        answer["keepers"] = [self._peers[other].address(other) for other in notes.keepers[rank]]
        answer["noted"] = notes.owners.get(rank, [])
        return answer


@dataclasses.dataclass(frozen=True)
class _Table:
    """Who keeps each rank's, and whose each rank keeps."""

    keepers: tuple[tuple[int, ...], ...]
    owners: dict[int, list[int]]

    @staticmethod
    def of(keepers: tuple[tuple[int, ...], ...]) -> _Table:
        owners: dict[int, list[int]] = {}
        for owner, chosen in enumerate(keepers):
            for other in chosen:
                owners.setdefault(other, []).append(owner)
        return _Table(keepers, owners)


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
