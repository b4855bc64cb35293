"""Plays jobs: one seed, one history; and makes a failing one short enough to read."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import random
from collections.abc import Iterator, Sequence

from arc_dist.testing import faults as fault_model
from arc_dist.testing.faults import Fault
from arc_dist.testing.job import Options, SimJob
from arc_dist.testing.world import Violation, World

_LOGGERS = ("arc_dist", "arc_dist.coordinator", "arc_dist.checkpoint_store")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a simulated job.

    Attributes:
        seed: of the play.
        options: what was played.
        faults: what was to go wrong.
        violation: the invariant that broke, or None.
        digest: of the trace; two equal ones are the same history.
        trace: its lines, where they were kept.
        met: how often each kind of fault did something.
        counts: how often other things happened.
        simulated_s: how long it took, on the simulated clock.
    """

    seed: int
    options: Options
    faults: tuple[Fault, ...]
    violation: Violation | None
    digest: str
    trace: tuple[str, ...] = ()
    met: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    simulated_s: float = 0.0


def simulate(seed: int, options: Options, *, faults: Sequence[Fault] | None = None, keep_trace: bool = False) -> Result:
    """Plays one job to its end or to the first broken invariant.

    Args:
        seed: of all randomness.
        options: what is played.
        faults: what goes wrong; None draws it from the seed.
        keep_trace: keep the lines of the trace.
    """
    if faults is None:
        rng = random.Random(f"faults {seed}")
        faults = fault_model.draw(
            rng,
            num=options.num_faults,
            num_ranks=options.num_ranks,
            num_nodes=options.num_nodes,
            horizon_s=options.horizon_s,
        )
    world = World(seed, keep_trace=keep_trace)
    violation: Violation | None = None
    with _silenced():
        job = SimJob(world, options)
        job.injector.schedule(faults)
        try:
            job.play()
        except Violation as error:
            violation = error
            world.note(f"violation: {error}")
    return Result(
        seed=seed,
        options=options,
        faults=tuple(faults),
        violation=violation,
        digest=world.digest,
        trace=tuple(world.trace or ()),
        met=job.injector.totals(),
        counts=job.counts,
        simulated_s=world.now_s,
    )


def shrink(result: Result, *, max_plays: int = 200) -> Result:
    """A shorter story of the same violation: faults are left out, one by one, as long as the invariant still breaks.

    Args:
        result: of a play with a violation.
        max_plays: bound on the attempts.
    """
    if result.violation is None:
        raise ValueError(f"seed {result.seed} has no violation")
    name = _name(result.violation)
    best, plays, index = result, 0, 0
    while index < len(best.faults) and plays < max_plays:
        fewer = best.faults[:index] + best.faults[index + 1 :]
        attempt = simulate(best.seed, best.options, faults=fewer)
        plays += 1
        if attempt.violation is not None and _name(attempt.violation) == name:
            best, index = attempt, 0
        else:
            index += 1
    return simulate(best.seed, best.options, faults=best.faults, keep_trace=True)


def _name(violation: Violation) -> str:
    return str(violation).partition(":")[0]


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """What the service and the store log about faults that are meant would fill pages."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
