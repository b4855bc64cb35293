"""A DDP script that knows nothing of arc-dist; rank 1 sleeps for ever before a step, once.

Arguments: a directory.
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main():
    out, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    torch.manual_seed(rank)
    for step in range(20):
        if rank == 1 and step == 12 and not (out / "hung").exists():
            (out / "hung").touch()
            time.sleep(100_000)
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
    (out / f"done-{rank}").write_text(os.environ["TORCHELASTIC_RESTART_COUNT"])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
