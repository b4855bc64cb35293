"""Hangs of every kind on real ranks: found, the culprit named with its stack, ended; the run goes on bit for bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from arc_dist.telemetry.report import render, summarize
from ranks import run_ranks, run_supervised
from toy import Toy, plain

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SCRIPT = str(Path(__file__).parent / "scripts" / "hang_toy.py")
# Far above what a step of the toy takes on a loaded machine, and far below the time-outs of process groups.
SETTINGS = {"hang_min_s": 5.0, "hang_factor": 5.0}


def plain_body(rank, world_size, toy):
    return plain(toy)[0]


def job(tmp_path, toy, world_size, *, code=0, **config):
    """Runs the toy; returns each rank's result, the incidents, and the job's output."""
    settings = {**SETTINGS, **config.pop("settings", {})}
    argument = {"toy": dataclasses.asdict(toy), "out": str(tmp_path), "settings": settings, **config}
    env = {"ARC_RUN_DIR": str(tmp_path / "run")}
    done = run_supervised(world_size, SCRIPT, json.dumps(argument), env=env, timeout_s=240)
    output = done.stdout + done.stderr
    assert done.exit_code == code, output
    files = [tmp_path / f"result-{rank}.json" for rank in range(world_size)]
    lines = (tmp_path / "run" / "incidents.jsonl").read_text().splitlines()
    return [json.loads(file.read_text()) for file in files if file.exists()], [json.loads(x) for x in lines], output


def of_kind(lines, kind):
    return [line for line in lines if line["kind"] == kind]


@dataclasses.dataclass(frozen=True)
class Case:
    kind: str  # of the hang
    model: str
    world_size: int
    rank: int
    section: str
    stack: str  # is in the culprit's stack


CASES = [
    Case("stop", "ddp", 3, 1, "forward", "State: T"),
    Case("data", "ddp", 2, 0, "data wait", "in slow_fetch"),
    Case("gil", "fsdp", 3, 2, "forward", "in in_loss"),
    pytest.param(Case("spin", "fsdp", 2, 1, "forward", "in in_loss"), marks=pytest.mark.soak),
    pytest.param(Case("storage", "fsdp", 2, 0, "write checkpoint", "in in_body"), marks=pytest.mark.soak),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-{case.model}")
def test_a_hang_is_found_named_and_ended_without_changing_a_bit(tmp_path, case):
    toy = Toy(kind=case.model, steps=24)
    results, lines, output = job(tmp_path, toy, case.world_size, kind=case.kind, rank=case.rank, step=15)
    assert (tmp_path / f"hung-{case.rank}").exists(), output
    (hang,) = of_kind(lines, "hang")
    assert hang["ranks"] == [case.rank], output
    assert hang["section"] == case.section
    assert hang["step"] == 15
    assert sorted(hang["where"]) == [str(rank) for rank in range(case.world_size)]
    text = Path(hang["stacks"]).read_text()
    culprits_part = text.partition("--- all threads")[0].rpartition(f"rank {case.rank}: ")[2]
    assert case.stack in culprits_part, text  # the culprit's stack comes last
    (death,) = [line for line in of_kind(lines, "rank_died") if line["rank"] == case.rank]
    assert death["cause"].startswith("hang: ")
    assert death["action"] == "restart"
    assert [result["generation"] for result in results] == [1] * case.world_size
    assert [result["digest"] for result in results] == run_ranks(case.world_size, plain_body, toy), output


def test_a_rank_that_left_out_a_collective_is_the_odd_one(tmp_path):
    toy = Toy(kind="ddp", steps=24)
    results, lines, output = job(tmp_path, toy, 3, kind="skip", rank=1, step=15)
    assert (tmp_path / "hung-1").exists(), output
    (hang,) = of_kind(lines, "hang")
    assert hang["ranks"] == [1], output
    assert "another collective" in hang["cause"]
    assert "all_reduce" in Path(hang["stacks"]).read_text()
    assert [result["digest"] for result in results] == run_ranks(3, plain_body, toy), output


def test_with_two_ranks_nobody_can_tell_who_left_out_a_collective_and_that_is_said(tmp_path):
    toy = Toy(kind="ddp", steps=24)
    results, lines, output = job(tmp_path, toy, 2, kind="skip", rank=1, step=15)
    assert (tmp_path / "hung-1").exists(), output
    (hang,) = of_kind(lines, "hang")
    assert hang["ranks"] == []
    assert "cannot be told" in hang["cause"]
    assert [result["digest"] for result in results] == run_ranks(2, plain_body, toy), output


@pytest.mark.parametrize("model", ["ddp", "fsdp"])
def test_a_long_evaluation_is_no_hang(tmp_path, model):
    """Longer than the limit of every learned section, on one rank, while the other one waits for it."""
    toy = Toy(kind=model, steps=24)
    settings = {"hang_min_s": 1.0, "hang_factor": 2.0}
    results, lines, output = job(tmp_path, toy, 2, kind="evaluation", rank=0, step=15, settings=settings)
    assert (tmp_path / "hung-0").exists(), output
    assert of_kind(lines, "hang") == []
    assert [result["generation"] for result in results] == [0, 0]
    assert [result["digest"] for result in results] == run_ranks(2, plain_body, toy), output


@pytest.mark.soak
def test_a_rank_that_was_suspended_with_its_supervisor_is_no_hang(tmp_path):
    toy = Toy(kind="ddp", steps=24)
    settings = {"hang_min_s": 15.0}
    results, lines, output = job(tmp_path, toy, 2, kind="suspend", rank=1, step=15, settings=settings)
    assert (tmp_path / "hung-1").exists(), output
    assert of_kind(lines, "hang") == [], output
    assert [result["generation"] for result in results] == [0, 0]
    assert [result["digest"] for result in results] == run_ranks(2, plain_body, toy), output


def test_a_script_that_knows_nothing_of_us_is_watched_when_asked_for(tmp_path):
    env = {"ARC_RUN_DIR": str(tmp_path / "run"), "ARC_HANG_DEADLINE_S": "8"}
    script = str(Path(SCRIPT).with_name("unguarded_hang.py"))
    done = run_supervised(2, script, str(tmp_path), env=env, timeout_s=240)
    output = done.stdout + done.stderr
    assert done.exit_code == 0, output
    assert (tmp_path / "hung").exists(), output
    assert [(tmp_path / f"done-{rank}").read_text() for rank in (0, 1)] == ["1", "1"], output
    lines = [json.loads(line) for line in (tmp_path / "run" / "incidents.jsonl").read_text().splitlines()]
    (hang,) = of_kind(lines, "hang")
    assert hang["ranks"] == [1], output
    assert "in main" in Path(hang["stacks"]).read_text()


def test_a_hang_that_always_comes_back_ends_the_job(tmp_path):
    """Without progress beyond it: exit code 77, and each time more patience."""
    toy = Toy(kind="single", steps=24)
    settings = {"hang_min_s": 0.5, "hang_factor": 2.0}
    _, lines, output = job(tmp_path, toy, 1, code=77, kind="spin", rank=0, step=15, settings=settings, always=True)
    hangs = of_kind(lines, "hang")
    assert [hang["ranks"] for hang in hangs] == [[0]] * len(hangs)
    assert 3 <= len(hangs) <= 4, output
    waits_s = [hang["seen_after_s"] for hang in hangs]
    assert waits_s[1] > 1.5 and waits_s[2] > 6.0, output
    (stop,) = of_kind(lines, "job_stopped")
    assert "spin" not in stop["cause"] and "hung" in stop["cause"]


@pytest.mark.parametrize(
    ("model", "world_size", "slow", "part"),
    [
        pytest.param("ddp", 3, "loss", "forward", marks=pytest.mark.soak),
        ("fsdp", 2, "data", "data wait"),
        pytest.param("fsdp", 2, "loss", "forward", marks=pytest.mark.soak),
    ],
)
def test_a_rank_that_is_slow_all_the_time_is_reported_once(tmp_path, model, world_size, slow, part):
    """Its steps take as long as all others', which wait for it; what differs is its own work."""
    toy = Toy(kind=model, steps=220)
    _, lines, output = job(tmp_path, toy, world_size, kind="none", rank=0, step=0, slow={"1": [slow, 0.04]})
    assert of_kind(lines, "hang") == []
    (report,) = [line for line in of_kind(lines, "straggler") if line["ranks"] == [1]]
    assert report["part"] == part, output
    assert report["ratio"] > 1.5
    assert report["excess_s"] > 0.01
    assert "rank 1 is slow" in output
    assert "straggler" in render(summarize(lines))
