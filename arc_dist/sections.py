"""Says where in its step this rank is, and learns how long it usually is there.

A section change costs well under a microsecond (`benchmarks/bench_progress.py`): a clock, a sum, a comparison, and a
few words in memory that the supervisor reads.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from arc_dist.errors import ConfigError
from arc_dist.protocol.hangs import BLOCK_STEPS, ENOUGH_STEPS, NUM_SECTIONS, WARM_UP_STEPS, HangPolicy, Longest, Section
from arc_dist.snapshot.progress import COPY, COPY_BYTES, CPU, FIRST_NAMED, LIMIT, NUM_INDEXES, TIME, ProgressPage, Word

_MAX_NAME_BYTES = 48
_ENOUGH_STAYS = 2  # in a section that the user named; the first may have to compile or load something
_KEPT_STAYS = 16
_NS = 1_000_000_000

_OFFSETS = (COPY_BYTES, 2 * COPY_BYTES)  # of the copies
_STEPS, _MEASURED = int(Word.STEPS), int(Word.MEASURED)
_MEASURED_EVERY = 8
_LONG_STEP_NS = 5_000_000  # what a system call costs does not matter in longer ones
_clock = time.monotonic_ns
_cpu_clock = time.thread_time_ns


class Sections:
    """The progress of one rank's training thread. `attach` gives it its page; before, it writes where nobody reads.

    Args:
        policy: how long a rank may be in a section.
        straggler_factor: handed to whoever compares the ranks.
    """

    def __init__(self, policy: HangPolicy, straggler_factor: float) -> None:
        self._policy = policy
        self._straggler_factor = straggler_factor
        self._longest = [Longest() for _ in range(NUM_SECTIONS)]
        self._warm = [Longest() for _ in range(NUM_SECTIONS)]  # over the first steps of processes
        self._bounds = [0] * NUM_INDEXES  # of the present block; what is longer goes the slow way
        self._limits = [0] * NUM_INDEXES
        self._stays: dict[str, deque[int]] = {}
        self._indexes: dict[str, int] = {}
        self._outer: list[tuple[int, int, int, int]] = []  # (section, index, time so far, limit) around a named section
        self._num_learned = 0  # steps learned from, also before a restart
        self._steps = 0
        self._housekeeping_at = WARM_UP_STEPS
        self._warming_up = True
        self._section, self._index, self._step = int(Section.NONE), int(Section.NONE), 0
        self._since = _clock()
        self._began = self._since  # of the step
        self._is_measured = False
        self._cpu = 0  # processor time at the last `enter_computing` of this step
        self._use(ProgressPage.anonymous())

    def _use(self, page: ProgressPage) -> None:
        self._page = page
        self._buffer, self._words = page.buffer, page.words
        self._writes = self._words[0]

    def attach(self, directory: Path | None, generation: int) -> None:
        """Begins to write where the supervisor reads; nothing without one. Call it in the thread that trains."""
        self._pid, self._thread = os.getpid(), threading.get_ident()
        if directory is None or self.is_attached:
            return
        self._use(ProgressPage.open(directory))
        words = self._words
        words[Word.GENERATION], words[Word.PID], words[Word.THREAD] = generation, self._pid, self._thread
        words[Word.STRAGGLER_FACTOR] = int(1000 * self._straggler_factor)
        if self._policy.deadline_s != 0:
            words[Word.STOP_LIMIT_NS] = int((self._policy.deadline_s or self._policy.min_s) * _NS)
        for name, index in self._indexes.items():
            self._page.set_name(index, name)
        self._set_limits()
        self.is_attached = True

    is_attached = False
    _pid = 0
    _thread = 0

    # ------------------------------------------------------------------ in each step

    def begin_step(self, step: int, section: int) -> None:
        """The attempt of step `step` begins with `section`."""
        self._steps += 1
        self._words[_STEPS] = self._steps
        if self._steps >= self._housekeeping_at:
            self._keep_house()
        self._step = step
        self.enter(section)
        began = self._since
        if self._steps % _MEASURED_EVERY == 0 or began - self._began > _LONG_STEP_NS:
            self._is_measured = True
            self._words[_MEASURED] += 1
        else:
            self._is_measured = False
        self._began, self._cpu = began, 0

    def enter(self, section: int) -> None:
        """What was going on is over, and `section` (not a named one) begins."""
        now = _clock()
        index, words = self._index, self._words
        stay = now - self._since
        words[TIME + index] += stay
        if stay > self._bounds[index]:
            self._grew(index, stay)
        self._section = self._index = section
        self._since = now
        writes = self._writes = self._writes + 1
        COPY.pack_into(self._buffer, _OFFSETS[writes & 1], section, section, self._step, now, self._limits[section])
        words[0] = writes

    def enter_computing(self, section: int) -> None:
        """Like `enter`, before and after each part of a step that computes.

        Between two calls of a step this thread's processor time is counted, in some of the steps only: that clock is a
        system call.
        """
        if self._is_measured:
            cpu = _cpu_clock()
            if self._cpu:
                self._words[CPU + self._index] += cpu - self._cpu
            self._cpu = cpu
        self.enter(section)

    @property
    def present(self) -> int:
        """The section of the step at hand, also while one that the user named goes on inside it."""
        return self._section

    # ------------------------------------------------------------------ the user's sections

    @contextlib.contextmanager
    def named(self, name: str, deadline_s: float | None) -> Iterator[None]:
        """A section inside the present one. Its time does not count as that of the one around it.

        In another thread or process than the one that trains it does nothing.
        """
        if deadline_s is not None and not deadline_s >= 0:
            raise ConfigError(f"section({name!r}, deadline_s={deadline_s!r}): must be 0 (no limit) or more.")
        if not isinstance(name, str) or not name or len(name.encode()) > _MAX_NAME_BYTES:
            raise ConfigError(f"section({name!r}): a name is a text of 1 to {_MAX_NAME_BYTES} bytes.")
        if os.getpid() != self._pid or threading.get_ident() != self._thread:
            yield
            return
        index = self._index_of(name)
        limit_s = self._policy.named_s(self._longest_s(name), deadline_s)
        began = _clock()
        self._outer.append((self._section, self._index, began - self._since, self._limits[self._index]))
        self._words[TIME + self._index] += began - self._since
        self._limits[index] = self._words[LIMIT + index] = int(limit_s * _NS)
        self._write(self._section, index, began)
        try:
            yield
        finally:
            now = _clock()
            # Without the time of sections inside this one; but a loop inside it has changed what goes on.
            stay = now - (self._since if self._index == index else began)
            self._words[TIME + index] += stay
            self._stays.setdefault(name, deque(maxlen=_KEPT_STAYS)).append(stay)
            section, outer, before, limit = self._outer.pop()
            if self._section == section:  # an exception may have led to another section meanwhile
                # The section around it goes on as if the one inside had taken no time.
                self._words[TIME + outer] -= before
                self._limits[outer] = limit
                self._write(section, outer, now - before)

    def _index_of(self, name: str) -> int:
        index = self._indexes.get(name)
        if index is None:
            index = FIRST_NAMED + len(self._indexes)
            if index >= NUM_INDEXES:
                raise ConfigError(f"section({name!r}): {len(self._indexes)} names are in use already. Use fewer names.")
            self._page.set_name(index, name)
            self._indexes[name] = index
        return index

    def _longest_s(self, name: str) -> float | None:
        stays = self._stays.get(name, ())
        return max(stays) / _NS if len(stays) >= _ENOUGH_STAYS else None

    def _write(self, section: int, index: int, since: int) -> None:
        self._section, self._index, self._since = section, index, since
        self._writes += 1
        offset = _OFFSETS[self._writes & 1]
        COPY.pack_into(self._buffer, offset, section, index, self._step, since, self._limits[index])
        self._words[0] = self._writes

    # ------------------------------------------------------------------ learning

    def _grew(self, index: int, stay: int) -> None:
        if index >= NUM_SECTIONS:
            return
        self._bounds[index] = stay
        if self._warming_up:
            self._warm[index].add(stay)
        else:
            self._longest[index].add(stay)
            self._set_limit(index)

    def _keep_house(self) -> None:
        """Every so many steps: the end of the warm-up, and of a block."""
        if self._warming_up:
            self._warming_up = False
            self._bounds = [0] * NUM_INDEXES
            self._housekeeping_at += ENOUGH_STEPS - WARM_UP_STEPS
        else:
            self._num_learned += 1
            self._housekeeping_at += BLOCK_STEPS
            if self._num_learned > 1:
                for index, longest in enumerate(self._longest):
                    longest.next_block()
                    self._bounds[index] = 0
        self._set_limits()

    def _set_limits(self) -> None:
        for index in range(NUM_SECTIONS):
            self._set_limit(index)

    def _set_limit(self, index: int) -> None:
        # What this process itself needs for its first steps is for others to know.
        longest = self._warm[index].last if self._warming_up else self._longest[index].value
        known = longest / _NS if longest and self._num_learned else None
        limit_s = self._policy.limit_s(Section(index), known, warming_up=self._warming_up)
        self._limits[index] = self._words[LIMIT + index] = int(limit_s * _NS)

    def say_sharded(self, sharded: bool) -> None:
        """Whether other ranks are waited for in the forward pass, too."""
        self._words[Word.SHARDED] = int(sharded)

    def state_dict(self) -> dict[str, Any]:
        return {
            "longest": {Section(index).name: longest.value for index, longest in enumerate(self._longest)},
            "warm": {Section(index).name: longest.value for index, longest in enumerate(self._warm)},
            "stays": {name: list(stays) for name, stays in self._stays.items()},
            "learned": self._num_learned,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What was learned before a restart."""
        for mine, theirs in ((self._longest, state["longest"]), (self._warm, state["warm"])):
            for name, longest in theirs.items():
                known = mine[Section[name]]
                known.last = max(known.last, int(longest))
        for name, stays in state["stays"].items():
            mine = self._stays.setdefault(name, deque(maxlen=_KEPT_STAYS))
            if not mine:
                mine.extend(int(stay) for stay in stays)
        self._num_learned = max(self._num_learned, int(state["learned"]))
        self._set_limits()
