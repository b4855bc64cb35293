"""Real processes for tests: `run_ranks` forks ranks from a server that has imported torch, `run_job` runs a command.

A rank started this way costs about 0.05 s instead of the two seconds of a fresh interpreter that imports torch. Every
rank has its own process group and log file, a hard deadline, and ends with the test: no test can leave a process.

::

    def body(rank, world_size, scale):          # at module level: it is found by name in the rank
        t = torch.tensor([rank * scale])
        dist.all_reduce(t)
        return t.item()

    def test_sum():
        assert run_ranks(2, body, 10) == [10, 10]
"""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

PRELOAD = ["torch", "torch.distributed", "torch.nn.parallel", "torch.distributed.fsdp", "numpy", "pytest", "hypothesis"]
PEER_GRACE_S = 10.0  # after the first rank failed or died: how long the others may take to notice
EXIT_GRACE_S = 10.0  # after the body returned: how long a rank may take to exit


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankOutcome:
    """How one rank ended."""

    rank: int
    exit_code: int | None  # negative: the signal; None: it did not exit by itself and was killed by `run_ranks`
    value: Any = None  # what the body returned
    error: str | None = None  # traceback of what it raised
    output: str = ""  # stdout and stderr

    @property
    def ok(self) -> bool:
        return self.error is None and self.exit_code == 0


class RanksFailed(AssertionError):
    """Some rank raised, died or hung; the message holds the traceback, output and stacks of each."""


def run_ranks(
    world_size: int,
    body: Callable[..., Any],
    *args: Any,
    timeout_s: float = 60.0,
    env: Mapping[str, str] | None = None,
    init: bool = True,
    collective_timeout_s: float = 30.0,
) -> list[Any]:
    """Calls `body(rank, world_size, *args)` in `world_size` processes and returns what each returned, by rank.

    Args:
        world_size: number of processes.
        body: a function at module level; `args` and its result must survive pickling.
        timeout_s: all ranks are killed then, and their Python stacks reported.
        env: variables on top of the test's own environment.
        init: call `dist.init_process_group("gloo")` before the body. Without it, MASTER_ADDR and MASTER_PORT name a
            store that the test process hosts, and the body may call it itself.
        collective_timeout_s: the timeout given to init_process_group.

    Raises:
        RanksFailed: when any rank did not return.
    """
    outcomes = rank_outcomes(
        world_size,
        body,
        *args,
        timeout_s=timeout_s,
        env=env,
        init=init,
        collective_timeout_s=collective_timeout_s,
    )
    if not all(outcome.ok for outcome in outcomes):
        raise RanksFailed("\n".join(_describe(outcome) for outcome in outcomes))
    return [outcome.value for outcome in outcomes]


def rank_outcomes(
    world_size: int,
    body: Callable[..., Any],
    *args: Any,
    timeout_s: float = 60.0,
    env: Mapping[str, str] | None = None,
    init: bool = True,
    collective_timeout_s: float = 30.0,
) -> list[RankOutcome]:
    """As `run_ranks`, but returns how each rank ended: for tests in which ranks are meant to raise or die."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    directory = Path(tempfile.mkdtemp(prefix="ranks-"))
    context = _context()
    shared_env = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # no rank hosts the store, so any may die
        "WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        **(env or {}),
    }
    ranks: list[_Rank] = []
    try:
        for rank in range(world_size):
            rank_env = {**shared_env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            here, there = context.Pipe()
            task = (rank, world_size, body, args, there, rank_env, init, collective_timeout_s, str(directory))
            process = context.Process(target=_rank_main, args=task, name=f"rank{rank}")
            process.start()
            there.close()
            ranks.append(_Rank(rank=rank, process=process, pipe=here))
        _collect(ranks, deadline=time.monotonic() + timeout_s, directory=directory)
    finally:
        for one in ranks:
            one.end()
        outcomes = [one.outcome(directory) for one in ranks]
        shutil.rmtree(directory, ignore_errors=True)
    for outcome in outcomes:
        if outcome.output:
            print(f"--- rank {outcome.rank}\n{outcome.output}", end="")
    return outcomes


@dataclasses.dataclass(kw_only=True)
class _Rank:
    """The test process's handle on one rank."""

    rank: int
    process: Any
    pipe: Any
    reported: bool = False
    value: Any = None
    error: str | None = None
    killed: bool = False

    def receive(self) -> None:
        try:
            kind, payload = pickle.loads(self.pipe.recv_bytes())
        except EOFError:  # it died before it could say anything; the exit code tells
            self.error = self.error or "ended without a result"
            self.reported = True
            return
        self.reported = True
        if kind == "value":
            self.value = payload
        else:
            self.error = payload

    def end(self) -> None:
        """Kills what is left of the rank and of what it started (its process group)."""
        if self.process.is_alive():
            self.killed = True
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # already gone, with all its children
        if self.process.is_alive():
            self.process.kill()
        self.process.join(10)
        self.pipe.close()

    def outcome(self, directory: Path) -> RankOutcome:
        log = directory / f"rank{self.rank}.log"
        output = log.read_text(errors="replace") if log.exists() else ""
        error = self.error
        if self.killed and error is None:
            error = "did not exit after its body returned" if self.reported else "did not return before the deadline"
        exit_code = None if self.killed else self.process.exitcode
        return RankOutcome(rank=self.rank, exit_code=exit_code, value=self.value, error=error, output=output)


def _collect(ranks: list[_Rank], *, deadline: float, directory: Path) -> None:
    """Waits for a report of every rank; a failure shortens the deadline for the others."""
    while True:
        waiting = [one for one in ranks if not one.reported]
        remaining_s = deadline - time.monotonic()
        if not waiting:
            break
        if remaining_s <= 0:
            _dump_stacks(waiting, directory)
            return
        ready = multiprocessing.connection.wait([one.pipe for one in waiting], timeout=remaining_s)
        for one in waiting:
            if one.pipe in ready:
                one.receive()
                if one.error is not None:
                    deadline = min(deadline, time.monotonic() + PEER_GRACE_S)
    for one in ranks:  # all have reported: nobody needs anybody's sockets any more
        try:
            one.pipe.send_bytes(b"exit")
        except OSError:
            pass  # that rank is dead already; its outcome says so
    until = time.monotonic() + EXIT_GRACE_S
    for one in ranks:
        one.process.join(max(0.0, until - time.monotonic()))
    _dump_stacks([one for one in ranks if one.process.is_alive()], directory)


def _dump_stacks(ranks: Sequence[_Rank], directory: Path) -> None:
    """Makes stuck ranks write the stacks of all their threads to their logs."""
    asked = False
    for one in ranks:
        if one.process.is_alive() and (directory / f"rank{one.rank}.ready").exists():
            os.kill(one.process.pid, signal.SIGUSR1)
            asked = True
    if asked:
        time.sleep(0.5)  # faulthandler writes from the signal handler; it needs no cooperation, only a moment


def _describe(outcome: RankOutcome) -> str:
    state = "ok" if outcome.ok else f"exit code {outcome.exit_code}"
    text = f"=== rank {outcome.rank}: {state}"
    if outcome.error:
        text += f"\n{outcome.error.rstrip()}"
    if outcome.output:
        text += f"\n--- its output\n{outcome.output.rstrip()}"
    return text


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)  # without effect once the server runs
    return context


def _rank_main(
    rank: int,
    world_size: int,
    body: Callable[..., Any],
    args: tuple[Any, ...],
    pipe: Any,
    env: dict[str, str],
    init: bool,
    collective_timeout_s: float,
    directory: str,
) -> None:
    """What runs in the rank."""
    os.setpgid(0, 0)
    # The fork server ends when the test process does, and this rank with it.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    log = os.open(f"{directory}/rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.enable(file=2)  # type: ignore[arg-type]
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True, chain=False)  # type: ignore[arg-type]
    Path(directory, f"rank{rank}.ready").touch()
    os.environ.clear()
    os.environ.update(env)

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    failed = False
    try:
        if init:
            dist.init_process_group("gloo", timeout=timedelta(seconds=collective_timeout_s))
        report = ("value", body(rank, world_size, *args))
        # Plain pickle: multiprocessing's own would send tensors as file descriptors, which end with this process.
        message = pickle.dumps(report)
    except BaseException:  # noqa: BLE001 - whatever it is, it goes to the test
        message = pickle.dumps(("error", traceback.format_exc()))
        failed = True
    pipe.send_bytes(message)
    if failed:  # as an uncaught exception would: its peers see the connections close
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    try:
        pipe.recv_bytes()  # the others may still be reading from this rank's sockets
    except EOFError:
        pass  # the test has given up on the ranks
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class JobResult:
    """How a command ended."""

    exit_code: int | None  # None: it was killed at the deadline
    stdout: str
    stderr: str
    seconds: float

    def __repr__(self) -> str:  # so that `assert result.exit_code == 0, result` shows what was said
        ending = f"exit code {self.exit_code} after {self.seconds:.1f} s"
        return f"{ending}\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"


class Job:
    """A command with all the processes it starts, however they detach themselves; use it in a `with` statement.

    Every process is recognised by a mark in its environment, so that launchers that give their workers sessions of
    their own are cleaned up too.
    """

    def __init__(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
        self.mark = f"ARC_TEST_JOB={uuid.uuid4().hex}"
        name, _, value = self.mark.partition("=")
        self.argv = list(argv)
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {}), name: value}
        self.cwd = cwd

    def __enter__(self) -> Job:
        self.directory = Path(tempfile.mkdtemp(prefix="job-"))
        self.started = time.monotonic()
        with open(self.directory / "stdout", "wb") as out, open(self.directory / "stderr", "wb") as err:
            self.process = subprocess.Popen(
                self.argv, env=self.env, cwd=self.cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )
        return self

    def stdout(self) -> str:
        """What has been written so far."""
        return (self.directory / "stdout").read_text(errors="replace")

    def stderr(self) -> str:
        """What has been written so far."""
        return (self.directory / "stderr").read_text(errors="replace")

    def wait(self, timeout_s: float) -> JobResult:
        """Waits for the command; kills it and all its processes at the deadline."""
        exit_code: int | None
        try:
            exit_code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            exit_code = None
            self.kill()
        seconds = time.monotonic() - self.started
        return JobResult(exit_code=exit_code, stdout=self.stdout(), stderr=self.stderr(), seconds=seconds)

    def wait_for(self, condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
        """Polls until `condition()` is true and returns its value; fails with the output when the job ends first."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            value = condition()
            if value:
                return value
            if self.process.poll() is not None:
                value = condition()
                if value:
                    return value
                break
            time.sleep(0.01)
        state = "ended" if self.process.poll() is not None else "runs"
        raise AssertionError(
            f"waited for {what}; the job {state}\n--- stdout\n{self.stdout()}\n--- stderr\n{self.stderr()}"
        )

    def pids(self) -> list[int]:
        """All live processes that carry the job's mark."""
        return [pid for pid in _all_pids() if _has_mark(pid, self.mark)]

    def kill(self) -> None:
        """SIGKILLs every process of the job, until none is left."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        for _ in range(50):  # a process forked while we looked is found in the next round
            pids = self.pids()
            if not pids:
                return
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass  # it ended by itself
            time.sleep(0.02)
        raise AssertionError(f"processes {pids} of the job {self.argv} cannot be killed")

    def __exit__(self, *exc_info: object) -> None:
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)


def run_job(
    argv: Sequence[str], *, timeout_s: float = 60.0, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> JobResult:
    """Runs a command to its end and leaves none of its processes behind."""
    with Job(argv, env=env, cwd=cwd) as job:
        return job.wait(timeout_s)


def torchrun(num_ranks: int, *args: str) -> list[str]:
    """The command `torchrun --standalone --nproc-per-node=num_ranks args...` with this interpreter."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    return [*launcher, *args]


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()]


def _has_mark(pid: int, mark: str) -> bool:
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False  # gone, or another user's
    return state != "Z" and mark.encode() in environ.split(b"\0")
