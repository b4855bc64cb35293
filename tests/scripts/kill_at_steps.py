"""Trains a small DDP model; in generation g one rank kills itself after a given number of steps.

Arguments: a log of committed steps, the snapshot interval, the kills as "rank:step,...", one a generation.
"""

import os
import signal
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from arc_dist import Arc, SeededSampler


def main():
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    kills = [tuple(map(int, kill.split(":"))) for kill in sys.argv[3].split(",")]
    generation = int(os.environ["ARC_GENERATION"])
    victim = kills[generation] if generation < len(kills) else None
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(16, 4))
    data = TensorDataset(torch.randn(512, 16), torch.randn(512, 4))
    every = int(sys.argv[2])
    certify_after = min(2, every)
    arc = Arc(model, torch.optim.AdamW(model.parameters()), snapshot_every=every, certify_after=certify_after)

    def loss_fn(batch):
        if victim == (dist.get_rank(), arc.steps_done):
            os.kill(os.getpid(), signal.SIGKILL)
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    for step in arc.train(loss_fn, DataLoader(data, 8, sampler=SeededSampler(data)), steps=kills[-1][1] + 5):
        os.write(log, f"{generation} {dist.get_rank()} {step.number}\n".encode())


if __name__ == "__main__":
    main()
