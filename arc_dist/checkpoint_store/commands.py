"""`arc ls`, `arc verify`, `arc inspect`: what a store holds, for people and, with --json, for scripts.

A path is a store, one of its runs, or one step's directory. Exit codes: 0 all is well, 1 damage was found, 3 there is
no committed checkpoint; errors of `arc_dist.errors` are left to the caller, which maps them to its own exit codes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from typing import Any

from arc_dist.checkpoint_store import commands_convert, commands_keep, commands_move
from arc_dist.checkpoint_store.catalog import StepInfo
from arc_dist.checkpoint_store.commands_common import (
    DAMAGED,
    NOTHING_THERE,
    OK,
    Run,
    find_runs,
    find_step,
    format_time,
    nothing,
    print_json,
    print_table,
)
from arc_dist.checkpoint_store.format import MANIFEST_NAME
from arc_dist.checkpoint_store.manifest import Manifest
from arc_dist.checkpoint_store.progress import Progress, clean, format_bytes
from arc_dist.checkpoint_store.reader import Problem
from arc_dist.checkpoint_store.tiers import Tier, parse_tiers
from arc_dist.errors import StoreError

__all__ = ["DAMAGED", "NOTHING_THERE", "OK", "add_commands", "describe", "format_bytes", "format_time"]

_MAX_TENSORS_SHOWN = 8


def add_commands(subparsers: argparse._SubParsersAction[Any]) -> None:  # pyright: ignore[reportPrivateUsage]
    """Adds the commands. Each sets `run`, a function of the parsed arguments that returns the exit code."""
    ls = subparsers.add_parser("ls", help="list the checkpoints of a store", description=list_steps.__doc__)
    verify = subparsers.add_parser(
        "verify", help="read every byte of checkpoints and compare digests", description=verify_steps.__doc__
    )
    inspect = subparsers.add_parser("inspect", help="show what one checkpoint holds", description=inspect_step.__doc__)
    for parser, function in ((ls, list_steps), (verify, verify_steps), (inspect, inspect_step)):
        parser.add_argument("path", help="a store, a run in it or a step's directory; a local path or a URL")
        parser.add_argument("--run-name", metavar="RUN", help="only this run of the store")
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.set_defaults(run=function)
    for parser in (verify, inspect):
        parser.add_argument("--step", type=int, help="only this step")
    verify.add_argument("--newest", action="store_true", help="only the newest step of each run")
    commands_keep.add_commands(subparsers)
    commands_move.add_commands(subparsers)
    inspect.add_argument("--tensors", action="store_true", help="list every tensor")
    commands_convert.add_commands(subparsers)


def list_steps(args: argparse.Namespace) -> int:
    """Lists the committed checkpoints, oldest first. Reads manifests, not the data: see `arc verify`.

    Several tiers, as Arc(store=...) takes them ("/nvme/ckpt, s3://bucket/run"), give a table of steps by tiers.
    """
    tiers = parse_tiers(args.path)
    if len(tiers) > 1:
        return _list_tiers(args, tiers)
    rows = [(run, info) for run in find_runs(args.path, args.run_name) for info in run.infos(None)]
    if args.json:
        print_json([{"run": run.name, **dataclasses.asdict(info)} for run, info in rows])
    else:
        table = [("RUN", "STEP", "SIZE", "TENSORS", "WORLD", "COMMITTED", "STATE", "DIRECTORY")]
        for run, i in rows:
            if i.problem is not None:
                table.append((run.name, str(i.step), "-", "-", "-", "-", "DAMAGED", i.directory))
                continue
            state = "certified" if i.certified else "quarantined" if i.quarantined is not None else "uncertified"
            state += "" if i.pinned is None else ", pinned"
            size, when = format_bytes(i.nbytes), format_time(i.committed_at)
            table.append((run.name, str(i.step), size, str(i.num_tensors), str(i.world_size), when, state, i.directory))
        print_table(table)
        for _, info in rows:
            if info.problem is not None:
                print(f"\n{info.directory}: {clean(info.problem)}")
            if info.quarantined is not None:
                print(f"\n{info.directory}: in quarantine, never restored by itself: {clean(info.quarantined)}")
            if info.pinned:
                print(f"\n{info.directory}: pinned: {clean(info.pinned)}")
    if not rows:
        return nothing(args.path, quiet=args.json)
    return DAMAGED if any(info.problem is not None for _, info in rows) else OK


def _list_tiers(args: argparse.Namespace, tiers: Sequence[Tier]) -> int:
    """Which tier holds which step."""
    held: list[dict[tuple[str, int], StepInfo]] = []
    for tier in tiers:
        infos = [(run.name, info) for run in find_runs(tier.url, args.run_name) for info in run.infos(None)]
        held.append({})
        for name, info in infos:  # a sound commit of a step tells more than a damaged one
            known = held[-1].get((name, info.step))
            if known is None or known.problem is not None:
                held[-1][name, info.step] = info
    steps = sorted({key for found in held for key in found})
    states = {key: [_state_in_tier(found.get(key)) for found in held] for key in steps}
    if args.json:
        urls = [tier.url for tier in tiers]
        print_json([{"run": r, "step": s, "tiers": dict(zip(urls, states[r, s], strict=True))} for r, s in steps])
    else:
        table = [("RUN", "STEP", *(f"TIER {number}" for number in range(len(tiers))))]
        print_table([*table, *((name, str(step), *states[name, step]) for name, step in steps)])
        print()
        for number, tier in enumerate(tiers):
            print(f"tier {number}: {clean(tier.url)}")
    if not steps:
        return nothing(args.path, quiet=args.json)
    return DAMAGED if any("DAMAGED" in row for row in states.values()) else OK


def _state_in_tier(info: StepInfo | None) -> str:
    if info is None:
        return "-"
    if info.problem is not None:
        return "DAMAGED"
    return "certified" if info.certified else "quarantined" if info.quarantined is not None else "uncertified"


def verify_steps(args: argparse.Namespace) -> int:
    """Reads every byte of the checkpoints and compares it with their digests; names damaged files and tensors."""
    results: list[dict[str, Any]] = []
    for run in find_runs(args.path, args.run_name):
        for info in run.infos(args.step, newest=args.newest):
            began = time.monotonic()
            problems = _verify_one(run, info, quiet=args.json)
            results.append(
                {
                    "run": run.name,
                    "step": info.step,
                    "directory": info.directory,
                    "nbytes": info.nbytes,
                    "ok": not problems,
                    "problems": [dataclasses.asdict(problem) for problem in problems],
                }
            )
            if not args.json:
                _print_verdict(run, info, problems, time.monotonic() - began)
    if args.json:
        print_json(results)
    if not results:
        return nothing(args.path, quiet=args.json)
    return OK if all(result["ok"] for result in results) else DAMAGED


def inspect_step(args: argparse.Namespace) -> int:
    """Shows what a checkpoint's manifest says: the newest one, or the one that --step or the path names."""
    found = find_step(args.path, args.run_name, args.step)
    if found is None:
        return nothing(args.path, step=args.step, quiet=args.json)
    run, info = found
    manifest = run.catalog.manifest(info.directory)
    fields = {"run": run.name, **describe(manifest)}
    tensors = [
        {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "nbytes": sum(c.nbytes for c in t.chunks)}
        for t in manifest.tensors
    ]
    files = [dataclasses.asdict(file) for file in manifest.files]
    if args.json:
        print_json({**fields, "files": files, "tensors": tensors})
        return OK
    fields["nbytes"] = format_bytes(manifest.nbytes)
    fields["committed_at"] = format_time(manifest.committed_at)
    for key, value in fields.items():
        print(f"{key + ':':<14} {value if isinstance(value, str) else json.dumps(value)}")
    print(f"{'tensors:':<14} {len(tensors)}, {sum(math.prod(t.shape) for t in manifest.tensors):,} elements")
    print()
    print_table([("FILE", "KIND", "SIZE"), *((f.name, f.kind, format_bytes(f.nbytes)) for f in manifest.files)])
    if args.tensors:
        print()
        table = [("TENSOR", "DTYPE", "SHAPE", "SIZE")]
        for t in manifest.tensors:
            table.append((t.name, t.dtype, str(list(t.shape)), format_bytes(sum(c.nbytes for c in t.chunks))))
        print_table(table)
    return OK


def describe(manifest: Manifest) -> dict[str, Any]:
    """A manifest as JSON for people and scripts, without the rows of single tensors."""
    fields = {
        key: getattr(manifest, key)
        for key in (
            "step",
            "directory",
            "generation",
            "world_size",
            "certified",
            "committed_at",
            "parent",
            "owner",
            "hash",
        )
    }
    fields["nbytes"] = manifest.nbytes
    fields["refers_to"] = list(manifest.refers_to)
    fields["versions"] = dict(manifest.versions)
    fields["hosts"] = dict(manifest.hosts)
    fields["meta"] = dict(manifest.meta)
    return fields


def _verify_one(run: Run, info: StepInfo, *, quiet: bool) -> list[Problem]:
    path = f"{run.name}/{info.directory}"
    if info.problem is not None:
        return [Problem(f"{path}/{MANIFEST_NAME}", info.problem)]
    try:
        checkpoint = run.catalog.open(info.step, info.directory)
    except StoreError as error:
        return [Problem(f"{path}/{MANIFEST_NAME}", error.message)]
    if quiet:
        return checkpoint.verify()
    with Progress(path, info.nbytes + info.referred_nbytes) as progress:
        return checkpoint.verify(progress)


def _print_verdict(run: Run, info: StepInfo, problems: list[Problem], seconds: float) -> None:
    label = f"{run.name}/{info.directory}"
    if not problems:
        print(f"{label}: ok, {format_bytes(info.nbytes)} in {seconds:.1f} s")
        return
    print(f"{label}: DAMAGED")
    for problem in problems:
        print(f"  {problem.file}: {problem.what}")
        if problem.tensors:
            shown = clean(", ".join(problem.tensors[:_MAX_TENSORS_SHOWN]))
            more = len(problem.tensors) - _MAX_TENSORS_SHOWN
            print(f"    tensors: {shown}" + (f" and {more} more (--json has all)" if more > 0 else ""))
