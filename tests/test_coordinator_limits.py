"""Callers that are slow, many, wild or without the certificate: cut off, one by one, and in nobody's way."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arc_dist.config import Env
from arc_dist.coordinator.client import CoordinatorClient
from arc_dist.coordinator.limits import Bucket, BucketPerAddress, Limits, TimedStream
from arc_dist.coordinator.server import CoordinatorServer
from arc_dist.coordinator.service import Coordinator
from arc_dist.coordinator.tls import Certificate
from arc_dist.errors import ConfigError, CoordinatorUnavailable
from ranks import Job, torchrun

SCRIPT = str(Path(__file__).parent / "scripts" / "train_toy.py")
LIMIT_S = 100.0


def connect(server: CoordinatorServer) -> socket.socket:
    host, _, port = server.address.rpartition("//")[2].partition(":")
    return socket.create_connection((host, int(port)), timeout=LIMIT_S)


def get(server: CoordinatorServer, path: str, token: str | None = None) -> tuple[int, dict[str, str]]:
    connection = http.client.HTTPConnection(server.address.removeprefix("http://"), timeout=LIMIT_S)
    connection.request("GET", path, headers={"Authorization": f"Bearer {token or server.token}"})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status, dict(answer.headers)


def wait_until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.01)


def head(server: CoordinatorServer, path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.token}\r\n\r\n".encode()


# ---- rates -----------------------------------------------------------------------------------------------------------


@given(
    st.floats(0.1, 1000),
    st.lists(st.tuples(st.floats(0, 100), st.integers(1, 50)), max_size=20),
)
def test_a_bucket_never_lets_more_through_than_its_rate_and_ten_seconds_worth(
    rate: float, bursts: list[tuple[float, int]]
):
    now = [0.0]
    bucket = Bucket(rate, lambda: now[0])
    taken = 0
    for pause_s, tries in bursts:
        now[0] += pause_s
        for _ in range(tries):
            wait_s = bucket.take()
            taken += wait_s == 0
            assert 0 <= wait_s <= 1 / rate * 1.01
    assert taken <= max(1.0, 10 * rate) + rate * now[0] + 1e-6


def test_who_waits_as_long_as_told_is_served():
    now = [0.0]
    bucket = Bucket(2.0, lambda: now[0])
    while (wait_s := bucket.take()) == 0:
        pass
    now[0] += wait_s
    assert bucket.take() == 0


def test_addresses_do_not_take_from_each_other_and_are_forgotten_in_the_end():
    buckets = BucketPerAddress(0.1, lambda: 0.0)
    assert [buckets.take("a"), buckets.take("b")] == [0, 0]
    assert buckets.take("a") > 0
    for i in range(2000):
        buckets.take(f"other-{i}")
    assert buckets.take("a") == 0
    assert len(buckets._buckets) <= 1024


def test_too_many_reads_are_told_when_to_come_again_and_reports_are_not_touched():
    with CoordinatorServer(Coordinator(1), limits=Limits(reads_per_s=0.1)) as server:
        assert get(server, "/v1/status")[0] == 200
        status, headers = get(server, "/v1/status")
        assert status == 429
        assert int(headers["Retry-After"]) >= 1
        client = CoordinatorClient(server.address, server.token)
        for _ in range(20):
            client.call("status")
        with pytest.raises(CoordinatorUnavailable, match="too many"):
            client.get("/v1/status")


def test_wrong_tokens_are_slowed_down_and_the_right_one_is_not():
    with CoordinatorServer(Coordinator(1), limits=Limits(refusals_per_s=0.3)) as server:
        assert [get(server, "/v1/status", "wrong")[0] for _ in range(5)] == [401, 401, 401, 429, 429]
        assert get(server, "/v1/status")[0] == 200


def test_a_supervisor_that_is_told_to_slow_down_takes_it_for_a_moment_without_an_answer():
    with CoordinatorServer(Coordinator(1), limits=Limits(reports_per_s=0.1)) as server:
        client = CoordinatorClient(server.address, server.token)
        client.call("status")
        with pytest.raises(CoordinatorUnavailable, match="too many requests"):
            client.call("status")


def test_ranks_have_room_by_their_number():
    limits = Limits().for_world(10_000)
    assert limits.connections >= 4 * 10_000
    assert limits.reports_per_s * 10 >= 20 * 10_000  # a restart: each rank says and asks a handful of things


def num_stuck() -> int:
    """Threads of this process that wait for a caller to take an answer."""
    codes = [frame.f_code for frame in sys._current_frames().values()]
    return sum(code is TimedStream.write.__code__ for code in codes)


# ---- slow callers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [b"", b"P", b"POST /v1/status HTTP/1.1\r\n"])
def test_a_request_that_trickles_is_cut_off(first: bytes):
    limits = Limits(request_s=0.5, stranger_s=0.5)
    with CoordinatorServer(Coordinator(1), limits=limits) as server, connect(server) as slow:
        slow.sendall(first)
        served = 0
        with pytest.raises(OSError):  # noqa: PT012  # a send after the end, or the end itself
            for _ in range(int(LIMIT_S / 0.05)):
                slow.sendall(b"X" if first else b"")
                slow.settimeout(0.05)
                try:
                    if slow.recv(1) == b"":
                        raise ConnectionResetError
                except TimeoutError:
                    pass
                slow.settimeout(LIMIT_S)
                served += get(server, "/healthz")[0] == 200
        assert served > 0
        wait_until(lambda: server.num_connections == 0, "the slow connection's end")


def test_a_body_that_trickles_is_cut_off():
    with CoordinatorServer(Coordinator(1), limits=Limits(request_s=0.5)) as server, connect(server) as slow:
        slow.sendall(
            head(server, "/v1/status").replace(b"GET", b"POST").replace(b"\r\n\r\n", b"\r\nContent-Length: 9\r\n\r\n")
        )
        slow.sendall(b"{")
        assert slow.recv(1) == b""


def test_a_connection_that_says_nothing_is_closed_and_a_ranks_is_kept():
    limits = Limits(stranger_s=0.3, idle_s=LIMIT_S)
    with CoordinatorServer(Coordinator(1), limits=limits) as server, connect(server) as silent:
        client = CoordinatorClient(server.address, server.token)
        client.status()
        kept = client._local.connection.sock
        assert silent.recv(1) == b""
        client.status()
        assert client._local.connection.sock is kept


def test_an_answer_that_nobody_takes_holds_up_one_thread_only_and_not_for_ever():
    coordinator = Coordinator(2)
    for i in range(1000):
        coordinator.call("incident", {"kind": "test", "cause": "x" * 2000, "step": i})
    limits = Limits(answer_s=3.0, reads_per_s=1000)
    with CoordinatorServer(coordinator, limits=limits) as server:
        with connect(server) as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.sendall(head(server, "/v1/incidents?limit=1000") * 20)  # 2 MB each
            wait_until(lambda: num_stuck() == 1, "the stuck answer")
            for rank in (0, 1):
                CoordinatorClient(server.address, server.token).join(rank, 2, "h", rank, "/d")
            wait_until(lambda: num_stuck() == 0, "the end of its thread, while the caller is still there")


def test_what_people_read_and_tell_waits_for_no_decision():
    coordinator = Coordinator(1)
    with CoordinatorServer(coordinator) as server, coordinator._changed:  # a decision that takes for ever
        for path in ("/v1/status", "/v1/incidents", "/v1/history", "/metrics"):
            assert get(server, path)[0] == 200
        client = CoordinatorClient(server.address, server.token, timeout_s=LIMIT_S)
        client.incident(kind="test")
        client.report(0, 0, 5)
        assert client.get("/v1/incidents")["count"] == 1


def test_no_more_connections_than_allowed_and_the_open_ones_are_served():
    with CoordinatorServer(Coordinator(1), limits=Limits(connections=3)) as server:
        client = CoordinatorClient(server.address, server.token)
        client.status()
        others = [connect(server) for _ in range(2)]
        wait_until(lambda: server.num_connections == 3, "three connections")
        with connect(server) as fourth:
            assert fourth.recv(1) == b""
        client.status()
        for other in others:
            other.close()
        wait_until(lambda: server.num_connections == 1, "room")
        assert get(server, "/healthz")[0] == 200


def test_a_hundred_megabytes_are_refused_unread():
    with CoordinatorServer(Coordinator(1)) as server, connect(server) as sock:
        request = head(server, "/v1/status").replace(b"GET", b"POST")
        sock.sendall(request.replace(b"\r\n\r\n", b"\r\nContent-Length: 104857600\r\n\r\n"))
        assert sock.recv(4096).startswith(b"HTTP/1.1 413")
        assert get(server, "/healthz")[0] == 200


# ---- TLS -------------------------------------------------------------------------------------------------------------


def make_certificate(directory: Path, name: str, address: str = "127.0.0.1") -> Certificate:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    cert, key = directory / f"{name}.pem", directory / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", f"/CN={name}", "-addext", f"subjectAltName=IP:{address}"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True, timeout=LIMIT_S)
    return Certificate(cert=cert, key=key)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"), "ours")


@pytest.fixture
def secured(certificate: Certificate) -> Iterator[CoordinatorServer]:
    with CoordinatorServer(Coordinator(1), certificate=certificate, limits=Limits(stranger_s=1.0)) as server:
        yield server


def test_with_the_authority_all_is_as_without_tls(secured: CoordinatorServer, certificate: Certificate):
    assert secured.address.startswith("https://")
    client = CoordinatorClient(secured.address, secured.token, authority=certificate.cert)
    client.join(0, 1, "h", 1, "/d")
    client.ready(0, 0, None, [], "/d", "h")
    assert client.directive(0, 0, 5)["kind"] == "run"
    kept = client._local.connection.sock
    assert client.get("/v1/status")["health"] == "running"
    assert client._local.connection.sock is kept
    assert secured.num_connections == 1
    client.close()
    wait_until(lambda: secured.num_connections == 0, "the end of the connection")


def test_the_token_is_told_to_nobody_without_the_right_certificate(
    certificate: Certificate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    elsewhere = make_certificate(tmp_path, "elsewhere", "192.0.2.1")
    seen: list[str] = []
    authenticate = "arc_dist.coordinator.handler.Handler._authenticate"
    monkeypatch.setattr(authenticate, lambda handler: seen.append(handler.headers.get("Authorization")))
    for shown, authority in ((certificate, None), (certificate, elsewhere.cert), (elsewhere, elsewhere.cert)):
        with CoordinatorServer(Coordinator(1), certificate=shown) as server:
            with pytest.raises(CoordinatorUnavailable, match="certificate verify failed"):
                CoordinatorClient(server.address, server.token, authority=authority).status()
    assert seen == []


def test_plain_http_gets_nothing_from_a_tls_port_and_tls_nothing_from_a_plain_one(
    secured: CoordinatorServer, certificate: Certificate
):
    with pytest.raises(CoordinatorUnavailable):
        CoordinatorClient(secured.address.replace("https", "http"), secured.token).status()
    with CoordinatorServer(Coordinator(1)) as plain:
        with pytest.raises(CoordinatorUnavailable):
            CoordinatorClient(plain.address.replace("http", "https"), plain.token, authority=certificate.cert).status()


def test_a_handshake_that_is_never_finished_is_in_nobodys_way(secured: CoordinatorServer, certificate: Certificate):
    silent = [connect(secured) for _ in range(5)]
    assert CoordinatorClient(secured.address, secured.token, authority=certificate.cert).status()["epoch"] == 1
    for sock in silent:
        assert sock.recv(1) == b""
        sock.close()


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_old_protocols_are_refused(secured: CoordinatorServer, certificate: Certificate):
    context = ssl.create_default_context(cafile=certificate.cert)
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    with connect(secured) as sock, pytest.raises(ssl.SSLError):
        context.wrap_socket(sock, server_hostname="127.0.0.1")


def test_files_that_cannot_be_used_are_said_before_anything_runs(certificate: Certificate, tmp_path: Path):
    (tmp_path / "junk").write_text("junk")
    for cert, key in ((tmp_path / "gone", certificate.key), (certificate.cert, tmp_path / "junk")):
        with pytest.raises(ConfigError, match="ARC_TLS_CERT"):
            CoordinatorServer(Coordinator(1), certificate=Certificate(cert=cert, key=key)).start()
    with pytest.raises(ConfigError, match="ARC_TLS_CA"):
        CoordinatorClient("https://127.0.0.1:1", "t", authority=tmp_path / "junk")
    with pytest.raises(ConfigError, match="ARC_TLS_KEY is not set"):
        Certificate.of(certificate.cert, None)
    env = Env.read({"ARC_TLS_CERT": "/c", "ARC_TLS_KEY": "/k", "ARC_TLS_CA": "/a"})
    assert (Certificate.of(env.tls_cert, env.tls_key), env.tls_ca) == (
        Certificate(cert=Path("/c"), key=Path("/k")),
        Path("/a"),
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_job_of_two_ranks_survives_a_kill_with_all_its_talk_in_tls(certificate: Certificate, tmp_path: Path):
    config = {"out": str(tmp_path), "toy": {"kind": "ddp", "steps": 30}, "kills": {"1": [10]}}
    config |= {"store": str(tmp_path / "store"), "settings": {"checkpoint_every": 10}}
    env = {
        "ARC_TLS_CERT": str(certificate.cert),
        "ARC_TLS_KEY": str(certificate.key),
        "ARC_TLS_CA": str(certificate.cert),
        "ARC_RUN_DIR": str(tmp_path / "run"),
    }
    schemes: list[str] = []
    with Job(torchrun(2, "-m", "arc_dist", SCRIPT, json.dumps(config)), env=env) as job:
        found = tmp_path / "run" / "coordinator.json"

        def note() -> None:
            while job.process.poll() is None and not schemes:
                if found.exists():
                    schemes.append(json.loads(found.read_text())["url"][:5])
                time.sleep(0.01)

        watcher = threading.Thread(target=note)
        watcher.start()
        done = job.wait(250)
        watcher.join()
    assert done.exit_code == 0, done
    assert schemes == ["https"]
    assert (tmp_path / "killed-1-10").exists()
    results = [json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in (0, 1)]
    assert results[0]["replica"] == results[1]["replica"]
    assert not found.exists()  # it went with the coordinator
