"""Finding the state to go on from: the memory of this host first, then the newest committed checkpoint.

All ranks restore the same step or none does. Each attempt ends with a vote: when one rank cannot have a state (a
damaged shard, a slot that is gone), all ranks go on to the next older one together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from arc_dist import elastic, errors
from arc_dist.checkpoint_store.codec import decode
from arc_dist.checkpoint_store.format import TensorSpec
from arc_dist.checkpoint_store.progress import Progress
from arc_dist.checkpoint_store.tiers import Tiers
from arc_dist.data.position import read_mark
from arc_dist.errors import ArcError, CheckpointMismatch, PeerLost, StoreCorrupt
from arc_dist.healing.vote import agree
from arc_dist.peers.fetch import give_back
from arc_dist.snapshot.record import StepRecord
from arc_dist.snapshot.ring import SnapshotRing
from arc_dist.snapshot.slot import Snapshot, read_small_objects
from arc_dist.telemetry.log import logger

if TYPE_CHECKING:
    from arc_dist.engine import Engine


@dataclasses.dataclass(frozen=True)
class Found:
    """A verified state, ready to be loaded."""

    step: int
    tier: str
    specs: Sequence[TensorSpec]
    tensors: Sequence[torch.Tensor]
    small: dict[str, Any]
    ranks: int  # that saved it


def find(engine: Engine) -> Found | None:
    """The newest state that every rank can have, or None for a fresh start. Every rank must call this; it blocks.

    Raises:
        CheckpointMismatch: the newest checkpoint belongs to another model, or to a world that may not be left.
        StoreCorrupt: there are committed checkpoints, and not one can be read whole.
        InfrastructureError: memory was to be restored, and neither it nor a store has a whole state.
    """
    plan = engine.env.plan or {"tier": "none", "poisoned": []}
    if plan["tier"] == "memory":
        found = _try_everywhere(engine, lambda: _planned(engine, plan), f"step {plan['step']} in memory")
        found = found or _older_in_memory(engine, below=plan["step"])
        if found is not None:
            return found
    found = None if engine.store is None else _from_store(engine, engine.store, plan)
    if found is None and plan["tier"] != "none":
        raise errors.InfrastructureError(
            f"step {plan['step']} was to be restored from {plan['tier']}, but no whole state is left in memory or in a "
            "store. Starting afresh would silently lose the run: start the job anew if that is meant."
        )
    return found


def _older_in_memory(engine: Engine, *, below: int) -> Found | None:
    """The newest older snapshot that is certified in every rank's own memory."""
    held = engine.voter.gather([info.step for info in engine.ring.held() if info.certified and info.step < below], 0)
    for step in sorted(set(held[0]).intersection(*held), reverse=True):

        def attempt(step: int = step) -> Found:
            slot = next(info.slot for info in engine.ring.held() if info.step == step and info.certified)
            return Found(step, "memory", *engine.ring.restore(slot), ranks=engine.world_size)

        found = _try_everywhere(engine, attempt, f"step {step} in memory")
        if found is not None:
            return found
    return None


def _try_everywhere(engine: Engine, attempt: Callable[[], Found], what: str) -> Found | None:
    """The result if the attempt succeeded on every rank, else None, with an incident."""
    found, mine = None, None
    try:
        found = attempt()
    except ArcError as error:
        mine = error
    reports = engine.voter.gather(None if mine is None else [type(mine).__name__, mine.message], step=0)
    failed = [(rank, report) for rank, report in enumerate(reports) if report is not None]
    if not failed:
        return found
    for rank, (kind, message) in failed:
        if kind == CheckpointMismatch.__name__:
            # An older checkpoint of the same run would not fit either: this is for the user to decide.
            raise mine if isinstance(mine, CheckpointMismatch) else CheckpointMismatch(f"rank {rank}: {message}")
    rank, (kind, message) = failed[0]
    logger.warning("%s cannot be restored on rank %d: %s", what, rank, message)
    engine.record(
        kind="restore_refused",
        cause=f"{what}: {message}",
        ranks=[rank for rank, _ in failed],
        generation=engine.env.generation,
        seen_by="digest" if kind == StoreCorrupt.__name__ else kind,
        seen_after="before use",
        action="next older state",
    )
    return None


def _planned(engine: Engine, plan: dict[str, Any]) -> Found:
    assert engine.env.shm_dir is not None
    snapshot = from_memory(plan, engine.rank, engine.env.shm_dir, own=engine.ring.restore)
    give_back(engine.env.shm_dir)
    return Found(plan["step"], "memory", snapshot.specs, snapshot.tensors, snapshot.small, engine.world_size)


def from_memory(plan: dict[str, Any], rank: int, directory: Path, *, own: Callable[[int], Snapshot]) -> Snapshot:
    """What a plan says that a rank's state is: a snapshot of its own, or a replica's with what only this rank knows.

    That is the record which it left in its memory, or a note which another supervisor had kept.

    Args:
        plan: of tier "memory".
        rank: whose state is wanted.
        directory: of that rank in shared memory.
        own: opens a slot there.

    Raises:
        InfrastructureError: the rank was to take a replica's snapshot, and left nothing of its own.
        ConfigError, SlotDamaged: see `SnapshotRing`.
    """
    source = plan["sources"][str(rank)]
    if source["rank"] == rank:
        return own(source["slot"])
    snapshot = SnapshotRing.open_peer(Path(source["shm_dir"]), source["slot"])
    note = source.get("note")
    if note is not None:
        return dataclasses.replace(snapshot, small=read_small_objects(Path(note["shm_dir"]), note["slot"]))
    recorded = StepRecord(directory).read(plan["step"])
    if recorded is None:
        raise errors.InfrastructureError(f"rank {rank} left no record of step {plan['step']} before it died")
    snapshot.small["training"] |= {"rng": recorded.rng, "buffers": recorded.buffers}
    if recorded.mark:
        snapshot.small["data"] = read_mark(recorded.mark)
    return snapshot


def _from_store(engine: Engine, store: Tiers, plan: dict[str, Any]) -> Found | None:
    """Newest first; rank 0's listing is everyone's. What is newer than the planned step was refused by the plan."""
    at_most = plan.get("step")
    listed, damaged = agree(
        engine.voter, lambda: _listing(engine, store, plan["poisoned"], at_most), "the store cannot be listed"
    )
    listed, damaged = engine.voter.gather([listed, damaged], step=0)[0]
    if not listed and not damaged:
        return None
    for step, world_size in sorted(listed, reverse=True):
        elastic.require_allowed(
            engine.settings, step=step, url=store.url, saved_ranks=world_size, ranks=engine.world_size
        )
        found = _try_everywhere(engine, lambda step=step: _read(engine, store, step), f"the checkpoint of step {step}")
        if found is not None:
            return found
    raise StoreCorrupt(
        f"none of the {len(listed) + len(damaged)} committed checkpoints in {store.url} can be read whole. Run "
        f"`arc verify {store.url}` to see what is damaged, or give a new run name (Arc(run=...)) to start afresh."
    )


def older_checkpoint(engine: Engine, before: int) -> Found | None:
    """The newest whole checkpoint of a step before `before`, or None. Every rank must call this; it blocks.

    Raises:
        PeerLost: a rank is gone. Everything else that goes wrong does so on all ranks alike, and gives None.
    """
    assert engine.store is not None
    try:
        return _from_store(engine, engine.store, {"poisoned": [], "step": before - 1})
    except PeerLost:
        raise
    except ArcError as error:
        logger.warning("no checkpoint before step %d can be restored: %s", before, error)
        return None


def _listing(
    engine: Engine, store: Tiers, poisoned: Sequence[dict[str, int]], at_most: int | None
) -> tuple[list[Any], list[int]]:
    """(step, world size) of what may be restored, and the steps whose manifest is damaged. Rank 0 looks for all."""
    if engine.rank != 0:
        return [], []
    infos = store.steps(include_damaged=True)
    for info in infos:
        if info.newer_format:
            raise CheckpointMismatch(str(info.problem), step=info.step)
    for info in infos:
        if info.problem is not None:
            engine.record(
                kind="restore_refused",
                cause=f"the manifest of step {info.step}: {info.problem}",
                ranks=[],
                generation=engine.env.generation,
                seen_by="digest",
                seen_after="before use",
                action="next older state",
            )
    usable = [
        [info.step, info.world_size]
        for info in infos
        if info.problem is None
        and info.certified
        and (at_most is None or info.step <= at_most)
        and not any(entry["from_step"] <= info.step <= entry["to_step"] for entry in poisoned)
    ]
    return usable, [info.step for info in infos if info.problem is not None]


def _read(engine: Engine, store: Tiers, step: int) -> Found:
    """This rank's part of a checkpoint, verified, in new tensors."""
    checkpoint = store.open(step)
    live = {spec.name: spec for spec in engine.state.tensors()[0] if spec.name.startswith("model.")}
    others = [spec for name, spec in checkpoint.specs().items() if not name.startswith("model.")]
    checkpoint.check_specs([*live.values(), *others], all_names=True)
    wanted = [live.get(name) or _like_its_parameter(spec, live) for name, spec in checkpoint.specs().items()]
    with Progress(f"reading the checkpoint of step {step}", sum(spec.nbytes for spec in wanted)) as progress:
        tensors = checkpoint.read(wanted, progress=progress if engine.rank == 0 else None)
    saved_ranks = checkpoint.world_size
    objects = decode(checkpoint.objects(elastic.source_rank(engine.rank, saved_ranks)))
    objects = elastic.take_over(objects, step=step, rank=engine.rank, ranks=engine.world_size, saved_ranks=saved_ranks)
    for problem in checkpoint.damage:
        logger.warning(
            "rank %d took from another copy what is wrong in %s: %s", engine.rank, problem.file, problem.what
        )
        engine.record(
            kind="copy_damaged",
            cause=f"{problem.file}: {problem.what}",
            step=step,
            ranks=[engine.rank],
            generation=engine.env.generation,
            seen_by="digest",
            seen_after="before use",
            action="read from another tier",
        )
    return Found(step, "checkpoint", wanted, tensors, objects, saved_ranks)


def _like_its_parameter(spec: TensorSpec, live: dict[str, TensorSpec]) -> TensorSpec:
    """What this rank holds of a tensor of the optimizer, which may not exist yet: it is cut as its parameter is."""
    owner = spec.name.partition("state.")[2].rpartition(".")[0]
    parameter = live.get(f"model.{owner}")
    if parameter is None or parameter.global_shape != spec.global_shape:
        return spec
    return dataclasses.replace(spec, shape=parameter.shape, offsets=parameter.offsets, replicated=parameter.replicated)
