"""Ends a trainer with its generation, giving it the time that what it is doing deserves."""

from __future__ import annotations

import time
from collections.abc import Callable

from arc_dist.errors import InfrastructureError
from arc_dist.snapshot import layout
from arc_dist.supervisor.departure import Departure
from arc_dist.supervisor.trainers import Trainer, Trainers
from arc_dist.telemetry.log import logger

_POLL_S = 0.002
_STEPPING_LIMIT_S = 0.3
_REPLICA_LIMIT_S = 2.0  # and the time of two steps; on a machine with much else to do, 0.3 s pass before a process runs
_STEPPING_MAX_S = 60.0
_PARTING_LIMIT_S = 10.0
_LAUNCHER_SIGNAL_S = 0.5
_KILL_LIMIT_S = 30.0

# What a trainer that was told to go is in while it saves its state, or does something of its own, and ends.
_ENDS_BY_ITSELF = (layout.Phase.NONE, layout.Phase.LEAVING, layout.Phase.DONE)


class Parting:
    """See the module's text.

    Args:
        rank: this rank, for messages.
        trainers: of this rank.
        departure: what is known of a notice.
        own_signal: the signal that told this supervisor to end, if one did.
        wait: handles events until a condition holds, `timeout_s` at most.
    """

    def __init__(
        self,
        *,
        rank: int,
        trainers: Trainers,
        departure: Departure,
        own_signal: Callable[[], int | None],
        wait: Callable[..., bool],
    ) -> None:
        self._rank = rank
        self._trainers = trainers
        self._departure = departure
        self._own_signal = own_signal
        self._wait = wait

    def end(self, reason: str, *, leaving: int = 0) -> None:
        """Ends what is left of a generation, giving a trainer that is saving its last step the time to do so.

        Args:
            reason: for the log.
            leaving: number of the signal by which the job was told to go, 0 if it was not. A script that does something
                of its own then gets it too, as it would under torchrun: from the launcher, which may be slower than the
                other ranks are, else from here.
        """
        trainer = self._trainers.current
        if trainer is None:
            return
        asked_at = time.monotonic()
        told = False
        stepping_s = _STEPPING_LIMIT_S
        if (step_s := self._trainers.replica_step_s()) > 0:
            # It learns that a peer is gone at its next collective, and its state may be the newest that there is.
            stepping_s = min(_REPLICA_LIMIT_S + 2 * step_s, _STEPPING_MAX_S)
        while trainer.returncode is None:
            phase = self._trainers.phase()
            waited_s = time.monotonic() - asked_at
            limit_s = {layout.Phase.STEPPING: stepping_s, layout.Phase.PARTING: _PARTING_LIMIT_S}.get(phase, 0.0)
            if leaving and phase is layout.Phase.NONE:
                limit_s = _PARTING_LIMIT_S
                if waited_s >= _LAUNCHER_SIGNAL_S and self._own_signal() is None and not told:
                    self._trainers.forward(leaving)
                    told = True
            if phase in _ENDS_BY_ITSELF and (leaving or self._own_signal() is not None):
                limit_s = _PARTING_LIMIT_S
            if self._departure.is_flushing:
                limit_s = 0.0
            if waited_s >= limit_s:
                self._trainers.kill()
                break
            self._wait(lambda: trainer.returncode is not None, timeout_s=_POLL_S)
        self.await_clean(trainer)
        logger.debug("generation %d ended here: %s", trainer.generation, reason)

    def await_clean(self, trainer: Trainer) -> None:
        """Waits until a trainer that was killed, and all that it had started, is gone."""
        if not self._wait(lambda: trainer.clean, timeout_s=_KILL_LIMIT_S):
            raise InfrastructureError(
                f"rank {self._rank}: trainer {trainer.pid} of generation {trainer.generation} does not die, "
                f"{_KILL_LIMIT_S:.0f} s after SIGKILL: it hangs in the kernel (GPU driver, network file system). "
                f"Take this node out of the job.",
                rank=self._rank,
                pid=trainer.pid,
            )
