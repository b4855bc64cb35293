"""Carries out what the ladder decides, on every rank alike, and tells what it did and what that cost.

`Healer.decide` brings the details of all ranks together and asks the pure `decide`; `Healer.act` does what it says. A
rung that cannot be carried out on some rank (no checkpoint left, a rung of the user's that raises) is told, and all
ranks go on to the next one: after each attempt they exchange what became of it, so none is left behind.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arc_dist.errors import ArcError, TrainingStopped
from arc_dist.healing import out_of_memory, rungs
from arc_dist.healing.escape import begins_empty, perturb, reset_moments
from arc_dist.healing.ledger import Ledger
from arc_dist.incident import incident, one_line, weights_digest
from arc_dist.protocol.decision import Decision, Rung
from arc_dist.protocol.flags import FAULTS, Flag, names
from arc_dist.protocol.hangs import Section
from arc_dist.protocol.healing import History, decide
from arc_dist.protocol.ladder import Evidence, HealingPolicy
from arc_dist.telemetry.log import logger

if TYPE_CHECKING:
    from arc_dist.guard import Guard
    from arc_dist.restore import Found

_MAX_ACCOUNT = 64
_FAULTS = int(FAULTS)


class Healer:
    """What a guard does about faults.

    Args:
        guard: of the rank.
        ledger_dir: outlives the process; None where nothing does.
        read_checkpoint: gives the newest committed checkpoint before a step, or None; every rank calls it alike, and
            it blocks. None without a store.
        on_abandoned: called with (first, last) of the steps up to the newest certified one that are given up.
    """

    def __init__(
        self,
        guard: Guard,
        *,
        ledger_dir: Path | None,
        read_checkpoint: Callable[[int], Found | None] | None,
        on_abandoned: Callable[[int, int], None] | None,
    ) -> None:
        self._guard = guard
        self._ledger = Ledger(ledger_dir)
        self._read_checkpoint = read_checkpoint
        self._on_abandoned = on_abandoned
        self._lazy = [begins_empty(optimizer) for optimizer in guard.state.optimizers]
        self._evidence: Evidence | None = None
        self.details: list[dict[str, Any]] = []
        self.account: list[dict[str, Any]] = []  # what was done in the run, the newest last

    # ------------------------------------------------------------------ deciding

    def decide(self, faults: Flag, step: int) -> Decision | None:
        """The slow path: details of all ranks, then the pure decision. Every rank gets here together.

        Returns None when the update is to be applied all the same.
        """
        guard = self._guard
        self.details = guard.voter.gather(self._findings(), step)
        if any(theirs["voids_gradient"] for theirs in self.details):
            faults &= ~Flag.GRAD_NONFINITE  # it was how that rank told the others of its ballot
        for theirs in self.details:
            faults |= Flag(theirs["ballot"])
        certified = set(self.details[0]["certified"]).intersection(*(theirs["certified"] for theirs in self.details))
        evidence = Evidence(
            step=step,
            flags=faults,
            state_corrupt=any(theirs["corrupt"] for theirs in self.details)
            or len({theirs["weights"] for theirs in self.details}) > 1,
            certified=tuple(sorted(certified, reverse=True)),
            has_store=self._read_checkpoint is not None,
        )
        divided = out_of_memory.decide(guard.division, self.details, evidence, guard.history)
        if divided is not None:
            self._evidence = evidence
            guard.division, decision = divided
            return decision
        decision = self._climb(evidence)
        if decision.rung is not Rung.APPLY:
            return decision
        if decision.reason:
            self._report(decision, step, 0.0, {})
        return None

    def _findings(self) -> dict[str, Any]:
        """What this rank knows of the fault, JSON-able."""
        guard = self._guard
        guard.watch.follow()
        local = [dataclasses.asdict(finding) for finding in guard.watch.probe.findings]
        corrupt = guard.watch.scan()
        local += [dataclasses.asdict(finding) for finding in guard.watch.probe.findings]
        local = [dataclasses.asdict(finding) for finding in guard.monitoring.take_findings()] + local
        attempt = guard.attempt
        memory, attempt.memory = attempt.memory, None
        return {
            "rank": guard.voter.rank,
            "flags": names(Flag(attempt.flags & _FAULTS)),
            "ballot": attempt.flags & _FAULTS,
            "voids_gradient": attempt.voids_gradient,
            "losses": attempt.losses,
            "grad_norm": attempt.norm,
            "batches": attempt.ordinals,
            "tensors": [{**finding, "flag": names(finding["flag"])} for finding in local][:8],
            "learning_rate": guard.rate_monitor.offender if attempt.flags & Flag.LEARNING_RATE else None,
            "memory": memory,
            "corrupt": bool(corrupt),
            "certified": guard.protection.certified_steps(),
            "weights": weights_digest(guard.state) if guard.replicated else None,
        }

    def _climb(self, evidence: Evidence) -> Decision:
        guard = self._guard
        self._evidence = evidence
        policy = guard.settings.policy
        guard.history, decision = decide(policy, guard.history, evidence, self._ladder(policy, evidence))
        return decision

    def _ladder(self, policy: HealingPolicy, evidence: Evidence) -> tuple[str, ...]:
        """The rungs for this fault. What a policy of the user's own says counts if it says the same on every rank."""
        if type(policy).ladder_for is HealingPolicy.ladder_for:
            return policy.ladder
        answer: list[str] | str
        try:
            answer = [str(name) for name in policy.ladder_for(evidence)]
        except Exception as error:  # noqa: BLE001 - the user's; it must not leave this rank out of the decision
            answer = f"it raised {type(error).__name__}: {error}"
        everyone = self._guard.voter.gather(answer, evidence.step)
        if isinstance(answer, list) and all(theirs == answer for theirs in everyone):
            return tuple(answer)
        problem = next((theirs for theirs in everyone if isinstance(theirs, str)), "it differs between ranks")
        self._tell(f"{type(policy).__name__}.ladder_for is passed over: {problem}", evidence.step)
        return policy.ladder

    # ------------------------------------------------------------------ acting

    def act(self, decision: Decision) -> Decision:
        """Carries a decision out, or the next one that can be; the same on every rank. Returns what was done.

        Raises:
            TrainingStopped: the ladder has no rung left.
        """
        guard = self._guard
        for optimizer in guard.state.optimizers:
            optimizer.zero_grad(set_to_none=True)
        guard.mean_loss.settled()
        guard.sections.enter(Section.HEAL)
        began = time.perf_counter()
        failed_step = guard.step + 1
        while True:
            before = {"lr_scale": guard.rate.factor, "clip_scale": guard.clip_scale}
            changed: dict[str, Any] = {}
            problem, decision = self._carry_out(decision, failed_step, changed)
            if problem is None:
                break
            self._tell(f"the rung {decision.name} failed: {problem}", failed_step)
            self._note(decision, failed_step, time.perf_counter() - began, problem)
            decision, began = self._next(), time.perf_counter()
        guard.follow(decision)
        after = {"lr_scale": guard.rate.factor, "clip_scale": guard.clip_scale}
        changed |= {name: [before[name], value] for name, value in after.items() if before[name] != value}
        guard.last_decision = decision
        seconds = time.perf_counter() - began
        self._note(decision, failed_step, seconds)
        self._report(decision, failed_step, seconds, changed)
        if decision.rung is Rung.STOP:
            raise TrainingStopped(
                f"training stopped at step {failed_step}: {decision.reason}. The newest certified state is step "
                f"{max(guard.protection.certified_steps(), default=None)}. What was tried: {self._summary()}. Look at "
                "the batches and ranks named in the report.",
                step=failed_step,
            )
        return decision

    def _next(self) -> Decision:
        """A rung failed: the next one, from what is still there. It must restore, whatever the failed one left."""
        assert self._evidence is not None
        here = self._guard.step
        certified = tuple(step for step in self._evidence.certified if step <= here)
        return self._climb(dataclasses.replace(self._evidence, certified=certified, must_restore=True))

    def _carry_out(self, decision: Decision, failed_step: int, changed: dict[str, Any]) -> tuple[str | None, Decision]:
        """What went wrong on any rank, or None; and the decision with what is known only now."""
        problem = None
        if decision.restore_step is not None:
            problem = self._restore_memory(decision.restore_step)
        elif decision.before_step is not None:
            decision, problem = self._restore_checkpoint(decision, decision.before_step)
        if problem is None and decision.rung is Rung.ESCAPE:
            self._escape(decision, changed)
        if problem is None and decision.rung is Rung.OWN:
            problem = self._own(decision, failed_step, changed)
        if problem is None:
            self._leave_out(decision, changed)
        return problem, decision

    def _leave_out(self, decision: Decision, changed: dict[str, Any]) -> None:
        """The offending batches are never given again, and where one escapes, some beyond them."""
        guard = self._guard
        ordinals = guard.attempt.ordinals
        if guard.data is None or not decision.drop_batch or not ordinals:
            return
        first = max(0, min(ordinals) - (decision.window - 1) * len(ordinals))
        last = max(ordinals) + decision.skip_ahead * len(ordinals)
        guard.data.skip(*range(first, last + 1))
        changed["batches"] = [first, last]

    def _restore_memory(self, step: int) -> str | None:
        """Restores the snapshot of `step` in place, bit for bit, with everything that belongs to it."""
        guard = self._guard
        snapshot, mine = None, None
        try:
            snapshot = guard.protection.take_out(step)
        except ArcError as error:
            mine = error.message
        problem = self._any(mine)
        if problem is not None or snapshot is None:
            return problem
        self._abandon(step)
        guard.load(*snapshot, cold=False)
        guard.ring.drop_after(step)
        return None

    def _restore_checkpoint(self, decision: Decision, before: int) -> tuple[Decision, str | None]:
        guard = self._guard
        assert self._read_checkpoint is not None
        found = self._read_checkpoint(before)
        if found is None:
            return decision, f"there is no whole checkpoint before step {before}"
        self._abandon(found.step)
        guard.load(found.specs, found.tensors, found.small, cold=False)
        guard.ring.drop_after(found.step)
        guard.protection.seal(found.step)  # what was verified is trusted
        guard.history = dataclasses.replace(guard.history, restored_step=found.step)
        reason = decision.reason.replace(f"a checkpoint before step {before}", f"the checkpoint of step {found.step}")
        return dataclasses.replace(decision, restore_step=found.step, reason=reason), None

    def _abandon(self, step: int) -> None:
        newest = max(self._guard.protection.certified_steps(), default=step)
        if newest > step and self._on_abandoned is not None:
            self._on_abandoned(step + 1, newest)

    def _escape(self, decision: Decision, changed: dict[str, Any]) -> None:
        guard = self._guard
        if decision.reset_moments:
            for optimizer, is_lazy in zip(guard.state.optimizers, self._lazy, strict=True):
                reset_moments(optimizer, is_lazy=is_lazy)
            changed["moments"] = "reset"
        if decision.perturbation:
            step = guard.step
            perturb(
                guard.state,
                lambda item: guard.voter.gather(item, step),
                scale=decision.perturbation,
                seed=decision.noise_seed,
            )
            changed["perturbation"] = decision.perturbation
        guard.state_was_changed()

    def _own(self, decision: Decision, failed_step: int, changed: dict[str, Any]) -> str | None:
        guard = self._guard
        assert self._evidence is not None
        case = rungs.Case(
            step=guard.step,
            failed_step=failed_step,
            flags=tuple(names(self._evidence.flags & FAULTS)),
            tried=guard.history.tried,
            models=guard.state.models,
            optimizers=guard.state.optimizers,
            rank=guard.voter.rank,
            world_size=guard.voter.world_size,
        )
        mine = None
        try:
            changed[decision.name] = rungs.heal(decision.name, case)
        except Exception as error:  # noqa: BLE001 - the user's; the next rung restores what it left
            mine = f"{type(error).__name__}: {error}"
        problem = self._any(mine)
        if problem is None and guard.replicated:
            digests = guard.voter.gather(weights_digest(guard.state), guard.step)
            problem = None if len(set(digests)) == 1 else "it left replicas that differ"
        if problem is None:
            guard.state_was_changed()
        return problem

    def _any(self, problem: str | None) -> str | None:
        """The problem of the first rank that has one; every rank must call this, and it blocks."""
        everyone = self._guard.voter.gather(problem, self._guard.step)
        return next((f"rank {rank}: {theirs}" for rank, theirs in enumerate(everyone) if theirs is not None), None)

    # ------------------------------------------------------------------ telling and remembering

    def _tell(self, what: str, step: int) -> None:
        """Says what every rank knows, once, on rank 0."""
        if self._guard.voter.rank == 0:
            logger.warning("step %d: %s", step, what)
            self._guard.record(kind="healing_failed", step=step, cause=what, ranks=[], action="next rung")

    def _report(self, decision: Decision, failed_step: int, seconds: float, changed: dict[str, Any]) -> None:
        guard = self._guard
        if guard.voter.rank != 0:
            return
        fields = incident(self.details, decision, failed_step, seconds)
        fields |= {"rung": decision.name, "mode": guard.history.mode.value, "changed": changed}
        if decision.rung is Rung.STOP:
            fields["tried"] = list(self.account)
        logger.warning("%s", one_line(fields))
        guard.record(**fields)

    def _note(self, decision: Decision, failed_step: int, seconds: float, problem: str | None = None) -> None:
        restored = decision.restore_step if problem is None else None
        self.account.append(
            {
                "step": failed_step,
                "action": decision.action,
                "rung": decision.name,
                "restored_step": restored,
                "steps_lost": 0 if restored is None else failed_step - 1 - restored,
                "seconds": round(seconds, 6),
                "problem": problem,
            }
        )
        del self.account[:-_MAX_ACCOUNT]
        self._ledger.write(self.state_dict())

    def _summary(self) -> str:
        """What was tried, where, at what cost, in one line."""
        tried = [entry for entry in self.account if entry["action"] != Rung.STOP.value]
        groups = itertools.groupby(tried, lambda entry: (entry["rung"], entry["restored_step"], entry["problem"]))
        return "; ".join(_told(list(entries)) for _, entries in groups) or "nothing"

    def state_dict(self) -> dict[str, Any]:
        skipped = list(self._guard.data.skipped()) if self._guard.data is not None else []
        return {"history": self._guard.history.as_dict(), "skipped": skipped, "account": list(self.account)}

    def recall(self) -> None:
        """In a new process: takes over what the ranks' last ones had learned. Every rank must call this; it blocks."""
        guard = self._guard
        everyone = [theirs for theirs in guard.voter.gather(self._ledger.read(), guard.step) if theirs is not None]
        latest = max(everyone, key=lambda theirs: theirs["history"]["decisions"], default=None)
        if latest is None or latest["history"]["decisions"] <= guard.history.decisions:
            return
        guard.history = History.from_dict(latest["history"])
        guard.follow(guard.history)
        self.account = list(latest["account"])
        if guard.data is not None:
            guard.data.skip(*latest["skipped"])
        logger.info(
            "healing goes on where it was: %s, %d rungs used", guard.history.mode.value, len(guard.history.tried)
        )


def _told(entries: Sequence[Mapping[str, Any]]) -> str:
    """Entries of the same rung with the same result, in a few words."""
    first = entries[0]
    steps = sorted({entry["step"] for entry in entries})
    at = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]}-{steps[-1]}"
    times = f" x {len(entries)}" if len(entries) > 1 else ""
    if first["problem"] is not None:
        return f"{first['rung']}{times} at {at}, which failed"
    lost = sum(entry["steps_lost"] for entry in entries)
    seconds = sum(entry["seconds"] for entry in entries)
    to = "" if first["restored_step"] is None else f" to step {first['restored_step']}"
    return f"{first['rung']}{to}{times} at {at} ({lost} steps, {seconds:.2f} s)"
