"""Runs a job life after life, each in a world of its own, and says which samples the committed steps were made of."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler

from arc_dist import SeededSampler
from ranks import JobResult, run_plain, run_supervised
from toy import Noise

SCRIPT = str(Path(__file__).parent / "scripts" / "train_elastic.py")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is trained; `ranks` and `accumulate` are those of the first life."""

    kind: str = "ddp"
    ranks: int = 4
    accumulate: int = 3
    batch_size: int = 2
    samples: int = 100
    sampler: str = "seeded"
    workers: int = 0
    checkpoint_every: int = 4


class Numbered(Noise):
    """Noise whose samples know their number."""

    def __getitem__(self, index: int) -> Any:
        return *super().__getitem__(index), index


def make_sampler(plan: Plan, data: Any, **where: int) -> Any:
    """As a script makes it; `where` stands in for the process group."""
    return SeededSampler(data, seed=5, **where) if plan.sampler == "seeded" else DistributedSampler(data, **where)


def build_loader(plan: Plan, **where: int) -> DataLoader[Any]:
    data = Numbered(plan.samples)
    sampler = make_sampler(plan, data, **where)
    return DataLoader(data, batch_size=plan.batch_size, sampler=sampler, num_workers=plan.workers)


def turns(plan: Plan, count: int) -> list[Counter[int]]:
    """What the first `count` steps of a run without faults, in the world it began with, are made of."""
    streams: list[list[list[int]]] = []
    for rank in range(plan.ranks):
        stream: list[list[int]] = []
        loader = build_loader(dataclasses.replace(plan, workers=0), num_replicas=plan.ranks, rank=rank)
        epoch = 0
        while len(stream) < count * plan.accumulate:
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            stream += list(loader.batch_sampler)
            epoch += 1
        streams.append(stream)
    width = plan.accumulate
    return [
        Counter(index for stream in streams for batch in stream[t * width : (t + 1) * width] for index in batch)
        for t in range(count)
    ]


def live(
    plan: Plan,
    out: Path,
    *,
    life: int,
    ranks: int,
    until: int,
    supervised: bool,
    timeout_s: float = 300.0,
    **faults: Any,
) -> JobResult:
    """One run of the job, to step `until` or to its end by a fault."""
    config = {"plan": dataclasses.asdict(plan), "out": str(out), "life": life, "until": until, **faults}
    run = run_supervised if supervised else run_plain
    env = {"ARC_RUN_DIR": str(out / "run")}
    return run(ranks, SCRIPT, json.dumps(config), env=env, timeout_s=timeout_s)


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The samples of every committed step, and how many attempts were skipped for good."""

    steps: Mapping[int, Counter[int]]
    worlds: Mapping[int, int]


def timeline(out: Path, *, until: int) -> Timeline:
    """What the last attempt at each step was made of: an earlier one was rolled back, or died."""
    last: dict[int, tuple[list[int], int]] = {}
    lines = [json.loads(line) for path in out.glob("samples-*.jsonl") for line in path.read_text().splitlines()]
    for line in lines:
        when = (line["life"], line["attempt"])
        last[line["step"]] = max(last.get(line["step"], when), when)
    steps: dict[int, Counter[int]] = {step: Counter() for step in last if step <= until}
    ranks: dict[int, set[int]] = {step: set() for step in steps}
    for line in lines:
        step = line["step"]
        if step in steps and (line["life"], line["attempt"]) == last[step]:
            steps[step].update(line["samples"])
            ranks[step].add(line["rank"])
    return Timeline(steps, {step: len(who) for step, who in ranks.items()})


def skipped_turns(plan: Plan, seen: Timeline, *, until: int) -> list[int]:
    """The turns that no committed step used; fails unless all others were used exactly once, in their order."""
    assert sorted(seen.steps) == list(range(1, until + 1))
    expected = turns(plan, 2 * until)
    skipped, turn = [], 0
    for step in range(1, until + 1):
        while seen.steps[step] != expected[turn]:
            skipped.append(turn)
            turn += 1
            assert turn < len(expected), f"step {step} is made of {seen.steps[step]}, which is no step of the run"
        turn += 1
    return skipped
