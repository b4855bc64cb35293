"""When a set of shards becomes a checkpoint: all of them durable, then one manifest, exactly once.

Each rank writes its shard and says so only when it is durable. The last one to say so makes the coordinator write the
manifest, which *is* the commit; a reader sees the whole step or nothing.

::

    PENDING ----last shard offered----> COMMITTING ----manifest written----> COMMITTED
       |                                     +---------store refused-------> FAILED
       +------generation closed, step poisoned, other store named---------> ABANDONED

Why at most one manifest: only the one transition PENDING -> COMMITTING asks for it, and nothing leads back to PENDING.
Why no stale one: a shard of a generation that is not open is *fenced*, whatever it holds; when a generation closes (all
its processes are gone, so no more can come) what is incomplete is abandoned. A generation that is ending is still open:
a shard that was durable before the fault may complete a checkpoint, and nothing speaks against it.

Saying something twice changes nothing, and a rank that wrote its shard again before the commit replaces its word.

A job may have several stores, its *tiers*, and a rank whose tier is full or gone writes its shard to the next one. A
manifest covers shards of one tier, so the save *moves*: what lies in faster tiers is forgotten, and the ranks that
wrote there hear MOVED with the tier to write to. Why that ends: the tier of a save only grows, and there are few. A
rank that no tier takes a shard from says so (`give_up`), so that the others do not wait for it.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

from arc_dist.protocol.pick import Poison

_MAX_SETTLED = 64  # outcomes remembered for late questions
_MAX_PENDING = 16  # saves that wait for shards; one rank that cannot write must not make the others' words pile up


class CommitStatus(enum.Enum):
    """What a rank hears about a save. Values are part of the wire format."""

    PENDING = "pending"
    COMMITTING = "committing"
    COMMITTED = "committed"
    FAILED = "failed"
    ABANDONED = "abandoned"
    FENCED = "fenced"
    MOVED = "moved"
    UNKNOWN = "unknown"

    @property
    def is_settled(self) -> bool:
        """Whether waiting longer brings this rank no other answer."""
        return self not in (CommitStatus.PENDING, CommitStatus.COMMITTING, CommitStatus.UNKNOWN)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One rank's word that its part of a step is durable in a tier (0 is the first).

    `part` is the store's business and is passed through.
    """

    rank: int
    generation: int
    step: int
    url: str
    part: Mapping[str, Any]
    certified: bool = True
    tier: int = 0
    why: str = ""  # it is not an earlier tier


@dataclasses.dataclass(frozen=True, kw_only=True)
class Save:
    """The saving of one step by one generation, to one tier."""

    step: int
    generation: int
    url: str
    parts: Mapping[int, Mapping[str, Any]] = dataclasses.field(default_factory=dict[int, Mapping[str, Any]])
    certified: bool = True
    tier: int = 0
    why: str = ""
    status: CommitStatus = CommitStatus.PENDING
    error: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saves:
    """All saves that are remembered, the one generation that may add to them (None: none may), and what is poisoned."""

    world_size: int
    open_generation: int | None = None
    poisoned: tuple[Poison, ...] = ()
    saves: Mapping[tuple[int, int], Save] = dataclasses.field(default_factory=dict[tuple[int, int], Save])

    def find(self, step: int, generation: int) -> Save | None:
        return self.saves.get((step, generation))

    def committing(self) -> frozenset[int]:
        """Steps whose manifest is being written at this moment."""
        return frozenset(save.step for save in self.saves.values() if save.status is CommitStatus.COMMITTING)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offered:
    """The answer to a shard. `commit` is the save whose manifest the caller must now write; then it calls `settle`."""

    saves: Saves
    status: CommitStatus
    reason: str
    commit: Save | None = None


def offer(saves: Saves, shard: Shard) -> Offered:
    """Takes a rank's word that its shard is durable."""
    if shard.generation != saves.open_generation:
        reason = f"generation {shard.generation} may not commit: {_open(saves)}"
        return Offered(saves=saves, status=CommitStatus.FENCED, reason=reason)
    if not 0 <= shard.rank < saves.world_size:
        reason = f"there is no rank {shard.rank} in a world of {saves.world_size}"
        return Offered(saves=saves, status=CommitStatus.FENCED, reason=reason)
    if any(entry.covers(shard.step, shard.generation) for entry in saves.poisoned):
        # Even when the generation has trained this step anew: under this name there may be a manifest of the bad one.
        reason = f"step {shard.step} of generation {shard.generation} is poisoned"
        return Offered(saves=saves, status=CommitStatus.ABANDONED, reason=reason)
    save = saves.find(shard.step, shard.generation)
    if save is None or _moves_on(save, shard):
        save = Save(step=shard.step, generation=shard.generation, url=shard.url, tier=shard.tier, why=shard.why)
    if shard.tier < save.tier and save.status is CommitStatus.PENDING:
        return Offered(saves=saves, status=CommitStatus.MOVED, reason=_moved(save))
    if save.status is not CommitStatus.PENDING:
        return Offered(saves=saves, status=save.status, reason=save.error or f"step {save.step} is {save.status.value}")
    if save.url != shard.url:
        error = f"step {shard.step}: rank {shard.rank} saved to {shard.url}, others to {save.url}; use one store"
        save = dataclasses.replace(save, status=CommitStatus.FAILED, error=error)
        return Offered(saves=_put(saves, save), status=save.status, reason=error)

    parts = {**save.parts, shard.rank: shard.part}
    save = dataclasses.replace(save, parts=parts, certified=save.certified and shard.certified)
    if len(parts) < saves.world_size:
        reason = f"{len(parts)} of {saves.world_size} shards are durable"
        return Offered(saves=_put(saves, save), status=CommitStatus.PENDING, reason=reason)
    save = dataclasses.replace(save, status=CommitStatus.COMMITTING)
    return Offered(saves=_put(saves, save), status=save.status, reason="all shards are durable", commit=save)


def _moves_on(save: Save, shard: Shard) -> bool:
    """Whether this shard takes the save to a slower tier.

    One rank could not write where the others did, or the manifest could not be written there.
    """
    return shard.tier > save.tier and save.status in (CommitStatus.PENDING, CommitStatus.FAILED)


def _moved(save: Save) -> str:
    return f"step {save.step} moved to tier {save.tier} ({save.url}): {save.why or 'an earlier one could not be used'}"


def give_up(saves: Saves, rank: int, step: int, generation: int, error: str) -> Saves:
    """A rank could not write its shard to any tier: the save fails for all, unless it is settled or being committed."""
    if generation != saves.open_generation:
        return saves
    save = saves.find(step, generation) or Save(step=step, generation=generation, url="")
    if save.status is not CommitStatus.PENDING:
        return saves
    error = f"rank {rank} could not save step {step}: {error}"
    # No tier is left, so no shard moves it on.
    return _put(saves, dataclasses.replace(save, status=CommitStatus.ABANDONED, error=error, parts={}))


def settle(saves: Saves, step: int, generation: int, error: str | None) -> Saves:
    """Notes that the manifest was written (`error` None) or refused. The parts are forgotten; the outcome is kept."""
    save = saves.find(step, generation)
    if save is None or save.status is not CommitStatus.COMMITTING:
        return saves
    status = CommitStatus.COMMITTED if error is None else CommitStatus.FAILED
    return _put(saves, dataclasses.replace(save, status=status, error=error, parts={}))


def open_for(saves: Saves, generation: int | None) -> Saves:
    """Lets `generation` alone add shards from now on; what the others left incomplete is abandoned."""
    after = dataclasses.replace(saves, open_generation=generation)
    for save in saves.saves.values():
        if save.status is CommitStatus.PENDING and save.generation != generation:
            error = f"generation {save.generation} ended when {len(save.parts)} of {saves.world_size} shards were in"
            after = _put(after, dataclasses.replace(save, status=CommitStatus.ABANDONED, error=error, parts={}))
    return after


def poison(saves: Saves, poisoned: tuple[Poison, ...]) -> Saves:
    """Notes all that is poisoned by now, and abandons what of it is incomplete. `pick` refuses what is committed."""
    after = dataclasses.replace(saves, poisoned=poisoned)
    for save in saves.saves.values():
        bad = any(entry.covers(save.step, save.generation) for entry in poisoned)
        if bad and save.status is CommitStatus.PENDING:
            error = f"step {save.step} is poisoned"
            after = _put(after, dataclasses.replace(save, status=CommitStatus.ABANDONED, error=error, parts={}))
    return after


def status_of(saves: Saves, step: int, generation: int, tier: int = 0) -> tuple[CommitStatus, str | None]:
    """What is known about a save, and the error if it has one; `tier` is where the one who asks wrote its shard."""
    save = saves.find(step, generation)
    if save is not None:
        if save.status is CommitStatus.PENDING and save.tier > tier:
            return CommitStatus.MOVED, _moved(save)
        return save.status, save.error
    if generation != saves.open_generation:
        return CommitStatus.FENCED, f"generation {generation} may not commit: {_open(saves)}"
    return CommitStatus.UNKNOWN, None


def _open(saves: Saves) -> str:
    return "the job is over" if saves.open_generation is None else f"generation {saves.open_generation} is running"


def _put(saves: Saves, save: Save) -> Saves:
    """Stores `save` as the youngest; beyond the bounds gives up the oldest that wait and forgets the oldest settled."""
    entries = {key: value for key, value in saves.saves.items() if key != (save.step, save.generation)}
    entries[(save.step, save.generation)] = save
    waiting = [key for key, value in entries.items() if value.status is CommitStatus.PENDING]
    for key in waiting[: max(0, len(waiting) - _MAX_PENDING)]:
        error = f"{_MAX_PENDING} younger saves wait too: some rank does not write its shards"
        entries[key] = dataclasses.replace(entries[key], status=CommitStatus.ABANDONED, error=error, parts={})
    settled = [key for key, value in entries.items() if value.status.is_settled]
    for key in settled[: max(0, len(settled) - _MAX_SETTLED)]:
        del entries[key]
    return dataclasses.replace(saves, saves=entries)
