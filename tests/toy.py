"""Small trainings for tests: noisy, different data per rank, dropout, every kind of parallelism; guarded and not.

`plain` is the unguarded loop that a user would write; what `Arc.train` does is compared with it bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from arc_dist import Arc, SeededSampler

Batch = tuple[torch.Tensor, torch.Tensor]


class Noise(Dataset[Batch]):
    """Samples that are a function of their index: a noisy linear task, different on every rank by its sampler."""

    def __init__(self, length: int = 4096, poison: int | None = None) -> None:
        self.poison = poison
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(length, 16, generator=generator)
        self.y = self.x @ torch.randn(16, 4, generator=generator) + torch.randn(length, 4, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Batch:
        if index == self.poison:
            raise ValueError(f"a sample cannot be read by process {os.getpid()}")
        return self.x[index], self.y[index]


class Net(nn.Module):
    """Three layers with dropout, a norm with running statistics when asked, and an uneven width."""

    def __init__(self, *, batch_norm: bool = False, width: int = 33) -> None:
        super().__init__()
        self.first = nn.Linear(16, width)
        self.norm = nn.BatchNorm1d(width) if batch_norm else nn.LayerNorm(width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.dropout(self.norm(self.first(x)).relu(), 0.1, self.training)
        return self.last(self.second(x).relu())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy:
    """What to train and how. `kind` is "single", "ddp", "fsdp" or "hsdp" (replicas of two shards)."""

    kind: str = "single"
    clip: float | None = 1.0
    accumulate: int = 1
    bf16: bool = False
    schedule: bool = True
    two_optimizers: bool = False
    batch_norm: bool = False
    workers: int = 0
    steps: int = 30
    samples: int = 4096
    frozen: bool = False  # the layers in the middle are not trained
    width: int = 33
    poison: int | None = None  # the sample that cannot be read

    @property
    def is_sharded(self) -> bool:
        return self.kind in ("fsdp", "hsdp")


def build_model(toy: Toy) -> nn.Module:
    torch.manual_seed(3)
    model = Net(batch_norm=toy.batch_norm, width=toy.width)
    if toy.frozen:
        model.norm.requires_grad_(False)
        model.second.requires_grad_(False)
    torch.manual_seed(100 + (dist.get_rank() if dist.is_initialized() else 0))  # dropout differs between ranks
    if toy.kind == "ddp":
        return DistributedDataParallel(model)
    if toy.is_sharded:
        size = dist.get_world_size()
        if toy.kind == "fsdp":
            mesh = init_device_mesh("cpu", (size,))
        else:
            mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("replicate", "shard"))
        for layer in (model.first, model.second, model.last):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def build_optimizers(toy: Toy, model: nn.Module) -> list[torch.optim.Optimizer]:
    parameters = list(model.parameters())
    if not toy.two_optimizers:
        return [torch.optim.AdamW(parameters, lr=3e-3)]
    return [torch.optim.AdamW(parameters[:4], lr=3e-3), torch.optim.SGD(parameters[4:], lr=1e-2, momentum=0.9)]


def build_schedulers(toy: Toy, optimizers: list[torch.optim.Optimizer]) -> list[Any]:
    return [LambdaLR(optimizer, lambda step: 1.0 / (1 + step / 20)) for optimizer in optimizers] if toy.schedule else []


def build_loader(toy: Toy) -> DataLoader[Batch]:
    data = Noise(toy.samples, toy.poison)
    return DataLoader(data, batch_size=8, sampler=SeededSampler(data, seed=5), num_workers=toy.workers)


def make_loss(toy: Toy, model: nn.Module) -> Callable[[Batch], torch.Tensor]:
    def loss_fn(batch: Batch) -> torch.Tensor:
        x, y = batch
        with torch.autocast("cpu", torch.bfloat16) if toy.bf16 else contextlib.nullcontext():
            return nn.functional.mse_loss(model(x).float(), y)

    return loss_fn


def endless(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """Epoch after epoch, as `Arc.train` goes through them."""
    for epoch in itertools.count():
        loader.sampler.set_epoch(epoch)
        yield from loader


def plain(toy: Toy) -> tuple[str, list[float]]:
    """The unguarded loop; the digest of what it ends with, and its losses."""
    model = build_model(toy)
    optimizers = build_optimizers(toy, model)
    schedulers = build_schedulers(toy, optimizers)
    loss_fn = make_loss(toy, model)
    batches = endless(build_loader(toy))
    losses = []
    for _ in range(toy.steps):
        micro_losses = []
        for i in range(toy.accumulate):
            last = i == toy.accumulate - 1
            if toy.is_sharded:
                model.set_requires_gradient_sync(last)
                model.set_is_last_backward(last)
            with model.no_sync() if toy.kind == "ddp" and not last else contextlib.nullcontext():
                loss = loss_fn(next(batches))
                micro_losses.append(loss.item())
                (loss / toy.accumulate).backward()
        if toy.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), toy.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        losses.append(sum(micro_losses) / len(micro_losses))
    return digest(model, optimizers), losses


@dataclasses.dataclass
class Job:
    """A guarded training: its objects, and an iterator over its steps."""

    arc: Arc
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    steps: Iterator[Any]

    def digest(self) -> str:
        return digest(self.model, self.optimizers)

    def replica(self) -> str:
        return digest(self.model, [], rng=False)


def guarded(toy: Toy, *, wrap_loss: Callable[[torch.Tensor, Arc], torch.Tensor] | None = None, **settings: Any) -> Job:
    """The same training under `Arc.train`; `wrap_loss` may hurt the loss."""
    model = build_model(toy)
    optimizers = build_optimizers(toy, model)
    settings = {"snapshot_every": 5, "max_grad_norm": toy.clip, "accumulate": toy.accumulate, **settings}
    arc = Arc(model, optimizers, scheduler=build_schedulers(toy, optimizers), **settings)
    plain_loss = make_loss(toy, model)

    def loss_fn(batch: Batch) -> torch.Tensor:
        loss = plain_loss(batch)
        return loss if wrap_loss is None else wrap_loss(loss, arc)

    return Job(arc, model, optimizers, arc.train(loss_fn, build_loader(toy), steps=toy.steps))


def digest(model: nn.Module, optimizers: list[torch.optim.Optimizer], *, rng: bool = True) -> str:
    """SHA-256 over this rank's parameters, buffers, optimizer state, rates and the torch generator."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, DTensor):
            value = value.to_local()
        if isinstance(value, torch.Tensor):
            sha.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            sha.update(repr(value).encode())

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        sha.update(name.encode())
        add(tensor)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            add([(key, value) for key, value in sorted(group.items()) if key != "params"])
            for parameter in group["params"]:
                for key, value in sorted(optimizer.state.get(parameter, {}).items()):
                    sha.update(key.encode())
                    add(value)
    if rng:
        sha.update(torch.get_rng_state().numpy().tobytes())
    return sha.hexdigest()
