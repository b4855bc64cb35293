"""Checkpoints that fall due while one is being written, on some rank, and those that exist already."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest

from arc_dist import Store
from arc_dist.checkpointer import Checkpointer
from ranks import run_ranks
from toy import Toy, guarded


def train_with_a_slow_writer(rank, world_size, toy, store, slow_rank):
    if rank == slow_rank:
        save = Checkpointer._save

        def slowly(*args):
            save(*args)
            time.sleep(0.15)  # the others know of the commit by now, and can write again

        Checkpointer._save = slowly
    for _ in guarded(toy, store=store, checkpoint_every=2, snapshot_every=2).steps:
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("slow_rank", [0, 1])
def test_ranks_leave_out_the_same_checkpoints_however_slow_one_of_them_writes(tmp_path, slow_rank):
    """Were it each rank's own decision, they would wait for shards that the others never write."""
    toy = Toy(kind="ddp", steps=40)
    run_ranks(2, train_with_a_slow_writer, toy, str(tmp_path), slow_rank, timeout_s=60)
    committed = Store(tmp_path).steps()
    assert committed[-1].step == toy.steps
    assert 2 <= len(committed) < toy.steps // 2, "some were to be left out, and not all"
    assert len(committed) == len(list((tmp_path / "run").glob("step-*"))), "a save was begun that never became whole"


def test_a_checkpoint_that_was_restored_is_not_written_again(tmp_path):
    toy = Toy(steps=8)
    for steps in (8, 12, 12):
        list(guarded(dataclasses.replace(toy, steps=steps), store=str(tmp_path), checkpoint_every=4).steps)
    names = sorted(path.name for path in (tmp_path / "run").glob("step-*"))
    assert names == ["step-00000004", "step-00000008", "step-00000012"]


def test_an_exception_in_the_loops_body_ends_the_process_while_a_checkpoint_waits(tmp_path):
    """The loop is held by a name of the script, and goes when the interpreter has stopped all threads."""
    script = str(Path(__file__).parent / "scripts" / "raises_in_body.py")
    command = [sys.executable, script, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done
    assert "waits" in done.stdout, "the save was not at hand"
    assert "ValueError: the script's own bug at step" in done.stderr
