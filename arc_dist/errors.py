"""The error tree and the exit codes.

::

    ArcError
    +-- ConfigError             the call or the environment is wrong        (do not retry)
    +-- DataNotReproducible     exact resumption of the data is impossible  (do not retry)
    +-- TrainingStopped         healing ran out of budget                   (do not retry)
    +-- Preempted               the job was told to go and saved its state  (retry)
    |   +-- PreemptedUnsaved    the same, but nothing could be saved
    +-- InfrastructureError     a peer, a node or the network was lost      (retry)
    |   +-- PeerLost            a rank did not take part in a collective
    |   +-- CoordinatorUnavailable
    +-- Fenced                  said by a generation that is over           (do not retry)
    |   +-- LeftOut             by a host that the job goes on without
    |   +-- Deposed             by a coordinator that a newer one has replaced
    +-- StoreError              a checkpoint could not be written or read
        +-- StoreFull           no space or quota left in this tier
        +-- StoreDenied         permission or credentials
        +-- StoreGone           the directory, bucket or mount is not there
        +-- StoreCorrupt        bytes differ from what the manifest says
        +-- StoreTransient      may succeed when tried again
        +-- CheckpointMismatch  a checkpoint of another model, world or format

Every message says what happened, where (rank, step, file), and ends with the remedy. Errors carry their fields and
survive pickling, because process pools and Ray move them between processes.
"""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """What a launcher should make of a finished job; the table in docs/exit-codes.md is made from these."""

    SUCCESS = 0
    USER_BUG = 1  # the script's own code (1-63) is passed through unchanged
    PREEMPTED = 75  # retry: a committed checkpoint exists
    INFRASTRUCTURE = 76  # retry: a rank, node, disk or network failed more often than the budget allows
    NO_PROGRESS = 77  # do not retry: the same failure came back, or healing ran out of budget
    CONFIGURATION = 78  # do not retry: the call or the environment is wrong


class ArcError(Exception):
    """Base of all errors raised on purpose by arc_dist.

    Args:
        message: what happened and where, and what to do about it.
        fields: machine-readable details (rank, step, file, ...), kept as attributes of `fields`.
    """

    exit_code: ExitCode = ExitCode.INFRASTRUCTURE
    retryable: bool = False

    def __init__(self, message: str, **fields: object) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.fields))


def _rebuild(cls: type[ArcError], message: str, fields: dict[str, object]) -> ArcError:
    return cls(message, **fields)


class ConfigError(ArcError):
    """The call, the settings or the environment are wrong; nothing was started."""

    exit_code = ExitCode.CONFIGURATION


class DataNotReproducible(ArcError):
    """The data source does not give the same batches again, so exact resumption is impossible."""

    exit_code = ExitCode.CONFIGURATION


class TrainingStopped(ArcError):
    """Healing used up its budget without progress; the last certified state was kept."""

    exit_code = ExitCode.NO_PROGRESS


class Preempted(ArcError):
    """The job was asked to end (SIGTERM, ...), all ranks agreed, and a last checkpoint is committed."""

    exit_code = ExitCode.PREEMPTED
    retryable = True


class PreemptedUnsaved(Preempted):
    """The job was asked to end, and the state of its last step is not saved: there is no store, or it refused."""

    exit_code = ExitCode.INFRASTRUCTURE


class InfrastructureError(ArcError):
    """A peer, a node or the network was lost."""

    retryable = True


class PeerLost(InfrastructureError):
    """A rank did not take part in a collective: it died, hangs or runs other code."""


class CoordinatorUnavailable(InfrastructureError):
    """The coordinator could not be reached within the deadline."""


class Fenced(ArcError):
    """A generation or coordinator that is over tried to commit, delete or decide."""


class LeftOut(Fenced):
    """The job goes on without this host, which was slow, or where ranks kept dying."""


class Deposed(Fenced):
    """A coordinator answered that a newer one has replaced it; who knows where that one is may ask it."""


class StoreError(ArcError):
    """A checkpoint could not be written or read."""


class StoreFull(StoreError):
    """No space or quota is left in this tier."""


class StoreDenied(StoreError):
    """Permission or credentials were refused."""


class StoreGone(StoreError):
    """The directory, bucket or mount is not there."""


class StoreCorrupt(StoreError):
    """Bytes differ from what the manifest says."""


class StoreTransient(StoreError):
    """The operation may succeed when tried again."""

    retryable = True


class CheckpointMismatch(StoreError):
    """The checkpoint belongs to another model, world or format version."""

    exit_code = ExitCode.CONFIGURATION
