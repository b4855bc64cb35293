"""`arcrun` and `torchrun -m arc_dist`: one command, one clear message, an exit code that tells how the job ended."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from arc_dist.launch import arcrun, endings
from arc_dist.launch.options import parse
from ranks import Job, run_job, torchrun

SCRIPTS = Path(__file__).parent / "scripts"


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "arc_dist.launch.arcrun", "--standalone", "--nproc-per-node=2", *args]


def script(directory: Path, *lines: str) -> str:
    path = directory / "train.py"
    path.write_text("\n".join(["import os, signal, sys, time", "rank = int(os.environ['RANK'])", *lines, ""]))
    return str(path)


@contextlib.contextmanager
def two_supervisors(path: str) -> Iterator[tuple[Job, Job]]:
    """The ranks of one job, each started by itself, so that a test is the launcher."""
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    argv = [sys.executable, "-m", "arc_dist", "--no-preload", "--no-guard", path]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        env["MASTER_PORT"] = str(probe.getsockname()[1])
    with Job(argv, env={**env, "RANK": "0"}) as first, Job(argv, env={**env, "RANK": "1"}) as second:
        yield first, second


LIGHT = ("--arc-no-preload", "--arc-no-guard")


@pytest.mark.slow
def test_success_and_the_scripts_own_arguments(tmp_path: Path) -> None:
    # One write per rank: print() makes two, and the ranks' lines could mix.
    path = script(tmp_path, "os.write(1, f'{sys.argv[1:]}\\n'.encode())")
    result = run_job(command(*LIGHT, path, "--lr", "3", "--arc-store=x"))
    assert result.exit_code == 0, str(result)
    assert result.stdout == 2 * "['--lr', '3', '--arc-store=x']\n"


@pytest.mark.slow
def test_the_scripts_own_code_is_the_jobs_and_is_not_tried_again(tmp_path: Path) -> None:
    """torchrun alone would end with 1, and would start all again as often as --max-restarts says."""
    path = script(tmp_path, "print('life', flush=True)", "sys.exit(3) if rank == 1 else time.sleep(60)")
    result = run_job(command(*LIGHT, "--max-restarts=3", path))
    assert result.exit_code == 3, str(result)
    assert result.stdout.count("life") == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--nproc-per-node=0",), "--nproc-per-node=0: a node needs one worker or more"),
        (("--nproc-per-node=-2",), "--nproc-per-node=-2: a node needs"),
        (("--max-restarts=-1",), "--max-restarts=-1 must not be negative"),
        (("--nnodes=2", "--node-rank=5"), "nodes are numbered 0 to 1"),
        (("--nnodes=2", "--node-rank=2"), "nodes are numbered 0 to 1"),
    ],
)
def test_numbers_that_torchrun_would_only_assert_or_wait_with(options, said, capsys) -> None:
    assert arcrun.run([*options, "train.py"]) == 78
    assert said in capsys.readouterr().err


def test_sigterm_ends_a_launcher_that_waits_for_another_node(tmp_path: Path) -> None:
    """It waits in C++, where Python handles no signal."""
    with socket.create_server(("127.0.0.1", 0)) as node:
        node.settimeout(60)
        options = ["--nnodes=2", "--node-rank=1", "--master-addr=127.0.0.1", f"--master-port={node.getsockname()[1]}"]
        argv = [sys.executable, "-m", "arc_dist.launch.arcrun", *options, script(tmp_path)]
        with Job(argv) as job:
            connection, _ = node.accept()  # and never answers
            with connection:
                job.process.send_signal(signal.SIGTERM)
                result = job.wait(60)
    assert result.exit_code == 75, str(result)


def test_no_restart_at_all(tmp_path: Path) -> None:
    path = script(tmp_path, "time.sleep(60) if rank == 0 else os.kill(os.getpid(), signal.SIGKILL)")
    result = run_job(command(*LIGHT, "--arc-max-restarts=0", "--max-restarts=0", path))
    assert result.exit_code == 76, str(result)
    assert "rank 1 killed by signal 9; no restart is allowed (ARC_MAX_RESTARTS=0)" in result.stderr, str(result)


@pytest.mark.slow
@pytest.mark.parametrize("code", [75, 77, 78])
def test_codes_of_ours_pass_through(tmp_path: Path, code: int) -> None:
    path = script(tmp_path, f"sys.exit({code})")
    result = run_job(command(*LIGHT, path))
    assert result.exit_code == code, str(result)
    assert f"exit code {code}: the job" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["arcrun", "torchrun"])
def test_a_script_that_does_not_exist_is_said_once(launcher: str) -> None:
    argv = command("no/such.py") if launcher == "arcrun" else torchrun(2, "-m", "arc_dist", "no/such.py")
    result = run_job(argv)
    assert result.exit_code == (78 if launcher == "arcrun" else 1), str(result)
    assert len(re.findall(r"the script no/such.py .*does not exist", result.stderr)) == 1
    assert result.seconds < 30


@pytest.mark.slow
def test_a_killed_supervisor_is_infrastructure(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        "stat = open(f'/proc/{os.getppid()}/stat').read()",
        "supervisor = int(stat.rpartition(')')[2].split()[1])",
        "os.kill(supervisor, signal.SIGKILL) if rank == 1 else time.sleep(60)",
    )
    result = run_job(command(*LIGHT, path))
    assert result.exit_code == 76, str(result)


@pytest.mark.slow
def test_how_scripts_end_when_a_lost_peer_ends_them_is_no_reason_not_to_try_again(tmp_path: Path) -> None:
    """torchrun ends all ranks when it lost one; what they make of that is no bug of theirs."""
    path = script(
        tmp_path,
        f"here = {str(tmp_path)!r}",
        "first = not os.path.exists(os.path.join(here, 'struck'))",
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))",
        "open(os.path.join(here, f'up-{rank}'), 'w')",
        "while rank == 1 and first and not os.path.exists(os.path.join(here, 'up-0')): time.sleep(0.01)",
        "stat = open(f'/proc/{os.getppid()}/stat').read()",
        "supervisor = int(stat.rpartition(')')[2].split()[1])",
        "if first and rank == 1: open(os.path.join(here, 'struck'), 'w'); os.kill(supervisor, signal.SIGKILL)",
        "if first: time.sleep(60)",
    )
    result = run_job(command(*LIGHT, "--max-restarts=1", path), timeout_s=90)
    assert (tmp_path / "struck").exists()
    assert result.exit_code == 0, str(result)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["arcrun", pytest.param("torchrun", marks=pytest.mark.soak)])
def test_a_killed_agent_takes_its_job_along(tmp_path: Path, launcher: str, shm_root: Path) -> None:
    """Else the job would train on, beside the one that is started in its place."""
    path = script(tmp_path, f"open(os.path.join({str(tmp_path)!r}, f'up-{{rank}}'), 'w')", "time.sleep(60)")
    light = ("--no-preload", "--no-guard")
    argv = command(*LIGHT, path) if launcher == "arcrun" else torchrun(2, "-m", "arc_dist", *light, path)
    with Job(argv, env={"TMPDIR": str(tmp_path)}) as job:
        job.wait_for(lambda: len(list(tmp_path.glob("up-*"))) == 2, 60, "both ranks")
        assert len(job.pids()) >= 7  # the launcher; a supervisor, a zygote and a trainer for each rank
        job.process.kill()
        job.process.wait(10)
        deadline = time.monotonic() + 60
        while job.pids() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert job.pids() == []
    # What it left in memory and in the temporary directory goes with the next start.
    assert len(list(shm_root.iterdir())) == 2
    (tmp_path / "train.py").write_text("")
    again = run_job(argv, env={"TMPDIR": str(tmp_path)})
    assert again.exit_code == 0, str(again)
    assert list(shm_root.iterdir()) == []
    assert list(tmp_path.glob("arc-*")) == []


@pytest.mark.slow
def test_ctrl_c_is_as_under_torchrun(tmp_path: Path) -> None:
    path = script(tmp_path, f"open(os.path.join({str(tmp_path)!r}, f'up-{{rank}}'), 'w')", "time.sleep(60)")
    with Job(command(*LIGHT, path)) as job:
        job.wait_for(lambda: len(list(tmp_path.glob("up-*"))) == 2, 60, "both ranks")
        job.process.send_signal(signal.SIGINT)
        result = job.wait(45)
        assert job.pids() == []
    assert result.exit_code == 130, str(result)
    assert result.stderr.count("KeyboardInterrupt") == 2


@pytest.mark.slow
def test_sigterm_of_guards_that_save_their_state_is_a_preemption(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        "def save(*_): sys.exit(75)",
        "signal.signal(signal.SIGTERM, save)",
        f"open(os.path.join({str(tmp_path)!r}, f'up-{{rank}}'), 'w')",
        "time.sleep(60)",
    )
    with Job(command(*LIGHT, path)) as job:
        job.wait_for(lambda: len(list(tmp_path.glob("up-*"))) == 2, 60, "both ranks")
        job.process.send_signal(signal.SIGTERM)
        result = job.wait(45)
        assert job.pids() == []
    assert result.exit_code == 75, str(result)


@pytest.mark.slow
@pytest.mark.parametrize("saves", [True, False])
def test_one_supervisor_that_is_told_to_go_ends_the_job_as_preempted(tmp_path: Path, saves: bool) -> None:
    """The rank that was not told gets its SIGTERM too, before the end of the other one would end it."""
    path = script(
        tmp_path,
        "here = os.path.dirname(__file__)",
        "def save(*_): open(os.path.join(here, f'saved-{rank}'), 'w'); sys.exit(75)",
        *(["signal.signal(signal.SIGTERM, save)"] if saves else []),
        "open(os.path.join(here, f'up-{rank}'), 'w')",
        "time.sleep(60)",
    )
    with two_supervisors(path) as (first, second):
        first.wait_for(lambda: len(list(tmp_path.glob("up-*"))) == 2, 60, "both ranks")
        second.process.send_signal(signal.SIGTERM)
        told, other = second.wait(30), first.wait(30)
    assert told.exit_code == (75 if saves else -signal.SIGTERM), str(told)
    assert other.exit_code == 75, str(other)
    assert len(list(tmp_path.glob("saved-*"))) == (2 if saves else 0)


@pytest.mark.slow
def test_ctrl_c_reaches_every_script_however_late_the_launcher_passes_it_on(tmp_path: Path) -> None:
    path = script(tmp_path, f"open(os.path.join({str(tmp_path)!r}, f'up-{{rank}}'), 'w')", "time.sleep(60)")
    with two_supervisors(path) as (first, second):
        first.wait_for(lambda: len(list(tmp_path.glob("up-*"))) == 2, 60, "both ranks")
        first.process.send_signal(signal.SIGINT)
        second.wait_for(lambda: "KeyboardInterrupt" in second.stderr(), 30, "the other rank's Ctrl-C")
        second.process.send_signal(signal.SIGINT)
        for ended in (first.wait(30), second.wait(30)):
            assert ended.exit_code == -signal.SIGINT, str(ended)


def test_help_and_wrong_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as help_end:
        arcrun.run(["--help"])
    assert help_end.value.code == 0
    text = capsys.readouterr().out
    assert "--arc-store" in text
    assert "--nproc-per-node" in text
    for wrong in (["--no-such-option", "x.py"], [], ["--no-python", "x.py"]):
        with pytest.raises(SystemExit) as end:
            arcrun.run(wrong)
        assert end.value.code == 78


def test_options_stand_for_variables() -> None:
    options = parse(["--store=s3://b/x", "--max-restarts", "4", "-m", "train", "--store", "mine"])
    assert options.environ == {"ARC_STORE": "s3://b/x", "ARC_MAX_RESTARTS": "4"}
    assert options.target.name == "train"
    assert options.target.is_module
    assert options.target.args == ("--store", "mine")


@pytest.mark.parametrize(
    ("returncodes", "worker", "signal_number", "expected"),
    [
        ([3, -15], 3, None, 3),
        ([77, 77], 77, None, 77),
        ([0, 0, 1], 1, None, 1),
        ([], -9, None, 76),
        ([-15], -15, None, 143),
        ([-15, 1], -9, None, 76),  # a supervisor was killed, and the others were told to end
        ([-9, -15], -9, None, 137),  # a trainer was, and its supervisor ended like it
        ([75, 75], None, 15, 75),
        ([0, 75], None, 15, 75),
        ([-15, -15], None, 15, 143),
        ([], None, 2, 130),
        ([0, 0], None, 15, 143),
    ],
)
def test_the_jobs_exit_code(
    returncodes: list[int], worker: int | None, signal_number: int | None, expected: int
) -> None:
    assert endings.job_exit_code(returncodes, worker_exit_code=worker, signal_number=signal_number) == expected


def test_endings_are_read_in_the_order_in_which_they_came(tmp_path: Path) -> None:
    assert endings.verdict(str(tmp_path)) is None
    endings.leave(str(tmp_path), "1", 75)
    assert endings.verdict(str(tmp_path)) is None
    endings.leave(str(tmp_path), "0", 3)
    assert endings.read(tmp_path) == [75, 3]
    assert endings.verdict(str(tmp_path)) == 3
    assert endings.verdict(str(tmp_path / "gone")) is None
    endings.begin(str(tmp_path), "1")  # a new supervisor in that place
    endings.begin(str(tmp_path), "2")
    endings.begin(None, "0")
    assert endings.read(tmp_path) == [3]
    assert os.listdir(tmp_path) != []


def test_the_code_of_a_script_that_was_told_to_end_is_no_verdict(tmp_path: Path) -> None:
    endings.leave(str(tmp_path), "1", 1, was_told=True)
    assert endings.verdict(str(tmp_path)) is None
    assert endings.read(tmp_path) == [1]
    endings.leave(str(tmp_path), "2", 1)
    assert endings.verdict(str(tmp_path)) == 1
