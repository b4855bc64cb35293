"""The training script of bench_restart.py: the same model and data with `Arc` and without.

Every committed step appends "<monotonic ns> <rank> <pid> <step>" to a file, so that the parent can tell when training
went on after it killed a rank.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

STEPS = 1_000_000  # it is ended from outside


def main() -> None:
    """Trains until it is killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("arm", choices=("arc", "torchrun"))
    parser.add_argument("log")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    log = os.open(arguments.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 42))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    data = TensorDataset(torch.randn(4096, 64), torch.randint(0, 42, (4096,)))

    def loss_fn(batch: list[torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def committed(step: int) -> None:
        os.write(log, f"{time.monotonic_ns()} {dist.get_rank()} {os.getpid()} {step}\n".encode())

    if arguments.arm == "arc":
        from arc_dist import Arc
        from arc_dist.data.sampler import SeededSampler

        arc = Arc(model, optimizer, max_grad_norm=1.0)
        for result in arc.train(loss_fn, DataLoader(data, 64, sampler=SeededSampler(data)), steps=STEPS):
            committed(result.number)
        return
    step = 0
    sampler = DistributedSampler(data)
    for epoch in range(STEPS):
        sampler.set_epoch(epoch)
        for batch in DataLoader(data, 64, sampler=sampler):
            loss_fn(batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            committed(step)


if __name__ == "__main__":
    main()
