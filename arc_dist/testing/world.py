"""The scheduler: simulated time, one source of randomness, and a trace of all that happens.

One thing happens at a time, in the order of (time, order of scheduling), so a seed is a history. Nothing here or above
reads a real clock, a hash of an object or the order of a set.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import random
from collections.abc import Callable, Generator
from typing import Any


class Violation(AssertionError):
    """An invariant of the design does not hold. The text begins with its name."""


class Killed(BaseException):
    """The process that is being played ended in the middle of what it did."""


class World:
    """Simulated time and the trace.

    Args:
        seed: of all randomness.
        keep_trace: keep the lines of the trace, and not only their digest.
    """

    def __init__(self, seed: int | str, *, keep_trace: bool = False) -> None:
        self.random = random.Random(f"world {seed}")  # a text: its hash does not vary, as `hash` may
        self.now_s = 0.0
        self.num_events = 0
        self.trace: list[str] | None = [] if keep_trace else None
        self._digest = hashlib.blake2b(digest_size=16)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._scheduled = 0

    def after(self, delay_s: float, do: Callable[[], None]) -> None:
        """Schedules something; it cannot be taken back, so `do` looks whether it is still wanted."""
        self._scheduled += 1
        heapq.heappush(self._heap, (self.now_s + delay_s, self._scheduled, do))

    def note(self, text: str) -> None:
        """Adds a line to the trace."""
        line = f"{self.now_s:.4f} {text}"
        self._digest.update(line.encode())
        self._digest.update(b"\n")
        if self.trace is not None:
            self.trace.append(line)

    @property
    def digest(self) -> str:
        """Of the trace so far."""
        return self._digest.hexdigest()

    def step(self) -> bool:
        """Lets the next thing happen; False when nothing is scheduled."""
        if not self._heap:
            return False
        at_s, _, do = heapq.heappop(self._heap)
        self.now_s = max(self.now_s, at_s)
        self.num_events += 1
        do()
        return True

    def run_for(self, duration_s: float) -> None:
        """Lets everything happen that is due within `duration_s`; may be called while something happens."""
        until_s = self.now_s + duration_s
        while self._heap and self._heap[0][0] <= until_s:
            self.step()
        self.now_s = max(self.now_s, until_s)


@dataclasses.dataclass(eq=False)
class Life:
    """One life of a process: it may freeze and thaw, and ends once."""

    name: str
    alive: bool = True
    frozen: bool = False
    on_thaw: list[Callable[[], None]] = dataclasses.field(default_factory=list)
    on_end: Callable[[], None] | None = None

    def end(self) -> None:
        """The process is gone; `on_end` is told, once."""
        if self.alive:
            self.alive = False
            if self.on_end is not None:
                self.on_end()

    def check(self) -> None:
        """Raises `Killed` when it is over."""
        if not self.alive:
            raise Killed(self.name)

    def thaw(self) -> None:
        self.frozen = False
        waiting, self.on_thaw = self.on_thaw, []
        for do in waiting:
            do()


def when_awake(life: Life, do: Callable[[], None]) -> None:
    """Calls `do` now or, when the process is frozen, as soon as it is not; never after its end."""
    if life.frozen:
        life.on_thaw.append(lambda: when_awake(life, do))
    elif life.alive:
        do()


@dataclasses.dataclass(frozen=True)
class Wait:
    """What a played thread waits for: an item that `accepts` takes, for at most `timeout_s`."""

    accepts: Callable[[Any], bool]
    timeout_s: float | None = None


Script = Generator[Wait, Any, Any]


class Thread:
    """One thread of a played process: a generator that yields `Wait` and is resumed with an item, or None in time."""

    def __init__(self, world: World, life: Life) -> None:
        self.world = world
        self.life = life
        self._inbox: list[Any] = []
        self._script: Script | None = None
        self._wait: Wait | None = None
        self._turn = 0
        self._on_end: Callable[[BaseException | None, Any], None] = lambda error, result: None

    def start(self, script: Script, on_end: Callable[[BaseException | None, Any], None] | None = None) -> None:
        """Begins; `on_end` is told the error that ended the script, or None, and its result."""
        self._script = script
        self._on_end = on_end or self._on_end
        self._resume(None)

    def deliver(self, item: Any) -> None:
        """Puts something into the inbox."""
        if not self.life.alive or self._script is None:
            return
        self._inbox.append(item)
        if self._wait is not None and self._wait.accepts(item):
            when_awake(self.life, self._take)

    def _take(self) -> None:
        if self._wait is None:
            return
        for index, item in enumerate(self._inbox):
            if self._wait.accepts(item):
                del self._inbox[index]
                self._resume(item)
                return

    def _resume(self, value: Any) -> None:
        assert self._script is not None
        while True:
            self._wait = None
            self._turn += 1
            try:
                wait = self._script.send(value)
            except StopIteration as stop:
                self._script = None
                self._on_end(None, stop.value)
                return
            except Killed:
                self._script = None
                return
            except Exception as error:  # noqa: BLE001  # handed to whoever started the thread
                self._script = None
                self._on_end(error, None)
                return
            found = next((index for index, item in enumerate(self._inbox) if wait.accepts(item)), None)
            if found is None:
                break
            value = self._inbox.pop(found)
        self._wait = wait
        if wait.timeout_s is not None:
            turn = self._turn
            self.world.after(wait.timeout_s, lambda: when_awake(self.life, lambda: self._time_out(turn)))

    def _time_out(self, turn: int) -> None:
        if turn == self._turn and self._script is not None and self._wait is not None:
            self._resume(None)
