"""The store on a real NFSv4 server and client: what it says and does behind our back, and what becomes of checkpoints.

Each test boots a machine of its own (see services/nfs.py), tells one story of nfs_scenarios.py in it, and looks at what
was seen there. A story takes 25 s to 2 minutes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services import nfs

_WHY_NOT = nfs.why_not()
STORIES = Path(__file__).with_name("nfs_scenarios.py")

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(900),
    pytest.mark.skipif(_WHY_NOT is not None, reason=str(_WHY_NOT)),
]


def seen_in(story: str, *arguments: Any, timeout_s: float = 600.0) -> dict[str, Any]:
    done = nfs.run_on_nfs(STORIES, story, json.dumps(arguments), timeout_s=timeout_s)
    assert done.exit_code == 0, f"{done.stdout}\n--- stderr\n{done.stderr}\n--- console\n{done.console}"
    print(done.stdout, done.stderr, sep="\n")
    return json.loads(done.stdout.splitlines()[-1])


def test_every_promise_of_the_contract_holds():
    done = nfs.run_on_nfs(STORIES, "contract_suite", "[]", timeout_s=800)
    print(done.stdout)
    *lines, last = done.stdout.splitlines()
    assert json.loads(last) == {"exit_code": 0, "left": []}, done.stdout + done.stderr
    assert lines[-1] == "All promises hold."
    assert sum(line.startswith("ok ") for line in lines) == len(lines) - 1 >= 20


def test_two_ranks_with_a_client_each_save_commit_restore_and_agree():
    seen = seen_in("two_ranks_two_clients")
    assert seen["steps"] == [5, 10]
    assert seen["resumed"] == [5, 10, 15, 20]
    assert seen["second"] == seen["straight"], "what was restored trains on to the same bits"
    assert len(set(seen["first"]) | set(seen["second"])) == 4
    assert seen["verified"] == 0
    assert seen["damage"] == []


@pytest.mark.parametrize(("version", "met"), [("4.1", "writing"), ("4.2", "creating")])
def test_a_full_server_is_said_late_and_moves_the_save(version: str, met: str):
    """NFS 4.1 cannot reserve, so that only fsync tells; 4.2 can."""
    seen = seen_in("full_disk", version)
    assert seen["probe"] == [4 << 20, "fsync 28"], "the fault: write takes all bytes, fsync says ENOSPC"
    for full in seen["full"]:
        assert full["type"] == "StoreFull"
        assert full["message"].startswith(f"{met} /media/nfs/ckpt")
        assert "Free space" in full["message"]
    assert seen["left"] == ["attempt.json"]
    assert seen["still"] == [[1], []]
    assert seen["incidents"] == ["tier_full"]
    assert seen["digest"][0] == seen["digest"][1]
    assert seen["other"][0] == 10, "what did not fit went to the next tier"
    assert seen["nfs"] == [20, 30], "with room again, the first tier is used again"
    assert seen["drafts"] == seen["damage"] == []


@pytest.mark.parametrize("mounted", ["soft", "hard"])
def test_a_server_that_stops_in_mid_save_holds_up_no_training(mounted: str):
    seen = seen_in("server_stops", mounted)
    assert len(seen["fired"]) == 1
    assert seen["trained"]["serving"] is False, "the steps were trained while there was no server"
    assert "checkpoint_failed" in seen["incidents"]
    assert seen["digest"][0] == seen["digest"][1]
    assert 20 not in seen["steps"]
    assert seen["steps"][0] == 10
    assert seen["steps"][-2:] == [50, 60], "the server is back and used"
    assert seen["damage"] == []


def test_training_on_a_hard_mount_ends_although_its_server_does_not_come_back():
    seen = seen_in("server_never_comes_back")
    assert len(seen["lost"]["fired"]) == 1
    assert seen["lost"]["digest"] == seen["plain"][0]
    assert seen["there"]["serving"] is False, "the fault lasted to the end of the training"
    assert seen["there"]["other"][-1] == 30, "the next tier has the last step"
    # No program can help it: Linux ends no process with unwritten bytes on a dead hard mount (see docs/store.md).
    assert seen["there"]["exit_code"] is None
    assert seen["ended"] == 0
    assert seen["next"]["fired"] == []
    assert seen["next"]["digest"] == seen["plain"][1], "the next job goes on from the newest step"
    assert seen["nfs"][-1] == 40
    assert seen["damage"] == []


@pytest.mark.parametrize("mounted", ["soft", "hard"])
def test_a_server_that_restarts_in_mid_save_costs_nothing(mounted: str):
    seen = seen_in("server_restarts", mounted)
    assert len(seen["fired"]) == 1
    assert seen["incidents"] == []
    assert seen["steps"] == [10, 20, 30]
    assert seen["digest"][0] == seen["digest"][1]
    assert seen["damage"] == []


def test_a_stale_handle_is_an_error_and_never_an_older_step():
    seen = seen_in("stale_handles")
    assert seen["back"] == [10, 20], "a step that was put back from a backup is the newest"
    assert seen["read"] is True
    assert seen["raw"] == "ESTALE", "the fault"
    for name, failure in seen["failures"].items():
        assert failure["type"] in ("StoreGone", "StoreTransient"), (name, failure)
        assert "Stale file handle" in failure["message"], (name, failure)


def test_names_that_a_client_does_not_see_yet_break_no_commit_and_hide_no_step():
    seen = seen_in("late_names")
    assert len(seen["unseen"]) == 4
    for name, (here, in_truth) in seen["unseen"].items():
        assert (here, in_truth) == (False, True), f"the fault: {name} is there, and the client denies it"
    assert seen["seen"] == [[10, 20], [10, 20, 30], [10, 20, 30, 40], [10, 20, 30, 40, 50], [40, 50]]
    assert seen["damage"] == []


def test_open_files_that_were_removed_disturb_neither_listing_nor_pruning():
    seen = seen_in("silly_rename")
    assert any(name.startswith(".nfs0") for name in seen["names"]), "the fault"
    assert seen["pruned"]["result"] == "[10]"
    assert seen["listed"] == [20, 30]
    assert seen["orphans"]["result"] == "[('step-00000010', False)]"
    assert seen["held_open"]["result"] == "[True]"
    assert "step-00000010" in seen["between"], "it is still open"
    assert seen["again"]["result"] == "[]"
    assert seen["after"]["result"] == "[20]"
    assert seen["left"] == ["step-00000030", "step-00000040"]
    assert seen["steps"] == [30, 40]
    assert seen["damage"] == []


def test_root_is_nobody_and_is_told_so_and_what_users_write_is_private():
    seen = seen_in("denied_and_private")
    for name in ("as_root", "foreign"):
        assert seen[name]["type"] == "StoreDenied"
        assert "Give this user write permission there" in seen[name]["message"]
    assert seen["modes"] == [["0o600"], ["0o700"], [1000]]
    assert seen["damage"] == []


def test_of_eight_processes_on_two_clients_one_creates_each_name():
    seen = seen_in("exclusive_race", 20, 8)
    for kind, read in zip(seen["winners"], seen["read"], strict=True):
        assert [len(winners) for winners in kind] == [1] * 20
        assert [winners[0] for winners in kind] == read, "the bytes are the winner's"
    winners = [winners[0] % 2 for kind in seen["winners"] for winners in kind]
    assert set(winners) == {0, 1}, "both clients raced"
    assert seen["left"] == []


# ---------------------------------------------------------------------- the machine itself


def test_a_program_that_never_ends_is_ended_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = endless(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(nfs.NfsFailed, match="running"):
        nfs.run_on_nfs(program, timeout_s=30)
    assert namespaces_of(tmp_path) == set()
    assert list(tmp_path.iterdir()) == [program]


def test_nothing_runs_on_when_the_tests_are_killed(tmp_path: Path):
    program = endless(tmp_path)
    code = f"from pathlib import Path; from services import nfs; nfs.run_on_nfs(Path({str(program)!r}))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=env)
    try:
        wait_until(lambda: "running" in "".join(path.read_text() for path in tmp_path.glob("nfs-*/stdout")))
        (namespace,) = namespaces_of(tmp_path)
        assert len(processes_in(namespace)) >= 2, "the kernel, and the processes of the machine inside"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
    wait_until(lambda: processes_in(namespace) == [])


def endless(directory: Path) -> Path:
    program = directory / "endless.py"
    program.write_text("import time\nprint('running', flush=True)\ntime.sleep(600)\n")
    return program


def namespaces_of(work: Path) -> set[str]:
    """The PID namespaces of the machines that were booted from a directory."""
    found: set[str] = set()
    for pid in all_pids():
        try:
            words = (Path("/proc", pid, "cmdline")).read_text().split("\0")
            if words[0].endswith(nfs.KERNEL) and any(word.startswith(f"init={work}/") for word in words):
                found.add(os.readlink(f"/proc/{pid}/ns/pid"))
        except OSError:
            continue  # it has just ended
    return found


def processes_in(namespace: str) -> list[str]:
    found: list[str] = []
    for pid in all_pids():
        try:
            if os.readlink(f"/proc/{pid}/ns/pid") == namespace:
                found.append(pid)
        except OSError:
            continue  # it has just ended
    return found


def all_pids() -> list[str]:
    return [name for name in os.listdir("/proc") if name.isdigit()]


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not so after {timeout_s:g} s"
        time.sleep(0.1)
