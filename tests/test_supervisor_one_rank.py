"""One supervisor and its trainer, without torchrun: deaths of every kind, what is left behind, who dies with whom."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ranks import Job, JobResult, run_job

SCRIPTS = Path(__file__).parent / "scripts"


def command(*args: str) -> list[str]:
    # Steps are counted by a hook of ours, which needs torch; guarding is tested elsewhere.
    return [sys.executable, "-m", "arc_dist", "--no-guard", *args]


def run_steps(log: Path, *orders: str) -> JobResult:
    return run_job(command(str(SCRIPTS / "steps.py"), str(log), *orders))


def starts(log: Path) -> list[int]:
    """Pids of the script's lives."""
    if not log.exists():
        return []
    return [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("start ")]


def incidents() -> list[dict[str, object]]:
    path = Path(os.environ["ARC_RUN_DIR"]) / "incidents.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_trainer_is_started_again_and_the_incident_is_recorded(tmp_path: Path, shm_root: Path) -> None:
    log = tmp_path / "log"
    result = run_steps(log, "0:5:kill", "1:7:kill")
    assert result.exit_code == 0, str(result)
    assert len(set(starts(log))) == 3
    assert log.read_text().endswith("end\n")
    deaths = [line for line in incidents() if line["kind"] == "rank_died"]
    assert [(line["generation"], line["step"], line["cause"]) for line in deaths] == [
        (0, 5, "killed by SIGKILL"),
        (1, 7, "killed by SIGKILL"),
    ]
    for line in deaths:
        assert line["rank"] == 0
        assert line["action"] == "restart"
        assert abs(line["died_at"] - line["time"]) < 1  # type: ignore[operator]
        assert 0 < line["resumed_after_s"] < 5  # type: ignore[operator]
        assert 0 <= line["seen_after_s"] < 5  # type: ignore[operator]
    assert "[arc] generation 0: trainer" in result.stderr
    assert "all ranks restarted as generation 1" in result.stderr
    assert list(shm_root.iterdir()) == []


def test_the_same_exception_at_the_same_step_is_tried_twice_only(tmp_path: Path) -> None:
    log = tmp_path / "log"
    result = run_steps(log, "*:5:raise")
    assert result.exit_code == 1, str(result)
    assert len(starts(log)) == 2
    assert result.stderr.count("RuntimeError: the same every time") >= 2
    assert "the same as in an earlier attempt" in result.stderr


def test_an_exit_code_before_the_first_step_is_the_jobs(tmp_path: Path) -> None:
    log = tmp_path / "log"
    result = run_steps(log, "*:0:exit3")
    assert result.exit_code == 3, str(result)
    assert len(starts(log)) == 1


@pytest.mark.parametrize("code", [75, 77, 78])
def test_codes_by_which_the_trainer_asks_to_end_are_obeyed(tmp_path: Path, code: int) -> None:
    log = tmp_path / "log"
    result = run_steps(log, f"*:5:exit{code}")
    assert result.exit_code == code, str(result)
    assert len(starts(log)) == 1


def test_a_job_that_gets_no_further_stops(tmp_path: Path) -> None:
    log = tmp_path / "log"
    result = run_steps(log, "*:5:kill")
    assert result.exit_code == 77, str(result)
    assert 2 <= len(starts(log)) <= 4


def test_processes_that_a_dead_trainer_left_are_ended_before_the_next_starts(tmp_path: Path) -> None:
    log = tmp_path / "log"
    result = run_steps(log, "0:3:orphan", "0:5:kill")
    assert result.exit_code == 0, str(result)
    orphan = next(int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("orphan "))
    assert not alive(orphan)
    assert len(starts(log)) == 2


def test_a_killed_supervisor_takes_its_trainer_along(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Job(command(str(SCRIPTS / "steps.py"), str(log), "0:5:wait")) as job:
        job.wait_for(lambda: log.exists() and "do wait" in log.read_text(), 60, "step 5")
        (trainer,) = starts(log)
        assert alive(trainer)
        job.process.kill()
        job.process.wait(10)
        _eventually(lambda: not alive(trainer), "the trainer's end")
        _eventually(lambda: job.pids() == [], "the zygote's end")


def test_the_shared_memory_of_a_killed_supervisor_is_collected_by_the_next(tmp_path: Path, shm_root: Path) -> None:
    log = tmp_path / "log"
    with Job(command(str(SCRIPTS / "steps.py"), str(log), "0:5:wait")) as job:
        job.wait_for(lambda: log.exists() and "do wait" in log.read_text(), 60, "step 5")
        job.kill()
    assert len(list(shm_root.iterdir())) == 1
    assert run_steps(tmp_path / "other").exit_code == 0
    assert list(shm_root.iterdir()) == []


def test_a_killed_zygote_is_replaced(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Job(command(str(SCRIPTS / "steps.py"), str(log), "0:5:wait")) as job:
        job.wait_for(lambda: log.exists() and "do wait" in log.read_text(), 60, "step 5")
        (trainer,) = starts(log)
        zygote = int(Path(f"/proc/{trainer}/stat").read_text().rpartition(")")[2].split()[1])
        assert zygote != job.process.pid
        os.kill(zygote, signal.SIGKILL)
        result = job.wait(60)
    assert result.exit_code == 0, str(result)
    assert len(set(starts(log))) == 2
    assert not alive(trainer)
    assert "the zygote" in result.stderr
    assert log.read_text().endswith("end\n")


@pytest.mark.parametrize("to_group", [False, True])
def test_sigterm_reaches_an_unguarded_trainer_once_and_ends_the_job(tmp_path: Path, to_group: bool) -> None:
    """A launcher signals the whole process group, `kill` the supervisor alone: the script must see one signal."""
    script, log = tmp_path / "count.py", tmp_path / "log"
    script.write_text(
        "import signal, sys, time\n"
        "log = open(sys.argv[1], 'a', buffering=1)\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('USR1', file=log))\n"
        "print('start', file=log)\n"
        "time.sleep(60)\n"
    )
    argv = [*command("--no-preload", str(script), str(log))]
    starter = [sys.executable, "-c", "import os, sys; os.setsid(); os.execv(sys.argv[1], sys.argv[1:])", *argv]
    with Job(starter) as job:
        send = os.killpg if to_group else os.kill
        job.wait_for(lambda: log.exists() and "start" in log.read_text(), 60, "the start")
        for count in (1, 2, 3):
            send(job.process.pid, signal.SIGUSR1)
            job.wait_for(lambda count=count: log.read_text().count("USR1") == count, 10, f"signal {count}")
        send(job.process.pid, signal.SIGTERM)
        result = job.wait(30)
    assert result.exit_code == -signal.SIGTERM, str(result)
    assert log.read_text() == "start\n" + 3 * "USR1\n"


def test_a_signal_that_the_script_handles_does_not_forbid_later_restarts(tmp_path: Path) -> None:
    script, log = tmp_path / "handles.py", tmp_path / "log"
    script.write_text(
        "import os, signal, sys, time\n"
        "log = open(sys.argv[1], 'a', buffering=1)\n"
        "def handle(*_):\n"
        "    print('USR1', file=log)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "signal.signal(signal.SIGUSR1, handle)\n"
        "print('start', os.getpid(), file=log)\n"
        "if len(open(sys.argv[1]).readlines()) == 1:\n"
        "    time.sleep(60)\n"
    )
    with Job(command("--no-preload", str(script), str(log))) as job:
        job.wait_for(lambda: log.exists() and "start" in log.read_text(), 60, "the start")
        job.process.send_signal(signal.SIGUSR1)
        result = job.wait(30)
    assert result.exit_code == 0, str(result)
    assert len(set(starts(log))) == 2


def test_ctrl_c_shows_the_scripts_traceback_and_ends_by_sigint(tmp_path: Path) -> None:
    script, log = tmp_path / "wait.py", tmp_path / "log"
    script.write_text("import sys, time\nopen(sys.argv[1], 'w').write('start')\ntime.sleep(60)\n")
    with Job(command("--no-preload", str(script), str(log))) as job:
        job.wait_for(lambda: log.exists() and "start" in log.read_text(), 60, "the start")
        job.process.send_signal(signal.SIGINT)
        result = job.wait(30)
    assert result.exit_code == -signal.SIGINT, str(result)
    assert result.stderr.count("KeyboardInterrupt") == 1
    assert "arc_dist/" not in result.stderr


def test_an_exception_is_left_for_the_report(tmp_path: Path) -> None:
    result = run_steps(tmp_path / "log", "0:5:raise")
    assert result.exit_code == 0, str(result)
    (death,) = [line for line in incidents() if line["kind"] == "rank_died"]
    assert death["cause"] == "RuntimeError: the same every time"
    assert death["step"] == 5


def test_an_error_of_ours_in_the_script_decides_the_exit_code(tmp_path: Path) -> None:
    script = tmp_path / "refuses.py"
    script.write_text("from arc_dist.errors import ConfigError\nraise ConfigError('no such thing; do another')\n")
    result = run_job(command("--no-preload", str(script)))
    assert result.exit_code == 78, str(result)
    assert "ConfigError: no such thing; do another" in result.stderr


def test_a_memory_file_system_that_is_none(tmp_path: Path) -> None:
    result = run_job(command("--no-preload", str(SCRIPTS / "children.py")), env={"ARC_SHM_ROOT": str(tmp_path / "x")})
    assert result.exit_code == 78, str(result)
    assert "ARC_SHM_ROOT" in result.stderr


def _eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError(f"waited for {what}")
