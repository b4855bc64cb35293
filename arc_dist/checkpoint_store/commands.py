"""`arc ls`, `arc verify`, `arc inspect`: what a store holds, for people and, with --json, for scripts.

A path is a store, one of its runs, or one step's directory. Exit codes: 0 all is well, 1 damage was found, 3 there is
no committed checkpoint; errors of `arc_dist.errors` are left to the caller, which maps them to its own exit codes.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import json
import math
import sys
import threading
import time
from typing import Any

from arc_dist.checkpoint_store.backends import Backend, open_backend
from arc_dist.checkpoint_store.catalog import Catalog, StepInfo
from arc_dist.checkpoint_store.format import MANIFEST_NAME, step_of_directory
from arc_dist.checkpoint_store.manifest import Manifest
from arc_dist.checkpoint_store.reader import Problem
from arc_dist.errors import StoreError, StoreGone

OK = 0
DAMAGED = 1
NOTHING_THERE = 3
_PROGRESS_EVERY_S = 0.5
_MAX_TENSORS_SHOWN = 8


@dataclasses.dataclass(frozen=True, slots=True)
class _Run:
    """A run that a path leads to; `directory` when the path names one step of it."""

    backend: Backend
    name: str
    directory: str | None = None

    @property
    def catalog(self) -> Catalog:
        return Catalog(self.backend, self.name)

    def infos(self, step: int | None, *, newest: bool = False) -> list[StepInfo]:
        """The steps meant, damaged ones included, oldest first."""
        if self.directory is not None:
            infos = [self.catalog.info(self.directory)]
        else:
            infos = [self.catalog.info(name) for name in self.catalog.directories()]
        infos = sorted((i for i in infos if step in (None, i.step)), key=lambda i: (i.step, i.committed_at))
        return infos[-1:] if newest else infos


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
    inspect.add_argument("--tensors", action="store_true", help="list every tensor")


def list_steps(args: argparse.Namespace) -> int:
    """Lists the committed checkpoints, oldest first. Reads manifests, not the data: see `arc verify`."""
    rows = [(run, info) for run in _find(args) for info in run.infos(None)]
    if args.json:
        _print_json([{"run": run.name, **dataclasses.asdict(info)} for run, info in rows])
    else:
        table = [("RUN", "STEP", "SIZE", "TENSORS", "WORLD", "COMMITTED", "STATE", "DIRECTORY")]
        for run, i in rows:
            if i.problem is not None:
                table.append((run.name, str(i.step), "-", "-", "-", "-", "DAMAGED", i.directory))
                continue
            state = "certified" if i.certified else "uncertified"
            size, when = format_bytes(i.nbytes), format_time(i.committed_at)
            table.append((run.name, str(i.step), size, str(i.num_tensors), str(i.world_size), when, state, i.directory))
        _print_table(table)
        for _, info in rows:
            if info.problem is not None:
                print(f"\n{info.directory}: {info.problem}")
    if not rows:
        return _nothing(args)
    return DAMAGED if any(info.problem is not None for _, info in rows) else OK


def verify_steps(args: argparse.Namespace) -> int:
    """Reads every byte of the checkpoints and compares it with their digests; names damaged files and tensors."""
    results: list[dict[str, Any]] = []
    for run in _find(args):
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
        _print_json(results)
    if not results:
        return _nothing(args)
    return OK if all(result["ok"] for result in results) else DAMAGED


def inspect_step(args: argparse.Namespace) -> int:
    """Shows what a checkpoint's manifest says: the newest one, or the one that --step or the path names."""
    chosen = [(run, info) for run in _find(args) for info in run.infos(args.step, newest=True)]
    if not chosen:
        return _nothing(args)
    run, info = max(chosen, key=lambda item: (item[1].step, item[1].committed_at))
    manifest = run.catalog.manifest(info.directory)
    fields = {"run": run.name, **describe(manifest)}
    tensors = [
        {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "nbytes": sum(c.nbytes for c in t.chunks)}
        for t in manifest.tensors
    ]
    files = [dataclasses.asdict(file) for file in manifest.files]
    if args.json:
        _print_json({**fields, "files": files, "tensors": tensors})
        return OK
    fields["nbytes"] = format_bytes(manifest.nbytes)
    fields["committed_at"] = format_time(manifest.committed_at)
    for key, value in fields.items():
        print(f"{key + ':':<14} {value if isinstance(value, str) else json.dumps(value)}")
    print(f"{'tensors:':<14} {len(tensors)}, {sum(math.prod(t.shape) for t in manifest.tensors):,} elements")
    print()
    _print_table([("FILE", "KIND", "SIZE"), *((f.name, f.kind, format_bytes(f.nbytes)) for f in manifest.files)])
    if args.tensors:
        print()
        table = [("TENSOR", "DTYPE", "SHAPE", "SIZE")]
        for t in manifest.tensors:
            table.append((t.name, t.dtype, str(list(t.shape)), format_bytes(sum(c.nbytes for c in t.chunks))))
        _print_table(table)
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


def format_bytes(nbytes: int) -> str:
    """``1536`` -> ``"1.5 KiB"``."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            return f"{nbytes} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


def format_time(seconds: float) -> str:
    """Seconds since 1970 as UTC to the second; what no calendar knows as the number itself."""
    try:
        return dt.datetime.fromtimestamp(seconds, dt.timezone.utc).strftime("%Y-%m-%d %H:%M:%SZ")
    except (OverflowError, ValueError, OSError):
        return str(seconds)


def _find(args: argparse.Namespace) -> list[_Run]:
    """The runs that the path leads to: it may name a store, a run or a step.

    Raises:
        StoreGone, StoreDenied, ConfigError: it is not there, not readable, or not a directory.
    """
    url = str(args.path).rstrip("/") or "/"
    backend = open_backend(url)
    name = backend.url.rstrip("/").rsplit("/", 1)[-1]
    if step_of_directory(name) is not None:
        rest = backend.url.rstrip("/").rsplit("/", 2)
        if len(rest) == 3 and backend.exists(MANIFEST_NAME):
            return [_Run(open_backend(rest[0] or "/"), rest[1], name)]
        raise StoreGone(f"{url}: no committed checkpoint: there is no {MANIFEST_NAME} in it.", file=url)
    if not backend.exists(""):
        raise StoreGone(f"{url}: there is no such store. Correct the path, or mount what should be there.", file=url)
    directories = [entry.name for entry in backend.list("") if entry.is_directory]
    if any(step_of_directory(directory) is not None for directory in directories):
        return [_Run(open_backend(backend.url.rstrip("/").rsplit("/", 1)[0] or "/"), name)]
    runs = [d for d in directories if not d.startswith(".") and args.run_name in (None, d)]
    return [_Run(backend, run) for run in sorted(runs)]


def _verify_one(run: _Run, info: StepInfo, *, quiet: bool) -> list[Problem]:
    path = f"{run.name}/{info.directory}"
    if info.problem is not None:
        return [Problem(f"{path}/{MANIFEST_NAME}", info.problem)]
    try:
        checkpoint = run.catalog.open(info.step, info.directory)
    except StoreError as error:
        return [Problem(f"{path}/{MANIFEST_NAME}", error.message)]
    progress = None if quiet or not sys.stderr.isatty() else _Progress(path, info.nbytes + info.referred_nbytes)
    try:
        return checkpoint.verify(progress)
    finally:
        if progress is not None:
            progress.close()


def _print_verdict(run: _Run, info: StepInfo, problems: list[Problem], seconds: float) -> None:
    label = f"{run.name}/{info.directory}"
    if not problems:
        print(f"{label}: ok, {format_bytes(info.nbytes)} in {seconds:.1f} s")
        return
    print(f"{label}: DAMAGED")
    for problem in problems:
        print(f"  {problem.file}: {problem.what}")
        if problem.tensors:
            shown = _clean(", ".join(problem.tensors[:_MAX_TENSORS_SHOWN]))
            more = len(problem.tensors) - _MAX_TENSORS_SHOWN
            print(f"    tensors: {shown}" + (f" and {more} more (--json has all)" if more > 0 else ""))


class _Progress:
    """A line on the terminal that says how far verification is; called from several threads."""

    def __init__(self, label: str, total: int) -> None:
        self._label = label
        self._total = max(total, 1)
        self._done = 0
        self._shown = 0.0
        self._lock = threading.Lock()

    def __call__(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            now = time.monotonic()
            if now - self._shown >= _PROGRESS_EVERY_S:
                self._shown = now
                share = 100 * self._done // self._total
                print(f"\r{self._label}: {share:3d} %", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _nothing(args: argparse.Namespace) -> int:
    if not args.json:
        print(f"{args.path}: no committed checkpoint", file=sys.stderr)
    return NOTHING_THERE


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(_clean(row[column])) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(_clean(cell).ljust(width) for cell, width in zip(row, widths)).rstrip())


def _clean(text: str) -> str:
    """Names come from files: what could steer a terminal is shown as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
