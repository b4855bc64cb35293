"""The training script of bench_node_lost.py: the same model and data under arcrun and under plain torchrun with DCP.

Every committed step appends "<monotonic ns> <rank> <world size> <step>" to a file. Both arms save every fifth step to
the same kind of directory and go on from the newest one; how the data are shared is the world's of the moment.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

STEPS = 1_000_000  # it is ended from outside
SAVE_EVERY = 5
PAUSE_S = 0.05


def main() -> None:
    """Trains until it is ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("arm", choices=("arc", "torchrun"))
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    log = os.open(arguments.directory / "steps", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 42))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = TensorDataset(torch.randn(4096, 64), torch.randint(0, 42, (4096,)))

    def loss_fn(batch: list[torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def committed(step: int) -> None:
        os.write(log, f"{time.monotonic_ns()} {dist.get_rank()} {dist.get_world_size()} {step}\n".encode())
        time.sleep(PAUSE_S)

    train = train_guarded if arguments.arm == "arc" else train_plain
    train(arguments.directory, model, optimizer, data, loss_fn, committed)


def train_guarded(directory, model, optimizer, data, loss_fn, committed) -> None:
    """With arc-dist."""
    from arc_dist import Arc
    from arc_dist.data.sampler import SeededSampler

    store = str(directory / "store")
    arc = Arc(model, optimizer, max_grad_norm=1.0, accumulate=2, checkpoint_every=SAVE_EVERY, store=store)
    for result in arc.train(loss_fn, DataLoader(data, 32, sampler=SeededSampler(data)), steps=STEPS):
        committed(result.number)


def train_plain(directory, model, optimizer, data, loss_fn, committed) -> None:
    """As a user of torchrun and DCP would write it."""
    state = {"model": model.state_dict(), "step": torch.zeros(1)}
    saves = sorted(directory.glob("dcp-*/.metadata"))
    if saves:
        dcp.load(state, checkpoint_id=saves[-1].parent)
        model.load_state_dict(state["model"])
    step = int(state["step"])
    while True:
        sampler = DistributedSampler(data)
        for batch in DataLoader(data, 32, sampler=sampler):
            loss_fn(batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % SAVE_EVERY == 0:
                state = {"model": model.state_dict(), "step": torch.tensor([float(step)])}
                dcp.save(state, checkpoint_id=directory / f"dcp-{step:08d}")
            committed(step)


if __name__ == "__main__":
    main()
