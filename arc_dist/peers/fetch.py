"""Brings a copy back: from the supervisor that keeps it into this rank's own memory, as if it had never left.

A plan names the holder, the step and the generation. What arrives is verified and becomes a slot of the rank's own
directory before its training process is forked, which then restores from memory as ever.
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
from arc_dist.snapshot import layout
from arc_dist.snapshot.layout import SlotInfo

_SLOTS = (0, 1)


def fetch(
    job: Job,
    directory: Path,
    holder: Partner,
    source: Mapping[str, Any],
    step: int,
    timeout_s: float,
    on_connected: Callable[[socket.socket], None],
) -> int:
    """Fetches this rank's snapshot that a plan names, and returns the number of the slot that it is in now.

    Args:
        job: of this supervisor.
        directory: of this rank.
        holder: who keeps the copy.
        source: this rank's in the plan.
        step: of the plan.
        timeout_s: for each wait.
        on_connected: is given the connection, which may be shut down to end this.

    Raises:
        PeerUnavailable: the holder is gone, or keeps it no more.
        StoreCorrupt: other bytes came than were sent.
        MemoryError, OSError: there is no room.
    """
    generation = int(source["generation"])
    sock, channel = connect(holder.host, holder.port, job.token, timeout_s=timeout_s, peer=str(holder))
    with sock:
        on_connected(sock)
        channel.send(
            {
                "do": "get",
                "lineage": job.lineage,
                "world_size": job.world_size,
                "owner": job.rank,
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
        held = layout.inspect(directory)
        sequence = 1 + max([header.sequence, *(info.sequence for info in held)])
        slot = free_slot(held, step)
        draft = Draft(directory, slot, dataclasses.replace(header, sequence=sequence))
        channel.receive_bytes(draft.parts)
        channel.receive()  # that it had not changed before its end
        draft.seal(facts)
    return slot


def free_slot(held: Sequence[SlotInfo], step: int) -> int:
    """Where a snapshot of `step` goes: an empty slot, else a newer one, which is being given up, else the oldest."""
    by_slot = {info.slot: info for info in held}
    empty = [slot for slot in _SLOTS if slot not in by_slot]
    if empty:
        return empty[0]
    newer = [slot for slot in _SLOTS if by_slot[slot].step >= step]
    return newer[0] if newer else min(_SLOTS, key=lambda slot: by_slot[slot].sequence)
