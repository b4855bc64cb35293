"""The table of the HTTP interface, the service, the server and the documents say the same; nonsense is refused."""

from __future__ import annotations

import http.client
import json
import re
import socket
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arc_dist.coordinator import api
from arc_dist.coordinator.api import Kind, Route
from arc_dist.coordinator.limits import Limits
from arc_dist.coordinator.server import CoordinatorServer
from arc_dist.coordinator.service import Coordinator
from arc_dist.coordinator.wire import MAX_INTEGER
from arc_dist.errors import ArcError, ConfigError, StoreGone

ROOT = Path(__file__).resolve().parent.parent
REPORTS = [route for route in api.ROUTES if route.verb == "POST"]
READS = [route for route in api.ROUTES if route.verb == "GET"]
UNHURRIED = Limits(reads_per_s=1e9, reports_per_s=1e9, refusals_per_s=1e9)


def refuse(*args: object) -> None:
    raise StoreGone("nothing is written in these tests")


def coordinator() -> Coordinator:
    made = Coordinator(2, max_restarts=10_000, commit=refuse)
    for rank in (0, 1):
        made.call("join", {"rank": rank, "world_size": 2, "host": "h", "pid": rank, "shm_dir": f"/{rank}"})
    return made


@pytest.fixture(scope="module")
def server() -> Iterator[CoordinatorServer]:
    with CoordinatorServer(coordinator(), limits=UNHURRIED) as started:
        yield started


def ask(server: CoordinatorServer, verb: str, path: str, body: bytes = b"", *, token: str | None = None) -> Any:
    connection = http.client.HTTPConnection(server.address.removeprefix("http://"), timeout=60)
    headers = {} if token == "" else {"Authorization": f"Bearer {token or server.token}"}
    connection.request(verb, path, body=body, headers=headers)
    response = connection.getresponse()
    response.text = response.read()  # type: ignore[attr-defined]
    connection.close()
    return response


class Spy(dict[str, Any]):
    """A message that notes which of its fields were looked at."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


def example(route: Route) -> dict[str, Any]:
    """A message of the right form."""
    values = {
        Kind.INTEGER: 0,
        Kind.NUMBER: 0.0,
        Kind.BOOLEAN: True,
        Kind.TEXT: "x",
        Kind.OBJECT: {},
        Kind.OBJECTS: [],
    }
    message = {field.name: values[field.kind] for field in route.fields}
    message |= {"world_size": 2} if route.method == "join" else {}
    return message | ({"cause": {"kind": "signal", "signal": 9}} if route.method == "died" else {})


def test_the_table_has_every_method_of_the_service_and_no_other():
    assert {route.method for route in REPORTS} == coordinator().methods


@pytest.mark.parametrize("route", REPORTS, ids=lambda route: route.method)
def test_the_table_has_the_fields_that_the_service_reads(route: Route):
    message = Spy(example(route))
    coordinator().call(route.method, message)
    common = {field.name for field in api.COMMON}
    assert message.read - common == {field.name for field in route.fields}
    assert "epoch" in message.read


@pytest.mark.parametrize("route", REPORTS, ids=lambda route: route.method)
def test_a_field_is_required_where_the_table_says_so_and_checked_everywhere(route: Route):
    wrong = {Kind.INTEGER: -1, Kind.NUMBER: -1, Kind.BOOLEAN: "x", Kind.TEXT: 5, Kind.OBJECT: [], Kind.OBJECTS: {}}
    for field in route.fields:
        without = {name: value for name, value in example(route).items() if name != field.name}
        if field.required:
            with pytest.raises(ConfigError, match=field.name):
                coordinator().call(route.method, without)
        else:
            coordinator().call(route.method, without)
        with pytest.raises(ConfigError, match=field.name):
            coordinator().call(route.method, example(route) | {field.name: wrong[field.kind]})
        if field.kind is Kind.INTEGER:
            with pytest.raises(ConfigError, match=field.name):
                coordinator().call(route.method, example(route) | {field.name: MAX_INTEGER + 1})


@pytest.mark.parametrize("route", REPORTS, ids=lambda route: route.method)
def test_fields_of_later_versions_are_left_alone(server: CoordinatorServer, route: Route):
    message = example(route) | {"of_a_later_version": [1, {"a": None}]}
    assert ask(server, "POST", route.path, json.dumps(message).encode()).status == 200


@pytest.mark.parametrize("route", READS, ids=lambda route: route.path)
def test_every_read_answers_as_the_table_says_and_only_to_the_token(server: CoordinatorServer, route: Route):
    answer = ask(server, "GET", f"{route.path}?of_a_later_version=1")
    assert answer.status == 200
    assert answer.headers["Content-Type"].partition(";")[0] == route.media
    assert answer.headers["Cache-Control"] == "no-store"
    if route.media == "application/json":
        assert isinstance(json.loads(answer.text), dict)
    assert ask(server, "GET", route.path, token="").status == (401 if route.needs_token else 200)


def test_only_health_and_the_page_answer_without_the_token():
    assert {route.path for route in api.ROUTES if not route.needs_token} == {"/healthz", "/"}


def test_the_page_is_the_same_for_every_job(server: CoordinatorServer):
    with CoordinatorServer(Coordinator(1, job_id="another")) as other:
        assert ask(server, "GET", "/").text == ask(other, "GET", "/").text


def test_the_page_names_no_other_place_and_makes_no_markup_of_text(server: CoordinatorServer):
    answer = ask(server, "GET", "/", token="")
    page = answer.text.decode()
    assert set(re.findall(r"https?://[^\"'\s]+", page)) == {"http://www.w3.org/2000/svg"}
    for dangerous in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "localStorage"):
        assert dangerous not in page
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


def test_the_document_is_valid_and_has_every_route(server: CoordinatorServer):
    validator = pytest.importorskip("openapi_spec_validator")
    document = json.loads(ask(server, "GET", "/openapi.json").text)
    validator.validate(document)
    found = {(verb.upper(), path) for path, verbs in document["paths"].items() for verb in verbs}
    assert found == {(route.verb, route.path) for route in api.ROUTES}


def test_the_text_lists_every_route_in_the_words_of_the_table():
    text = (ROOT / "docs/api.md").read_text()
    rows = re.findall(r"^\| (GET|POST) `([^`]+)` \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    assert rows == [
        (
            route.verb,
            route.path,
            ", ".join(f"`{field.name}`" + ("" if field.required else "?") for field in route.fields),
            route.about,
        )
        for route in api.ROUTES
    ]


@pytest.mark.parametrize("query", ["after=-1", "after=x", "limit=1e3", f"after={2**64}", "after=" + "9" * 5000])
def test_a_wrong_query_is_said(server: CoordinatorServer, query: str):
    answer = ask(server, "GET", f"/v1/incidents?{query}")
    assert (answer.status, json.loads(answer.text)["error"]) == (400, "config")


def test_incidents_come_in_pages_without_gap_or_repetition():
    made = Coordinator(1)
    for i in range(25):
        made.call("incident", {"kind": "test", "step": i, "losses": [float("nan")]})
    seen, after = [], 0
    while page := made.incidents(after, 10)["incidents"]:
        seen += [incident["step"] for incident in page]
        after = page[-1]["id"]
    assert seen == list(range(25))
    assert made.incidents(25, 10)["next"] == 25


def test_answers_are_json_that_browsers_read_whatever_was_reported(server: CoordinatorServer):
    line = {"kind": "test", "step": float("nan"), "resumed_after_s": float("inf"), "cause": "\ud800\x00", "ranks": [-1]}
    assert ask(server, "POST", "/v1/incident", json.dumps(line).encode()).status == 200
    progress = {"kind": "progress", "step": 3, "loss": float("-inf"), "median_step_s": float("nan"), "time": "x"}
    assert ask(server, "POST", "/v1/incident", json.dumps(progress).encode()).status == 200

    def refuse_constant(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    for path in ("/v1/status", "/v1/history", "/v1/incidents"):
        json.loads(ask(server, "GET", path).text, parse_constant=refuse_constant)
    assert ask(server, "GET", "/metrics").status == 200


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


@given(
    st.sampled_from(REPORTS),
    st.dictionaries(st.sampled_from([f.name for route in REPORTS for f in route.fields]), JSON_VALUES),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_a_message_of_anything_is_answered_or_refused_and_the_next_is_served(
    route: Route, nonsense: dict[str, Any], keeps_form: bool
):
    made = coordinator()
    message = (example(route) if keeps_form else {}) | nonsense
    message = {name: value for name, value in message.items() if name != "timeout_s"}
    try:
        made.call(route.method, json.loads(json.dumps(message)))
    except ArcError:
        pass  # one clear refusal; any other exception fails the test
    assert made.view()["world_size"] == 2
    json.dumps(made.view())


@given(
    st.binary(max_size=400), st.sampled_from([b"", b"GET / HTTP/1.1\r\n", b"POST /v1/ready HTTP/1.1\r\nHost: x\r\n"])
)
@settings(max_examples=60, deadline=None)
def test_bytes_of_any_kind_end_in_an_answer_or_a_closed_connection(
    server: CoordinatorServer, nonsense: bytes, start: bytes
):
    parts = urllib.parse.urlsplit(server.address)
    with socket.create_connection((parts.hostname, parts.port), timeout=60) as sock:
        sock.sendall(start + nonsense)
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while chunk := sock.recv(65_536):
                answer += chunk
        except ConnectionResetError:
            pass  # closed with some of the nonsense unread
    assert b" 500 " not in answer.partition(b"\r\n")[0]
    assert server.token.encode() not in answer
    assert ask(server, "GET", "/healthz", token="").status == 200


@pytest.mark.slow
def test_schemathesis_finds_nothing_that_the_document_does_not_say(server: CoordinatorServer):
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

    checks = [not_a_server_error, status_code_conformance, response_schema_conformance]
    schema = schemathesis.openapi.from_dict(api.openapi())
    called: set[str] = set()
    for result in schema.get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy())
        @settings(max_examples=15, deadline=None, database=None)
        def run(case: Any) -> None:
            if isinstance(case.body, dict):
                case.body.pop("timeout_s", None)  # a long poll is not what is tested
                case.body.pop("epoch", None)  # a higher one deposes this coordinator, as it should
            called.add(case.operation.label)
            headers = {"Authorization": f"Bearer {server.token}"}
            case.call_and_validate(base_url=server.address, headers=headers, checks=checks, timeout=60)

        run()
    assert len(called) == len(api.ROUTES)
