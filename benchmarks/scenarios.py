"""The nightmare suite: sixteen faults, once and for ever, in one process, under DDP and under FSDP2; guarded and not.

Each fault strikes the last rank alone, from the 50th attempt at a step on, of 100 steps; what a reduction spreads
reaches all. The same checks run on both arms. "recovered": the run reached its last step, every weight is finite,
replicas are equal, and the held-out loss is at most 5 % above that of the twin which nothing struck. "stopped":
`TrainingStopped`, on every rank. A transient fault has to be recovered from (fault 15 has no end); a persistent one
recovered from or stopped clearly. Where the unguarded arm recovers too, the fault was harmless under clipping.

    python benchmarks/scenarios.py --kinds single ddp fsdp --seeds 3
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from arc_dist import Arc, TrainingStopped
from stats import setting

AT, STEPS, WITHIN = 50, 100, 1.05
KINDS = {"single": 1, "ddp": 2, "fsdp": 2}
Loss = torch.Tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclasses.dataclass
class Fault:
    """What to do to a training, by the moment: to the loss, to the gradient, or between two steps.

    Attributes:
        name: as in the table.
        loss: of an attempt at a step, given how often the fault fired.
        gradient: of one parameter, before the reduction where there is one.
        between: before a step; changes model and optimizer.
        lasts: attempts, where the fault is to strike once.
        hurts: probability or rhythm: whether an attempt, by its number, is struck.
    """

    name: str
    loss: Callable[[Loss], Loss] | None = None
    gradient: Callable[[torch.Tensor], torch.Tensor] | None = None
    between: Callable[[nn.Module, torch.optim.Optimizer], None] | None = None
    lasts: int = 1
    hurts: Callable[[int, torch.Generator], bool] = lambda step, generator: True


def fill_weights(value: float, share: float = 1.0) -> Callable[[nn.Module, torch.optim.Optimizer], None]:
    def strike(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                flat = local(parameter).view(-1)
                flat[: math.ceil(share * flat.numel())] = value

    return strike


def set_rate(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 1e6


def ruin_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for fields in optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            local(fields[name]).fill_(math.nan)


def several(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    first = local(next(iter(model.parameters())))
    with torch.no_grad():
        flat = first.view(-1)
        flat[: flat.numel() // 10] = math.nan
    for group in optimizer.param_groups:
        # Beyond, the update raises on this rank and leaves the others waiting.
        group["lr"] = min(group["lr"] * 100, 1e30)


def noisy(gradient: torch.Tensor) -> torch.Tensor:
    flat = gradient.clone().view(-1)
    flat[: flat.numel() // 2] = torch.randn(flat.numel() // 2) * 1e5
    return flat.view_as(gradient)


NIGHTMARE = [
    Fault("1 learning rate := 1e6", between=set_rate),
    Fault("2 all weights := NaN", between=fill_weights(math.nan)),
    Fault("3 loss / 0", loss=lambda loss: loss / 0),
    Fault("4 loss := NaN", loss=lambda loss: loss * math.nan),
    Fault("5 loss x 1e10", loss=lambda loss: loss * 1e10),
    Fault("6 Inf loss, 5 steps", loss=lambda loss: loss * math.inf, lasts=5),
    Fault("7 Inf / 0.0 in turn", loss=lambda loss: loss * math.inf, hurts=lambda step, g: step % 2 == 0),
    Fault("8 gradients := 1e6, loss x 1000", loss=lambda loss: loss * 1000, gradient=lambda g: torch.sign(g) * 1e6),
    Fault("9 moments := NaN", between=ruin_moments),
    Fault("10 half of the gradients := N(0, 1e5)", gradient=noisy),
    Fault(
        "11 Inf loss, p = 0.3",
        loss=lambda loss: loss * math.inf,
        hurts=lambda s, g: bool(torch.rand(1, generator=g) < 0.3),
    ),
    Fault("12 loss x 1e15 every 10th", loss=lambda loss: loss * 1e15, hurts=lambda step, g: step % 10 == 0),
    Fault("13 loss x 1000, 10 % NaN, lr x 100", loss=lambda loss: loss * 1000, between=several),
    Fault("14 Inf loss, 10 steps", loss=lambda loss: loss * math.inf, lasts=10),
    Fault("15 NaN to the end", loss=lambda loss: loss * math.nan, lasts=1 << 30),
    Fault("16 half of the weights := 0", between=fill_weights(0.0, 0.5)),
]


class Task:
    """A noisy regression; each rank has samples of its own, all are judged by the same held-out ones."""

    def __init__(self, seed: int, rank: int) -> None:
        teacher = torch.Generator().manual_seed(seed)
        self._weight = torch.randn(16, 4, generator=teacher)
        self._noise = torch.Generator().manual_seed(1000 * seed + rank)
        self.held_out = self._sample(512, torch.Generator().manual_seed(seed + 77))
        self.batches = [self._sample(16, self._noise) for _ in range(4 * STEPS)]

    def _sample(self, rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(rows, 16, generator=generator)
        return x, torch.tanh(x @ self._weight) + 0.3 * torch.randn(rows, 4, generator=generator)


class Run:
    """One training on one rank, guarded or not, with a fault or without."""

    def __init__(self, kind: str, seed: int, fault: Fault | None, persistent: bool, guarded: bool) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        world = dist.get_world_size() if dist.is_initialized() else 1
        self.fault = fault if self.rank == world - 1 else None
        self.left = (1 << 30) if persistent else (fault.lasts if fault else 0)
        self.fired = 0
        self.attempt = 0
        self.generator = torch.Generator().manual_seed(seed)
        self.task = Task(seed, self.rank)
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        self.model: nn.Module = model
        if kind == "ddp":
            self.model = DistributedDataParallel(model)
        elif kind == "fsdp":
            for layer in (model[0], model[2], model[4]):
                fully_shard(layer)
            fully_shard(model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.guarded = guarded
        self.striking = False
        if self.fault is not None and self.fault.gradient is not None:
            for parameter in self.model.parameters():
                if kind == "fsdp":
                    parameter.register_post_accumulate_grad_hook(self._strike_shard)
                else:
                    parameter.register_hook(self._strike_gradient)

    def _strike_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        assert self.fault is not None and self.fault.gradient is not None
        return self.fault.gradient(gradient) if self.striking else gradient

    def _strike_shard(self, parameter: torch.Tensor) -> None:
        if self.striking and parameter.grad is not None:
            part = local(parameter.grad)
            part.copy_(self._strike_gradient(part))

    def _loss(self, batch: Any) -> Loss:
        x, y = batch
        self.attempt += 1
        fault = self.fault
        self.striking = (
            fault is not None
            and (fault.loss is not None or fault.gradient is not None)
            and self.attempt >= AT
            and self.left > 0
            and fault.hurts(self.attempt, self.generator)
        )
        if self.striking and fault is not None:
            self.left -= 1
            self.fired += 1
        loss = nn.functional.mse_loss(self.model(x), y)
        return fault.loss(loss) if self.striking and fault is not None and fault.loss is not None else loss

    def _between(self) -> None:
        fault = self.fault
        if fault is not None and fault.between is not None and self.attempt >= AT - 1 and self.left > 0:
            if fault.loss is None:
                self.left -= 1
                self.fired += 1
            fault.between(self.model, self.optimizer)

    def _numbers(self) -> Iterator[int]:
        if self.guarded:
            arc = Arc(self.model, self.optimizer, snapshot_every=5, max_grad_norm=1.0, monitors="full")
            for step in arc.train(self._loss, self.task.batches, steps=STEPS):
                yield step.number
            return
        for number, batch in enumerate(self.task.batches[:STEPS], 1):
            self._loss(batch).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            yield number

    def result(self) -> dict[str, Any]:
        stopped, last = False, 0
        try:
            for number in self._numbers():
                last = number
                self._between()
        except TrainingStopped:
            stopped = True
        with torch.no_grad():
            x, y = self.task.held_out
            held_out = nn.functional.mse_loss(self.model(x), y).item()
            finite = all(bool(torch.isfinite(local(p)).all()) for p in self.model.parameters())
            digest = sum(float(local(p).double().sum()) for p in self.model.parameters())
        return {
            "stopped": stopped,
            "last": last,
            "held_out": held_out,
            "finite": finite,
            "digest": digest,
            "fired": self.fired,
        }


def judge(outcomes: Sequence[dict[str, Any]], twin: float, kind: str) -> str:
    """What became of a run, from what its ranks say."""
    if any(outcome["stopped"] for outcome in outcomes):
        return "stopped" if all(outcome["stopped"] for outcome in outcomes) else "torn"
    whole = all(outcome["finite"] and outcome["last"] == STEPS for outcome in outcomes)
    equal = kind != "ddp" or len({outcome["digest"] for outcome in outcomes}) == 1
    if whole and equal and all(outcome["held_out"] <= WITHIN * twin for outcome in outcomes):
        return "recovered"
    return "lost"


def rank_main(rank: int, world_size: int, kind: str, seeds: int, directory: str) -> None:
    torch.set_num_threads(1)
    os.environ["ARC_LOG_LEVEL"] = "error"
    os.environ["ARC_RUN_DIR"] = f"{directory}/run"
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{directory}/{kind}", rank=rank, world_size=world_size)
    rows = []
    for seed in range(seeds):
        rows.append(["", "", seed, Run(kind, seed, None, False, False).result()])
        for fault in NIGHTMARE:
            for persistent in (False, True):
                for guarded in (False, True):
                    outcome = Run(kind, seed, fault, persistent, guarded).result()
                    rows.append([fault.name, f"{persistent} {guarded}", seed, outcome])
    Path(directory, f"{kind}-{rank}.json").write_text(json.dumps(rows))
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def wilson(good: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share."""
    z = 1.96
    share, denominator = good / total, 1 + z * z / total
    middle = (share + z * z / (2 * total)) / denominator
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / denominator
    return max(0.0, middle - half), min(1.0, middle + half)


def suite(kind: str, seeds: int, directory: str) -> dict[tuple[str, str], list[str]]:
    """What became of each run of a kind of parallelism, by fault and arm."""
    world_size = KINDS[kind]
    mp.spawn(_spawned, (world_size, kind, seeds, directory), nprocs=world_size)  # type: ignore[attr-defined]
    ranks = [json.loads(Path(directory, f"{kind}-{rank}.json").read_text()) for rank in range(world_size)]
    twins, found = {}, {}
    for entries in zip(*ranks, strict=True):
        name, arm, seed = entries[0][:3]
        outcomes = [entry[3] for entry in entries]
        if not name:
            twins[seed] = outcomes[0]["held_out"]
            continue
        if not outcomes[-1]["fired"]:
            raise RuntimeError(f"{name} did not fire under {kind} with seed {seed}")
        found.setdefault((name, arm), []).append(judge(outcomes, twins[seed], kind))
    return found


def _spawned(rank: int, *rest: Any) -> None:
    rank_main(rank, *rest)


def words(verdicts: Sequence[str]) -> str:
    counts = {verdict: verdicts.count(verdict) for verdict in ("recovered", "stopped", "lost", "torn")}
    return ", ".join(f"{verdict} {count}" for verdict, count in counts.items() if count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    print(setting())
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as directory:
            found = suite(kind, args.seeds, directory)
        print(f"\n{kind}, {args.seeds} seeds\n")
        print("| fault | once: unguarded | guarded | for ever: unguarded | guarded |\n|---|---|---|---|---|")
        for fault in NIGHTMARE:
            cells = [words(found[fault.name, f"{p} {g}"]) for p in (False, True) for g in (False, True)]
            print("|", " | ".join([fault.name, *cells]), "|")
        once = [v for (_, arm), verdicts in found.items() if arm == "False True" for v in verdicts]
        ever = [v for (_, arm), verdicts in found.items() if arm == "True True" for v in verdicts]
        for what, good, all_of in (
            ("once, recovered", once.count("recovered"), once),
            ("for ever, recovered or stopped on every rank", ever.count("recovered") + ever.count("stopped"), ever),
        ):
            low, high = wilson(good, len(all_of))
            print(f"{what}: {good} of {len(all_of)} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    sys.exit(main())
