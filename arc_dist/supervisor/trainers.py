"""The trainers of one rank, one after the other, as their supervisor sees them: by the zygote and shared memory."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arc_dist.errors import InfrastructureError
from arc_dist.snapshot import layout
from arc_dist.snapshot.progress import ProgressPage, Word
from arc_dist.supervisor import cause as causes
from arc_dist.supervisor import process, wire, zygote
from arc_dist.supervisor.events import Event, Events, read_zygote
from arc_dist.telemetry.log import logger

_DEATH_LIMIT_S = 30.0


@dataclasses.dataclass(kw_only=True)
class Trainer:
    """A trainer, as far as it is known. Times are `time.monotonic()`."""

    generation: int
    plan: Mapping[str, Any]
    oom_before: Mapping[str, int]
    pid: int | None = None
    ticks: int | None = None
    forked_at: float | None = None
    exited_at: float | None = None
    returncode: int | None = None
    clean: bool = False  # nothing that it had started lives any more
    killed_by_us: bool = False
    hang: str = ""  # where it hung, when that is why it was killed


class Trainers:
    """Forks trainers through the zygote and keeps track of the present one.

    Args:
        rank: for messages.
        shm_dir: this rank's directory, which trainers write to; the status page is created in it.
        zygote_process: forks them. A new one takes its place when it dies.
        events: where the zygote's messages go; the supervisor hands them back to `hear` and `lost`.
    """

    def __init__(self, rank: int, shm_dir: Path, zygote_process: zygote.ZygoteProcess, events: Events[Event]) -> None:
        self.current: Trainer | None = None
        self.zygote_ready = False
        self._rank = rank
        self._shm_dir = shm_dir
        self._zygote = zygote_process
        self._events = events
        self._page = layout.StatusPage.create(shm_dir)
        self._progress = ProgressPage.create(shm_dir)
        read_zygote(zygote_process.sock, zygote_process.pid, events)

    def move(self, rank: int, shm_dir: Path) -> None:
        """From now on trainers are those of another rank, with another directory. Nothing may run."""
        assert self.gone
        self.current = None
        self._rank, self._shm_dir = rank, shm_dir
        self._page = layout.StatusPage.create(shm_dir)
        self._progress = ProgressPage.create(shm_dir)

    @property
    def gone(self) -> bool:
        """Whether nothing runs: there was no trainer yet, or the present one has ended."""
        return self.current is None or self.current.returncode is not None

    @property
    def clean(self) -> bool:
        """Whether nothing runs and nothing is left of what ran."""
        return self.current is None or self.current.clean

    def fork(self, generation: int, plan: Mapping[str, Any], environ: Mapping[str, str]) -> Trainer:
        """Asks for the trainer of a generation; its pid comes with the zygote's answer."""
        self._clear(generation)
        self.current = Trainer(generation=generation, plan=plan, oom_before=process.oom_kills())
        self._command({"command": "fork", "set": dict(environ), "unset": []})
        return self.current

    def keep(self, generation: int, plan: Mapping[str, Any]) -> Trainer:
        """The present trainer, which has left its generation, as the one of the next."""
        assert self.current is not None
        self._clear(generation)
        self.current = dataclasses.replace(
            self.current, generation=generation, plan=plan, oom_before=process.oom_kills(), hang=""
        )
        return self.current

    def _clear(self, generation: int) -> None:
        """What an earlier generation left for its supervisor must not pass for a word of this one."""
        layout.clear_exception(self._shm_dir)
        if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            # What an earlier generation wrote there (@record) would be shown as the reason of a later, other end.
            Path(error_file).unlink(missing_ok=True)
        self._page.write(phase=layout.Phase.NONE, generation=generation, step=0)
        self._progress.clear()

    def kill(self) -> None:
        """SIGKILLs the trainer."""
        if self.current is not None:
            self.current.killed_by_us = True
        self._command({"command": "kill"})

    def end_hang(self, generation: int, reason: str) -> None:
        """SIGKILLs the trainer of `generation`, because it hangs; a stopped one dies of that, too."""
        trainer = self.current
        if trainer is not None and trainer.generation == generation and trainer.returncode is None:
            trainer.hang = reason
            self._command({"command": "kill"})

    def forward(self, number: int) -> None:
        """Hands a signal on to the trainer, unless it got it already (see zygote.py)."""
        self._command({"command": "signal", "number": number})

    def phase(self) -> layout.Phase:
        """What the trainer says it is doing."""
        return self._page.read().phase

    def replica_step_s(self) -> float:
        """How long a step takes on average in a trainer whose state can stand in for that of others; else 0."""
        return 0.0 if self._progress.words[Word.SHARDED] else self._progress.mean_step_s()

    def last_step(self, trainer: Trainer) -> int | None:
        """The trainer's last committed step; None for a script that counts none (the page is as we set it up)."""
        status = self._page.read()
        return status.step if status.pid == trainer.pid else None

    def last_progress_at(self, trainer: Trainer) -> float | None:
        """When the trainer last wrote the status page, if ever."""
        status = self._page.read()
        return status.progress_ns / 1e9 if status.pid == trainer.pid else None

    def cause_of(self, trainer: Trainer) -> causes.Cause:
        """Why a trainer that is gone ended."""
        assert trainer.returncode is not None
        if trainer.hang and trainer.returncode == -signal.SIGKILL:
            return causes.Cause(kind="hang", returncode=trainer.returncode, evidence=trainer.hang)
        was_killed = trainer.returncode == -signal.SIGKILL
        return causes.classify(
            trainer.returncode,
            exception=layout.read_exception(self._shm_dir),
            oom_before=trainer.oom_before,
            oom_after=process.oom_kills() if was_killed else {},
            named_by_oom_killer=was_killed and process.named_by_oom_killer(trainer.pid or 0, trainer.forked_at or 0.0),
        )

    def inventory(self) -> list[dict[str, Any]]:
        """The valid snapshots in this rank's shared memory, for the coordinator."""
        return [dataclasses.asdict(slot) for slot in layout.inspect(self._shm_dir)]

    def hear(self, message: Mapping[str, Any], zygote_pid: int) -> None:
        """Takes a message of the zygote."""
        trainer = self.current
        if zygote_pid != self._zygote.pid:
            return
        match message["event"]:
            case "ready":
                self.zygote_ready = True
            case "forked" if trainer is not None:
                trainer.pid, trainer.ticks, trainer.forked_at = message["pid"], message["ticks"], message["at"]
            case "exited" if trainer is not None and trainer.pid == message["pid"]:
                trainer.returncode, trainer.exited_at = message["status"], message["at"]
            case "clean" if trainer is not None and trainer.pid == message["pid"]:
                trainer.clean = True

    def lost(self, zygote_pid: int) -> None:
        """The zygote died and took the trainer along; a new one imports everything anew (seconds, not milliseconds).

        Raises:
            InfrastructureError: it had not even become ready; another would fare no better.
        """
        old = self._zygote
        if zygote_pid != old.pid:
            return
        process.wait_gone(old.pid, ticks=old.ticks, timeout_s=_DEATH_LIMIT_S)
        trainer = self.current
        if trainer is not None and trainer.pid is not None and trainer.returncode is None:
            process.wait_gone(trainer.pid, ticks=trainer.ticks, timeout_s=_DEATH_LIMIT_S)
        zygote.kill_orphans()  # the supervisor adopts what the zygote leaves
        if trainer is not None:
            if trainer.returncode is None:
                trainer.returncode, trainer.exited_at = -int(signal.SIGKILL), time.monotonic()
            trainer.clean = True
        if not self.zygote_ready:
            raise InfrastructureError(
                f"rank {self._rank}: the zygote process {old.pid} ended before it could fork; its error output above "
                f"says why.",
                rank=self._rank,
            )
        logger.warning("the zygote (pid %d) died; starting another, which imports torch again", old.pid)
        old.sock.close()
        self.zygote_ready = False
        self._zygote = zygote.start_zygote()
        read_zygote(self._zygote.sock, self._zygote.pid, self._events)

    def _command(self, message: Mapping[str, Any]) -> None:
        # A broken pipe means that the zygote is gone; its reader thread says so in a moment, and that is acted on.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            wire.send(self._zygote.sock, message)
