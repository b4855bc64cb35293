"""The coordinator over HTTP: the same answers, and nothing for those who may not ask."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from arc_dist.connect import tell_until_heard
from arc_dist.coordinator.client import CoordinatorClient
from arc_dist.coordinator.server import CoordinatorServer
from arc_dist.coordinator.service import Coordinator
from arc_dist.errors import ConfigError, CoordinatorUnavailable, Fenced

KILLED = {"kind": "signal", "signal": 9}


@pytest.fixture
def server() -> Iterator[CoordinatorServer]:
    with CoordinatorServer(Coordinator(2, max_restarts=1000), max_request_bytes=10_000) as started:
        yield started


def client(server: CoordinatorServer, **settings: Any) -> CoordinatorClient:
    return CoordinatorClient(server.address, server.token, **settings)


def request(
    server: CoordinatorServer, verb: str, path: str, body: bytes = b"", token: str | None = None, **headers: str
) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(server.address.removeprefix("http://"), timeout=10)
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    connection.request(verb, path, body=body, headers=headers)
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, json.loads(text) if text.startswith(b"{") else text


def play_generations(server: CoordinatorServer, num_generations: int) -> None:
    """Two ranks over real connections; rank 1 dies in each generation."""
    problems: list[BaseException] = []
    both_run = threading.Barrier(2)  # who has not heard "run" when the other dies is rightly told "end" instead

    def rank_body(rank: int) -> None:
        mine = client(server)
        mine.join(rank, 2, "host", rank, f"/shm/{rank}")
        for generation in range(num_generations):
            held = [{"step": generation, "slot": 0, "generation": max(0, generation - 1), "certified": True}]
            mine.ready(rank, generation, {"host": "h", "port": 1} if rank == 0 else None, held, f"/shm/{rank}", "h")
            told = mine.directive(rank, generation, 10)
            assert (told["kind"], told["plan"]["step"]) == ("run", generation)
            both_run.wait(60)
            if rank == 1:
                mine.died(1, generation, KILLED, generation + 1)
            told = mine.directive(rank, generation, 10)
            assert (told["kind"], told["generation"]) == ("end", generation)

    def guarded(rank: int) -> None:
        try:
            rank_body(rank)
        except BaseException as error:  # noqa: BLE001  # handed to the test
            problems.append(error)

    threads = [threading.Thread(target=guarded, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not problems, problems


def test_fifty_deaths_and_each_generation_has_its_plan(server: CoordinatorServer):
    play_generations(server, 50)
    assert client(server).status()["generation"] == 49


def test_a_connection_is_kept_and_a_broken_one_is_replaced(server: CoordinatorServer):
    one = client(server)
    one.status()
    sock = one._local.connection.sock
    one.status()
    assert one._local.connection.sock is sock
    sock.shutdown(socket.SHUT_RDWR)
    assert one.status()["phase"] == "starting"


def test_each_thread_has_its_own_connection_so_that_a_poll_blocks_nobody(server: CoordinatorServer):
    one = client(server)
    one.join(0, 2, "h", 1, "/d")
    one.ready(0, 0, {"host": "h", "port": 1}, [], "/d", "h")
    poll = threading.Thread(target=one.directive, args=(0, 0, 2.0))
    poll.start()
    time.sleep(0.05)
    one.status()
    assert poll.is_alive()
    poll.join()


def test_without_the_token_only_health_is_told(server: CoordinatorServer):
    assert request(server, "GET", "/healthz") == (200, {"ok": True})
    for token in (None, "", "wrong", server.token + "x", server.token[:-1], "\xe9"):
        status, answer = request(server, "POST", "/v1/status", b"{}", token)
        assert status == 401
        assert server.token not in json.dumps(answer)
        assert request(server, "GET", "/v1/status", token=token)[0] == 401
    with pytest.raises(ConfigError, match="token"):
        CoordinatorClient(server.address, "wrong").status()
    assert request(server, "GET", "/v1/status", token=server.token)[1]["world_size"] == 2


def test_two_servers_have_different_tokens(server: CoordinatorServer):
    other = CoordinatorServer(Coordinator(1))
    assert other.token != server.token
    assert len(other.token) >= 32


@pytest.mark.parametrize(
    ("verb", "path", "body", "status"),
    [
        ("POST", "/v1/fly", b"{}", 400),
        ("POST", "/v2/status", b"{}", 404),
        ("GET", "/v1/", b"", 404),
        ("GET", "/v2/status", b"", 404),
        ("GET", "/v1/join", b"", 405),
        ("POST", "/v1/status", b"[]", 400),
        ("POST", "/v1/status", b"{", 400),
        ("POST", "/v1/status", b"\xff\xfe", 400),
        ("POST", "/v1/status", b"[" * 5000, 400),
        ("POST", "/v1/status", b" " * 10_001, 413),
        ("DELETE", "/v1/status", b"", 405),
    ],
)
def test_a_bad_request_has_one_clear_answer_and_the_next_is_served(
    server: CoordinatorServer, verb: str, path: str, body: bytes, status: int
):
    assert request(server, verb, path, body, server.token)[0] == status
    assert client(server).status()["generation"] == 0


def test_a_request_without_a_length_is_refused_unread(server: CoordinatorServer):
    host, port = server.address.removeprefix("http://").split(":")
    for length in ("", "Content-Length: -5\r\n", "Content-Length: 9999999999999\r\n"):
        with socket.create_connection((host, int(port)), timeout=10) as sock:
            auth = f"Authorization: Bearer {server.token}\r\n"
            sock.sendall(f"POST /v1/status HTTP/1.1\r\nHost: x\r\n{auth}{length}\r\n".encode())
            answer = sock.recv(4096)
            assert answer.split()[1] in (b"411", b"413")
            while answer:  # and the connection is closed
                answer = sock.recv(4096)


def test_refusals_are_errors_of_ours(server: CoordinatorServer):
    one = client(server)
    one.join(0, 2, "h", 1, "/d")
    with pytest.raises(ConfigError, match="'generation'"):
        one.call("finished", {"rank": 0})
    with pytest.raises(Fenced):
        one.directive(0, 9, 0)
    other = client(server)
    other.join(0, 2, "h", 2, "/e")
    with pytest.raises(Fenced, match="another supervisor"):
        one.finished(0, 0)


def test_nobody_there_is_unavailable_at_once(server: CoordinatorServer):
    one = client(server)
    server.close()
    began = time.monotonic()
    with pytest.raises(CoordinatorUnavailable):
        one.status()
    assert time.monotonic() - began < 5


def test_a_coordinator_that_does_not_answer_is_unavailable_at_the_deadline():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        one = CoordinatorClient(f"http://127.0.0.1:{silent.getsockname()[1]}", "t", timeout_s=0.3)
        began = time.monotonic()
        with pytest.raises(CoordinatorUnavailable, match="no answer"):
            one.status()
        assert 0.2 < time.monotonic() - began < 5


def test_something_else_on_the_port_is_said():
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            connection, _ = other.accept()
            connection.recv(65_536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(CoordinatorUnavailable, match="something else"):
            CoordinatorClient(f"http://127.0.0.1:{other.getsockname()[1]}", "t", timeout_s=5).status()
        thread.join()


@pytest.mark.parametrize("address", ["127.0.0.1:80", "http://h:x", "http://h", "ftp://h:1"])
def test_an_address_that_cannot_be_used_is_refused(address: str):
    with pytest.raises(ConfigError, match="http://host:port"):
        CoordinatorClient(address, "t")


def test_an_interface_that_is_not_here_is_refused():
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        CoordinatorServer(Coordinator(1), host="192.0.2.1").start()
    with pytest.raises(ConfigError, match="start"):
        CoordinatorServer(Coordinator(1)).address  # noqa: B018


def test_the_last_answers_leave_before_the_server_closes(server: CoordinatorServer):
    both = [client(server) for _ in range(2)]
    for rank, one in enumerate(both):
        one.join(rank, 2, "h", rank, f"/{rank}")
        one.ready(rank, 0, None, [], f"/{rank}", "h")
    told: list[str] = []
    assert both[1].directive(1, 0, 5)["kind"] == "run"

    def wait_for_the_end() -> None:
        told.append(both[1].directive(1, 0, 5)["kind"])

    thread = threading.Thread(target=wait_for_the_end)
    thread.start()
    for rank, one in enumerate(both):
        one.finished(rank, 0)
    assert both[0].directive(0, 0, 5, after="run")["kind"] == "done"
    assert server.finish(5.0)
    thread.join()
    assert told == ["done"]


def test_what_must_not_be_lost_is_told_once_the_coordinator_is_back():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # nobody listens
        port = held.getsockname()[1]
        mine = CoordinatorClient(f"http://127.0.0.1:{port}", "a-token", timeout_s=0.2)
        failures: list[BaseException] = []

        def say() -> None:
            try:
                mine.poison(15, 25, 0)
            except CoordinatorUnavailable as error:
                failures.append(error)
                raise

        teller = threading.Thread(target=tell_until_heard, args=(say, lambda: False))
        teller.start()
        while not failures:
            time.sleep(0.01)
    coordinator = Coordinator(2)
    with CoordinatorServer(coordinator, port=port, token="a-token"):
        teller.join(60)
        assert not teller.is_alive()
        mine.hello_store("u", [{"step": 20, "generation": 0}])
        assert coordinator.job.known.poison[0].covers(20, 0)


def test_nothing_is_told_after_the_end():
    def say() -> None:
        raise CoordinatorUnavailable("gone")

    tell_until_heard(say, iter([False, False, True]).__next__)
