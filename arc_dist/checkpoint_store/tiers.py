"""Several places for the checkpoints of one run, the fastest first.

A save goes to the first tier that takes it. What is committed in one tier is copied to the slower ones in the
background (`drain`). A restore takes each step from the fastest tier that has it, and each damaged or missing shard
from the next.
Every tier is a store of its own and has whole steps with manifests, so each can be used without the others.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from arc_dist.checkpoint_store.catalog import StepInfo
from arc_dist.checkpoint_store.reader import Checkpoint
from arc_dist.checkpoint_store.retention import parse_retention
from arc_dist.checkpoint_store.store import Store
from arc_dist.errors import CheckpointMismatch, ConfigError, StoreCorrupt, StoreError, StoreGone

_log = logging.getLogger(__name__)
_MEMORY = "shm"
_MAX_TIERS = 8
_OPTIONS = ("every", "keep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tier:
    """One place and what is kept there.

    Attributes:
        url: a directory or URL, as `Store` takes it.
        every: of a slower tier: only steps that are multiples of this are copied to it. None: every committed step.
        keep: retention in this tier, as `retention.parse` reads it (``last=3,every=1000``). None: everything.
    """

    url: str
    every: int | None = None
    keep: str | None = None


def parse_tiers(stores: str | Sequence[str]) -> tuple[Tier, ...]:
    """Reads ``"/nvme/ckpt?keep=last=3, s3://bucket/run?every=1000"``, or a sequence of such places.

    ``shm`` may stand first: snapshots in shared memory are the fastest tier of every job, whether named or not. Options
    come behind a question mark; inside ``keep`` the parts are separated by ``;``.

    Raises:
        ConfigError: an empty or repeated place, one inside another, an unknown option.
    """
    texts = [part.strip() for part in (stores.split(",") if isinstance(stores, str) else stores)]
    if texts and texts[0] == _MEMORY:
        texts = texts[1:]
    if not texts:
        raise ConfigError("store='shm' alone outlives no job. Name a directory or URL as well: 'shm, /nvme/ckpt'.")
    if _MEMORY in texts:
        raise ConfigError("shm can only be the first tier: snapshots in memory are the fastest there is.")
    if len(texts) > _MAX_TIERS:
        raise ConfigError(f"{len(texts)} tiers are named, at most {_MAX_TIERS} can be.")
    tiers = tuple(_tier(text) for text in texts)
    for i, tier in enumerate(tiers):
        for other in tiers[:i]:
            _require_apart(other.url, tier.url)
    return tiers


def _tier(text: str) -> Tier:
    url, _, query = text.partition("?")
    if not url:
        raise ConfigError("store: a tier is empty. Name a directory or a URL such as s3://bucket/prefix.")
    options = dict(parse_qsl(query, keep_blank_values=True, separator="&"))
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown or (query and not options):
        raise ConfigError(f"store {text}: unknown option {', '.join(unknown) or query}. Known: {', '.join(_OPTIONS)}.")
    every = options.get("every")
    if every is not None and (not every.isdecimal() or int(every) < 1):
        raise ConfigError(f"store {text}: every={every} must be a whole number of steps, 1 or more.")
    keep = options.get("keep")
    if keep is not None:
        keep = str(parse_retention(keep.replace(";", ",")))
    return Tier(url=url, every=None if every is None else int(every), keep=keep)


def _require_apart(one: str, other: str) -> None:
    a, b = _parts(one), _parts(other)
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        what = "named twice" if a == b else "inside one another"
        raise ConfigError(f"store: the tiers {one} and {other} are {what}. Give each tier a place of its own.")


def _parts(url: str) -> tuple[str, ...]:
    parts = urlsplit(url)
    if parts.scheme in ("", "file", "local"):
        return ("", *Path(parts.path if parts.scheme else url).expanduser().absolute().parts)
    return (parts.scheme, parts.netloc, *[part for part in parts.path.split("/") if part])


class Tiers:
    """The tiers of one run, as one store to restore from.

    Args:
        tiers: fastest first.
        run: as `Store`.
        owner: as `Store`.
        dedup: as `Store`; each tier refers to its own steps only, and what is drained to another tier is whole there.
    """

    def __init__(
        self, tiers: Sequence[Tier], *, run: str = "run", owner: str | None = None, dedup: bool = False
    ) -> None:
        self.tiers = tuple(tiers)
        self.stores = tuple(Store(tier.url, run=run, owner=owner, dedup=dedup) for tier in tiers)
        self.run = self.stores[0].run

    def __len__(self) -> int:
        return len(self.stores)

    @property
    def url(self) -> str:
        """All roots, without credentials."""
        return ", ".join(store.url for store in self.stores)

    def check_writable(self) -> None:
        """As `Store.check_writable`, for each tier."""
        for store in self.stores:
            store.check_writable()

    def take_over(self) -> None:
        """As `Store.take_over`, for each tier."""
        for store in self.stores:
            store.take_over()

    def quarantine(self, first: int, last: int, why: str) -> None:
        """As `Store.quarantine`, for each tier; one that cannot be marked is said and does not stop the others."""
        for store in self.stores:
            try:
                store.quarantine(first, last, why)
            except StoreError as error:
                _log.warning("steps %d to %d were not put in quarantine: %s", first, last, error.message)

    def discard(self, tier: int, step: int, *, generation: int, world_size: int) -> None:
        """Removes what an attempt that moved on has left in `tier`; what cannot be removed stays for `arc prune`."""
        try:
            self.stores[tier].discard(step, generation=generation, world_size=world_size)
        except StoreError as error:
            _log.warning("the abandoned attempt at step %d was not removed: %s", step, error.message)

    def prune(self, tier: int, held_elsewhere: Collection[int] = ()) -> list[int]:
        """Removes the steps that the tier's own retention does not keep; returns them.

        With retention, what killed processes of this job left there goes too.

        Args:
            tier: its number.
            held_elsewhere: steps that other tiers hold; see `orphans.collect_own`.
        """
        keep = self.tiers[tier].keep
        if keep is None:
            return []
        removed = self.stores[tier].prune(parse_retention(keep))
        try:
            left = self.stores[tier].collect_own(held_elsewhere)
        except StoreError as error:
            _log.warning("what interrupted saves left was not looked for: %s", error.message)
            return removed
        for orphan in left:
            _log.info("%s: removed %s: %s", self.stores[tier].url, orphan.directory or "litter", orphan.why)
        return removed

    def holders(self) -> dict[int, list[int]]:
        """Which tiers hold each step with a sound manifest: ``{step: [tier, ...]}``, fastest first."""
        found: dict[int, list[int]] = {}
        for number, store in enumerate(self.stores):
            for info in store.steps(include_damaged=True):
                if info.problem is None and number not in found.setdefault(info.step, []):
                    found[info.step].append(number)
        return {step: tiers for step, tiers in found.items() if tiers}

    def steps(self, *, include_damaged: bool = False) -> list[StepInfo]:
        """The committed steps, oldest first, each from the fastest tier that holds it; see `Store.steps`.

        A step whose manifest is damaged in every tier that has it counts as damaged.

        Raises:
            StoreGone, StoreDenied, StoreTransient: a tier cannot be listed. It may hold the newest step, so going on
                without it could silently lose work.
            CheckpointMismatch: as `Store.steps`.
        """
        sound: dict[int, StepInfo] = {}
        damaged: dict[int, StepInfo] = {}
        for store in self.stores:
            for info in store.steps(include_damaged=include_damaged):
                (damaged if info.problem is not None else sound).setdefault(info.step, info)
        infos = [*sound.values(), *(info for step, info in damaged.items() if step not in sound)]
        return sorted(infos, key=lambda info: info.step)

    def open(self, step: int) -> Checkpoint:
        """Opens a step in the fastest tier that holds it, with equal copies in the others to fall back on.

        Raises:
            StoreGone: no tier has it.
            StoreCorrupt, CheckpointMismatch: as `Store.open`, from the fastest tier, when no other has a sound one.
        """
        found: list[Checkpoint] = []
        errors: list[StoreError] = []
        for store in self.stores:
            try:
                found.append(store.open(step))
            except (StoreGone, StoreCorrupt, CheckpointMismatch) as error:
                errors.append(error)
        if not found:
            # What is wrong with a step says more than that another tier never had it.
            raise next((error for error in errors if not isinstance(error, StoreGone)), errors[0])
        newest = max(found, key=lambda checkpoint: checkpoint.manifest.committed_at)
        equal = [other for other in found if other.manifest.same_state(newest.manifest)]
        return equal[0].with_copies(equal[1:])
