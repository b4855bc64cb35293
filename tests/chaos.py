"""Live jobs of four ranks that random faults strike, one after the other and into each other's recovery.

A seed gives a plan of faults; the script of the job (scripts/chaos_toy.py) carries them out from inside. This side
plays the cluster manager, which starts the command again when it ended with a code that says so, and afterwards checks
what must hold whatever happened: the job ends well, bitwise as if nothing had happened, no rank ever had two live
trainers, and nothing is left behind.

::

    outcome = run(make_plan(seed), directory)
    outcome.check(undisturbed_digests)
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from arc_dist.supervisor.process import start_ticks
from ranks import Job
from toy import Toy

WORLD_SIZE = 4
SCRIPT = str(Path(__file__).parent / "scripts" / "chaos_toy.py")
_STARTS = 6  # of the command, by the cluster manager
_TRY_AGAIN = frozenset({75, 76, 137, 143, -9, -15})
_AGENT_RESTARTS = 50
_SPACING = 4  # steps between two faults that are not meant to meet
_FAREWELL_LIMIT_S = 30.0
_STACKS_S = 2.0  # for stuck trainers to write where they are
_TORCHS_OWN = ("torchelastic_", "torchinductor_")  # torchrun's logs, which it keeps; torch's cache

LIGHT_KINDS = ("kill", "kill", "several", "raise", "exit", "stop")
HEAVY_KINDS = ("supervisor", "zygote", "agent")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault.

    Attributes:
        number: names it; its mark is the file ``fired-<number>``.
        kind: "kill" (of trainers), "raise", "exit", "stop" (SIGSTOP, then SIGKILL), "supervisor", "zygote", "agent".
        by: the rank that carries it out.
        place: where in the script: "start", "joined", "restore", "restored", "loss", "body", "save", "saved".
        step: not before this step.
        ranks: whom it strikes.
        after: number of a fault that must have struck before; None for none.
        delay_s: after reaching the place (for "stop": between the two signals).
    """

    number: int
    kind: str
    by: int
    place: str
    step: int
    ranks: tuple[int, ...]
    after: int | None = None
    delay_s: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What one job trains and what strikes it."""

    seed: int
    toy: Toy
    faults: tuple[Fault, ...]


def make_plan(seed: int, *, num_faults: int, heavy: tuple[str, ...] = ()) -> Plan:
    """A random plan: light faults, each perhaps followed by one into its recovery, and the heavy ones named.

    Two faults that meet bring one generation without progress, and three of these end a job by design; so never more
    than one fault follows another.
    """
    rng = random.Random(seed)
    faults: list[Fault] = []
    step = 1
    heavy_at = {rng.randrange(1, num_faults): kind for kind in heavy}
    while len(faults) < num_faults:
        if not faults and rng.random() < 0.3:
            faults.append(_second(rng, 0, after=None))  # during the first start
            continue
        step += rng.randint(2, _SPACING)
        due = next((kind for at, kind in sorted(heavy_at.items()) if at <= len(faults)), None)
        if due is not None:
            heavy_at = {at: kind for at, kind in heavy_at.items() if kind != due}
        faults.append(_first(rng, len(faults), step, due))
        if len(faults) < num_faults and due != "agent" and rng.random() < 0.4:
            faults.append(_second(rng, len(faults), after=len(faults) - 1))
    toy = Toy(kind=("ddp", "fsdp")[seed % 2], steps=step + 10, samples=2048)
    return Plan(seed=seed, toy=toy, faults=tuple(faults))


def _first(rng: random.Random, number: int, step: int, heavy: str | None) -> Fault:
    by = rng.randrange(WORLD_SIZE)
    if heavy is not None:
        return Fault(number=number, kind=heavy, by=by, place="body", step=step, ranks=(rng.randrange(WORLD_SIZE),))
    kind = rng.choice(LIGHT_KINDS)
    if kind == "several":
        ranks = tuple(rng.sample(range(WORLD_SIZE), rng.randint(2, WORLD_SIZE)))
        return Fault(number=number, kind="kill", by=by, place=rng.choice(("loss", "body")), step=step, ranks=ranks)
    if kind == "stop":
        other = (by + rng.randrange(1, WORLD_SIZE)) % WORLD_SIZE
        return Fault(
            number=number, kind=kind, by=by, place="body", step=step, ranks=(other,), delay_s=rng.uniform(0.05, 0.5)
        )
    place = rng.choice(("loss", "body", "save", "saved") if kind != "raise" else ("loss", "body"))
    return Fault(number=number, kind=kind, by=by, place=place, step=step, ranks=(by,))


def _second(rng: random.Random, number: int, *, after: int | None) -> Fault:
    """A fault into the start of a generation: of the first one, or of the recovery from fault `after`."""
    by = rng.randrange(WORLD_SIZE)
    places = ("start", "joined") if after is None else ("start", "joined", "restore", "restored")
    place = rng.choice(places)
    delay_s = rng.choice((0.0, rng.uniform(0.001, 0.3))) if place in ("start", "joined") else 0.0
    return Fault(number=number, kind="kill", by=by, place=place, step=0, ranks=(by,), after=after, delay_s=delay_s)


@dataclasses.dataclass(kw_only=True)
class Outcome:
    """What became of a plan; `check` judges it."""

    plan: Plan
    directory: Path
    exit_codes: list[int | None]
    seconds: float
    output: str
    processes_left: list[int]

    def check(self, undisturbed: list[str]) -> None:
        """Asserts every invariant; the failure says how to repeat it."""
        problems = list(self._problems(undisturbed))
        assert not problems, self.story(problems)

    def _problems(self, undisturbed: list[str]) -> Iterator[str]:
        out = self.directory / "out"
        if not self.exit_codes or self.exit_codes[-1] != 0:
            yield f"the job did not end well: exit codes {self.exit_codes}"
        yield from self._faults_that_did_not_strike()
        two = out / "two-live-trainers"
        if two.exists():
            yield f"a rank had two live trainers: {two.read_text()}"
        for rank in range(WORLD_SIZE):
            generations = [life["generation"] for life in lives(out, rank)]
            if generations != sorted(set(generations)):
                yield f"generations of rank {rank} do not grow: {generations}"
        digests = [json.loads(path.read_text())["digest"] for path in sorted(out.glob("result-*.json"))]
        if digests != undisturbed:
            yield f"the result is not that of the undisturbed run: {digests} instead of {undisturbed}"
        if self.processes_left:
            yield f"processes are left: {self.processes_left}"
        for what in ("shm", "tmp"):
            left = [path.name for path in (self.directory / what).iterdir() if not path.name.startswith(_TORCHS_OWN)]
            if left:
                yield f"left behind in {what}: {left}"

    def _faults_that_did_not_strike(self) -> Iterator[str]:
        out = self.directory / "out"
        struck = {entry["number"]: entry for entry in read_lines(out / "struck")}
        for fault in self.plan.faults:
            entry = struck.get(fault.number)
            if entry is None:
                yield f"{fault} did not strike"
            elif len(entry["missed"]) == len(fault.ranks) > 0:
                yield f"{fault} found nobody alive"

    def story(self, problems: list[str]) -> str:
        """Everything that a failing seed is examined with."""
        out = self.directory / "out"
        lines = [f"seed {self.plan.seed}, {self.plan.toy}, {self.seconds:.1f} s, exit codes {self.exit_codes}"]
        lines += ["--- wrong", *problems, "--- faults"]
        for fault in self.plan.faults:
            fired = out / f"fired-{fault.number}"
            lines.append(f"{fault}: {fired.read_text() if fired.exists() else 'not fired'}")
        lines.append("--- lives")
        for rank in range(WORLD_SIZE):
            steps = read_lines(out / f"steps-{rank}")
            for life in lives(out, rank):
                done = [step for generation, step in steps if generation == life["generation"]]
                lines.append(f"rank {rank}: {life} steps {done[:1]}..{done[-1:]}")
        return "\n".join([*lines, "--- output", self.output])


def run(plan: Plan, directory: Path, *, shm_root: Path, limit_s: float) -> Outcome:
    """Runs a plan to its end, as a cluster manager that starts the command again would."""
    out, tmp, shm = directory / "out", directory / "tmp", directory / "shm"
    for path in (out, tmp):
        path.mkdir(parents=True)
    shm.symlink_to(shm_root, target_is_directory=True)
    argument = {
        "toy": dataclasses.asdict(plan.toy),
        "out": str(out),
        "store": str(directory / "store"),
        "settings": {"snapshot_every": 3, "checkpoint_every": 5},
        "faults": [dataclasses.asdict(fault) for fault in plan.faults],
    }
    env = {
        "ARC_RUN_DIR": str(directory / "run"),
        "ARC_JOB_ID": f"chaos-{plan.seed}",
        "ARC_SHM_ROOT": str(shm_root),
        "TMPDIR": str(tmp),
    }
    launcher = [sys.executable, "-m", "arc_dist.launch.arcrun", "--standalone", f"--nproc-per-node={WORLD_SIZE}"]
    command = [*launcher, f"--max-restarts={_AGENT_RESTARTS}", "--monitor-interval=0.1", SCRIPT, json.dumps(argument)]
    began = time.monotonic()
    outcome = Outcome(plan=plan, directory=directory, exit_codes=[], seconds=0, output="", processes_left=[])
    jobs: list[Job] = []
    try:
        while len(jobs) < _STARTS:
            job = Job(command, env=env, cwd=directory)
            job.__enter__()
            jobs.append(job)
            code = _wait(job, max(1.0, began + limit_s - time.monotonic()), out)
            outcome.exit_codes.append(code)
            if code not in _TRY_AGAIN:
                break
        eventually(lambda: not any(job.pids() for job in jobs), _FAREWELL_LIMIT_S)
        outcome.processes_left = [pid for job in jobs for pid in job.pids()]
        for number, job in enumerate(jobs):
            outcome.output += f"--- start {number}\n{job.stdout()}{job.stderr()}"
    finally:
        for job in jobs:
            job.__exit__()
    outcome.seconds = time.monotonic() - began
    return outcome


def _wait(job: Job, limit_s: float, out: Path) -> int | None:
    """The command's exit code; None when it did not end, after its trainers have written their stacks to its output."""
    try:
        return job.process.wait(limit_s)
    except subprocess.TimeoutExpired:
        for rank in range(WORLD_SIZE):
            for life in lives(out, rank)[-1:]:
                if start_ticks(life["pid"]) == life["ticks"]:
                    os.kill(life["pid"], signal.SIGUSR1)
        time.sleep(_STACKS_S)
        job.kill()
        return None


def lives(out: Path, rank: int) -> list[dict[str, Any]]:
    """The trainers of a rank, oldest first."""
    return read_lines(out / f"lives-{rank}")


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def eventually(condition: Callable[[], bool], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
