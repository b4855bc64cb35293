"""Threads that a hanging storage keeps: they do not keep the process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from arc_dist.checkpoint_store.threads import DaemonExecutor

HERE = str(Path(__file__).parent)
HANGS_AT_THE_END = """
import sys, threading, time
from arc_dist import Store
from arc_dist.checkpoint_store import transfer
from arc_dist.checkpoint_store.backends import local
from store_helpers import random_tensor, whole

store = Store(sys.argv[1], owner="a")
store.check_writable()
for step in (1, 2):
    tensors = [whole("w", random_tensor((300,), "float32", step))]
    part = store.write_part(step, generation=0, rank=0, world_size=1, tensors=tensors, objects={{}})
    store.commit(step, 0, 1, {{0: part}}, {{"certified": True}})
checkpoint = store.open(2)
hangs = threading.Event()
read_into = local._LocalSource.read_into

def hang_in_pools(source, *arguments):
    if threading.current_thread().name.startswith("arc-"):
        hangs.set()
        while True:
            time.sleep(1000)
    return read_into(source, *arguments)

local._LocalSource.read_into = hang_in_pools
threading.Thread(target=lambda: {call}, daemon=True).start()
assert hangs.wait(60)
print("over", flush=True)
"""


@pytest.mark.parametrize(
    "call",
    [
        "store.steps(include_damaged=True)",
        "checkpoint.verify()",
        "checkpoint.read(list(checkpoint.specs().values()))",
        "transfer.copy_step(store.backend, 'run', 'step-00000002', Store(sys.argv[1] + '-copy', owner='b').backend)",
    ],
)
def test_a_call_that_never_returns_does_not_hold_up_the_end_of_the_process(tmp_path, call):
    done = subprocess.run(
        [sys.executable, "-c", HANGS_AT_THE_END.format(call=call), str(tmp_path / "store")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (HERE, os.environ.get("PYTHONPATH"))))},
    )
    assert (done.returncode, done.stdout) == (0, "over\n"), done.stderr


def test_calls_run_side_by_side_and_their_outcomes_come_back():
    meet = threading.Barrier(3)
    with DaemonExecutor(3) as pool:
        assert list(pool.map(lambda i: (meet.wait(60) >= 0, i), range(3))) == [(True, 0), (True, 1), (True, 2)]
        failed = pool.submit(lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            failed.result(60)
        assert pool.submit(int, "7").result(60) == 7
    with pytest.raises(RuntimeError):
        pool.submit(int)


def test_what_waits_can_be_cancelled_and_what_runs_is_waited_for():
    runs, may_end = threading.Event(), threading.Event()
    pool = DaemonExecutor(1)
    first = pool.submit(lambda: runs.set() or may_end.wait(60))
    second = pool.submit(int)
    assert runs.wait(60)
    pool.shutdown(wait=False, cancel_futures=True)
    assert second.cancelled()
    may_end.set()
    pool.shutdown()
    assert first.result(0) is True
