"""The record of the last step boundaries: what a rank knows of a step beside its tensors, kept at every step.

A snapshot is taken every so many steps. When a DDP rank dies, a surviving replica has all tensors of the last
committed step; what it cannot know is the dead rank's random state (and its batch norm statistics). Each rank leaves
these here, in shared memory, before it takes part in the vote on a step. Two files take turns, so a process that dies
while writing one leaves the other, and both the step being voted on and the one before are at hand.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch

from arc_dist.snapshot import layout
from arc_dist.snapshot.layout import SlotState
from arc_dist.snapshot.rng import RngState, pack_rng
from arc_dist.snapshot.tensors import bytes_of, tensor_of

_MAGIC = int.from_bytes(b"ARCREC2\x00", "little")
# Words of the head: magic, state, sequence, step, bytes of RNG, of the table of buffers, of the buffers, of the mark;
# the replica key.
_STATE, _SEQUENCE, _STEP, _RNG, _TABLE, _BUFFERS, _MARK, _KEY = range(1, 9)
_HEAD_BYTES = 128
_WORDS = struct.Struct("@9Q")
_CAPACITY_BYTES = 32 << 10
_NUM_COPIES = 2


@dataclasses.dataclass(frozen=True)
class Entry:
    """What was recorded of one step.

    Attributes:
        step: updates applied when the step is committed.
        rng: the random state then, as `restore_rng` takes it.
        buffers: buffers that the forward pass changed, by full name.
        mark: where the rank's own data stood.
    """

    step: int
    rng: bytes
    buffers: dict[str, torch.Tensor]
    mark: bytes = b""


class StepRecord:
    """Writes and reads the records of one rank; about 20 us per write, most of it for the random state.

    Args:
        directory: the rank's shared-memory directory. What an earlier process recorded there can be read.
        replica_key: of the rank's state (replicas.py), for those who find the records.
    """

    def __init__(self, directory: Path | str, replica_key: int = 0) -> None:
        self._replica_key = replica_key
        self._directory = Path(directory)
        self._copies: list[_Copy] = []
        self._sequence = 0
        self._names: tuple[str, ...] = ()
        self._table = b""

    def write(
        self,
        step: int,
        rng: RngState | bytes,
        buffers: Mapping[str, torch.Tensor] | None = None,
        mark: bytes = b"",
    ) -> None:
        """Records a step in place of the older of the two recorded.

        Args:
            step: updates applied once the step is committed.
            rng: the random state then.
            buffers: `TrainingState.moving_buffers`.
            mark: of the data, as `BatchSource.mark` gives it.
        """
        copies = self._open()
        packed = rng if isinstance(rng, bytes) else pack_rng(rng)
        table, data = self._pack(buffers) if buffers else (b"", b"")
        sequence = self._sequence + 1
        copies[sequence % _NUM_COPIES].write(step, sequence, self._replica_key, packed, table, data, mark)
        self._sequence = sequence

    def read(self, step: int) -> Entry | None:
        """What was recorded of exactly this step; None when nothing was, or no more."""
        found = [copy for copy in self._open() if copy.holds(step)]
        return max(found, key=_Copy.sequence).read() if found else None

    def steps(self) -> list[int]:
        """The recorded steps, newest record first."""
        valid = [copy for copy in self._open() if copy.is_valid()]
        return [copy.step() for copy in sorted(valid, key=_Copy.sequence, reverse=True)]

    def replica_key(self) -> int:
        """The replica key of the process that wrote the newest record; 0 without one."""
        valid = [copy for copy in self._open() if copy.is_valid()]
        return max(valid, key=_Copy.sequence).replica_key() if valid else 0

    def close(self) -> None:
        """Unmaps the files; they stay."""
        for copy in self._copies:
            copy.close()
        self._copies = []

    def _pack(self, buffers: Mapping[str, torch.Tensor]) -> tuple[bytes, bytes]:
        names = tuple(buffers)
        parts = [bytes_of(tensor) for tensor in buffers.values()]
        if names != self._names:
            rows = [
                [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), len(part)]
                for (name, tensor), part in zip(buffers.items(), parts, strict=True)
            ]
            self._names, self._table = names, json.dumps(rows).encode()
        return self._table, b"".join(parts)

    def _open(self) -> list[_Copy]:
        if not self._copies:
            self._copies = [_Copy(self._directory / f"record-{index}.bin") for index in range(_NUM_COPIES)]
            self._sequence = max((copy.sequence() for copy in self._copies if copy.is_valid()), default=0)
        return self._copies


def recorded_steps(directory: Path) -> tuple[list[int], int]:
    """The steps that an earlier process recorded in a rank's directory, and that process's replica key."""
    if not (directory / "record-0.bin").exists():
        return [], 0  # looking must not make any
    record = StepRecord(directory)
    try:
        return record.steps(), record.replica_key()
    finally:
        record.close()


class _Copy:
    """One of the two files, mapped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._map(_CAPACITY_BYTES)

    def _map(self, nbytes: int) -> None:
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            nbytes = layout.align(max(nbytes, os.fstat(descriptor).st_size), layout.PAGE_BYTES)
            os.posix_fallocate(descriptor, 0, nbytes)  # no SIGBUS later
            self._buffer = memoryview(mmap.mmap(descriptor, nbytes))
        finally:
            os.close(descriptor)
        self._words = self._buffer[:_HEAD_BYTES].cast("Q")

    def write(
        self, step: int, sequence: int, replica_key: int, rng: bytes, table: bytes, data: bytes, mark: bytes
    ) -> None:
        payload = b"".join((rng, table, data, mark))
        self._words[_STATE] = SlotState.WRITING
        if _HEAD_BYTES + len(payload) > len(self._buffer):
            self.close()
            self._map(2 * (_HEAD_BYTES + len(payload)))
        self._buffer[_HEAD_BYTES : _HEAD_BYTES + len(payload)] = payload
        words = self._words
        lengths = (len(rng), len(table), len(data), len(mark))
        _WORDS.pack_into(self._buffer, 0, _MAGIC, SlotState.WRITING, sequence, step, *lengths, replica_key)
        words[_STATE] = SlotState.VALID

    def is_valid(self) -> bool:
        return self._words[0] == _MAGIC and self._words[_STATE] == SlotState.VALID

    def holds(self, step: int) -> bool:
        return self.is_valid() and self._words[_STEP] == step

    def step(self) -> int:
        return self._words[_STEP]

    def sequence(self) -> int:
        return self._words[_SEQUENCE]

    def replica_key(self) -> int:
        return self._words[_KEY]

    def read(self) -> Entry:
        words = self._words
        start = _HEAD_BYTES + words[_RNG]
        rng = bytes(self._buffer[_HEAD_BYTES:start])
        table_end = start + words[_TABLE]
        rows = json.loads(bytes(self._buffer[start:table_end])) if words[_TABLE] else []
        buffers: dict[str, torch.Tensor] = {}
        for name, dtype, shape, nbytes in rows:
            buffers[name] = tensor_of(self._buffer[table_end : table_end + nbytes], dtype, shape)
            table_end += nbytes
        return Entry(words[_STEP], rng, buffers, bytes(self._buffer[table_end : table_end + words[_MARK]]))

    def close(self) -> None:
        self._words.release()
        self._buffer.release()
