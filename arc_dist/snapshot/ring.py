"""The ring of snapshot slots of one rank.

Which slot a capture replaces is one pure rule, `choose_slot`:

1. never one that is pinned (a writer thread streams it to the store, or a restore reads it);
2. never the only certified one: until another is certified, it is all there is to go back to;
3. of the others: an empty or torn one, else an older state of the same step, else the oldest step.

When no slot is left, nothing is captured; `SnapshotRing.capture` returns None and `refusal` says why. With two slots
that is the case while the certified one is kept by rule 2 and the other is pinned.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from arc_dist.checkpoint_store.format import TensorSpec
from arc_dist.config import Env
from arc_dist.errors import ConfigError
from arc_dist.snapshot import layout
from arc_dist.snapshot.base import Bases
from arc_dist.snapshot.directory import OwnedDirectory
from arc_dist.snapshot.form import Form
from arc_dist.snapshot.incremental import Sharing
from arc_dist.snapshot.layout import SlotInfo
from arc_dist.snapshot.plan import Plan
from arc_dist.snapshot.slot import Slot, Snapshot, pack_small, read_peer

_logger = logging.getLogger(__name__)


def choose_slot(slots: Mapping[int, SlotInfo | None], pinned: Collection[int], step: int) -> tuple[int | None, str]:
    """Which slot a snapshot of `step` may replace, by the rule above, and why.

    Args:
        slots: what each slot holds; None when it is empty or torn.
        pinned: slots that must not change.
        step: that is to be captured.
    """
    certified = [number for number, info in slots.items() if info is not None and info.certified]
    kept = set(pinned) | (set(certified) if len(certified) == 1 else set())
    free = [number for number in slots if number not in kept]
    if not slots:
        return None, "the ring is closed"
    if not free:
        return None, (
            f"of {len(slots)} slots {sorted(pinned)} are being read and {sorted(kept - set(pinned))} holds the only "
            "certified snapshot"
        )
    empty = [number for number in free if slots[number] is None]
    if empty:
        return min(empty), "empty"

    def age(number: int) -> tuple[bool, int, int]:
        info = slots[number]
        assert info is not None
        return info.step != step, info.step, info.sequence

    chosen = min(free, key=age)
    info = slots[chosen]
    assert info is not None
    return chosen, "the same step" if info.step == step else f"the oldest, step {info.step}"


class SnapshotRing:
    """Snapshots in shared memory that outlives the process. Made on first use; one thread captures.

    Args:
        directory: this rank's directory, made by its supervisor. None makes a private one that is removed by `close`,
            or by the next job of the same user when this process dies.
        slots: number of slots; each takes as much memory as the state has bytes, or less: see `form`.
        root: the memory file system for a private directory; default: what ARC_SHM_ROOT says.
        form: how snapshots are held; not `Form.AUTO`. What an earlier process held in another form can be read.
        replica_key: of this rank's state (replicas.py).
        rounds: with `Form.BF16`: says by name which tensors are rounded, if they are wider than 16 bit.

    Memory is reserved at the first capture and when the state grows (after the optimizer's first step). What the
    memory file system cannot hold goes to $TMPDIR, with a warning.
    """

    def __init__(
        self,
        directory: Path | str | None = None,
        *,
        slots: int = 2,
        root: Path | None = None,
        form: Form = Form.FULL,
        replica_key: int = 0,
        rounds: Callable[[str], bool] | None = None,
    ) -> None:
        if slots < 2:
            raise ConfigError(f"slots={slots}: at least 2 are needed, one trusted while another is proven", slots=slots)
        assert form is not Form.AUTO, "a form must have been chosen"
        assert (form is Form.BF16) == (rounds is not None)
        self.refusal: str | None = None  # why the last capture was refused, None when it was not
        self._given = None if directory is None else Path(directory)
        self._root = root
        self._num_slots = slots
        self._owned: OwnedDirectory | None = None
        self._form = form
        self._rounds = rounds
        self.replica_key = replica_key
        self._sharing: Sharing | None = None
        self._slots: dict[int, Slot] = {}
        self._closed = False
        self._pins: Counter[int] = Counter()
        self._lock = threading.Lock()  # over pins and the choice of a slot
        self._plan: Plan | None = None

    # ------------------------------------------------------------------ taking snapshots

    def capture(
        self,
        step: int,
        generation: int,
        specs: list[TensorSpec],
        tensors: list[torch.Tensor],
        small: dict[str, Any],
        *,
        parting: bool = False,
    ) -> int | None:
        """Copies a state into a slot and returns its number, or None when nothing was captured (see `refusal`).

        Blocks for the time of the copy. A process that dies in the middle leaves the slot torn, which nobody lists.

        Args:
            step: updates that the state contains.
            generation: of this process.
            specs: of the tensors; hand in the same list object as long as it is the same state, and it is fast.
            tensors: local tensors, in the specs' order, on any device.
            small: small objects, for the codec.
            parting: this rank has lost a peer; see layout.py.
        """
        plan = self._plan
        if plan is None or plan.specs is not specs:
            plan = self._plan = Plan(specs, rounds=self._rounds)
        plan.require_fit(tensors)
        blob = pack_small(small)
        slots = self._open()
        infos = {number: slot.info() for number, slot in slots.items()}
        sharing = self._sharing
        if sharing is not None:
            sharing.compare(plan, tensors, step)
        with self._lock:
            chosen, reason = choose_slot(infos, list(self._pins), step)
            if chosen is None:
                self.refusal = reason
                return None
            slots[chosen].drop()  # a pin that comes now must not find the old snapshot
        if sharing is not None:
            plan = sharing.place(plan, tensors, slots[chosen])
        sequence = 1 + max((info.sequence for info in infos.values() if info is not None), default=0)
        written = slots[chosen].write(
            plan,
            tensors,
            blob,
            step=step,
            generation=generation,
            parting=parting,
            sequence=sequence,
            replica_key=self.replica_key,
        )
        if sharing is not None:
            sharing.remove_unused()
        if not written:
            self.refusal = f"no room for {plan.tensor_bytes / 1e6:.1f} MB in memory or in {tempfile.gettempdir()}"
            _logger.error("no snapshot of step %d: %s. Training goes on with less protection", step, self.refusal)
            return None
        self.refusal = None
        return chosen

    def certify(self, step: int) -> int | None:
        """Marks the newest snapshot of `step` as trusted and returns its slot; None when it is held no more."""
        newest = max((info for info in self.held() if info.step == step), key=lambda i: i.sequence, default=None)
        if newest is None:
            return None
        self._slots[newest.slot].certify()
        return newest.slot

    def drop(self, slot: int) -> None:
        """Gives a snapshot up. If it is pinned its bytes stay untouched until it is unpinned."""
        self._open()[slot].drop()

    def drop_after(self, step: int) -> list[int]:
        """Gives up what is newer than `step`, because training goes on from there in another way."""
        dropped = [info.slot for info in self.held() if info.step > step]
        for slot in dropped:
            self._slots[slot].drop()
        return dropped

    # ------------------------------------------------------------------ reading them

    def held(self) -> list[SlotInfo]:
        """The valid snapshots, by slot."""
        return [info for slot in self._open().values() if (info := slot.info()) is not None]

    def tensors(self, slot: int) -> tuple[list[TensorSpec], list[torch.Tensor]]:
        """Specs and views of a held snapshot, without its small objects. The views change with the slot."""
        return self._held(slot).tensors()

    def restore(self, slot: int) -> Snapshot:
        """A held snapshot: ``specs, tensors, small = ring.restore(slot)``.

        The tensors are views of the slot: copy them before the next capture, or pin the slot.

        Raises:
            ConfigError: the slot holds no valid snapshot.
            SlotDamaged: its table or small objects are not what was written.
        """
        return self._held(slot).snapshot()

    @staticmethod
    def open_peer(directory: Path | str, slot: int) -> Snapshot:
        """A snapshot of another process of this host, dead or alive, that cannot be changed through it.

        A live owner may overwrite it: call `Snapshot.check` after copying.

        Raises:
            ConfigError: the slot holds no valid snapshot.
            SlotDamaged: its table or small objects are not what was written.
        """
        path = layout.slot_path(Path(directory), slot)
        try:
            snapshot = read_peer(path, slot)
        except FileNotFoundError:
            snapshot = None
        if snapshot is None:
            raise ConfigError(f"{path} holds no valid snapshot. Use one that `inspect` lists.", path=str(path))
        return snapshot

    def pin(self, slot: int) -> None:
        """Keeps a slot from being overwritten. Pins add up; call `unpin` as often. Safe from any thread."""
        with self._lock:
            self._pins[slot] += 1

    def unpin(self, slot: int) -> None:
        """Takes one pin away. Safe from any thread."""
        with self._lock:
            assert self._pins[slot] > 0, f"slot {slot} is not pinned"
            self._pins[slot] -= 1
            if not self._pins[slot]:
                del self._pins[slot]

    def close(self) -> None:
        """Unmaps the slots, and removes the directory if it is this ring's own. A given one stays as it is.

        A closed ring holds nothing and refuses to capture.
        """
        self._closed = True
        for slot in self._slots.values():
            slot.close()
        self._slots, self._sharing = {}, None
        if self._owned is not None:
            self._owned.close()
            self._owned = None

    def _held(self, slot: int) -> Slot:
        found = self._open().get(slot)
        if found is None or found.info() is None:
            raise ConfigError(f"slot {slot} holds no valid snapshot. Use one that `held` lists.", slot=slot)
        return found

    def _open(self) -> dict[int, Slot]:
        if not self._slots and not self._closed:
            if self._given is None:
                self._owned = own_directory(self._root if self._root is not None else Env.read().shm_root, "ring")
                path = self._owned.path
            else:
                path = self._given
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            # What an earlier generation left is adopted, also when it had more slots.
            numbers = set(range(self._num_slots)) | {number for number, _ in layout.slot_files(path)}
            bases = Bases(path)
            self._slots = {
                number: Slot(
                    layout.slot_path(path, number),
                    number,
                    bases,
                    on_disk=self._form is Form.DISK,
                    compact=self._form is Form.INCREMENTAL,
                )
                for number in sorted(numbers)
            }
            if self._form is Form.INCREMENTAL:
                self._sharing = Sharing(bases, self._slots)
        return self._slots


def own_directory(root: Path, label: str) -> OwnedDirectory:
    """A private directory under `root`, or under $TMPDIR, with a warning, where `root` cannot be used."""
    try:
        return OwnedDirectory(root, label)
    except OSError as error:
        fallback = Path(tempfile.gettempdir())
        _logger.warning(
            "%s cannot be used for snapshots (%s); they go to %s, where they are slower. Name a memory file system in "
            "ARC_SHM_ROOT",
            root,
            error.strerror,
            fallback,
        )
        return OwnedDirectory(fallback, label)
