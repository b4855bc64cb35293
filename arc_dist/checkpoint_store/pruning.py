"""Carries out retention, pins and quarantine on a run: reads the facts, asks `retention`, removes what it said.

Who removes must not act on old news. A step that is pinned, or newer ones that are put in quarantine, between the
decision and the removal would change the decision, so the marks are looked at again before each removal, and
everything is decided anew when they have changed. A step that others refer to is kept, whatever the policy says.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from arc_dist.checkpoint_store import pins
from arc_dist.checkpoint_store.backends import Backend
from arc_dist.checkpoint_store.catalog import Catalog, StepInfo, order, preference
from arc_dist.checkpoint_store.references import protectors, remove_step
from arc_dist.checkpoint_store.retention import Retention, StepFacts, decide
from arc_dist.errors import StoreError, StoreGone

_log = logging.getLogger(__name__)
_MAX_DECISIONS = 100


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What happens to a step.

    Attributes:
        step: its number.
        kept: False when it is, or was, removed.
        why: the reason.
        directories: its commits, the newest first; those of a removed step all go. A damaged commit has its own row.
        refers_to: directories of other steps that hold bytes of it.
        nbytes: of all its commits.
    """

    step: int
    kept: bool
    why: str
    directories: tuple[str, ...]
    nbytes: int
    refers_to: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A decision about a whole run, oldest step first, and the number of the marks that it was made with."""

    rows: tuple[Planned, ...]
    marks_number: int

    @property
    def removed(self) -> list[Planned]:
        return [row for row in self.rows if not row.kept]


def plan_prune(backend: Backend, run: str, policy: Retention, now: float) -> Plan:
    """What `prune` would do, and why. Reads the manifests, changes nothing.

    Raises:
        StoreCorrupt: the pins cannot be read.
        StoreError: see `arc_dist.errors`.
    """
    marks = pins.read_marks(backend, run)
    infos = Catalog(backend, run).infos(marks)
    sound: dict[int, list[StepInfo]] = {}
    for info in infos:
        if info.problem is None:
            sound.setdefault(info.step, []).append(info)
    decisions = decide([_facts(commits) for commits in sound.values()], policy, now)
    rows = [
        Planned(
            step=step,
            kept=decision.kept,
            why=decision.why,
            # A commit may refer to an earlier one of the same step, which can only go after it.
            directories=tuple(info.directory for info in sorted(sound[step], key=order, reverse=True)),
            nbytes=sum(info.nbytes for info in sound[step]),
            refers_to=tuple(sorted({name for info in sound[step] for name in info.refers_to})),
        )
        for step, decision in decisions.items()
    ]
    listed = {directory for row in rows for directory in row.directories}
    others = protectors(backend, run, set(Catalog(backend, run).all_directories()) - listed)
    rows = keep_referred(rows, others)
    rows += [
        Planned(
            step=i.step, kept=True, why=f"left for you to look at: {i.problem}", directories=(i.directory,), nbytes=0
        )
        for i in infos
        if i.problem is not None
    ]
    return Plan(rows=_sorted(rows), marks_number=marks.number)


def keep_referred(rows: Sequence[Planned], others: Mapping[str, Sequence[str]]) -> list[Planned]:
    """Keeps what kept steps refer to, whatever the policy says of it. Pure.

    Such a step stays a checkpoint, so what it refers to itself stays too.

    Args:
        rows: the policy's decisions.
        others: what else refers to directories (attempts, damaged steps): ``{directory: [who]}``.
    """
    result = list(rows)
    needed = {directory: f"{who[0]} may refer to it" for directory, who in others.items() if who}
    for _ in range(len(result) + 1):  # each round keeps one more step at least
        for row in result:
            if row.kept:
                needed.update({d: f"step {row.step} refers to it" for d in row.refers_to if d not in needed})
        wanted = [(i, d) for i, row in enumerate(result) if not row.kept for d in row.directories if d in needed]
        if not wanted:
            break
        for index, directory in wanted:
            result[index] = dataclasses.replace(result[index], kept=True, why=needed[directory])
    return result


def removal_order(rows: Sequence[Planned]) -> list[Planned]:
    """The oldest first, but what refers to a step before that step. Pure.

    What refers is removed first because the other would have to be kept otherwise.
    """
    left = sorted(rows, key=lambda row: row.step)
    ordered: list[Planned] = []
    while left:
        needed = {name for row in left for name in row.refers_to if name not in row.directories}
        free = [
            row for row in left if not needed.intersection(row.directories)
        ] or left  # steps with several commits may refer to each other
        ordered += free
        left = [row for row in left if row not in free]
    return ordered


def prune(
    backend: Backend,
    run: str,
    policy: Retention,
    *,
    clock: Callable[[], float] = time.time,
) -> Plan:
    """Removes what the policy does not keep, the oldest steps first; returns what was removed and what is kept.

    Raises:
        StoreCorrupt: the pins cannot be read; nothing is removed.
        StoreError: see `arc_dist.errors`. Each step is removed whole or, after a crash, no longer a checkpoint.
    """
    removed: list[Planned] = []
    for _ in range(_MAX_DECISIONS):
        plan = plan_prune(backend, run, policy, clock())
        if _remove(backend, run, plan, removed):
            _forget(backend, run, removed)
            rows = [*removed, *(row for row in plan.rows if row.kept)]
            return Plan(rows=_sorted(rows), marks_number=plan.marks_number)
    raise StoreError(f"{backend.url}/{run}: pins and quarantine change all the time. Prune again later.")


def pin_step(backend: Backend, run: str, step: int, why: str, *, now: float | None = None) -> None:
    """See `Store.pin`."""
    at = time.time() if now is None else now
    _require_step(backend, run, step, "pin a step that is there")
    pins.change_marks(backend, run, lambda marks: pins.pin(marks, step, why, at))
    # Whoever prunes looks at the marks before each removal; this finds a removal that had begun before the pin.
    _require_step(backend, run, step, "it was removed while it was being pinned; unpin it")


def unpin_step(backend: Backend, run: str, step: int) -> bool:
    """See `Store.unpin`."""
    present = False

    def change(marks: pins.Marks) -> pins.Marks:
        nonlocal present
        present = step in marks.pins
        return pins.unpin(marks, step) if present else marks

    pins.change_marks(backend, run, change)
    return present


def quarantine_steps(
    backend: Backend, run: str, first: int, last: int, why: str, *, now: float | None = None
) -> list[int]:
    """See `Store.quarantine`."""
    at = time.time() if now is None else now
    infos = Catalog(backend, run).infos(pins.Marks())
    chosen = [info for info in infos if info.problem is None and first <= info.step <= last]
    commits = {info.directory: info.committed_at for info in chosen}
    pins.change_marks(backend, run, lambda marks: pins.quarantine(marks, commits, why, at) if commits else marks)
    return sorted({info.step for info in chosen})


def release_steps(backend: Backend, run: str, step: int) -> list[str]:
    """Ends the quarantine of all commits of a step; returns their directories."""
    directories: set[str] = set()

    def change(marks: pins.Marks) -> pins.Marks:
        directories.clear()
        directories.update(names & marks.quarantined.keys())
        return pins.release(marks, directories) if directories else marks

    names = {info.directory for info in Catalog(backend, run).infos(pins.Marks()) if info.step == step}
    pins.change_marks(backend, run, change)
    return sorted(directories)


def _sorted(rows: list[Planned]) -> tuple[Planned, ...]:
    return tuple(sorted(rows, key=lambda row: (row.step, row.directories)))


def _facts(commits: list[StepInfo]) -> StepFacts:
    """A step is what its best commit is: certified when one of them may be restored by itself."""
    trusted = [info for info in commits if info.certified]
    chosen = max(trusted or commits, key=preference)
    return StepFacts(
        step=chosen.step,
        certified=bool(trusted),
        committed_at=chosen.committed_at,
        metrics=chosen.metrics,
        pinned=chosen.pinned,
        quarantined=chosen.quarantined,
    )


def _remove(backend: Backend, run: str, plan: Plan, removed: list[Planned]) -> bool:
    """Removes what a plan says; False when the marks have changed since and it must be made anew."""
    left = [(row, directory) for row in removal_order(plan.removed) for directory in row.directories]
    gone: set[str] = set()
    while left:
        blocked: list[tuple[Planned, str]] = []
        for row, directory in left:
            if pins.read_marks(backend, run).number != plan.marks_number:
                return False
            # A commit that goes later in this round refers to it, or a save that began since the plan was made.
            if remove_step(backend, run, directory):
                blocked.append((row, directory))
                continue
            gone.add(directory)
            if gone.issuperset(row.directories):
                _log.info("removed step %d of %s/%s: %s", row.step, backend.url, run, row.why)
                removed.append(row)
        if len(blocked) == len(left):
            break
        left = blocked
    return True


def _forget(backend: Backend, run: str, removed: list[Planned]) -> None:
    """Ends the quarantine of what is gone, so that marks do not pile up."""
    gone = {directory for row in removed for directory in row.directories}
    pins.change_marks(
        backend,
        run,
        lambda marks: pins.release(marks, gone) if gone & marks.quarantined.keys() else marks,
    )


def _require_step(backend: Backend, run: str, step: int, remedy: str) -> None:
    infos = [info for info in Catalog(backend, run).infos(pins.Marks()) if info.problem is None]
    if step not in {info.step for info in infos}:
        steps = sorted({info.step for info in infos})
        raise StoreGone(
            f"store {backend.url}: run {run} has no committed step {step}: {remedy}. It has: "
            f"{', '.join(map(str, steps[-10:])) or 'none'}.",
            step=step,
        )
