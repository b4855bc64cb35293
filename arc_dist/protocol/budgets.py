"""Why a generation ended, who is to blame, and whether another attempt is worth while.

**The root.** One death makes others: a peer's collective fails with "connection closed by peer", and that exception
travels up the user's script like any other. Such an *echo* never outweighs a cause that is not one, whatever order the
reports came in. Among the rest the first that was reported is the root. Only the root is judged; the generation is
judged once, when every rank has said that its process is gone, so that all evidence is in.

**The judgement**, first rule that applies:

1. The process asked for it: exit codes 75 (preempted), 77 (healing gave up) and 78 (configuration) end the job as said.
2. Somebody else keeps count: a supervisor was replaced, by a launcher with a budget of its own, and the job goes on; or
   a preemption notice had come, and the job ends as preempted, unless the script is at fault and 3, 4 or 5 end it.
   Neither costs budget here.
3. A user's bug repeats itself: an exception or exit before the job's very first step, or the same one at the same
   place a second time. Trying again would do the same again. *The same place* is the same batch, by its number in the
   run, where both failures name one (healing may have left batches out in between, so that a step has others), else
   the same step. *The same exception* has the same type, was raised by the same line, and differs in numbers at most:
   process ids, ports, sizes. A failure whose step was passed since is forgotten, for it did not repeat itself there.
4. No progress: `max_fruitless` generations in a row ended without a step beyond the best one before. This holds for
   every cause, and it is what makes the whole thing end: a job gets further or stops.
5. The restart budget is used up.
6. Otherwise: another generation.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from arc_dist.errors import ExitCode
from arc_dist.protocol.batches import BatchPlace

_FINAL_CODES = frozenset({ExitCode.PREEMPTED, ExitCode.NO_PROGRESS, ExitCode.CONFIGURATION})
_MAX_TEXT = 8192  # characters kept of a message or traceback
_MAX_TOLD = 4  # failures beside the root that a message names
_MAX_SIGNATURES = 64  # bound of the memory for rule 3
_VARYING = re.compile(r"0x[0-9a-fA-F]+|\d+")

# How torch, gloo, NCCL and the kernel say that somebody else is gone.
_ECHO_TYPES = frozenset(
    {
        "PeerLost",
        "DistBackendError",
        "DistNetworkError",
        "DistStoreError",
        "ConnectionResetError",
        "ConnectionRefusedError",
        "BrokenPipeError",
    }
)
_ECHO_TEXTS = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "socket closed",
    "gloo/transport",
    "nccl error",
    "nccl communicator was aborted",
)


def is_echo_of(exception_type: str, message: str) -> bool:
    """Whether an exception of this type (with or without its module) and message is how the loss of a peer is told."""
    text = message.lower()
    return exception_type.rpartition(".")[2] in _ECHO_TYPES or any(known in text for known in _ECHO_TEXTS)


class CauseKind(enum.Enum):
    """How a rank's process went. Values are part of the wire format."""

    SIGNAL = "signal"
    EXCEPTION = "exception"
    EXIT = "exit"
    OOM = "oom"
    HANG = "hang"  # ended because it did not go on
    LOST = "lost"  # gone without a report
    REPLACED = "replaced"  # its supervisor was replaced, and with it all its processes
    OVERDUE = "overdue"  # it was told to go and did not in time, so its supervisor ended it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cause:
    """Why one rank's process is gone.

    Attributes:
        kind: how it went.
        signal: number of the signal, for `SIGNAL`, `OOM` and `HANG`.
        exit_code: the process's exit code, where it had one.
        exception_type: class name of an uncaught exception, with or without its module.
        message: the exception's message; for `HANG`, where it hung.
        traceback: the exception's traceback, for reports only.
        frame: the line that raised the exception.
        batch: where in the data it was raised, for an exception in a step of the full loop.
    """

    kind: CauseKind
    signal: int | None = None
    exit_code: int | None = None
    exception_type: str = ""
    message: str = ""
    traceback: str = ""
    frame: str = ""
    batch: BatchPlace | None = None

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Cause:
        """Reads the wire form ``{"kind", "signal", "exit_code", "exception": {"type", "message", "traceback", ...}}``.

        Raises:
            ValueError: the kind is unknown or a number is not a number.
        """
        exception = fields.get("exception")
        details: Mapping[str, Any] = cast("Mapping[str, Any]", exception) if isinstance(exception, Mapping) else {}
        batch = details.get("batch")
        return Cause(
            kind=CauseKind(fields.get("kind")),
            signal=_integer_or_none(fields.get("signal")),
            exit_code=_integer_or_none(fields.get("exit_code")),
            exception_type=str(details.get("type") or "")[:_MAX_TEXT],
            message=str(details.get("message") or fields.get("evidence") or "")[:_MAX_TEXT],
            traceback=str(details.get("traceback") or "")[-_MAX_TEXT:],
            frame=str(details.get("frame") or "")[-_MAX_TEXT:],
            batch=BatchPlace.from_dict(cast("Mapping[str, Any]", batch)) if isinstance(batch, Mapping) else None,
        )

    def as_dict(self) -> dict[str, Any]:
        exception = None
        if self.exception_type:
            exception = {
                "type": self.exception_type,
                "message": self.message,
                "traceback": self.traceback,
                "frame": self.frame,
                "batch": self.batch.as_dict() if self.batch is not None else None,
            }
        fields = {"kind": self.kind.value, "signal": self.signal, "exit_code": self.exit_code, "exception": exception}
        return fields if exception else {**fields, "evidence": self.message}

    @property
    def is_echo(self) -> bool:
        """True when this looks like the consequence of another rank's death."""
        if self.kind is not CauseKind.EXCEPTION:
            return False
        return is_echo_of(self.exception_type, self.message)

    @property
    def is_users(self) -> bool:
        """True when the script itself ended: by an exception or an exit code of its own, not as an echo."""
        if self.exit_code == ExitCode.INFRASTRUCTURE:
            return False
        return self.kind in (CauseKind.EXCEPTION, CauseKind.EXIT) and not self.is_echo

    @property
    def signature(self) -> str:
        """What two deaths of the same origin have in common; addresses and numbers differ, and are left out."""
        if self.kind is CauseKind.EXCEPTION:
            return f"{self.exception_type} at {self.frame}: {_VARYING.sub('#', self.message)}"
        return f"{self.kind.value} {self.signal if self.signal is not None else self.exit_code}"

    def __str__(self) -> str:
        if self.kind is CauseKind.SIGNAL:
            return f"killed by signal {self.signal}"
        if self.kind is CauseKind.OOM:
            return "killed by the kernel for lack of memory"
        if self.kind is CauseKind.HANG:
            return f"hung ({self.message})"
        if self.kind is CauseKind.EXIT:
            return f"exited with code {self.exit_code}"
        if self.kind is CauseKind.LOST:
            return "lost without a report"
        if self.kind is CauseKind.REPLACED:
            return "replaced by another supervisor"
        if self.kind is CauseKind.OVERDUE:
            return "did not leave by itself before its grace period was about to end"
        message = self.message.strip()
        first_line = message.splitlines()[0] if message else ""
        return (
            f"{self.exception_type or 'exception'}: {first_line}" if first_line else self.exception_type or "exception"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Death:
    """A rank's process of the current generation is gone, at or after `step` committed steps (None: not known)."""

    rank: int
    cause: Cause
    step: int | None = None

    def __str__(self) -> str:
        at = "" if self.step is None else f" at step {self.step}"
        return f"rank {self.rank} {self.cause}{at}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetPolicy:
    """How patient to be.

    Attributes:
        max_restarts: generations beyond the first, for any cause but preemption.
        max_fruitless: generations in a row without progress that end the job.
    """

    max_restarts: int = 100
    max_fruitless: int = 3

    def __post_init__(self) -> None:
        if self.max_restarts < 0:
            raise ValueError(f"BudgetPolicy.max_restarts must be 0 or more, got {self.max_restarts}")
        if self.max_fruitless < 1:
            raise ValueError(f"BudgetPolicy.max_fruitless must be 1 or more, got {self.max_fruitless}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """A failure of the user's own, as far as it has to be recognised: what, after which step, and at which batch."""

    signature: str
    step: int | None = None
    ordinal: int | None = None

    @staticmethod
    def of(death: Death) -> Failure:
        batch = death.cause.batch
        ordinal = batch.ordinal if batch is not None else None
        return Failure(signature=death.cause.signature, step=death.step, ordinal=ordinal)

    def repeats(self, earlier: Failure) -> bool:
        """Whether this is the same failure at the same place."""
        if self.signature != earlier.signature:
            return False
        if self.ordinal is not None and earlier.ordinal is not None:
            return self.ordinal == earlier.ordinal
        return self.step == earlier.step

    def was_passed(self, reached: int) -> bool:
        """Whether the step that failed was committed since."""
        return self.step is not None and reached > self.step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ledger:
    """What has been spent.

    Attributes:
        restarts: counted restarts so far.
        fruitless: generations in a row that ended without progress.
        best_step: the furthest committed step that any generation reached.
        seen: the user's own failures that nothing went beyond since, newest last.
    """

    restarts: int = 0
    fruitless: int = 0
    best_step: int = 0
    seen: tuple[Failure, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Ledger:
        return Ledger(
            restarts=int(fields["restarts"]),
            fruitless=int(fields["fruitless"]),
            best_step=int(fields["best_step"]),
            seen=tuple(Failure(**failure) for failure in fields["seen"]),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """The evidence about a generation that is over.

    Attributes:
        first: no generation came before it in this job.
        deaths: in the order in which they were reported; at least one.
        reached: the furthest committed step that was heard of (0: none).
        preempted: a preemption notice came in.
    """

    first: bool
    deaths: Sequence[Death]
    reached: int
    preempted: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """Another generation (`stop_code` None), or the end of the job with that exit code."""

    reason: str
    root: Death
    stop_code: int | None = None


def story(root: Death, deaths: Sequence[Death]) -> str:
    """The root, and what failed beside it for reasons of its own: echoes and what is only known to be gone are none."""
    silent = (CauseKind.LOST, CauseKind.REPLACED)
    others = [str(d) for d in deaths if d != root and not d.cause.is_echo and d.cause.kind not in silent]
    return f"{root} (and for reasons of their own: {'; '.join(others[:_MAX_TOLD])})" if others else str(root)


def root_of(deaths: Sequence[Death]) -> Death:
    """The death that made the others: the first that is no echo, else the first."""
    return next((death for death in deaths if not death.cause.is_echo), deaths[0])


def judge(policy: BudgetPolicy, ledger: Ledger, ended: Ended) -> tuple[Ledger, Judgement]:
    """Applies the rules above, in their order: (policy, ledger, evidence) -> (ledger', judgement)."""
    root = root_of(ended.deaths)
    cause = root.cause
    told = story(root, ended.deaths)
    progressed = ended.reached > ledger.best_step
    after = dataclasses.replace(
        ledger,
        best_step=max(ledger.best_step, ended.reached),
        fruitless=0 if progressed else ledger.fruitless + 1,
        seen=tuple(failure for failure in ledger.seen if not failure.was_passed(ended.reached)),
    )

    if cause.exit_code in _FINAL_CODES:
        return after, Judgement(root=root, stop_code=cause.exit_code, reason=f"{told}: it asked not to be restarted")

    free = dataclasses.replace(after, fruitless=0 if progressed else ledger.fruitless)
    if cause.kind is CauseKind.REPLACED:
        return free, Judgement(root=root, reason=told)
    preempted = Judgement(root=root, stop_code=ExitCode.PREEMPTED, reason=f"{told} after a preemption notice")
    if ended.preempted and not cause.is_users:
        return free, preempted

    own_code = cause.exit_code or ExitCode.USER_BUG
    if cause.is_users:
        if ended.first and ended.reached == 0:
            return after, Judgement(root=root, stop_code=own_code, reason=f"{told}, before the first step of the job")
        failure = Failure.of(root)
        if any(failure.repeats(earlier) for earlier in after.seen):
            reason = f"{told}, the same as in an earlier attempt{_advice(cause.batch)}"
            return after, Judgement(root=root, stop_code=own_code, reason=reason)
        after = dataclasses.replace(after, seen=(*after.seen, failure)[-_MAX_SIGNATURES:])

    if after.fruitless >= policy.max_fruitless:
        reason = f"{told}; {after.fruitless} attempts in a row brought no step beyond {after.best_step}"
        return after, Judgement(root=root, stop_code=ExitCode.NO_PROGRESS, reason=reason)

    if ledger.restarts >= policy.max_restarts:
        code = own_code if cause.is_users else ExitCode.INFRASTRUCTURE
        spent = f"all {ledger.restarts} restarts are used up" if policy.max_restarts else "no restart is allowed"
        reason = f"{told}; {spent} (ARC_MAX_RESTARTS={policy.max_restarts})"
        return after, Judgement(root=root, stop_code=code, reason=reason)

    if ended.preempted:
        return free, preempted
    after = dataclasses.replace(after, restarts=ledger.restarts + 1)
    return after, Judgement(root=root, reason=told)


def _advice(batch: BatchPlace | None) -> str:
    """Which data to look at, when the script fails at the same data each time."""
    if batch is None:
        return ""
    return f". It fails each time at {batch}: mend or leave out these samples, or what the script does with them"


def _integer_or_none(value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"not a whole number: {value!r}")
    return value
