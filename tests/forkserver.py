"""The one process that has imported what is slow to import, and that all test ranks are forked from."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

# torch._dynamo is imported by DDP and by optimizers as soon as they are used, and costs another second.
PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch.distributed",
    "torch.distributed.fsdp",
    "torch.nn.parallel",
    "numpy",
    "pytest",
    "hypothesis",
    # A quarter of a second for every rank. Nothing happens when they are imported.
    "arc_dist.arc",
    "arc_dist.supervisor.supervisor",
    "arc_dist.checkpoint_store.dcp",
]


def context() -> Any:
    """The multiprocessing context whose processes come from the server."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOAD)  # without effect once the server runs
    return found


def settle_in(env: dict[str, str], stdout: Path, stderr: Path) -> None:
    """Makes a forked process one of its own: process group, environment, output; and mortal.

    The server ends when the test process does, and then the kernel kills this one.
    """
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    for number, path in ((1, stdout), (2, stderr)):
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, number)
        os.close(log)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(env)
    # This process inherited "forkserver" as its start method; what is tested shall find Python's own default.
    multiprocessing.set_start_method(None, force=True)


def kill_group(process: Any) -> None:
    """Kills a forked process and its process group, and waits for it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # already gone, with all its children
    if process.is_alive():
        process.kill()
    process.join(10)
