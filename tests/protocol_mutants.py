"""One-line bugs in the rules, the service, the journal and the store's commit, and who finds them.

A mutant changes one line of one function, in place, so that everybody who uses the function meets it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Any

from arc_dist.coordinator import journal, service
from arc_dist.errors import ExitCode
from arc_dist.protocol import commit, generations, job, pick, sources
from arc_dist.testing import exhaustive, faults
from arc_dist.testing.exhaustive import Scope
from arc_dist.testing.job import Options
from arc_dist.testing.simulation import simulate
from arc_dist.testing.world import Violation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutant:
    """A bug, and the schedule of faults that is aimed at it, where there is one, and how the job ends under it."""

    where: Callable[..., Any]
    old: str
    new: str
    faults: tuple[str, ...] = ()
    options: Options = dataclasses.field(default_factory=Options)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    ends_with: int = 0


@contextlib.contextmanager
def applied(mutant: Mutant) -> Iterator[None]:
    """The function with its bug."""
    function: Any = inspect.unwrap(mutant.where)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(mutant.old) == 1, (
        f"{function.__qualname__}: {mutant.old!r} is there {source.count(mutant.old)} times"
    )
    scope: dict[str, Any] = {}
    exec(  # the source is ours
        compile("from __future__ import annotations\n" + source.replace(mutant.old, mutant.new), "<mutant>", "exec"),
        sys.modules[function.__module__].__dict__ | {},
        scope,
    )
    made = next(value for value in scope.values() if isinstance(value, (types.FunctionType, property)))
    honest, function.__code__ = function.__code__, (made.fget if isinstance(made, property) else made).__code__
    try:
        yield
    finally:
        function.__code__ = honest


def found_by(mutant: Mutant, *, num_seeds: int) -> str | None:
    """Who finds the bug, and what it says; None when nobody does."""
    with applied(mutant):
        if mutant.faults:
            told = [faults.parse(line) for line in mutant.faults]
            for seed in mutant.seeds:
                if problem := _problem(lambda seed=seed: _played(seed, mutant.options, told, mutant.ends_with)):
                    return f"the schedule that is aimed at it, seed {seed}: {problem}"
        for scope in (Scope(num_ranks=2, crashes=0, max_states=4000), Scope(num_ranks=2, max_states=4000)):
            if problem := _problem(lambda scope=scope: exhaustive.explore(scope)):
                return f"the exhaustive search: {problem[:300]}"
        for seed in itertools.islice(itertools.count(), num_seeds):
            options = Options(num_ranks=2 + seed % 4, num_faults=10, shards=seed % 3)
            if problem := _problem(lambda seed=seed, options=options: _played(seed, options)):
                return f"the simulator, seed {seed}: {problem}"
    return None


def honest(mutant: Mutant) -> str | None:
    """What the schedule that is aimed at a bug says of the honest code."""
    told = [faults.parse(line) for line in mutant.faults]
    problems = (
        _problem(functools.partial(_played, seed, mutant.options, told, mutant.ends_with)) for seed in mutant.seeds
    )
    return next((problem for problem in problems if problem), None)


def _played(seed: int, options: Options, told: Any = None, ends_with: int = 0) -> None:
    result = simulate(seed, options, faults=told)
    if result.violation is not None:
        raise result.violation
    if told is not None and not result.counts[f"ended {ends_with}"]:
        raise Violation(f"liveness: the job did not end with {ends_with}, although nothing speaks against it")


def _problem(play: Callable[[], Any]) -> str | None:
    try:
        play()
    except (Violation, AssertionError, KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


G, C, J, P, S = generations, commit, job, pick, sources
_ALL_KILLED = tuple(f"at 0.530 crash-rank {rank}" for rank in range(4))
_POISONED = ("at 0.610 corrupt-state 0", *(f"at 0.640 crash-supervisor {rank}" for rank in range(4)))
_CRASH_IN_START = ("at 0.160 crash-coordinator 0 for 0.002",)
_REPLACED = ("at 0.500 crash-supervisor 1",)
_TOLD_TO_GO = ("at 0.500 freeze-rank 1 for 60.000", "at 0.600 preempt 2")
_FORGOTTEN = (
    "at 0.190 crash-coordinator 0 for 0.001",
    "at 0.244 freeze-supervisor 2 for 4.000",
    "at 0.304 crash-supervisor 0",
)

MUTANTS = {
    "a ready of another generation counts": Mutant(where=G._ready, old="event.generation != job.awaited", new="False"),
    "a death of an older generation counts": Mutant(
        where=G._died_running, old="event.generation != job.generation", new="False"
    ),
    "an end of an older generation counts": Mutant(
        where=G._finished, old="event.generation != job.generation", new="False"
    ),
    "a job is done without its last rank": Mutant(
        where=G._open_transition, old="len(job.finished) == config", new="1 + len(job.finished) >= config"
    ),
    "a generation is over before its last process": Mutant(
        where=G._open_transition,
        old="Phase.ENDING and len(job.ready) ==",
        new="Phase.ENDING and 1 + len(job.ready) >=",
    ),
    "a generation starts without its last rank": Mutant(
        where=G._open_transition,
        old="Phase.STARTING and len(job.ready) ==",
        new="Phase.STARTING and 1 + len(job.ready) >=",
    ),
    "a replaced supervisor ends nothing": Mutant(
        where=G._join_running, old="before is None or before == event.member", new="True", faults=_REPLACED
    ),
    "who finished is not started again": Mutant(
        where=G._conclude, old="finished=frozenset()", new="finished=job.finished"
    ),
    "a preempted job stops before it has saved its memory": Mutant(
        where=G._conclude,
        old="root.cause.exit_code != ExitCode.PREEMPTED",
        new="False",
        faults=_TOLD_TO_GO,
        ends_with=ExitCode.PREEMPTED,
    ),
    "a generation that only saves counts as one that trains": Mutant(
        where=G._open_transition,
        old="_flushed(job) if job.flushing else None",
        new="None",
        faults=_TOLD_TO_GO,
        ends_with=ExitCode.PREEMPTED,
    ),
    "the number of a generation is used again": Mutant(
        where=G._conclude, old="generation=job.generation + 1,", new="generation=job.generation,"
    ),
    "a rank that nobody knows to be ready waits, in a start": Mutant(
        where=G.directive,
        old="generation == present and rank not in job.ready",
        new="False",
        faults=_CRASH_IN_START,
    ),
    "a rank that runs is not told of the end": Mutant(
        where=G.directive, old="(generation == present or rank not in job.ready)", new="False"
    ),
    "a step is committed before its last shard is durable": Mutant(
        where=C.offer, old="len(parts) < saves.world_size", new="len(parts) + 1 < saves.world_size"
    ),
    "an uncertified snapshot is trusted": Mutant(
        where=S.Holding.trusted.fget,
        old="self.certified or self.parting",
        new="True",  # type: ignore[attr-defined],
        faults=_ALL_KILLED,
    ),
    "what was poisoned returns": Mutant(
        where=P.Poison.covers,
        old="return self.from_step",
        new="return False and self.from_step",
        faults=_POISONED,
    ),
    "a rank's shard stands in for another's": Mutant(
        where=S.find_sources,
        old="sorted(keys[rank])",
        new="sorted(replicas)",
        faults=_REPLACED,
        options=Options(shards=2),
    ),
    "the memory of another host stands in": Mutant(
        where=S._near,
        old="if inventories[giver].host == inventories[rank].host",
        new="",
        faults=("at 0.500 crash-node 1",),
        options=Options(shards=1),
    ),
    "the oldest whole step is taken": Mutant(
        where=P.pick,
        old="sorted(offers, reverse=True)",
        new="sorted(offers)",
        faults=("at 0.600 crash-rank 1",),
    ),
    "the oldest checkpoint is taken": Mutant(
        where=P._order,
        old="-entry.step",
        new="entry.step",
        faults=tuple(f"at 1.000 crash-supervisor {rank}" for rank in range(4)),
        options=Options(target_step=22),
    ),
    "the journal forgets that a generation runs": Mutant(where=J.revive, old="phase=phase", new="phase=Phase.STARTING"),
    "the journal forgets poison": Mutant(
        where=J.durable,
        old="[dataclasses.asdict(poison) for poison in job.known.poison]",
        new="[]",
        faults=("at 0.610 corrupt-state 0", "at 0.630 crash-node 0", "at 0.630 crash-node 1"),
    ),
    "the journal forgets the plan": Mutant(
        where=J.revive, old='Plan.from_dict(record["plan"]) if record["plan"] else None', new="None"
    ),
    "nothing is journaled": Mutant(
        where=service.Coordinator._apply, old="self._append(outcome.job)", new="pass", faults=_REPLACED
    ),
    "the decision to run is told before it is journaled": Mutant(
        where=service.Coordinator._apply,
        old="(GenerationEnds, GenerationRuns, ",
        new="(GenerationEnds, ",
        faults=_REPLACED,
    ),
    "the end of a generation is told before it is journaled": Mutant(
        where=service.Coordinator._apply,
        old="(GenerationEnds, GenerationRuns, ",
        new="(GenerationRuns, ",
        faults=_REPLACED,
    ),
    "a forgotten supervisor stays forgotten": Mutant(
        where=service.Coordinator._ready,
        old="rank not in self._job.members",
        new="False",
        faults=_FORGOTTEN,
        seeds=(6,),
    ),
    "a late supervisor is sent away": Mutant(
        where=service.Coordinator._check_sender,
        old="not sender or self._job.phase.is_over",
        new="not sender",
        faults=("at 0.850 lose-reply 1 times 9",),
        options=Options(target_step=12),
    ),
    "the oldest line of the journal is the truth": Mutant(
        where=journal._last_entry,
        old="last = entry",
        new="last = last or entry",
        faults=("at 0.400 crash-coordinator 0 for 0.100", "at 0.600 crash-supervisor 1"),
    ),
}
