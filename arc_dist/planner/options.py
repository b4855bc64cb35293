"""The options of `arc simulate`: names, defaults, and where each default comes from."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from arc_dist.errors import ConfigError
from arc_dist.planner.cluster import Cluster, TierSpeed, parse_tier_speeds
from arc_dist.planner.units import parse_rate, parse_size, parse_time

LLAMA3 = "Llama 3, arXiv 2407.21783, table 5"
RSC = "arXiv 2410.21680"
MEGASCALE = "MegaScale, arXiv 2402.15627"


@dataclasses.dataclass(frozen=True)
class Option:
    """One option that fills one field of `Cluster`.

    Attributes:
        flag: as typed.
        field: of `Cluster`.
        parse: from text; raises ConfigError or ValueError.
        default: as text, None where it must be given or where nothing means something.
        help: what it is; the default and its source are added.
        source: where the default comes from.
        group: heading in the help.
    """

    flag: str
    field: str
    parse: Callable[[str], Any]
    default: str | None
    help: str
    source: str | None
    group: str


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{text!r} is not a whole number.") from None


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{text!r} is not a number.") from None


_JOB, _FAULTS, _TIMES, _PLACES = "the job", "how often what fails", "what a fault costs", "where state is kept"
OPTIONS: tuple[Option, ...] = (
    Option("--nodes", "nodes", _whole, None, "nodes that train", None, _JOB),
    Option("--gpus", "gpus", _whole, "8", "GPUs, and ranks, per node", "DGX and HGX boards", _JOB),
    Option(
        "--state", "state_bytes", parse_size, None, "all distinct training state: parameters and optimizer", None, _JOB
    ),
    Option(
        "--replicas",
        "replicas",
        _whole,
        "1",
        "copies of the state that train: 1 for FSDP, the number of replicas"
        " for HSDP, all ranks for DDP. With 2 or more a dead process loses no step",
        "FSDP",
        _JOB,
    ),
    Option(
        "--step",
        "step_s",
        parse_time,
        "10s",
        "time of a step",
        "assumed; only the last steps before a fault depend on it",
        _JOB,
    ),
    Option(
        "--mtbf-node",
        "mtbf_node_s",
        parse_time,
        "316d",
        "mean time until one node fails",
        f"{LLAMA3}: 350 of 419 interruptions in 54 days on 2,048 nodes were of hardware or its maintenance",
        _FAULTS,
    ),
    Option(
        "--mtbf-process",
        "mtbf_process_s",
        parse_time,
        "38y",
        "mean time until one rank's process dies without its node",
        f"{LLAMA3}: 63 of 419 were of software, on 16,384 GPUs",
        _FAULTS,
    ),
    Option(
        "--mtbf-numeric",
        "mtbf_numeric_s",
        parse_time,
        "404y",
        "mean time until one GPU corrupts numbers silently",
        f"{LLAMA3}: 6 of 419",
        _FAULTS,
    ),
    Option(
        "--mtbf-preempt",
        "mtbf_preempt_s",
        parse_time,
        "never",
        "mean time until the whole job is told to go",
        "a cluster of one's own",
        _FAULTS,
    ),
    Option(
        "--weibull",
        "shape",
        _share,
        "1",
        "shape of the time until a node fails: 1 is exponential, below 1 failures come early",
        "faults without memory",
        _FAULTS,
    ),
    Option(
        "--reboot-share",
        "reboot_share",
        _share,
        "0",
        "share of node failures that a reboot cures: its disks stay",
        "each counts as lost, the worse case",
        _FAULTS,
    ),
    Option(
        "--detect-node",
        "detect_node_s",
        parse_time,
        "10min",
        "until a lost node is noticed",
        f"the time-out of torch's NCCL groups; {MEGASCALE}: less than 10 minutes on average",
        _TIMES,
    ),
    Option(
        "--detect-process",
        "detect_process_s",
        parse_time,
        "1s",
        "until a dead process is noticed",
        "arc-dist and torchrun wait on the process: milliseconds",
        _TIMES,
    ),
    Option(
        "--notice-numeric",
        "notice_numeric_s",
        parse_time,
        "30min",
        "until someone notices corrupt numbers under plain torchrun; arc-dist does at the next steps",
        "assumed",
        _TIMES,
    ),
    Option(
        "--init",
        "init_s",
        parse_time,
        "30s",
        "until new processes have their communicators and train",
        f"{MEGASCALE}: under 30 s on more than 10,000 GPUs",
        _TIMES,
    ),
    Option(
        "--start",
        "start_s",
        parse_time,
        "1min",
        "until plain torchrun's new processes have imported and built the model",
        "assumed; 3 s on 2 ranks by benchmarks/bench_restart.py, more where imports come over a network",
        _TIMES,
    ),
    Option(
        "--relaunch",
        "relaunch_s",
        parse_time,
        "5min",
        "until the launcher has started the job again on other nodes",
        f"{RSC}, restart overhead",
        _TIMES,
    ),
    Option("--reboot", "reboot_s", parse_time, "10min", "a reboot", "assumed", _TIMES),
    Option("--away", "away_s", parse_time, "10min", "until a preempted job gets nodes again", "assumed", _TIMES),
    Option("--grace", "grace_s", parse_time, "2min", "warning before a preemption", "EC2 spot instances", _TIMES),
    Option(
        "--spares",
        "spares",
        _whole,
        None,
        "nodes that wait to take another's place; without it there is always one",
        None,
        _TIMES,
    ),
    Option(
        "--repair", "repair_s", parse_time, "1d", "until a node that was replaced is a spare one", "assumed", _TIMES
    ),
    Option(
        "--tiers",
        "tiers",
        parse_tier_speeds,
        "s3=100GB/s@1GB/s",
        "where checkpoints go, fastest first: NAME=RATE, a"
        " node's limit after @. Names that begin with local, nvme, ssd or disk are disks of each node",
        "assumed",
        _PLACES,
    ),
    Option("--memory", "memory_bytes", parse_size, "2TB", "of a node", "DGX H100", _PLACES),
    Option(
        "--copy-rate",
        "copy_bytes_per_s",
        parse_rate,
        "5GB/s",
        "of one GPU's state into memory",
        "a fraction of PCIe 4; measured on CPU: benchmarks/bench_snapshot.py",
        _PLACES,
    ),
    Option(
        "--snapshot-stall",
        "snapshot_stall_s",
        parse_time,
        None,
        "how long a snapshot stops training, if measured; else state and --copy-rate tell",
        None,
        _PLACES,
    ),
    Option(
        "--drag",
        "drag",
        _share,
        "0.02",
        "share by which training is slower while a checkpoint is written beside it",
        "assumed; Llama 3's authors report that writes saturated the network",
        _PLACES,
    ),
    Option(
        "--peer-copies",
        "peer_copies",
        _whole,
        "0",
        "other nodes that hold a copy of each node's snapshots",
        "arc-dist restores what a lost node held from the store",
        _PLACES,
    ),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds all options, with their defaults and sources in the help."""
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(option.group for option in OPTIONS)}
    for option in OPTIONS:
        text = option.help
        if option.default is not None:
            text += f" [{option.default}; {option.source}]"
        is_required = option.default is None and option.flag in ("--nodes", "--state")
        groups[option.group].add_argument(
            option.flag,
            dest=option.field,
            metavar="X",
            required=is_required,
            default=option.default,
            help=text.replace("%", "%%"),
        )
    intervals = parser.add_argument_group("intervals, in time of training; the best ones where not given")
    intervals.add_argument("--snapshot", metavar="TIME", help="between snapshots in memory")
    intervals.add_argument(
        "--persist", metavar="TIME", help="between checkpoints: 30m for all tiers, or nvme=10m,s3=1h"
    )
    intervals.add_argument("--torchrun-persist", metavar="TIME", help="between checkpoints under plain torchrun")
    intervals.add_argument(
        "--torchrun-async", action="store_true", help="plain torchrun's checkpoints are written while training goes on"
    )
    run = parser.add_argument_group("the simulation")
    run.add_argument("--time", metavar="TIME", default="90d", help="wall time of the job [90d]")
    run.add_argument("--lives", metavar="N", default="16", help="how many lives of the job are played [16]")
    run.add_argument("--seed", default="0", help="of the faults [0]")
    run.add_argument("--plot", metavar="FILE.svg", help="write a picture, too")
    run.add_argument("--json", action="store_true", help="print JSON")


def read_cluster(arguments: argparse.Namespace) -> Cluster:
    """The cluster that the options describe.

    Raises:
        ConfigError: naming the option.
    """
    values: dict[str, Any] = {}
    for option in OPTIONS:
        text = getattr(arguments, option.field)
        values[option.field] = None if text is None else read(option.flag, option.parse, text)
    return Cluster(**values)


def read(flag: str, parse: Callable[[str], Any], text: str) -> Any:
    """Parses one option's text; a refusal names the option."""
    try:
        return parse(text)
    except ConfigError as error:
        raise ConfigError(error.message if error.message.startswith("--") else f"{flag}: {error.message}") from None


def read_persist(text: str | None, tiers: tuple[TierSpeed, ...]) -> dict[str, float]:
    """``"30m"`` -> each tier's interval; ``"nvme=10m,s3=1h"`` -> those of the tiers named. Seconds."""
    if text is None:
        return {}
    if "=" not in text:
        interval_s = parse_time(text)
        return {tier.name: interval_s for tier in tiers}
    intervals: dict[str, float] = {}
    for part in text.split(","):
        name, _, time = (piece.strip() for piece in part.partition("="))
        if name in intervals:
            raise ConfigError(f"{name} appears twice.")
        intervals[name] = parse_time(time)
    return intervals
