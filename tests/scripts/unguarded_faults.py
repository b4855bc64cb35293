"""A script that knows nothing of arc: trains, is hurt once, writes what it ends with. Takes KIND FAULT DIR."""

import hashlib
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

kind, fault, directory = sys.argv[1:4]
if kind != "single":
    dist.init_process_group("gloo")
rank = dist.get_rank() if dist.is_initialized() else 0
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
if kind == "ddp":
    model = DistributedDataParallel(model)
elif kind == "fsdp":
    fully_shard(model)
half = list(model.parameters())[:2], list(model.parameters())[2:]
optimizers = [torch.optim.AdamW(part, lr=1e-3) for part in half]
torch.manual_seed(10 + rank)
target = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))


def local(t):
    return t.to_local() if isinstance(t, DTensor) else t


def digest():
    sha = hashlib.sha256()
    for parameter in model.parameters():
        sha.update(local(parameter).detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def finite():
    return all(bool(torch.isfinite(local(p)).all()) for p in model.parameters())


fired, trace = 0, []
for step in range(40):
    x = torch.randn(8, 16)
    if fault == "nan-data" and step == 20 and rank == 0:
        x, fired = x * math.nan, fired + 1
    loss = (model(x) - x.nan_to_num() @ target).square().mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    if fault == "inf-weight" and step == 20 and rank == 0:
        with torch.no_grad():
            local(next(iter(model.parameters()))).view(-1)[3] = math.inf
        fired += 1
    trace.append(digest())
result = {"rank": rank, "fired": fired, "finite": finite(), "digests": trace, "loss": loss.item()}
Path(directory, f"{rank}.json").write_text(json.dumps(result))
sys.stdout.flush()
if dist.is_initialized():
    dist.barrier()
# Without the interpreter's own end: torch's CPU backends abort there now and then, with or without us.
os._exit(0)
