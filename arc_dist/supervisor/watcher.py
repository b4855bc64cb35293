"""The thread of a supervisor that watches its trainer's progress and answers for it when the job seems to hang.

It looks at the progress page and at /proc a few times per limit, at most ten times a second, and reports every few
seconds to the coordinator, which merges the ranks' limits, compares their speed, and leads the inquiry when a rank is
overdue (coordinator/hangs.py). Nothing here stops or slows the trainer, except the signal that asks for its stacks.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from arc_dist.errors import ArcError
from arc_dist.protocol.hangs import Conduct, Section, Sighting
from arc_dist.snapshot.progress import Progress, ProgressPage
from arc_dist.supervisor import conduct, stacks
from arc_dist.supervisor.events import Condemned, Event, Events
from arc_dist.telemetry.log import logger

_TICK_S = (0.1, 1.0)  # between two looks: a tenth of the shortest limit, within these
_REPORT_S = (0.5, 5.0)  # between two reports: a third of it
_INQUIRY_TICK_S = 0.1
_STACKS_WITHIN_S = 3.0
_BUSY_SAMPLES = 10
_BUSY_SAMPLE_S = 0.02
_RETRY_S = 1.0
_OVERSLEPT_S = 1.0


class Watched(Protocol):
    """What the watcher needs of a trainer."""

    generation: int
    pid: int | None
    returncode: int | None


class Reports(Protocol):
    """What the watcher asks of the coordinator."""

    def watched(self, *, rank: int, generation: int, report: dict[str, Any]) -> dict[str, Any]: ...


class Watcher:
    """Starts its thread; it ends with the process, or with `close`.

    Args:
        rank: whose trainer it is.
        shm_dir: this rank's directory, in which the trainer's page and stacks are.
        trainer: the present trainer, if there is one.
        client: the coordinator.
        events: where a condemned trainer is told.
    """

    def __init__(
        self,
        rank: int,
        shm_dir: Path,
        trainer: Callable[[], Watched | None],
        client: Reports,
        events: Events[Event],
    ) -> None:
        self._rank = rank
        self._shm_dir = shm_dir
        self._trainer = trainer
        self._client = client
        self._events = events
        self._page = ProgressPage.open(shm_dir)
        self._closing = threading.Event()
        self._tick_s, self._report_s = _TICK_S[1], _REPORT_S[1]
        self._reported_at = 0.0
        self._stopped_at: float | None = None
        self._excused = (-1, 0.0)  # (writes of the page, seconds that do not count since)
        self._answered = 0
        self._is_asked = False
        threading.Thread(target=self._run, name="arc-watch", daemon=True).start()

    def close(self) -> None:
        """Ends the thread, without waiting for it."""
        self._closing.set()

    def _run(self) -> None:
        pause_s = self._tick_s
        while True:
            slept_at = time.monotonic()
            if self._closing.wait(pause_s):
                return
            overslept_s = time.monotonic() - slept_at - pause_s
            try:
                if overslept_s > _OVERSLEPT_S:
                    self._excuse(overslept_s)
                pause_s = self._look()
            except ArcError as error:
                logger.debug("the watch could not report: %s", error)
                pause_s = _RETRY_S
            except Exception:  # noqa: BLE001  # logged with its traceback; see below why it ends nothing else
                # Watching is protection, not training: without it hangs end with the process group's time-out.
                logger.exception("rank %d is not watched for hangs any more", self._rank)
                return

    def _excuse(self, seconds: float) -> None:
        """This thread was kept from running (Ctrl-Z, a frozen container), and so probably was the trainer."""
        writes = self._page.read().writes
        if self._excused[0] != writes:
            self._excused = (writes, 0.0)
        self._excused = (writes, self._excused[1] + seconds)

    def _look(self) -> float:
        """One look; returns how long to wait before the next."""
        trainer = self._trainer()
        if trainer is None or trainer.pid is None or trainer.returncode is not None:
            self._stopped_at, self._is_asked = None, False
            return self._tick_s
        seen = self._sight(trainer.pid, None)
        silent_s = time.monotonic() - self._reported_at
        if silent_s >= self._report_s or self._is_asked or (seen.is_overdue and silent_s >= _REPORT_S[0]):
            self._report(trainer, seen)
        return _INQUIRY_TICK_S if self._is_asked else self._tick_s

    # ------------------------------------------------------------------ seeing

    def _sight(self, pid: int, taken: stacks.Stacks | None, busy: float = 0.0) -> Sighting:
        """Where the trainer is now; with its stacks when they were taken."""
        progress, now = self._read(pid), time.monotonic()
        state, _ = conduct.look(pid)
        elapsed_s, limit_s = now - progress.since_ns / 1e9, progress.limit_ns / 1e9
        if self._excused[0] == progress.writes:
            elapsed_s = max(0.0, elapsed_s - self._excused[1])
        if state is not Conduct.STOPPED:
            self._stopped_at = None
        else:
            self._stopped_at = self._stopped_at or now
            stop_limit_s = progress.stop_limit_ns / 1e9
            if stop_limit_s and (not limit_s or now - self._stopped_at > stop_limit_s):
                elapsed_s, limit_s = now - self._stopped_at, stop_limit_s
        return Sighting(
            rank=self._rank,
            step=progress.step,
            section=progress.section,
            name=progress.name,
            elapsed_s=elapsed_s,
            limit_s=limit_s,
            conduct=state,
            busy=busy,
            collective=taken is not None and taken.in_collective(busy),
            compiling=taken is not None and taken.in_compiler,
            stack=taken.key if taken is not None else "",
        )

    def _read(self, pid: int) -> Progress:
        """The page, or, as long as the trainer is not guarded, one that says so."""
        progress = self._page.read()
        if progress.pid == pid:
            return progress
        return dataclasses.replace(progress, section=Section.NONE, name="nothing guarded", step=0, limit_ns=0)

    def _busy(self, pid: int) -> float:
        """Share of a moment in which the main thread ran, or was ready to (other processes may keep it waiting)."""
        began, (_, before_s), running = time.monotonic(), conduct.look(pid), 0
        for _ in range(_BUSY_SAMPLES):
            time.sleep(_BUSY_SAMPLE_S)
            running += conduct.look(pid)[0] is Conduct.RUNNING
        _, after_s = conduct.look(pid)
        return max(running / _BUSY_SAMPLES, (after_s - before_s) / (time.monotonic() - began))

    # ------------------------------------------------------------------ telling

    def _report(self, trainer: Watched, seen: Sighting) -> None:
        spent = self._page.spent()
        shortest_s = min((limit for limit in spent.limit_ns.values() if limit), default=0) / 1e9
        self._tick_s = _within(shortest_s / 10, _TICK_S) if shortest_s else _TICK_S[1]
        self._report_s = _within(shortest_s / 3, _REPORT_S) if shortest_s else _REPORT_S[1]
        self._reported_at = time.monotonic()
        answer = self._tell(trainer, {"seen": _fields(seen), "spent": dataclasses.asdict(spent)})
        self._obey(trainer, answer.get("condemned"))
        number = int(answer.get("inquiry", 0))
        self._is_asked = number > 0
        if number > self._answered:
            self._answered = number
            answer = self._testify(trainer, number)
            self._obey(trainer, answer.get("condemned"))

    def _testify(self, trainer: Watched, number: int) -> dict[str, Any]:
        """Answers the coordinator's question where this rank is, with its stacks."""
        assert trainer.pid is not None
        pid = trainer.pid
        busy, taken = 0.0, stacks.Stacks()
        state, _ = conduct.look(pid)
        if state not in (Conduct.STOPPED, Conduct.TRACED, Conduct.GONE):
            busy = self._busy(pid)
            taken = stacks.take(pid, self._page.read().thread, self._shm_dir, _STACKS_WITHIN_S)
        writes = self._page.read().writes  # before the rest: what changes meanwhile acquits
        seen = self._sight(pid, taken, busy)
        kernel = "" if taken.frames else conduct.describe(pid)
        report = {
            "inquiry": number,
            "seen": _fields(seen),
            "writes": writes,
            "frames": stacks.render(taken.frames),
            "text": taken.text,
            "kernel": kernel,
        }
        return self._tell(trainer, report)

    def _obey(self, trainer: Watched, condemned: Mapping[str, Any] | None) -> None:
        """A condemned trainer is ended, unless it went on meanwhile."""
        if condemned is None or trainer.pid is None:
            return
        moved = self._page.read().writes != int(condemned["writes"])
        if moved and conduct.look(trainer.pid)[0] is not Conduct.STOPPED:
            logger.warning("the trainer went on just when it was found to hang: %s", condemned["reason"])
            return
        self._events.put(Condemned(trainer.generation, str(condemned["reason"])))

    def _tell(self, trainer: Watched, report: dict[str, Any]) -> dict[str, Any]:
        return self._client.watched(rank=self._rank, generation=trainer.generation, report=report)


def _fields(seen: Sighting) -> dict[str, Any]:
    return {**dataclasses.asdict(seen), "section": int(seen.section), "conduct": seen.conduct.value}


def _within(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])
