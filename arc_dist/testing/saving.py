"""How simulated ranks use the checkpoint store: its own code, on simulated disks.

`save` mirrors `checkpointer.Checkpointer._save`: write the shard to the first tier that takes it, tell the coordinator,
wait for what becomes of the step, move on to the next tier when told. `restore` mirrors `restore._from_store`: the
newest step that may be used and can be read whole, for all ranks together.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from arc_dist.checkpoint_store.format import ShardTensor, TensorSpec
from arc_dist.checkpoint_store.store import Store
from arc_dist.errors import ArcError, StoreError, StoreTransient
from arc_dist.testing.disks import Disk, SimBackend
from arc_dist.testing.invariants import History
from arc_dist.testing.world import Life, Script, Wait

RUN = "run"
_ATTEMPTS = 3
_RETRY_S = 0.2
_POLL_S = 30.0
_COMMIT_TIMEOUT_S = 600.0
_NAME = "model.weight"

Call = Callable[[str, dict[str, Any]], Script]


def open_store(disk: Disk, life: Life) -> Store:
    """The store on a simulated disk, as one process sees it."""
    return Store(f"sim://{disk.name}", run=RUN, owner="job", backend=SimBackend(disk, life), visible_timeout_s=0.0)


def weight(history: History, rank: int) -> int:
    """The one number that stands for a rank's shard."""
    return (hash_of(history) + 7919 * rank) % (1 << 31)


def hash_of(history: History) -> int:
    """A number for a state that is the same in every process."""
    value = 17
    for token in history:
        value = (31 * value + token + 1) % (1 << 31)
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saver:
    """Saves one rank's shards of one generation.

    Attributes:
        tiers: fastest first.
        life: the training process.
        rank: its rank.
        world_size: number of ranks.
        generation: that it belongs to.
        call: sends a message to the coordinator.
        rng: how long writing takes.
    """

    tiers: Sequence[Disk]
    life: Life
    rank: int
    world_size: int
    generation: int
    call: Call
    rng: random.Random

    def save(self, step: int, history: History) -> Script:
        """The tier that the step was committed to, or None when it was not."""
        tier, why = 0, ""
        try:
            while True:
                tier, part, why = yield from self._write(step, history, tier, why)
                answer = yield from self._report(step, tier, part, why)
                if answer["status"] == "moved":
                    tier, why = int(answer["tier"]), str(answer["error"])
                elif answer["status"] == "failed" and tier + 1 < len(self.tiers):
                    tier, why = tier + 1, f"the manifest was not written: {answer['error']}"
                else:
                    return tier if answer["status"] == "committed" else None
        except ArcError as error:
            yield from self._give_up(step, error)
        return None

    def _write(self, step: int, history: History, tier: int, why: str) -> Script:
        attempts = 0
        while True:
            yield Wait(lambda item: False, timeout_s=self.rng.uniform(0.005, 0.05))
            try:
                return tier, self._write_part(step, history, tier), why
            except StoreTransient as error:
                attempts += 1
                if attempts < _ATTEMPTS:
                    yield Wait(lambda item: False, timeout_s=_RETRY_S)
                    continue
                problem: StoreError = error
            except StoreError as error:
                problem = error
            if tier + 1 >= len(self.tiers):
                raise problem
            tier, attempts, why = tier + 1, 0, f"rank {self.rank}: {problem.message}"

    def _write_part(self, step: int, history: History, tier: int) -> dict[str, Any]:
        spec = TensorSpec(_NAME, "int64", (1,), (self.world_size,), (self.rank,))
        return open_store(self.tiers[tier], self.life).write_part(
            step,
            generation=self.generation,
            rank=self.rank,
            world_size=self.world_size,
            tensors=[ShardTensor(spec, torch.tensor([weight(history, self.rank)]))],
            objects={"history": list(history)},
        )

    def _report(self, step: int, tier: int, part: dict[str, Any], why: str) -> Script:
        body = {"rank": self.rank, "generation": self.generation, "step": step, "tier": tier}
        told = {"url": f"sim://{self.tiers[tier].name}", "manifest_part": part, "certified": True, "why": why}
        answer = yield from self.call("shard", {**body, **told})
        waited_s = 0.0
        while answer["status"] == "pending" and waited_s < _COMMIT_TIMEOUT_S:
            answer = yield from self.call("commit_status", {**body, "timeout_s": _POLL_S})
            waited_s += _POLL_S
        return answer

    def _give_up(self, step: int, error: ArcError) -> Script:
        body = {"rank": self.rank, "generation": self.generation, "step": step, "error": error.message[:200]}
        try:
            yield from self.call("give_up_save", body)
        except ArcError:
            pass  # the others' own time limit ends their wait


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """What a store gave: the step, where it was, and each rank's state."""

    disk: str
    directory: str
    step: int
    generation: int
    histories: tuple[History, ...]
    weights: tuple[int, ...]


def restore(
    tiers: Sequence[Disk], life: Life, world_size: int, poisoned: Sequence[dict[str, int]], at_most: int | None
) -> tuple[Restored | None, list[str]]:
    """The newest usable checkpoint, and what was wrong with newer ones.

    Args:
        tiers: fastest first.
        life: who reads.
        world_size: number of ranks.
        poisoned: ranges of steps that must not be used.
        at_most: no newer step than this.
    """
    problems: list[str] = []
    candidates: list[tuple[int, int, str, Disk]] = []
    for number, disk in enumerate(tiers):
        try:
            infos = open_store(disk, life).steps(include_damaged=True)
        except StoreError as error:
            problems.append(f"{disk.name}: {type(error).__name__}")
            continue
        for info in infos:
            if info.problem is not None:
                problems.append(f"step {info.step} on {disk.name}: its manifest is damaged")
                continue
            is_bad = any(entry["from_step"] <= info.step <= entry["to_step"] for entry in poisoned)
            if info.certified and not is_bad and (at_most is None or info.step <= at_most):
                candidates.append((-info.step, number, info.directory, disk))
    for minus_step, _, directory, disk in sorted(candidates, key=lambda entry: entry[:3]):
        try:
            return _read(disk, life, -minus_step, directory, world_size), problems
        except StoreError as error:
            problems.append(f"step {-minus_step} on {disk.name}: {type(error).__name__}")
    return None, problems


def _read(disk: Disk, life: Life, step: int, directory: str, world_size: int) -> Restored:
    checkpoint = open_store(disk, life).open(step, directory=directory)
    spec = TensorSpec(_NAME, "int64", (world_size,), (world_size,), (0,))
    histories = tuple(tuple(checkpoint.objects(rank)["history"]) for rank in range(world_size))
    (tensor,) = checkpoint.read([spec])
    return Restored(
        disk=disk.name,
        directory=directory,
        step=step,
        generation=checkpoint.manifest.generation,
        histories=histories,
        weights=tuple(int(value) for value in tensor),
    )
