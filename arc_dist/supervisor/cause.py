"""Why a trainer ended: what is known, told apart from what is guessed."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Mapping
from typing import Any

from arc_dist.errors import ExitCode
from arc_dist.protocol import budgets
from arc_dist.protocol.batches import BatchPlace
from arc_dist.supervisor import process

_OWN_DECISIONS = {
    int(ExitCode.PREEMPTED): "preempted, its state is saved",
    int(ExitCode.NO_PROGRESS): "gave up for lack of progress",
    int(ExitCode.CONFIGURATION): "cannot run as it is configured",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cause:
    """Why a trainer ended.

    Attributes:
        kind: ``finished``, ``signal``, ``exception``, ``exit``, ``oom``, ``hang`` or ``lost``.
        returncode: the exit code, or minus the signal.
        exception: what `exception.json` said, for kind ``exception``.
        evidence: for ``oom``, what the judgement rests on; for ``hang``, where it hung; for ``lost``, why its state
            cannot be had.
    """

    kind: str
    returncode: int
    exception: Mapping[str, Any] | None = None
    evidence: str = ""

    @property
    def is_echo(self) -> bool:
        """The trainer failed because a peer was gone, so the peer's death is the cause to report first."""
        if self.exception is None:
            return False
        return budgets.is_echo_of(str(self.exception.get("type", "")), str(self.exception.get("message", "")))

    def after_notice(self, number: int | None) -> Cause:
        """What to report of a trainer that ended after signal `number` told it to.

        How a script takes that is its own affair, and no bug; what it decided as a guard (preempted, say) stands.
        """
        own_end = self.kind in ("exception", "exit") and self.returncode not in _OWN_DECISIONS
        return Cause(kind="signal", returncode=-number) if own_end and number is not None else self

    def to_wire(self) -> dict[str, Any]:
        """The form that the coordinator reads."""
        exception = self.exception
        if exception is not None:
            keys = ("type", "message", "traceback", "step", "frame", "batch")
            exception = {key: exception.get(key) for key in keys}
        return {
            "kind": self.kind,
            "signal": -self.returncode if self.returncode < 0 else None,
            "exit_code": self.returncode if self.returncode >= 0 else None,
            "exception": exception,
            "evidence": self.evidence,
        }

    def __str__(self) -> str:
        if self.kind == "oom":
            return f"killed by the kernel's OOM killer ({self.evidence})"
        if self.kind == "hang":
            return f"hang: {self.evidence}"
        if self.exception is not None:
            message = str(self.exception.get("message", "")).strip().splitlines()
            text = f"{self.exception.get('type')}: {message[0][:200] if message else ''}"
            batch = self.exception.get("batch")
            return f"{text} (in {BatchPlace.from_dict(batch)})" if batch else text
        words = _OWN_DECISIONS.get(self.returncode)
        status = process.describe_status(self.returncode)
        return status if words is None else f"{words} ({status})"


def classify(
    returncode: int,
    *,
    exception: Mapping[str, Any] | None,
    oom_before: Mapping[str, int],
    oom_after: Mapping[str, int],
    named_by_oom_killer: bool | None = None,
) -> Cause:
    """Tells why a trainer ended.

    The OOM killer leaves no mark on its victim. A SIGKILL counts as its work when the kernel's counter of OOM kills
    rose while the trainer ran. On a shared host another process may have been the victim: the kernel's log tells, where
    it can be read, and else the evidence says which counter it was.

    Args:
        returncode: as from `os.waitstatus_to_exitcode`.
        exception: `exception.json` of this generation, if it was written.
        oom_before: `process.oom_kills()` when the trainer was forked.
        oom_after: the same after its death.
        named_by_oom_killer: see `process.named_by_oom_killer`.
    """
    if returncode == 0:
        return Cause(kind="finished", returncode=0)
    if returncode == -signal.SIGKILL:
        for scope, words in (("cgroup", "this cgroup's"), ("host", "the host's")):
            rise = oom_after.get(scope, 0) - oom_before.get(scope, 0)
            if scope in oom_before and rise > 0 and (scope == "cgroup" or named_by_oom_killer is not False):
                return Cause(kind="oom", returncode=returncode, evidence=f"{words} oom_kill counter rose by {rise}")
    if returncode < 0:
        return Cause(kind="signal", returncode=returncode)
    if exception is not None:
        return Cause(kind="exception", returncode=returncode, exception=exception)
    return Cause(kind="exit", returncode=returncode)
