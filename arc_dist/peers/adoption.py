"""Takes over what an earlier life of this job left in shared memory on this host.

All supervisors of a job end when one of them dies under torchrun, whose agents then start new ones; the memory of those
that ended stays. Each directory there has one heir: the supervisor of the same rank, or, when that rank lives elsewhere
now, a supervisor chosen by number. The heir moves the rank's own snapshots to where its own are, if they are its own,
and keeps everything else as copies for whoever asks. A live owner's lock is never broken.
"""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from arc_dist.peers.shelf import Goods, Shelf, directories
from arc_dist.snapshot import layout
from arc_dist.snapshot.directory import owned_directories, remove_directory
from arc_dist.snapshot.inheritance import Signature, is_awaited

_logger = logging.getLogger(__name__)

_PREDECESSOR_LIMIT_S = 10.0  # its children hold the lock until the kernel has ended them
_POLL_S = 0.02
# In this order: no slot may be listed before what it needs is there.
_OWN_FILES = ("base-*.bin", "facts-*.json", "record-*.bin", "saving.json", "slot-*.bin")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where this supervisor stands among those of its host.

    Attributes:
        local_rank: its number there.
        local_world_size: how many there are; 1 when it is not known, which leaves other ranks' directories alone.
    """

    local_rank: int
    local_world_size: int

    def is_heir(self, rank: int, owner: int) -> bool:
        """Whether the supervisor of `rank` inherits what the one of `owner` left."""
        if owner == rank or self.local_world_size == 1:
            return owner == rank
        first = rank - self.local_rank
        is_here = first <= owner < first + self.local_world_size
        return not is_here and owner % self.local_world_size == self.local_rank


def adopt(root: Path, own: Path, shelf: Shelf, signature: Signature, place: Place) -> list[int]:
    """Takes over every directory under `root` whose heir this supervisor is; returns their owners' ranks.

    Blocks while a predecessor of the same rank is still ending, for a bounded time.

    Args:
        root: the memory file system.
        own: this rank's new directory, signed already.
        shelf: of that directory.
        signature: this rank's.
        place: this supervisor's on its host.
    """
    taken: list[int] = []
    for path in owned_directories(root):
        left = None if path == own else Signature.read(path)
        if left is None or left.lineage != signature.lineage or not place.is_heir(signature.rank, left.rank):
            continue
        limit_s = _PREDECESSOR_LIMIT_S if left.rank == signature.rank else 0.0
        for descriptor in _locked(path / "owner", limit_s):
            if left.world_size == signature.world_size and is_awaited(path):
                _move(path, own, shelf, left.rank, is_own=left.rank == signature.rank)
                taken.append(left.rank)
            remove_directory(path)
            os.close(descriptor)
    return taken


def _move(path: Path, own: Path, shelf: Shelf, owner: int, *, is_own: bool) -> None:
    for goods in Goods:
        to = Shelf(own, goods)
        for other, kept in directories(path, goods):
            kept.rename(to.free_directory(other))
    if is_own and not layout.slot_files(own):
        target = own
    else:  # another rank's, or a second one of this rank: a start that died in the middle of this
        target = shelf.free_directory(owner)
        target.mkdir(mode=0o700)
    for pattern in _OWN_FILES:
        for file in sorted(path.glob(pattern)):
            file.rename(target / file.name)


def _locked(owner: Path, limit_s: float) -> Iterator[int]:
    """The open and locked file, once; nothing when a live process holds the lock, or somebody else was faster."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            descriptor = os.open(owner, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            if time.monotonic() >= deadline:
                if limit_s:
                    _logger.warning("%s is still in use after %.0f s; what it holds is not used", owner, limit_s)
                return
            time.sleep(_POLL_S)
            continue
        if owner.exists():
            yield descriptor
        else:
            os.close(descriptor)
        return
