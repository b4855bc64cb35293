"""What a rank takes over from a checkpoint that another number of ranks wrote.

Tensors are cut anew by the store. The rest is per rank: rank r takes the objects of the rank r that wrote them, and a
rank that did not exist then takes those of rank r mod W, with random generators of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from arc_dist.data.world import Share
from arc_dist.errors import CheckpointMismatch
from arc_dist.settings import OnWorldChange, Settings
from arc_dist.snapshot.rng import derive_rng
from arc_dist.telemetry.log import logger

if TYPE_CHECKING:
    from arc_dist.data.source import BatchSource
    from arc_dist.engine import Engine


def source_rank(rank: int, saved_ranks: int) -> int:
    """Whose objects a rank takes over."""
    return rank % saved_ranks


def require_allowed(settings: Settings, *, step: int, url: str, saved_ranks: int, ranks: int) -> None:
    """Refuses a checkpoint of another number of ranks where the settings say so. Local, the same on every rank.

    Raises:
        CheckpointMismatch: with what can be done.
    """
    if saved_ranks == ranks or settings.on_world_change == OnWorldChange.EXACT.value:
        return
    raise CheckpointMismatch(
        f"the checkpoint of step {step} in {url} was saved by {saved_ranks} ranks, this job has {ranks}, and "
        f"Arc(on_world_change='error') wants the same number. Start {saved_ranks} ranks, or allow the change with "
        "on_world_change='exact'.",
        step=step,
    )


def tell_worlds(engine: Engine, source: BatchSource, *, epochs: int | None) -> None:
    """Where hosts may be left out, lets the coordinator know with how many ranks this training could go on.

    Args:
        engine: started, and at the state that it goes on from.
        source: the batches, at the same place.
        epochs: passes over the data in the whole run; None for no bound.
    """
    if engine.rank != 0 or not (engine.env.supervised and engine.env.evict):
        return
    worlds = [engine.world_size]
    if engine.settings.on_world_change == OnWorldChange.EXACT.value:
        worlds = Share.from_dict(source.position()["world"], rank=0).fitting_worlds(epochs=epochs)
    engine.tell(lambda: engine.coordinator.worlds(worlds))


def take_over(small: dict[str, Any], *, step: int, rank: int, ranks: int, saved_ranks: int) -> dict[str, Any]:
    """The objects of `source_rank` as this rank's own.

    Raises:
        CheckpointMismatch: they are of a version that wrote down too little for another number of ranks.
    """
    if saved_ranks == ranks:
        return small
    data = small["data"]
    if data is not None and data.get("world") is None:
        raise CheckpointMismatch(
            f"the checkpoint of step {step} was saved by {saved_ranks} ranks with a version of arc-dist that could "
            f"not change the number of ranks, and this job has {ranks}. Start {saved_ranks} ranks and save once.",
            step=step,
        )
    if rank == 0:
        logger.info("step %d was saved by %d ranks and goes on with %d", step, saved_ranks, ranks)
    if data is None and rank == 0:
        logger.warning(
            "the number of ranks changed from %d to %d, and the script goes through its data by itself: keeping the "
            "global batch and the place in the data is up to it (Resumed.ranks says how many saved the state)",
            saved_ranks,
            ranks,
        )
    if rank < saved_ranks:
        return small
    training = small["training"]
    return {**small, "training": {**training, "rng": derive_rng(training["rng"], f"step {step} rank {rank}")}}
