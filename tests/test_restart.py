"""Killed and restarted runs end bitwise like the undisturbed one: from memory, survivors and store."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest

from arc_dist import SeededSampler
from ranks import run_plain, run_ranks, run_supervised
from toy import Toy, plain

pytestmark = pytest.mark.disk  # here checkpoints of jobs meet a real one

SCRIPT = str(Path(__file__).parent / "scripts" / "train_toy.py")


def plain_body(rank, world_size, toy):
    return plain(toy)[0]


def undisturbed(toy, world_size):
    return [plain(toy)[0]] if toy.kind == "single" else run_ranks(world_size, plain_body, toy)


def job(tmp_path, toy, world_size, *, supervised=True, code=0, **config):
    """Runs the toy as a job; returns each rank's result and the job's output."""
    argument = json.dumps({"toy": dataclasses.asdict(toy), "out": str(tmp_path), **config})
    env = {"OMP_NUM_THREADS": "1", "ARC_RUN_DIR": str(tmp_path / "run")}
    run = run_supervised if supervised else run_plain
    done = run(world_size, SCRIPT, argument, env=env, timeout_s=100)
    output = done.stdout + done.stderr
    assert done.exit_code == code, output
    files = [tmp_path / f"result-{rank}.json" for rank in range(world_size)]
    return [json.loads(file.read_text()) for file in files if file.exists()], output


def assert_fired(tmp_path, kills):
    for rank, steps in kills.items():
        for step in steps:
            assert (tmp_path / f"killed-{rank}-{step}").exists(), f"the kill of rank {rank} at step {step} did not fire"


def random_kills(seed, world_size, steps, num_kills):
    rng = random.Random(seed)
    kills = {}
    for step in rng.sample(range(2, steps), num_kills):
        kills.setdefault(str(rng.randrange(world_size)), []).append(step)
    return kills


CASES = [
    ("ddp", 2, 4, {}),
    ("ddp", 2, 4, {"batch_norm": True, "workers": 2}),
    ("fsdp", 2, 3, {}),
    ("fsdp", 2, 3, {"workers": 2}),
    ("ddp", 4, 3, {}),
    ("ddp", 4, 3, {"batch_norm": True}),
    ("fsdp", 4, 3, {}),
    ("single", 1, 2, {}),
]


@pytest.mark.parametrize("case", [0, 3, 4, 7, *(pytest.param(case, marks=pytest.mark.soak) for case in (1, 2, 5, 6))])
def test_kills_at_random_steps_change_no_bit(tmp_path, case):
    kind, world_size, num_kills, variant = CASES[case]
    toy = Toy(kind=kind, steps=24, **variant)
    kills = random_kills(case, world_size, toy.steps, num_kills)
    where = "body" if case % 3 == 2 else "loss"
    results, output = job(tmp_path, toy, world_size, kills=kills, where=where)
    assert_fired(tmp_path, kills)
    assert [result["digest"] for result in results] == undisturbed(toy, world_size), output


def test_a_survivor_stands_in_so_that_no_step_is_lost(tmp_path):
    toy = Toy(kind="ddp", steps=20)
    kills = {"1": [13]}
    results, output = job(tmp_path, toy, 2, kills=kills, settings={"snapshot_every": 50})
    assert_fired(tmp_path, kills)
    assert results[0]["steps"][0] == [13, "apply", False], output
    assert [result["digest"] for result in results] == undisturbed(toy, 2)


def test_a_survivor_that_computes_for_long_is_waited_for(tmp_path):
    """It learns of the loss at its next collective only; ended before, its last steps would go with it."""
    toy = Toy(kind="ddp", steps=8)
    kills = {"1": [6]}
    results, output = job(tmp_path, toy, 2, kills=kills, lags={"0": 0.8}, settings={"snapshot_every": 50})
    assert_fired(tmp_path, kills)
    assert results[0]["steps"][0] == [6, "apply", False], output
    assert [result["digest"] for result in results] == undisturbed(toy, 2)


def test_every_rank_at_once(tmp_path):
    toy = Toy(kind="ddp", steps=20)
    kills = {"0": [13], "1": [13]}
    results, output = job(tmp_path, toy, 2, kills=kills)
    assert_fired(tmp_path, kills)
    assert results[0]["steps"][0][0] == 11, output  # the snapshot of step 10 was the newest that all ranks held
    assert [result["digest"] for result in results] == undisturbed(toy, 2)


@pytest.mark.parametrize(("kind", "world_size"), [("single", 1), ("ddp", 2), ("fsdp", 2), ("ddp", 4)])
@pytest.mark.parametrize("supervised", [True, False])
def test_a_job_that_was_ended_continues_from_its_store_in_mid_epoch(tmp_path, kind, world_size, supervised):
    toy = Toy(kind=kind, steps=24)
    store = str(tmp_path / "store")
    settings = {"checkpoint_every": 8, "snapshot_every": 4}
    first = dataclasses.replace(toy, steps=13)
    job(tmp_path, first, world_size, supervised=supervised, store=store, settings=settings)
    results, output = job(tmp_path, toy, world_size, supervised=supervised, store=store, settings=settings)
    assert results[0]["steps"][0][0] == 14, output
    assert [result["digest"] for result in results] == undisturbed(toy, world_size), output


def test_a_bug_in_the_script_is_not_retried_for_ever(tmp_path):
    toy = Toy(kind="ddp", steps=20)
    results, output = job(tmp_path, toy, 2, raises={"1": 9}, code=1)
    assert results == []
    assert 1 <= output.count("the script's own bug at step 9\n") <= 5, output  # two attempts, and the last word


@pytest.mark.parametrize(("kind", "workers"), [("ddp", 0), ("fsdp", 0), ("ddp", 1)])
def test_a_sample_that_cannot_be_read_ends_the_job_by_name(tmp_path, kind, workers):
    """Twice the same exception at the same sample of one rank: a bug of the user's, and nothing for a third try."""
    sampler = SeededSampler(4096, num_replicas=2, rank=1, seed=5)
    batch = list(sampler)[8 * 8 : 9 * 8]  # the ninth batch of rank 1
    toy = Toy(kind=kind, steps=20, workers=workers, poison=batch[3])
    results, output = job(tmp_path, toy, 2, code=1)
    assert results == []
    starts = [path for path in (tmp_path / "trainers").iterdir() if path.name.startswith("1-")]
    assert len(starts) == 2, output
    (end,) = [line for line in output.splitlines() if "the job stops (exit code 1)" in line]
    assert "the same as in an earlier attempt. It fails each time at batch 8 of epoch 0 (samples " in end
    assert ", ".join(map(str, batch)) in end
    recorded = [json.loads(line) for line in (tmp_path / "run" / "incidents.jsonl").read_text().splitlines()]
    died = [line for line in recorded if line["kind"] == "rank_died" and line["rank"] == 1]
    assert all("in batch 8 of epoch 0" in line["cause"] for line in died), recorded


def test_a_step_that_raises_is_named_by_its_batches(tmp_path):
    toy = Toy(kind="fsdp", steps=20, accumulate=2)
    _, output = job(tmp_path, toy, 2, raises={"1": 9}, code=1)
    assert "It fails each time at batches 16 to 17 of epoch 0 (samples" in output


def test_the_first_failure_is_named_and_its_traceback_comes_last(tmp_path):
    """The other ranks fail too, with "Connection closed by peer": louder, and no cause."""
    toy = Toy(kind="ddp", steps=20)
    _, output = job(tmp_path, toy, 3, raises={"1": 9}, code=1)
    lines = output.splitlines()
    ends = [number for number, line in enumerate(lines) if line.endswith("ValueError: the script's own bug at step 9")]
    stops = next(
        number for number, line in enumerate(lines) if "the job stops (exit code 1): rank 1 ValueError" in line
    )
    echoes = [number for number, line in enumerate(lines) if "pair.cc" in line or "PeerLost" in line]
    assert any("what rank 1 failed with first" in line for line in lines), output
    assert ends[-1] == stops - 1, output
    assert all(number < ends[-1] for number in echoes), output
    recorded = [json.loads(line) for line in (tmp_path / "run" / "incidents.jsonl").read_text().splitlines()]
    (stopped,) = [line for line in recorded if line["kind"] == "job_stopped"]
    assert stopped["ranks"] == [1]
    assert "the script's own bug at step 9" in stopped["cause"]


def test_two_independent_deaths_are_both_told_of(tmp_path):
    toy = Toy(kind="ddp", steps=20)
    results, output = job(tmp_path, toy, 3, kills={"0": [13], "2": [13]})
    assert_fired(tmp_path, {"0": [13], "2": [13]})
    recorded = [json.loads(line) for line in (tmp_path / "run" / "incidents.jsonl").read_text().splitlines()]
    # One may be ended for the other's sake in the very moment of its own death, and is then no cause of its own.
    for root in (line for line in recorded if line["kind"] == "root_cause"):
        assert sorted([root["ranks"][0], *(int(other.split()[1]) for other in root["others"])])[:3] == [0, 2], output
    assert {line["rank"] for line in recorded if line["kind"] == "rank_died"} & {0, 2}, output
    assert [result["digest"] for result in results] == undisturbed(toy, 3), output


def test_four_ranks_resume_bitwise_at_the_beginning_of_an_epoch(tmp_path):
    """DDP's buckets must be warmed up there too, where no batch of the new epoch has been seen yet."""
    toy = Toy(kind="ddp", steps=12, samples=256)  # 8 batches per epoch and rank
    first = dataclasses.replace(toy, steps=8)
    store = str(tmp_path / "store")
    job(tmp_path, first, 4, store=store)
    results, output = job(tmp_path, toy, 4, store=store)
    assert results[0]["steps"][0][0] == 9, output
    assert [result["digest"] for result in results] == undisturbed(toy, 4), output
