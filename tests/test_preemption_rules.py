"""What a notice is, how long training may go on after one, what follows a generation that ended after one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arc_dist.config import Env
from arc_dist.errors import ConfigError, ExitCode
from arc_dist.launch.endings import job_exit_code
from arc_dist.preemption.facts import SavingFacts
from arc_dist.preemption.file import NoticeFile, seconds_since_1970
from arc_dist.preemption.page import NoticePage
from arc_dist.protocol.budgets import Cause, CauseKind, Death
from arc_dist.protocol.events import Committing, Died, Finished, Listed, Preempted, Ready, Settled
from arc_dist.protocol.generations import Order, apply, directive
from arc_dist.protocol.job import Job, JobConfig, Phase, durable, revive
from arc_dist.protocol.leaving import Notices, Response, note, saving_s, training_s
from arc_dist.protocol.pick import Committed
from arc_dist.protocol.sources import Holding, Inventory
from arc_dist.supervisor import process

CONFIG = JobConfig(world_size=2)
OVERDUE = Cause(kind=CauseKind.OVERDUE)
BUG = Cause(kind=CauseKind.EXCEPTION, exception_type="ValueError", message="x")
HELD = Holding(step=9, slot=0, certified=True)


def ready(rank: int, generation: int, *holdings: Holding) -> Ready:
    return Ready(rank=rank, generation=generation, inventory=Inventory(host="h", shm_dir=f"/{rank}", holdings=holdings))


def died(rank: int, generation: int, cause: Cause = OVERDUE) -> Died:
    return Died(generation=generation, death=Death(rank=rank, cause=cause, step=9))


def play(job: Job, *heard: object) -> Job:
    for event in heard:
        job = apply(CONFIG, job, event, 0.0).job  # type: ignore[arg-type]
    return job


RUNNING = play(Job(), ready(0, 0), ready(1, 0))
FLUSHING = play(RUNNING, Preempted(rank=1), died(1, 0), ready(0, 1, HELD), ready(1, 1, HELD))


# ---- notices


def responses(*times_s: float) -> list[Response]:
    notices, found = Notices(), []
    for now_s in times_s:
        notices, response = note(notices, now_s)
        found.append(response)
    return found


def test_signals_within_a_second_are_one_notice_and_the_third_notice_ends_at_once():
    leave, nothing, end = Response.LEAVE, Response.NOTHING, Response.END
    assert responses(5.0, 5.1, 5.9, 6.8) == [leave, nothing, nothing, nothing]
    assert responses(5.0, 7.0, 7.5, 9.0) == [leave, nothing, nothing, end]


@given(st.lists(st.floats(0, 0.99), max_size=50))
def test_no_burst_of_signals_ends_anything(gaps: list[float]):
    now_s, times_s = 0.0, [0.0]
    for gap in gaps:
        times_s.append(now_s := now_s + gap)
    assert Response.END not in responses(*times_s)


@given(st.floats(0.1, 1e5), st.one_of(st.none(), st.floats(0, 1e6)))
def test_the_trainer_has_at_least_half_of_the_grace_period_and_never_more_than_all(grace_s, needed_s):
    assert grace_s / 2 <= training_s(grace_s, needed_s) <= grace_s


def test_what_saving_needs_is_left():
    assert training_s(60.0, saving_s(8_000_000_000, 1e9)) == 60.0 - (3.0 + 12.0)


# ---- generations


def test_a_notice_is_told_to_ranks_that_run_and_to_no_other():
    told = play(RUNNING, Preempted(rank=1))
    for rank in (0, 1):
        assert directive(told, rank, 0, following="run").order is Order.LEAVE
        assert directive(told, rank, 0).order is Order.RUN
        assert directive(RUNNING, rank, 0, following="run").order is Order.RUN


@pytest.mark.parametrize("cause", [OVERDUE, Cause(kind=CauseKind.SIGNAL, signal=9), Cause(kind=CauseKind.LOST)])
def test_what_memory_holds_is_saved_by_a_generation_of_its_own(cause: Cause):
    job = play(RUNNING, Preempted(rank=1), died(1, 0, cause), ready(0, 1, HELD), ready(1, 1, HELD))
    assert (job.phase, job.generation, job.flushing) == (Phase.RUNNING, 1, True)
    assert job.plan is not None
    assert job.plan.step == 9
    assert directive(job, 0, 1, following="run").order is Order.RUN
    job = play(job, Finished(rank=0, generation=1), Finished(rank=1, generation=1))
    assert job.stop is not None
    assert job.stop.exit_code == ExitCode.PREEMPTED


def test_a_flush_that_fails_is_said_and_not_repeated():
    job = play(FLUSHING, died(0, 1, BUG), ready(0, 2, HELD), ready(1, 2, HELD))
    assert job.stop is not None
    assert job.stop.exit_code == ExitCode.INFRASTRUCTURE
    assert "step 9 could not be saved" in job.stop.reason


def test_what_is_committed_already_is_not_saved_again():
    listed = Listed(url="u", committed=frozenset({Committed(step=9, url="u", generation=0)}))
    job = play(RUNNING, listed, Preempted(rank=1), died(1, 0), ready(0, 1, HELD), ready(1, 1, HELD))
    assert job.stop is not None
    assert job.stop.exit_code == ExitCode.PREEMPTED
    assert not job.flushing


def test_a_commit_under_way_is_waited_for_before_anything_is_saved_from_memory():
    newer = Committed(step=10, url="u", generation=0)
    job = play(RUNNING, Committing(step=10), Preempted(rank=1), died(1, 0), ready(0, 1, HELD), ready(1, 1, HELD))
    assert job.phase is Phase.STARTING
    job = play(job, Settled(step=10, committed=newer))
    assert job.stop is not None
    assert job.stop.exit_code == ExitCode.PREEMPTED


def test_a_notice_in_a_recovery_starts_no_more_training():
    ending = play(RUNNING, died(1, 0, Cause(kind=CauseKind.SIGNAL, signal=9)), ready(0, 1, HELD))
    assert play(ending, Preempted(rank=0), ready(1, 1, HELD)).flushing


def test_a_notice_before_anything_ran_stops_without_waiting_for_all():
    job = play(Job(), ready(0, 0), Preempted(rank=0))
    assert job.stop is not None
    assert job.stop.exit_code == ExitCode.PREEMPTED


def test_a_bug_after_a_notice_is_not_tried_again_and_does_not_cost_the_state():
    reached = play(RUNNING, Settled(step=3, committed=Committed(step=3, url="u", generation=0)))
    job = play(reached, Preempted(rank=1), died(1, 0, BUG), ready(0, 1, HELD), ready(1, 1, HELD))
    assert job.flushing


def test_a_restarted_coordinator_knows_that_a_generation_only_saves():
    again = revive(CONFIG, json.loads(json.dumps(durable(FLUSHING))), 0.0)
    assert (again.flushing, again.plan) == (True, FLUSHING.plan)


def test_the_exit_code_says_when_one_rank_could_not_save():
    assert job_exit_code([75, 76], signal_number=15) == 76
    assert job_exit_code([76, 76], signal_number=15) == 76


# ---- files, pages, settings


def test_an_old_file_is_no_notice_until_it_is_written_again(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "notice"
    started_at = seconds_since_1970(process.start_ticks(os.getpid()))
    assert started_at <= time.time()
    watch = NoticeFile(path, job_started_at=started_at, on_notice=lambda: None)
    assert not watch.is_there()
    path.touch()
    os.utime(path, (started_at - 100, started_at - 100))
    with caplog.at_level("WARNING", logger="arc_dist"):
        assert not watch.is_there()
        assert not watch.is_there()
    assert len([line for line in caplog.messages if "belongs to an earlier preemption" in line]) == 1
    path.touch()
    assert watch.is_there()


def test_the_word_stays_up_and_is_seen_through_every_mapping(tmp_path: Path):
    page = NoticePage.create(tmp_path)
    other = NoticePage.open(tmp_path)
    assert not other.is_raised
    page.raise_notice()
    assert other.is_raised
    assert NoticePage.open(tmp_path).is_raised


def test_the_facts_come_back_as_they_were_and_none_is_an_answer(tmp_path: Path):
    assert SavingFacts.read(tmp_path) is None
    facts = SavingFacts(
        tiers=({"url": "u", "every": None, "keep": None},),
        run="run",
        owner="o",
        save_timeout_s=5.0,
        state_bytes=10,
        bytes_per_s=None,
    )
    facts.write(tmp_path)
    assert SavingFacts.read(tmp_path) == facts
    assert facts.needed_s is None


def test_settings_of_preemption_are_read_and_wrong_ones_named():
    assert Env.read({}).preempt_signals == (signal.SIGTERM,)
    assert Env.read({"ARC_PREEMPT_SIGNALS": "term, SIGUSR1"}).preempt_signals == (signal.SIGTERM, signal.SIGUSR1)
    assert Env.read({"ARC_GRACE_S": "2.5"}).grace_s == 2.5
    for name, value in [
        ("ARC_GRACE_S", "0"),
        ("ARC_GRACE_S", "soon"),
        ("ARC_GRACE_S", "inf"),
        ("ARC_PREEMPT_SIGNALS", "SIGKILL"),
        ("ARC_PREEMPT_SIGNALS", "SIGTERM,"),
    ]:
        with pytest.raises(ConfigError, match=name):
            Env.read({name: value})


HANDLERS = """
import os, signal, sys, threading, time
from arc_dist.preemption.signals import NoticeSignals
seen, arrived = [], threading.Event()
if "own" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: seen.append("own"))
notices = NoticeSignals([signal.SIGTERM], on_notice=lambda: seen.append("notice"), on_arrival=lambda n: arrived.set())
notices.install()
if "fork" in sys.argv:
    pid = os.fork()
    if pid == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert not seen and not arrived.wait(0.2)
os.kill(os.getpid(), signal.SIGTERM)
assert arrived.wait(30)
os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGINT)
print(seen, flush=True)
if "third" in sys.argv:
    time.sleep(1.1)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1.1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
notices.remove()
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.set_wakeup_fd(-1), flush=True)
"""


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        ((), "['notice']\nTrue -1\n", 0),
        (("own",), "['notice', 'own', 'own']\nTrue -1\n", 0),
        (("fork",), "['notice']\nTrue -1\n", 0),
        (("third",), "['notice']\n", -signal.SIGTERM),
    ],
)
def test_signals_as_notices_in_a_process(words: tuple[str, ...], said: str, code: int):
    done = subprocess.run([sys.executable, "-c", HANDLERS, *words], capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.returncode) == (said, code), done.stderr
