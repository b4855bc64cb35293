"""Writes trusted snapshots to the store in the background, and waits for their commit.

Training stops for none of this: the shard is written from the snapshot's own buffers by one thread, which pins the
slot, streams it to the store, reports it to the coordinator, and unpins it. The coordinator commits the manifest once
the shards of all ranks are durable. One checkpoint is in flight at a time; one that falls due meanwhile is left out by
the guard, on all ranks alike, which is said.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from arc_dist.checkpoint_store.codec import encode
from arc_dist.checkpoint_store.format import ShardTensor
from arc_dist.checkpoint_store.store import Store
from arc_dist.connect import Client
from arc_dist.errors import ArcError, StoreError
from arc_dist.snapshot.ring import SnapshotRing
from arc_dist.telemetry.log import logger

_POLL_S = 30.0


class Checkpointer:
    """One rank's background writer.

    Args:
        store: where checkpoints go.
        ring: where snapshots are.
        coordinator: commits a step once every rank's shard is durable.
        record: called with incidents (a save that failed or came late).
        commit_timeout_s: how long a written shard waits for the others before the save is given up.
    """

    def __init__(
        self,
        *,
        store: Store,
        ring: SnapshotRing,
        coordinator: Client,
        rank: int,
        world_size: int,
        generation: int,
        record: Callable[..., None] | None = None,
        commit_timeout_s: float = 600.0,
    ) -> None:
        self._store = store
        self._ring = ring
        self._coordinator = coordinator
        self._rank = rank
        self._world_size = world_size
        self._generation = generation
        self._record = record
        self._commit_timeout_s = commit_timeout_s
        self._queue: queue.Queue[tuple[int, int] | None] = queue.Queue()
        self._idle = threading.Event()
        self._idle.set()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.committed: list[int] = []

    def submit(self, step: int, slot: int) -> None:
        """Takes over `slot`, which holds the certified snapshot of `step`. Returns at once."""
        if not self._idle.is_set():
            logger.warning("checkpoint of step %d left out: the one before is still being written", step)
            self._incident(step, "checkpoint_late", "the one before is still being written")
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="arc-writer", daemon=True)
            self._thread.start()
        self._ring.pin(slot)
        self._idle.clear()
        self._queue.put((step, slot))

    def is_writing(self) -> bool:
        """Whether a checkpoint that was submitted is not settled yet."""
        return not self._idle.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until nothing is being written; True when that is so."""
        return self._idle.wait(timeout_s)

    def forget_after(self, step: int) -> None:
        """A rollback to `step`: later steps, when they are reached again, are other states and not written yet."""
        self.committed = [committed for committed in self.committed if committed <= step]

    def close(self, *, abort: bool = False) -> None:
        """Ends the thread; with `abort` what is being written is given up at the next block."""
        if abort:
            self._stopping.set()
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(timeout=None if not abort else 10.0)
            self._thread = None

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            step, slot = job
            try:
                self._save(step, slot)
            except ArcError as error:
                logger.warning("checkpoint of step %d was not saved: %s", step, error)
                self._incident(step, "checkpoint_failed", str(error))
            finally:
                self._ring.unpin(slot)
                self._idle.set()

    def _save(self, step: int, slot: int) -> None:
        began = time.perf_counter()
        specs, tensors, small = self._ring.restore(slot)
        # Small tensors inside objects (states of generators, running statistics) go into the JSON.
        encoded, _ = encode(small, inline=True)
        shards = [ShardTensor(spec, tensor) for spec, tensor in zip(specs, tensors, strict=True)]
        part = self._store.write_part(
            step,
            generation=self._generation,
            rank=self._rank,
            world_size=self._world_size,
            tensors=shards,
            objects=encoded,
            should_abort=self._stopping.is_set,
        )
        answer = self._coordinator.shard(
            rank=self._rank,
            generation=self._generation,
            step=step,
            url=self._store.url,
            manifest_part=part,
            certified=True,
        )
        deadline = time.monotonic() + self._commit_timeout_s
        while answer["status"] == "pending" and time.monotonic() < deadline and not self._stopping.is_set():
            answer = self._coordinator.commit_status(step=step, generation=self._generation, timeout_s=_POLL_S)
        if answer["status"] != "committed":
            raise StoreError(
                f"the shards of step {step} were written but not committed ({answer['status']}: "
                f"{answer.get('error') or 'not all ranks finished theirs'}). The previous checkpoint stays the newest.",
                step=step,
            )
        self.committed.append(step)
        if self._rank == 0:
            num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            logger.info(
                "checkpoint of step %d committed: %.1f MB from rank 0's memory in %.2f s",
                step,
                num_bytes / 1e6,
                time.perf_counter() - began,
            )

    def _incident(self, step: int, kind: str, reason: str) -> None:
        if self._record is not None:
            self._record(kind=kind, step=step, ranks=[self._rank], generation=self._generation, reason=reason)
