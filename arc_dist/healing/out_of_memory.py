"""Recognising that a rank ran out of memory, freeing what the failed step held, and what all ranks do about it."""

from __future__ import annotations

import functools
import gc
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from arc_dist.protocol.decision import Decision, Rung, Verdict
from arc_dist.protocol.healing import History
from arc_dist.protocol.ladder import Evidence
from arc_dist.protocol.oom import Division, Failure, Remedy, Where, failed

# How torch's allocators say it where they have no exception class for it.
_TEXTS = (
    "defaultcpuallocator: can't allocate memory",
    "defaultcpuallocator: not enough memory",
    "cuda out of memory",
    "cuda error: out of memory",
    "cublas_status_alloc_failed",
    "std::bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error, or the one that it was raised from, says that an allocation failed."""
    link: BaseException | None = error
    for _ in range(8):
        if link is None:
            return False
        if isinstance(link, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(link, RuntimeError) and any(text in str(link).lower() for text in _TEXTS):
            return True
        link = link.__cause__
    return False


def one_line(error: BaseException) -> str:
    """The first line of what the error says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def free(error: BaseException, *, thoroughly: bool) -> None:
    """Lets go of what the failed step held: activations hang on the frames of the traceback.

    Args:
        error: its traceback is gone afterwards.
        thoroughly: collect garbage too, which takes tens of milliseconds.
    """
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        traceback.clear_frames(link.__traceback__)
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    if thoroughly:
        gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def decide(
    division: Division, details: Sequence[Mapping[str, Any]], evidence: Evidence, history: History
) -> tuple[Division, Decision] | None:
    """What all ranks do when some of them ran out of memory; None when that is not what is wrong.

    Args:
        division: present.
        details: what each rank told, in rank order; ``memory`` is what it told of running out of memory, or None.
        evidence: about the step. A damaged state goes first, unless a half-done update explains it.
        history: of the ladder; the cuts in it stay.
    """
    failures = [Failure.from_dict(theirs["rank"], theirs["memory"]) for theirs in details if theirs["memory"]]
    explains = any(failure.where is Where.OPTIMIZER for failure in failures)
    if not failures or (evidence.state_corrupt and not explains):
        return None
    after, remedy, reason = failed(division, failures)
    answer = functools.partial(Decision, lr_scale=history.lr_scale, clip_scale=history.clip_scale)
    if remedy is Remedy.RETRY:
        return after, answer(verdict=Verdict.SKIP, rung=Rung.RETRY, reason=reason)
    if remedy is Remedy.ROLLBACK and evidence.certified:
        restore = evidence.certified[0]
        reason = f"{reason} of step {restore}"
        return after, answer(verdict=Verdict.FAILURE, rung=Rung.ROLLBACK, reason=reason, restore_step=restore)
    if remedy is Remedy.ROLLBACK:
        reason = f"{reason}, but no certified snapshot is held by every rank"
    return after, answer(verdict=Verdict.FAILURE, rung=Rung.STOP, reason=reason)
