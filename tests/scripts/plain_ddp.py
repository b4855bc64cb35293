"""A DDP script that knows nothing of arc-dist. Each rank tells in a file of its own what it does."""

import argparse
import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--step-s", type=float, default=0.01)
    args = parser.parse_args()

    rank = int(os.environ["RANK"])
    log = open(os.path.join(args.directory, f"rank-{rank}"), "a", buffering=1)  # noqa: SIM115
    print("start", os.getpid(), time.monotonic(), file=log)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(rank)
    for step in range(args.steps):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        print("step", step, time.monotonic(), file=log)
        time.sleep(args.step_s)
    dist.destroy_process_group()
    print("end", sum(p.sum().item() for p in model.parameters()), time.monotonic(), file=log)


if __name__ == "__main__":
    main()
