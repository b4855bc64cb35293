"""Tools of the stories in nfs_scenarios.py: saves, faults of the server at a step, forked processes."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from arc_dist import Store
from arc_dist.checkpoint_store.backends import local as local_backend
from arc_dist.checkpoint_store.commands import add_commands
from arc_dist.errors import ArcError
from services import nfs_guest as guest
from services.nfs_guest import NFS, OTHER
from store_helpers import whole
from toy import Toy, guarded

CKPT = NFS / "ckpt"
ELEMENTS = 1 << 20  # 4 MiB
DEADLINE_S = 120.0


def failure(action: Callable[[], Any]) -> dict[str, Any]:
    """The error of our tree that an action raises, as JSON; anything else it raises is an error of the test."""
    began = time.monotonic()
    try:
        result = action()
    except ArcError as error:
        seconds = time.monotonic() - began
        return {"type": type(error).__name__, "message": str(error), "errno": error.fields.get("errno"), "s": seconds}
    return {"type": None, "result": repr(result)}


def write(store: Store, step: int, elements: int = ELEMENTS) -> dict[int, Any]:
    tensors = [whole("w", torch.arange(elements, dtype=torch.float32) + step)]
    return {0: store.write_part(step, generation=0, rank=0, world_size=1, tensors=tensors, objects={"step": step})}


def put(store: Store, step: int, elements: int = ELEMENTS) -> None:
    store.commit(step, 0, 1, write(store, step, elements), {"certified": True})


def ready_store() -> Store:
    store = Store(CKPT, owner="a")
    store.check_writable()
    return store


def steps_at(path: Path) -> list[int]:
    return [info.step for info in Store(path).steps()]


def damage_at(path: Path) -> list[str]:
    store = Store(path)
    return [str(problem) for info in store.steps() for problem in store.open(info.step).verify()]


def arc(*arguments: str) -> int:
    """The exit code of a command of `arc`."""
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    options = parser.parse_args(arguments)
    return int(options.run(options) or 0)


class Forked:
    """A function in a process of its own, forked: an import of torch takes 12 s here."""

    def __init__(self, body: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("fork")
        self._here, there = context.Pipe()
        self.process = context.Process(target=self._main, args=(there, body, arguments))
        self.process.start()
        there.close()

    def _main(self, there: Any, body: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._here.close()
        try:
            there.send((body(*arguments), None))
        except BaseException:  # noqa: BLE001 - whatever it is, it goes to the test
            there.send((None, traceback.format_exc()))

    def answer(self) -> Any:
        """What the function returned; the process may still be there."""
        assert self._here.poll(DEADLINE_S), f"no answer within {DEADLINE_S:g} s"
        value, error = self._here.recv()
        assert error is None, error
        return value

    def exit_code(self, timeout_s: float) -> int | None:
        self.process.join(timeout_s)
        return self.process.exitcode

    def result(self) -> Any:
        """What the function returned, once the process has ended."""
        value = self.answer()
        assert self.exit_code(DEADLINE_S) == 0, f"exit code {self.process.exitcode}: the process did not end"
        return value


def server_starts_when_told() -> Callable[[], None]:
    """Forks who will start the server, and returns what tells it.

    It cannot be started from a process that has a file open on a dead hard mount: a program that such a process starts
    would have to close its copy of the descriptor first, and that waits for the server.
    """
    told = multiprocessing.get_context("fork").Event()

    def body() -> None:
        assert told.wait(2 * DEADLINE_S)
        guest.start_server()

    starter = Forked(body)

    def tell() -> None:
        told.set()
        starter.result()

    return tell


class FaultAt:
    """Does something to the server before the first block of a rank's shard of one step is written, once."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.fired: list[str] = []  # the file
        self.done = threading.Event()
        write = local_backend._LocalSink.write

        def hurt(sink: Any, data: memoryview) -> None:
            path = str(sink._final)
            if not self.fired and f"step-{step:08d}" in path and path.endswith(".safetensors"):
                self.fired.append(path)
                action()
                self.done.set()
            write(sink, data)

        local_backend._LocalSink.write = hurt


def fill_disk(keep_free_bytes: int) -> Path:
    """Another user of the server takes its space."""
    filler = guest.DISK / "filler"
    state = os.statvfs(guest.DISK)
    nbytes = state.f_bavail * state.f_frsize - keep_free_bytes
    assert 0 < nbytes <= guest.DISK_BYTES
    with open(filler, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, nbytes)
    return filler


class Training:
    """A guarded job whose incidents are kept; `until(step)` goes on to a step and waits for the save at hand."""

    def __init__(self, toy: Toy, **settings: Any) -> None:
        self.job = guarded(toy, **settings)
        engine = self.job.arc._engine
        record = engine.record
        self.incidents: list[str] = []
        engine.record = lambda **fields: (self.incidents.append(fields["kind"]), record(**fields))
        self.number = 0

    def until(self, step: int, *, wait: bool = True) -> None:
        while self.number < step:
            self.number = next(self.job.steps).number
            if wait:
                self.job.arc._engine._checkpointer.wait()

    def finish(self) -> str:
        for _ in self.job.steps:
            self.job.arc._engine._checkpointer.wait()
        return self.job.digest()


def train_with_fault(steps: int, fault_at: int) -> dict[str, Any]:
    fault = FaultAt(fault_at, guest.stop_server)
    job = Training(Toy(steps=steps), store=f"{CKPT}, {OTHER}", checkpoint_every=10, save_timeout_s=6.0)
    digest = job.finish()
    return {"fired": fault.fired, "digest": digest, "incidents": job.incidents}


def _rank(rank: int, port: int, toy: Toy) -> str:
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    if rank == 1:
        guest.move_to_another_client(Path("/media/nfs2"))
    dist.init_process_group("gloo")
    job = guarded(toy, store=str(CKPT), checkpoint_every=5)
    for _ in job.steps:
        job.arc._engine._checkpointer.wait()
    digest = job.digest()
    dist.destroy_process_group()
    return digest


def train_two_ranks(toy: Toy) -> list[str]:
    """Each with a client of its own; returns what they end with."""
    import torch.distributed as dist

    server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    ranks = [Forked(_rank, rank, server.port, toy) for rank in range(2)]
    return [rank.result() for rank in ranks]
