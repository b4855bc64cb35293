"""How an `Arc` behaves: one frozen set of settings, the same on every rank."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any

from arc_dist.errors import ConfigError
from arc_dist.healing.rungs import require_known
from arc_dist.monitors.base import build, chosen
from arc_dist.protocol.flags import FAULTS, NO_FLAGS, Flag
from arc_dist.protocol.hangs import HangPolicy
from arc_dist.protocol.ladder import HealingPolicy
from arc_dist.snapshot.form import Form


class OnWorldChange(enum.Enum):
    """What to do about a checkpoint that another number of ranks wrote."""

    EXACT = "exact"
    ERROR = "error"


class OnOutOfMemory(enum.Enum):
    """What to do about a rank that runs out of memory in a step of `Arc.train`."""

    RETRY = "retry"
    RESTART = "restart"
    RAISE = "raise"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Keyword arguments of `Arc`, validated.

    Attributes:
        max_grad_norm: clip the global gradient L2 norm to this before each update; None does not clip.
        accumulate: micro-batches per update.
        scheduler_every: when `Arc.train` steps the schedulers: after each "step" or each "epoch".
        snapshot_every: updates between two snapshots in memory; None measures and keeps their cost under
            `snapshot_cost` of the step time.
        snapshot_cost: share of the step time that snapshots may take when `snapshot_every` is None.
        snapshots: snapshots kept in memory, at least 2 (one certified, one being certified).
        snapshot_form: how they are held. "full": every tensor in each. "incremental": what does not change is held
            once, exact. "disk": in files in $TMPDIR, exact. "auto": "full" or, where that does not fit into memory,
            "disk". "bf16": float32 and float64 parameters are rounded to bfloat16, so that a rollback, and a
            checkpoint, has weights with a relative error of up to 2**-8; all else is exact.
        certify_after: healthy verdicts after which a snapshot is trusted.
        checkpoint_every: updates between two checkpoints in the store; None writes one at the end and when preempted.
        max_bytes_per_s: bound on the rate at which a rank writes checkpoints in the background; None for none.
        save_timeout_s: how long a rank's part of a checkpoint may take to be written to one tier, in seconds.
        dedup: refer to tensors that did not change since the newest checkpoint instead of writing them again (see
            `checkpoint_store.Store`).
        policy: the healing ladder and its budgets (docs/healing.md).
        ignore: names of flags that are never raised, such as ("grad_vanishing",).
        loss_explosion_sigmas, grad_explosion_factor: thresholds of the monitors.
        reduce_loss_every: updates between two judgements of the loss averaged over ranks.
        monitors: "lite", "standard" or "full", or several of these and of the names in docs/monitors.md; "-name" takes
            one away. What non-finite values, explosions, resets and rates need is always on.
        monitor_options: by monitor, its options, and `policy`: "alert", "skip" or "rollback".
        monitor_budget: share of the time that these monitors may take; they look less often to keep it.
        compare_replicas_every: updates between two comparisons of DDP replicas by the monitor "replicas".
        stray_writes: what the monitor of that name does: "rollback" or "alert".
        out_of_memory: what `train` does when a rank runs out of memory: "retry" the step in smaller micro-batches,
            "restart" all processes and go on with smaller ones, or "raise".
        widen_after: healthy steps after which batches that were divided are divided half as often again.
        vote_timeout_s: how long a rank waits for the vote of the others, in seconds.
        hang_factor, hang_min_s: a rank may be in a section of the step for this many times the longest stay so far, and
            always for that many seconds; a factor of 0 learns nothing.
        hang_deadline_s: this limit instead of a learned one, for every section; 0 watches nothing.
        hang_unseen_s: the limit of what is not learned: the start, the first steps, the loop's body, a section of the
            script's own that is entered first.
        straggler_factor: own work of a rank that is reported as slow / the median of all ranks'; 0 compares nothing.
        on_world_change: what to do when the newest checkpoint was written by another number of ranks. "exact": go on
            with the same samples in every step, or stop where that cannot be; "error": stop.
    """

    max_grad_norm: float | None = None
    accumulate: int = 1
    scheduler_every: str = "step"
    snapshot_every: int | None = None
    snapshot_cost: float = 0.005
    snapshots: int = 2
    snapshot_form: str = "full"
    certify_after: int = 2
    checkpoint_every: int | None = None
    max_bytes_per_s: float | None = None
    save_timeout_s: float = 600.0
    dedup: bool = False
    policy: HealingPolicy = dataclasses.field(default_factory=HealingPolicy)
    ignore: tuple[str, ...] = ()
    loss_explosion_sigmas: float = 20.0
    grad_explosion_factor: float = 50.0
    reduce_loss_every: int = 8
    monitors: str | tuple[str, ...] = "lite"
    monitor_options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    monitor_budget: float = 0.01
    compare_replicas_every: int = 64
    stray_writes: str = "rollback"
    out_of_memory: str = "retry"
    widen_after: int = 200
    vote_timeout_s: float = 300.0
    hang_factor: float = 10.0
    hang_min_s: float = 60.0
    hang_deadline_s: float | None = None
    hang_unseen_s: float = 1800.0
    straggler_factor: float = 1.5
    on_world_change: str = OnWorldChange.EXACT.value

    def __post_init__(self) -> None:
        for name in ("accumulate", "certify_after", "reduce_loss_every", "compare_replicas_every", "widen_after"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        for name in ("snapshot_every", "checkpoint_every"):
            value = getattr(self, name)
            _require(name, value, value is None or value >= 1, "1 or more, or None")
        _require("snapshots", self.snapshots, self.snapshots >= 2, "2 or more: one is trusted while one is proven")
        forms = [form.value for form in Form]
        _require("snapshot_form", self.snapshot_form, self.snapshot_form in forms, f"one of {', '.join(forms)}")
        _require("snapshot_cost", self.snapshot_cost, 0.0 < self.snapshot_cost <= 1.0, "in (0, 1]")
        _require(
            "max_grad_norm",
            self.max_grad_norm,
            self.max_grad_norm is None or self.max_grad_norm > 0,
            "above 0, or None",
        )
        _require("scheduler_every", self.scheduler_every, self.scheduler_every in ("step", "epoch"), "step or epoch")
        _require(
            "max_bytes_per_s",
            self.max_bytes_per_s,
            self.max_bytes_per_s is None or self.max_bytes_per_s > 0,
            "above 0, or None",
        )
        _require("save_timeout_s", self.save_timeout_s, self.save_timeout_s > 0, "above 0")
        _require("vote_timeout_s", self.vote_timeout_s, self.vote_timeout_s > 0, "above 0")
        for name in ("hang_factor", "straggler_factor"):
            value = getattr(self, name)
            _require(name, value, value == 0 or 1 < value < math.inf, "above 1, or 0 for none")
        for name in ("hang_min_s", "hang_unseen_s"):
            _require(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "above 0")
        value = self.hang_deadline_s
        _require("hang_deadline_s", value, value is None or 0 <= value < math.inf, "0 or more, or None")
        choices = [choice.value for choice in OnWorldChange]
        _require("on_world_change", self.on_world_change, self.on_world_change in choices, f"one of {choices}")
        _require("monitor_budget", self.monitor_budget, 0.0 < self.monitor_budget <= 1.0, "in (0, 1]")
        _require(
            "stray_writes", self.stray_writes, self.stray_writes in ("alert", "rollback"), "one of alert, rollback"
        )
        _require("policy", self.policy, isinstance(self.policy, HealingPolicy), "a HealingPolicy")
        require_known(self.policy.ladder)
        answers = [answer.value for answer in OnOutOfMemory]
        _require("out_of_memory", self.out_of_memory, self.out_of_memory in answers, f"one of {', '.join(answers)}")
        build(chosen(self.monitors), self.monitor_options)  # refuses unknown names and options
        known = {flag.name.lower() for flag in Flag if flag & FAULTS and flag.name}
        unknown = sorted(set(self.ignore) - known)
        _require("ignore", self.ignore, not unknown, f"flag names; unknown: {unknown}; known: {sorted(known)}")
        if self.snapshot_every is not None:
            longest = self.snapshot_every * (self.snapshots - 1)
            _require(
                "certify_after",
                self.certify_after,
                self.certify_after <= longest,
                f"at most snapshot_every x (snapshots - 1) = {longest}, or no snapshot would ever be trusted",
            )

    @property
    def hang_policy(self) -> HangPolicy:
        """How long a rank may be in a section."""
        return HangPolicy(
            factor=self.hang_factor,
            min_s=self.hang_min_s,
            deadline_s=self.hang_deadline_s,
            unseen_s=self.hang_unseen_s,
        )

    @property
    def heeded(self) -> Flag:
        """All flags that may be raised."""
        ignored = NO_FLAGS
        for name in self.ignore:
            ignored |= Flag[name.upper()]
        return ~ignored

    def comparable(self) -> dict[str, Any]:
        """What must be equal on all ranks, JSON-able."""
        return {**dataclasses.asdict(self), "policy_class": type(self.policy).__qualname__}


def _require(name: str, value: object, holds: bool, rule: str) -> None:
    if not holds:
        raise ConfigError(f"Arc({name}={value!r}): must be {rule}.", setting=name)
