"""Collects the ranks' shards and writes the manifest when all are durable; the rules are in `protocol.commit`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Protocol

from arc_dist.coordinator.wire import MAX_POLL_S, Fields
from arc_dist.errors import ArcError
from arc_dist.protocol import commit as commits
from arc_dist.protocol.commit import CommitStatus, Save, Saves, Shard
from arc_dist.protocol.events import Committing, Event, Settled
from arc_dist.protocol.pick import Committed, Poison

logger = logging.getLogger("arc_dist.coordinator")


class CommitPort(Protocol):
    """Writes a manifest, exclusively; raises `ArcError` or `OSError` when it is not written."""

    def __call__(
        self,
        url: str,
        step: int,
        generation: int,
        world_size: int,
        parts: dict[int, dict[str, Any]],
        meta: dict[str, Any],
    ) -> None: ...


def default_commit(
    url: str,
    step: int,
    generation: int,
    world_size: int,
    parts: dict[int, dict[str, Any]],
    meta: dict[str, Any],
) -> None:
    """Writes the manifest with the checkpoint store; imported late, because it brings torch."""
    from arc_dist.checkpoint_store.store import default_commit as write_manifest

    write_manifest(url, step, generation, world_size, parts, meta)


class SaveDesk:
    """Where shards are handed in. Every method is called with the service's condition held.

    Args:
        saves: an empty record, opened for the generation that may save.
        commit: writes manifests.
        about: goes into every manifest's meta.
        changed: the service's condition; let go while a manifest is written.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        saves: Saves,
        *,
        commit: CommitPort,
        about: dict[str, Any],
        changed: threading.Condition,
        clock: Callable[[], float],
    ) -> None:
        self._saves = saves
        self._commit = commit
        self._about = about
        self._changed = changed
        self._clock = clock

    @property
    def saves(self) -> Saves:
        return self._saves

    def open_for(self, generation: int | None) -> None:
        """Lets `generation` alone save from now on."""
        self._saves = commits.open_for(self._saves, generation)
        self._changed.notify_all()

    def poison(self, poisoned: tuple[Poison, ...]) -> None:
        """Notes all that is poisoned by now."""
        self._saves = commits.poison(self._saves, poisoned)
        self._changed.notify_all()

    def take_shard(self, rank: int, fields: Fields, apply: Callable[[Event], None]) -> dict[str, Any]:
        """A rank says that its shard is durable. The answer to the last one comes after the manifest is written."""
        shard = Shard(
            rank=rank,
            generation=fields.integer("generation"),
            step=fields.integer("step"),
            url=fields.text("url"),
            part=fields.mapping("manifest_part"),
            certified=fields.boolean("certified", default=True),
            tier=fields.integer("tier", default=0),
            why=fields.text("why", default=""),
        )
        offered = commits.offer(self._saves, shard)
        self._saves = offered.saves
        if offered.commit is not None:
            return self._write_manifest(offered.commit, apply)
        # A step that is settled, or has moved on, is news to the ranks that wait.
        self._changed.notify_all()
        return self._answer(offered.status, offered.reason, shard.step, shard.generation)

    def give_up(self, rank: int, fields: Fields) -> dict[str, Any]:
        """A rank says that it cannot write its shard anywhere."""
        step, generation = fields.integer("step"), fields.integer("generation")
        self._saves = commits.give_up(self._saves, rank, step, generation, fields.text("error"))
        self._changed.notify_all()
        return {}

    def _write_manifest(self, save: Save, apply: Callable[[Event], None]) -> dict[str, Any]:
        """Writes the manifest in the thread of the rank that completed the step; the others are served meanwhile."""
        apply(Committing(step=save.step))
        parts = {rank: dict(part) for rank, part in save.parts.items()}
        meta = {**self._about, "certified": save.certified}
        error: str | None = None
        self._changed.release()
        try:
            self._commit(save.url, save.step, save.generation, self._saves.world_size, parts, meta)
        except (ArcError, OSError) as caught:
            error = f"{type(caught).__name__}: {caught}"
            logger.warning("the manifest of step %d was not written: %s", save.step, error)
        except BaseException as caught:  # a bug in a store; the ranks that wait must hear of it all the same
            error = f"{type(caught).__name__}: {caught}"
            raise
        finally:
            self._changed.acquire()
            self._saves = commits.settle(self._saves, save.step, save.generation, error)
            committed = None
            if error is None:
                committed = Committed(
                    step=save.step, url=save.url, generation=save.generation, certified=save.certified
                )
            apply(Settled(step=save.step, committed=committed))
            self._changed.notify_all()
        status, error = commits.status_of(self._saves, save.step, save.generation, save.tier)
        return self._answer(status, error, save.step, save.generation)

    def outcome(self, fields: Fields, check_alive: Callable[[], None]) -> dict[str, Any]:
        """Long poll for what became of a save."""
        step, generation = fields.integer("step"), fields.integer("generation")
        tier = fields.integer("tier", default=0)
        deadline_s = self._clock() + fields.number("timeout_s", default=0.0, maximum=MAX_POLL_S)
        while True:
            check_alive()
            status, error = commits.status_of(self._saves, step, generation, tier)
            remaining_s = deadline_s - self._clock()
            if status.is_settled or remaining_s <= 0:
                return self._answer(status, error, step, generation)
            self._changed.wait(remaining_s)

    def _answer(self, status: CommitStatus, error: str | None, step: int, generation: int) -> dict[str, Any]:
        save = self._saves.find(step, generation)
        tier = save.tier if save is not None else 0
        if not status.is_settled:
            return {"status": CommitStatus.PENDING.value, "error": None, "tier": tier}
        return {"status": status.value, "error": None if status is CommitStatus.COMMITTED else error, "tier": tier}

    def describe(self) -> list[dict[str, Any]]:
        """The saves that are remembered, for people."""
        return [
            {
                "step": save.step,
                "generation": save.generation,
                "tier": save.tier,
                "status": save.status.value,
                "error": save.error,
            }
            for save in self._saves.saves.values()
        ]
