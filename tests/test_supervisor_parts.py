"""The supervisor's parts by themselves: causes, membership, messages, facts about processes, reports of incidents."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from arc_dist.errors import ConfigError, InfrastructureError
from arc_dist.supervisor import process, rendezvous, script, wire, zygote
from arc_dist.supervisor.cause import classify
from arc_dist.supervisor.incidents import Incident
from arc_dist.supervisor.membership import Membership

NO_COUNTS: dict[str, int] = {}


def test_a_sigkill_is_the_oom_killers_only_when_a_counter_rose() -> None:
    kill = -int(signal.SIGKILL)
    cases = [
        ({"cgroup": 3, "host": 9}, {"cgroup": 3, "host": 9}, "signal"),
        ({"cgroup": 3, "host": 9}, {"cgroup": 4, "host": 10}, "oom"),
        ({"host": 9}, {"host": 10}, "oom"),
        ({}, {"cgroup": 4}, "signal"),  # a counter that could not be read before proves nothing
    ]
    for before, after, kind in cases:
        cause = classify(kill, exception=None, oom_before=before, oom_after=after)
        assert cause.kind == kind
        assert (cause.evidence != "") == (kind == "oom")
    for named, kind in ((True, "oom"), (False, "signal")):
        cause = classify(kill, exception=None, oom_before={"host": 1}, oom_after={"host": 2}, named_by_oom_killer=named)
        assert cause.kind == kind
    other = classify(-int(signal.SIGSEGV), exception=None, oom_before={"host": 1}, oom_after={"host": 2})
    assert other.kind == "signal"
    assert str(other) == "killed by SIGSEGV"


def test_an_exception_of_an_exited_process_is_its_cause_and_an_older_one_of_a_killed_process_is_not() -> None:
    note = {"type": "ValueError", "message": "x", "traceback": "...", "step": 3, "frame": "x.py:1 in f", "batch": None}
    raised = classify(1, exception=note, oom_before=NO_COUNTS, oom_after=NO_COUNTS)
    assert raised.kind == "exception"
    assert raised.to_wire()["exception"] == note
    assert raised.to_wire()["exit_code"] == 1
    killed = classify(-9, exception=note, oom_before=NO_COUNTS, oom_after=NO_COUNTS)
    assert killed.kind == "signal"
    assert killed.to_wire()["signal"] == 9
    assert classify(4, exception=None, oom_before=NO_COUNTS, oom_after=NO_COUNTS).kind == "exit"
    assert classify(0, exception=None, oom_before=NO_COUNTS, oom_after=NO_COUNTS).kind == "finished"


@pytest.mark.parametrize(
    ("kind", "message", "echo"),
    [
        ("RuntimeError", "[...gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1", True),
        ("torch.distributed.DistBackendError", "NCCL error", True),
        ("ValueError", "shapes differ", False),
    ],
)
def test_the_echo_of_a_peers_death_is_recognised(kind: str, message: str, echo: bool) -> None:
    cause = classify(1, exception={"type": kind, "message": message}, oom_before=NO_COUNTS, oom_after=NO_COUNTS)
    assert cause.is_echo is echo


def test_membership_of_torchruns_environment() -> None:
    environ = {
        "RANK": "3",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "host0",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "job-7",
        "TORCHELASTIC_RESTART_COUNT": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    assert Membership.read(environ) == Membership(
        rank=3,
        world_size=8,
        local_rank=1,
        run_id="job-7",
        restart_count=2,
        store_host="host0",
        store_port=29500,
        has_agent_store=True,
        has_agents=True,
    )
    assert Membership.read({}) == Membership()
    assert Membership.read({"TORCHELASTIC_RUN_ID": "none"}).run_id is None


@pytest.mark.parametrize(
    ("environ", "word"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "h"}, "RANK=2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({"RANK": "zero"}, "RANK='zero'"),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(environ: dict[str, str], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Membership.read(environ)


def test_messages_arrive_whole_and_the_end_is_seen() -> None:
    ours, theirs = socket.socketpair()
    message = {"command": "fork", "set": {"ARC_PLAN": "x" * 300_000}}
    sender = threading.Thread(target=lambda: (wire.send(ours, message), ours.close()))
    sender.start()
    assert wire.receive(theirs) == message
    assert wire.receive(theirs) is None
    sender.join()


def test_a_message_cut_in_the_middle_is_the_end() -> None:
    ours, theirs = socket.socketpair()
    ours.sendall(b"\x00\x00\x00\x10half")
    ours.close()
    assert wire.receive(theirs) is None


def test_a_process_is_named_by_its_pid_and_start() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        ticks = process.start_ticks(child.pid)
        assert ticks is not None
        assert child.pid in process.children(os.getpid())
        assert not process.wait_gone(child.pid, ticks=ticks, timeout_s=0.05)
        assert process.wait_gone(child.pid, ticks=ticks + 1, timeout_s=5)  # a later process has its number
        started = time.monotonic()
        threading.Timer(0.1, child.kill).start()
        assert process.wait_gone(child.pid, ticks=ticks, timeout_s=30)
        assert time.monotonic() - started < 10
        assert process.start_ticks(child.pid) is None  # a zombie is no process any more
    finally:
        child.kill()
        child.wait()
    assert process.wait_gone(child.pid, ticks=ticks, timeout_s=1)


def test_a_counter_of_oom_kills_can_be_read() -> None:
    assert all(count >= 0 for count in process.oom_kills().values())


def test_a_zygote_refuses_to_fork_from_a_process_with_threads() -> None:
    """The check runs in the zygote itself; a thread started by an import must end the job, not hang a trainer."""
    program = (
        "import socket, threading, time\n"
        "from arc_dist.supervisor import zygote\n"
        "threading.Thread(target=time.sleep, args=(30,), daemon=True).start()\n"
        "zygote.serve(socket.socketpair()[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "the zygote runs 2 threads and cannot fork safely" in done.stderr


def test_modules_that_are_not_installed_are_no_reason_not_to_start() -> None:
    zygote.preload(["json", "no_such_module_anywhere", "no_such_package.part"])


def test_the_address_that_others_reach_this_host_by() -> None:
    assert rendezvous.advertised_host(Membership()) == ("127.0.0.1", "127.0.0.1")
    local = Membership(store_host="localhost", store_port=29500)
    assert rendezvous.advertised_host(local) == ("localhost", "127.0.0.1")
    with pytest.raises(InfrastructureError, match="no-such-host"):
        rendezvous.advertised_host(Membership(store_host="no-such-host.invalid", store_port=1))


def test_every_generation_has_a_store_of_its_own() -> None:
    stores = rendezvous.GenerationStores("127.0.0.1")
    first, second = stores.prepare(0), stores.prepare(1)
    assert first["port"] != second["port"]
    assert stores.prepare(0) == first
    stores.retire(1)
    assert stores.prepare(0)["port"] != first["port"]
    assert stores.prepare(1) == second


def test_a_store_that_cannot_be_reached_is_infrastructure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_STORE_TIMEOUT_S", 0.5)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    member = Membership(rank=1, world_size=2, store_host="127.0.0.1", store_port=port, has_agent_store=True)
    with pytest.raises(InfrastructureError, match=f"127.0.0.1:{port}"):
        rendezvous.Meeting(member)


def test_a_port_that_is_in_use_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_STORE_TIMEOUT_S", 5.0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        member = Membership(rank=0, world_size=2, store_host="127.0.0.1", store_port=port)
        with pytest.raises(InfrastructureError, match=f"127.0.0.1:{port} cannot be served.*MASTER_PORT"):
            rendezvous.Meeting(member)


def _raised(body: Callable[[], object]) -> BaseException:
    with pytest.raises(Exception) as caught:
        body()
    return caught.value


def test_what_a_chain_of_exceptions_began_with_tells_whose_fault_it_was() -> None:
    def wrapped() -> None:
        try:
            raise RuntimeError("Connection closed by peer")
        except RuntimeError as error:
            raise ValueError("training failed") from error

    def cleaned_up() -> None:
        try:
            raise ValueError("shapes differ")
        finally:
            raise RuntimeError("Connection closed by peer")

    def own() -> None:
        try:
            raise KeyError("x")
        except KeyError as error:
            raise ValueError("no such setting") from error

    assert str(script.telling(_raised(wrapped))) == "Connection closed by peer"
    assert str(script.telling(_raised(cleaned_up))) == "shapes differ"
    assert str(script.telling(_raised(own))) == "no such setting"


def test_how_a_script_takes_an_order_to_end_is_no_bug_of_its_own() -> None:
    own = classify(3, exception=None, oom_before=NO_COUNTS, oom_after=NO_COUNTS)
    assert own.after_notice(None) is own
    assert own.after_notice(15).to_wire()["signal"] == 15
    for code in (75, 77, 78):
        decided = classify(code, exception=None, oom_before=NO_COUNTS, oom_after=NO_COUNTS)
        assert decided.after_notice(15) is decided
    killed = classify(-9, exception=None, oom_before=NO_COUNTS, oom_after=NO_COUNTS)
    assert killed.after_notice(15) is killed


def test_what_an_incident_cost() -> None:
    cause = classify(-9, exception=None, oom_before=NO_COUNTS, oom_after=NO_COUNTS)
    incident = Incident.seen(rank=1, generation=4, step=120, cause=cause, exited_at=10.0, last_progress_at=9.5)
    plan = {"step": 118, "tier": "memory"}
    report = incident.resumed(generation=5, plan=plan, forked_at=10.25)
    assert report["seen_after_s"] == 0.5
    assert report["resumed_after_s"] == 0.25
    assert report["steps_lost"] == 2
    assert report["kind"] == "rank_died"
    assert (
        incident.second_line(report) == "all ranks restarted as generation 5 from step 118 in memory, "
        "0.250 s after the death, 2 steps lost"
    )
    unknown = Incident.seen(rank=1, generation=0, step=None, cause=cause, exited_at=10.0, last_progress_at=None)
    report = unknown.resumed(generation=1, plan={"step": None, "tier": "none"}, forked_at=10.1)
    assert report["steps_lost"] is None
    assert report["seen_after_s"] is None
    assert unknown.stopped("enough")["action"] == "stop"
