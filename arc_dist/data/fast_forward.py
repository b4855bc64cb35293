"""Finds a recorded position again in a loader that starts at its beginning, and proves that it is the right one.

There are up to three ways, the cheapest first. Each loads the batches by which the position is recognised; if one of
them differs, the next way is tried, and when none is left the position is refused.

``state``: the loader's own `load_state_dict`, then the few batches since that state was taken.
``skip``: all indices are drawn from the sampler, but only the batches to be checked are made from them.
``load``: all batches of the epoch up to the position are made again and thrown away.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from typing import Any

from arc_dist.data.digest import batch_digest
from arc_dist.data.loader import LoaderView
from arc_dist.data.position import Check, Position
from arc_dist.data.witness import Witness
from arc_dist.errors import DataNotReproducible
from arc_dist.snapshot.rng import restore_rng
from arc_dist.telemetry.log import logger

_REPORT_EVERY_S = 10.0

_REMEDIES = (
    "Make the loader give the same batches again: its content and order may depend on the random generators of "
    "python, numpy and torch (they are restored), but not on time, on the order of a set, on generators seeded from "
    "the system, or on what earlier batches left behind. A seeded sampler (arc_dist.SeededSampler), "
    "torchdata's StatefulDataLoader, or persistent_workers=False help; docs/data.md has the list, and says how to go "
    "on inexactly."
)


@dataclasses.dataclass(frozen=True)
class Found:
    """An iterator that goes on at the position, and how it was brought there."""

    iterator: Iterator[Any]
    witness: Witness | None
    way: str
    last: Any  # the batch loaded last, some batch before the position


@dataclasses.dataclass(frozen=True)
class Difference:
    """Why one way did not lead to the position."""

    way: str
    index: int
    problem: str


def fast_forward(view: LoaderView, position: Position, *, exact: bool) -> Found:
    """Positions the loader; changes the random state of the process, which the caller restores afterwards.

    Args:
        view: the loader, at its beginning if it can be gone through only once.
        position: inside an epoch (its index is greater than 0).
        exact: refuse a position that cannot be proven to be the right one; else warn and go on there.

    Raises:
        DataNotReproducible: says which batch differs, in which way, and what to do.
    """
    _compare_shapes(view, position, exact)
    if view.is_one_shot and view.started:
        raise DataNotReproducible(
            f"the data is a {view.name}, which can be gone through only once and has been read already, so batch "
            f"{position.index} of epoch {position.epoch} cannot be reached again. Pass a DataLoader or a list, or an "
            "object whose __iter__ starts anew; or let more batches be kept for replay.",
            epoch=position.epoch,
            index=position.index,
        )
    differences: list[Difference] = []
    for way in _ways(view, position):
        if differences:
            logger.info("data: %s; trying to %s instead", differences[-1].problem, way)
        found = _attempt(view, position, way)
        if isinstance(found, Found):
            return found
        differences.append(found)
    if not exact:
        logger.warning("data: going on inexactly: %s", differences[-1].problem)
        found = _attempt(view, dataclasses.replace(position, checks=()), "load")
        if isinstance(found, Found):
            return found
        differences.append(found)
    last = differences[-1]
    raise DataNotReproducible(
        f"the data cannot be resumed at batch {position.index} of epoch {position.epoch}: {last.problem} "
        f"(tried: {', '.join(difference.way for difference in differences)}). {_REMEDIES}",
        epoch=position.epoch,
        index=last.index,
        ways=[difference.way for difference in differences],
    )


def _compare_shapes(view: LoaderView, position: Position, exact: bool) -> None:
    """Differences that need no batch to be seen."""
    now = {"batches per epoch": view.length, "samples per batch": view.batch_size}
    then = {"batches per epoch": position.length, "samples per batch": position.batch_size}
    changed = [f"{then[what]} {what} then, {now[what]} now" for what in now if then[what] != now[what]]
    if not changed:
        return
    if not exact:
        logger.warning("data: the loader is another one: %s", "; ".join(changed))
        return
    raise DataNotReproducible(
        f"the loader is not the one that the position was recorded with: {'; '.join(changed)}. Use the same dataset, "
        "batch size and number of ranks, or start a new run.",
        epoch=position.epoch,
        index=position.index,
    )


def _ways(view: LoaderView, position: Position) -> list[str]:
    if view.is_stateful:
        ways = ["state"] if position.anchor is not None else []
        # A loader of unknown make may not be able to start anew once its state was set.
        return [*ways, "load"] if view.is_dataloader or not ways else ways
    return ["skip", "load"] if view.can_skip(position.items_draw) else ["load"]


def _attempt(view: LoaderView, position: Position, way: str) -> Found | Difference:
    if way == "load" and view.is_stateful and view.is_dataloader:
        view.loader.load_state_dict({})  # type: ignore[attr-defined]  # at its beginning again
    view.arrange_workers(used=position.reused_workers)
    view.restore_generators(position.generators)
    if position.rng is not None:
        restore_rng(position.rng)
    view.set_epoch(position.epoch)
    checks = {check.index: check for check in position.checks}
    indices: Iterable[int]
    if way == "state":
        assert position.anchor is not None
        view.loader.load_state_dict(position.anchor.state)  # type: ignore[attr-defined]
        iterator, witness = view.iterate()
        indices = range(position.anchor.index, position.index)
    elif way == "skip":
        iterator, witness = view.iterate(wanted=checks, since=position.index)
        indices = sorted(checks)
    else:
        iterator, witness = view.iterate()
        indices = range(position.index)
    last = _advance(iterator, indices, checks, position, way)
    return last if isinstance(last, Difference) else Found(iterator, witness, way, last)


def _advance(
    iterator: Iterator[Any], indices: Iterable[int], checks: dict[int, Check], position: Position, way: str
) -> Any:
    """Loads the batches at `indices`, compares those with a check, and returns the last one or the difference."""
    batch = None
    began = reported = time.monotonic()
    for index in indices:
        check = checks.get(index)
        if check is not None and check.before is not None:
            restore_rng(check.before)
        try:
            batch = next(iterator)
        except StopIteration:
            return Difference(way, index, f"the data ended after {index} batches")
        if check is not None:
            digest = batch_digest(batch)
            if digest != check.digest:
                return Difference(
                    way, index, f"batch {index} has digest {digest[:12]} now, and had {check.digest[:12]} before"
                )
        now = time.monotonic()
        if now - reported >= _REPORT_EVERY_S:
            reported = now
            logger.info("data: loading again: batch %d of %d after %.0f s", index + 1, position.index, now - began)
    return batch
