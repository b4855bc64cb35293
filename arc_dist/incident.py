"""What the ranks found out about a fault, as one record and one line."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from arc_dist.protocol.decision import Decision
from arc_dist.protocol.replicas import odd_ones
from arc_dist.snapshot.state import TrainingState


@dataclasses.dataclass(slots=True)
class Attempt:
    """What this rank knows about the step being attempted, for the incident if there is one."""

    ordinals: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()
    norm: float | None = None
    optimizer: int = 0
    flags: int = 0
    voids_gradient: bool = False  # the gradient was made NaN on purpose, to carry the flags
    memory: dict[str, Any] | None = None  # how this rank ran out of memory, until all ranks have heard of it


def incident(
    details: Sequence[Mapping[str, Any]], decision: Decision, failed_step: int, seconds: float
) -> dict[str, Any]:
    """The record of a numeric fault, or of a rank that ran out of memory.

    Args:
        details: what each rank said in the slow path, in rank order.
        decision: what all ranks did.
        failed_step: the step whose update was not applied.
        seconds: what acting took.
    """
    odd = odd_ones([theirs["weights"] for theirs in details])
    blamed = [theirs for theirs in details if theirs["flags"] or theirs["corrupt"] or theirs["rank"] in odd] or details
    causes = sorted({flag for theirs in details for flag in theirs["flags"]}) or [decision.reason.split(":")[0]]
    tensors = sorted({finding["name"] for theirs in blamed for finding in theirs["tensors"]})
    restored = decision.restore_step
    return {
        "kind": "out_of_memory" if any(theirs["memory"] for theirs in details) else "numeric",
        "step": failed_step,
        "cause": ", ".join(causes) + (f" in {', '.join(tensors)}" if tensors else ""),
        "ranks": [theirs["rank"] for theirs in blamed],
        "seen_by": "vote" if any(theirs["flags"] for theirs in details) else "gradient norm, on every rank",
        "seen_after": "same step",
        "action": decision.action,
        "restored_step": restored,
        "steps_lost": 0 if restored is None else failed_step - 1 - restored,
        "resumed_after_s": seconds,
        "reason": decision.reason,
        "details": list(details),
    }


def one_line(fields: Mapping[str, Any]) -> str:
    """The record for the log."""
    ranks = ",".join(str(rank) for rank in fields["ranks"])
    return (
        f"step {fields['step']}: {fields['cause']} on rank {ranks} -> {fields['action'].upper()} ({fields['reason']})"
    )


def weights_digest(state: TrainingState) -> str:
    """A digest of this rank's weights, to tell replicas that differ."""
    digest = hashlib.sha256()
    specs, tensors = state.tensors()
    for spec, tensor in zip(specs, tensors, strict=True):
        if not spec.name.startswith("optimizer.") and state.is_judged(spec.name) and tensor.numel():
            word = int(torch.hash_tensor(tensor).view(torch.int64).item())
            digest.update(word.to_bytes(8, "little", signed=True))
    return digest.hexdigest()
