"""Ranks that are lost, while the others stay in their processes: the same bits, and the same guarantees."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from arc_dist import resilient
from ranks import run_ranks, run_supervised
from toy import Toy, plain

SCRIPT = str(Path(__file__).parent / "scripts" / "resilient_toy.py")


def plain_body(rank, world_size, toy):
    return plain(toy)[0]


@dataclasses.dataclass(frozen=True)
class Ended:
    """A job that is over: what each rank wrote, and every process that entered the function on it."""

    results: list[dict[str, Any]]
    entries: list[list[tuple[int, int]]]  # by rank: (pid, generation)
    incidents: list[dict[str, Any]]
    output: str

    def pids(self, rank: int) -> list[int]:
        return list(dict.fromkeys(pid for pid, _ in self.entries[rank]))

    def digests(self) -> list[str]:
        return [result["digest"] for result in self.results]


def job(tmp_path: Path, toy: Toy, world_size: int, *, code: int = 0, **config: Any) -> Ended:
    argument = json.dumps({"toy": dataclasses.asdict(toy), "out": str(tmp_path), **config})
    env = {"OMP_NUM_THREADS": "1", "ARC_RUN_DIR": str(tmp_path / "run"), "ARC_LOG_LEVEL": "debug"}
    done = run_supervised(world_size, SCRIPT, argument, env=env, timeout_s=100)
    output = done.stdout + done.stderr
    assert done.exit_code == code, output
    results = [tmp_path / f"result-{rank}.json" for rank in range(world_size)]
    entries = [(tmp_path / f"entries-{rank}").read_text().splitlines() for rank in range(world_size)]
    incidents = (tmp_path / "run" / "incidents.jsonl").read_text().splitlines()
    return Ended(
        [json.loads(file.read_text()) for file in results if file.exists()],
        [[tuple(map(int, line.split())) for line in lines] for lines in entries],
        [json.loads(line) for line in incidents],
        output,
    )


def assert_bitwise(ended: Ended, toy: Toy, world_size: int) -> None:
    assert ended.digests() == run_ranks(world_size, plain_body, toy), ended.output


def assert_died(ended: Ended, tmp_path: Path, kills: dict[str, list[int]]) -> None:
    """Each kill fired; who was killed has a new process for each, and nobody else has."""
    for rank in range(len(ended.entries)):
        steps = kills.get(str(rank), [])
        for step in steps:
            assert (tmp_path / f"killed-{rank}-{step}").exists(), f"rank {rank} was not killed at step {step}"
        assert len(ended.pids(rank)) == 1 + len(steps), (rank, ended.entries, ended.output)


def lost_steps(tmp_path: Path, world_size: int) -> list[int]:
    """By rank: how many steps were done again."""
    texts = [(tmp_path / f"progress-{rank}").read_text().split() for rank in range(world_size)]
    return [len(steps) - len(set(steps)) for steps in texts]


CASES = [
    ("ddp", 2, {}),
    ("ddp", 2, {"batch_norm": True, "workers": 2}),
    ("fsdp", 2, {}),
    ("ddp", 4, {}),
    ("fsdp", 4, {}),
]
QUICK = (0, 4)


@pytest.mark.parametrize(
    "case", [n if n in QUICK else pytest.param(n, marks=pytest.mark.soak) for n in range(len(CASES))]
)
def test_survivors_keep_their_processes_and_no_bit_changes(tmp_path, case):
    kind, world_size, variant = CASES[case]
    toy = Toy(kind=kind, steps=24, **variant)
    rng = random.Random(case)
    step = rng.randrange(6, toy.steps)
    kills = {str(rng.randrange(world_size)): [step]}
    ended = job(tmp_path, toy, world_size, kills=kills)
    assert_died(ended, tmp_path, kills)
    assert_bitwise(ended, toy, world_size)
    if kind == "ddp":
        assert lost_steps(tmp_path, world_size) == [0] * world_size, ended.output


def test_a_rank_that_breaks_its_connections_stays_too(tmp_path):
    """An exception that tells of a lost peer, on one rank alone, while all processes live."""
    toy = Toy(kind="ddp", steps=16)
    ended = job(tmp_path, toy, 2, breaks={"1": [9]})
    assert (tmp_path / "broken-1-9").exists()
    assert_died(ended, tmp_path, {})
    assert [generation for _, generation in ended.entries[1]] == [0, 1]
    assert_bitwise(ended, toy, 2)
    assert lost_steps(tmp_path, 2) == [0, 0], ended.output


@pytest.mark.soak
def test_two_deaths_in_a_row(tmp_path):
    toy = Toy(kind="ddp", steps=20)
    kills = {"1": [8], "0": [14]}
    ended = job(tmp_path, toy, 3, kills=kills)
    assert_died(ended, tmp_path, kills)
    assert [generation for _, generation in ended.entries[2]] == [0, 1, 2]
    assert_bitwise(ended, toy, 3)
    assert lost_steps(tmp_path, 3) == [0, 0, 0], ended.output


def test_a_death_while_the_others_come_back(tmp_path):
    toy = Toy(kind="fsdp", steps=16)
    ended = job(tmp_path, toy, 3, kills={"1": [8]}, kills_at_entry={"1": [1]})
    assert (tmp_path / "killed-1-entry-1").exists()
    assert [len(ended.pids(rank)) for rank in range(3)] == [1, 3, 1], (ended.entries, ended.output)
    assert_bitwise(ended, toy, 3)


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=pytest.mark.soak)])
def test_a_death_while_the_others_evaluate(tmp_path, kind):
    toy = Toy(kind=kind, steps=16)
    kills = {"0": [9]}
    ended = job(tmp_path, toy, 2, kills=kills, where="evaluation", evaluates=True, settings={"snapshot_every": 50})
    assert_died(ended, tmp_path, kills)
    assert_bitwise(ended, toy, 2)
    if kind == "ddp":
        assert lost_steps(tmp_path, 2) == [0, 0], ended.output


@pytest.mark.soak
def test_a_death_in_the_middle_of_saves(tmp_path):
    toy = Toy(kind="ddp", steps=16)
    kills = {"1": [6, 11]}
    settings = {"checkpoint_every": 2, "snapshot_every": 2, "max_bytes_per_s": 50_000}
    ended = job(tmp_path, toy, 2, kills=kills, store=str(tmp_path / "store"), settings=settings)
    assert_died(ended, tmp_path, kills)
    assert_bitwise(ended, toy, 2)
    assert lost_steps(tmp_path, 2) == [0, 0], ended.output


def test_a_survivor_that_waits_at_the_store_of_its_generation_is_woken(tmp_path):
    toy = Toy(kind="ddp", steps=16)
    ended = job(tmp_path, toy, 2, kills={"1": [9]}, sticks={"0": [9, "wait"]})
    assert (tmp_path / "stuck-0-9").exists()
    assert_died(ended, tmp_path, {"1": [9]})
    assert_bitwise(ended, toy, 2)


def test_without_a_supervisor_the_function_is_called_as_it_is():
    assert run_ranks(2, called_body) == [3, 4]


def called_body(rank, world_size):
    return resilient(lambda number: number + dist.get_rank())(3)


soak = pytest.mark.soak


@pytest.mark.parametrize(
    "how", [pytest.param("sleep", marks=soak), "stop", "group", pytest.param("thread", marks=soak)]
)
def test_a_survivor_that_cannot_stay_is_replaced(tmp_path, how):
    toy = Toy(kind="ddp", steps=16)
    ended = job(tmp_path, toy, 2, kills={"1": [9]}, sticks={"0": [9, how]}, within_s=3.0)
    assert (tmp_path / "stuck-0-9").exists()
    assert (tmp_path / "killed-1-9").exists()
    assert [len(ended.pids(rank)) for rank in range(2)] == [2, 2], (ended.entries, ended.output)
    assert "does not stay" in ended.output
    assert_bitwise(ended, toy, 2)


def test_a_bug_in_the_script_ends_the_job_as_ever(tmp_path):
    toy = Toy(kind="ddp", steps=16)
    ended = job(tmp_path, toy, 2, raises={"1": 9}, code=1)
    assert ended.results == []
    assert 1 <= ended.output.count("the script's own bug at step 9\n") <= 5, ended.output
    assert len(ended.entries[1]) == 2, ended.entries  # one more attempt, in a new process
    assert len(ended.pids(0)) == 1, ended.entries
    (stopped,) = [line for line in ended.incidents if line["kind"] == "job_stopped"]
    assert stopped["ranks"] == [1]


def test_what_keeps_failing_without_progress_ends_by_the_budget(tmp_path):
    """The same echo at every attempt: no rank dies, and still the job does not go on for ever."""
    toy = Toy(kind="ddp", steps=16)
    ended = job(tmp_path, toy, 2, breaks_always={"1": 9}, code=77)
    assert ended.results == []
    assert len(ended.entries[1]) <= 5, ended.entries


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=pytest.mark.soak)])
def test_a_process_that_stays_twenty_times_does_not_grow(tmp_path, kind):
    toy = Toy(kind=kind, steps=44)
    kills = {"1": list(range(3, 43, 2))}
    settings = {"snapshot_every": 2, "certify_after": 1, "checkpoint_every": 10}
    ended = job(tmp_path, toy, 2, kills=kills, settings=settings, store=str(tmp_path / "store"))
    assert_died(ended, tmp_path, kills)
    assert_bitwise(ended, toy, 2)
    usage = [json.loads(line) for line in (tmp_path / "usage-0").read_text().splitlines()]
    assert len(usage) == 21
    settled, last = usage[5], usage[-1]
    assert last[1:3] == settled[1:3], usage  # descriptors and threads
    assert last[3] <= 1.01 * settled[3], usage  # bytes in shared memory
    assert last[0] - settled[0] < 16 << 20, usage  # fifteen re-entries later


def test_a_loop_without_arc_is_entered_again_too(tmp_path):
    """It goes on from what it saved itself; the processes are kept all the same."""
    script = str(Path(SCRIPT).with_name("resilient_plain.py"))
    ended = {}
    for name, is_struck in (("struck", True), ("through", False)):
        out = tmp_path / name
        out.mkdir()
        if not is_struck:
            (out / "killed").touch()
        env = {"OMP_NUM_THREADS": "1", "ARC_RUN_DIR": str(out / "run")}
        done = run_supervised(2, script, str(out), env=env, timeout_s=100)
        assert done.exit_code == 0, done.stdout + done.stderr
        ended[name] = [(out / f"ended-{rank}").read_text().split() for rank in range(2)]
        started = [(out / f"started-{rank}").read_text().split() for rank in range(2)]
        assert [len(pids) for pids in started] == [1, 2 if is_struck else 1]
        assert [pids[-1] for pids in started] == [pid for pid, _, _ in ended[name]]
    assert [first for _, first, _ in ended["struck"]] == ["5", "5"], "the kill fired in step 5"
    assert [total for *_, total in ended["struck"]] == [total for *_, total in ended["through"]]
