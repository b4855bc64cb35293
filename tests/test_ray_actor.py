"""The same coordinator inside a Ray actor, with a real local Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from arc_dist.coordinator import ray_actor
from arc_dist.coordinator.client import CoordinatorClient
from arc_dist.errors import ConfigError


def test_the_host_is_a_plain_class(tmp_path: Path):
    host = ray_actor.CoordinatorHost(1, job_id="j", run_dir=str(tmp_path), token="t", host="127.0.0.1")
    endpoint = host.endpoint()
    assert endpoint["epoch"] == 1
    client = CoordinatorClient(endpoint["address"], "t")
    client.join(0, 1, "h", 1, "/d")
    assert host.status()["joined"] == [0]
    host.stop()


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"arc-dist\[ray\]"):
        ray_actor.start(1, job_id="j", run_dir="/nowhere", token="t")


# In a process of its own: Ray takes seconds to start, leaves threads, and must not see the tests' environment.
SCRIPT = """
    import json, os, signal, sys, time
    import ray
    from arc_dist.coordinator import ray_actor
    from arc_dist.coordinator.client import CoordinatorClient
    from arc_dist.errors import ConfigError

    run_dir = sys.argv[1]
    try:
        ray_actor.endpoint("job")
    except ConfigError as error:
        print(json.dumps({"unconnected": str(error)}), flush=True)
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        settings = dict(job_id="job", run_dir=run_dir, token="secret", host="127.0.0.1")
        first = ray_actor.start(2, **settings)
        same = ray_actor.start(2, **settings)
        clients = [CoordinatorClient(first["address"], "secret") for _ in range(2)]
        for rank, client in enumerate(clients):
            client.join(rank, 2, "h", rank, f"/{rank}")
            client.ready(rank, 0, None, [], f"/{rank}", "h")
        told = [client.directive(rank, 0, 5)["kind"] for rank, client in enumerate(clients)]
        clients[1].died(1, 0, {"kind": "signal", "signal": 9}, 5)

        os.kill(first["pid"], signal.SIGKILL)
        deadline = time.monotonic() + 60
        second = ray_actor.endpoint("job", timeout_s=60)
        while second["pid"] == first["pid"] and time.monotonic() < deadline:
            time.sleep(0.1)
            second = ray_actor.endpoint("job", timeout_s=60)
        client = CoordinatorClient(second["address"], "secret")
        after = client.status()
        asked = client.directive(0, 0, 5)["kind"]
        ray_actor.stop("job")
        try:
            ray_actor.endpoint("job", timeout_s=5)
            gone = "still there"
        except ConfigError as error:
            gone = str(error)
        print(json.dumps({"first": first, "same": same, "told": told, "second": second, "after": after,
                          "asked": asked, "gone": gone}), flush=True)
    finally:
        ray.shutdown()
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_it_survives_sigkill_of_its_actor(tmp_path: Path):
    pytest.importorskip("ray", reason="ray is not installed: pip install 'arc-dist[ray]'")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environ |= {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    unconnected, said = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert "not connected to Ray" in unconnected["unconnected"]
    assert said["same"] == said["first"]
    assert said["told"] == ["run", "run"]
    assert said["first"]["epoch"] == 1
    assert said["second"]["epoch"] == 2
    # The death that was acknowledged before the kill is known to the actor that Ray started again.
    assert (said["after"]["phase"], said["after"]["generation"]) == ("ending", 0)
    assert said["asked"] == "end"
    assert "no coordinator for job" in said["gone"]
