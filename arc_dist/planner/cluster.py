"""From what is known of a cluster and a job to the plans of arc-dist and of plain torchrun."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from arc_dist.errors import ConfigError
from arc_dist.planner.faults import FaultRate
from arc_dist.planner.model import Copy, Fault, Plan
from arc_dist.planner.units import format_size, format_time, parse_rate

REPLICA = "replica"
MEMORY = "memory"
_LOCAL_NAMES = ("local", "nvme", "ssd", "disk")
_MEMORY_SHARE = 0.9  # of a node's memory that snapshots may take; the rest is the training process's
_SNAPSHOTS_KEPT = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class TierSpeed:
    """A place of checkpoints and how fast it is.

    Attributes:
        name: as given.
        is_local: a disk of each node, lost with it; else shared by all.
        bytes_per_s: of all nodes together; for a local disk, of one node.
        node_bytes_per_s: what one node gets of a shared place, at most.
    """

    name: str
    is_local: bool
    bytes_per_s: float
    node_bytes_per_s: float = math.inf

    def transfer_s(self, state_bytes: float, num_nodes: int) -> float:
        """Time to write, or read, the whole state by all nodes together."""
        if self.is_local:
            return state_bytes / num_nodes / self.bytes_per_s
        return state_bytes / min(self.bytes_per_s, num_nodes * self.node_bytes_per_s)


def parse_tier_speeds(text: str) -> tuple[TierSpeed, ...]:
    """Reads ``local=2GB/s,nfs=40GB/s,s3=200GB/s@1GB/s``: fastest first, a limit per node after an ``@``.

    Raises:
        ConfigError: what is wrong, with an example.
    """
    tiers: list[TierSpeed] = []
    for part in text.split(","):
        name, equals, speeds = (piece.strip() for piece in part.partition("="))
        rate, at, node_rate = speeds.partition("@")
        if not equals or not name or name in (REPLICA, MEMORY) or name in (tier.name for tier in tiers):
            raise ConfigError(
                f"--tiers {text!r}: {part.strip()!r} is not a new NAME=RATE. Example: local=2GB/s,s3=100GB/s@1GB/s"
            )
        is_local = name.startswith(_LOCAL_NAMES)
        if is_local and at:
            raise ConfigError(f"--tiers {text!r}: the rate of {name}, a disk of each node, is per node already.")
        tier = TierSpeed(
            name=name,
            is_local=is_local,
            bytes_per_s=parse_rate(rate),
            node_bytes_per_s=parse_rate(node_rate) if at else math.inf,
        )
        if tier.bytes_per_s <= 0 or tier.node_bytes_per_s <= 0:
            raise ConfigError(f"--tiers {text!r}: the rates of {name} must be above 0.")
        tiers.append(tier)
    if all(tier.is_local for tier in tiers):
        raise ConfigError(
            f"--tiers {text!r}: no place outlives a node. Name a shared one too, such as nfs=20GB/s or s3=1TB/s@1GB/s."
        )
    if tiers[-1].is_local:
        raise ConfigError(f"--tiers {text!r}: name the shared places last; a restore asks the places in this order.")
    return tuple(tiers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster and a job on it; `options.OPTIONS` says for each field what it means and where its default is from."""

    nodes: int
    state_bytes: float
    tiers: tuple[TierSpeed, ...]
    gpus: int
    step_s: float
    replicas: int
    peer_copies: int
    memory_bytes: float
    copy_bytes_per_s: float
    snapshot_stall_s: float | None
    drag: float
    mtbf_node_s: float
    mtbf_process_s: float
    mtbf_numeric_s: float
    mtbf_preempt_s: float
    shape: float
    reboot_share: float
    detect_node_s: float
    detect_process_s: float
    notice_numeric_s: float
    init_s: float
    start_s: float
    relaunch_s: float
    reboot_s: float
    away_s: float
    grace_s: float
    spares: int | None
    repair_s: float

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus", "replicas"):
            _require(name, getattr(self, name) >= 1, "must be 1 or more")
        for name in ("state_bytes", "step_s", "memory_bytes", "copy_bytes_per_s", "shape"):
            _require(name, 0 < getattr(self, name) < math.inf, "must be above 0")
        for name in ("mtbf_node_s", "mtbf_process_s", "mtbf_numeric_s", "mtbf_preempt_s"):
            _require(name, getattr(self, name) > 0, "must be above 0, or never")
        for name in _DURATIONS:
            _require(name, 0 <= (getattr(self, name) or 0) < math.inf, "must be a time, 0 or more")
        _require("drag", 0 <= self.drag < 1, "must be 0 or more, and below 1")
        _require("reboot_share", 0 <= self.reboot_share <= 1, "must be between 0 and 1")
        _require("spares", self.spares is None or self.spares >= 0, "must be 0 or more")
        _require(
            "peer_copies", 0 <= self.peer_copies < self.nodes, f"must be 0 to {self.nodes - 1}, one per other node"
        )
        _require("replicas", self.replicas <= self.ranks, f"must be at most the {self.ranks} ranks")
        need = self.snapshot_bytes * _SNAPSHOTS_KEPT * (1 + self.peer_copies)
        if need > _MEMORY_SHARE * self.memory_bytes:
            raise ConfigError(
                f"--state {format_size(self.state_bytes)}: {_SNAPSHOTS_KEPT} snapshots take {format_size(need)} of each"
                f" node's memory, which has {format_size(self.memory_bytes)}. Give more --nodes or --memory, or fewer"
                " --replicas."
            )

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus

    @property
    def snapshot_bytes(self) -> float:
        """Of one snapshot on one node."""
        return self.state_bytes * self.replicas / self.nodes

    @property
    def stall_s(self) -> float:
        """How long a snapshot stops training."""
        if self.snapshot_stall_s is not None:
            return self.snapshot_stall_s
        return self.snapshot_bytes / self.gpus / self.copy_bytes_per_s

    def rates(self) -> tuple[FaultRate, ...]:
        """How often what fails, each kind by the thing that has it."""
        lost, cured = 1.0 - self.reboot_share, self.reboot_share
        return (
            FaultRate(name="process", num_units=self.ranks, mtbf_s=self.mtbf_process_s),
            FaultRate(name="node", num_units=self.nodes, mtbf_s=_thinned(self.mtbf_node_s, lost), shape=self.shape),
            FaultRate(name="reboot", num_units=self.nodes, mtbf_s=_thinned(self.mtbf_node_s, cured), shape=self.shape),
            FaultRate(name="numeric", num_units=self.ranks, mtbf_s=self.mtbf_numeric_s),
            FaultRate(name="preemption", num_units=1, mtbf_s=self.mtbf_preempt_s),
        )

    def write_s(self, tier: TierSpeed) -> float:
        """Time to write one checkpoint to a tier."""
        return tier.transfer_s(self.state_bytes, self.nodes)


_DURATIONS = (
    "detect_node_s",
    "detect_process_s",
    "notice_numeric_s",
    "init_s",
    "start_s",
    "relaunch_s",
    "reboot_s",
    "away_s",
    "grace_s",
    "repair_s",
    "snapshot_stall_s",
)


def arc_plan(cluster: Cluster, interval_s: Mapping[str, float]) -> Plan:
    """arc-dist: snapshots in memory, checkpoints written from them while training goes on.

    Args:
        cluster: where it runs.
        interval_s: of "memory" and of each tier, in seconds of work; the longest where one is missing.
    """
    memory = Copy(
        name=MEMORY,
        interval_s=interval_s.get(MEMORY, _LONGEST_S),
        stall_s=cluster.stall_s,
        write_s=_CERTIFY_STEPS * cluster.step_s,
        restore_s=cluster.stall_s,
        at_multiples=False,
    )
    replica = Copy(
        name=REPLICA,
        interval_s=cluster.step_s,
        stall_s=0.0,
        write_s=0.0,
        restore_s=cluster.stall_s,
        at_multiples=False,
        is_fixed=True,
    )
    tiers = tuple(
        Copy(
            name=tier.name,
            interval_s=interval_s.get(tier.name, _LONGEST_S),
            stall_s=cluster.stall_s + cluster.drag * cluster.write_s(tier),
            write_s=_CERTIFY_STEPS * cluster.step_s + cluster.write_s(tier),  # only what is trusted is written
            restore_s=cluster.write_s(tier),
        )
        for tier in cluster.tiers
    )
    shared = frozenset(tier.name for tier in cluster.tiers if not tier.is_local)
    disks = shared | {tier.name for tier in cluster.tiers if tier.is_local}
    peers = frozenset({MEMORY}) if cluster.peer_copies else frozenset[str]()
    last_s = cluster.stall_s + cluster.write_s(cluster.tiers[-1])
    return _reachable(
        Plan(
            name="arc-dist",
            copies=((replica, memory, *tiers) if cluster.replicas > 1 else (memory, *tiers)),
            faults=(
                Fault(
                    name="process",
                    survivors=disks | {MEMORY, REPLICA},
                    detect_s=cluster.detect_process_s,
                    restart_s=cluster.init_s,
                ),
                *_hardware(cluster, lost=shared | peers, rebooted=disks | peers),
                Fault(
                    name="numeric", survivors=disks | {MEMORY}, detect_s=_CERTIFY_STEPS * cluster.step_s, restart_s=0.0
                ),
                _preemption(cluster, shared, last_s if last_s <= cluster.grace_s else None),
            ),
            spares=cluster.spares,
            repair_s=cluster.repair_s,
        ),
        cluster,
    )


def torchrun_plan(cluster: Cluster, interval_s: float, *, is_async: bool = False) -> Plan:
    """Plain torchrun with its own restart, and checkpoints in the last tier only.

    Args:
        cluster: where it runs.
        interval_s: work between two checkpoints, in seconds.
        is_async: checkpoints are written while training goes on, after a copy in memory; else training waits for them.
    """
    tier = cluster.tiers[-1]
    write_s = cluster.write_s(tier)
    remote = Copy(
        name=tier.name,
        interval_s=interval_s,
        stall_s=cluster.stall_s + cluster.drag * write_s if is_async else write_s,
        write_s=write_s if is_async else 0.0,
        restore_s=write_s,
    )
    kept = frozenset({tier.name})
    restart_s = cluster.start_s + cluster.init_s
    return Plan(
        name="torchrun",
        copies=(remote,),
        faults=(
            Fault(name="process", survivors=kept, detect_s=cluster.detect_process_s, restart_s=restart_s),
            *_hardware(cluster, lost=kept, rebooted=kept),
            Fault(name="numeric", survivors=kept, detect_s=cluster.notice_numeric_s, restart_s=restart_s),
            _preemption(cluster, kept, None),
        ),
        spares=cluster.spares,
        repair_s=cluster.repair_s,
    )


_FLAGS = {"copy_bytes_per_s": "copy-rate", "shape": "weibull"}  # the others are the field's name
_LONGEST_S = 1e9
_CERTIFY_STEPS = 2


def _hardware(cluster: Cluster, *, lost: frozenset[str], rebooted: frozenset[str]) -> tuple[Fault, Fault]:
    restart_s = cluster.relaunch_s + cluster.init_s
    node = Fault(
        name="node",
        survivors=lost,
        detect_s=cluster.detect_node_s,
        restart_s=restart_s,
        while_idle=True,
        takes_node=True,
    )
    reboot = Fault(
        name="reboot",
        survivors=rebooted,
        detect_s=cluster.detect_node_s,
        restart_s=cluster.reboot_s + restart_s,
        while_idle=True,
    )
    return node, reboot


def _preemption(cluster: Cluster, survivors: frozenset[str], save_s: float | None) -> Fault:
    restart_s = cluster.away_s + cluster.relaunch_s + cluster.init_s
    return Fault(name="preemption", survivors=survivors, detect_s=0.0, restart_s=restart_s, save_s=save_s)


def _reachable(plan: Plan, cluster: Cluster) -> Plan:
    """Without the copies that no fault would ever be recovered from, because a faster place outlives it too."""
    striking = {rate.name for rate in cluster.rates() if math.isfinite(rate.mtbf_s)}
    needed = {source.name for fault in plan.faults if fault.name in striking and (source := plan.source(fault))}
    needed |= {plan.copies[-1].name}
    return dataclasses.replace(plan, copies=tuple(copy for copy in plan.copies if copy.name in needed))


def _thinned(mtbf_s: float, share: float) -> float:
    return mtbf_s / share if share > 0 else math.inf


def check_interval(name: str, interval_s: float, write_s: float) -> None:
    """Refuses an interval in which one copy cannot be finished before the next is due.

    Raises:
        ConfigError: with both times.
    """
    if not 0 < interval_s < math.inf:
        raise ConfigError(f"the interval of {name} must be above 0, and a time.")
    if interval_s < write_s:
        raise ConfigError(
            f"{name} every {format_time(interval_s)}: making one takes {format_time(write_s)}. Give a longer interval"
            " or a faster place."
        )


def _require(name: str, holds: bool, rule: str) -> None:
    if not holds:
        option = _FLAGS.get(name) or name.removesuffix("_s").removesuffix("_bytes").replace("_", "-")
        raise ConfigError(f"--{option} {rule}.")
