"""What it costs when one rank runs out of memory, beside the attempt that is lost.

One rank of two refuses, in the forward or the backward pass, batches of more than half the size. The price of that is
the time from the beginning of the step that fails to its commit, less that of a divided step. It is given relative to
an undivided step, the median of those around it: the attempt that is lost takes most of one. What a divided step costs
beside an undivided one is the machine's and the model's, and is shown apart.

GPT 10.1M, 8 x 64 tokens per rank, 2 ranks, clipping on; the median over `--repeats` failures with a bootstrapped 95 %
interval.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from arc_dist import Arc
from arc_dist.protocol.oom import Division
from gpt import GPT, GPTConfig, make_optimizer, next_byte_loss

SAMPLES, TOKENS = 8, 64
AROUND = 3  # undisturbed steps before and after each failure
SETTINGS = [("ddp", "forward"), ("ddp", "backward"), ("fsdp2", "forward"), ("fsdp2", "backward")]


def model_of(kind: str, config: GPTConfig) -> Any:
    torch.manual_seed(0)
    model = GPT(config)
    if kind == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def measure(kind: str, where: str, repeats: int, config: GPTConfig) -> tuple[list[float], list[float]]:
    """The price of each failure, and divided steps, relative to undivided ones."""
    model = model_of(kind, config)
    optimizer = make_optimizer(model, lr=1e-4)
    arc = Arc(model, optimizer, max_grad_norm=1.0, snapshot_every=1000)
    is_short = False

    def refuse() -> None:
        if is_short:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")

    def in_backward(gradient: torch.Tensor) -> None:
        refuse()

    def loss_fn(batch: Any) -> torch.Tensor:
        nonlocal is_short
        is_short = dist.get_rank() == 1 and len(batch[0]) == SAMPLES and (arc.steps_done + 1) % (2 * AROUND) == 0
        loss = next_byte_loss(model, batch)
        if where == "forward":
            refuse()
        elif is_short:
            hidden.register_hook(in_backward)
        return loss

    def keep(module: Any, inputs: Any, output: torch.Tensor) -> None:
        nonlocal hidden
        hidden = output

    hidden = torch.empty(0)
    inner = model.module if kind == "ddp" else model
    next(iter(inner.blocks)).register_forward_hook(keep)  # reached when the backward is nearly done
    tokens = torch.randint(256, (SAMPLES, TOKENS + 1))
    data = [(tokens[:, :-1], tokens[:, 1:])] * (2 * AROUND * (repeats + 1))
    times: dict[str, list[float]] = {"plain": [], "retry": [], "divided": []}
    ratios, divided = [], []
    last = time.perf_counter()
    for step in arc.train(loss_fn, data):
        now = time.perf_counter()
        guard = arc._engine.guard
        phase = step.number % (2 * AROUND)
        if step.action == "retry":
            times["retry"].append(now - last)
        else:
            times["divided" if guard.division.parts > 1 else "plain"].append(now - last)
        if phase == AROUND - 1:
            if times["retry"]:
                plain = statistics.median(times["plain"])
                apart = statistics.median(times["divided"])
                ratios += [(taken - apart) / plain for taken in times["retry"]]
                divided.append(apart / plain)
            times = {name: [] for name in times}
        if phase == AROUND // 2:
            guard.division = Division()  # as if it had been widened: the next failure is like the first
        last = time.perf_counter()
    return ratios, divided


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median and bootstrapped 95 % interval."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return statistics.median(values), medians[50], medians[1949]


def work(rank: int, port: int, kind: str, where: str, repeats: int, config: GPTConfig) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["ARC_LOG_LEVEL"] = "error"
    dist.init_process_group("gloo")
    ratios, divided = measure(kind, where, repeats, config)
    if rank == 0:
        middle, low, high = interval(ratios)
        apart, *_ = interval(divided)
        print(
            f"{kind:6} {where:9} price of a failure / undivided step {middle:.2f} [{low:.2f}, {high:.2f}], "
            f"{len(ratios)} failures; a divided step / an undivided one {apart:.2f}",
            flush=True,
        )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=12, help="failures per setting")
    parser.add_argument("--quick", action="store_true", help="a small model, three failures: shows that it runs")
    parser.add_argument("--kinds", nargs="*", default=["ddp", "fsdp2"], choices=["ddp", "fsdp2"])
    arguments = parser.parse_args()
    repeats, config = (3, GPTConfig()) if arguments.quick else (arguments.repeats, GPTConfig.m10())
    for kind, where in SETTINGS:
        if kind not in arguments.kinds:
            continue
        store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        port = store.port
        del store
        mp.spawn(work, (port, kind, where, repeats, config), nprocs=2)


if __name__ == "__main__":
    main()
