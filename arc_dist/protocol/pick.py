"""The step that all ranks restore, and where each rank finds it.

**Whole.** A step is whole in memory when every rank has a source of it: a snapshot in its own memory; where the ranks
are replicas (DDP, HSDP), that of one of its replicas; or a copy of its own snapshot that another supervisor keeps
(`sources`). It is whole on disk when its checkpoint is committed. Half a step is never used.

**Trusted.** A snapshot counts when it is certified, or when it is a *parting* snapshot: written by a rank that had lost
a peer, from the last step that all ranks had voted good. A committed checkpoint counts unless it says it is not
certified.

**Refused for ever.** *Poisoned*: a fault was traced back to before this state was saved. *Abandoned*: a later
generation restored an older step, so this state belongs to a history that did not happen. Both name the generation
that they speak of, because the same step number, trained again, is another state. A copy is refused as its original is.

**What was forgotten.** A restarted coordinator does not know what the stores hold; only the newest commit that it once
knew of (`Known.remembered`). Memory that is older than that is not taken: the trainers look into the store themselves.

**The choice** is the newest step that is whole, trusted and not refused; at the same step memory comes before disk
(it is faster, and holds what was not yet written). So `pick` is *monotone*: one more good snapshot never makes the
answer older. And it is a function of sets: the order in which holdings are told, and telling them twice, change
nothing. Why newer steps were not taken is part of the answer.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

from arc_dist.protocol.sources import Holding, Inventory, Offers, Source, find_sources, replica_keys

PLAN_VERSION = 1
_MAX_REFUSALS = 8  # newest first; more would only hide them
_MAX_POISON = 256


class Tier(enum.Enum):
    """Where a plan restores from. `NONE` is a fresh start: nothing is known here, a trainer may still find a store."""

    MEMORY = "memory"
    CHECKPOINT = "checkpoint"
    NONE = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Committed:
    """A checkpoint whose manifest is written. `generation` is None when the store did not say."""

    step: int
    url: str
    generation: int | None = None
    certified: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Poison:
    """States of steps `from_step`..`to_step` saved by `generation` or an earlier one are bad."""

    from_step: int
    to_step: int
    generation: int

    def covers(self, step: int, generation: int | None) -> bool:
        return self.from_step <= step <= self.to_step and (generation is None or generation <= self.generation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """`generation` began from `step`. None: from nothing that is known here, so no snapshot of before is its past."""

    generation: int
    step: int | None

    def abandons(self, step: int, generation: int) -> bool:
        return generation < self.generation and (self.step is None or step > self.step)

    def outweighs(self, earlier: Restored) -> bool:
        if self.step is None or earlier.step is None:
            return self.step is None and earlier.step is None
        return self.step <= earlier.step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Known:
    """What the job knows beyond its ranks' memory.

    Attributes:
        committed: checkpoints that stores are known to hold.
        poison: see above.
        restored: see above.
        remembered: the newest checkpoint that an earlier coordinator knew of, until a store has told what it holds.
    """

    committed: frozenset[Committed] = frozenset()
    poison: tuple[Poison, ...] = ()
    restored: tuple[Restored, ...] = ()
    remembered: Committed | None = None

    @property
    def floor(self) -> int:
        """No step before this one may be taken from memory; -1 for none."""
        entry = self.remembered
        if entry is None or self.refusal(entry.step, entry.generation, in_memory=False) is not None:
            return -1
        return entry.step

    def refusal(self, step: int, generation: int | None, *, in_memory: bool) -> str | None:
        """Why a state of `step` saved by `generation` must not come back, or None when it may."""
        for poison in self.poison:
            if poison.covers(step, generation):
                return f"poisoned (steps {poison.from_step}-{poison.to_step}, until generation {poison.generation})"
        if generation is None:
            return None
        for restored in self.restored:
            # A start from nothing known here says nothing about the store: the trainer looks there by itself.
            if (in_memory or restored.step is not None) and restored.abandons(step, generation):
                went_back = "the start" if restored.step is None else f"step {restored.step}"
                return f"abandoned (generation {restored.generation} went back to {went_back})"
        return None

    def with_poison(self, poison: Poison) -> Known:
        """Bounded: beyond the limit the two oldest become one that covers both, which refuses more, never less."""
        if poison in self.poison:
            return self
        entries = (*self.poison, poison)
        if len(entries) > _MAX_POISON:
            first, second, *rest = entries
            hull = Poison(
                from_step=min(first.from_step, second.from_step),
                to_step=max(first.to_step, second.to_step),
                generation=max(first.generation, second.generation),
            )
            entries = (hull, *rest)
        return dataclasses.replace(self, poison=entries)

    def with_restored(self, restored: Restored) -> Known:
        """Drops what the new word makes superfluous: a generation that went back as far or further says it all."""
        kept = tuple(earlier for earlier in self.restored if not restored.outweighs(earlier))
        return dataclasses.replace(self, restored=(*kept, restored))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal:
    """A newer step that was not taken, and why."""

    step: int
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What every rank of `generation` restores; the same for all of them.

    Attributes:
        generation: the one that acts on it.
        step: what it restores; None for a fresh start.
        tier: from where.
        reason: why this step.
        sources: for each rank where its snapshot is; for tier `MEMORY`.
        url: the store, for tier `CHECKPOINT`.
        saved_by: the generation that saved the checkpoint, where the store told: a step may have been saved twice.
        refused: newer steps, and why they were not taken.
        poisoned: what a trainer that looks into a store by itself must not take.
    """

    generation: int
    step: int | None
    tier: Tier
    reason: str
    sources: Mapping[int, Source] = dataclasses.field(default_factory=dict[int, Source])
    url: str | None = None
    saved_by: int | None = None
    refused: tuple[Refusal, ...] = ()
    poisoned: tuple[Poison, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The wire form, as handed to the training process in ``ARC_PLAN``."""
        return {
            "version": PLAN_VERSION,
            "generation": self.generation,
            "step": self.step,
            "tier": self.tier.value,
            "reason": self.reason,
            "sources": {str(rank): source.as_dict() for rank, source in sorted(self.sources.items())},
            "url": self.url,
            "saved_by": self.saved_by,
            "refused": [dataclasses.asdict(refusal) for refusal in self.refused],
            "poisoned": [dataclasses.asdict(poison) for poison in self.poisoned],
        }

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Plan:
        if fields["version"] != PLAN_VERSION:
            raise ValueError(f"plan version {fields['version']} is not {PLAN_VERSION}")
        return Plan(
            generation=fields["generation"],
            step=fields["step"],
            tier=Tier(fields["tier"]),
            reason=fields["reason"],
            sources={int(rank): Source(**source) for rank, source in fields["sources"].items()},
            url=fields["url"],
            saved_by=fields["saved_by"],
            refused=tuple(Refusal(**refusal) for refusal in fields["refused"]),
            poisoned=tuple(Poison(**poison) for poison in fields["poisoned"]),
        )


def pick(generation: int, inventories: Mapping[int, Inventory], known: Known) -> Plan:
    """Chooses what `generation` restores.

    Args:
        generation: the generation that will act on the plan.
        inventories: one per rank of the world; a rank that holds nothing has an empty one.
        known: committed checkpoints, poison, and what earlier generations restored.
    """
    refused: list[Refusal] = []
    on_disk = _best_committed(known, refused)
    sources: dict[int, Source] = {}
    step: int | None = None
    offers = _in_memory(inventories, known, refused)
    keys = replica_keys(inventories)
    floor = max(known.floor, on_disk.step if on_disk is not None else -1)
    for candidate in sorted(offers, reverse=True):
        if candidate < floor:
            break
        found = find_sources(candidate, offers[candidate], keys, inventories)
        if len(found) == len(inventories):
            step, sources = candidate, found
            break
        missing = [rank for rank in sorted(inventories) if rank not in found]
        refused.append(Refusal(step=candidate, reason=f"not held for {_ranks(missing)}"))

    if step is not None:
        borrowed = [rank for rank, source in sources.items() if source.rank != rank or source.holder is not None]
        tier, reason = Tier.MEMORY, f"step {step} is the newest that all ranks have in memory"
        if borrowed:
            reason += f" ({_ranks(borrowed)} from a peer)"
    elif on_disk is not None:
        step, tier = on_disk.step, Tier.CHECKPOINT
        reason = f"step {step} is the newest committed checkpoint, and memory has nothing newer that is whole"
    else:
        tier, reason = Tier.NONE, "no step is whole in memory and no committed checkpoint is known"
    newer = sorted({r for r in refused if step is None or r.step > step}, key=lambda r: (-r.step, r.reason))
    from_disk = on_disk if tier is Tier.CHECKPOINT else None
    return Plan(
        generation=generation,
        step=step,
        tier=tier,
        reason=reason,
        sources=sources,
        url=from_disk.url if from_disk else None,
        saved_by=from_disk.generation if from_disk else None,
        refused=tuple(newer[:_MAX_REFUSALS]),
        poisoned=known.poison,
    )


def _best_committed(known: Known, refused: list[Refusal]) -> Committed | None:
    """The newest usable checkpoint."""
    best: Committed | None = None
    for entry in known.committed:
        why_not = known.refusal(entry.step, entry.generation, in_memory=False)
        if why_not is None and not entry.certified:
            why_not = "not certified"
        if why_not is not None:
            refused.append(Refusal(step=entry.step, reason=f"checkpoint {why_not}"))
        elif best is None or _order(entry) < _order(best):
            best = entry
    return best


def newest_committed(known: Known) -> Committed | None:
    """The newest checkpoint that may be restored, or None."""
    return _best_committed(known, [])


def _order(entry: Committed) -> tuple[int, int, str]:
    """The best first: the newest step, saved last, in the store whose URL sorts first, so that the answer is one."""
    return (-entry.step, -1 if entry.generation is None else -entry.generation, entry.url)


def _in_memory(inventories: Mapping[int, Inventory], known: Known, refused: list[Refusal]) -> dict[int, Offers]:
    """What is usable in memory, by step."""
    offers: dict[int, Offers] = {}

    def take(holding: Holding, where: str) -> Offers | None:
        why_not = known.refusal(holding.step, holding.generation, in_memory=True)
        if why_not is None and not holding.trusted:
            why_not = f"not certified {where}"
        if why_not is None:
            return offers.setdefault(holding.step, Offers())
        refused.append(Refusal(step=holding.step, reason=why_not))
        return None

    for rank, inventory in inventories.items():
        for holding in inventory.holdings:
            if offer := take(holding, f"on rank {rank}"):
                offer.snapshots.setdefault(rank, []).append(holding)
        for copy in inventory.copies:
            if offer := take(copy.holding, f"in rank {rank}'s copy of rank {copy.owner}"):
                offer.copies.setdefault(copy.owner, {}).setdefault(rank, []).append(copy.holding)
        for note in inventory.notes:
            if offer := take(note.holding, f"in rank {rank}'s note of rank {note.owner}"):
                offer.notes.setdefault(note.owner, {}).setdefault(rank, []).append(note.holding)
    return offers


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8])
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{', ...' if len(ranks) > 8 else ''}"
