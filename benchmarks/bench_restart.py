"""From the SIGKILL of one rank to the first new step that all committed: ours, and torchrun with a DCP checkpoint.

Ours comes in two arms: all processes are forked anew ("arc"), or the survivors stay in theirs ("resilient"). Beside
them stands the floor of the second: two processes destroy their gloo group and make another.

All arms run in turn on the same machine with the same model (DDP, gloo) and data: an MLP of 94K parameters, or a GPT
of 10.1M that each new process builds anew in every arm. torchrun's arm saves with torch.distributed.checkpoint every
100 steps and goes on from there; it is given TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, without which about half of its
restarts fail (torch 2.13). A restart that brings no new step within the limit counts as failed, and its job is started
anew. "Death seen": from the kill to our supervisor's knowing of it.

    python benchmarks/bench_restart.py --kills 50 --torchrun-kills 10
    python benchmarks/bench_restart.py --model gpt10m --ranks 4 --kills 20 --torchrun-kills 5 --between 10
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from stats import describe, setting

SCRIPT = Path(__file__).with_name("restart_job.py")
START_LIMIT_S = 120.0


@dataclasses.dataclass
class Trainer:
    """What one training process has committed."""

    rank: int
    pid: int
    generation: int
    first_at_s: float
    first_step: int
    last_step: int
    num_steps: int = 1
    last_at_s: float = 0.0

    @property
    def key(self) -> tuple[int, int]:
        """A process that stays is another one in each generation."""
        return self.pid, self.generation


@dataclasses.dataclass(frozen=True)
class Restart:
    """What one kill (at this time of the wall clock) cost; `seconds` is None when training did not go on in time."""

    seconds: float | None
    lost_steps: int
    killed_at: float
    survivors_s: float | None = None  # until the first new step of the ranks that were not killed
    num_stayed: int = 0  # ranks that went on in the same process


class Job:
    """A running job of one arm, and its log of committed steps."""

    def __init__(self, arm: str, directory: Path, options: argparse.Namespace) -> None:
        self.arm = arm
        self.options = options
        self.directory = directory
        self.shm_root = Path(tempfile.mkdtemp(prefix="bench-restart-", dir="/dev/shm"))
        (directory / "steps").touch()
        self._reader = (directory / "steps").open()
        self._rest = ""
        self._trainers: dict[tuple[int, int], Trainer] = {}
        self.steps_s: list[float] = []  # between two steps of a rank, from its fifth on
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
        wrapper = ["-m", "arc_dist"] if arm != "torchrun" else []
        retries = [] if arm != "torchrun" else ["--max-restarts=1000"]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "ARC_RUN_DIR": str(directory / "run"),
            "ARC_SHM_ROOT": str(self.shm_root),
            "ARC_MAX_RESTARTS": "100000",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        self.output_path = directory / "output"
        self.output = self.output_path.open("wb")
        command = [*launcher, *retries, *wrapper, str(SCRIPT), arm, options.model, str(directory)]
        command += ["--store"] if options.store else []
        command += options.extra
        self.process = subprocess.Popen(
            command, env=environment, stdout=self.output, stderr=subprocess.STDOUT, start_new_session=True
        )

    def read(self) -> list[Trainer]:
        """All training processes that have committed a step, oldest first; a line being written waits."""
        text = self._rest + self._reader.read()
        whole, _, self._rest = text.rpartition("\n")
        for line in whole.splitlines():
            at_ns, rank, pid, generation, step = map(int, line.split())
            trainer = self._trainers.get((pid, generation))
            if trainer is None:
                self._trainers[pid, generation] = Trainer(rank, pid, generation, at_ns / 1e9, step, step)
            else:
                if trainer.num_steps >= 5:
                    self.steps_s.append(at_ns / 1e9 - trainer.last_at_s)
                trainer.last_at_s = at_ns / 1e9
                trainer.last_step = max(trainer.last_step, step)
                trainer.num_steps += 1
        return list(self._trainers.values())

    def wait_for_steps(
        self, number: int, *, besides: frozenset[tuple[int, int]], limit_s: float
    ) -> list[Trainer] | None:
        """Waits until every rank has a trainer, not one of `besides`, that committed `number` steps."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            fresh = {t.rank: t for t in self.read() if t.key not in besides and t.num_steps >= number}
            if len(fresh) == self.options.ranks:
                return list(fresh.values())
            if self.process.poll() is not None:
                return None
            time.sleep(0.01)
        return None

    def incidents(self, kind: str) -> list[dict[str, Any]]:
        """What was noted of one kind; nothing without supervisors."""
        path = self.directory / "run" / "incidents.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line["kind"] == kind]

    def builds(self) -> list[float]:
        """Seconds that each process took to build the model and to wrap it."""
        return [float(line) for line in (self.directory / "builds").read_text().splitlines()]

    def end(self) -> None:
        """Ends the launcher and its workers."""
        self.process.send_signal(signal.SIGTERM)
        pids = {trainer.pid for trainer in self.read()}
        try:
            self.process.wait(40)  # torchrun gives its workers 30 s
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                if str(SCRIPT).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
        self.output.close()
        self._reader.close()
        shutil.rmtree(self.shm_root)


@contextlib.contextmanager
def running(arm: str, options: argparse.Namespace) -> Iterator[Job]:
    """A job that has committed its first steps."""
    with tempfile.TemporaryDirectory(prefix="bench-restart-") as directory:
        job = Job(arm, Path(directory), options)
        try:
            if job.wait_for_steps(options.between, besides=frozenset(), limit_s=START_LIMIT_S) is None:
                raise SystemExit(f"the {arm} job did not start:\n{job.output_path.read_text(errors='replace')}")
            yield job
        finally:
            job.end()


def kill_one(job: Job, rank: int, rng: random.Random, number: int = signal.SIGKILL) -> Restart:
    """Kills (or stops) a rank at a random moment and measures until all ranks have committed a new step."""
    limit_s = job.options.limit_s
    time.sleep(rng.uniform(0.05, 0.25))
    before = job.read()
    old = frozenset(trainer.key for trainer in before)
    victim = {trainer.rank: trainer.pid for trainer in before}[rank]
    os.kill(victim, number)
    killed_at_s, killed_at = time.monotonic(), time.time()
    fresh = job.wait_for_steps(1, besides=old, limit_s=limit_s)
    if fresh is None:
        return Restart(None, 0, killed_at)
    seconds = max(trainer.first_at_s for trainer in fresh) - killed_at_s
    last = max(trainer.last_step for trainer in before)
    first = min(trainer.first_step for trainer in fresh)
    survivors_s = max((t.first_at_s for t in fresh if t.rank != rank), default=killed_at_s) - killed_at_s
    stayed = {trainer.pid for trainer in before} & {trainer.pid for trainer in fresh}
    settled = job.wait_for_steps(job.options.between, besides=old, limit_s=limit_s)
    lost = max(0, last + 1 - first)
    return Restart(seconds if settled else None, lost, killed_at, survivors_s, len(stayed))


@dataclasses.dataclass
class Measured:
    """What the blocks of one arm gave: each kill's cost, when the supervisor knew of it, and the builds; in seconds."""

    restarts: list[Restart] = dataclasses.field(default_factory=list)
    seen: list[float] = dataclasses.field(default_factory=list)
    builds: list[float] = dataclasses.field(default_factory=list)
    steps: list[float] = dataclasses.field(default_factory=list)


def measure(arm: str, kills: int, rng: random.Random, options: argparse.Namespace, measured: Measured) -> None:
    """One block: a job that is hurt `kills` times, its ranks in turn. A job that does not recover ends the block."""
    results: list[Restart] = []
    with running(arm, options) as job:
        for number in range(kills):
            results.append(kill_one(job, number % options.ranks, rng))
            if options.verbose:
                print(f"{arm}: kill {number}: {results[-1]}")
            if results[-1].seconds is None:
                print(f"{arm}: kill {number} of this job was not recovered from; its last words:", file=sys.stderr)
                print("\n".join(job.output_path.read_text(errors="replace").splitlines()[-60:]), file=sys.stderr)
                break
        if options.verbose:
            print(job.output_path.read_text(errors="replace"))
        seen = [line["died_at"] for line in job.incidents("rank_died")]
        measured.seen += [at - restart.killed_at for restart, at in zip(results, seen, strict=False)]
        measured.builds += job.builds()
        measured.steps += job.steps_s
    measured.restarts += results


def report(name: str, measured: Measured) -> None:
    """Prints one arm's rows."""
    results, seen = measured.restarts, measured.seen
    seconds = [r.seconds for r in results if r.seconds is not None]
    lost = [r.lost_steps for r in results if r.seconds is not None]
    worst = f", worst {max(seconds):.3f} s" if seconds else ""
    print(f"{name:9} recovered {len(seconds)} of {len(results)}: {describe(seconds, 's')}{worst}", end="")
    hurt = sum(1 for steps in lost if steps)
    print(f"; committed steps lost by {hurt} of {len(lost)} kills, {max(lost)} at most" if lost else "")
    if name == "resilient" and seconds:
        stayed = [r.num_stayed for r in results if r.seconds is not None]
        survivors = [r.survivors_s for r in results if r.survivors_s is not None]
        print(f"{name:9} survivors' own first step after {describe(survivors, 's')}; {sum(stayed)} processes stayed")
    if seen:
        milliseconds = [1e3 * value for value in seen]
        print(f"{name:9} death seen after {describe(milliseconds, 'ms', 1)}, worst {max(milliseconds):.1f} ms")
    builds, steps = describe(measured.builds, "s"), describe(measured.steps, "s")
    print(f"{name:9} in it, the script's own build of the model {builds}, and a step {steps}")


def measure_floor(times: int) -> list[float]:
    """How long two processes take to destroy their gloo group and to make another, in seconds, each time."""
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(times + 1)]
    context = multiprocessing.get_context("spawn")
    found = context.SimpleQueue()
    ports = [store.port for store in stores]
    ranks = [context.Process(target=_rebuild, args=(rank, ports, found)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    seconds = found.get()
    for rank in ranks:
        rank.join()
    return seconds


def _rebuild(rank: int, ports: list[int], found: Any) -> None:
    seconds: list[float] = []
    for number, port in enumerate(ports):
        began = time.monotonic()
        if number:
            dist.destroy_process_group()
        store = TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        dist.all_reduce(torch.ones(1))
        if number:
            seconds.append(time.monotonic() - began)
    if rank == 0:
        found.put(seconds)
    dist.destroy_process_group()


def main() -> None:
    """Runs all arms in interleaved blocks and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("mlp", "gpt10m"), default="mlp")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--between", type=int, default=30, help="steps from a restart to the next kill")
    parser.add_argument("--kills", type=int, default=50, help="of our arm")
    parser.add_argument("--resilient-kills", type=int, default=50, help="of our arm whose survivors stay")
    parser.add_argument("--torchrun-kills", type=int, default=10, help="of torchrun's arm")
    parser.add_argument("--blocks", type=int, default=5, help="jobs per arm, the arms in turn")
    parser.add_argument("--store", action="store_true", help="our arm writes checkpoints every 100 steps too")
    parser.add_argument("--limit-s", type=float, default=60.0, help="a restart that takes longer has failed")
    parser.add_argument("--verbose", action="store_true", help="every kill, and what the jobs print")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.extra = []
    rng = random.Random(arguments.seed)
    print((__doc__ or "").splitlines()[0])
    job = f"{arguments.model} on {arguments.ranks} ranks, seed {arguments.seed}"
    print(f"setting: {setting()}; {job}; medians with 95 % intervals")
    wanted = {"arc": arguments.kills, "resilient": arguments.resilient_kills, "torchrun": arguments.torchrun_kills}
    floor: list[float] = []
    results = {arm: Measured() for arm in wanted}
    while any(len(results[arm].restarts) < number for arm, number in wanted.items()):
        floor += measure_floor(5)
        for arm, number in wanted.items():
            missing = number - len(results[arm].restarts)
            if missing > 0:
                measure(arm, min(missing, -(-number // arguments.blocks)), rng, arguments, results[arm])
    for arm in (name for name, number in wanted.items() if number):
        report(arm, results[arm])
    print(f"floor     a gloo group of two destroyed and made: {describe(floor, 's')}")
    medians = {
        arm: statistics.median(seconds)
        for arm in wanted
        if (seconds := [r.seconds for r in results[arm].restarts if r.seconds is not None])
    }
    for name, base in (("torchrun", "arc"), ("resilient", "arc")):
        if name in medians and base in medians:
            print(f"ratio of the medians, {name} / {base}: {medians[name] / medians[base]:.2f}")
    if "resilient" in medians:
        print(f"ratio of the medians, resilient / floor: {medians['resilient'] / statistics.median(floor):.2f}")


if __name__ == "__main__":
    main()
