"""The service: what ranks hear, in what order things become durable, and what it refuses."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arc_dist.coordinator.client import LocalClient
from arc_dist.coordinator.service import JOURNAL_NAME, Coordinator
from arc_dist.errors import ConfigError, CoordinatorUnavailable, Fenced, StoreError, StoreFull

KILLED = {"kind": "signal", "signal": 9, "exit_code": None, "exception": None}
PART = {"files": [], "tensors": []}


class Store:
    """A commit port that remembers, and fails or waits when told to."""

    def __init__(self) -> None:
        self.manifests: list[tuple[str, int, int, dict[int, Any], dict[str, Any]]] = []
        self.error: Exception | None = None
        self.may_write = threading.Event()
        self.may_write.set()
        self.called = threading.Event()

    def __call__(
        self, url: str, step: int, generation: int, world_size: int, parts: dict[int, Any], meta: dict[str, Any]
    ) -> None:
        self.called.set()
        assert self.may_write.wait(10)
        if self.error is not None:
            raise self.error
        assert len(parts) == world_size
        self.manifests.append((url, step, generation, parts, meta))


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def coordinator(store: Store, tmp_path: Path) -> Coordinator:
    return Coordinator.open(2, run_dir=tmp_path, job_id="job", commit=store)


def clients(coordinator: Coordinator) -> tuple[LocalClient, LocalClient]:
    both = (LocalClient(coordinator), LocalClient(coordinator))
    for rank, client in enumerate(both):
        client.join(rank, 2, "host", 100 + rank, f"/shm/{rank}")
    return both


def say_ready(client: LocalClient, rank: int, generation: int, *holdings: dict[str, Any]) -> None:
    port = {"host": "host", "port": 1000 + generation} if rank == 0 else None
    client.ready(rank, generation, port, list(holdings), f"/shm/{rank}", "host")


def running(coordinator: Coordinator) -> tuple[LocalClient, LocalClient]:
    both = clients(coordinator)
    for rank, client in enumerate(both):
        say_ready(client, rank, 0)
    return both


def in_thread(call: Callable[[], Any]) -> Callable[[], Any]:
    """Starts `call`; the result waits for its end."""
    results: list[Any] = []

    def body() -> None:
        try:
            results.append(call())
        except Exception as error:  # noqa: BLE001  # handed to the test
            results.append(error)

    thread = threading.Thread(target=body)
    thread.start()

    def result() -> Any:
        thread.join(10)
        assert results, "the call did not end"
        if isinstance(results[0], Exception):
            raise results[0]
        return results[0]

    return result


def test_a_generation_from_ready_to_done(coordinator: Coordinator):
    zero, one = clients(coordinator)
    say_ready(zero, 0, 0)
    assert zero.directive(0, 0, 0.01) == {"kind": "wait", "epoch": 1}
    waiting = in_thread(lambda: zero.directive(0, 0, 10))
    say_ready(one, 1, 0)
    told = waiting()
    assert (told["kind"], told["generation"], told["store"]) == ("run", 0, {"host": "host", "port": 1000})
    assert told["plan"]["tier"] == "none"
    assert one.directive(1, 0, 0)["plan"] == told["plan"]
    waiting = in_thread(lambda: zero.directive(0, 0, 10))
    zero.finished(0, 0)
    one.finished(1, 0)
    assert waiting()["kind"] == "done"
    assert one.directive(1, 0, 0)["kind"] == "done"
    assert coordinator.wait_told(1.0)


def test_a_death_is_told_at_once_and_the_next_plan_lends_from_the_survivor(coordinator: Coordinator):
    zero, one = running(coordinator)
    assert zero.directive(0, 0, 1)["kind"] == "run"
    assert one.directive(1, 0, 1)["kind"] == "run"
    waiting = in_thread(lambda: zero.directive(0, 0, 10))
    one.died(1, 0, KILLED, 7)
    told = waiting()
    assert (told["kind"], told["generation"]) == ("end", 0)
    assert "rank 1 killed by signal 9 at step 7" in told["reason"]
    parting = {"step": 7, "slot": 1, "nbytes": 8, "generation": 0, "certified": False, "parting": True}
    say_ready(one, 1, 1, {**parting, "step": 6, "certified": True, "parting": False, "replica_key": 1})
    say_ready(zero, 0, 1, {**parting, "replica_key": 1})
    told = zero.directive(0, 1, 1)
    assert (told["kind"], told["plan"]["step"], told["plan"]["tier"]) == ("run", 7, "memory")
    assert told["store"]["port"] == 1001
    source = {"rank": 0, "shm_dir": "/shm/0", "slot": 1}
    assert told["plan"]["sources"] == {"0": source, "1": source}
    assert one.directive(1, 1, 1)["plan"] == told["plan"]


def test_an_order_that_is_followed_is_not_given_again_and_a_lost_one_is(coordinator: Coordinator):
    zero, _ = running(coordinator)
    assert zero.directive(0, 0, 0)["kind"] == "run"
    assert zero.directive(0, 0, 0)["kind"] == "wait"
    assert zero.directive(0, 0, 0, after="")["kind"] == "run"  # the answer was lost
    assert LocalClient(coordinator).directive(0, 0, 0)["kind"] == "run"


def test_a_stop_names_code_reason_and_rank(coordinator: Coordinator, tmp_path: Path):
    zero, one = running(coordinator)
    exception = {"type": "NameError", "message": "name 'x' is not defined", "traceback": "..."}
    one.died(1, 0, {"kind": "exception", "exit_code": 1, "exception": exception}, 0)
    say_ready(zero, 0, 1)
    say_ready(one, 1, 1)
    told = zero.directive(0, 1, 1)
    assert (told["kind"], told["exit_code"], told["blame_rank"]) == ("stop", 1, 1)
    assert "NameError" in told["reason"]
    assert not coordinator.wait_told(0.05)
    one.directive(1, 1, 1)
    assert coordinator.wait_told(1.0)
    (line,) = [json.loads(text) for text in (tmp_path / "incidents.jsonl").read_text().splitlines()]
    assert (line["kind"], line["ranks"], line["exit_code"]) == ("job_stopped", [1], 1)


def test_a_silent_rank_has_a_deadline(store: Store):
    coordinator = Coordinator(2, commit=store, ending_timeout_s=0.2, starting_timeout_s=0.2)
    zero, _ = clients(coordinator)
    say_ready(zero, 0, 0)
    began = time.monotonic()
    told = zero.directive(0, 0, 10)
    assert time.monotonic() - began < 5
    assert (told["kind"], told["exit_code"], told["blame_rank"]) == ("stop", 76, 1)


# ---- checkpoints


def test_the_last_shard_commits_once_and_all_hear_of_it(coordinator: Coordinator, store: Store):
    zero, one = running(coordinator)
    assert zero.shard(0, 0, 20, "u", PART)["status"] == "pending"
    waiting = in_thread(lambda: zero.commit_status(20, 0, 10))
    assert one.shard(1, 0, 20, "u", PART)["status"] == "committed"
    assert waiting()["status"] == "committed"
    assert one.shard(1, 0, 20, "u", PART)["status"] == "committed"
    ((url, step, generation, parts, meta),) = store.manifests
    assert (url, step, generation, sorted(parts)) == ("u", 20, 0, [0, 1])
    assert meta["certified"] is True
    assert coordinator.call("status", {})["committed"] == [20]


def test_a_stale_generation_is_fenced_and_an_incomplete_save_abandoned(coordinator: Coordinator, store: Store):
    zero, one = running(coordinator)
    zero.shard(0, 0, 20, "u", PART)
    waiting = in_thread(lambda: zero.commit_status(20, 0, 10))
    one.died(1, 0, KILLED, 21)
    say_ready(zero, 0, 1)
    say_ready(one, 1, 1)
    assert waiting()["status"] == "abandoned"
    assert one.shard(1, 0, 20, "u", PART)["status"] == "fenced"
    assert store.manifests == []


def test_a_refused_manifest_is_told_to_every_rank(coordinator: Coordinator, store: Store):
    zero, one = running(coordinator)
    store.error = StoreFull("no space left in u")
    zero.shard(0, 0, 20, "u", PART)
    answer = one.shard(1, 0, 20, "u", PART)
    assert answer["status"] == "failed"
    assert "no space left" in answer["error"]
    assert zero.commit_status(20, 0)["status"] == "failed"
    assert coordinator.call("status", {})["committed"] == []


def test_a_bug_in_the_store_hangs_nobody(coordinator: Coordinator, store: Store):
    zero, one = running(coordinator)
    store.error = KeyError("directory")
    zero.shard(0, 0, 20, "u", PART)
    with pytest.raises(KeyError):
        one.shard(1, 0, 20, "u", PART)
    assert zero.commit_status(20, 0, 5)["status"] == "failed"


def test_others_are_served_while_a_manifest_is_written_and_the_next_start_waits_for_it(
    coordinator: Coordinator, store: Store
):
    zero, one = running(coordinator)
    store.may_write.clear()
    zero.shard(0, 0, 20, "u", PART)
    writing = in_thread(lambda: one.shard(1, 0, 20, "u", PART))
    assert store.called.wait(5)
    one.died(1, 0, KILLED, 21)
    say_ready(zero, 0, 1)
    say_ready(one, 1, 1)
    assert zero.directive(0, 1, 0.05)["kind"] == "wait"
    store.may_write.set()
    assert writing()["status"] == "committed"
    plan = zero.directive(0, 1, 5)["plan"]
    assert (plan["tier"], plan["step"], plan["url"], plan["saved_by"]) == ("checkpoint", 20, "u", 0)


def test_poison_reaches_saves_and_plans(coordinator: Coordinator):
    zero, one = running(coordinator)
    zero.shard(0, 0, 20, "u", PART)
    zero.poison(15, 25, 0)
    assert zero.commit_status(20, 0)["status"] == "abandoned"
    zero.hello_store("u", [{"step": 10, "generation": 0}, {"step": 20, "generation": 0, "certified": True}])
    one.died(1, 0, KILLED, 21)
    say_ready(zero, 0, 1)
    say_ready(one, 1, 1)
    plan = zero.directive(0, 1, 1)["plan"]
    assert plan["step"] == 10
    assert plan["poisoned"] == [{"from_step": 15, "to_step": 25, "generation": 0}]


# ---- restart


def test_a_restarted_coordinator_keeps_plan_budgets_and_poison(coordinator: Coordinator, store: Store, tmp_path: Path):
    zero, one = running(coordinator)
    zero.poison(3, 4, 0)
    one.died(1, 0, KILLED, 7)
    say_ready(zero, 0, 1, {"step": 7, "slot": 0, "certified": True, "replica_key": 1})
    say_ready(one, 1, 1)
    before = zero.directive(0, 1, 1)
    coordinator.close()
    again = Coordinator.open(2, run_dir=tmp_path, job_id="job", commit=store)
    assert again.epoch == 2
    after = LocalClient(again).directive(0, 1, 1)
    assert {**before, "epoch": 2} == after
    status = again.call("status", {})
    assert (status["generation"], status["restarts"], status["phase"]) == (1, 1, "running")
    # New supervisors for all ranks, as after a restart by the launcher: the old processes are gone.
    both = (LocalClient(again), LocalClient(again))
    for rank, client in enumerate(both):
        answer = client.join(rank, 2, "host", 900 + rank, f"/shm/new{rank}")
        assert answer["generation"] == 2
        say_ready(client, rank, 2)
    assert both[0].directive(0, 2, 1)["kind"] == "run"


def test_what_a_crashed_coordinator_acknowledged_is_not_lost(coordinator: Coordinator, store: Store, tmp_path: Path):
    zero, one = running(coordinator)
    zero.finished(0, 0)
    one.died(1, 0, KILLED, 7)
    say_ready(one, 1, 1)
    coordinator.close()
    again = Coordinator.open(2, run_dir=tmp_path, commit=store)
    status = again.call("status", {})
    assert (status["phase"], status["finished"]) == ("ending", [0])
    # Readiness is not a decision; rank 1 is asked to say it again.
    assert LocalClient(again).directive(1, 1, 0)["kind"] == "end"


def test_an_old_coordinator_that_wakes_up_is_refused_by_clients_and_gives_up(
    coordinator: Coordinator, store: Store, tmp_path: Path
):
    zero, _ = running(coordinator)
    newer = Coordinator(2, commit=store)
    newer.epoch = 5
    zero._coordinator = newer  # the address now leads to the newer one
    zero.status()
    assert zero.epoch == 5
    zero._coordinator = coordinator
    with pytest.raises(Fenced, match="replaced by a newer one"):
        zero.status()
    with pytest.raises(Fenced):
        coordinator.call("status", {})


def test_a_replaced_supervisor_is_sent_away(coordinator: Coordinator):
    zero, _ = running(coordinator)
    replacement = LocalClient(coordinator)
    replacement.join(0, 2, "elsewhere", 5, "/shm/x")
    with pytest.raises(Fenced, match="another supervisor"):
        zero.directive(0, 0, 0)
    assert replacement.directive(0, 0, 0)["kind"] == "end"


def test_a_rank_that_knows_more_than_the_coordinator_is_not_kept_waiting(coordinator: Coordinator):
    zero, _ = running(coordinator)
    with pytest.raises(Fenced, match="journal was lost"):
        zero.directive(0, 7, 1)


def test_a_full_disk_is_said_and_the_job_goes_on(
    coordinator: Coordinator, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    journal = coordinator._journal
    assert journal is not None

    def full(state: dict[str, Any]) -> None:
        raise StoreError("journal.log: the decision is not on disk: No space left on device")

    monkeypatch.setattr(journal, "append", full)
    zero, one = running(coordinator)
    one.died(1, 0, KILLED, 7)
    assert zero.directive(0, 0, 0)["kind"] == "end"
    assert "No space left" in zero.status()["journal_error"]
    assert len([record for record in caplog.records if "not on disk" in record.message]) == 1


def test_a_decision_is_on_disk_before_it_is_told(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch):
    zero, one = clients(coordinator)
    journal = coordinator._journal
    assert journal is not None
    seen: list[str] = []
    append = journal.append

    def watched(state: dict[str, Any]) -> None:
        seen.append(coordinator._job.phase.value)  # what others can see while this is written
        append(state)

    monkeypatch.setattr(journal, "append", watched)
    say_ready(zero, 0, 0)
    say_ready(one, 1, 0)
    assert seen == ["starting"]


# ---- bad input


@pytest.mark.parametrize(
    ("method", "body", "says"),
    [
        ("fly", {}, "no method 'fly'"),
        ("join", {"rank": 0}, "'world_size'"),
        ("join", {"rank": 0, "world_size": 3, "host": "h", "pid": 1, "shm_dir": "/d"}, "3 ranks"),
        ("join", {"rank": 2, "world_size": 2, "host": "h", "pid": 1, "shm_dir": "/d"}, "no rank 2"),
        ("died", {"rank": 0, "generation": 0, "cause": {"kind": "aliens"}}, "cause cannot be understood"),
        ("died", {"rank": 0, "generation": -1, "cause": KILLED}, "'generation'"),
        ("ready", {"rank": True, "generation": 0}, "'rank'"),
        ("ready", {"rank": 0, "generation": 0, "host": "h", "shm_dir": 3}, "'shm_dir'"),
        ("ready", {"rank": 0, "generation": 0, "host": "h", "shm_dir": "/d", "inventory": [1]}, "list of objects"),
        ("ready", {"rank": 0, "generation": 0, "host": "h", "shm_dir": "/", "inventory": [{}] * 65}, "at most 64"),
        ("directive", {"rank": 0, "generation": 0, "timeout_s": "long"}, "'timeout_s'"),
        ("directive", {"rank": 0, "generation": 0, "timeout_s": float("nan")}, "'timeout_s'"),
        ("shard", {"rank": 0, "generation": 0, "step": 1, "url": "u", "manifest_part": []}, "'manifest_part'"),
        ("poison", {"from_step": 5, "to_step": 4, "generation": 0}, "after to_step"),
        ("status", {"epoch": "first"}, "'epoch'"),
    ],
)
def test_a_message_that_makes_no_sense_is_refused_and_changes_nothing(
    coordinator: Coordinator, method: str, body: dict[str, Any], says: str
):
    running(coordinator)
    before = coordinator._job
    with pytest.raises(ConfigError, match=says):
        coordinator.call(method, body)
    assert coordinator._job is before


def test_unknown_fields_are_left_alone(coordinator: Coordinator):
    clients(coordinator)
    body = {"rank": 0, "generation": 0, "host": "h", "shm_dir": "/d", "inventory": [], "colour": "blue"}
    assert coordinator.call("ready", body)["generation"] == 0


def test_a_closed_coordinator_lets_nobody_wait(coordinator: Coordinator):
    zero, _ = clients(coordinator)
    say_ready(zero, 0, 0)
    waiting = in_thread(lambda: zero.directive(0, 0, 30))
    time.sleep(0.05)
    coordinator.close()
    with pytest.raises(CoordinatorUnavailable):
        waiting()


def test_incidents_are_whole_lines_whoever_writes_them(coordinator: Coordinator, tmp_path: Path):
    client = LocalClient(coordinator)
    threads = [threading.Thread(target=client.incident, args=({"n": n, "text": "x" * 5000},)) for n in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client.incident(kind="by name")
    lines = [json.loads(text) for text in (tmp_path / "incidents.jsonl").read_text().splitlines()]
    assert sorted(line.get("n", 99) for line in lines) == [*range(32), 99]
    assert "epoch" not in lines[0]
    with pytest.raises(ConfigError, match="bytes are more"):
        client.incident(text="x" * 2_000_000)


def test_two_coordinators_never_share_a_journal(coordinator: Coordinator, tmp_path: Path):
    with pytest.raises(ConfigError, match="in use by another"):
        Coordinator.open(2, run_dir=tmp_path)
    assert (tmp_path / JOURNAL_NAME).stat().st_mode & 0o077 == 0


def test_a_supervisor_that_a_restart_forgot_is_known_again_when_it_is_ready(store: Store, tmp_path: Path):
    first = Coordinator.open(2, run_dir=tmp_path, job_id="job", commit=store)
    both = clients(first)
    first.close()  # nothing was decided yet, so nothing is in the journal
    second = Coordinator.open(2, run_dir=tmp_path, job_id="job", commit=store)
    for rank, client in enumerate(both):
        client._coordinator = second
        say_ready(client, rank, 0)
    assert second.job.phase.value == "running"
    LocalClient(second).join(1, 2, "host", 999, "/shm/1b")  # its successor, while generation 0 runs
    assert second.job.phase.value == "ending"
    assert "replaced" in both[0].directive(0, 0, timeout_s=0.0, after="run")["reason"]


def test_a_supervisor_that_comes_when_the_job_is_over_is_told_so(coordinator: Coordinator):
    both = running(coordinator)
    for rank, client in enumerate(both):
        client.finished(rank, 0)
    late = LocalClient(coordinator)
    answer = late.join(1, 2, "host", 999, "/shm/1b")
    assert late.directive(1, answer["generation"], timeout_s=0.0)["kind"] == "done"


def test_a_journal_that_failed_is_written_again_while_nothing_else_happens(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    now = [0.0]
    coordinator = Coordinator.open(2, run_dir=tmp_path, job_id="job", commit=store, clock=lambda: now[0])
    both = clients(coordinator)
    journal = coordinator._journal
    assert journal is not None

    def full(state: Any) -> None:
        raise StoreFull("full")

    with monkeypatch.context() as patch:
        patch.setattr(journal, "append", full)
        for rank, client in enumerate(both):
            say_ready(client, rank, 0)
        assert coordinator.call("status", {})["journal_error"] is not None
    now[0] += 5.0
    both[0].directive(0, 0, timeout_s=0.0, after="run")
    assert coordinator.call("status", {})["journal_error"] is None
    coordinator.close()
    assert Coordinator.open(2, run_dir=tmp_path, job_id="job", commit=store).job.phase.value == "running"
