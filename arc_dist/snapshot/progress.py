"""The progress page: where in its step a training process is, since when, and for how long it may be there.

It lies beside the status page in the rank's shared-memory directory (layout.py says what a torn write is). The training
process writes a section change into one of two copies and then the number of writes, as the status page does; there is
no system call and no lock in that. Its supervisor reads it while the process runs, hangs or is stopped.

::

    word 0        number of writes; copy `writes % 2` is the newest
    words 8, 16   the copies: section, index, step, since (ns, monotonic), limit (ns)
    words 24-31   what changes seldom, see `_Word`
    words 32-     per section, in this order: time spent (ns), CPU time of the training thread (ns), limit (ns)
    bytes 1792-   names of the sections that the user named
"""

from __future__ import annotations

import dataclasses
import enum
import mmap
import os
import struct
from pathlib import Path

from arc_dist.protocol.hangs import LABELS, LEARNED, Section
from arc_dist.snapshot.layout import PAGE_BYTES

FIRST_NAMED = 16  # index of the first section that the user named; lower ones are those of `Section`
NUM_INDEXES = 64
TIME, CPU, LIMIT = 32, 96, 160  # first words of the tables
COPY = struct.Struct("@5q")
COPY_BYTES = 64  # distance of the two copies, and of the first from the page's start
_NAMES = 1792
_NAME_BYTES = 48
_FILE = "progress"
_READ_ATTEMPTS = 1000


class Word(enum.IntEnum):
    """Index of the words that change seldom."""

    GENERATION = 24
    PID = 25
    THREAD = 26  # `threading.get_ident()` of the training thread
    STOP_LIMIT_NS = 27  # how long the process may be stopped, wherever it is; 0: for ever
    STRAGGLER_FACTOR = 28  # times 1000
    STEPS = 29  # begun by this process
    SHARDED = 30  # 1: there are collectives in the forward pass, too
    MEASURED = 31  # steps whose CPU time was counted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """One reading of the page; times in nanoseconds.

    Attributes:
        writes: grows with each change of the section.
        section: which part of the step.
        name: of it, or of the user's section inside it.
        step: the step that is attempted.
        since_ns: `time.monotonic_ns()` of the beginning, without the time of sections inside it that are over.
        limit_ns: how long it may be there; 0 for ever.
    """

    writes: int
    section: Section
    name: str
    step: int
    since_ns: int
    limit_ns: int
    generation: int
    pid: int
    thread: int
    stop_limit_ns: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spent:
    """What a process has spent so far, by the name of the section. `cpu_ns` is of `measured` of the `steps` only."""

    steps: int
    measured: int
    time_ns: dict[str, int]
    cpu_ns: dict[str, int]
    limit_ns: dict[str, int]
    straggler_factor: float
    sharded: bool


class ProgressPage:
    """The page, mapped. One writer, any number of readers.

    Attributes:
        buffer: all bytes, writable.
        words: the same as 8-byte integers.
    """

    def __init__(self, mapping: mmap.mmap) -> None:
        self.buffer = mapping
        self.words = memoryview(mapping).cast("q")

    @classmethod
    def anonymous(cls) -> ProgressPage:
        """A page that nobody else reads, for a process without a supervisor."""
        return cls(mmap.mmap(-1, PAGE_BYTES))

    @classmethod
    def create(cls, directory: Path) -> ProgressPage:
        """Creates the page of a directory, or empties an existing one."""
        descriptor = os.open(directory / _FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, PAGE_BYTES)
            page = cls(mmap.mmap(descriptor, PAGE_BYTES))
        finally:
            os.close(descriptor)
        page.clear()
        return page

    @classmethod
    def open(cls, directory: Path) -> ProgressPage:
        """Opens the page of a directory.

        Raises:
            FileNotFoundError: nobody has created it.
        """
        descriptor = os.open(directory / _FILE, os.O_RDWR | os.O_CLOEXEC)
        try:
            return cls(mmap.mmap(descriptor, PAGE_BYTES))
        finally:
            os.close(descriptor)

    def clear(self) -> None:
        """Nothing is known of the process that comes next. Only while none runs."""
        self.buffer[:] = bytes(PAGE_BYTES)

    def set_name(self, index: int, name: str) -> None:
        """Names a section of the user's; before its index is written anywhere else."""
        raw = name.encode()[:_NAME_BYTES]
        start = _NAMES + (index - FIRST_NAMED) * _NAME_BYTES
        self.buffer[start : start + _NAME_BYTES] = raw.ljust(_NAME_BYTES, b"\0")

    def name(self, index: int) -> str:
        """The name of a section."""
        if index < FIRST_NAMED:
            return LABELS[Section(index)]
        start = _NAMES + (index - FIRST_NAMED) * _NAME_BYTES
        raw = bytes(self.buffer[start : start + _NAME_BYTES])
        return raw.rstrip(b"\0").decode(errors="replace")

    def mean_step_s(self) -> float:
        """How long a step of this process takes on average, without the script's own code; 0 before the first."""
        words = self.words
        spent_ns = sum(words[TIME + section] for section in LEARNED)
        return spent_ns / 1e9 / max(1, words[Word.STEPS])

    def read(self) -> Progress:
        """The newest whole copy. A reader overtaken by two writes tries again, a bounded number of times."""
        words, writes = self.words, 0
        section, index, step, since_ns, limit_ns = 0, 0, 0, 0, 0
        for _ in range(_READ_ATTEMPTS):
            writes = words[0]
            section, index, step, since_ns, limit_ns = COPY.unpack_from(self.buffer, COPY_BYTES * (1 + writes % 2))
            if words[0] == writes:
                break
        return Progress(
            writes=writes,
            section=Section(section),
            name=self.name(index),
            step=step,
            since_ns=since_ns,
            limit_ns=limit_ns,
            generation=words[Word.GENERATION],
            pid=words[Word.PID],
            thread=words[Word.THREAD],
            stop_limit_ns=words[Word.STOP_LIMIT_NS],
        )

    def spent(self) -> Spent:
        """What was spent in each section so far."""
        words = self.words
        used = [index for index in range(NUM_INDEXES) if words[TIME + index] or words[LIMIT + index]]
        return Spent(
            steps=words[Word.STEPS],
            measured=words[Word.MEASURED],
            time_ns={self.name(index): words[TIME + index] for index in used},
            cpu_ns={self.name(index): words[CPU + index] for index in used if words[CPU + index]},
            limit_ns={self.name(index): words[LIMIT + index] for index in used if words[LIMIT + index]},
            straggler_factor=words[Word.STRAGGLER_FACTOR] / 1000,
            sharded=words[Word.SHARDED] == 1,
        )

    def close(self) -> None:
        """Unmaps the page; the file stays."""
        self.words.release()
        self.buffer.close()
