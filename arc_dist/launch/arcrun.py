"""`arcrun`: torchrun with a supervisor for every rank, and exit codes that say what became of the job.

``arcrun --nproc-per-node=8 train.py --lr 3`` is ``torchrun --nproc-per-node=8 -m arc_dist train.py --lr 3``, where
torchrun itself would end with 1 whatever happened. Options of arc-dist have the prefix ``--arc-``, all others are
torchrun's.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from arc_dist.config import Env
from arc_dist.errors import ConfigError, ExitCode
from arc_dist.launch import agent, endings, nodes
from arc_dist.launch.options import add_settings, settings_to_arguments
from arc_dist.snapshot.directory import OwnedDirectory, collect_of_agent

_PREFIX = "arc-"
_TORCHRUN_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
_HANDLER_LIMIT_S = 2.0  # for the handler of SIGTERM to end the process, where it can run
_TORCHRUN_SHUTDOWN_S = 30  # what it waits by default between telling its workers to end and killing them
_WORDS = {
    int(ExitCode.PREEMPTED): "was preempted and has saved its state; start it again",
    int(ExitCode.INFRASTRUCTURE): "was stopped by its infrastructure; start it again",
    int(ExitCode.NO_PROGRESS): "makes no progress; see `arc report` before starting it again",
    int(ExitCode.CONFIGURATION): "cannot run as it is configured",
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the console script; ends the process."""
    _leave_early_on_sigterm()
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Runs a job on this node and returns its exit code (errors.ExitCode, or the script's own)."""
    arguments, env = _parse(argv)
    if not (nodes.arrange(arguments, env.host_timeout_s) and _is_in_range(arguments)):
        return int(ExitCode.CONFIGURATION)
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    owned = OwnedDirectory(Path(tempfile.gettempdir()), "arcrun")
    reports = owned.path / "endings"
    reports.mkdir()
    os.environ[endings.VARIABLE] = str(reports)
    if arguments.arc_spares or "ARC_MIN_NODES" in os.environ:
        agent.install(reports)

    def end(reason: str) -> None:
        """From a thread; supervisors, and with them all that they have started, end with this process."""
        print(f"[arc] {reason}: its host is lost, or this one is cut off", file=sys.stderr)
        _say(int(ExitCode.INFRASTRUCTURE))
        owned.close()
        os._exit(int(ExitCode.INFRASTRUCTURE))

    nodes.watch_rendezvous(arguments, env.host_timeout_s, end)
    try:
        torchrun.run(arguments)
        return int(ExitCode.SUCCESS)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        code = endings.job_exit_code(endings.read(reports), worker_exit_code=first.exitcode)
        if code not in _WORDS:  # the script's own code: torchrun's table helps; our own errors have been said
            print(error, file=sys.stderr)
        _say(code)
        return code
    except SignalException as error:
        code = endings.job_exit_code(endings.read(reports), signal_number=int(error.sigval))
        _say(code)
        return code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except RendezvousError as error:
        print(f"[arc] torchrun could not bring the nodes together: {error}", file=sys.stderr)
        return int(ExitCode.INFRASTRUCTURE)
    except ValueError as error:  # how torchrun refuses what its parser lets through
        print(f"[arc] torchrun: {error}", file=sys.stderr)
        return int(ExitCode.CONFIGURATION)
    finally:
        owned.close()
        _collect(arguments.arc_shm_root)


def _collect(shm_root: str | None) -> None:
    """Nobody is started again by this process, so nobody will take over what its ranks left in memory."""
    root = Path(shm_root) if shm_root else Env.read().shm_root
    try:
        collect_of_agent(root)
    except OSError as error:
        print(f"[arc] what the ranks left in {root} was not removed: {error}", file=sys.stderr)


def _leave_early_on_sigterm() -> None:
    """Until torchrun takes signals over, nothing runs that could be lost.

    No Python handler runs while torchrun waits in C++ for the store of another node, which may be minutes: so a thread
    hears of the signal too, and ends the process when the handler did not.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(int(ExitCode.PREEMPTED))

    heard, told = os.pipe()
    os.set_blocking(told, False)

    def watch() -> None:
        while number := os.read(heard, 1):
            if number[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is leave:
                time.sleep(_HANDLER_LIMIT_S)
                os._exit(int(ExitCode.PREEMPTED))

    signal.signal(signal.SIGTERM, leave)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=watch, name="arc-sigterm", daemon=True).start()


def _is_in_range(arguments: argparse.Namespace) -> bool:
    """Whether the numbers that torchrun would only meet with an assertion, or wait with, make sense; said if not."""
    workers, node = arguments.nproc_per_node, arguments.node_rank
    most = int(arguments.nnodes.rpartition(":")[2])
    is_static = arguments.rdzv_backend == "static" and not arguments.standalone
    problem = None
    if workers.lstrip("-").isdigit() and int(workers) < 1:
        problem = f"--nproc-per-node={workers}: a node needs one worker or more."
    elif arguments.max_restarts < 0:
        problem = f"--max-restarts={arguments.max_restarts} must not be negative; 0 is none."
    elif is_static and not 0 <= node < most:
        problem = f"--node-rank={node} does not fit --nnodes={arguments.nnodes}: nodes are numbered 0 to {most - 1}."
    if problem is not None:
        print(f"arcrun: {problem}", file=sys.stderr)
    return problem is None


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Env]:
    if any(argument in ("-h", "--help") for argument in _options_only(argv)):
        _parser().print_help()
        sys.exit(0)
    try:
        arguments = _parser().parse_args(list(argv))
    except SystemExit as ending:
        # argparse has said what is wrong; its 2 would pass for the script's own exit code.
        sys.exit(int(ExitCode.CONFIGURATION) if ending.code else 0)
    if arguments.no_python or arguments.run_path:
        print("arcrun: --no-python and --run-path cannot be guarded. Use torchrun for them.", file=sys.stderr)
        sys.exit(int(ExitCode.CONFIGURATION))
    env = _environment(arguments)
    _fit_to_grace(arguments, env)
    ours = settings_to_arguments(arguments, _PREFIX)
    module = ["-m"] if arguments.module else []
    arguments.training_script_args = [*ours, *module, arguments.training_script, *arguments.training_script_args]
    arguments.training_script = "arc_dist"
    arguments.module = True
    return arguments, env


def _environment(arguments: argparse.Namespace) -> Env:
    """What the supervisors will read, as far as it concerns torchrun too."""
    named = {
        "ARC_GRACE_S": arguments.arc_grace_s,
        "ARC_PREEMPT_SIGNALS": arguments.arc_preempt_signals,
        "ARC_HOST_TIMEOUT_S": arguments.arc_host_timeout_s,
        "ARC_SPARES": arguments.arc_spares,
        "ARC_SPARE_AFTER_S": arguments.arc_spare_after_s,
        "ARC_COORDINATOR": arguments.arc_coordinator,
    }
    try:
        return Env.read({**os.environ, **{name: value for name, value in named.items() if value is not None}})
    except ConfigError as error:
        print(f"arcrun: {error}", file=sys.stderr)
        sys.exit(int(ExitCode.CONFIGURATION))


def _fit_to_grace(arguments: argparse.Namespace, env: Env) -> None:
    """Lets torchrun hear the same notices, and wait as long as the grace period before it kills."""
    if arguments.shutdown_timeout is None and _TORCHRUN_VARIABLE not in os.environ:
        arguments.shutdown_timeout = max(_TORCHRUN_SHUTDOWN_S, math.ceil(env.grace_s))
    heard = arguments.signals_to_handle.split(",")
    heard += [signal.Signals(number).name for number in env.preempt_signals]
    arguments.signals_to_handle = ",".join(dict.fromkeys(heard))


def _parser() -> argparse.ArgumentParser:
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    parser.prog = "arcrun"
    parser.usage = "arcrun [torchrun options] [--arc-options] (train.py | -m module) [arguments]"
    parser.description = (
        "torchrun with a supervisor for every rank: a rank that dies is restarted within a fraction of a second, "
        "optimizer steps are guarded, and the exit code says what became of the job: 0 success, 75 preempted (retry), "
        "76 infrastructure (retry), 77 no progress, 78 configuration, else the script's own."
    )
    parser.allow_abbrev = False
    add_settings(parser, _PREFIX)
    return parser


def _options_only(argv: Sequence[str]) -> list[str]:
    """Arguments up to the first that is no option: `--help` after the script is the script's."""
    options: list[str] = []
    for argument in argv:
        if not argument.startswith("-"):
            break
        options.append(argument)
    return options


def _say(code: int) -> None:
    if code in _WORDS:
        print(f"[arc] exit code {code}: the job {_WORDS[code]}", file=sys.stderr)


if __name__ == "__main__":
    main()
