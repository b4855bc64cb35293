"""Faults for demonstrations and tests: each named by (kind, rank, step), each happening once in the life of a job.

A fault leaves a file behind before it strikes, so that a restarted process knows it has happened, and so that a test
can assert that it did.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

KINDS = ("nan_loss", "inf_weight", "sigkill", "raise")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault: `kind` strikes `rank` while it works on step `step` (1 is the first)."""

    kind: str
    rank: int
    step: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown fault {self.kind!r}; known: {', '.join(KINDS)}")


def parse(text: str) -> list[Fault]:
    """``"nan_loss:1:40,sigkill:0:90"`` as faults.

    Raises:
        ValueError: the text is malformed; says which part.
    """
    faults = []
    for part in filter(None, text.split(",")):
        try:
            kind, rank, step = part.split(":")
            faults.append(Fault(kind=kind, rank=int(rank), step=int(step)))
        except ValueError as error:
            raise ValueError(f"fault {part!r} is not KIND:RANK:STEP ({error})") from None
    return faults


class FaultScript:
    """Injects this rank's faults when their step comes.

    Args:
        faults: of all ranks.
        rank: this rank.
        directory: where the files go that say what has struck.
    """

    def __init__(self, faults: list[Fault], rank: int, directory: Path) -> None:
        self._faults = [fault for fault in faults if fault.rank == rank]
        self._directory = directory
        if self._faults:
            directory.mkdir(parents=True, exist_ok=True)

    def on_loss(self, loss: torch.Tensor, step: int) -> torch.Tensor:
        """After the forward pass of `step`: may return a NaN, or not return at all."""
        for fault in self._due(step, "nan_loss", "sigkill", "raise"):
            self._announce(fault)
            if fault.kind == "sigkill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault.kind == "raise":
                raise RuntimeError(f"injected error at step {step}")
            loss = loss * float("nan")
        return loss

    def between_steps(self, model: nn.Module, step: int) -> None:
        """After step `step - 1`, before step `step`: may hurt the weights."""
        for fault in self._due(step, "inf_weight"):
            self._announce(fault)
            with torch.no_grad():
                weight = max(model.parameters(), key=lambda parameter: parameter.numel())
                local = weight.to_local() if isinstance(weight, DTensor) else weight
                local.view(-1)[local.numel() // 2] = float("inf")

    def _due(self, step: int, *kinds: str) -> list[Fault]:
        return [f for f in self._faults if f.step == step and f.kind in kinds and not self._file(f).exists()]

    def _file(self, fault: Fault) -> Path:
        return self._directory / f"{fault.kind}-rank{fault.rank}-step{fault.step}.json"

    def _announce(self, fault: Fault) -> None:
        self._file(fault).write_text(json.dumps({**dataclasses.asdict(fault), "time": time.time()}))
        print(f"[fault] {fault.kind} strikes rank {fault.rank} at step {fault.step}", file=sys.stderr, flush=True)
