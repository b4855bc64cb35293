"""Writes trusted snapshots to the store in the background, and waits for their commit.

Training stops for none of this: the shard is written from the snapshot's own buffers by one thread, which pins the
slot, streams it to the first tier that takes it, reports it to the coordinator, and unpins it. The coordinator commits
the manifest once the shards of all ranks are durable in one tier. One checkpoint is in flight at a time; one that falls
due meanwhile is left out by the guard, on all ranks alike, which is said.

Storage may fail in three ways. It says so: what may pass is tried again, then the save goes to the next tier. It is
slow: the save is given up between two blocks when its time is over. It never answers (a dead NFS server): the thread
cannot be ended, so it is left alone with its slot still pinned, its tier is not used until it comes back, and training,
later saves and the end of the job go on without it.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from arc_dist.checkpoint_store.codec import encode
from arc_dist.checkpoint_store.format import ShardTensor, dtype_name
from arc_dist.checkpoint_store.pace import Pace
from arc_dist.checkpoint_store.retry import Retries, retrying
from arc_dist.checkpoint_store.tiers import Tiers
from arc_dist.checkpoint_store.writer import SaveAborted
from arc_dist.connect import Client
from arc_dist.coordinator.reporting import report_shard
from arc_dist.errors import ArcError, StoreError, StoreFull, StoreTransient
from arc_dist.snapshot.plan import ROUNDED
from arc_dist.snapshot.slot import Snapshot
from arc_dist.telemetry.log import logger

_WAIT_S = 1.0
_OVERDUE = 1.25  # a thread that is silent for this many times the limit is stuck


@dataclasses.dataclass(eq=False)
class _Saving:
    """One save and the thread that does it."""

    step: int
    slot: int
    tier: int = 0
    deadline: float = 0.0  # of the present attempt at a tier
    is_writing: bool = False  # to storage, rather than waiting for other ranks
    is_left_alone: bool = False
    done: threading.Event = dataclasses.field(default_factory=threading.Event)


class SnapshotSource(Protocol):
    """Where snapshots are, as far as writing them is concerned; see `SnapshotRing`."""

    def pin(self, slot: int) -> None: ...
    def unpin(self, slot: int) -> None: ...
    def restore(self, slot: int) -> Snapshot: ...


class Checkpointer:
    """One rank's background writer.

    Args:
        tiers: where checkpoints go, fastest first.
        ring: where snapshots are.
        coordinator: commits a step once every rank's shard is durable.
        record: called with incidents (a tier that is full, a save that failed or came late).
        on_committed: called with (step, tier), in the writer's thread.
        on_written: called with the seconds that a shard took to be written to the first tier, in the writer's thread.
        max_bytes_per_s: bound on the rate of writing; None for none.
        save_timeout_s: how long one shard may take to be written to one tier.
        commit_timeout_s: how long a written shard waits for the others before the save is given up.
    """

    def __init__(
        self,
        *,
        tiers: Tiers,
        ring: SnapshotSource,
        coordinator: Client,
        rank: int,
        world_size: int,
        generation: int,
        record: Callable[..., None] | None = None,
        on_committed: Callable[[int, int], None] | None = None,
        on_written: Callable[[float], None] | None = None,
        max_bytes_per_s: float | None = None,
        save_timeout_s: float = 600.0,
        commit_timeout_s: float = 600.0,
    ) -> None:
        self._tiers = tiers
        self._ring = ring
        self._coordinator = coordinator
        self._rank = rank
        self._world_size = world_size
        self._generation = generation
        self._record = record
        self._on_committed = on_committed
        self._on_written = on_written
        self._pace = Pace(max_bytes_per_s)
        self._save_timeout_s = save_timeout_s
        self._commit_timeout_s = commit_timeout_s
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._current: _Saving | None = None
        self._stuck: list[_Saving] = []
        self.committed: list[int] = []

    # ------------------------------------------------------------------ asked by the training thread

    def submit(self, step: int, slot: int) -> None:
        """Takes over `slot`, which holds the certified snapshot of `step`. Returns at once."""
        if self.is_writing():
            logger.warning("checkpoint of step %d left out: the one before is still being written", step)
            self._incident(step, "checkpoint_late", "the one before is still being written")
            return
        self._ring.pin(slot)
        saving = _Saving(step, slot)
        with self._lock:
            self._current = saving
        threading.Thread(target=self._run, args=(saving,), name=f"arc-save-{step}", daemon=True).start()

    def is_writing(self) -> bool:
        """Whether a checkpoint that was submitted is not settled yet."""
        current = self._current
        if current is None:
            return False
        if current.is_writing and time.monotonic() > current.deadline + (_OVERDUE - 1.0) * self._save_timeout_s:
            self._leave_alone(current)
        return self._current is not None

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until nothing is being written; True when that is so. Ends within the limits of the save at hand."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self.is_writing():
            left_s = _WAIT_S if deadline is None else min(_WAIT_S, deadline - time.monotonic())
            if left_s <= 0:
                return False
            current = self._current
            if current is not None:
                current.done.wait(left_s)
        return True

    def hurry(self) -> None:
        """From now on nothing bounds the rate of writing."""
        self._pace.lift()

    def forget_after(self, step: int) -> None:
        """A rollback to `step`: later steps, when they are reached again, are other states and not written yet."""
        self.committed = [committed for committed in self.committed if committed <= step]

    def close(self, *, abort: bool = False) -> None:
        """Waits for the save at hand; with `abort` it is given up at the next block."""
        if abort:
            self._stopping.set()
        self.wait(10.0 if abort else None)

    def _leave_alone(self, saving: _Saving) -> None:
        with self._lock:
            if self._current is not saving or saving.done.is_set():
                return
            saving.is_left_alone = True
            self._stuck.append(saving)
            self._current = None
        url = self._tiers.stores[saving.tier].url
        reason = f"{url} has not answered for {_OVERDUE * self._save_timeout_s:.0f} s. It is not used until it does"
        logger.warning("checkpoint of step %d was not saved: %s", saving.step, reason)
        self._incident(saving.step, "checkpoint_failed", reason)
        # Not in this thread, which is the one that trains.
        threading.Thread(target=self._give_up, args=(saving.step, reason), daemon=True).start()

    # ------------------------------------------------------------------ the writer's thread

    def _run(self, saving: _Saving) -> None:
        try:
            self._save(saving)
        except ArcError as error:
            if not saving.is_left_alone:
                logger.warning("checkpoint of step %d was not saved: %s", saving.step, error)
                self._incident(saving.step, "checkpoint_failed", str(error))
                if not self._stopping.is_set():
                    self._give_up(saving.step, str(error))
        finally:
            with self._lock:
                self._ring.unpin(saving.slot)
                if self._current is saving:
                    self._current = None
                if saving in self._stuck:
                    self._stuck.remove(saving)
                saving.done.set()

    def _save(self, saving: _Saving) -> None:
        began = time.perf_counter()
        step = saving.step
        tier, why = self._first_tier(), ""
        left: set[int] = set()
        while True:
            tier, part, why = self._write(saving, tier, why)
            answer = self._commit(saving, tier, part, why)
            status = answer["status"]
            if status == "moved":
                left.add(tier)
                tier, why = int(answer["tier"]), str(answer["error"])
                if self._rank == 0:
                    self._incident(step, "checkpoint_moved", why)
            elif status == "failed" and tier + 1 < len(self._tiers):
                left.add(tier)
                tier, why = tier + 1, f"the manifest was not written: {answer['error']}"
            else:
                break
        if status != "committed":
            raise StoreError(
                f"the shards of step {step} were written but not committed ({status}: "
                f"{answer.get('error') or 'not all ranks finished theirs'}). The previous checkpoint stays the newest.",
                step=step,
            )
        self.committed.append(step)
        if self._rank == 0:
            url = self._tiers.stores[tier].url
            seconds = time.perf_counter() - began
            logger.info("checkpoint of step %d committed to %s after %.2f s", step, url, seconds)
            for number in left:  # all ranks have written elsewhere by now
                self._tiers.discard(number, step, generation=self._generation, world_size=self._world_size)
        if self._on_committed is not None:
            self._on_committed(step, tier)

    def _first_tier(self) -> int:
        with self._lock:
            stuck = {saving.tier for saving in self._stuck}
        free = [tier for tier in range(len(self._tiers)) if tier not in stuck]
        if not free:
            raise StoreError("no tier answers: an earlier save is still waiting in each of them.")
        return free[0]

    def _write(self, saving: _Saving, tier: int, why: str) -> tuple[int, dict[str, Any], str]:
        """Writes the shard to the first tier from `tier` on that takes it.

        Returns:
            The tier, the part of the manifest, and why it is not an earlier tier.

        Raises:
            StoreError: none takes it.
            SaveAborted, Fenced, ConfigError: another tier would not help.
        """
        while True:
            saving.tier, saving.deadline = tier, time.monotonic() + self._save_timeout_s
            saving.is_writing = True
            try:
                began = time.perf_counter()
                part = self._write_to(saving, tier)
                if tier == 0 and self._on_written is not None:
                    self._on_written(time.perf_counter() - began)
            except StoreError as error:
                if isinstance(error, SaveAborted):
                    raise
                url = self._tiers.stores[tier].url
                kind = "tier_full" if isinstance(error, StoreFull) else "tier_failed"
                self._incident(saving.step, kind, error.message, store=url)
                if tier + 1 >= len(self._tiers):
                    raise
                why = f"rank {self._rank}: {error.message}"
                logger.warning("checkpoint of step %d goes to the next tier: %s", saving.step, why)
                tier += 1
            else:
                return tier, part, why
            finally:
                saving.is_writing = False

    def _write_to(self, saving: _Saving, tier: int) -> dict[str, Any]:
        specs, tensors, small = self._ring.restore(saving.slot)
        # Small tensors inside objects (states of generators, running statistics) go into the JSON.
        encoded, _ = encode(small, inline=True)
        shards = [
            ShardTensor(spec, tensor, widens=dtype_name(tensor.dtype) != spec.dtype)
            for spec, tensor in zip(specs, tensors, strict=True)
        ]
        about = dict(small.get("about") or {})
        if any(shard.widens for shard in shards):
            about["weights"] = f"rounded to {ROUNDED}"

        def should_stop() -> bool:
            return self._stopping.is_set() or saving.is_left_alone or time.monotonic() > saving.deadline

        def write() -> dict[str, Any]:
            return self._tiers.stores[tier].write_part(
                saving.step,
                generation=self._generation,
                rank=self._rank,
                world_size=self._world_size,
                tensors=shards,
                objects=encoded,
                should_abort=should_stop,
                pace=self._pace,
                about=about,
            )

        try:
            return retrying(write, Retries(), deadline=saving.deadline, should_abort=should_stop)
        except SaveAborted as error:
            if self._stopping.is_set() or saving.is_left_alone:
                raise
            raise StoreTransient(
                f"{self._tiers.stores[tier].url}: too slow, the shard was not written in {self._save_timeout_s:g} s. "
                "Raise save_timeout_s or max_bytes_per_s, or look at the storage."
            ) from error

    def _commit(self, saving: _Saving, tier: int, part: dict[str, Any], why: str) -> dict[str, Any]:
        """Reports the shard and waits for what becomes of the step."""
        if saving.is_left_alone:
            raise StoreError(f"step {saving.step}: the others have gone on without this shard.", step=saving.step)
        shard = {
            "rank": self._rank,
            "generation": self._generation,
            "step": saving.step,
            "url": self._tiers.stores[tier].url,
            "manifest_part": part,
            "certified": True,
            "tier": tier,
            "why": why,
        }
        return report_shard(self._coordinator, shard, self._commit_timeout_s, self._stopping)

    def _give_up(self, step: int, reason: str) -> None:
        """Lets the other ranks know; when the coordinator cannot be reached, their own time limit ends their wait."""
        try:
            self._coordinator.give_up_save(rank=self._rank, generation=self._generation, step=step, error=reason[:500])
        except ArcError as error:
            logger.warning("the coordinator was not told that step %d is not saved: %s", step, error)

    def _incident(self, step: int, kind: str, reason: str, **more: object) -> None:
        if self._record is not None:
            self._record(kind=kind, step=step, ranks=[self._rank], generation=self._generation, reason=reason, **more)
