"""Where each rank of a world can find a step: what ranks hold, and which of it is taken.

A rank's own memory comes before that of a replica on its host, that before a copy of its own snapshot, and that before
what takes more: a replica's snapshot from another host, and a replica's snapshot with a note.

**Replicas** are ranks whose snapshots carry the same *replica key*, which is made only where DDP or HSDP promise it.
What a rank alone knows (its random state, its place in the data) is in no replica: it must be *recorded* in the rank's
own memory, or *noted* at another supervisor, for the very step. A note carries the key of the snapshot that it belongs
to, so a rank that has lost all its memory has replicas too. The key of one that has its record is in the record, or
that of any of its snapshots, however old: ranks that are replicas stay replicas. Where no key is known, there are none.
A replica on another host gives its snapshot over the network, if both ranks' supervisors take part in that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holding:
    """A snapshot in a rank's memory.

    Attributes:
        step: committed steps that it contains.
        slot: where it lies in the rank's ring.
        generation: the generation that took it.
        certified: enough healthy verdicts followed.
        parting: taken at the last committed step after a peer was lost.
        replica_key: the key of its rank: with an equal one it can stand in for a peer's; 0 for none.
        nbytes: its size.
    """

    step: int
    slot: int
    generation: int = 0
    certified: bool = False
    parting: bool = False
    replica_key: int = 0
    nbytes: int = 0

    @property
    def trusted(self) -> bool:
        return self.certified or self.parting

    @property
    def preference(self) -> tuple[int, bool, int, int]:
        """Larger is better, among a rank's trusted snapshots of one step: all are the same state."""
        return (self.generation, self.certified, -self.slot, self.replica_key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copy:
    """A snapshot of rank `owner` that another rank's supervisor, or the one that took its place, keeps whole."""

    owner: int
    holding: Holding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inventory:
    """What one rank's memory holds, and where that memory is.

    Attributes:
        host: ranks of one host can read each other's memory.
        shm_dir: where the rank's own snapshots are.
        holdings: the rank's own snapshots.
        copies: of other ranks' snapshots.
        notes: of what only other ranks knew when they took a snapshot; each has the snapshot's key.
        distrusted: ranks from which this one could not fetch a copy.
        recorded: steps of which the memory still has what only this rank knows, without which a peer's snapshot is of
            no use to it; None when that was not told, by a supervisor that exchanges nothing with others.
        replica_key: of the process that recorded them.
    """

    host: str
    shm_dir: str
    holdings: tuple[Holding, ...] = ()
    copies: tuple[Copy, ...] = ()
    notes: tuple[Copy, ...] = ()
    distrusted: frozenset[int] = frozenset()
    recorded: frozenset[int] | None = None
    replica_key: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where a rank finds its state: `rank`'s memory directory and the slot in it.

    With a `holder` it is not there yet, and the rank's own supervisor fetches it, of `generation`: the copy that the
    holder's supervisor keeps, or, where the holder is `rank` itself, a replica, that rank's own snapshot. What only the
    rank knows is in its memory, or else fetched from the supervisor of rank `noted_by`, of `noted_in`.
    """

    rank: int
    shm_dir: str
    slot: int
    holder: int | None = None
    generation: int | None = None
    noted_by: int | None = None
    noted_in: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Offers:
    """Everything usable of one step: all of it is the same state.

    Attributes:
        snapshots: by rank.
        copies: by owner and the rank that keeps them.
        notes: as copies.
    """

    snapshots: dict[int, list[Holding]] = dataclasses.field(default_factory=dict[int, list[Holding]])
    copies: dict[int, dict[int, list[Holding]]] = dataclasses.field(default_factory=dict[int, dict[int, list[Holding]]])
    notes: dict[int, dict[int, list[Holding]]] = dataclasses.field(default_factory=dict[int, dict[int, list[Holding]]])

    def replicas(self) -> dict[int, dict[int, Holding]]:
        """By replica key and rank the best snapshot; those without a key are nobody's replicas."""
        found: dict[int, dict[int, Holding]] = {}
        for rank, holdings in self.snapshots.items():
            for holding in holdings:
                if holding.replica_key:
                    of_key = found.setdefault(holding.replica_key, {})
                    of_key[rank] = _best((holding, *filter(None, [of_key.get(rank)])))
        return found


def replica_keys(inventories: Mapping[int, Inventory]) -> dict[int, frozenset[int]]:
    """The replica keys that are known of each rank: one, or none, unless its memory is of several lives of the job."""
    found: dict[int, set[int]] = {rank: set() for rank in inventories}
    for rank, inventory in inventories.items():
        found[rank].update((inventory.replica_key, *(holding.replica_key for holding in inventory.holdings)))
        for copy in (*inventory.copies, *inventory.notes):
            if copy.owner in found:
                found[copy.owner].add(copy.holding.replica_key)
    return {rank: frozenset(keys - {0}) for rank, keys in found.items()}


def find_sources(
    step: int, offers: Offers, keys: Mapping[int, frozenset[int]], inventories: Mapping[int, Inventory]
) -> dict[int, Source]:
    """A source of a step for each rank that has one.

    Args:
        step: that is wanted.
        offers: of that step.
        keys: see `replica_keys`.
        inventories: of all ranks.
    """
    replicas = offers.replicas()
    found: dict[int, Source] = {}
    for rank in sorted(inventories):
        mine = inventories[rank]
        if rank in offers.snapshots:
            found[rank] = Source(rank=rank, shm_dir=mine.shm_dir, slot=_best(offers.snapshots[rank]).slot)
            continue
        givers: dict[int, Holding] = {}
        if mine.recorded is None or step in mine.recorded:
            for key in sorted(keys[rank]):
                givers |= replicas.get(key, {})
        source = (
            _near(rank, givers, inventories)
            or _copy(rank, offers.copies.get(rank, {}), inventories)
            or _far(rank, givers, inventories)
            or _noted(rank, replicas, offers.notes.get(rank, {}), inventories)
        )
        if source is not None:
            found[rank] = source
    return found


def _near(rank: int, givers: Mapping[int, Holding], inventories: Mapping[int, Inventory]) -> Source | None:
    """A replica whose memory the rank can read."""
    near = sorted(giver for giver in givers if inventories[giver].host == inventories[rank].host)
    if not near:
        return None
    giver = near[rank % len(near)]  # spreads the reading over the peers
    return Source(rank=giver, shm_dir=inventories[giver].shm_dir, slot=givers[giver].slot)


def _far(rank: int, givers: Mapping[int, Holding], inventories: Mapping[int, Inventory]) -> Source | None:
    """A replica that gives its snapshot over the network."""
    mine = inventories[rank]
    if mine.recorded is None:
        return None
    far = _trustworthy(mine, [giver for giver in givers if inventories[giver].recorded is not None])
    if not far:
        return None
    giver = far[rank % len(far)]
    held = givers[giver]
    shm_dir = inventories[giver].shm_dir
    return Source(rank=giver, shm_dir=shm_dir, slot=held.slot, holder=giver, generation=held.generation)


def _noted(
    rank: int,
    replicas: Mapping[int, Mapping[int, Holding]],
    notes: Mapping[int, Sequence[Holding]],
    inventories: Mapping[int, Inventory],
) -> Source | None:
    """A replica for a rank that has lost what it alone knew, with a note of that."""
    mine = inventories[rank]
    if mine.recorded is None:
        return None
    for noted_by in _trustworthy(mine, notes):
        for note in sorted(notes[noted_by], key=lambda note: note.preference, reverse=True):
            givers = replicas.get(note.replica_key, {})
            source = _near(rank, givers, inventories) or _far(rank, givers, inventories)
            if source is not None:
                return dataclasses.replace(source, noted_by=noted_by, noted_in=note.generation)
    return None


def _copy(rank: int, copies: Mapping[int, Sequence[Holding]], inventories: Mapping[int, Inventory]) -> Source | None:
    """A copy of the rank's own snapshot; from its host, if there is one."""
    mine = inventories[rank]
    holders = _trustworthy(mine, copies)
    if not holders:
        return None
    near = [holder for holder in holders if inventories[holder].host == mine.host]
    holder = min(near or holders)
    held = _best(copies[holder])
    return Source(rank=rank, shm_dir=mine.shm_dir, slot=held.slot, holder=holder, generation=held.generation)


def _trustworthy(mine: Inventory, others: Iterable[int]) -> list[int]:
    """Those from which the rank has not failed to fetch something."""
    return sorted(other for other in others if other not in mine.distrusted)


def _best(holdings: Sequence[Holding]) -> Holding:
    return max(holdings, key=lambda holding: holding.preference)
