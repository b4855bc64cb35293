"""SIGTERM: all ranks commit a checkpoint within a step, exit with a code that says so, and continue exactly."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from arc_dist import Store
from ranks import Job, run_ranks, run_supervised
from toy import Toy, plain

SCRIPT = str(Path(__file__).parent / "scripts" / "train_toy.py")


def plain_body(rank, world_size, toy):
    return plain(toy)[0]


def progress(tmp_path, rank):
    path = tmp_path / f"progress-{rank}"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("kind", "ranks", "target"),
    [
        pytest.param("ddp", 2, "one trainer", marks=pytest.mark.soak),
        ("fsdp", 2, "launcher"),
        ("single", 1, "launcher"),
        pytest.param("ddp", 2, "launcher", marks=pytest.mark.soak),
        pytest.param("fsdp", 2, "one trainer", marks=pytest.mark.soak),
        pytest.param("single", 1, "one trainer", marks=pytest.mark.soak),
    ],
)
def test_sigterm_saves_and_the_next_start_continues_bitwise(tmp_path, kind, ranks, target):
    toy = Toy(kind=kind, steps=1_000_000)
    store = tmp_path / "store"
    config = {"toy": dataclasses.asdict(toy), "out": str(tmp_path), "store": str(store)}
    launcher = [sys.executable, "-m", "arc_dist.launch.arcrun", "--standalone", f"--nproc-per-node={ranks}", SCRIPT]
    env = {"OMP_NUM_THREADS": "1", "ARC_RUN_DIR": str(tmp_path / "run")}
    with Job([*launcher, json.dumps(config)], env=env) as job:
        job.wait_for(lambda: len(progress(tmp_path, ranks - 1)) > 7, 60, "some steps")
        if target == "launcher":
            job.process.send_signal(signal.SIGTERM)
        else:
            pid = int(next(iter((tmp_path / "trainers").glob(f"{ranks - 1}-*"))).read_text())
            os.kill(pid, signal.SIGTERM)
        done = job.wait(60)
    assert done.exit_code == 75, str(done)
    (saved,) = [info.step for info in Store(str(store)).steps()]
    # The signal arrives during one step and is agreed in it or in the next.
    assert {progress(tmp_path, rank)[-1] for rank in range(ranks)} == {saved}, str(done)

    more = dataclasses.replace(toy, steps=saved + 5)
    config["toy"] = dataclasses.asdict(more)
    again = run_supervised(ranks, SCRIPT, json.dumps(config), env=env, timeout_s=60)
    assert again.exit_code == 0, str(again)
    results = [json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in range(ranks)]
    assert results[0]["steps"][0][0] == saved + 1
    expected = [plain(more)[0]] if kind == "single" else run_ranks(ranks, plain_body, more)
    assert [result["digest"] for result in results] == expected
