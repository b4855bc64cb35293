"""Ray Train starts the workers again after one was killed; Arc continues from its store, and no bit differs."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from arc_dist import Store
from ranks import run_job, run_ranks
from ray_train import MAX_GRAD_NORM, Job, build, next_byte_loss, weights_digest

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "ray_train.py"
WORKERS = 2
STEPS = 30
KILL_AT = 17

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("ray", "pandas", "pyarrow", "pydantic")),
        reason="ray[train] is not installed: pip install 'arc-dist[ray]'",
    ),
]


@pytest.fixture
def ray_dir() -> Iterator[Path]:
    """For Ray's own files. Short, because the paths of its sockets must be."""
    path = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def undisturbed(rank: int, world_size: int) -> str:
    """The same training as a plain loop, without Ray and without Arc."""
    parts = build(Job(out="", store=""))
    batches = iter(parts.loader)
    for _ in range(STEPS):
        next_byte_loss(parts.model, next(batches)).backward()
        torch.nn.utils.clip_grad_norm_(parts.model.parameters(), MAX_GRAD_NORM)
        parts.optimizer.step()
        parts.optimizer.zero_grad()
        parts.scheduler.step()
    return weights_digest(parts.model)


@pytest.mark.timeout(400)
def test_after_a_killed_worker_the_run_goes_on_from_the_newest_committed_step(tmp_path: Path, ray_dir: Path):
    expected = run_ranks(WORKERS, undisturbed)

    options = ["--steps", str(STEPS), "--workers", str(WORKERS), "--kill-at", str(KILL_AT), "--out", str(tmp_path)]
    env = {"RAY_TMPDIR": str(ray_dir), "RAY_USAGE_STATS_ENABLED": "0"}
    done = run_job([sys.executable, str(SCRIPT), *options], env=env, timeout_s=330)
    assert done.exit_code == 0, done

    assert (tmp_path / "faults" / f"sigkill-rank1-step{KILL_AT}.json").exists(), "the kill did not fire"
    first, second = [json.loads(line) for line in (tmp_path / "attempts.jsonl").read_text().splitlines()]
    assert first["first_step"] == 1
    assert first["pid"] != second["pid"]
    store = Store(tmp_path / "store")
    committed = store.steps()
    at_the_restart = [info.step for info in committed if info.committed_at < second["started_at"]]
    assert 0 < max(at_the_restart) < KILL_AT
    assert second["first_step"] == max(at_the_restart) + 1, done
    assert committed[-1].step == STEPS
    assert store.open(STEPS).verify() == []

    results = [json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in range(WORKERS)]
    assert [result["last_step"] for result in results] == [STEPS] * WORKERS
    assert [result["digest"] for result in results] == expected, done
