"""What snapshots have in common: found by comparing bytes, held once in a base, moved out when it changes.

The first snapshot holds everything. A tensor whose bytes are those of an earlier snapshot of another step, or of the
base, is the base's from then on: frozen layers, the matrices under LoRA's, embeddings that no batch touches, and what
their optimizers keep. All is decided by bytes at each capture; no flag of a parameter is asked.

**Memory.** Let S be the bytes of the state, U of them in a base, and n the slots: n slots and a base that fits take
U + n (S - U). While slots that were written with another base wait to be replaced, each base is named by one slot at
least, so all together never takes more than n S and 1/8 of that, which the bases may have stale (`choose_members`).
To keep that also in the middle of a capture, the slot that is to be replaced gives its memory up before a new base is
made.
"""

from __future__ import annotations

import ctypes
import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence

import torch

from arc_dist.checkpoint_store.format import TensorSpec
from arc_dist.snapshot import layout
from arc_dist.snapshot.base import BaseFile, Bases
from arc_dist.snapshot.layout import SlotDamaged
from arc_dist.snapshot.plan import Plan
from arc_dist.snapshot.slot import Slot, copy_in

_logger = logging.getLogger(__name__)

_SLACK = 8  # a base may be stale, or too small, by this fraction of its bytes before it is made anew
_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memcmp.restype = ctypes.c_int


@dataclasses.dataclass(frozen=True)
class Membership:
    """Which tensors a base shall hold.

    Attributes:
        members: indices of the tensors that are taken from the base.
        is_new: they are to be written to a new base; else the present one holds them all.
    """

    members: tuple[int, ...]
    is_new: bool


def choose_members(
    nbytes: Sequence[int], present: Collection[int], base_bytes: int, same: Collection[int]
) -> Membership:
    """Which tensors the base holds from now on.

    A new base is made only when it pays: a copy of it costs as much as a snapshot of as many bytes. So the bytes held
    twice (stale in the base, and in the slots), or in each slot although they could be shared, stay below 1/8 of it.

    Args:
        nbytes: of each tensor of the state.
        present: indices of those that the present base holds the current bytes of.
        base_bytes: of all tensors in the present base, stale ones included; 0 without one.
        same: indices of the tensors that have not changed since the base or an earlier snapshot; includes `present`.
    """
    kept = sum(nbytes[index] for index in present)
    stale = base_bytes - kept
    missed = sum(nbytes[index] for index in same) - kept
    if stale + missed <= max(base_bytes // _SLACK, layout.PAGE_BYTES):
        return Membership(tuple(sorted(present)), is_new=False)
    return Membership(tuple(sorted(same)), is_new=True)


class Sharing:
    """The base that a ring's captures share. One thread uses it, and per capture calls its methods in their order.

    Args:
        bases: of the ring's directory.
        slots: of the ring; the newest valid one says which base to go on with.
    """

    def __init__(self, bases: Bases, slots: Mapping[int, Slot]) -> None:
        self._bases = bases
        self._slots = slots
        self._base: BaseFile | None = None
        self._held: dict[TensorSpec, int] = {}  # byte offset in the base
        self._held_bytes = 0  # of the tensors in the base, stale ones included
        self._plan: Plan | None = None  # of the last capture
        self._present: dict[int, int] = {}
        self._same: set[int] = set()
        newest = self._newest()
        plan = self._plan_of(newest) if newest is not None else None
        if plan is not None and plan.base is not None:
            self._base = plan.base
            self._held = {plan.specs[index]: offset for index, offset in plan.places.items()}
            self._held_bytes = sum(plan.entries[index].nbytes for index in plan.places)

    def compare(self, whole: Plan, tensors: Sequence[torch.Tensor], step: int) -> None:
        """Finds what has not changed since the base or the newest snapshot of another step. Changes nothing.

        Each byte is read once, up to the first difference in its tensor.
        """
        newest = self._newest(but=step)
        earlier: dict[TensorSpec, torch.Tensor] = {}
        if newest is not None and self._plan_of(newest) is not None:
            earlier = dict(zip(*newest.tensors(), strict=True))
        self._present, self._same = {}, set()
        for index, (spec, tensor) in enumerate(zip(whole.specs, tensors, strict=True)):
            if not tensor.numel():
                continue
            offset = self._held.get(spec)
            base = self._base if offset is not None else None
            held = earlier.get(spec)
            if base is not None and same_bytes(tensor, base.view(offset or 0, tensor.dtype, tensor.shape)):
                self._present[index] = offset or 0
                self._same.add(index)
            elif held is not None and same_bytes(tensor, held):
                self._same.add(index)

    def place(self, whole: Plan, tensors: Sequence[torch.Tensor], slot: Slot) -> Plan:
        """The plan by which the state that was compared is to be written to `slot`, which holds nothing any more."""
        nbytes = [entry.nbytes for entry in whole.entries]
        chosen = choose_members(nbytes, self._present, self._held_bytes, self._same)
        places = self._present
        if chosen.is_new:
            slot.release()
            self._base, self._held, self._held_bytes = None, {}, 0
            self.remove_unused()
            places = self._make(whole, tensors, chosen.members)
        base = self._base if places else None
        plan = self._plan
        if plan is None or plan.specs is not whole.specs or plan.base is not base or plan.places != places:
            plan = self._plan = Plan(whole.specs, base=base, places=places)
        return plan

    def remove_unused(self) -> None:
        """Removes the bases that no valid slot names, but for the one in use."""
        named = {slot.base_number() for slot in self._slots.values()}
        self._bases.remove_all_but(named | {self._base.number if self._base is not None else 0})

    def _make(self, whole: Plan, tensors: Sequence[torch.Tensor], members: Sequence[int]) -> dict[int, int]:
        """Fills a new base; returns each member's offset, nothing when there are none or no room is left."""
        places: dict[int, int] = {}
        end = 0
        for index in members:
            places[index] = end
            end += layout.align(whole.entries[index].nbytes)
        base = self._bases.make(end) if members else None
        if base is None:
            return {}
        views = [base.view(places[index], whole.dtypes[index], whole.entries[index].shape) for index in members]
        copy_in(views, [tensors[index] for index in members])
        self._base = base
        self._held = {whole.specs[index]: offset for index, offset in places.items()}
        self._held_bytes = sum(whole.entries[index].nbytes for index in members)
        return places

    def _newest(self, but: int | None = None) -> Slot | None:
        infos = [info for slot in self._slots.values() if (info := slot.info()) is not None and info.step != but]
        return self._slots[max(infos, key=lambda info: info.sequence).slot] if infos else None

    def _plan_of(self, slot: Slot) -> Plan | None:
        try:
            return slot.plan()
        except SlotDamaged as error:
            _logger.warning("a snapshot is not compared with: %s", error)
            return None


def same_bytes(live: torch.Tensor, held: torch.Tensor) -> bool:
    """Whether a live tensor has exactly the bytes of a held one: -0.0 is not 0.0, and a NaN is itself."""
    if live.dtype != held.dtype:
        return False  # an earlier process held it rounded
    with torch.no_grad():
        plain = live.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return _memcmp(plain.data_ptr(), held.data_ptr(), plain.numel() * plain.element_size()) == 0
