"""The step record: the last two steps are there, also after a kill, and another process can read them."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import torch

from arc_dist.snapshot.record import StepRecord
from arc_dist.snapshot.rng import capture_rng, pack_rng, restore_rng


def test_the_last_two_steps_are_kept(tmp_path: Path) -> None:
    record = StepRecord(tmp_path)
    assert record.steps() == []
    assert record.read(0) is None
    draws: dict[int, float] = {}
    for step in range(4):
        record.write(step, capture_rng(), {"model.mean": torch.full((3,), float(step)), "model.n": torch.tensor(step)})
        draws[step] = torch.rand(1).item()
        assert record.steps() == [step, step - 1][: step + 1]
    other = StepRecord(tmp_path)
    assert other.steps() == [3, 2]
    assert other.read(1) is None
    for step in (2, 3):
        entry = other.read(step)
        assert entry is not None
        assert entry.step == step
        assert entry.buffers["model.mean"].tolist() == [float(step)] * 3
        assert entry.buffers["model.n"].item() == step
        restore_rng(entry.rng)
        assert torch.rand(1).item() == draws[step]
    other.write(4, capture_rng())  # goes on where the other left off
    assert record.steps() == other.steps() == [4, 3]
    record.close()
    other.close()


def test_the_later_record_of_a_repeated_step_counts(tmp_path: Path) -> None:
    record = StepRecord(tmp_path)
    for value in (1.0, 2.0):
        record.write(5, capture_rng(), {"b": torch.tensor(value)})
    entry = record.read(5)
    assert entry is not None
    assert entry.buffers["b"].item() == 2.0


def test_records_grow_and_change_their_buffers(tmp_path: Path) -> None:
    record = StepRecord(tmp_path)
    rng = pack_rng(capture_rng())
    for step, numel in enumerate([0, 10, 50_000, 7, 100_000]):
        record.write(step, rng, {f"b{numel}": torch.arange(numel), "empty": torch.empty(0, 2)} if numel else None)
        entry = record.read(step)
        assert entry is not None
        assert entry.rng == rng
        if numel:
            assert entry.buffers[f"b{numel}"].tolist() == list(range(numel))
            assert entry.buffers["empty"].shape == (0, 2)
    assert StepRecord(tmp_path).steps() == [4, 3]


def test_a_kill_in_the_middle_leaves_whole_records(tmp_path: Path) -> None:
    chance = random.Random(3)
    StepRecord(tmp_path).write(0, b"\0" * 100, {"b": torch.zeros(200_000)})
    for kill in range(15):
        pid = os.fork()
        if pid == 0:
            mine = StepRecord(tmp_path)
            step = mine.steps()[0]
            buffers = {"b": torch.zeros(200_000)}
            while True:
                step += 1
                buffers["b"].fill_(step)
                mine.write(step, bytes([step % 256]) * 100, buffers)
        before = StepRecord(tmp_path).steps()[0]
        reader = StepRecord(tmp_path)
        deadline = time.monotonic() + 20
        while before in reader.steps() and time.monotonic() < deadline:
            pass
        time.sleep(chance.uniform(0.0, 0.005))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        left = StepRecord(tmp_path)
        found = left.steps()
        assert found, f"kill {kill}"
        assert max(found) > before
        for step in found:
            entry = left.read(step)
            assert entry is not None
            assert entry.rng == bytes([step % 256]) * 100
            assert entry.buffers["b"].unique().tolist() == [float(step)]
