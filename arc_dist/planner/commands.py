"""`arc simulate`: which goodput to expect, where time is lost, and which intervals are best."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from arc_dist.errors import ConfigError
from arc_dist.planner import options, report, svg
from arc_dist.planner.forecast import forecast
from arc_dist.planner.units import parse_time

_EPILOG = """\
example:
  arc simulate --nodes 2048 --gpus 8 --mtbf-node 5y --state 2TB --tiers nvme=2GB/s,s3=100GB/s@1GB/s --persist 30m

In brackets: the default, and where it comes from. Times are numbers with ms, s, m, h, d, w or y, or "never". What is
measured on the cluster at hand is better than any default. docs/simulate.md explains the model.
"""


def add_command(subparsers: Any) -> None:
    """Registers ``arc simulate``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "simulate",
        help="which goodput to expect of a job, and the best intervals",
        description="Plays a job's life many times against random faults: which goodput to expect, where time is lost,"
        " which intervals of snapshots and checkpoints are best, and how plain torchrun would do.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Simulates and prints. Returns 0; wrong input is a ConfigError."""
    cluster = options.read_cluster(args)
    answer = forecast(
        cluster,
        snapshot_s=None if args.snapshot is None else options.read("--snapshot", parse_time, args.snapshot),
        persist_s=options.read("--persist", lambda text: options.read_persist(text, cluster.tiers), args.persist),
        torchrun_persist_s=None
        if args.torchrun_persist is None
        else options.read("--torchrun-persist", parse_time, args.torchrun_persist),
        torchrun_async=args.torchrun_async,
        duration_s=options.read("--time", parse_time, args.time),
        num_lives=options.read("--lives", int_of, args.lives),
        seed=args.seed,
    )
    if args.plot is not None:
        _write(args.plot, svg.picture(answer))
    print(json.dumps(report.as_json(cluster, answer), indent=2) if args.json else report.render(cluster, answer))
    return 0


def int_of(text: str) -> int:
    """A whole number of 1 to 10,000, or a ConfigError."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 10_000:
        raise ConfigError(f"{text!r} is not a whole number from 1 to 10000.")
    return int(text)


def _write(path: str, text: str) -> None:
    if not path.endswith(".svg"):
        raise ConfigError(f"--plot {path}: the picture is an SVG; give a name that ends in .svg.")
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--plot {path}: {error.strerror}. Give a file that can be written.") from error
