"""What people are shown: bounded at any number of ranks and of incidents, and harmless to a terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arc_dist import cli
from arc_dist.coordinator import endpoint as endpoints
from arc_dist.coordinator import metrics
from arc_dist.coordinator.board import MAX_INCIDENTS, MAX_SAMPLES, Board
from arc_dist.coordinator.endpoint import Endpoint
from arc_dist.coordinator.server import CoordinatorServer
from arc_dist.coordinator.service import Coordinator
from arc_dist.coordinator.view import MAX_RANKS_SHOWN, ranges
from arc_dist.errors import ConfigError
from arc_dist.telemetry import report, screen
from arc_dist.telemetry.recorder import append_line

KILLED = {"kind": "signal", "signal": 9}


def large_job(world_size: int) -> Coordinator:
    """Every rank has joined, runs, and was heard of; one is behind, one has died; ten checkpoints in two tiers."""
    made = Coordinator(world_size)
    for rank in range(world_size):
        host = f"node{rank // 8}"
        made.call("join", {"rank": rank, "world_size": world_size, "host": host, "pid": rank, "shm_dir": "/d"})
    for rank in range(world_size):
        made.call("ready", {"rank": rank, "generation": 0, "host": "h", "shm_dir": "/d", "store": None})
    for rank in range(world_size):
        step = 500 if rank == world_size // 2 else 1000
        held = [{"step": 990}, {"step": 980}]
        made.call("report", {"rank": rank, "generation": 0, "step": step, "quiet_s": 0.1, "held": held})
    for url in ("/nvme/run", "s3://bucket/run"):
        made.call("hello_store", {"url": url, "committed": [{"step": step} for step in range(100, 1100, 100)]})
    made.call("died", {"rank": min(7, world_size - 1), "generation": 0, "cause": KILLED, "step": 1000})
    return made


def calls_of(work: Callable[[], Any]) -> int:
    """How many functions of Python and of C are called."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


def test_a_job_of_ten_thousand_ranks_is_shown_in_little_space():
    status = large_job(10_000).view()
    assert len(json.dumps(status)) < 32_768
    assert status["ranks"]["joined"] == {"count": 10_000, "ranks": "0-9999"}
    shown = {rank["rank"]: rank["state"] for rank in status["ranks"]["listed"]}
    assert len(shown) == MAX_RANKS_SHOWN
    assert shown[7] == "dead"
    assert 5_000 in shown  # the one that is behind
    assert status["health"] == "recovering"
    assert (status["ranks"]["step_min"], status["ranks"]["step_max"]) == (500, 1000)
    memory = next(tier for tier in status["checkpoints"]["tiers"] if tier["tier"] == "memory")
    assert (memory["count"], memory["newest"]) == (2, 990)
    text = screen.render(status, width=100)
    assert text.count("\n") < 60
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "and 9984 more" in text


@pytest.mark.parametrize("look", [Coordinator.view, lambda job: metrics.render(*job.facts())], ids=["view", "metrics"])
def test_the_work_of_a_look_grows_with_the_ranks_and_no_faster(look: Callable[[Coordinator], Any]):
    small, large = large_job(1_000), large_job(10_000)
    few, many = calls_of(lambda: look(small)), calls_of(lambda: look(large))
    assert 1_000 < few < many < 15 * few


def test_metrics_of_ten_thousand_ranks_are_one_line_each():
    lines = metrics.render(*large_job(10_000).facts()).splitlines()
    assert len([line for line in lines if line.startswith("arc_rank_step{")]) == 10_000
    assert len(lines) < 10_100


def test_the_board_is_bounded_whatever_is_said():
    board = Board(lambda: 1.0)
    for i in range(20_000):
        board.note({"kind": f"kind-{i}", "cause": "x" * 10_000, "ranks": list(range(1000)), "step": i})
        board.note({"kind": "progress", "step": i, "loss": 1.0, "time": float(i)})
        board.note_commit(i, "/x")
    reading = board.read()
    assert len(reading.incidents) == MAX_INCIDENTS
    assert reading.num_incidents == 20_000
    assert sum(reading.by_kind.values()) == 20_000
    assert len(reading.by_kind) <= 101
    assert MAX_SAMPLES / 2 <= len(reading.samples) <= MAX_SAMPLES + 1
    assert [reading.samples[0].step, reading.samples[-1].step] == [0, 19_999]
    gaps = {b.step - a.step for a, b in zip(reading.samples, reading.samples[1:-1], strict=False)}
    assert len(gaps) == 1  # evenly thinned
    assert max(len(str(incident)) for incident in reading.incidents) < 5_000


def test_goodput_is_that_of_the_report(tmp_path: Path):
    lines: list[dict[str, Any]] = [{"kind": "started", "time": 100.0, "step": 0, "generation": 0}]
    for i in range(1, 50):
        step = i * 10 if i < 30 else i * 10 - 40  # four steps were done twice
        lines.append({"kind": "progress", "time": 100.0 + 2 * i, "step": step, "median_step_s": 0.1 + i / 1000})
    board = Board()
    for line in lines:
        append_line(tmp_path, line)
        board.note(line)
    assert board.read().goodput == report.summarize(report.read_lines(tmp_path))["goodput"]


def test_a_coordinator_that_is_restarted_knows_the_incidents_before(tmp_path: Path):
    first = Coordinator.open(1, run_dir=tmp_path)
    first.call("incident", {"kind": "numeric", "action": "rollback", "step": 3})
    first.close()
    with (tmp_path / "incidents.jsonl").open("ab") as file:
        file.write(b'{"kind": "torn')
    again = Coordinator.open(1, run_dir=tmp_path)
    assert again.view()["verdicts"]["rolled_back"] == 1
    assert again.incidents(0, 10)["epoch"] == 2
    again.close()


@given(st.sets(st.integers(0, 200)))
def test_ranges_name_exactly_the_ranks(ranks: set[int]):
    text = ranges(ranks)
    if text.endswith("..."):
        return
    named: set[int] = set()
    for part in text.split(",") if text else []:
        first, _, last = part.partition("-")
        named |= set(range(int(first), int(last or first) + 1))
    assert named == ranks


def test_what_older_generations_say_later_changes_nothing_and_the_future_is_not_believed():
    made = Coordinator(1)
    made.call("report", {"rank": 0, "generation": 9, "step": 10**9})
    assert made.facts()[1].whereabouts == {}
    made.call("report", {"rank": 0, "generation": 0, "step": 5})
    made._board.note_where(0, 1, 6, None, ())
    made.call("report", {"rank": 0, "generation": 0, "step": 7})
    assert made.facts()[1].whereabouts[0].step == 6


def test_a_terminal_is_not_steered_by_what_a_rank_says():
    made = large_job(2)
    made.call(
        "incident", {"kind": "x", "cause": "\x1b[2J\x07\x9b0m\u202eabc", "action": "\r\x1b]0;title\x07", "ranks": [0]}
    )
    text = screen.render(made.view())
    assert "abc" in text
    assert all(c.isprintable() or c == "\n" for c in text)


# ---- finding jobs ----------------------------------------------------------------------------------------------------


def announce(server: CoordinatorServer, job_id: str, run_dir: Path, shm_dir: Path | None = None) -> Endpoint:
    run_dir.mkdir(exist_ok=True)
    endpoint = Endpoint(
        url=server.address, token=server.token, job_id=job_id, run_dir=str(run_dir), world_size=1, host="h", pid=1
    )
    endpoint.write(run_dir)
    if shm_dir is not None:
        shm_dir.mkdir()
        endpoint.write(shm_dir)
    return endpoint


def status(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = cli.main(["status", *arguments])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_without_a_job_it_says_so(capsys: pytest.CaptureFixture[str]):
    code, text = status(capsys=capsys)
    assert (code, "no job of yours" in text) == (3, True)
    assert json.loads(status("--json", capsys=capsys)[1])["health"] == "unreachable"


def test_several_jobs_are_listed_and_the_worst_gives_the_code(
    tmp_path: Path, shm_root: Path, capsys: pytest.CaptureFixture[str]
):
    running, starting = Coordinator(1, job_id="one"), Coordinator(1, job_id="two")
    running.call("join", {"rank": 0, "world_size": 1, "host": "h", "pid": 1, "shm_dir": "/d"})
    running.call("ready", {"rank": 0, "generation": 0, "host": "h", "shm_dir": "/d"})
    with CoordinatorServer(running) as a, CoordinatorServer(starting) as b:
        announce(a, "one", tmp_path / "a", shm_root / f"arc-dist-{os.getuid()}-one")
        assert status(capsys=capsys)[0] == 0
        announce(b, "two", tmp_path / "b", shm_root / f"arc-dist-{os.getuid()}-two")
        code, text = status(capsys=capsys)
        assert code == 1
        assert str(tmp_path / "a") in text
        assert "job two, starting" in text
        answer = json.loads(status("--json", capsys=capsys)[1])
        assert [job["health"] for job in answer] == ["running", "starting"]
        assert cli.main(["watch"]) == 78
        assert status(str(tmp_path / "a"), capsys=capsys)[0] == 0


def test_another_job_at_the_address_is_not_taken_for_the_one_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with CoordinatorServer(Coordinator(1, job_id="new")) as server:
        announce(server, "old", tmp_path / "run")
        code, text = status(str(tmp_path / "run"), capsys=capsys)
        assert (code, "is the job new" in text) == (3, True)
        other = CoordinatorServer(Coordinator(1), token="other")
        other._http = server._http  # the same address, another token
        announce(other, "old", tmp_path / "run")
        code, text = status(str(tmp_path / "run"), capsys=capsys)
        assert (code, "token" in text) == (3, True)


def test_a_job_that_is_over_is_told_from_its_run_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    append_line(tmp_path, {"time": 1.0, "kind": "rank_died", "rank": 1, "cause": "\x1b[31mred", "step": 5})
    code, text = status(str(tmp_path), capsys=capsys)
    assert (code, "the job is over" in text) == (2, True)
    assert "\x1b" not in text
    made = Coordinator(1, job_id="j")
    made.call("join", {"rank": 0, "world_size": 1, "host": "h", "pid": 1, "shm_dir": "/d"})
    made.call("ready", {"rank": 0, "generation": 0, "host": "h", "shm_dir": "/d"})
    made.call("finished", {"rank": 0, "generation": 0})
    with CoordinatorServer(made) as server:
        announce(server, "j", tmp_path)
        assert status(str(tmp_path), capsys=capsys)[0] == 2
        assert cli.main(["watch", str(tmp_path)]) == 2  # ends by itself


def test_what_leads_nowhere_is_a_configuration_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert status(str(tmp_path / "gone"), capsys=capsys)[0] == 78
    assert status("http://127.0.0.1", capsys=capsys)[0] == 78


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"url": 5}', "[" * 5000, '{"url": "http://h:1"}', "\x00"])
def test_a_file_that_is_no_address_is_refused(tmp_path: Path, text: str):
    (tmp_path / endpoints.NAME).write_text(text)
    (tmp_path / endpoints.NAME).chmod(0o600)
    with pytest.raises(ConfigError, match="does not tell where"):
        endpoints.read(tmp_path / endpoints.NAME)


def test_an_address_that_others_may_have_written_is_not_believed(tmp_path: Path):
    with CoordinatorServer(Coordinator(1)) as server:
        announce(server, "j", tmp_path)
    path = tmp_path / endpoints.NAME
    path.chmod(0o622)
    with pytest.raises(ConfigError, match="other users"):
        endpoints.read(path)
    path.chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(OSError):
        endpoints.read(link)


def test_only_its_own_address_is_removed(tmp_path: Path):
    with CoordinatorServer(Coordinator(1)) as one, CoordinatorServer(Coordinator(1)) as two:
        first = announce(one, "j", tmp_path)
        second = announce(two, "j", tmp_path)
    first.remove(tmp_path / endpoints.NAME)
    assert endpoints.read(tmp_path / endpoints.NAME) == second
    second.remove(tmp_path / endpoints.NAME)
    assert not (tmp_path / endpoints.NAME).exists()
