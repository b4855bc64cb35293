"""Several hosts on one machine: each has failure domain and shared memory of its own, and can be lost as a whole.

What torchrun would do is done here, as in jobs.py: environment, the agent's store, collecting exit codes.

::

    with Hosts(tmp_path, shm_root, SCRIPT, argument) as hosts:
        hosts.start({0: "a", 1: "a", 2: "b", 3: "b"})
        hosts.lose("b")                             # SIGKILL for all of it, and its memory is gone
        hosts.start({2: "c", 3: "c"})
        assert hosts.wait(300) == {0: 0, 1: 0, 2: 0, 3: 0}

With `named` each host has a name of its own, too, by which our code tells hosts apart, and is a node of a launcher,
which is lost when it is not heard. That needs root.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import forkserver
import jobs
from arc_dist.peers.shelf import Shelf
from arc_dist.snapshot.directory import owned_directories
from arc_dist.snapshot.inheritance import Signature

_CLONE_NEWUTS = 0x04000000


class Hosts:
    """A job whose ranks are started by hand; use it in a `with` statement."""

    def __init__(
        self,
        directory: Path,
        shm: Path,
        script: str,
        argument: Mapping[str, Any],
        env: Mapping[str, str] | None = None,
        *,
        named: bool = False,
    ) -> None:
        self.directory = directory
        self.shm = shm
        self._command = ["-m", "arc_dist", script, json.dumps(argument)]
        self._mark = f"ARC_TEST_JOB={uuid.uuid4().hex}"
        self._env = dict(env or {})
        self._named = named
        self._run_id = uuid.uuid4().hex
        self._nodes: list[str] = []
        self._processes: dict[int, tuple[str, Any]] = {}

    def __enter__(self) -> Hosts:
        self.new_store()
        return self

    def new_store(self) -> None:
        """What an agent does when it starts its ranks again; a lost rank 0 must not be looked for."""
        import torch.distributed as dist

        self._store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)

    def start(self, ranks: Mapping[int, str], *, world_size: int = 4) -> None:
        """Starts the supervisors of these ranks on these hosts."""
        name, _, value = self._mark.partition("=")
        for rank, host in ranks.items():
            local = sorted(other for other, theirs in ranks.items() if theirs == host)
            root = self.shm / host
            root.mkdir(exist_ok=True)
            if host not in self._nodes:
                self._nodes.append(host)
            env = {
                **os.environ,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._store.port),
                "TORCHELASTIC_RUN_ID": self._run_id,
                "TORCHELASTIC_RESTART_COUNT": "0",
                "TORCHELASTIC_MAX_RESTARTS": "3",
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "WORLD_SIZE": str(world_size),
                "RANK": str(rank),
                "LOCAL_RANK": str(local.index(rank)),
                "LOCAL_WORLD_SIZE": str(len(local)),
                "OMP_NUM_THREADS": "1",
                "ARC_FAILURE_DOMAIN": host,
                "ARC_SHM_ROOT": str(root),
                "ARC_RUN_DIR": str(self.directory / "run"),
                **self._env,
                **({"GROUP_RANK": str(self._nodes.index(host))} if self._named else {}),
                name: value,
            }
            target = (host if self._named else "", env, str(self.directory), self._command)
            process = forkserver.context().Process(target=_supervisor, args=target, name=f"rank{rank}")
            process.start()
            self._processes[rank] = (host, process)

    def lose(self, *hosts: str) -> None:
        """Everything on these hosts dies at once, and what was in their memory is gone."""
        for host in hosts:
            self.kill(host)
            shutil.rmtree(self.shm / host)

    def kill(self, *hosts: str, number: int = signal.SIGKILL) -> None:
        """Sends all supervisors of these hosts a signal, and waits until they and what they had started are gone."""
        chosen = {rank: process for rank, (host, process) in self._processes.items() if host in hosts}
        assert chosen, f"nothing runs on {hosts}"
        for process in chosen.values():
            os.kill(process.pid, number)
        for rank, process in chosen.items():
            process.join(120)
            assert process.exitcode is not None, self.story(f"rank {rank} does not end")
            forkserver.kill_group(process)
            del self._processes[rank]

    def wait_for(self, condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
        """Polls until `condition()` is true and returns its value; fails with all output otherwise."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            value = condition()
            if value:
                return value
            time.sleep(0.02)
        raise AssertionError(self.story(f"waited for {what}"))

    def wait(self, timeout_s: float) -> dict[int, int | None]:
        """Exit codes by rank; None for one that still runs at the deadline."""
        deadline = time.monotonic() + timeout_s
        for _, process in self._processes.values():
            process.join(max(0.0, deadline - time.monotonic()))
        return {rank: process.exitcode for rank, (_, process) in sorted(self._processes.items())}

    def copies(self, host: str) -> set[tuple[int, int]]:
        """(owner, step) of the whole copies in the memory of a host."""
        return {
            (kept.owner, kept.info.step) for path in owned_directories(self.shm / host) for kept in Shelf(path).kept()
        }

    def ranks_left(self, host: str) -> list[int]:
        """Whose directories are in the memory of a host."""
        signatures = [Signature.read(path) for path in owned_directories(self.shm / host)]
        return sorted(signature.rank for signature in signatures if signature is not None)

    def incidents(self, kind: str) -> list[dict[str, Any]]:
        """Lines of the run's incident file."""
        path = self.directory / "run" / "incidents.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line["kind"] == kind]

    def story(self, what: str) -> str:
        """Everything that was said, for a failure."""
        said = [(self.directory / name).read_text(errors="replace") for name in ("stdout", "stderr")]
        return f"{what}\n--- stdout\n{said[0]}\n--- stderr\n{said[1]}"

    def __exit__(self, *exc_info: object) -> None:
        for _, process in self._processes.values():
            forkserver.kill_group(process)


def _supervisor(host: str, env: dict[str, str], directory: str, command: list[str]) -> None:
    """What runs in a forked process: `python *command`, on a host of that name."""
    if host:
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWUTS) != 0:
            raise OSError(ctypes.get_errno(), "a host cannot get a name of its own")
        socket.sethostname(host)
    jobs._python(env, directory, directory, command)
