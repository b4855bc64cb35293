"""From the SIGKILL of the actor that hosts the coordinator to its answers under a new address, with a real local Ray.

A cluster of one raylet; the actor is killed, Ray starts it again, the bridge of the node tells it what to serve, and
the journal gives it its state. Told apart: until Ray runs the actor's code again, and from there to the first answer.

    python benchmarks/bench_ray.py --kills 20
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import queue
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from arc_dist.coordinator.client import CoordinatorClient
from arc_dist.coordinator.endpoint import Endpoint
from arc_dist.coordinator.hosting import HostSpec
from arc_dist.errors import ArcError
from arc_dist.supervisor.ray_link import Link, ask
from ray_cluster import RayCluster
from stats import describe, setting

LIMIT_S = 120.0
TARGET_S = 2.0


def state(endpoint: Endpoint) -> dict[str, Any]:
    """What the coordinator says of its job, without what every opening of the journal changes."""
    client = CoordinatorClient(endpoint.url, endpoint.token, timeout_s=5.0)
    try:
        return {name: value for name, value in client.status().items() if name != "epoch"}
    finally:
        client.close()


def answering(reports: queue.SimpleQueue[Any], after_epoch: int) -> tuple[Endpoint, dict[str, Any], float]:
    """The next address that answers, its state, and when it did (seconds since 1970)."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        report = reports.get(timeout=LIMIT_S)
        if report is None:
            raise SystemExit("the bridge has ended")
        if "endpoint" in report and report["endpoint"]["epoch"] > after_epoch:
            found = Endpoint(**report["endpoint"])
            try:
                return found, state(found), time.time()
            except ArcError as error:
                raise SystemExit(f"an address was told that does not answer: {error}") from error
    raise SystemExit(f"no coordinator after {LIMIT_S:.0f} s")


def begin(endpoint: Endpoint) -> None:
    """A job of two ranks that runs, and in which one has died: what the journal must bring back."""
    client = CoordinatorClient(endpoint.url, endpoint.token)
    for rank in (0, 1):
        client.join(rank, 2, "h", rank + 1, f"/{rank}")
        client.ready(rank, 0, None, [], f"/{rank}", "h")
    for rank in (0, 1):
        assert client.directive(rank, 0, 10.0)["kind"] == "run"
    client.died(1, 0, {"kind": "signal", "signal": 9}, 5)
    client.close()


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    arguments = parser.parse_args()
    print(setting())
    totals: list[float] = []
    opened: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bench-ray-") as name, RayCluster() as cluster:
        os.environ.update(cluster.environ)
        spec = HostSpec(job_id="bench", run_dir=name, world_size=2, start="bench", token="bench")
        spec.leave_mark()
        reports: queue.SimpleQueue[Any] = queue.SimpleQueue()
        order = {"do": "host", "job_id": "bench", "address": cluster.address, "spec": dataclasses.asdict(spec)}
        link = Link(order, reports.put)
        endpoint, _, _ = answering(reports, 0)
        begin(endpoint)
        before = state(endpoint)
        for _ in range(arguments.kills):
            killed_at = time.time()
            os.kill(endpoint.pid, signal.SIGKILL)
            endpoint, after, answered_at = answering(reports, endpoint.epoch)
            assert after == before, (before, after)
            (about,) = ask({"do": "status", "job_id": "bench", "address": cluster.address}, LIMIT_S)
            totals.append(answered_at - killed_at)
            opened.append(answered_at - about["started_at"])
            print(
                f"{totals[-1]:.2f} s from the kill to an answer; {opened[-1]:.2f} s of it after Ray's restart",
                flush=True,
            )
        link.stop()
        while "done" not in (reports.get(timeout=LIMIT_S) or {"done": None}):
            pass
        link.close()
    print(f"kill -> answer:          {describe(totals, 's')}")
    print(f"Ray's restart -> answer: {describe(opened, 's')}; target {TARGET_S:g} s; worst {max(opened):.2f} s")
    print("state after each restart: equal")


if __name__ == "__main__":
    main()
