"""Jobs whose coordinator is hosted by a real Ray: its actor and all that it needs may die, and no bit differs."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from arc_dist import Store
from arc_dist.coordinator import endpoint as endpoints
from arc_dist.coordinator.endpoint import Endpoint
from ranks import Job, run_ranks
from ray_cluster import RayCluster, alive, eventually
from toy import Toy, plain

SCRIPT = str(Path(__file__).parent / "scripts" / "train_toy.py")
LAG_S = 0.05
MOMENTS = int(os.environ.get("ARC_TEST_RAY_MOMENTS", "50"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install 'arc-dist[ray]'"
    ),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with RayCluster() as running:
        yield running


def plain_body(rank: int, world_size: int, toy: Toy) -> str:
    return plain(toy)[0]


class Training:
    """A job of two ranks under arcrun, its coordinator in Ray."""

    def __init__(
        self, directory: Path, cluster: RayCluster, toy: Toy, *, stand_in_s: float = 6.0, **config: Any
    ) -> None:
        self.out = directory
        self.run_dir = directory / "run"
        self.toy = toy
        lags = {"0": LAG_S, "1": LAG_S}
        config = {"toy": dataclasses.asdict(toy), "out": str(directory), "lags": lags, **config}
        env = {**cluster.environ, "ARC_RUN_DIR": str(self.run_dir), "ARC_STAND_IN_S": str(stand_in_s)}
        launcher = [sys.executable, "-m", "arc_dist.launch.arcrun", "--standalone", "--nproc-per-node=2"]
        self.job = Job([*launcher, SCRIPT, json.dumps(config)], env=env)

    def __enter__(self) -> Training:
        self.job.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.job.__exit__(*exc_info)

    def step(self) -> int:
        """The newest step of rank 0."""
        path = self.out / "progress-0"
        lines = path.read_text().splitlines() if path.exists() else []
        return int(lines[-1]) if lines else 0

    def reach(self, step: int) -> None:
        self.job.wait_for(lambda: self.step() >= step, 240, f"step {step}")

    def endpoint(self) -> Endpoint:
        return self.job.wait_for(self._endpoint, 120, "the coordinator's address")

    def _endpoint(self) -> Endpoint | None:
        try:
            return endpoints.read(self.run_dir / endpoints.NAME)
        except FileNotFoundError:
            return None

    def next_endpoint(self, epoch: int) -> Endpoint:
        """The one after `epoch`, once it answers."""
        self.job.wait_for(lambda: self.endpoint().epoch > epoch, 120, f"a coordinator after epoch {epoch}")
        return self.endpoint()

    def bridges(self) -> list[int]:
        """Pids of the processes of the job that have loaded Ray."""
        return [pid for pid in self.job.pids() if "_raylet" in _read(f"/proc/{pid}/maps")]

    def finish(self) -> str:
        """Waits for a good end with the right bits; returns the output."""
        done = self.job.wait(240)
        assert done.exit_code == 0, done
        results = [json.loads((self.out / f"result-{rank}.json").read_text()) for rank in (0, 1)]
        assert [result["digest"] for result in results] == run_ranks(2, plain_body, self.toy), done
        return done.stderr


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def is_actor(pid: int) -> bool:
    """Whether it is a process of Ray, and not a supervisor that stands in."""
    return "ray::" in _read(f"/proc/{pid}/cmdline")


def kill(pid: int) -> None:
    """SIGKILLs, and sees it gone."""
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not alive(pid), f"the end of {pid}")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=pytest.mark.soak)])
def test_a_rank_the_actor_and_the_bridge_are_killed_and_no_bit_differs(tmp_path: Path, cluster: RayCluster, kind: str):
    toy = Toy(kind=kind, steps=60)
    faults: dict[str, Any] = {"kills": {"1": [35]}, "gates": [20, 50], "settings": {"hang_deadline_s": 0.0}}
    store = str(tmp_path / "store")
    # On a busy machine Ray may need more than the usual patience.
    with Training(tmp_path, cluster, toy, stand_in_s=1000, lags={}, store=store, **faults) as training:
        first = training.endpoint()
        assert is_actor(first.pid)
        training.reach(19)
        (bridge,) = eventually(training.bridges, "the bridge")
        assert "ray_bridge" in _read(f"/proc/{bridge}/cmdline")
        kill(first.pid)
        second = training.next_endpoint(first.epoch)
        assert second.pid != first.pid
        kill(bridge)
        (another,) = eventually(training.bridges, "another bridge")
        assert another != bridge
        (tmp_path / "go-20").touch()
        # The coordinator is lost again in the moment in which a rank is.
        training.job.wait_for((tmp_path / "killed-1-35").exists, 240, "the kill of rank 1")
        kill(second.pid)
        third = training.next_endpoint(second.epoch)
        assert is_actor(third.pid)
        assert [third.job_id, third.token] == [first.job_id, first.token]
        (tmp_path / "go-50").touch()
        training.finish()
    assert cluster.coordinators() == []


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_the_command_starts_shows_and_ends_an_actor(cluster: RayCluster):
    done = cluster.arc("start", "--job-id=served", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["job_id"] == "served"
    done = cluster.arc("status")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^served: answers on .* \(pid \d+\), serves no job yet$", done.stdout, re.MULTILINE)
    done = cluster.arc("stop", "--job-id=served")
    assert done.returncode == 0, done.stderr
    assert cluster.coordinators() == []


# As `ray start` of another release would have left it: the versions that the cluster says that it has.
SAY_VERSION = """
import json, sys
from ray._raylet import GcsClient
from ray._private.ray_constants import KV_NAMESPACE_CLUSTER

gcs = GcsClient(address=sys.argv[1])
said = json.loads(gcs.internal_kv_get(b"CLUSTER_METADATA", namespace=KV_NAMESPACE_CLUSTER))
old = said[sys.argv[2]]
said[sys.argv[2]] = sys.argv[3]
gcs.internal_kv_put(b"CLUSTER_METADATA", json.dumps(said).encode(), overwrite=True, namespace=KV_NAMESPACE_CLUSTER)
print(old)
"""


def say_version(cluster: RayCluster, what: str, version: str) -> str:
    """Makes the cluster say that it has another version; returns the one that it said before."""
    command = [sys.executable, "-c", SAY_VERSION, cluster.address, what, version]
    env = {**os.environ, **cluster.environ}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


@pytest.mark.timeout(300)
def test_a_cluster_of_another_version_is_named_and_a_patch_level_of_python_does_no_harm(cluster: RayCluster):
    ray_version = say_version(cluster, "ray_version", "2.1.0")
    try:
        done = cluster.arc("status")
        assert done.returncode == 78, done.stderr
        assert "Ray: 2.1.0" in done.stderr and f"Ray: {ray_version}" in done.stderr
    finally:
        say_version(cluster, "ray_version", ray_version)
    major, minor = sys.version_info[:2]
    python_version = say_version(cluster, "python_version", f"{major}.{minor}.99")
    try:
        assert cluster.coordinators() == []
    finally:
        say_version(cluster, "python_version", python_version)


# ---- soak

FAULTS = ("actor", "actor", "frozen actor", "bridge", "raylet", "node", "control service")


class Damage:
    """Faults at random moments of one job on one cluster."""

    def __init__(self, rng: random.Random, cluster: RayCluster, training: Training) -> None:
        self._rng = rng
        self._cluster = cluster
        self._training = training
        self._raylets = list(cluster.raylets)
        self.struck: list[str] = []

    def strike(self, fault: str) -> bool:
        """Makes a fault happen; False when there is nothing left that it could hit."""
        victims = self._victims(fault)
        for pid in victims:
            os.kill(pid, signal.SIGSTOP if fault == "frozen actor" else signal.SIGKILL)
        if fault != "frozen actor":
            for pid in victims:
                eventually(lambda pid=pid: not alive(pid), f"the end of {pid}")
        if victims:
            self.struck.append(f"{fault} at step {self._training.step()}")
        return bool(victims)

    def _victims(self, fault: str) -> list[int]:
        if "actor" in fault:
            pid = self._training.endpoint().pid
            return [pid] if is_actor(pid) and alive(pid) else []
        if fault == "bridge":
            return self._training.bridges()
        if fault == "control service":
            return [self._cluster.gcs] if alive(self._cluster.gcs) else []
        if not self._raylets:
            return []
        raylet = self._raylets.pop(self._rng.randrange(len(self._raylets)))
        if fault == "raylet":
            return [raylet]
        lost = self._cluster.pids_of_node(raylet)
        return [*lost, self._cluster.gcs] if raylet == self._cluster.raylets[0] and alive(self._cluster.gcs) else lost


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_frozen_actor_is_killed_and_the_job_trains_on(tmp_path: Path, cluster: RayCluster):
    """It holds the journal until then, so that nobody can stand in for it; a rank that dies meanwhile waits."""
    toy = Toy(kind="ddp", steps=60)
    with Training(tmp_path, cluster, toy, kills={"1": [40]}) as training:
        first = training.endpoint()
        training.reach(10)
        os.kill(first.pid, signal.SIGSTOP)
        second = training.next_endpoint(first.epoch)
        assert second.pid != first.pid
        training.finish()
    assert (tmp_path / "killed-1-40").exists()
    assert not alive(first.pid)
    assert cluster.coordinators() == []


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_actor_raylets_nodes_and_the_control_service_are_lost_at_random_moments(tmp_path: Path):
    seed = int(os.environ.get("ARC_TEST_RAY_SEED", "1"))
    rng = random.Random(seed)
    struck: list[str] = []
    number = 0
    with RayCluster(3) as cluster:
        while len(struck) < MOMENTS:
            number += 1
            out = tmp_path / f"job-{number}"
            out.mkdir()
            toy = Toy(kind=rng.choice(("ddp", "fsdp")), steps=160)
            kills = {str(rank): sorted(rng.sample(range(15, 150), 2)) for rank in (0, 1)}
            with Training(out, cluster, toy, kills=kills, store=str(out / "store")) as training:
                training.endpoint()
                damage = Damage(rng, cluster, training)
                for step in sorted(rng.sample(range(5, 150), 5)):
                    training.reach(step)
                    damage.strike(rng.choice(FAULTS))
                print(f"seed {seed}, job {number}, {toy.kind}, kills {kills}: {damage.struck}", flush=True)
                training.finish()
            for rank, steps in kills.items():
                for step in steps:
                    assert (out / f"killed-{rank}-{step}").exists(), f"the kill of rank {rank} at {step} did not fire"
            store = Store(out / "store")
            assert store.steps()[-1].step == toy.steps
            assert store.open(toy.steps).verify() == []
            struck += damage.struck
            cluster.restart()
        assert cluster.coordinators() == []
    print(f"{len(struck)} moments in {number} jobs: {collections.Counter(fault.split(' at ')[0] for fault in struck)}")
