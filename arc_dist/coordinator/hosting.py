"""Opens a job's coordinator the same way wherever it is hosted: in rank 0's supervisor, or in a Ray actor.

Who starts a world of ranks leaves a mark, its own random name, in the run directory. A host on another node reads the
mark before it opens the journal: where there is none, the directory is another one, and another mark is that of a later
start of the job, which must not be disturbed.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from arc_dist.coordinator.hosts import HostDesk
from arc_dist.coordinator.service import JOURNAL_NAME, Coordinator
from arc_dist.coordinator.tls import Certificate
from arc_dist.errors import ConfigError, Deposed
from arc_dist.protocol.pulse import PulseRules

MARK_NAME = "coordinator.start"


def _nothing() -> str:
    return ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostSpec:
    """What a host of the coordinator is told; plain values, so that it can be sent.

    Attributes:
        job_id: the job's name.
        run_dir: where the journal is; an absolute path.
        world_size: number of ranks.
        start: names this start of the world; see the module's text.
        token: what callers must show.
        max_restarts: see `protocol.budgets`.
        host_timeout_s: see `PulseRules.timeout_s`.
        min_nodes: see `PulseRules`.
        expects_all: see `PulseRules`.
        is_replaceable: see `PulseRules`.
        spare_after_s: see `Coordinator`.
        evicts: see `Coordinator`.
        tls_cert: PEM file of the certificate to show; None serves plain HTTP.
        tls_key: PEM file of its key.
    """

    job_id: str
    run_dir: str
    world_size: int
    start: str
    token: str = dataclasses.field(repr=False)
    max_restarts: int = 100
    host_timeout_s: float = 15.0
    min_nodes: int = 0
    expects_all: bool = False
    is_replaceable: bool = False
    spare_after_s: float = 15.0
    evicts: bool = False
    tls_cert: str | None = None
    tls_key: str | None = None

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> HostSpec:
        """A spec that was sent; fields that this version does not know are ignored.

        Raises:
            TypeError: a field is missing.
        """
        known = {field.name for field in dataclasses.fields(HostSpec)}
        return HostSpec(**{name: value for name, value in fields.items() if name in known})

    @property
    def certificate(self) -> Certificate | None:
        """What to show to callers.

        Raises:
            ConfigError: there is a certificate without a key, or a key without a certificate.
        """
        return Certificate.of(_path(self.tls_cert), _path(self.tls_key))

    @property
    def has_run(self) -> bool:
        """Whether the job has a journal already, from an earlier start."""
        return (Path(self.run_dir) / JOURNAL_NAME).exists()

    def leave_mark(self) -> None:
        """Makes this the newest start of the job.

        Raises:
            ConfigError: the run directory cannot be written.
        """
        directory = Path(self.run_dir)
        draft = directory / f".{MARK_NAME}.{os.getpid()}"
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            draft.write_text(self.start)
            draft.rename(directory / MARK_NAME)
        except OSError as error:
            raise ConfigError(f"{directory} cannot be written: {error}. Set ARC_RUN_DIR to another one.") from error

    def check_mark(self) -> None:
        """Whether this process sees the run directory of this start, and no later one.

        Raises:
            ConfigError: it does not see that directory.
            Deposed: a later start of the job has left its mark.
        """
        path = Path(self.run_dir) / MARK_NAME
        try:
            mark = path.read_text()
        except OSError as error:
            raise ConfigError(
                f"the run directory {self.run_dir} of job {self.job_id!r} is not reached from {os.uname().nodename}, "
                f"where the coordinator is to run ({error}). Set ARC_RUN_DIR to a directory that all nodes share."
            ) from error
        if mark != self.start:
            raise Deposed(f"job {self.job_id!r} was started again: {path} is another start's")

    def open(self, lease: Callable[[], str] = _nothing) -> Coordinator:
        """Opens the journal, which begins a new epoch, and with it the coordinator.

        Args:
            lease: see `HostDesk`.

        Raises:
            ConfigError: another coordinator uses the run directory, or it cannot be written.
            StoreCorrupt: the journal was altered.
        """
        rules = PulseRules(
            timeout_s=self.host_timeout_s,
            min_nodes=self.min_nodes,
            expects_all=self.expects_all,
            is_replaceable=self.is_replaceable,
        )
        return Coordinator.open(
            self.world_size,
            run_dir=Path(self.run_dir),
            job_id=self.job_id,
            max_restarts=self.max_restarts,
            hosts=HostDesk(self.world_size, rules, time.monotonic, lease),
            spare_after_s=self.spare_after_s,
            evicts=self.evicts,
        )


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)
