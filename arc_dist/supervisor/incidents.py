"""What a supervisor says about a trainer's death: two log lines, and one record for the incident file."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from arc_dist.supervisor.cause import Cause


@dataclasses.dataclass(frozen=True, kw_only=True)
class Incident:
    """A trainer's death.

    Attributes:
        time: wall-clock time of this record.
        died_at: wall-clock time at which the zygote was told of the death by the kernel.
        rank: whose trainer died.
        generation: the generation that it belonged to.
        step: its last committed step; None for a script that counts none.
        cause: why.
        exited_at: `died_at` on the monotonic clock.
        seen_after_s: from the trainer's last sign of life (status page) to `exited_at`. The moment of death itself is
            not recorded by the kernel, so this is an upper bound, usually the part of a step that had passed.
    """

    time: float
    died_at: float
    rank: int
    generation: int
    step: int | None
    cause: Cause
    exited_at: float
    seen_after_s: float | None

    @staticmethod
    def seen(
        *,
        rank: int,
        generation: int,
        step: int | None,
        cause: Cause,
        exited_at: float,
        last_progress_at: float | None,
    ) -> Incident:
        """A death just learnt of; times are monotonic."""
        now = time.time()
        return Incident(
            time=now,
            died_at=now - (time.monotonic() - exited_at),
            rank=rank,
            generation=generation,
            step=step,
            cause=cause,
            exited_at=exited_at,
            seen_after_s=None if last_progress_at is None else max(0.0, exited_at - last_progress_at),
        )

    def first_line(self, pid: int | None) -> str:
        """Said at once; the logger names the rank."""
        where = "" if self.step is None else f" after step {self.step}"
        verb = "ended" if self.cause.kind == "exit" else "died"
        return f"generation {self.generation}: trainer {pid} {verb}{where}: {self.cause}"

    def resumed(self, *, generation: int, plan: Mapping[str, Any], forked_at: float) -> dict[str, Any]:
        """The record, once the next generation's trainer is forked."""
        restored = plan.get("step")
        lost = None if self.step is None or restored is None else max(0, self.step - int(restored))
        return {
            **self._record(),
            "action": "restart",
            "new_generation": generation,
            "restored_step": restored,
            "tier": plan.get("tier"),
            "resumed_after_s": forked_at - self.exited_at,
            "steps_lost": lost,
        }

    def stopped(self, reason: str) -> dict[str, Any]:
        """The record, when no generation follows."""
        return {**self._record(), "action": "stop", "reason": reason}

    def _record(self) -> dict[str, Any]:
        record = {
            "time": self.time,
            "died_at": self.died_at,
            "kind": "rank_died",
            "rank": self.rank,
            "generation": self.generation,
            "cause": str(self.cause),
            "seen_by": "supervisor",
            "seen_after_s": self.seen_after_s,
        }
        return record if self.step is None else {**record, "step": self.step}

    def second_line(self, report: Mapping[str, Any]) -> str:
        """Said when the next generation runs."""
        source = {"memory": "in memory", "checkpoint": "in the checkpoint store"}.get(str(report["tier"]))
        restored = "from the script's start" if source is None else f"from step {report['restored_step']} {source}"
        lost = "" if report["steps_lost"] is None else f", {report['steps_lost']} steps lost"
        return (
            f"all ranks restarted as generation {report['new_generation']} {restored}, "
            f"{report['resumed_after_s']:.3f} s after the death{lost}"
        )
