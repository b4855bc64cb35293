"""`arc diff`, `arc copy`, `arc export`: checkpoints compared, brought elsewhere, made into one file."""

from __future__ import annotations

import argparse
import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

from arc_dist.checkpoint_store.backends import Backend, open_backend
from arc_dist.checkpoint_store.catalog import Catalog, StepInfo
from arc_dist.checkpoint_store.commands_common import (
    DAMAGED,
    DIFFERENT,
    OK,
    Run,
    find_checkpoint,
    find_runs,
    find_trusted,
    nothing,
    print_json,
    print_table,
)
from arc_dist.checkpoint_store.diff import Comparison, Side, compare
from arc_dist.checkpoint_store.export import Export, export_safetensors
from arc_dist.checkpoint_store.progress import Progress, clean, format_bytes
from arc_dist.checkpoint_store.reader import Checkpoint
from arc_dist.checkpoint_store.transfer import copy_marks, copy_step
from arc_dist.errors import ConfigError, Fenced, StoreCorrupt, StoreGone

_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kMGT]i?)?B?(?:/s)?")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def add_commands(subparsers: argparse._SubParsersAction[Any]) -> None:  # pyright: ignore[reportPrivateUsage]
    """Adds the commands. Each sets `run`, a function of the parsed arguments that returns the exit code."""
    diff = subparsers.add_parser(
        "diff", help="say which tensors of two checkpoints differ", description=diff_two.__doc__
    )
    copy = subparsers.add_parser(
        "copy", help="copy checkpoints between stores, verified", description=copy_some.__doc__
    )
    export = subparsers.add_parser("export", help="write a checkpoint in another form", description=export_one.__doc__)
    for name in ("a", "b"):
        diff.add_argument(name, help="a store, a run in it or a step's directory; a local path or a URL")
    for name in ("a", "b"):
        diff.add_argument(f"--step-{name}", type=int, metavar="STEP", help=f"this step of {name}; default: its newest")
    copy.add_argument("source", help="a store, a run in it or a step's directory; a local path or a URL")
    copy.add_argument("target", help="the store that gets the copy; a local path or a URL")
    chosen = copy.add_mutually_exclusive_group()
    chosen.add_argument("--step", type=int, help="only this step")
    chosen.add_argument("--newest", action="store_true", help="only the newest step of each run")
    copy.add_argument("--to-run", metavar="RUN", help="name of the run in the target (default: as in the source)")
    copy.add_argument("--max-rate", metavar="RATE", help="send no more than this per second, such as 200MB or 1GiB")
    copy.add_argument("--verify", action="store_true", help="read every copied byte back from the target")
    export.add_argument("path", help="a store, a run in it or a step's directory; a local path or a URL")
    export.add_argument("out", help="the file to write, a local path or a URL; for dcp a directory that is not there")
    export.add_argument("--format", choices=sorted(_FORMATS), default="safetensors", help="default: %(default)s")
    export.add_argument("--step", type=int, help="this step; default: the newest certified")
    export.add_argument(
        "--prefix", default="", help="only tensors whose names begin with this, without it; `model.` for a state_dict"
    )
    export.add_argument("--force", action="store_true", help="replace the file if it is there")
    for parser, function in ((diff, diff_two), (copy, copy_some), (export, export_one)):
        parser.add_argument("--run-name", metavar="RUN", help="only this run of the store")
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.set_defaults(run=function)


def diff_two(args: argparse.Namespace) -> int:
    """Says which tensors of two checkpoints differ, bit for bit. Exit code 0 when none does, 1 when some do.

    Digests are compared; data is read only when the two were saved by different numbers of ranks.
    """
    sides: list[Checkpoint] = []
    for path, step in ((args.a, args.step_a), (args.b, args.step_b)):
        checkpoint = find_checkpoint(path, args.run_name, step)
        if checkpoint is None:
            return nothing(path, step=step, quiet=args.json)
        sides.append(checkpoint)
    with Progress("comparing", sum(t.spec().nbytes for t in sides[0].manifest.tensors)) as progress:
        found = compare(*sides, progress=progress)
    if args.json:
        print_json({"a": sides[0].step, "b": sides[1].step, **dataclasses.asdict(found)})
    else:
        _print_differences(found, sides)
    return DIFFERENT if found.differences else OK


def copy_some(args: argparse.Namespace) -> int:
    """Copies checkpoints to another store, the newest first. Every byte is verified on the way.

    A copy that was interrupted is taken up where it was: give the same command again. Pins and quarantine go with the
    checkpoints. Damaged checkpoints, and those whose place another attempt has in the target, are not copied; the exit
    code is 1 then.
    """
    rate = None if args.max_rate is None else _parse_rate(args.max_rate)
    runs = find_runs(args.source, args.run_name)
    if args.to_run is not None and len(runs) > 1:
        names = ", ".join(run.name for run in runs[:10])
        raise ConfigError(f"{args.source}: --to-run is for one run, and there are several ({names}). Use --run-name.")
    target = open_backend(args.target)
    results: list[dict[str, Any]] = []
    for run in runs:
        infos = run.infos(args.step, newest=args.newest)
        sound = [info.directory for info in infos if info.problem is None]
        copy_marks(run.backend, run.name, sound, target, target_run=args.to_run)
        for info in reversed(infos):
            results.append(_copy_one(args, run, info, target, rate))
    if args.json:
        print_json(results)
    if not results:
        return nothing(args.source, step=args.step, quiet=args.json)
    return OK if all(result["ok"] for result in results) else DAMAGED


def export_one(args: argparse.Namespace) -> int:
    """Writes one checkpoint in another form: by default one safetensors file with whole tensors, which any tool reads.

    With --prefix model. the file holds what load_state_dict of the bare model wants.
    """
    checkpoint = find_trusted(args.path, args.run_name, args.step)
    if checkpoint is None:
        return nothing(args.path, step=args.step, quiet=args.json)
    began = time.monotonic()
    done = _FORMATS[args.format](checkpoint, args)
    if args.json:
        print_json({"step": checkpoint.step, **dataclasses.asdict(done)})
    else:
        seconds = time.monotonic() - began
        size = format_bytes(done.nbytes)
        print(clean(f"{done.path}: step {checkpoint.step}, {done.num_tensors} tensors, {size} in {seconds:.1f} s"))
    return OK


def _copy_one(
    args: argparse.Namespace, run: Run, info: StepInfo, target: Backend, rate: float | None
) -> dict[str, Any]:
    """Copies one step. What is wrong with it is told and the next one taken; a failing store ends the command."""
    label = f"{run.name}/{info.directory}"
    began = time.monotonic()
    problem = info.problem
    fields: dict[str, Any] = {"run": run.name, "step": info.step, "directory": info.directory}
    if problem is None:
        try:
            with Progress(label, info.nbytes) as progress:
                done = copy_step(
                    run.backend,
                    run.name,
                    info.directory,
                    target,
                    target_run=args.to_run,
                    progress=progress,
                    max_bytes_per_s=rate,
                )
            fields.update(dataclasses.asdict(done))
            problem = _verify_copy(args, run, info, target) if args.verify else None
        except (StoreCorrupt, Fenced) as error:
            problem = error.message
        except StoreGone as error:
            if not target.exists("") or not run.backend.exists(run.name):
                raise  # a store is not there: no other step would fare better
            problem = error.message
    fields.update({"ok": problem is None, "problem": problem})
    if not args.json:
        if problem is not None:
            print(clean(f"{label}: NOT COPIED: {problem}"))
        else:
            sent, seconds = format_bytes(fields["sent_nbytes"]), time.monotonic() - began
            there = f", {fields['num_present']} files were there" if fields["num_present"] else ""
            print(f"{label}: ok, {format_bytes(info.nbytes)}, {sent} sent in {seconds:.1f} s{there}")
    return fields


def _verify_copy(args: argparse.Namespace, run: Run, info: StepInfo, target: Backend) -> str | None:
    try:
        checkpoint = Catalog(target, args.to_run or run.name).open(info.step, info.directory)
    except StoreCorrupt as error:
        return error.message
    with Progress(f"verifying {info.directory}", info.nbytes) as progress:
        problems = checkpoint.verify(progress)
    return "; ".join(f"{problem.file}: {problem.what}" for problem in problems) or None


def _export_safetensors(checkpoint: Checkpoint, args: argparse.Namespace) -> Export:
    wanted = [t for t in checkpoint.manifest.tensors if t.name.startswith(args.prefix)]
    with Progress(f"writing {args.out}", sum(t.spec().nbytes for t in wanted)) as progress:
        return export_safetensors(checkpoint, args.out, prefix=args.prefix, replace=args.force, progress=progress)


def _export_dcp(checkpoint: Checkpoint, args: argparse.Namespace) -> Export:
    """A classic torch.distributed.checkpoint directory. Its objects become pickles, as DCP wants them."""
    from arc_dist.checkpoint_store.convert import write_dcp_directory  # brings torch.distributed.checkpoint

    if args.prefix or args.force:
        raise ConfigError("arc export --format dcp writes a new directory with all tensors: no --prefix, no --force.")
    nbytes = checkpoint.manifest.nbytes
    with Progress(f"writing {args.out}", nbytes) as progress:
        write_dcp_directory(checkpoint, args.out, progress=progress)
    return Export(path=str(args.out), nbytes=nbytes, num_tensors=len(checkpoint.manifest.tensors))


# The forms of `arc export`: each writes an opened step to where the arguments say.
_FORMATS: dict[str, Callable[[Checkpoint, argparse.Namespace], Export]] = {
    "safetensors": _export_safetensors,
    "dcp": _export_dcp,
}


def _print_differences(found: Comparison, sides: list[Checkpoint]) -> None:
    if found.differences:
        table = [("TENSOR", "DIFFERS IN", "A", "B")]
        table += [(d.name, d.what, _side_text(d.a), _side_text(d.b)) for d in found.differences]
        print_table(table)
        print()
    nbytes = sum(d.b.nbytes if d.b is not None else 0 for d in found.differences)
    read = f"; the data of {found.num_read} was read" if found.num_read else ""
    print(
        f"steps {sides[0].step} and {sides[1].step}: {len(found.differences)} tensors differ "
        f"({format_bytes(nbytes)} in b), {found.num_equal} are equal{read}"
    )


def _side_text(side: Side | None) -> str:
    return "-" if side is None else f"{side.dtype} {list(side.shape)} {format_bytes(side.nbytes)}"


def _parse_rate(text: str) -> float:
    match = _RATE.fullmatch(text.strip())
    rate = float(match.group(1)) * _UNITS[match.group(2) or ""] if match is not None else 0.0
    if rate <= 0:
        raise ConfigError(f"--max-rate {text}: give bytes per second, such as 200MB or 1GiB.")
    return rate
