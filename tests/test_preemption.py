"""Notices at every place of a job's life, to every process of it: what is saved, the exit code, and what follows.

Each case is a real job of two ranks under `arcrun`. It is told to go once, at an exact place; it must end with 75, with
a checkpoint no older than what was committed (or, where the training process cannot save, certified in memory) at that
moment; and the next start must end with the bits of a run that was never disturbed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from arc_dist import Store
from ranks import JobResult, run_job, run_ranks, run_supervised
from toy import Toy, plain

SCRIPT = str(Path(__file__).parent / "scripts" / "preempted.py")
STEPS = 40
SIGNALS = ("SIGTERM", "SIGUSR1")
LIMIT_S = 300.0  # of each of two jobs: forty steps took 110 s on a machine with seven processes for each core


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A notice, and the kind of job that gets it; the fields are those of the script."""

    kind: str
    rank: int
    step: int | None
    place: str
    target: str = "trainer"
    how: str = "SIGTERM"
    times: int = 1
    then: str = "go on"

    def __str__(self) -> str:
        return f"{self.kind}-{self.how}x{self.times}-to-{self.target}{self.rank}-{self.place}{self.step}-{self.then}"


CASES = [
    Case(kind="fsdp", rank=0, step=5, place="body", target="supervisor"),
    Case(kind="ddp", rank=0, step=None, place="save", target="launcher", times=2),
    Case(kind="fsdp", rank=0, step=9, place="loss", then="hang"),
    Case(kind="ddp", rank=1, step=8, place="loss", target="supervisor", then="die"),
    Case(kind="ddp", rank=1, step=3, place="loss", then="die"),
]
MORE = [
    Case(kind="fsdp", rank=1, step=9, place="loss", how="file"),
    Case(kind="ddp", rank=1, step=7, place="loss"),
    Case(kind="fsdp", rank=1, step=None, place="restore", how="SIGUSR1"),
    Case(kind="ddp", rank=1, step=None, place="import", target="launcher"),
]


def random_case(seed: int) -> Case:
    rng = random.Random(seed)
    place = rng.choices(["loss", "body", "save", "restore", "import"], weights=[4, 3, 2, 1, 1])[0]
    how = rng.choice([*SIGNALS, "SIGTERM", "file"])
    then = "go on"
    if place in ("loss", "body"):
        then = rng.choices(["go on", "hang", "die"], weights=[4, 1, 1])[0]
    return Case(
        kind=("ddp", "fsdp")[seed % 2],
        rank=rng.randrange(2),
        step=rng.randrange(1, 20) if place in ("loss", "body") else None,
        place=place,
        target=rng.choice(["trainer", "supervisor", "launcher"]),
        how=how,
        times=rng.choice([1, 1, 2, 3]),
        then=then,
    )


def plain_body(rank: int, world_size: int, toy: Toy) -> str:
    return plain(toy)[0]


@functools.cache
def undisturbed(toy: Toy) -> list[str]:
    return run_ranks(2, plain_body, toy)


def launch(
    directory: Path, toy: Toy, notice: Case | None, *, has_store: bool = True, by_launcher: bool = True, **env: str
) -> JobResult:
    fields = None
    if notice is not None:
        names = ("rank", "step", "place", "target", "how", "times", "then")
        fields = {name: getattr(notice, name) for name in names}
    config = {
        "toy": dataclasses.asdict(toy),
        "out": str(directory),
        "store": str(directory / "store") if has_store else None,
        "settings": {"checkpoint_every": 4, "snapshot_every": 3},
        "notice": fields,
    }
    environ = {
        "ARC_RUN_DIR": str(directory / "run"),
        "ARC_GRACE_S": "8",
        "ARC_PREEMPT_SIGNALS": ",".join(SIGNALS),
        "ARC_PREEMPT_FILE": str(directory / "notice"),
        "ARC_MAX_RESTARTS": "0",
        "PYTHONFAULTHANDLER": "1",
        **env,
    }
    if not by_launcher:
        return run_supervised(2, SCRIPT, json.dumps(config), env=environ, timeout_s=LIMIT_S)
    command = [sys.executable, "-m", "arc_dist.launch.arcrun", "--standalone", "--nproc-per-node=2", SCRIPT]
    return run_job([*command, json.dumps(config)], env=environ, timeout_s=LIMIT_S)


def results(directory: Path) -> list[dict[str, Any]]:
    return [json.loads((directory / f"result-{rank}.json").read_text()) for rank in range(2)]


def check(directory: Path, case: Case) -> None:
    toy = Toy(kind=case.kind, steps=STEPS)
    ended = launch(directory, toy, case)
    said = f"{case}\n{ended}"
    fired = directory / "fired.json"
    assert fired.exists(), f"the notice was never given: {said}"
    known = json.loads(fired.read_text())
    assert ended.exit_code == 75, said
    store = directory / "store"
    has_begun = (store / "run").exists()  # not if the notice came before the Arc
    found = [info.step for info in Store(str(store)).steps() if info.certified] if has_begun else []
    newest = max(found, default=0)
    assert newest >= max(known["committed"], default=0), said
    assert newest >= max(known["certified"], default=0), said
    if case.then == "go on" and case.place in ("loss", "body"):
        assert newest >= (case.step or 0), f"all ranks were to save the step at hand: {said}"
    if case.then == "hang":
        assert "did not save in time" in ended.stderr, said

    # A notice file is older than the next launcher, and must not be older than what plays one.
    again = launch(directory, toy, None, by_launcher=case.how == "file")
    assert again.exit_code == 0, f"{said}\nthe next start: {again}"
    if case.how == "file":  # it is still there, and no notice to the next start
        assert "belongs to an earlier preemption" in again.stderr, again
    after = results(directory)
    assert [result["first"] for result in after] == [newest + 1] * 2, f"{said}\nthe next start: {again}"
    assert [result["digest"] for result in after] == undisturbed(toy), f"{said}\nthe next start: {again}"


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT_S + 60)
@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.soak) for case in MORE)], ids=str)
def test_a_notice_is_heard_wherever_it_comes_and_the_next_start_goes_on_bitwise(tmp_path: Path, case: Case) -> None:
    check(tmp_path, case)


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT_S + 60)
@pytest.mark.parametrize("then", [pytest.param("go on", marks=pytest.mark.soak), "hang"])
def test_without_a_store_the_job_says_that_nothing_outlives_it(tmp_path: Path, then: str) -> None:
    case = Case(kind="fsdp", rank=1, step=6, place="loss", then=then)
    ended = launch(tmp_path, Toy(kind="fsdp", steps=STEPS), case, has_store=False)
    assert (tmp_path / "fired.json").exists(), ended
    assert ended.exit_code == 76, ended
    assert "no store is set: when this job is preempted, nothing outlives it" in ended.stderr, ended
    assert ("so nothing outlives this job" if then == "go on" else "because the job has no store") in ended.stderr, (
        ended
    )


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT_S + 60)
def test_a_grace_period_that_is_too_short_is_said_with_figures_and_remedy(tmp_path: Path) -> None:
    case = Case(kind="ddp", rank=0, step=6, place="loss")
    ended = launch(tmp_path, Toy(kind="ddp", steps=STEPS), case, ARC_GRACE_S="1")
    assert (tmp_path / "fired.json").exists(), ended
    said = r"a last checkpoint takes about \d+ s \(rank \d: [\d.]+ MB at [\d.]+ MB/s .* of the 1 s .*ARC_GRACE_S"
    assert len(re.findall(said, ended.stderr)) == 1, ended
    assert ended.exit_code == 75, ended


@pytest.mark.soak
@pytest.mark.timeout(2 * LIMIT_S + 60)
@pytest.mark.parametrize("seed", range(200))
def test_notices_at_random_places(tmp_path: Path, seed: int) -> None:
    check(tmp_path, random_case(seed))
