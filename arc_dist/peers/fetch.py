"""Brings a rank's state to its memory: from the supervisors that a plan names.

A copy of the rank's own snapshot becomes a slot of its own directory, as if it had never left. A replica's snapshot,
and the note of what only this rank knows, go to a directory beside: the training process puts the two together, and
neither is ever taken for a snapshot of this rank. What arrives is verified before the training process is forked, which
then restores from memory as ever.
"""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from arc_dist.peers.channel import PeerUnavailable, connect
from arc_dist.peers.image import Draft, Facts, header_of
from arc_dist.peers.sender import Partner
from arc_dist.peers.server import Job
from arc_dist.peers.shelf import Goods
from arc_dist.snapshot import layout
from arc_dist.snapshot.directory import remove_directory
from arc_dist.snapshot.layout import SlotInfo

_SLOTS = (0, 1)
_BORROWED = "borrowed"  # of replicas; a directory of its own, since no snapshot there is one of this rank's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """Something to be fetched.

    Attributes:
        holder: who has it.
        goods: copy or note of this rank's snapshot; None for a replica's own snapshot.
        owner: whose snapshot it is.
        step, generation: of the snapshot.
        directory: where it is to be.
        slot: its number there; None for a free one.
    """

    holder: Partner
    goods: Goods | None
    owner: int
    step: int
    generation: int
    directory: Path
    slot: int | None = None

    def __str__(self) -> str:
        what = {Goods.COPY: "the copy", Goods.NOTE: "the note", None: "the snapshot"}[self.goods]
        return f"{what} of step {self.step} from {self.holder}"


def orders(rank: int, directory: Path, holders: Sequence[Partner], source: Mapping[str, Any], step: int) -> list[Order]:
    """What must be fetched for a source that a plan names: nothing, a copy, or a replica's snapshot or a note or both.

    Args:
        rank: this one.
        directory: of this rank.
        holders: where those listen whom the source names.
        source: this rank's in the plan.
        step: of the plan.

    Raises:
        PeerUnavailable: nobody knows where one of them listens.
    """
    wanted: list[Order] = []
    borrowed = directory / _BORROWED
    partners = {holder.rank: holder for holder in holders}
    for number, field, when in ((0, "holder", "generation"), (1, "noted_by", "noted_in")):
        if source.get(field) is None:
            continue
        holder = partners.get(int(source[field]))
        if holder is None:
            raise PeerUnavailable(f"nobody knows where the supervisor of rank {source[field]} listens")
        is_copy = field == "holder" and source["rank"] == rank
        wanted.append(
            Order(
                holder=holder,
                goods=Goods.NOTE if number else Goods.COPY if is_copy else None,
                owner=rank if number else int(source["rank"]),
                step=step,
                generation=int(source[when]),
                directory=directory if is_copy else borrowed,
                slot=None if is_copy else number,
            )
        )
    return wanted


def arrived(source: Mapping[str, Any], slots: Mapping[Goods | None, tuple[Path, int]]) -> dict[str, Any]:
    """The source when everything is here: where the training process finds what was fetched.

    Args:
        source: as the plan has it.
        slots: directory and slot of what was fetched, by what it is.
    """
    found: dict[str, Any] = {"rank": source["rank"], "shm_dir": source["shm_dir"], "slot": source["slot"]}
    for goods, (directory, slot) in slots.items():
        where = {"shm_dir": str(directory), "slot": slot}
        found |= {"note": where} if goods is Goods.NOTE else where
    return found


def fetch(job: Job, order: Order, timeout_s: float, on_connected: Callable[[socket.socket], None]) -> int:
    """Fetches a snapshot, or a note, and returns the number of the slot that it is in now.

    Args:
        job: of this supervisor.
        order: what, from whom, and where to.
        timeout_s: for each wait.
        on_connected: is given the connection, which may be shut down to end this.

    Raises:
        PeerUnavailable: the holder is gone, or has it no more.
        StoreCorrupt: other bytes came than were sent.
        MemoryError, OSError: there is no room.
    """
    holder, step, generation = order.holder, order.step, order.generation
    sock, channel = connect(holder.host, holder.port, job.token, timeout_s=timeout_s, peer=str(holder))
    with sock:
        on_connected(sock)
        channel.send(
            {
                "do": "get",
                "goods": None if order.goods is None else order.goods.value,
                "lineage": job.lineage,
                "world_size": job.world_size,
                "owner": order.owner,
                "step": step,
                "generation": generation,
            }
        )
        answer = channel.receive()
        try:
            header, facts = header_of(answer["header"]), Facts(**answer["facts"])
        except (KeyError, TypeError, ValueError) as error:
            raise PeerUnavailable(f"{holder} gave an answer that cannot be understood: {error}") from error
        if (header.step, header.generation) != (step, generation):
            raise PeerUnavailable(f"{holder} gave step {header.step} of generation {header.generation}")
        order.directory.mkdir(mode=0o700, exist_ok=True)
        held = layout.inspect(order.directory)
        sequence = 1 + max([header.sequence, *(info.sequence for info in held)])
        slot = free_slot(held, step) if order.slot is None else order.slot
        draft = Draft(order.directory, slot, dataclasses.replace(header, sequence=sequence))
        channel.receive_bytes(draft.parts)
        channel.receive()  # that it had not changed before its end
        draft.seal(facts)
    return slot


def give_back(directory: Path) -> None:
    """Removes what a rank has borrowed; views of it that are open stay what they are."""
    remove_directory(directory / _BORROWED)


def free_slot(held: Sequence[SlotInfo], step: int) -> int:
    """Where a snapshot of `step` goes: an empty slot, else a newer one, which is being given up, else the oldest."""
    by_slot = {info.slot: info for info in held}
    empty = [slot for slot in _SLOTS if slot not in by_slot]
    if empty:
        return empty[0]
    newer = [slot for slot in _SLOTS if by_slot[slot].step >= step]
    return newer[0] if newer else min(_SLOTS, key=lambda slot: by_slot[slot].sequence)
