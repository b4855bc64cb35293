"""Stacks of processes that cannot or do not want to answer, and what the kernel says of them."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from arc_dist.protocol.hangs import Conduct
from arc_dist.supervisor import conduct, stacks


def spin() -> None:
    while True:
        pass


def sleep() -> None:
    time.sleep(1000)


_LOCK = ctypes.create_string_buffer(256)
_take_lock = ctypes.PyDLL(None).pthread_mutex_lock  # found here, so that the function below has no other frame above it


def hold_the_lock_of_the_interpreter() -> None:
    for _ in range(2):  # the second call never comes back
        _take_lock(_LOCK)


def block_the_signal() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [stacks.SIGNAL])
    (Path(os.environ["ARC_TEST_DIRECTORY"]) / "blocked").touch()
    sleep()


def _child(directory: Path, body: Callable[[], None], ident) -> None:
    stacks.install(directory)
    os.environ["ARC_TEST_DIRECTORY"] = str(directory)
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
    ident.value = threading.get_ident()
    body()


class Child:
    def __init__(self, directory: Path, body: Callable[[], None]) -> None:
        context = multiprocessing.get_context("fork")
        self.ident = context.Value("Q", 0)
        self.directory = directory
        self.process = context.Process(target=_child, args=(directory, body, self.ident))

    def __enter__(self) -> Child:
        self.process.start()
        deadline = time.monotonic() + 60
        while not self.ident.value and time.monotonic() < deadline:
            time.sleep(0.005)
        assert self.ident.value
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def take(self) -> stacks.Stacks:
        return stacks.take(self.pid, self.ident.value, self.directory, 20.0)


@pytest.mark.parametrize("body", [spin, sleep, hold_the_lock_of_the_interpreter], ids=lambda body: body.__name__)
def test_a_stuck_process_shows_its_stack(tmp_path, body):
    with Child(tmp_path, body) as child:
        taken = child.take()
        deadline = time.monotonic() + 60  # it may not have come that far yet
        while body.__name__ not in [function for _, _, function in taken.frames] and time.monotonic() < deadline:
            taken = child.take()
        functions = [function for _, _, function in taken.frames]
        assert functions[0] == body.__name__, taken.text
        assert "_child" in functions
        assert taken.text.count("hread 0x") == 2  # both threads, of which the one that trains was found
        assert body.__name__ in stacks.render(taken.frames)
        again = child.take()
        assert again.frames[1:] == taken.frames[1:]
        assert child.process.is_alive()


@pytest.fixture
def without_py_spy(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(stacks.sys, "executable", str(tmp_path / "python"))


def test_py_spy_shows_the_stack_of_a_stopped_process(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root to trace another process")
    with Child(tmp_path, sleep) as child:
        while "sleep" not in [function for _, _, function in child.take().frames]:
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGSTOP)
        taken = stacks.take(child.pid, child.ident.value, tmp_path, 0.2)
        assert taken.text.count("by py-spy") == 2
        assert [function for _, _, function in taken.frames][:2] == ["sleep", "_child"], taken.text
        assert taken.frames[0][0] == __file__


def test_a_stopped_process_is_known_as_stopped_and_answers_nothing(tmp_path, without_py_spy):
    with Child(tmp_path, sleep) as child:
        os.kill(child.pid, signal.SIGSTOP)
        deadline = time.monotonic() + 60
        while conduct.look(child.pid)[0] is not Conduct.STOPPED and time.monotonic() < deadline:
            time.sleep(0.01)
        assert conduct.look(child.pid)[0] is Conduct.STOPPED
        assert stacks.take(child.pid, 0, tmp_path, 0.2) == stacks.Stacks()
        assert "State: T" in conduct.describe(child.pid)


def test_a_process_that_blocks_the_signal_is_not_waited_for_for_ever(tmp_path, without_py_spy):
    with Child(tmp_path, block_the_signal) as child:
        deadline = time.monotonic() + 60
        while not (tmp_path / "blocked").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        for task in os.listdir(f"/proc/{child.pid}/task"):
            assert task  # its other thread may still answer; both ways the call comes back
        taken = stacks.take(child.pid, child.ident.value, tmp_path, 0.5)
        assert taken.text == "" or "block_the_signal" in taken.text
        assert child.process.is_alive()


def test_a_process_without_a_handler_is_not_signalled(tmp_path, without_py_spy):
    context = multiprocessing.get_context("fork")
    process = context.Process(target=time.sleep, args=(1000,))
    process.start()
    try:
        assert not stacks.answers(process.pid)
        assert stacks.take(process.pid, 0, tmp_path, 0.2).text == ""
        assert process.is_alive()
    finally:
        process.kill()
        process.join()


def test_processor_time_and_states_come_from_the_kernel(tmp_path):
    with Child(tmp_path, spin) as child:
        deadline = time.monotonic() + 60
        state, used_s = conduct.look(child.pid)
        while used_s < 0.2 and time.monotonic() < deadline:
            time.sleep(0.02)
            state, used_s = conduct.look(child.pid)
        assert used_s >= 0.2
        assert state is Conduct.RUNNING
    assert conduct.look(child.pid)[0] is Conduct.GONE


def frames(*files: str) -> stacks.Stacks:
    return stacks.Stacks(text="x", frames=tuple((file, 1, "f") for file in files))


@pytest.mark.parametrize(
    ("found", "busy", "collective"),
    [
        (frames("/v/torch/distributed/distributed_c10d.py", "train.py"), 0.0, True),
        (frames("/v/torch/_ops.py", "/v/torch/distributed/_functional_collectives.py", "train.py"), 0.0, True),
        (frames("/v/arc_dist/healing/vote.py", "/v/arc_dist/guard.py"), 0.0, True),
        (frames("/v/torch/autograd/graph.py", "train.py"), 0.0, True),
        (frames("/v/torch/autograd/graph.py", "train.py"), 1.0, False),
        (frames("train.py", "/v/torch/distributed/distributed_c10d.py"), 0.0, False),  # a hook of the script's
        (frames("/v/torch/utils/data/dataloader.py", "train.py"), 0.0, False),
        (stacks.Stacks(), 0.0, False),
    ],
)
def test_who_waits_in_a_collective(found, busy, collective):
    assert found.in_collective(busy) is collective


def test_who_compiles():
    assert frames("subprocess.py", "/v/torch/_inductor/compile_fx.py", "train.py").in_compiler
    assert frames("/v/torch/fx/node.py", "/v/torch/_dynamo/convert_frame.py", "train.py").in_compiler
    assert not frames("train.py").in_compiler
    # Under every hook of FSDP, and under compiled code that runs.
    assert not frames("train.py", "/v/torch/_dynamo/eval_frame.py").in_compiler
    assert not frames("train.py", "/v/torch/_inductor/output_code.py").in_compiler


def test_a_real_compilation_is_recognised_while_it_runs_and_not_after():
    """With the frames of the installed torch, which a later one may name otherwise."""
    import torch

    seen: list[tuple[str, stacks.Stacks]] = []

    def note(what: str) -> None:
        found = reversed(traceback.extract_stack())
        seen.append((what, stacks.Stacks(frames=tuple((one.filename, one.lineno or 0, one.name) for one in found))))

    def backend(module, inputs):
        note("compiles")

        def run(*args):
            note("runs")
            return module.forward(*args)

        return run

    torch.compile(lambda x: x * 2 + 1, backend=backend)(torch.ones(3))
    assert [what for what, _ in seen] == ["compiles", "runs"]
    assert seen[0][1].in_compiler
    assert not seen[1][1].in_compiler
