"""The copies of other ranks' snapshots, and the notes of them, that one rank's directory in shared memory holds.

::

    <directory of the rank>/peer-<owner>/         what comes in: two slots, the newest whole one is never touched
    <directory of the rank>/peer-<owner>.<k>/     what was taken over from directories of an earlier life of the job
    <directory of the rank>/note-<owner>/         as the two above, of notes: snapshots without their tensors
    <directory of the rank>/note-<owner>.<k>/

Each is laid out as a rank's own directory (`snapshot/layout.py`), so what is whole is found in the same way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import re
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

from arc_dist.peers.channel import PeerUnavailable
from arc_dist.peers.image import Draft, Facts
from arc_dist.snapshot import layout, reserve
from arc_dist.snapshot.directory import remove_directory
from arc_dist.snapshot.layout import SlotHeader, SlotInfo

_NAME = re.compile(r"(peer|note)-(\d+)(?:\.\d+)?")
_SLOTS = (0, 1)
_MODE = 0o700


class Goods(str, enum.Enum):
    """What is kept for others; the value begins the names of directories."""

    COPY = "peer"
    NOTE = "note"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """A whole copy: of whom, where, and what."""

    owner: int
    directory: Path
    info: SlotInfo


class Shelf:
    """See the module's text. Safe to use from several threads; one copy of each owner comes in at a time."""

    def __init__(self, directory: Path, goods: Goods = Goods.COPY) -> None:
        self._directory = directory
        self._goods = goods
        self._guard = threading.Lock()
        self._busy: set[int] = set()

    def kept(self) -> list[Kept]:
        """Every whole copy."""
        return [
            Kept(owner=owner, directory=path, info=info)
            for owner, path in self._directories()
            for info in layout.inspect(path)
            if info.certified
        ]

    def find(self, owner: int, step: int, generation: int) -> Kept | None:
        """The copy of one snapshot; of several the one that was written last."""
        found = [kept for kept in self.kept() if (kept.owner, kept.info.step) == (owner, step)]
        found = [kept for kept in found if kept.info.generation == generation]
        return max(found, key=lambda kept: kept.info.sequence, default=None)

    def has(self, owner: int, header: SlotHeader) -> bool:
        """Whether this very snapshot is here already."""
        kept = self.find(owner, header.step, header.generation)
        return kept is not None and kept.info.sequence == header.sequence

    @contextlib.contextmanager
    def receiving(self, owner: int, header: SlotHeader, base_digest: str) -> Iterator[Draft]:
        """Room for a copy that comes in; `Draft.seal` it inside.

        Raises:
            PeerUnavailable: another one of this owner is coming in.
            MemoryError, OSError: there is no room.
        """
        with self._guard:
            if owner in self._busy:
                raise PeerUnavailable(f"another snapshot of rank {owner} is being received")
            self._busy.add(owner)
        try:
            path = self._directory / f"{self._goods.value}-{owner}"
            path.mkdir(mode=_MODE, exist_ok=True)
            yield Draft(path, self._free_slot(path), header, base=_same_base(path, base_digest) if header.base else 0)
            _remove_unused_bases(path)
        finally:
            with self._guard:
                self._busy.discard(owner)

    def drop_above(self, owner: int, step: int) -> int:
        """Gives up copies of later steps, because their owner went back. Returns how many there were."""
        dropped = 0
        for kept in self.kept():
            if kept.owner == owner and kept.info.step > step:
                reserve.remove(layout.slot_path(kept.directory, kept.info.slot))
                dropped += 1
        return dropped

    def retain(self, owners: Collection[int]) -> None:
        """Removes what was taken over, and copies of ranks that others keep now. What is coming in stays."""
        with self._guard:
            expected = {f"{self._goods.value}-{owner}" for owner in {*owners, *self._busy}}
        for _, path in self._directories():
            if path.name not in expected:
                remove_directory(path)

    def free_directory(self, owner: int) -> Path:
        """A path at which a directory that is taken over may be put."""
        taken = {path.name for _, path in self._directories()}
        stem = f"{self._goods.value}-{owner}"
        number = next(number for number in range(len(taken) + 1) if f"{stem}.{number}" not in taken)
        return self._directory / f"{stem}.{number}"

    def _directories(self) -> list[tuple[int, Path]]:
        return directories(self._directory, self._goods)

    def _free_slot(self, path: Path) -> int:
        whole = {info.slot: info for info in layout.inspect(path) if info.certified}
        newest = max(whole.values(), key=lambda info: (info.generation, info.sequence), default=None)
        free = [slot for slot in _SLOTS if newest is None or slot != newest.slot]
        return min(free, key=lambda slot: slot in whole)


def directories(rank_directory: Path, goods: Goods = Goods.COPY) -> list[tuple[int, Path]]:
    """(owner, path) of the copies or notes in a rank's directory; none when it is gone."""
    try:
        entries = sorted(rank_directory.iterdir())
    except FileNotFoundError:
        return []
    found = [(match, path) for path in entries if (match := _NAME.fullmatch(path.name))]
    return [(int(match[2]), path) for match, path in found if match[1] == goods.value]


def _same_base(path: Path, base_digest: str) -> int:
    """The number of a base that is named by a whole copy and has these bytes; 0 for none."""
    for info in layout.inspect(path):
        header = layout.read_header(_page(layout.slot_path(path, info.slot)))
        facts = Facts.read(path, info.slot, header) if header is not None else None
        if header is not None and header.base and facts is not None and facts.base_digest == base_digest:
            return header.base
    return 0


def _remove_unused_bases(path: Path) -> None:
    headers = [layout.read_header(_page(slot)) for _, slot in layout.slot_files(path)]
    named = {header.base for header in headers if header is not None}
    for number, base in layout.base_files(path):
        if number not in named:
            reserve.remove(base)


def _page(path: Path) -> bytes:
    with path.open("rb", buffering=0) as file:
        return file.read(layout.PAGE_BYTES)
