"""`arc import`: checkpoints of other formats to ours.

Exit codes: 0 done; errors of `arc_dist.errors` are left to the caller, which maps them to its own.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from arc_dist.checkpoint_store.commands_common import OK, print_json
from arc_dist.checkpoint_store.progress import Progress, format_bytes


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

    importing.add_argument("--json", action="store_true", help="print JSON")


def run_import(args: argparse.Namespace) -> int:
    """Imports a checkpoint, tensors bit for bit. No pickle runs: what would need it is refused by its name."""
    from arc_dist.checkpoint_store.convert import import_checkpoint

    with Progress(f"importing {args.source}") as progress:
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
        print_json({"run": args.run_name, **dataclasses.asdict(done)})
    else:
        skipped = f", {len(done.skipped)} skipped" if done.skipped else ""
        print(
            f"imported {done.kind} as step {done.step} of run {args.run_name}: {done.num_tensors} tensors "
            f"({format_bytes(done.nbytes)}), {done.num_objects} objects{skipped}"
        )
    return OK
