"""Leaving before the job's processes are killed: hearing the notice, saving in time, and saying when that cannot be.

A notice may come to any process of any rank at any time. Each rank asks all others with its next ballot, so all agree
on the same step; see `protocol.leaving` for what a notice is, and docs/preemption.md for all ways that one may take.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from arc_dist.checkpoint_store.tiers import Tiers
from arc_dist.config import Env
from arc_dist.errors import Preempted, PreemptedUnsaved, StoreError
from arc_dist.memory import expected_bytes
from arc_dist.preemption.facts import SavingFacts
from arc_dist.preemption.file import NoticeFile, seconds_since_1970
from arc_dist.preemption.page import NoticePage
from arc_dist.preemption.signals import NoticeSignals
from arc_dist.protocol.leaving import OVERHEAD_S
from arc_dist.snapshot.layout import Phase
from arc_dist.supervisor import process
from arc_dist.telemetry.log import logger

if TYPE_CHECKING:
    from arc_dist.engine import Engine

_LARGEST_PROBE_BYTES = 8 << 20
_SMALLEST_PROBE_BYTES = 64 << 10


class Notices:
    """Whether this rank has been told to go, by a signal, by its supervisor, or (without one) by a file.

    Args:
        env: which signals and which file are notices; where the supervisor's word is.
        on_arrival: called in a thread as soon as a signal arrives, also while the main thread waits in a collective.
    """

    def __init__(self, env: Env, on_arrival: Callable[[], None]) -> None:
        self._is_told = False
        self._page: NoticePage | None = None
        self._file: NoticeFile | None = None
        self._signals = NoticeSignals(
            env.preempt_signals,
            on_notice=self._tell,
            on_arrival=lambda number: on_arrival() if env.supervised else None,
        )
        self._env = env

    def listen(self) -> None:
        """Begins to hear notices; those that the supervisor heard before count."""
        env = self._env
        if env.supervised and env.shm_dir is not None:
            self._page = NoticePage.open(env.shm_dir)
        elif env.preempt_file is not None:
            began_at = seconds_since_1970(process.start_ticks(os.getpid()))
            self._file = NoticeFile(env.preempt_file, job_started_at=began_at, on_notice=self._tell)
            self._file.start()
        self._signals.install()

    def _tell(self) -> None:
        self._is_told = True
        if self._page is not None:
            self._page.raise_notice()  # the next process of this rank is to know, should this one die

    @property
    def is_told(self) -> bool:
        """Costs a fraction of a microsecond: it is asked before every step."""
        page = self._page
        return self._is_told or (page is not None and page.is_raised)

    def close(self) -> None:
        """Gives the signals back."""
        self._signals.remove()
        if self._file is not None:
            self._file.close()


def leave(engine: Engine) -> NoReturn:
    """Saves the present state and ends training. Every rank must call this after the same step; it blocks.

    Raises:
        Preempted: always; `PreemptedUnsaved` when no checkpoint of this step is committed.
    """
    guard = engine.guard
    engine.say_phase(Phase.LEAVING)
    if engine.rank == 0 and engine.env.supervised:
        engine.tell(lambda: engine.coordinator.preempt(0))
    decision = guard.seal()
    if decision is not None:
        guard.act(decision)  # a rollback leaves the run at a certified step, which is saved instead
    if engine.save_now(guard.step, hurry=True):
        raise Preempted(
            f"preempted at step {guard.step}: it is committed. Start the job again to continue.", step=guard.step
        )
    if engine.store is None:
        why = "no store is set, so nothing outlives this job. Name one: Arc(store=...), ARC_STORE"
    else:
        why = f"the checkpoint was not committed to {engine.store.url}; the messages above say why"
    raise PreemptedUnsaved(f"preempted at step {guard.step}, and it is not saved: {why}.", step=guard.step)


def prepare(engine: Engine) -> None:
    """Finds out whether a last checkpoint fits into the grace period, and leaves what is needed to save from memory.

    Every rank must call this, before the first step; in a job's first generation it blocks.
    """
    env, store = engine.env, engine.store
    if store is None:
        logger.info("no store is set: when this job is preempted, nothing outlives it (Arc(store=...), ARC_STORE)")
        return
    known = SavingFacts.read(env.shm_dir) if env.shm_dir is not None else None
    nbytes = expected_bytes(engine.state)
    facts = SavingFacts(
        tiers=tuple(dataclasses.asdict(tier) for tier in store.tiers),
        run=store.run,
        owner=engine.owner,
        save_timeout_s=engine.settings.save_timeout_s,
        state_bytes=nbytes,
        bytes_per_s=known.bytes_per_s if known is not None else _measure(store, nbytes),
    )
    if env.shm_dir is not None:
        _leave_facts(facts, env.shm_dir)
    if env.generation == 0:
        _judge_grace(engine, facts)


def learned(engine: Engine, seconds: float) -> None:
    """A checkpoint of this rank took so long to be written: a better measure than that of the start."""
    directory = engine.env.shm_dir
    facts = SavingFacts.read(directory) if directory is not None else None
    if directory is not None and facts is not None and engine.settings.max_bytes_per_s is None and seconds > 0:
        _leave_facts(dataclasses.replace(facts, bytes_per_s=facts.state_bytes / seconds), directory)


def _leave_facts(facts: SavingFacts, directory: Path) -> None:
    try:
        facts.write(directory)
    except OSError as error:  # the memory file system is full; snapshots went elsewhere
        logger.warning("if this process cannot save at a preemption, nobody can: %s: %s", directory, error)


def _measure(store: Tiers, nbytes: int) -> float | None:
    """Bytes per second at which the fastest tier takes this rank's data, while all ranks write."""
    try:
        return store.stores[0].measure_writing(max(_SMALLEST_PROBE_BYTES, min(nbytes, _LARGEST_PROBE_BYTES)))
    except StoreError as error:  # a save has other tiers, and says so itself if none takes it
        logger.warning("how long a last checkpoint takes is not known: %s", error)
        return None


def _judge_grace(engine: Engine, facts: SavingFacts) -> None:
    figures = engine.voter.gather([facts.needed_s, facts.state_bytes, facts.bytes_per_s], step=0)
    measured = [(*figure, rank) for rank, figure in enumerate(figures) if figure[0] is not None]
    if engine.rank != 0 or not measured:
        return
    needed_s, nbytes, bytes_per_s, rank = max(measured)
    grace_s = engine.env.grace_s
    what = (
        f"a last checkpoint takes about {needed_s:.0f} s (rank {rank}: {nbytes / 1e6:.1f} MB at "
        f"{bytes_per_s / 1e6:.1f} MB/s as measured, half as much again for safety, and {OVERHEAD_S:.0f} s around it) "
        f"of the {grace_s:.0f} s that a preempted job is given"
    )
    if needed_s <= grace_s:
        logger.debug("%s", what)
        return
    logger.warning(
        "%s: it may be lost. Raise the time that the scheduler gives, and ARC_GRACE_S with it (docs/preemption.md), "
        "put a faster tier first, or set checkpoint_every so that less is lost",
        what,
    )
