"""What a guarded step costs beside the same step unguarded: `Arc.train` against a hand-written loop.

Both arms live in the same processes and take turns, block by block, so that a drifting machine hurts both alike; the
figure is the median over pairs of adjacent blocks of (guarded / unguarded - 1), with a bootstrapped 95 % interval, of
wall time and of the processes' CPU time. Both use fused AdamW and clip to the same norm, the unguarded arm with
``torch.nn.utils.clip_grad_norm_``.

Snapshots are taken at the default cadence. They fall into some blocks and not into others, so the time that they took
is taken out of the blocks and shown apart, as a share of all the time the guarded arm took; `total` is the sum.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from arc_dist import Arc
from gpt import GPT, GPTConfig, count_parameters, make_optimizer, next_byte_loss

SETTINGS = {  # name: (ranks, clipping)
    "mlp": [(1, True), (2, True)],
    "gpt10m": [(2, True), (2, False)],
    "gpt50m": [(2, True), (2, False)],
}

BLOCKS = {"mlp": (100, 100), "gpt10m": (2, 50), "gpt50m": (1, 36)}  # steps per block, pairs of blocks


def build(name: str) -> tuple[nn.Module, Callable[[nn.Module, Any], torch.Tensor], Any, str]:
    """A model, its loss, one batch, and words about the batch."""
    torch.manual_seed(0)
    if name == "mlp":
        model = nn.Sequential(nn.Linear(784, 112), nn.ReLU(), nn.Linear(112, 48), nn.ReLU(), nn.Linear(48, 10))
        batch = (torch.randn(64, 784), torch.randint(10, (64,)))
        return model, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), batch, "64 rows per rank"
    config = GPTConfig.m10() if name == "gpt10m" else GPTConfig.m50()
    tokens = torch.randint(256, (1, 513))
    return GPT(config), next_byte_loss, (tokens[:, :-1], tokens[:, 1:]), "512 tokens per rank"


def arms(name: str, clip: float | None) -> tuple[Callable[[], None], Callable[[], None], Callable[[], float], str]:
    """The two arms, the seconds that the guarded one spent on snapshots so far, and words about the setting."""
    distributed = dist.is_initialized()

    def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = build(name)[0]
        optimizer = make_optimizer(model, lr=1e-4)
        return (DistributedDataParallel(model) if distributed else model), optimizer

    _, loss_of, batch, words = build(name)
    plain_model, plain_optimizer = model_and_optimizer()
    parameters = list(plain_model.parameters())

    def plain_loss(b: Any) -> torch.Tensor:
        return loss_of(plain_model, b)

    def unguarded() -> None:
        loss = plain_loss(batch)
        loss.item()  # every loop reports its loss
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        plain_optimizer.step()
        plain_optimizer.zero_grad(set_to_none=True)

    model, optimizer = model_and_optimizer()
    arc = Arc(model, optimizer, max_grad_norm=clip)
    steps = arc.train(lambda b: loss_of(model, b), [batch] * 100_000, steps=1 << 40)
    words = f"{count_parameters(model):,} parameters, {words}"

    def spent() -> float:
        return arc._engine.guard.protection.cadence.spent_s

    return unguarded, lambda: next(steps) and None, spent, words


def measure(rank: int, world_size: int, name: str, clip: bool, args: argparse.Namespace, result: str) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=args.port)
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
    unguarded, guarded, spent, words = arms(name, 1.0 if clip else None)
    for _ in range(args.warm_up):
        unguarded()
        guarded()
    block, pairs = BLOCKS[name]
    pairs = max(2, round(pairs * args.scale))
    wall, cpu, snapshots, guarded_s = [], [], 0.0, 0.0
    for i in range(pairs):
        order = (unguarded, guarded) if i % 2 else (guarded, unguarded)
        times = {}
        for arm in order:
            if world_size > 1:
                dist.barrier()
            wall_began, cpu_began, spent_began = time.perf_counter(), time.process_time(), spent()
            for _ in range(block):
                arm()
            apart = spent() - spent_began
            times[arm] = (time.perf_counter() - wall_began - apart, time.process_time() - cpu_began - apart)
            if arm is guarded:
                snapshots += apart
                guarded_s += times[arm][0]
        wall.append((times[unguarded][0] / block, times[guarded][0] / times[unguarded][0] - 1))
        cpu.append(times[guarded][1] / times[unguarded][1] - 1)
    if rank == 0:
        row = {
            "model": name,
            "ranks": world_size,
            "clipping": clip,
            "setting": words,
            "step_ms": statistics.median(step for step, _ in wall) * 1e3,
            "wall": interval([ratio for _, ratio in wall]),
            "cpu": interval(cpu),
            "snapshots": snapshots / guarded_s,
            "pairs": pairs,
            "block": block,
        }
        Path(result).write_text(json.dumps(row))
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def interval(values: list[float], resamples: int = 2000) -> tuple[float, float, float]:
    """(median, low, high): the median and a 95 % bootstrap interval of it."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(resamples))
    return statistics.median(values), medians[int(0.025 * resamples)], medians[int(0.975 * resamples)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of pairs of blocks")
    parser.add_argument("--warm-up", type=int, default=26, help="steps of each arm before measuring (cadence: 25)")
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, 1 thread per rank, fused AdamW\n")
    print(f"{'model':8} {'ranks':>5} {'clip':>5} {'step':>9}  {'wall':^26}  {'cpu':^26}  snapshots  total  setting")
    rows = []
    for name in args.models:
        for world_size, clip in SETTINGS[name]:
            rows.append(run(name, world_size, clip, args))
            print(render(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def run(name: str, world_size: int, clip: bool, args: argparse.Namespace) -> dict[str, Any]:
    import socket
    import tempfile

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        args.port = str(probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as directory:
        result = f"{directory}/row.json"
        os.environ["ARC_LOG_LEVEL"] = "error"
        mp.spawn(measure_rank, (world_size, name, clip, args, result), nprocs=world_size)
        return json.loads(Path(result).read_text())


def measure_rank(rank: int, *rest: Any) -> None:
    measure(rank, *rest)


def render(row: dict[str, Any]) -> str:
    def share(values: list[float]) -> str:
        return f"{values[0]:+7.2%} [{values[1]:+7.2%}, {values[2]:+7.2%}]"

    clip = "on" if row["clipping"] else "off"
    return (
        f"{row['model']:8} {row['ranks']:5} {clip:>5} {row['step_ms']:6.2f} ms  {share(row['wall'])}  "
        f"{share(row['cpu'])}  {row['snapshots']:9.2%} {row['wall'][0] + row['snapshots']:+6.2%}  {row['setting']}; "
        f"{row['pairs']} pairs of {row['block']} steps"
    )


if __name__ == "__main__":
    main()
