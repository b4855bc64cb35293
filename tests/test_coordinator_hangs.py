"""The coordinator's part of the watch: limits of all ranks, one inquiry at a time, and what becomes of a verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arc_dist.coordinator.client import LocalClient
from arc_dist.coordinator.service import Coordinator
from arc_dist.errors import ConfigError
from arc_dist.protocol.hangs import INQUIRY_LIMIT_S, Section


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Job:
    """Three supervisors around a coordinator, in generation 0."""

    def __init__(self, run_dir: Path) -> None:
        self.clock = Clock()
        self.run_dir = run_dir
        self.coordinator = Coordinator.open(3, run_dir=run_dir, job_id="job", clock=self.clock)
        self.clients = [LocalClient(self.coordinator) for _ in range(3)]
        for rank, client in enumerate(self.clients):
            client.join(rank, 3, "host", 100 + rank, f"/shm/{rank}")
        for rank, client in enumerate(self.clients):
            client.ready(rank, 0, {"host": "h", "port": 1} if rank == 0 else None, [], f"/shm/{rank}", "host")

    def say(self, rank: int, *, generation: int = 0, limits: dict[str, float] | None = None, **fields: Any) -> dict:
        usual = {"step": 12, "section": int(Section.BACKWARD), "name": "backward", "elapsed_s": 70.0, "limit_s": 60.0}
        usual |= {"conduct": "S", "busy": 0.0, "collective": True, "compiling": False, "stack": "wait"}
        report: dict[str, Any] = {key: fields.pop(key) for key in ("inquiry", "writes", "frames") if key in fields}
        report["seen"] = {**usual, **fields}
        if limits is not None:
            in_ns = {name: int(limit * 1e9) for name, limit in limits.items()}
            report["spent"] = {"steps": 100, "measured": 50, "time_ns": {}, "cpu_ns": {}, "limit_ns": in_ns}
        return self.clients[rank].watched(rank=rank, generation=generation, report=report)

    def incidents(self) -> list[dict[str, Any]]:
        path = self.run_dir / "incidents.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


IN_DATA = {"section": int(Section.DATA), "name": "data wait", "collective": False, "stack": "read"}


def test_all_are_asked_and_the_culprit_alone_is_condemned(job, caplog):
    number = job.say(0)["inquiry"]
    assert number > 0
    assert job.say(1, elapsed_s=1.0)["inquiry"] == number  # also those who see nothing wrong
    job.say(0, inquiry=number, writes=5, frames="  in all_reduce")
    assert job.say(1, inquiry=number, writes=6, frames="  in all_reduce")["condemned"] is None
    answer = job.say(2, inquiry=number, writes=7, frames="  in read", **IN_DATA)
    assert answer["condemned"]["writes"] == 7
    assert "data wait of step 12" in answer["condemned"]["reason"]
    assert job.say(0)["condemned"] is None
    (hang,) = job.incidents()
    assert (hang["kind"], hang["ranks"], hang["step"], hang["section"]) == ("hang", [2], 12, "data wait")
    text = Path(hang["stacks"]).read_text()
    assert text.index("rank 0") < text.index("rank 1") < text.index("in all_reduce") < text.index("rank 2: data wait")
    assert text.count("in all_reduce") == 1  # equal stacks are shown once
    assert "in read" in caplog.text


def test_the_largest_limit_of_all_ranks_holds(job):
    job.say(1, elapsed_s=1.0, limits={"backward": 100.0})
    assert job.say(0, elapsed_s=99.0)["inquiry"] == 0
    assert job.say(0, elapsed_s=101.0)["inquiry"] > 0


def test_a_report_of_another_generation_changes_nothing(job):
    assert job.say(0, generation=7) == {"inquiry": 0, "condemned": None, "epoch": job.coordinator.epoch}


def test_an_answer_to_an_older_question_is_none(job):
    number = job.say(0)["inquiry"]
    assert job.say(1, inquiry=number - 1, writes=1)["inquiry"] == number
    for rank in range(3):
        job.say(rank, inquiry=number, writes=1, **IN_DATA)
    assert job.incidents()[0]["ranks"] == [0, 1, 2]


def test_a_silent_supervisor_does_not_hold_up_the_verdict(job):
    number = job.say(0)["inquiry"]
    job.say(0, inquiry=number, writes=5)
    job.say(1, inquiry=number, writes=5)
    assert job.incidents() == []
    job.clock.now += INQUIRY_LIMIT_S + 1
    assert job.say(0)["condemned"] is not None
    assert job.incidents()[0]["ranks"] == [2]


def test_the_second_hang_at_a_step_is_given_more_time(job):
    number = job.say(0)["inquiry"]
    for rank in range(3):
        job.say(rank, inquiry=number, writes=1, **(IN_DATA if rank == 2 else {}))
    job.clock.now += 100.0
    assert job.say(0)["inquiry"] == 0  # 70 s of 60 s were enough the first time
    assert job.say(0, step=13)["inquiry"] > 0


def test_who_waits_for_a_rank_within_its_limit_does_not_ask_again_at_once(job):
    number = job.say(0)["inquiry"]
    evaluating = {"section": int(Section.SCRIPT), "name": "evaluate", "collective": False, "step": 11}
    for rank, fields in ((0, {}), (1, {}), (2, {**evaluating, "limit_s": 100.0})):
        answer = job.say(rank, inquiry=number, writes=1, **fields)
        assert answer["condemned"] is None
    assert answer["inquiry"] == 0
    assert job.say(0)["inquiry"] == 0
    job.clock.now += 31.0
    assert job.say(0)["inquiry"] == number + 1
    assert job.incidents() == []


@pytest.mark.parametrize("wrong", [{"section": 77}, {"conduct": "?"}, {"step": "x"}, {"elapsed_s": -1}])
def test_reports_that_cannot_be_understood_are_refused(job, wrong):
    with pytest.raises(ConfigError):
        job.say(0, **wrong)
