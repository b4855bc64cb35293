"""Whole jobs for tests: a command with all its processes, or supervisors without the cost of starting them.

::

    done = run_job(torchrun(2, "-m", "arc_dist", "train.py"), cwd=tmp_path)      # as a user would: 5 s of imports
    done = run_supervised(2, "train.py", cwd=tmp_path)                           # the same without torchrun: 0.3 s
    assert done.exit_code == 0, done
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing.connection
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import forkserver

TESTS = Path(__file__).resolve().parent
END_GRACE_S = 20.0  # after one supervisor failed: how long the others may take to end by themselves


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
        return _read(self.directory / "stdout")

    def stderr(self) -> str:
        """What has been written so far."""
        return _read(self.directory / "stderr")

    def wait(self, timeout_s: float) -> JobResult:
        """Waits for the command; kills it and all its processes at the deadline."""
        exit_code: int | None
        try:
            exit_code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            exit_code = None
            if "PYTHONFAULTHANDLER" in self.env:
                self._dump_stacks()
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

    def _dump_stacks(self) -> None:
        """Each process of a job that hangs tells, on its standard error, where its threads are."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                name = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")[:120]
                with open(self.directory / "stderr", "ab") as err:
                    err.write(b"--- stacks of process %d: %s\n" % (pid, name))
                os.kill(pid, signal.SIGABRT)
                time.sleep(0.3)

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


def run_supervised(
    num_ranks: int,
    *arguments: str,
    timeout_s: float = 60.0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> JobResult:
    """Runs `python -m arc_dist arguments...` on every rank and waits for all.

    What torchrun would do is done here: environment, the agent's store, collecting exit codes. The supervisors are
    forked from the fork server; what they start is theirs, as always. The exit code is that of the supervisor that
    failed first, or minus the signal that ended it.
    """
    return _run(num_ranks, ("-m", "arc_dist", *arguments), timeout_s=timeout_s, env=env, cwd=cwd)


def run_plain(
    num_ranks: int,
    script: str,
    *arguments: str,
    timeout_s: float = 60.0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> JobResult:
    """Runs `python script arguments...` on every rank, as plain torchrun would; see `run_supervised`."""
    return _run(num_ranks, (script, *arguments), timeout_s=timeout_s, env=env, cwd=cwd)


def _run(
    num_ranks: int, command: Sequence[str], *, timeout_s: float, env: Mapping[str, str] | None, cwd: Path | None
) -> JobResult:
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    directory = Path(tempfile.mkdtemp(prefix="job-"))
    started = time.monotonic()
    job_env = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RUN_ID": uuid.uuid4().hex,
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "OMP_NUM_THREADS": "1",
        **(env or {}),
    }
    ranks: list[Any] = []
    try:
        for rank in range(num_ranks):
            rank_env = {**job_env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            target = (rank_env, str(directory), str(cwd or os.getcwd()), list(command))
            process = forkserver.context().Process(target=_python, args=target, name=f"rank{rank}")
            process.start()
            ranks.append(process)
        exit_code = _await(ranks, deadline=started + timeout_s)
    finally:
        for process in ranks:
            forkserver.kill_group(process)
        seconds = time.monotonic() - started
        output = {name: _read(directory / name) for name in ("stdout", "stderr")}
        shutil.rmtree(directory, ignore_errors=True)
    return JobResult(exit_code=exit_code, stdout=output["stdout"], stderr=output["stderr"], seconds=seconds)


def _await(processes: Sequence[Any], *, deadline: float) -> int | None:
    """The exit code of the process that failed first, 0 when all ended well, None at the deadline."""
    failed: int | None = None
    waiting = list(processes)
    while waiting:
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            return failed
        ready = multiprocessing.connection.wait([process.sentinel for process in waiting], timeout=remaining_s)
        for process in [process for process in waiting if process.sentinel in ready]:
            process.join()
            waiting.remove(process)
            if process.exitcode != 0 and failed is None:
                failed = process.exitcode
                deadline = min(deadline, time.monotonic() + END_GRACE_S)
    return failed or 0


def _python(env: dict[str, str], directory: str, cwd: str, command: list[str]) -> None:
    """Goes on as `python *command` would."""
    forkserver.settle_in(env, Path(directory, "stdout"), Path(directory, "stderr"))
    os.chdir(cwd)
    with open(os.devnull) as null:
        os.dup2(null.fileno(), 0)
    # The script shall see the modules that it would see when started by hand.
    sys.path[:] = [entry for entry in sys.path if Path(entry).parent != TESTS.parent]
    try:
        if command[0] == "-m":
            sys.path.insert(0, cwd)
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(command[0]).resolve().parent))
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
    finally:
        sys.stdout.flush()


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()]


def _has_mark(pid: int, mark: str) -> bool:
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False  # gone, or another user's
    return state != "Z" and mark.encode() in environ.split(b"\0")
