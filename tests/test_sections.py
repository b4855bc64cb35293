"""What a rank says about its progress, read as its supervisor reads it."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from arc_dist.errors import ConfigError
from arc_dist.protocol.hangs import BLOCK_STEPS, ENOUGH_STEPS, WARM_UP_STEPS, HangPolicy, Section
from arc_dist.sections import Sections
from arc_dist.snapshot.progress import COPY, COPY_BYTES, FIRST_NAMED, NUM_INDEXES, ProgressPage

POLICY = HangPolicy(factor=10.0, min_s=0.001, unseen_s=1800.0)


@pytest.fixture
def page(tmp_path: Path) -> ProgressPage:
    return ProgressPage.create(tmp_path)


def attached(directory: Path, policy: HangPolicy = POLICY) -> Sections:
    sections = Sections(policy, 1.5)
    sections.attach(directory, 4)
    return sections


def steps(sections: Sections, first: int, count: int) -> None:
    for step in range(first, first + count):
        sections.begin_step(step, Section.DATA)
        sections.enter(Section.FORWARD)
        sections.enter(Section.SCRIPT)


def test_a_supervisor_reads_where_the_rank_is(page, tmp_path):
    sections = attached(tmp_path)
    before = time.monotonic_ns()
    sections.begin_step(7, Section.DATA)
    sections.enter(Section.FORWARD)
    read = page.read()
    assert (read.section, read.name, read.step, read.generation) == (Section.FORWARD, "forward", 7, 4)
    assert (read.pid, read.thread) == (os.getpid(), threading.get_ident())
    assert before <= read.since_ns <= time.monotonic_ns()
    assert read.limit_ns == 1800 * 10**9
    assert read.stop_limit_ns == 10**6
    writes = read.writes
    sections.enter(Section.FORWARD)
    assert page.read().writes == writes + 1


def test_a_writer_that_dies_in_the_middle_leaves_the_older_copy(page, tmp_path):
    sections = attached(tmp_path)
    sections.begin_step(7, Section.DATA)
    whole = page.read()
    # What `enter` stores before the number of writes, and no more.
    COPY.pack_into(page.buffer, COPY_BYTES * (1 + (whole.writes + 1) % 2), 6, 6, 99, 1, 1)
    assert page.read() == whole


def test_readers_never_see_a_mixture_while_the_writer_runs(page, tmp_path):
    sections, over = attached(tmp_path), threading.Event()

    def write() -> None:
        for step in range(1, 20_000):
            sections.begin_step(step, 1 + step % 11)
        over.set()

    sections._thread = 0
    writer = threading.Thread(target=write)
    writer.start()
    num_read = 0
    while not over.is_set():
        read = page.read()
        assert read.step == 0 or read.section == 1 + read.step % 11
        num_read += 1
    writer.join()
    assert num_read > 10


def test_limits_are_learned_after_the_warm_up(page, tmp_path):
    sections = attached(tmp_path)
    sections.begin_step(1, Section.FORWARD)
    time.sleep(0.05)  # compilation, say: not learned from
    steps(sections, 2, ENOUGH_STEPS + 5)
    limit_s = page.spent().limit_ns["forward"] / 1e9
    assert 0.001 <= limit_s < 0.5
    assert page.spent().limit_ns["the script's own code"] / 1e9 == 1800
    sections.begin_step(100, Section.FORWARD)
    time.sleep(0.2)
    sections.enter(Section.SCRIPT)
    assert page.spent().limit_ns["forward"] / 1e9 >= 2.0


def test_an_outlier_is_forgotten_after_two_blocks(page, tmp_path):
    sections = attached(tmp_path, HangPolicy(factor=10.0, min_s=0.001))
    steps(sections, 1, 2 * ENOUGH_STEPS)
    sections.begin_step(100, Section.UPDATE)
    time.sleep(1.0)
    sections.enter(Section.SCRIPT)
    assert page.spent().limit_ns["update"] / 1e9 >= 10.0
    for step in range(200, 200 + 2 * BLOCK_STEPS + ENOUGH_STEPS):
        sections.begin_step(step, Section.UPDATE)
        sections.enter(Section.SCRIPT)
    assert page.spent().limit_ns["update"] / 1e9 < 10.0


def test_what_was_learned_survives_a_restart_and_so_does_how_long_the_first_steps_take(page, tmp_path):
    before = attached(tmp_path)
    before.begin_step(1, Section.FORWARD)
    time.sleep(1.0)  # compilation, say
    steps(before, 2, 3 * ENOUGH_STEPS)
    for _ in range(3):
        with before.named("evaluate", None):
            time.sleep(0.01)
    state = before.state_dict()
    page.clear()
    after = attached(tmp_path)
    after.load_state_dict(state)
    steps(after, 31, 1)
    assert 10.0 <= page.spent().limit_ns["forward"] / 1e9 < 1800  # found soon, also when it hangs at once
    steps(after, 32, WARM_UP_STEPS)
    assert page.spent().limit_ns["forward"] / 1e9 < 10.0
    with after.named("evaluate", None):
        assert 0.1 <= page.read().limit_ns / 1e9 < 1800


def test_a_named_section_is_shown_and_its_time_is_not_that_of_the_one_around_it(page, tmp_path):
    sections = attached(tmp_path)
    sections.begin_step(3, Section.SCRIPT)
    time.sleep(0.02)
    with sections.named("evaluate", 7.0):
        read = page.read()
        assert (read.section, read.name, read.step) == (Section.SCRIPT, "evaluate", 3)
        assert read.limit_ns == 7 * 10**9
        with sections.named("download", 0):
            assert page.read().name == "download"
            assert page.read().limit_ns == 0
            time.sleep(0.1)
        assert page.read().name == "evaluate"
        assert page.read().limit_ns == 7 * 10**9
    read = page.read()
    assert read.name == "the script's own code"
    around_s = (time.monotonic_ns() - read.since_ns) / 1e9
    sections.enter(Section.DATA)
    spent = page.spent().time_ns
    assert spent["download"] >= 0.1e9
    assert spent["evaluate"] < spent["download"]
    assert around_s >= 0.02
    assert spent["the script's own code"] >= 0.02e9
    total_s = sum(spent.values()) / 1e9
    assert spent["the script's own code"] / 1e9 <= total_s - 0.1


def test_an_error_inside_a_named_section_ends_it(page, tmp_path):
    sections = attached(tmp_path)
    sections.begin_step(3, Section.FORWARD)
    with pytest.raises(ValueError, match="inside"), sections.named("evaluate", None):
        raise ValueError("inside")
    assert page.read().name == "forward"


def test_a_loop_inside_a_named_section_goes_on_as_without_it(page, tmp_path):
    sections = attached(tmp_path)
    with sections.named("everything", None):
        steps(sections, 1, 3)
        sections.enter(Section.DONE)
    assert page.read().section is Section.DONE


def test_other_threads_and_forked_children_do_not_speak_for_the_rank(page, tmp_path):
    sections = attached(tmp_path)
    sections.begin_step(3, Section.FORWARD)
    seen: list[str] = []

    def other() -> None:
        with sections.named("evaluate", None):
            seen.append(page.read().name)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == ["forward"]
    child = os.fork()
    if child == 0:
        with sections.named("evaluate", None):
            os._exit(0 if page.read().name == "forward" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(("name", "deadline_s"), [("", None), ("x" * 49, None), ("ok", -1.0), ("ok", float("nan"))])
def test_names_and_deadlines_that_cannot_be_used_are_refused(tmp_path, page, name, deadline_s):
    with pytest.raises(ConfigError), attached(tmp_path).named(name, deadline_s):
        pass


def test_the_number_of_names_is_bounded(tmp_path, page):
    sections = attached(tmp_path)
    for n in range(NUM_INDEXES - FIRST_NAMED):
        with sections.named(f"name {n}", None):
            assert page.read().name == f"name {n}"
    with pytest.raises(ConfigError, match="48 names"), sections.named("one more", None):
        pass


def test_without_a_supervisor_nothing_is_written_anywhere(tmp_path):
    sections = Sections(POLICY, 1.5)
    sections.attach(None, 0)
    steps(sections, 1, 50)
    with sections.named("evaluate", None):
        pass
    assert list(tmp_path.iterdir()) == []


def test_processor_time_is_counted_where_the_step_computes(page, tmp_path):
    sections = attached(tmp_path)
    for step in range(1, 5):
        sections.begin_step(step, Section.DATA)
        time.sleep(0.01)  # long enough for every step to be measured
        sections.enter_computing(Section.FORWARD)
        time.sleep(0.02)
        sections.enter_computing(Section.BACKWARD)
        busy_until = time.thread_time() + 0.05
        while time.thread_time() < busy_until:
            pass
        sections.enter_computing(Section.VOTE)
    spent = page.spent()
    assert spent.measured >= 3
    assert spent.cpu_ns["backward"] / spent.measured >= 0.05e9
    assert spent.cpu_ns["forward"] / spent.measured < 0.02e9
    assert spent.time_ns["forward"] / spent.steps >= 0.02e9
