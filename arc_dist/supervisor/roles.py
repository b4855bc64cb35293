"""What a supervisor is given, whom it asks, and how it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from arc_dist.peers.service import Peers


class Client(Protocol):
    """What a supervisor asks of the coordinator; coordinator/service.py says what the answers mean."""

    def ready(
        self,
        *,
        rank: int,
        generation: int,
        store: dict[str, Any] | None,
        inventory: list[dict[str, Any]],
        shm_dir: str,
        host: str,
        peer: dict[str, Any] | None = None,
    ) -> dict[str, Any]: ...
    def died(self, *, rank: int, generation: int, cause: dict[str, Any], step: int | None) -> dict[str, Any]: ...
    def finished(self, *, rank: int, generation: int) -> dict[str, Any]: ...
    def directive(self, *, rank: int, generation: int, timeout_s: float, after: str) -> dict[str, Any]: ...
    def incident(self, **line: Any) -> dict[str, Any]: ...
    def progress(self, *, rank: int, generation: int, step: int) -> dict[str, Any]: ...
    def preempt(self, *, rank: int) -> dict[str, Any]: ...
    def watched(self, *, rank: int, generation: int, report: dict[str, Any]) -> dict[str, Any]: ...
    def pulse(self, *, rank: int, node: int, leaving: bool = False) -> dict[str, Any]: ...
    def report(
        self, *, rank: int, generation: int, step: int, quiet_s: float | None, held: list[dict[str, Any]]
    ) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Ending:
    """How the supervisor itself is to end.

    Attributes:
        returncode: an exit code, or minus the signal that ended the trainer.
        was_told: a signal told it to end, so that the code says nothing about the script: a launcher ends all ranks
            when it lost one, and the others then fail as they may.
        survivors: (rank, node) of those that go on as a smaller world; empty when the job is over for this supervisor.
    """

    returncode: int
    was_told: bool = False
    survivors: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What a supervisor is given.

    Attributes:
        rank: this rank.
        host: identity of this host, for plans that use a peer's memory.
        shm_dir: this rank's directory in shared memory.
        environ: variables that are the same in every generation.
        store_for: generation -> ``{"host", "port"}`` of its store; on rank 0, where a launcher or a world needs one.
        generation_began: told (on rank 0, to close old stores) when a generation runs.
        uses_store: trainers meet in a store (false only for a world of one without a launcher).
        grace_s: from a preemption notice to the end of all processes.
        preempt_signals: which signals are notices.
        is_guarded: the script's optimizer steps are counted, so that it is known whether there were any.
        peers: sends, keeps and fetches copies of snapshots.
        coordinator_limit_s: how long the coordinator may be out of reach before this rank cannot go on.
    """

    rank: int
    host: str
    shm_dir: Path
    environ: Mapping[str, str]
    store_for: Callable[[int], dict[str, Any]] | None
    generation_began: Callable[[int], None]
    uses_store: bool
    grace_s: float
    preempt_signals: tuple[int, ...]
    is_guarded: bool
    peers: Peers | None = None
    coordinator_limit_s: float = 10.0
