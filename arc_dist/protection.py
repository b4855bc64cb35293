"""The snapshots of one rank over time: when they are taken, how they earn trust, what becomes of them.

A snapshot is certified after `certify_after` healthy steps and a look at each of its numbers; the one that a process
begins with is trusted at once. A certified one that fell on a checkpoint's step is handed to the writer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from arc_dist.cadence import SnapshotCadence
from arc_dist.healing.vote import Voter
from arc_dist.monitors import StateProbe
from arc_dist.protocol.flags import NO_FLAGS, Flag
from arc_dist.settings import Settings
from arc_dist.snapshot.ring import SnapshotRing
from arc_dist.snapshot.slot import Snapshot
from arc_dist.snapshot.state import TrainingState
from arc_dist.telemetry.log import logger


class Protection:
    """Takes, certifies and gives back snapshots; the same steps on every rank.

    Args:
        state: what is captured.
        settings: the cadence, and how many healthy steps make a snapshot trusted.
        voter: to agree on a measured cadence.
        ring: where snapshots are kept.
        probe: knows which tensors are judged, and which were never finite.
        small: gives everything a snapshot holds beside tensors.
        record: called with each incident, on rank 0.
        on_certified: called with (step, slot) when a snapshot that shall become a checkpoint is trusted.

    Attributes:
        quiet_until: `boundary` has nothing to do before this step.
        is_stored: the state this process began with is a committed checkpoint.
    """

    def __init__(
        self,
        *,
        state: TrainingState,
        settings: Settings,
        voter: Voter,
        ring: SnapshotRing,
        probe: StateProbe,
        generation: int,
        small: Callable[[], dict[str, Any]],
        record: Callable[..., None] | None,
        on_certified: Callable[[int, int], None] | None,
    ) -> None:
        self.cadence = SnapshotCadence(settings)
        self.quiet_until = 0
        self.is_stored = False
        self._state = state
        self._voter = voter
        self._ring = ring
        self._probe = probe
        self._generation = generation
        self._small = small
        self._record = record
        self._on_certified = on_certified
        self._certify_after = settings.certify_after
        self._checkpoint_every = settings.checkpoint_every if on_certified is not None else None
        self._uncertified: list[int] = []  # steps of snapshots that still have to prove themselves
        self._to_write: set[int] = set()
        self._unprotected = True  # no snapshot of this process's beginning yet

    def boundary(self, step: int, *, is_writing: bool) -> Flag:
        """Between two updates: certifies and takes what is due. Every rank must call it at the same steps.

        It communicates only while the cadence is being measured.

        Args:
            step: updates applied.
            is_writing: some rank was still writing a checkpoint at the last vote.

        Returns:
            What is wrong with the state, found in a snapshot that was to be certified.
        """
        found = NO_FLAGS
        if self._is_checkpoint(step) and step != self.cadence.last and not (self._unprotected and self.is_stored):
            self._to_write.add(step)
        if self._to_write and is_writing:
            self._leave_out_checkpoints()
        if self._uncertified and step - self._uncertified[0] >= self._certify_after:
            found = self._certify(self._uncertified.pop(0))
        if self._unprotected:
            self._protect_beginning(step)
        elif step != self.cadence.last and (self.cadence.due(step) or self._is_checkpoint(step)):
            self.capture(step)
        self.cadence.settle(step, self._voter)
        self.quiet_until = self._next_event(step)
        return found

    def _next_event(self, step: int) -> int:
        if self._to_write:
            return step + 1
        events = [self.cadence.next_due()]
        if self._uncertified:
            events.append(self._uncertified[0] + self._certify_after)
        if self._checkpoint_every is not None:
            events.append(step - step % self._checkpoint_every + self._checkpoint_every)
        return min(events)

    def is_checkpoint_near(self, step: int) -> bool:
        """Whether checkpoints begin to be written, or are left out, at this boundary or the next few."""
        every = self._checkpoint_every
        return every is not None and step >= every and step % every <= self._certify_after + 1

    def _is_checkpoint(self, step: int) -> bool:
        every = self._checkpoint_every
        return every is not None and step > 0 and step % every == 0

    def _leave_out_checkpoints(self) -> None:
        """Gives up the checkpoints that wait for trust, because some rank still writes an earlier one.

        On all ranks alike: one that a single rank left out would never be whole, and the others would wait for it.
        The vote that said so is from before this boundary, and only a boundary begins writing, so a rank that has
        finished meanwhile does not matter, and none can have begun.
        """
        reason = "the one before is still being written"
        for step in sorted(self._to_write) if self._voter.rank == 0 else ():
            logger.warning("checkpoint of step %d left out: %s", step, reason)
            if self._record is not None:
                self._record(kind="checkpoint_late", step=step, generation=self._generation, reason=reason)
        self._to_write.clear()

    def _protect_beginning(self, step: int) -> None:
        """The state that a process begins with is what the user made or what was verified: trusted at once."""
        self._unprotected = False
        if step in self.certified_steps():
            self.cadence.captured(step, None)
            return
        self.capture(step)
        self._uncertified.clear()
        self._certify(step)

    def capture(self, step: int) -> None:
        """Takes a snapshot of the present state, which is that after `step` updates."""
        began = time.perf_counter()
        specs, tensors = self._state.tensors()
        slot = self._ring.capture(step, self._generation, specs, tensors, self._small())
        if slot is None:
            logger.warning("no snapshot of step %d (%s); protection is older than usual", step, self._ring.refusal)
            self.cadence.captured(step, None)
            return
        if step not in self._uncertified:
            self._uncertified.append(step)
        self.cadence.captured(step, time.perf_counter() - began)

    def _certify(self, step: int) -> Flag:
        """A snapshot is trusted once later steps were healthy and each of its numbers is finite."""
        slot = self.slot_of(step)
        if slot is None:
            return NO_FLAGS
        began = time.perf_counter()
        specs, tensors = self._ring.tensors(slot)
        judged = [
            (spec.name, tensor)
            for spec, tensor in zip(specs, tensors, strict=True)
            if tensor.is_floating_point() and tensor.numel() and self._state.is_judged(spec.name)
        ]
        bad = self._probe.nonfinite(judged)
        self.cadence.certified(time.perf_counter() - began)
        if bad:
            self._ring.drop(slot)
            logger.warning("the snapshot of step %d holds a value that is not finite in %s", step, bad)
            return Flag.OPTIMIZER_NONFINITE if bad.startswith("optimizer.") else Flag.WEIGHT_NONFINITE
        self._ring.certify(step)
        if step in self._to_write and self._on_certified is not None:
            self._to_write.discard(step)
            self._on_certified(step, slot)
        return NO_FLAGS

    def seal(self, step: int) -> None:
        """Trusts the present state, which was found sound on every rank."""
        if self.slot_of(step) is None:
            self.capture(step)
        self._uncertified = [waiting for waiting in self._uncertified if waiting != step]
        self._ring.certify(step)

    def slot_of(self, step: int) -> int | None:
        """The slot that holds `step`, or None."""
        return next((info.slot for info in self._ring.held() if info.step == step), None)

    def certified_steps(self) -> list[int]:
        """Steps this rank holds a certified snapshot of, newest first."""
        return sorted((info.step for info in self._ring.held() if info.certified), reverse=True)

    def take_out(self, step: int) -> Snapshot:
        """What the snapshot of `step` holds; it must be held."""
        slot = self.slot_of(step)
        assert slot is not None, f"step {step} was agreed on but is not held"
        return self._ring.restore(slot)

    def went_to(self, step: int) -> None:
        """The state is that of `step` again: what was to become of later snapshots is void."""
        self._uncertified = [waiting for waiting in self._uncertified if waiting < step]
        self._to_write = {waiting for waiting in self._to_write if waiting < step}
        self.quiet_until = 0
