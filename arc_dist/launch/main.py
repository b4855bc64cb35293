"""`python -m arc_dist`: from the command line to a supervisor, and in its trainers to the user's script."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from arc_dist.config import Env
from arc_dist.errors import ArcError, ConfigError, ExitCode, LeftOut
from arc_dist.launch import endings
from arc_dist.launch import options as command_line
from arc_dist.supervisor import process, script, zygote
from arc_dist.supervisor.membership import Membership

# Imported once, in the supervisor. torch._dynamo: DDP and optimizers import it (about 1 s) as soon as they are used.
_PRELOADED = ("torch", "torch.distributed", "torch._dynamo", "numpy.random")
_SAID_WITHIN_S = 15.0
# What a guarded trainer imports of ours, as far as it is installed.
_OWN_PRELOADED = ("arc_dist.hooks", "arc_dist.arc", "arc_dist.loop")


def start() -> Callable[[], NoReturn]:
    """Runs the supervisor, which ends the process. Returns in trainers only, with what they are to run.

    A trainer returns all the way up, so that the script's exceptions and exit meet a nearly empty stack.
    """
    if os.name != "posix" or not os.path.isdir("/proc/self"):
        _fail(ConfigError("the supervisor needs Linux (/proc, fork, prctl). Run the script without it."), says=True)
    options = command_line.parse(sys.argv[1:])
    if options.zygote is not None:
        return _take_zygotes_place(options)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Were the agent killed, the job would go on without it, beside the one that is started in its place.
        process.die_with_parent(os.getppid())
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        verdict = endings.verdict(endings.directory_from_environ())
        if verdict is not None:
            _leave(verdict)
    endings.begin(endings.directory_from_environ(), _local_rank())
    try:
        options.target.check()
        os.environ.update(options.environ)
        env = Env.read()
        if not options.no_guard:
            _leave_early_on(env.preempt_signals)
        membership = Membership.read(os.environ, spares=env.spares)
        _preload(options)
    except ArcError as error:
        _fail(error, says=_local_rank() == "0")
    forked = zygote.fork_zygote()
    if isinstance(forked, zygote.ZygoteProcess):
        _supervise(env, membership, forked, is_guarded=not options.no_guard)
    return functools.partial(_run_script, options)


def _leave_early_on(numbers: Sequence[int]) -> None:
    """Until the supervisor takes signals over, a notice finds nothing that could be lost."""
    owner = os.getpid()

    def leave(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            _leave(int(ExitCode.PREEMPTED))

    for number in numbers:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, leave)


def _supervise(env: Env, membership: Membership, forked: zygote.ZygoteProcess, *, is_guarded: bool) -> NoReturn:
    from arc_dist.supervisor import host  # after the fork: it imports HTTP and stores, and starts threads

    try:
        ending = host.supervise(env, membership, forked, is_guarded=is_guarded)
    except ArcError as error:
        _fail(error, says=True)
    except KeyboardInterrupt:  # before the supervisor took signals over
        _leave(-signal.SIGINT)
    except BaseException:  # noqa: BLE001  # whatever it is, the trainer and the shared memory must not stay behind
        traceback.print_exc()
        _leave(int(ExitCode.INFRASTRUCTURE))
    _leave(ending.returncode, was_told=ending.was_told)


def _take_zygotes_place(options: command_line.Options) -> Callable[[], NoReturn]:
    assert options.zygote is not None
    descriptor, supervisor_pid = options.zygote
    process.die_with_parent(supervisor_pid)
    _preload(options)
    sock = socket.socket(fileno=descriptor)
    sock.set_inheritable(False)
    zygote.serve(sock)
    return functools.partial(_run_script, options)


def _preload(options: command_line.Options) -> None:
    if options.no_preload:
        return
    zygote.preload(_PRELOADED)
    zygote.preload(("arc_dist.launch.steps",) if options.no_guard else _OWN_PRELOADED)
    zygote.preload(options.preload)


def _run_script(options: command_line.Options) -> NoReturn:
    env = Env.read()
    if env.plan is not None and env.plan.get("flush"):
        _save_from_memory(env)
    if not options.no_guard:
        from arc_dist.hooks import guard_script

        guard_script()
    elif not options.no_preload:
        from arc_dist.launch.steps import count_steps

        assert env.shm_dir is not None, "the supervisor gives its trainers a directory"
        count_steps(env.shm_dir, env.generation)
    script.run(options.target)


def _save_from_memory(env: Env) -> NoReturn:
    """Instead of the script, whose process is gone: see `arc_dist.flush`."""
    for number in zygote.FORWARDED_SIGNALS:  # they were notices, and are being heeded; SIGKILL still ends this
        signal.signal(number, signal.SIG_IGN)
    from arc_dist.flush import flush

    script.run_call(lambda: flush(env))


def _local_rank() -> str:
    return os.environ.get("LOCAL_RANK", "0")


def _fail(error: ArcError, *, says: bool) -> NoReturn:
    """Ends with the error's exit code. What is wrong for all ranks alike is said once per host.

    The others let the one that says it go first: torchrun ends all workers as soon as one is gone, also that one before
    its word. Who is still there after a while is alone with its error, and says it itself.
    """
    if not says:
        time.sleep(_SAID_WITHIN_S)
    print(f"[arc] {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    _leave(int(error.exit_code), is_left_out=isinstance(error, LeftOut))


def _leave(returncode: int, *, was_told: bool = False, is_left_out: bool = False) -> NoReturn:
    """Ends the process as the trainer ended: with its exit code, or by the signal that ended it.

    Without the interpreter's own end: daemon threads and stores are no reason to wait or to crash there.
    """
    directory = endings.directory_from_environ()
    endings.leave(directory, _local_rank(), returncode, was_told=was_told, is_left_out=is_left_out)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if returncode < 0:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the trainer's core is the interesting one
        with contextlib.suppress(OSError, ValueError):  # SIGKILL takes no handler
            signal.signal(-returncode, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [-returncode])
        os.kill(os.getpid(), -returncode)
        returncode = 128 - returncode
    os._exit(returncode)
