"""Real rank processes for tests: `run_ranks` forks them from a server that has imported torch.

A rank started this way costs about 0.05 s instead of the two seconds of a fresh interpreter that imports torch. Every
rank has its own process group and log file, a hard deadline, and ends with the test: no test can leave a process.

::

    def body(rank, world_size, scale):          # at module level: it is found by name in the rank
        t = torch.tensor([rank * scale])
        dist.all_reduce(t)
        return t.item()

    def test_sum():
        assert run_ranks(2, body, 10) == [10, 10]

`Job`, `run_job`, `run_supervised` and `run_plain` (jobs.py) are for whole jobs.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import forkserver
from jobs import Job, JobResult, run_job, run_plain, run_supervised, torchrun

__all__ = [
    "Job",
    "JobResult",
    "RankOutcome",
    "RanksFailed",
    "rank_outcomes",
    "run_job",
    "run_plain",
    "run_ranks",
    "run_supervised",
    "torchrun",
]

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
    context = forkserver.context()
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
        forkserver.kill_group(self.process)
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
    log = Path(directory, f"rank{rank}.log")
    forkserver.settle_in(env, log, log)
    faulthandler.enable(file=2)  # type: ignore[arg-type]
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True, chain=False)  # type: ignore[arg-type]
    Path(directory, f"rank{rank}.ready").touch()

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
