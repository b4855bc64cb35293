"""The training script of bench_goodput.py: DDP or FSDP2 with `Arc`, or DDP with a plain DCP checkpoint.

Every committed step appends "<monotonic ns> <rank> <pid> <step>" to a file.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from restart_job import load, save

STEPS = 10_000_000  # it is ended from outside
WIDTH = 256
ROWS = 64


def main() -> None:
    """Trains until it is killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("arm", choices=("ddp", "fsdp", "torchrun"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--snapshot-every", type=int, required=True)
    parser.add_argument("--checkpoint-every", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    log = os.open(arguments.directory / "steps", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    layers = (nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 42))
    plain = nn.Sequential(*layers)
    if arguments.arm == "fsdp":
        fully_shard(plain)
    model = plain if arguments.arm == "fsdp" else DistributedDataParallel(plain)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    data = TensorDataset(torch.randn(8192, 64), torch.randint(0, 42, (8192,)))

    def loss_fn(batch: list[torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def committed(step: int) -> None:
        os.write(log, f"{time.monotonic_ns()} {dist.get_rank()} {os.getpid()} {step}\n".encode())

    if arguments.arm == "torchrun":
        _train_plainly(model, optimizer, data, loss_fn, committed, arguments)
        return
    from arc_dist import Arc
    from arc_dist.data.sampler import SeededSampler

    arc = Arc(
        model,
        optimizer,
        max_grad_norm=1.0,
        store=str(arguments.directory / "store"),
        snapshot_every=arguments.snapshot_every,
        checkpoint_every=arguments.checkpoint_every,
    )
    for result in arc.train(loss_fn, DataLoader(data, ROWS, sampler=SeededSampler(data)), epochs=STEPS):
        committed(result.number)


def _train_plainly(model, optimizer, data, loss_fn, committed, arguments) -> None:
    """The usual loop: the state is saved every so many steps; a restart loads it."""
    path = arguments.directory / "dcp"
    step = load(path, model, optimizer)
    generator = torch.Generator()
    while step < STEPS:
        generator.manual_seed(dist.get_rank() * STEPS + step)
        rows = torch.randint(0, len(data), (ROWS,), generator=generator)
        loss_fn([tensor[rows] for tensor in data.tensors]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % arguments.checkpoint_every == 0:
            save(path, model, optimizer, step)
        committed(step)


if __name__ == "__main__":
    main()
