"""A real Ray cluster of several raylets on this machine, in a process of its own: tests themselves import no ray.

::

    with RayCluster(3) as cluster:
        cluster.environ["ARC_COORDINATOR"]     # ray://host:port
        os.kill(cluster.raylets[1], signal.SIGKILL)
        cluster.restart()                      # afresh, on the same port
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from arc_dist.supervisor.ray_link import ask

_START_LIMIT_S = 180.0
_MEMORY_BYTES = 80 << 20


class RayCluster:
    """See the module's text.

    Attributes:
        address: ``host:port`` of the control service.
        gcs: its pid.
        raylets: their pids, of the head first.
    """

    def __init__(self, num_nodes: int = 1) -> None:
        self._num_nodes = num_nodes
        self._port = _free_port()
        self.address = ""
        # Short, because the paths of Ray's sockets must be.
        self._directory = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        self._process: subprocess.Popen[str] | None = None
        self.gcs = 0
        self.raylets: list[int] = []

    @property
    def environ(self) -> dict[str, str]:
        """What a job needs to use the cluster."""
        return {"ARC_COORDINATOR": f"ray://{self.address}", **self._settings()}

    def start(self) -> None:
        """Starts all nodes."""
        env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "ARC_"))}
        env |= {**self._settings(), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._log = open(self._directory / "cluster.log", "ab")  # noqa: SIM115  # closed by stop
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self._num_nodes), str(self._port), str(self._directory)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, (self._directory / "cluster.log").read_text()[-4000:]
        about = json.loads(line)
        self.address, self.gcs, self.raylets = about["address"], about["gcs"], about["raylets"]

    def stop(self) -> None:
        """Ends everything that was started."""
        if self._process is None:
            return
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(30)
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()
        self._process = None

    def restart(self) -> None:
        """As its owner would after a failure: another control service, which knows nothing, on the same port."""
        self.stop()
        self.start()

    def pids(self) -> list[int]:
        """All processes of the cluster: they carry its directory in their environment."""
        return [pid for pid in _all_pids() if pid != os.getpid() and _names(pid, str(self._directory))]

    def pids_of_node(self, raylet: int) -> list[int]:
        """A raylet with its workers and agents."""
        found, waiting = [], [raylet]
        while waiting:
            pid = waiting.pop()
            found.append(pid)
            with contextlib.suppress(OSError):
                for task in os.listdir(f"/proc/{pid}/task"):
                    waiting += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
        return found

    def coordinators(self) -> list[dict[str, Any]]:
        """What ``arc coordinator status --json`` says."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self._settings().items():
                patch.setenv(name, value)
            return ask({"do": "status", "job_id": "", "address": self.address}, 120.0)

    def arc(self, action: str, *options: str) -> subprocess.CompletedProcess[str]:
        """``arc coordinator ...`` on this cluster."""
        call = "import sys; from arc_dist.cli import main; sys.exit(main())"
        return subprocess.run(
            [sys.executable, "-c", call, "coordinator", action, *options],
            env={**os.environ, **self.environ},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def _settings(self) -> dict[str, str]:
        return {
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(self._directory),
        }

    def __enter__(self) -> RayCluster:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)


def eventually(condition: Any, what: str, limit_s: float = 120.0) -> Any:
    """Polls until `condition()` is true, and returns its value."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {limit_s:.0f} s for {what}")


def alive(pid: int) -> bool:
    """Whether the process is there, and no zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def _all_pids() -> Iterator[int]:
    return (int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit())


def _names(pid: int, word: str) -> bool:
    """Whether a live process has the word in its arguments or environment."""
    with contextlib.suppress(OSError):
        return alive(pid) and any(
            word.encode() in Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ")
        )
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """The process that owns the cluster's processes."""
    from ray.cluster_utils import Cluster

    num_nodes, port, directory = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    temp_dir = os.path.join(directory, "ray")  # where RAY_TMPDIR makes Ray look for its address
    os.makedirs(temp_dir, exist_ok=True)
    common = {"object_store_memory": _MEMORY_BYTES, "include_dashboard": False, "temp_dir": temp_dir}
    cluster = Cluster(initialize_head=True, head_node_args={**common, "gcs_server_port": port})
    for _ in range(num_nodes - 1):
        cluster.add_node(**common)

    def pid_of(node: Any, kind: str) -> int:
        return node.all_processes[kind][0].process.pid

    nodes = [cluster.head_node, *cluster.worker_nodes]
    about: dict[str, Any] = {"address": cluster.address}
    about |= {"gcs": pid_of(nodes[0], "gcs_server"), "raylets": [pid_of(node, "raylet") for node in nodes]}
    print(json.dumps(about), file=reports, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
