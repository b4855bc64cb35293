"""Small trainings in which one rank runs out of memory at a chosen place, for the tests of micro-batches."""

from __future__ import annotations

import dataclasses
import hashlib

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from arc_dist import Arc
from arc_dist.protocol.oom import Division
from toy import Job, Toy, build_loader, build_model, build_optimizers, build_schedulers

PLACES = ("before the model", "first layer", "last layer", "after the model", "backward, late", "backward, early")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shortage:
    """When memory is short: on `rank`, from step `at` on, `times` times, where more samples come than `fits`."""

    rank: int = 1
    at: int = 7
    place: str = "last layer"
    fits: int = 4
    times: int = 100


class Memory:
    """Raises torch's own error at the chosen place; says how often it did, and with how many samples."""

    def __init__(self, shortage: Shortage, rank: int) -> None:
        self.shortage, self.rank = shortage, rank
        self.step, self.samples = 0, 0
        self.refused: list[int] = []

    def need(self, place: str) -> None:
        short = self.shortage
        if place != short.place or self.rank != short.rank or self.step < short.at:
            return
        if self.samples > short.fits and len(self.refused) < short.times:
            self.refused.append(self.samples)
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {self.samples} GiB.")

    def watch(self, model: nn.Module) -> None:
        inner = model.module if hasattr(model, "module") else model
        inner.first.register_forward_hook(lambda module, args, output: self.need("first layer"))
        inner.last.register_forward_hook(lambda module, args, output: self.need("last layer"))
        # A tensor's hook runs in the backward pass, before what made the tensor.
        inner.last.register_forward_hook(lambda module, args, output: self._in_backward(output, "backward, early"))
        inner.first.register_forward_hook(lambda module, args, output: self._in_backward(output, "backward, late"))

    def _in_backward(self, output: torch.Tensor, place: str) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: self.need(place))


def short_of_memory(toy: Toy, shortage: Shortage, rank: int, *, train: bool = True, **settings: object) -> tuple:
    """The guarded training, and the memory that it needs."""
    model = build_model(toy)
    model.train(train)
    memory = Memory(shortage, rank)
    memory.watch(model)
    optimizers = build_optimizers(toy, model)
    settings = {"snapshot_every": 5, "max_grad_norm": toy.clip, "accumulate": toy.accumulate, **settings}
    arc = Arc(model, optimizers, scheduler=build_schedulers(toy, optimizers), **settings)

    def loss_fn(batch):
        x, y = batch
        memory.step, memory.samples = arc.steps_done + 1, len(x)
        memory.need("before the model")
        output = model(x)
        memory.need("after the model")
        return nn.functional.mse_loss(output.float(), y)

    return Job(arc, model, optimizers, arc.train(loss_fn, build_loader(toy), steps=toy.steps)), memory


def divide_by_hand(job: Job, at: int, parts: int):
    """Yields the steps of an undisturbed training whose batches are divided from step `at` on."""
    for step in job.steps:
        yield step
        if step.number == at - 1:
            job.arc._engine.guard.division = Division(parts=parts)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [(p.to_local() if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]


def weights_hash(model: nn.Module) -> str:
    sha = hashlib.sha256()
    for tensor in weights(model):
        sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()
