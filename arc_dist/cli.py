"""`arc`: looks at checkpoints and at what happened in a run."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from typing import NoReturn

from arc_dist.errors import ArcError, ExitCode


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script. Returns 0, 78, or what the command says of what it looked at."""
    parser = _parser()
    arguments = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
    try:
        return int(arguments.run(arguments) or 0)
    except ArcError as error:
        print(f"arc: {error}", file=sys.stderr)
        return int(error.exit_code)
    except BrokenPipeError:  # `arc ls | head`
        sys.stderr.close()
        return 0


class _Parser(argparse.ArgumentParser):
    """argparse ends with 2; the exit code for a wrong command line is ours."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(int(ExitCode.CONFIGURATION), f"{self.prog}: {message}\nSee {self.prog} --help.\n")


def _parser() -> argparse.ArgumentParser:
    from arc_dist.checkpoint_store import commands
    from arc_dist.launch import commands_coordinator
    from arc_dist.planner import commands as planner_commands
    from arc_dist.telemetry import commands_status, report

    parser = _Parser(
        prog="arc",
        description="Looks at the checkpoints of a run and at what happened in it. To start a job, see arcrun --help.",
    )
    parser.add_argument("--version", action="version", version=f"arc-dist {_version()}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    commands.add_commands(subparsers)
    report.add_command(subparsers)
    planner_commands.add_command(subparsers)
    commands_status.add_commands(subparsers)
    commands_coordinator.add_command(subparsers)
    return parser


def _version() -> str:
    try:
        return importlib.metadata.version("arc-dist")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
