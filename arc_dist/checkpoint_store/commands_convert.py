"""`arc import` and `arc export`: checkpoints of other formats to ours, and ours to them.

Exit codes: 0 done; errors of `arc_dist.errors` are left to the caller, which maps them to its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from typing import Any

_PROGRESS_EVERY_S = 0.5
OK = 0


def add_commands(subparsers: argparse._SubParsersAction[Any]) -> None:  # pyright: ignore[reportPrivateUsage]
    """Adds the commands. Each sets `run`, a function of the parsed arguments that returns the exit code."""
    importing = subparsers.add_parser(
        "import", help="turn a checkpoint of another format into a step of a store", description=run_import.__doc__
    )
    importing.add_argument("source", help="a DCP or torchtitan directory, a torch.save file, or safetensors files")
    importing.add_argument("--store", required=True, help="the store to import to; a local path or a URL")
    importing.add_argument("--run-name", metavar="RUN", default="run", help="run in the store (default: run)")
    importing.add_argument("--step", type=int, help="number of the step, when the source's name does not end with it")
    importing.add_argument("--skip", action="append", default=[], metavar="NAME", help="leave this name out")
    importing.add_argument("--uncertified", action="store_true", help="readers must name the step to get it")
    importing.set_defaults(run=run_import)

    exporting = subparsers.add_parser(
        "export", help="write a step in another program's format", description=run_export.__doc__
    )
    exporting.add_argument("path", help="a store, a run in it or a step's directory; a local path or a URL")
    exporting.add_argument("out", help="the directory to write; it must not be there yet")
    exporting.add_argument("--format", choices=["dcp"], required=True, help="dcp: torch.distributed.checkpoint")
    exporting.add_argument("--run-name", metavar="RUN", help="run of the store, when it has several")
    exporting.add_argument("--step", type=int, help="only this step (default: the newest certified)")
    exporting.set_defaults(run=run_export)
    for parser in (importing, exporting):
        parser.add_argument("--json", action="store_true", help="print JSON")


def run_import(args: argparse.Namespace) -> int:
    """Imports a checkpoint, tensors bit for bit. No pickle runs: what would need it is refused by its name."""
    from arc_dist.checkpoint_store.convert import import_checkpoint

    with _Progress(quiet=args.json) as progress:
        done = import_checkpoint(
            args.source,
            args.store,
            args.run_name,
            args.step,
            skip=args.skip,
            certified=not args.uncertified,
            progress=progress,
        )
    if args.json:
        print(json.dumps({"run": args.run_name, **dataclasses.asdict(done)}, indent=2))
    else:
        skipped = f", {len(done.skipped)} skipped" if done.skipped else ""
        print(
            f"imported {done.kind} as step {done.step} of run {args.run_name}: {done.num_tensors} tensors "
            f"({done.nbytes:,} bytes), {done.num_objects} objects{skipped}"
        )
    return OK


def run_export(args: argparse.Namespace) -> int:
    """Writes a step as a classic DCP directory. Every byte is verified; objects become pickles, as DCP wants them."""
    from arc_dist.checkpoint_store.convert import export_dcp

    with _Progress(quiet=args.json) as progress:
        checkpoint = export_dcp(args.path, args.step, args.out, run=args.run_name, progress=progress)
    tensors = checkpoint.manifest.tensors
    if args.json:
        print(json.dumps({"step": checkpoint.step, "out": str(args.out), "num_tensors": len(tensors)}, indent=2))
    else:
        print(f"exported step {checkpoint.step} to {args.out}: {len(tensors)} tensors")
    return OK


class _Progress:
    """Says on a terminal how many bytes are done."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet or not sys.stderr.isatty()
        self._done = 0
        self._shown = 0.0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._quiet:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def __call__(self, nbytes: int) -> None:
        self._done += nbytes
        now = time.monotonic()
        if not self._quiet and now - self._shown >= _PROGRESS_EVERY_S:
            self._shown = now
            print(f"\r{self._done / (1 << 20):,.0f} MiB", end="", file=sys.stderr, flush=True)
