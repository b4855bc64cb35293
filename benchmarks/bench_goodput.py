"""Goodput of a real job whose ranks are killed at random, and what the model of `arc simulate` predicts for it.

Each arm is one job. Its time is cut into blocks of two windows. In the first, nothing happens but a few kills at its
end, which measure what a restart costs. In the second, a random rank is killed every few seconds, and goodput is
measured: committed steps x undisturbed step time / wall time. The step time, and what copies cost, come from all steps
long after a restart, so that other load on the machine, which drifts, weighs on both alike. The model gets these, what
restarts cost in the first windows, and the moments of the kills in the second.

    python benchmarks/bench_goodput.py                          # DDP and FSDP2
    python benchmarks/bench_goodput.py --arms ddp fsdp torchrun # and plain torchrun with DCP
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from arc_dist.planner.model import Copy, Fault, Plan, live
from stats import setting

SCRIPT = Path(__file__).with_name("goodput_job.py")
START_LIMIT_S = 180.0
RECOVERY_LIMIT_S = 120.0
RESTARTS = 3  # measured at the end of each quiet window
CERTIFY_STEPS = 2


class NoStepError(Exception):
    """A job did not start, or did not go on after a kill."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One committed step of one rank."""

    at_s: float
    rank: int
    pid: int
    step: int


@dataclasses.dataclass
class Window:
    """A stretch of wall time of a running job.

    Attributes:
        begin_s, end_s: monotonic.
        kills: when a rank was killed.
    """

    begin_s: float
    end_s: float
    kills: list[float]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the model is told, in seconds."""

    step_s: float
    snapshot_stall_s: float
    checkpoint_stall_s: float
    restart_s: float


class Job:
    """A running job of one arm and its log.

    Attributes:
        num_settled: steps after which new processes are as fast as ever and have a trusted snapshot of their own. No
            kill comes earlier: a job that makes no progress between kills is stopped, as it should be.
    """

    def __init__(self, arm: str, directory: Path, arguments: argparse.Namespace) -> None:
        self.arm = arm
        self.num_ranks = arguments.ranks
        self.num_settled = 2 * arguments.snapshot_every
        self.lines: list[Line] = []
        (directory / "steps").touch()
        self._reader = (directory / "steps").open()
        self._rest = ""
        self._old_pids: set[int] = set()
        self._num_before_kill = 0
        module = "torch.distributed.run" if arm == "torchrun" else "arc_dist.launch.arcrun"
        command = [sys.executable, "-m", module, "--standalone", f"--nproc-per-node={self.num_ranks}"]
        command += ["--max-restarts=1000"] if arm == "torchrun" else []
        command += [str(SCRIPT), arm, str(directory), f"--snapshot-every={arguments.snapshot_every}"]
        command += [f"--checkpoint-every={arguments.checkpoint_every}"]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "ARC_RUN_DIR": str(directory / "run"),
            "ARC_MAX_RESTARTS": "100000",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # about half of torchrun's restarts fail without it (torch 2.13)
        }
        self.output_path = directory / "output"
        self.output = self.output_path.open("wb")
        self.process = subprocess.Popen(
            command, env=environment, stdout=self.output, stderr=subprocess.STDOUT, start_new_session=True
        )

    def read(self) -> None:
        """Takes in what was committed since; a line being written waits."""
        whole, _, self._rest = (self._rest + self._reader.read()).rpartition("\n")
        for text in whole.splitlines():
            at_ns, rank, pid, step = map(int, text.split())
            self.lines.append(Line(at_ns / 1e9, rank, pid, step))

    def wait_for_steps(self, number: int, limit_s: float) -> list[float]:
        """Until each rank has committed `number` steps since the last kill; returns when all had their first, second...

        What a survivor of the kill still commits before it ends does not count.
        """
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            self.read()
            times: dict[int, list[float]] = {}
            for line in self.lines[self._num_before_kill :]:
                if line.pid not in self._old_pids:
                    times.setdefault(line.rank, []).append(line.at_s)
            if len(times) == self.num_ranks and all(len(of_rank) >= number for of_rank in times.values()):
                return [max(at) for at in zip(*times.values(), strict=False)]
            if self.process.poll() is not None:
                break
            time.sleep(0.01)
        text = "\n".join(self.output_path.read_text(errors="replace").splitlines()[-60:])
        raise NoStepError(f"the {self.arm} job made no step within {limit_s:.0f} s. Its last words:\n{text}")

    def kill(self, rng: random.Random) -> float:
        """SIGKILLs the process of a random rank, once all are settled since the last kill; returns when.

        A random number of steps more keeps kills from falling on the same step of each cycle of snapshots.
        """
        self.wait_for_steps(self.num_settled + rng.randrange(self.num_settled), RECOVERY_LIMIT_S)
        rank = rng.randrange(self.num_ranks)
        pid = next(line.pid for line in reversed(self.lines) if line.rank == rank)
        self._old_pids = {line.pid for line in self.lines[self._num_before_kill :]}
        self._num_before_kill = len(self.lines)
        os.kill(pid, signal.SIGKILL)
        return time.monotonic()

    def end(self) -> None:
        """Ends the launcher and its workers."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(40)  # torchrun gives its workers 30 s
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.read()
        for pid in {line.pid for line in self.lines[-1000:]}:
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                if str(SCRIPT).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
        self.output.close()
        self._reader.close()


@contextlib.contextmanager
def running(arm: str, arguments: argparse.Namespace) -> Iterator[Job]:
    """A job that has committed its first steps."""
    with tempfile.TemporaryDirectory(prefix="bench-goodput-") as directory:
        job = Job(arm, Path(directory), arguments)
        try:
            job.wait_for_steps(job.num_settled, START_LIMIT_S)
            yield job
        finally:
            job.end()


def quiet_window(job: Job, seconds: float, rng: random.Random) -> list[float]:
    """Nothing happens, then a few kills; returns the seconds from each kill until all was settled.

    The first steps of new processes are slower than later ones, so what a restart costs is seen only after some.
    """
    time.sleep(seconds)
    settled: list[float] = []
    for _ in range(RESTARTS):
        killed_s = job.kill(rng)
        settled.append(job.wait_for_steps(job.num_settled, RECOVERY_LIMIT_S)[job.num_settled - 1] - killed_s)
    return settled


def killing_window(job: Job, seconds: float, every_s: float, rng: random.Random) -> Window:
    """A random rank is killed, on average every `every_s`; a kill waits until all ranks train again."""
    begin_s = last_s = time.monotonic()
    window = Window(begin_s, begin_s, [])
    while True:
        at_s = last_s + every_s * rng.uniform(0.5, 1.5)
        if at_s >= begin_s + seconds:
            break
        time.sleep(max(0.0, at_s - time.monotonic()))
        last_s = job.kill(rng)
        window.kills.append(last_s)
    time.sleep(max(0.0, begin_s + seconds - time.monotonic()))
    job.wait_for_steps(1, RECOVERY_LIMIT_S)  # a window ends in training, so that a late kill costs its all
    window.end_s = time.monotonic()
    return window


def step_times(job: Job) -> list[tuple[int, float]]:
    """(step, seconds it took) of rank 0, for the steps of processes that have settled."""
    times: list[tuple[int, float]] = []
    num_of_pid = 0
    for before, after in itertools.pairwise(line for line in job.lines if line.rank == 0):
        num_of_pid = num_of_pid + 1 if after.pid == before.pid else 0
        if num_of_pid >= job.num_settled:
            times.append((after.step, after.at_s - before.at_s))
    return times


def measured_inputs(job: Job, settled: list[float], arguments: argparse.Namespace) -> Inputs:
    """Means, because goodput is a matter of sums; the median of restarts, which are few and have outliers under load.

    A copy's cost is what a whole cycle of copies took beyond as many steps without any; it contains what its
    certification and its writing in the background cost. A restart's is what the steps until all was settled took
    beyond as many steps, with copies, of other times.
    """
    times = step_times(job)
    is_plain = job.arm == "torchrun"
    every = arguments.checkpoint_every if is_plain else arguments.snapshot_every
    step_s = statistics.fmean(seconds for step, seconds in times if step % every >= CERTIFY_STEPS + 2)
    mean_s = statistics.fmean(seconds for _, seconds in times)
    stall_s = max(0.0, (mean_s - step_s) * every)
    restart_s = max(0.0, statistics.median(settled) - job.num_settled * mean_s)
    return Inputs(step_s, 0.0 if is_plain else stall_s, stall_s if is_plain else 0.0, restart_s)


def measured_goodput(job: Job, windows: list[Window], step_s: float) -> float:
    """Committed steps x undisturbed step time / wall time."""
    useful_s = 0.0
    for window in windows:
        before = [line.step for line in job.lines if line.rank == 0 and line.at_s <= window.begin_s]
        within = [line.step for line in job.lines if line.rank == 0 and window.begin_s < line.at_s <= window.end_s]
        useful_s += (within[-1] - before[-1]) * step_s
    return useful_s / sum(window.end_s - window.begin_s for window in windows)


def plan_of(arm: str, inputs: Inputs, arguments: argparse.Namespace) -> Plan:
    """The job as the model sees it."""
    memory = Copy(
        name="memory",
        interval_s=arguments.snapshot_every * inputs.step_s,
        stall_s=inputs.snapshot_stall_s,
        write_s=CERTIFY_STEPS * inputs.step_s,
        restore_s=0.0,
        at_multiples=False,
    )
    replica = Copy(
        name="replica",
        interval_s=inputs.step_s,
        stall_s=0.0,
        write_s=0.0,
        restore_s=0.0,
        at_multiples=False,
        is_fixed=True,
    )
    saved = Copy(
        name="store",
        interval_s=arguments.checkpoint_every * inputs.step_s,
        stall_s=inputs.checkpoint_stall_s,
        write_s=0.0,
        restore_s=0.0,
    )
    copies = {"ddp": (replica, memory), "fsdp": (memory,), "torchrun": (saved,)}[arm]
    survivors = frozenset(copy.name for copy in copies)
    kill = Fault(name="kill", survivors=survivors, detect_s=0.0, restart_s=inputs.restart_s)
    return Plan(name=arm, copies=copies, faults=(kill,))


def predicted_goodput(plan: Plan, windows: list[Window]) -> float:
    """The model's, for the same kills."""
    useful_s = 0.0
    for window in windows:
        kills = [(at_s - window.begin_s, "kill") for at_s in window.kills]
        useful_s += live(plan, kills, window.end_s - window.begin_s).useful_s
    return useful_s / sum(window.end_s - window.begin_s for window in windows)


def run_arm(arm: str, arguments: argparse.Namespace, rng: random.Random) -> bool:
    """Measures and predicts one arm, prints its rows; whether they agree within the tolerance."""
    settled: list[float] = []
    hurt: list[Window] = []
    with running(arm, arguments) as job:
        for _ in range(arguments.blocks):
            settled += quiet_window(job, arguments.window_s, rng)
            hurt.append(killing_window(job, arguments.window_s, arguments.every_s, rng))
        job.read()
        inputs = measured_inputs(job, settled, arguments)
        measured = measured_goodput(job, hurt, inputs.step_s)
    predicted = predicted_goodput(plan_of(arm, inputs, arguments), hurt)
    kills = sum(len(window.kills) for window in hurt)
    wall_s = sum(window.end_s - window.begin_s for window in hurt)
    stall_s = inputs.snapshot_stall_s + inputs.checkpoint_stall_s
    print(
        f"{arm:9} step {inputs.step_s * 1e3:.2f} ms, a copy costs {stall_s * 1e3:.2f} ms, restart"
        f" {inputs.restart_s:.3f} s, {kills} kills in {wall_s:.0f} s:"
        f" goodput {measured:.1%} measured, {predicted:.1%} predicted ({predicted / measured - 1:+.1%}, load"
        f" {os.getloadavg()[0]:.1f})",
        flush=True,
    )
    return abs(predicted / measured - 1) <= arguments.tolerance


def main() -> None:
    """Runs the arms one after the other and prints what was measured beside what was predicted."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=("ddp", "fsdp", "torchrun"), default=["ddp", "fsdp"])
    parser.add_argument("--ranks", type=int, default=4 if cores >= 4 else 2, help="4, or 2 on fewer than 4 cores")
    parser.add_argument("--blocks", type=int, default=6, help="pairs of a quiet window and one with kills, per arm")
    parser.add_argument("--window-s", type=float, default=10.0, help="length of each window")
    parser.add_argument("--every-s", type=float, default=3.0, help="mean time between kills")
    parser.add_argument("--snapshot-every", type=int, default=20, help="steps")
    parser.add_argument("--checkpoint-every", type=int, default=100, help="steps")
    parser.add_argument("--tolerance", type=float, default=0.1, help="relative difference of goodput that is allowed")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print((__doc__ or "").splitlines()[0])
    print(
        f"setting: {setting()}; {arguments.ranks} ranks, seed {arguments.seed}; a kill every {arguments.every_s} s,"
        f" a snapshot every {arguments.snapshot_every} steps, a checkpoint every {arguments.checkpoint_every}"
    )
    agree: list[bool] = []
    for arm in arguments.arms:
        try:
            agree.append(run_arm(arm, arguments, random.Random(f"{arguments.seed}:{arm}")))
        except NoStepError as error:
            if arm != "torchrun":
                raise SystemExit(str(error)) from error
            # Its restarts do not always succeed (bench_restart.py counts them); there is no goodput to compare then.
            print(f"{arm:9} did not go on after a kill: {str(error).splitlines()[0]}", flush=True)
    print(f"within {arguments.tolerance:.0%}: {sum(agree)} of {len(agree)}")
    if not all(agree):
        sys.exit(1)


if __name__ == "__main__":
    main()
