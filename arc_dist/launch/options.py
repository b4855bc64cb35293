"""The options of `python -m arc_dist`; `arcrun` knows the same with the prefix `--arc-`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from arc_dist.errors import ExitCode
from arc_dist.supervisor.script import Target

_DESCRIPTION = """\
Runs a training script under a supervisor that starts it again within a fraction of a second when it dies, and guards
its optimizer steps. The script needs no change. Under torchrun every rank gets its own supervisor:

    torchrun --nproc-per-node=8 -m arc_dist [options] train.py [arguments of train.py]
    arcrun   --nproc-per-node=8 [--arc-options] train.py [arguments of train.py]
"""
_EPILOG = """\
exit codes:
  0 success; 75 preempted (retry: the state is saved); 76 infrastructure (retry);
  77 no progress (do not retry); 78 configuration (do not retry);
  the script's own exit code otherwise (do not retry).

torch is imported before the script runs, so that a restart need not do it again: environment variables that torch
reads at import must be set before the job starts, or use --no-preload.
"""
_VALUES = (
    *("store", "run-dir", "shm-root", "max-restarts", "grace-s", "preempt-signals", "preempt-file"),
    *("host-timeout-s", "spares", "spare-after-s", "evict"),
    "coordinator",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says.

    Attributes:
        target: the script or module, and its arguments.
        preload: modules to import besides torch, so that restarts are faster.
        no_preload: import nothing before the script: slower restarts, exactly `python train.py`'s import order.
        no_guard: leave the script's optimizer steps alone; fast restarts only.
        environ: ``ARC_*`` variables that options stand for.
        zygote: file descriptor and parent pid of a zygote that takes a dead one's place; internal.
    """

    target: Target
    preload: tuple[str, ...] = ()
    no_preload: bool = False
    no_guard: bool = False
    environ: dict[str, str]
    zygote: tuple[int, int] | None = None


def add_settings(parser: argparse.ArgumentParser, prefix: str = "") -> None:
    """Adds the options that stand for ``ARC_*`` variables, named ``--<prefix>store`` and so on."""
    group = parser.add_argument_group("arc-dist")
    add = group.add_argument
    add(f"--{prefix}store", metavar="URL", help="where checkpoints go: a directory or an fsspec URL [ARC_STORE]")
    add(f"--{prefix}run-dir", metavar="DIR", help="where incidents and events are written [ARC_RUN_DIR]")
    add(f"--{prefix}shm-root", metavar="DIR", help="memory file system for snapshots, default /dev/shm [ARC_SHM_ROOT]")
    add(
        f"--{prefix}max-restarts",
        metavar="N",
        help="bound on fast restarts for infrastructure faults, default 100 [ARC_MAX_RESTARTS]",
    )
    add(
        f"--{prefix}grace-s",
        metavar="S",
        help="seconds from a preemption notice to the end of all processes, default 30 [ARC_GRACE_S]",
    )
    add(
        f"--{prefix}preempt-signals",
        metavar="NAMES",
        help="signals that are preemption notices, default SIGTERM; such as SIGTERM,SIGUSR1 [ARC_PREEMPT_SIGNALS]",
    )
    add(
        f"--{prefix}preempt-file",
        metavar="FILE",
        help="a file whose appearance is a preemption notice [ARC_PREEMPT_FILE]",
    )
    add(
        f"--{prefix}host-timeout-s",
        metavar="S",
        help="silence after which a host is lost, default 15; 0 for never [ARC_HOST_TIMEOUT_S]",
    )
    add(
        f"--{prefix}spares",
        metavar="N",
        help="so many of all workers, the last ones, stand by to take the place of lost ones [ARC_SPARES]",
    )
    add(
        f"--{prefix}spare-after-s",
        metavar="S",
        help="how long a lost rank is waited for before a spare takes its place, default 15 [ARC_SPARE_AFTER_S]",
    )
    add(
        f"--{prefix}evict",
        metavar="1",
        help="1: hosts that are suspected or slow are left out at a restart [ARC_EVICT]",
    )
    add(
        *dict.fromkeys((f"--{prefix}coordinator", "--coordinator")),
        metavar="HOST",
        help="who hosts the coordinator: embedded, the default; ray; or ray://host:port [ARC_COORDINATOR]",
    )
    add(f"--{prefix}log-level", choices=("debug", "info", "warning", "error"), help="default info [ARC_LOG_LEVEL]")
    add(
        f"--{prefix}preload",
        metavar="MODULE",
        action="append",
        default=[],
        help="import this module before the script too, so that restarts need not; may be repeated",
    )
    add(
        f"--{prefix}no-preload",
        action="store_true",
        help="import nothing, not even torch, before the script: restarts take seconds",
    )
    add(f"--{prefix}no-guard", action="store_true", help="leave optimizer steps alone: fast restarts only")


def settings_to_arguments(namespace: argparse.Namespace, prefix: str) -> list[str]:
    """The options of `add_settings` as arguments for `python -m arc_dist`."""
    values = vars(namespace)
    key = prefix.replace("-", "_")
    arguments: list[str] = []
    for name in (*_VALUES, "log-level"):
        value = values[key + name.replace("-", "_")]
        if value is not None:
            arguments.append(f"--{name}={value}")
    arguments += [f"--preload={module}" for module in values[f"{key}preload"]]
    arguments += [f"--{name}" for name in ("no-preload", "no-guard") if values[key + name.replace("-", "_")]]
    return arguments


def parse(arguments: Sequence[str]) -> Options:
    """Parses the command line of `python -m arc_dist`; ends the process with 78 when it is wrong."""
    parser = _Parser(
        prog="python -m arc_dist",
        usage="python -m arc_dist [options] (train.py | -m module) [arguments]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-m", "--module", action="store_true", help="the script is a module name, as in python -m")
    add_settings(parser)
    parser.add_argument("--zygote-fd", help=argparse.SUPPRESS)
    parser.add_argument("script", help="script, directory or zip file with __main__.py, or module with -m")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="handed to the script as they are")
    known = parser.parse_args(list(arguments))
    environ = {
        name: str(value)
        for name, value in {
            "ARC_STORE": known.store,
            "ARC_RUN_DIR": known.run_dir and os.path.abspath(known.run_dir),
            "ARC_SHM_ROOT": known.shm_root,
            "ARC_MAX_RESTARTS": known.max_restarts,
            "ARC_GRACE_S": known.grace_s,
            "ARC_PREEMPT_SIGNALS": known.preempt_signals,
            "ARC_PREEMPT_FILE": known.preempt_file and os.path.abspath(known.preempt_file),
            "ARC_HOST_TIMEOUT_S": known.host_timeout_s,
            "ARC_SPARES": known.spares,
            "ARC_SPARE_AFTER_S": known.spare_after_s,
            "ARC_EVICT": known.evict,
            "ARC_COORDINATOR": known.coordinator,
            "ARC_LOG_LEVEL": known.log_level,
        }.items()
        if value is not None
    }
    zygote = None
    if known.zygote_fd is not None:
        descriptor, _, parent = known.zygote_fd.partition(":")
        zygote = (int(descriptor), int(parent))
    return Options(
        target=Target(name=known.script, args=tuple(known.args), is_module=known.module),
        preload=tuple(known.preload),
        no_preload=known.no_preload,
        no_guard=known.no_guard,
        environ=environ,
        zygote=zygote,
    )


class _Parser(argparse.ArgumentParser):
    """argparse ends with 2, which a launcher would take for the script's own code."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(int(ExitCode.CONFIGURATION), f"{self.prog}: {message}\nSee {self.prog} --help.\n")
