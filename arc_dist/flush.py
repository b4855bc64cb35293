"""Saves from shared memory what a training process that is gone has left there: the last act of a job that must go.

It runs in a process of its own, forked as a trainer would be, in a generation that trains no more (see
`protocol.generations`). It joins no collective: which step all ranks write is in its plan, and the coordinator commits
the shards like those of any checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from arc_dist.checkpoint_store.tiers import Tier, Tiers
from arc_dist.checkpointer import Checkpointer
from arc_dist.config import Env
from arc_dist.coordinator.client import CoordinatorClient
from arc_dist.coordinator.following import follow
from arc_dist.errors import ConfigError, PreemptedUnsaved
from arc_dist.preemption.facts import SavingFacts
from arc_dist.restore import from_memory
from arc_dist.snapshot.ring import SnapshotRing
from arc_dist.snapshot.slot import Snapshot
from arc_dist.telemetry.log import logger, set_up_logging


class _Planned:
    """The one snapshot that the plan names, as the writer asks for it; nobody can overwrite it any more."""

    def __init__(self, plan: dict[str, Any], rank: int, directory: Path) -> None:
        self._plan = plan
        self._rank = rank
        self._directory = directory

    def pin(self, slot: int) -> None:
        """Nothing is written here."""

    def unpin(self, slot: int) -> None:
        """Nothing is written here."""

    def restore(self, slot: int) -> Snapshot:
        return from_memory(
            self._plan, self._rank, self._directory, own=lambda slot: SnapshotRing.open_peer(self._directory, slot)
        )


def _recorder(client: CoordinatorClient) -> Callable[..., None]:
    def record(**line: Any) -> None:
        client.incident(**line)

    return record


def flush(env: Env) -> None:
    """Writes this rank's part of the planned step and waits for its commit.

    Raises:
        ConfigError: this is not what the supervisor started this process for.
        PreemptedUnsaved: there is no store, or the step was not committed there.
    """
    plan = env.plan
    if plan is None or env.shm_dir is None or env.coordinator is None or env.token is None:
        raise ConfigError("saving from memory needs what a supervisor sets: ARC_PLAN, ARC_SHM_DIR, ARC_COORDINATOR.")
    set_up_logging(level=env.log_level, rank=env.rank, world_size=env.world_size)
    facts = SavingFacts.read(env.shm_dir)
    step = int(plan["step"])
    if facts is None:
        raise PreemptedUnsaved(
            f"step {step} is in memory and cannot be saved, because the job has no store: it is lost. Name one "
            f"(Arc(store=...), ARC_STORE).",
            step=step,
        )
    tiers = Tiers([Tier(**tier) for tier in facts.tiers], run=facts.run, owner=facts.owner)
    client = follow(env)
    writer = Checkpointer(
        tiers=tiers,
        ring=_Planned(plan, env.rank, env.shm_dir),
        coordinator=client,
        rank=env.rank,
        world_size=env.world_size,
        generation=env.generation,
        record=_recorder(client),
        save_timeout_s=facts.save_timeout_s,
    )
    writer.submit(step, plan["sources"][str(env.rank)]["slot"])
    writer.wait()
    if step not in writer.committed:
        raise PreemptedUnsaved(
            f"step {step} is in memory and was not committed to {tiers.url}; the messages above say why. What was "
            f"committed before is the newest.",
            step=step,
        )
    logger.debug("step %d was saved from memory", step)
