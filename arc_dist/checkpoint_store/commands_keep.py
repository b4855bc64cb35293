"""`arc pin`, `arc unpin`, `arc quarantine`, `arc prune`: what of a run is kept, restored, removed."""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

from arc_dist.checkpoint_store.commands_common import (
    OK,
    Run,
    find_runs,
    find_step,
    nothing,
    print_json,
    print_table,
)
from arc_dist.checkpoint_store.orphans import DEFAULT_GRACE_S, Orphan, collect_orphans, find_orphans
from arc_dist.checkpoint_store.progress import clean, format_bytes
from arc_dist.checkpoint_store.pruning import (
    Plan,
    pin_step,
    plan_prune,
    prune,
    quarantine_steps,
    release_steps,
    unpin_step,
)
from arc_dist.checkpoint_store.retention import Retention, format_age, parse_age, parse_retention
from arc_dist.errors import ConfigError


def add_commands(subparsers: argparse._SubParsersAction[Any]) -> None:  # pyright: ignore[reportPrivateUsage]
    """Adds the commands. Each sets `run`, a function of the parsed arguments that returns the exit code."""
    pin = subparsers.add_parser("pin", help="keep a checkpoint, whatever is pruned", description=pin_one.__doc__)
    unpin = subparsers.add_parser("unpin", help="take a pin away", description=unpin_one.__doc__)
    quarantine = subparsers.add_parser(
        "quarantine", help="mark checkpoints as never to be restored", description=quarantine_some.__doc__
    )
    pruner = subparsers.add_parser(
        "prune", help="remove old checkpoints, and what unfinished saves left", description=prune_runs.__doc__
    )
    for parser, function in ((pin, pin_one), (unpin, unpin_one), (quarantine, quarantine_some), (pruner, prune_runs)):
        parser.add_argument("path", help="a store, a run in it or a step's directory; a local path or a URL")
        parser.add_argument("--run-name", metavar="RUN", help="only this run of the store")
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.set_defaults(run=function)
    for parser in (pin, unpin, quarantine):
        parser.add_argument("--step", type=int, help="this step; without it, the one that the path names")
    pin.add_argument("--why", default="", help="the reason, shown by `arc ls` and `arc prune`")
    quarantine.add_argument("--through", type=int, metavar="STEP", help="and all steps up to this one")
    reason = quarantine.add_mutually_exclusive_group(required=True)
    reason.add_argument("--why", help="the reason, shown by `arc ls`")
    reason.add_argument("--release", action="store_true", help="end the quarantine of --step")
    pruner.add_argument(
        "--keep", metavar="POLICY", help="what to keep, such as last=3,every=1000,best=loss:2,best=acc:1:max,age=7d"
    )
    pruner.add_argument("--orphans", action="store_true", help="remove what unfinished saves and removals left")
    pruner.add_argument(
        "--grace",
        default=format_age(DEFAULT_GRACE_S),
        help="with --orphans: leave what has changed within this time (default %(default)s)",
    )
    pruner.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")


def pin_one(args: argparse.Namespace) -> int:
    """Keeps a checkpoint, whatever the policy, until `arc unpin`."""
    found = _one(args)
    if found is None:
        return nothing(args.path, step=args.step, quiet=args.json)
    run, step = found
    pin_step(run.backend, run.name, step, args.why)
    _say(args, {"run": run.name, "step": step, "pinned": True, "why": args.why}, f"{run.name}: step {step} is pinned")
    return OK


def unpin_one(args: argparse.Namespace) -> int:
    """Takes a pin away. A step that has none is left as it is, which is no error."""
    found = _one(args)
    runs = find_runs(args.path, args.run_name)
    if found is None and len(runs) == 1 and args.step in runs[0].marks().pins:
        found = (runs[0], args.step)  # the step was removed by hand; its pin would wait for the next one of this number
    if found is None:
        return nothing(args.path, step=args.step, quiet=args.json)
    run, step = found
    was = unpin_step(run.backend, run.name, step)
    text = f"{run.name}: step {step} " + ("is not pinned any more" if was else "was not pinned")
    _say(args, {"run": run.name, "step": step, "pinned": False, "was_pinned": was}, text)
    return OK


def quarantine_some(args: argparse.Namespace) -> int:
    """Marks checkpoints, as they are now, as never to be restored by themselves. Later saves of the steps are not."""
    found = _one(args)
    if found is None:
        return nothing(args.path, step=args.step, quiet=args.json)
    run, first = found
    last = first if args.through is None else args.through
    if last < first:
        raise ConfigError(f"--through {last} is below --step {first}. Give the first step with --step.")
    if args.release:
        if args.through is not None:
            raise ConfigError("--release ends the quarantine of one step: give it with --step, without --through.")
        names = release_steps(run.backend, run.name, first)
        text = f"{run.name}: step {first}: " + (", ".join(names) + " released" if names else "was not in quarantine")
        _say(args, {"run": run.name, "step": first, "released": names}, text)
        return OK
    steps = quarantine_steps(run.backend, run.name, first, last, args.why)
    text = f"{run.name}: in quarantine now: {', '.join(map(str, steps)) or 'nothing'}"
    _say(args, {"run": run.name, "quarantined": steps, "why": args.why}, text)
    return OK


def prune_runs(args: argparse.Namespace) -> int:
    """Removes the checkpoints that a policy does not keep, and says of each why it is kept or removed.

    Whatever the policy: the newest two certified checkpoints, pinned ones and everything newer than the oldest of
    those that `last` counts are kept, and damaged ones are left for you to look at.
    """
    if args.keep is None and not args.orphans:
        raise ConfigError("say what to keep, such as --keep last=3,every=1000, or give --orphans.")
    policy = None if args.keep is None else parse_retention(args.keep)
    grace_s = parse_age(args.grace)
    runs = find_runs(args.path, args.run_name)
    if any(run.directory is not None for run in runs):
        raise ConfigError(f"{args.path}: is one step. Prune its run: name the directory above.")
    plans = [(run, _prune(run, policy, dry_run=args.dry_run)) for run in runs] if policy is not None else []
    find = find_orphans if args.dry_run else collect_orphans
    left = [(run, find(run.backend, run.name, grace_s=grace_s)) for run in runs] if args.orphans else []
    if args.json:
        print_json(_as_json(plans, left, dry_run=args.dry_run))
    else:
        _print_plans(plans, dry_run=args.dry_run)
        _print_orphans(left, dry_run=args.dry_run)
    if policy is not None and not any(plan.rows for _, plan in plans):
        return nothing(args.path, quiet=args.json)
    return OK


def _prune(run: Run, policy: Retention, *, dry_run: bool) -> Plan:
    if dry_run:
        return plan_prune(run.backend, run.name, policy, time.time())
    return prune(run.backend, run.name, policy)


def _as_json(plans: list[tuple[Run, Plan]], left: list[tuple[Run, list[Orphan]]], *, dry_run: bool) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "steps": [{"run": run.name, **dataclasses.asdict(row)} for run, plan in plans for row in plan.rows],
        "orphans": [{"run": run.name, **dataclasses.asdict(orphan)} for run, found in left for orphan in found],
    }


def _print_plans(plans: list[tuple[Run, Plan]], *, dry_run: bool) -> None:
    rows = [(run, row) for run, plan in plans for row in plan.rows]
    if not rows:
        return
    removed = "would remove" if dry_run else "removed"
    table = [("RUN", "STEP", "ACTION", "SIZE", "WHY")]
    table += [
        (run.name, str(row.step), "kept" if row.kept else removed, format_bytes(row.nbytes), row.why)
        for run, row in rows
    ]
    print_table(table)
    gone = [row for _, row in rows if not row.kept]
    print(f"\n{removed} {len(gone)} of {len(rows)} steps, {format_bytes(sum(row.nbytes for row in gone))}")


def _print_orphans(left: list[tuple[Run, list[Orphan]]], *, dry_run: bool) -> None:
    for run, found in left:
        for orphan in found:
            done = "removed" if orphan.removed else "would remove" if orphan.due and dry_run else "left"
            what = "left over" if not orphan.directory else "drafts" if orphan.drafts else "no manifest"
            where = f"{run.name}/{orphan.directory}".rstrip("/")
            label = f"{where}: {done}, {format_bytes(orphan.nbytes)}, {what}"
            print(clean(f"{label}: {orphan.why}"))
    if left and not any(found for _, found in left):
        print("nothing is left of unfinished saves")


def _one(args: argparse.Namespace) -> tuple[Run, int] | None:
    """The run and the step that are meant, named by --step or by the path, never guessed; None when not there."""
    runs = find_runs(args.path, args.run_name)
    if args.step is None and (len(runs) != 1 or runs[0].directory is None):
        raise ConfigError(f"{args.path}: which step? Give --step N, or the path of its directory.")
    found = find_step(args.path, args.run_name, args.step)
    return None if found is None else (found[0], found[1].step)


def _say(args: argparse.Namespace, fields: dict[str, Any], text: str) -> None:
    if args.json:
        print_json(fields)
    else:
        print(clean(text))
