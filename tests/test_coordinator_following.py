"""A coordinator that moves: clients follow it, old ones are refused, and the host that moved it forgets nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import arc_dist
from arc_dist.config import Env
from arc_dist.connect import connect
from arc_dist.coordinator import endpoint as endpoints
from arc_dist.coordinator import ray_actor
from arc_dist.coordinator.client import LocalClient
from arc_dist.coordinator.endpoint import Endpoint
from arc_dist.coordinator.following import FollowingClient, follow
from arc_dist.coordinator.hosting import MARK_NAME, HostSpec
from arc_dist.coordinator.reporting import report_shard
from arc_dist.coordinator.server import CoordinatorServer
from arc_dist.coordinator.service import Coordinator
from arc_dist.errors import ConfigError, CoordinatorUnavailable, Deposed
from arc_dist.supervisor import ray_host
from arc_dist.supervisor.ray_host import Place, RayHost, node_file
from ray_cluster import eventually

NAME = "coordinator-here.json"


class Hosts:
    """Coordinators of one job, one after the other, and the file that tells where they are."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / NAME
        self.running: list[tuple[Coordinator, CoordinatorServer]] = []
        self.clients: list[FollowingClient] = []

    def client(self, first: Endpoint) -> FollowingClient:
        self.clients.append(FollowingClient(first, self.file))
        return self.clients[-1]

    def start(self, **changes: Any) -> Endpoint:
        coordinator = Coordinator.open(2, run_dir=self.directory / "run", job_id="job", **changes)
        server = CoordinatorServer(coordinator, token="token").start()
        self.running.append((coordinator, server))
        return self.endpoint(server.address, coordinator.epoch)

    def endpoint(self, url: str, epoch: int, job_id: str = "job") -> Endpoint:
        return Endpoint(
            url=url, token="token", job_id=job_id, run_dir="", world_size=2, host="here", pid=1, epoch=epoch
        )

    def stop(self) -> None:
        coordinator, server = self.running.pop()
        server.close()
        coordinator.close()

    def tell(self, endpoint: Endpoint) -> None:
        endpoint.write(self.directory, NAME)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    found = Hosts(tmp_path)
    yield found
    for client in found.clients:
        client.close()
    while found.running:
        found.stop()


def join(client: Any, rank: int) -> dict[str, Any]:
    return client.join(rank=rank, world_size=2, host="h", pid=rank + 1, shm_dir=f"/{rank}")


def test_it_goes_on_with_the_next_coordinator_under_the_same_name(hosts: Hosts):
    first = hosts.start()
    client = hosts.client(first)
    join(client, 0)
    hosts.stop()
    with pytest.raises(CoordinatorUnavailable):
        client.status()
    second = hosts.start()
    hosts.tell(second)
    assert client.status()["epoch"] == second.epoch == first.epoch + 1
    assert client.address == second.url


def test_a_long_poll_at_a_coordinator_that_was_replaced_is_woken(hosts: Hosts):
    first = hosts.start()
    client = hosts.client(first)
    join(client, 0)
    client.ready(0, 0, None, [], "/0", "h")
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(client.directive(0, 0, 50.0)["kind"])
        except CoordinatorUnavailable as error:
            answers.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    eventually(lambda: hosts.running[0][1].num_connections >= 2, "the long poll")
    # The journal's lock belongs to the first, which lives on, as on a host that is cut off.
    other = Coordinator(2, job_id="job")
    other.epoch = first.epoch + 1
    with CoordinatorServer(other, token="token") as server:
        hosts.tell(hosts.endpoint(server.address, other.epoch))
        assert client.status()["epoch"] == other.epoch
        other.close()  # the poll that has moved there is answered, too
        thread.join(30)
    assert not thread.is_alive()
    assert len(answers) == 1


@pytest.mark.parametrize("wrong", ["job", "epoch"])
def test_another_job_and_an_older_epoch_are_not_followed(hosts: Hosts, wrong: str):
    hosts.start()
    hosts.stop()
    now = hosts.start()
    client = hosts.client(now)
    assert client.status()["epoch"] == 2
    bad = {"job": ("other", 9), "epoch": ("job", 1)}[wrong]
    hosts.tell(hosts.endpoint("http://127.0.0.1:9", bad[1], bad[0]))
    assert client.status()["epoch"] == 2
    assert client.address == now.url


def test_an_older_coordinator_is_not_believed(hosts: Hosts):
    first = hosts.start()
    client = hosts.client(first)
    client._epoch = first.epoch + 1  # heard by another thread
    with pytest.raises(CoordinatorUnavailable, match="epoch"):
        client.status()


def test_who_is_told_that_the_coordinator_was_replaced_waits_until_it_is_known_by_whom(hosts: Hosts):
    first = hosts.start()
    client = hosts.client(first)
    join(client, 0)
    deposed, _ = hosts.running[0]
    with pytest.raises(Deposed):
        deposed.call("status", {"epoch": 2})
    with pytest.raises(CoordinatorUnavailable, match="replaced by a newer one"):
        client.status()


def test_a_training_process_follows_where_its_supervisor_says(hosts: Hosts):
    first = hosts.start()
    hosts.stop()
    environ = {
        "ARC_COORDINATOR": first.url,
        "ARC_TOKEN": "token",
        "ARC_JOB_ID": "job",
        "ARC_COORDINATOR_FILE": str(hosts.file),
    }
    client = follow(Env.read(environ))
    second = hosts.start()
    hosts.tell(second)
    assert client.status()["epoch"] == 2
    client.close()


def test_a_shard_is_reported_again_to_a_coordinator_that_does_not_know_it(hosts: Hosts):
    committed: list[int] = []

    def commit(url: str, step: int, *rest: Any) -> None:
        committed.append(step)

    def shard(rank: int) -> dict[str, Any]:
        return {
            "rank": rank, "generation": 0, "step": 5, "url": "s", "manifest_part": {}, "certified": True, "tier": 0,
            "why": "",
        }  # fmt: skip

    first = hosts.start(commit=commit)
    clients = [hosts.client(first) for _ in range(2)]
    for rank, client in enumerate(clients):
        join(client, rank)
        client.ready(rank, 0, None, [], f"/{rank}", "h")
    assert [client.directive(rank, 0, 20.0)["kind"] for rank, client in enumerate(clients)] == ["run", "run"]
    outcome: list[dict[str, Any]] = []
    stopping = threading.Event()
    thread = threading.Thread(target=lambda: outcome.append(report_shard(clients[0], shard(0), 100.0, stopping)))
    thread.start()
    eventually(lambda: hosts.running[0][0].saves.saves, "the report of rank 0")
    hosts.stop()  # with the shard of rank 0 alone, which only it knew
    hosts.tell(hosts.start(commit=commit))
    assert report_shard(clients[1], shard(1), 100.0, stopping)["status"] == "committed"
    thread.join(60)
    assert [answer["status"] for answer in outcome] == ["committed"]
    assert committed == [5]


# ---- the host


def spec_of(directory: Path, **changes: Any) -> HostSpec:
    spec = HostSpec(job_id="job", run_dir=str(directory / "run"), world_size=2, start="one", token="token")
    return dataclasses.replace(spec, **changes)


def serve(host: ray_actor.CoordinatorHost, spec: HostSpec) -> dict[str, Any]:
    return host.serve(dataclasses.asdict(spec))


def test_the_actor_serves_what_it_is_told_and_a_later_start_takes_its_place(tmp_path: Path):
    host = ray_actor.CoordinatorHost("job", host="127.0.0.1", idle_limit_s=0)
    try:
        assert host.endpoint()["kind"] == "waiting"
        one = spec_of(tmp_path)
        assert serve(host, one)["kind"] == "place"
        one.leave_mark()
        first = serve(host, one)["endpoint"]
        assert serve(host, one)["endpoint"] == host.endpoint()["endpoint"] == first
        client = FollowingClient(Endpoint(**first), tmp_path / "nothing")
        assert join(client, 0)["epoch"] == first["epoch"] == 1
        assert host.about()["phase"] == "starting"
        client.close()

        two = spec_of(tmp_path, start="two", token="other")
        two.leave_mark()
        second = serve(host, two)["endpoint"]
        assert (second["epoch"], second["token"]) == (2, "other")
        assert serve(host, one)["kind"] == "deposed"
        assert host.endpoint()["endpoint"] == second
        assert serve(host, dataclasses.replace(two, job_id="another"))["kind"] == "place"
    finally:
        host.close()


def test_a_journal_that_another_has_open_is_refused_until_it_is_free(tmp_path: Path):
    spec = spec_of(tmp_path)
    spec.leave_mark()
    other = spec.open()
    host = ray_actor.CoordinatorHost("job", host="127.0.0.1", idle_limit_s=0)
    try:
        refused = serve(host, spec)
        assert refused["kind"] == "refused"
        assert "in use" in refused["problem"]
        other.close()
        assert serve(host, spec)["endpoint"]["epoch"] == 2
    finally:
        host.close()


def test_a_run_directory_that_the_host_does_not_see_is_named(tmp_path: Path):
    spec = spec_of(tmp_path)
    with pytest.raises(ConfigError, match="ARC_RUN_DIR"):
        spec.check_mark()
    spec.leave_mark()
    spec.check_mark()
    (Path(spec.run_dir) / MARK_NAME).write_text("another")
    with pytest.raises(Deposed, match="started again"):
        spec.check_mark()


@pytest.mark.parametrize("word", ["rya", "ray://", "ray://host", "ray://host:0", "ray://:6379", "ray://host:70000"])
def test_a_place_that_is_none_is_refused(word: str):
    with pytest.raises(ConfigError, match="embedded, ray and ray://HOST:PORT"):
        Env.read({"ARC_COORDINATOR": word})


def test_a_place_is_understood():
    assert Env.read({"ARC_COORDINATOR": "ray"}).ray == "auto"
    assert Env.read({"ARC_COORDINATOR": "ray://host:6379"}).ray == "host:6379"
    assert Env.read({"ARC_COORDINATOR": "embedded"}).ray is None
    assert Env.read({"ARC_COORDINATOR": "http://h:1"}).coordinator == "http://h:1"


def test_without_a_supervisor_ray_is_refused():
    with pytest.raises(ConfigError, match="arcrun"):
        connect(Env.read({"ARC_COORDINATOR": "ray"}), lambda value, rank: [value], 0, 1)


# ---- Ray is not reached: nothing listens at this address, which the real bridge finds out


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Place:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'arc-dist[ray]'")
    monkeypatch.setattr(ray_host, "_UNREACHED_LIMIT_S", 1.0)
    return Place(ray="127.0.0.1:9", job_id="job", run_dir=tmp_path / "run", directories=(tmp_path,))


def test_a_job_whose_ray_is_not_reached_does_not_start(no_ray: Place, tmp_path: Path):
    spec = spec_of(tmp_path)
    with pytest.raises(CoordinatorUnavailable, match=r"127\.0\.0\.1:9 is not reached"), RayHost(no_ray, spec=spec):
        pass


def test_a_job_that_has_run_goes_on_without_ray(no_ray: Place, tmp_path: Path):
    """Rank 0's supervisor stands in from the journal, with the next epoch and the state that was."""
    spec = spec_of(tmp_path)
    with contextlib.closing(spec.open()) as earlier:
        join(earlier_client := LocalClient(earlier), 0)
        earlier_client.ready(0, 0, None, [], "/0", "h")
        join(earlier_client, 1)
        earlier_client.ready(1, 0, None, [], "/1", "h")
        assert earlier.job.phase.value == "running"
    announced: list[Endpoint] = []
    with RayHost(no_ray, spec=spec, announce=announced.append) as host:
        assert host.endpoint.epoch == 2
        assert announced == [host.endpoint]
        assert endpoints.read(node_file(no_ray.run_dir)) == endpoints.read(tmp_path / endpoints.NAME) == host.endpoint
        client = FollowingClient(host.endpoint, node_file(no_ray.run_dir))
        assert client.status()["phase"] == "running"
        client.close()
    assert not node_file(no_ray.run_dir).exists()
    with contextlib.closing(spec.open()) as later:  # the journal is free again
        assert later.epoch == 3


def test_a_node_whose_bridge_finds_no_ray_follows_what_rank_0_announces(no_ray: Place, hosts: Hosts):
    first = hosts.start()
    hosts.stop()
    announced: list[Endpoint] = []
    with RayHost(no_ray, first=first, look_up=lambda: announced[-1] if announced else None) as node:
        announced.append(dataclasses.replace(first, job_id="another", epoch=7))
        second = hosts.start()
        announced.append(second)
        eventually(lambda: node.endpoint == second, "the address that was announced")
        assert endpoints.read(node_file(no_ray.run_dir)) == second


def test_without_ray_the_extra_is_named():
    """An interpreter without site-packages has no ray, whatever is installed."""
    order = {"do": "status", "job_id": "", "address": "auto", "parent": os.getpid()}
    bridge = subprocess.Popen(
        [sys.executable, "-S", "-m", "arc_dist.supervisor.ray_bridge"],
        env={**os.environ, "PYTHONPATH": str(Path(arc_dist.__path__[0]).parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with bridge:  # whose input stays open, since its end would end it
        assert bridge.stdin is not None and bridge.stdout is not None
        bridge.stdin.write(json.dumps(order) + "\n")
        bridge.stdin.flush()
        (report,) = [json.loads(line) for line in bridge.stdout]
    assert report["is_final"]
    assert "arc-dist[ray]" in report["problem"]
