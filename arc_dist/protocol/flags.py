"""Flags, ballots and the vote.

A rank's health in one step is a set of flags, one bit each: its **ballot**. The **vote** is the bitwise OR of all
ballots. OR is commutative, associative and idempotent, so neither order nor repetition of messages matters, and it has
an identity (0, "nothing to say"), so a healthy step carries no information and costs one word.

Two kinds of bits share the word. **Fault** bits say that something is wrong and lead to a verdict. **Request** bits
ask all ranks for something at the end of this step (a checkpoint, an orderly end); they say nothing about health.
"""

from __future__ import annotations

import enum


class Flag(enum.IntFlag):
    """One bit of a ballot. Values are part of the wire format between ranks: append, never renumber."""

    # Faults seen before the update is applied: dropping the update keeps the state clean.
    LOSS_NONFINITE = 1 << 0
    LOSS_EXPLOSION = 1 << 1
    GRAD_NONFINITE = 1 << 2
    GRAD_EXPLOSION = 1 << 3
    GRAD_VANISHING = 1 << 4
    MONITOR_UPDATE = 1 << 7  # a monitor whose policy is to skip
    OUT_OF_MEMORY = 1 << 25  # answered by `protocol.oom`
    # Faults of the state itself: only an older state helps.
    WEIGHT_NONFINITE = 1 << 8
    WEIGHT_NORM = 1 << 9
    OPTIMIZER_NONFINITE = 1 << 10
    OPTIMIZER_NORM = 1 << 11
    OPTIMIZER_RESET = 1 << 12
    LEARNING_RATE = 1 << 13
    REDUCED_LOSS_EXPLOSION = 1 << 14
    MONITOR_STATE = 1 << 20  # a monitor whose policy is to roll back
    STRAY_WRITE = 1 << 21
    REPLICAS_DIFFER = 1 << 22
    OPTIMIZER_INVALID = 1 << 23
    HYPERPARAMETER = 1 << 24
    # Requests.
    PREEMPT = 1 << 33
    CHECKPOINT_BUSY = 1 << 35  # a checkpoint is still being written: none may be begun
    ALERT = 1 << 40  # a rank has something to tell that nobody acts on


NO_FLAGS = Flag(0)
UPDATE_FAULTS = (
    Flag.LOSS_NONFINITE
    | Flag.LOSS_EXPLOSION
    | Flag.GRAD_NONFINITE
    | Flag.GRAD_EXPLOSION
    | Flag.GRAD_VANISHING
    | Flag.MONITOR_UPDATE
    | Flag.OUT_OF_MEMORY
)
STATE_FAULTS = (
    Flag.WEIGHT_NONFINITE
    | Flag.WEIGHT_NORM
    | Flag.OPTIMIZER_NONFINITE
    | Flag.OPTIMIZER_NORM
    | Flag.OPTIMIZER_RESET
    | Flag.LEARNING_RATE
    | Flag.REDUCED_LOSS_EXPLOSION
    | Flag.MONITOR_STATE
    | Flag.STRAY_WRITE
    | Flag.REPLICAS_DIFFER
    | Flag.OPTIMIZER_INVALID
    | Flag.HYPERPARAMETER
)
FAULTS = UPDATE_FAULTS | STATE_FAULTS
REQUESTS = Flag.PREEMPT | Flag.CHECKPOINT_BUSY | Flag.ALERT


def merge(a: Flag, b: Flag) -> Flag:
    """The vote's law: commutative, associative, idempotent, with identity `NO_FLAGS`."""
    return a | b


def names(flags: Flag) -> list[str]:
    """Lower-case names of the flags that are up, in bit order: ``["loss_nonfinite"]``."""
    return [flag.name.lower() for flag in Flag if flag & flags and flag.name]
