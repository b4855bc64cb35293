"""A plain loop, without `Arc`, inside a function that is entered again: it keeps what it needs in a file of its own.

Arguments: a directory. Rank 1 is killed once, in step 5. Every rank writes "<pid> <first step> <sum of weights>".
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from arc_dist import resilient

OUT = Path(sys.argv[1])


@resilient(within_s=30.0)
def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    own = OUT / "state.pt"
    done = 0
    if own.exists():
        saved = torch.load(own)
        model.load_state_dict(saved["model"])
        done = saved["step"]
    first = done + 1
    for step in range(first, 11):
        marker = OUT / "killed"
        if rank == 1 and step == 5 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        generator = torch.Generator().manual_seed(100 * step + rank)
        model(torch.randn(4, 8, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            torch.save({"model": model.state_dict(), "step": step}, own.with_suffix(".draft"))
            own.with_suffix(".draft").replace(own)
        dist.barrier()
    total = sum(float(p.detach().double().sum()) for p in model.parameters())
    (OUT / f"ended-{rank}").write_text(f"{os.getpid()} {first} {total!r}")
    dist.destroy_process_group()


with open(OUT / f"started-{os.environ['RANK']}", "a") as file:
    file.write(f"{os.getpid()}\n")
main()
