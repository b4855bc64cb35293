"""The HTTP interface as one table: what the server serves, what ``/openapi.json`` says, what docs/api.md lists.

A test holds the three together, and the fields of each message with what the service reads.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from arc_dist.coordinator.wire import MAX_INTEGER, MAX_TEXT

API_VERSION = "1.0.0"
PREFIX = "/v1/"


class Kind(enum.Enum):
    """What a field holds; the value is its JSON schema."""

    INTEGER = "integer"
    NUMBER = "number"
    BOOLEAN = "boolean"
    TEXT = "string"
    OBJECT = "object"
    OBJECTS = "array"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
    """One field of a message, or one parameter of a query."""

    name: str
    kind: Kind
    about: str
    required: bool = True
    inside: tuple[Field, ...] = ()

    def schema(self) -> dict[str, Any]:
        """Its JSON schema."""
        schema: dict[str, Any] = {"type": self.kind.value, "description": self.about}
        if self.kind is Kind.INTEGER:
            schema |= {"minimum": 0, "maximum": MAX_INTEGER}
        elif self.kind is Kind.NUMBER:
            schema["minimum"] = 0
        elif self.kind is Kind.TEXT:
            schema["maxLength"] = MAX_TEXT
        elif self.kind is Kind.OBJECTS:
            schema["items"] = _object(self.inside)
        elif self.inside:
            schema |= _object(self.inside)
        return schema


@dataclasses.dataclass(frozen=True, kw_only=True)
class Route:
    """One thing that can be asked.

    Attributes:
        verb: GET or POST.
        path: as in the request line.
        about: what it does.
        fields: of the body (POST) or the query (GET).
        media: of the answer.
        needs_token: everything that says anything about the job does.
    """

    verb: str
    path: str
    about: str
    fields: tuple[Field, ...] = ()
    media: str = "application/json"
    needs_token: bool = True

    @property
    def method(self) -> str:
        """The service's name of a POST route."""
        return self.path.removeprefix(PREFIX)


def _integer(name: str, about: str, *, required: bool = True) -> Field:
    return Field(name=name, kind=Kind.INTEGER, about=about, required=required)


def _text(name: str, about: str, *, required: bool = True) -> Field:
    return Field(name=name, kind=Kind.TEXT, about=about, required=required)


_RANK = _integer("rank", "the rank that speaks")
_GENERATION = _integer("generation", "the generation that it speaks of; what an older one says is refused")
_STEP = _integer("step", "number of committed updates")
_TIMEOUT = Field(name="timeout_s", kind=Kind.NUMBER, about="how long to wait for an answer, at most 60", required=False)
_HOLDING = (
    _STEP,
    _integer("slot", "where in the rank's shared memory"),
    _integer("generation", "that saved it", required=False),
    Field(name="certified", kind=Kind.BOOLEAN, about="trusted", required=False),
    Field(name="parting", kind=Kind.BOOLEAN, about="written after a peer was lost", required=False),
    _integer("replica_key", "stands in for those of ranks with the same key; 0 for none", required=False),
    _integer("nbytes", "its size", required=False),
)
_PEER = (
    _text("host", "under which other supervisors reach it"),
    _integer("port", "on which it listens for them"),
    _text("domain", "its failure domain"),
    _integer("copies", "of each of its snapshots; -1: one where there are several domains"),
    _integer("distance", "domains from its own to that of the first copy"),
    Field(
        name="held",
        kind=Kind.OBJECTS,
        about="copies that it keeps",
        required=False,
        inside=(_integer("owner", "whose snapshot it is"), *_HOLDING),
    ),
    Field(
        name="notes",
        kind=Kind.OBJECTS,
        about="notes that it keeps: what only the owner knew at a snapshot",
        required=False,
        inside=(_integer("owner", "whose note it is"), *_HOLDING),
    ),
)
_LISTED = (
    _STEP,
    _integer("generation", "that saved it", required=False),
    Field(name="certified", kind=Kind.BOOLEAN, about="false: written shortly before a fault", required=False),
)

# Every POST message may carry these two.
COMMON = (
    _integer("epoch", "the highest epoch of a coordinator that the sender has heard of", required=False),
    _text(
        "sender", "the name that the answer to `join` gave; a supervisor that was replaced is refused", required=False
    ),
)

_REPORTS = (
    Route(
        verb="POST",
        path="/v1/join",
        about="A rank's supervisor is there. Answers with the generation to be ready for.",
        fields=(
            _RANK,
            Field(name="world_size", kind=Kind.INTEGER, about="number of ranks, as the sender was told"),
            _text("host", "names the sender's host"),
            _integer("pid", "of the supervisor"),
            _text("shm_dir", "the rank's directory in shared memory"),
        ),
    ),
    Route(
        verb="POST",
        path="/v1/ready",
        about="No process of an older generation is left, and `generation` can be started.",
        fields=(
            _RANK,
            _GENERATION,
            Field(name="store", kind=Kind.OBJECT, about="rank 0's rendezvous store", required=False),
            Field(
                name="inventory", kind=Kind.OBJECTS, about="snapshots held in memory", required=False, inside=_HOLDING
            ),
            _text("shm_dir", "where they are"),
            Field(
                name="peer",
                kind=Kind.OBJECT,
                about="where the supervisor listens for others, and the copies of their snapshots that it keeps",
                required=False,
                inside=_PEER,
            ),
            _text("host", "on which host"),
        ),
    ),
    Route(
        verb="POST",
        path="/v1/died",
        about="The rank's process of `generation` is gone.",
        fields=(
            _RANK,
            _GENERATION,
            Field(name="cause", kind=Kind.OBJECT, about="`kind`, and `signal`, `exception`, ... with it"),
            _integer("step", "its last committed step", required=False),
        ),
    ),
    Route(
        verb="POST",
        path="/v1/finished",
        about="The rank's script ended with exit code 0.",
        fields=(_RANK, _GENERATION),
    ),
    Route(
        verb="POST",
        path="/v1/directive",
        about="Long poll: what to do about `generation` (`run`, `end`, `stop`, `done`, or `wait`: ask again).",
        fields=(
            _RANK,
            _GENERATION,
            _TIMEOUT,
            _text("after", "the order that is followed already, which is no answer", required=False),
        ),
    ),
    Route(
        verb="POST",
        path="/v1/stand_by",
        about="Long poll of a spare: `take` a `rank`, `done`, `stop`, or `wait`: ask again.",
        fields=(
            _text("host", "names the sender's host"),
            _integer("pid", "of the supervisor"),
            _text("shm_dir", "its directory in shared memory"),
            _TIMEOUT,
        ),
    ),
    Route(
        verb="POST",
        path="/v1/preempt",
        about="The rank's host was told to go.",
        fields=(_RANK,),
    ),
    Route(
        verb="POST",
        path="/v1/pulse",
        about="The rank's supervisor lives, on that node; or ends as it should.",
        fields=(
            _RANK,
            Field(name="node", kind=Kind.INTEGER, about="number of its node among those of the launcher"),
            Field(name="leaving", kind=Kind.BOOLEAN, required=False, about="it will not be heard any more"),
        ),
    ),
    Route(
        verb="POST",
        path="/v1/watched",
        about="Where a rank is and for how long. Answers whether all are being asked, and whether this one is to end.",
        fields=(
            _RANK,
            _GENERATION,
            Field(name="report", kind=Kind.OBJECT, about="`seen`, and `spent`, `inquiry`, stacks ... with it"),
        ),
    ),
    Route(
        verb="POST",
        path="/v1/shard",
        about="A rank's part of a checkpoint is durable. The answer to the last one comes after the commit.",
        fields=(
            _RANK,
            _GENERATION,
            _STEP,
            _text("url", "the tier's storage"),
            Field(name="manifest_part", kind=Kind.OBJECT, about="what goes into the manifest"),
            Field(name="certified", kind=Kind.BOOLEAN, about="the state is trusted", required=False),
            _integer("tier", "number of the tier", required=False),
            _text("why", "what is wrong with the tiers before", required=False),
        ),
    ),
    Route(
        verb="POST",
        path="/v1/give_up_save",
        about="A rank cannot write its part anywhere; the others need not wait for it.",
        fields=(_RANK, _GENERATION, _STEP, _text("error", "why")),
    ),
    Route(
        verb="POST",
        path="/v1/commit_status",
        about="Long poll: what became of a save.",
        fields=(_STEP, _GENERATION, _integer("tier", "where the part was written", required=False), _TIMEOUT),
    ),
    Route(
        verb="POST",
        path="/v1/progress",
        about="The rank committed `step`; counts for the budget of generations without progress.",
        fields=(_RANK, _GENERATION, _STEP),
    ),
    Route(
        verb="POST",
        path="/v1/report",
        about="How far a rank's process is, for people; nothing is decided by it.",
        fields=(
            _RANK,
            _GENERATION,
            _STEP,
            Field(name="quiet_s", kind=Kind.NUMBER, about="since the process last said anything", required=False),
            Field(
                name="held", kind=Kind.OBJECTS, about="certified snapshots in memory", required=False, inside=(_STEP,)
            ),
        ),
    ),
    Route(
        verb="POST",
        path="/v1/restored",
        about="The ranks went on from `step`, which is not the one that was planned.",
        fields=(_RANK, _GENERATION, _STEP),
    ),
    Route(
        verb="POST",
        path="/v1/poison",
        about="States of these steps, saved by `generation` or before, are never restored.",
        fields=(_integer("from_step", "the first"), _integer("to_step", "the last"), _GENERATION),
    ),
    Route(
        verb="POST",
        path="/v1/hello_store",
        about="What a store holds; replaces what was known of it.",
        fields=(
            _text("url", "the store"),
            Field(name="committed", kind=Kind.OBJECTS, about="its checkpoints", required=False, inside=_LISTED),
        ),
    ),
    Route(
        verb="POST",
        path="/v1/worlds",
        about="Numbers of ranks that the training could go on with, sample for sample.",
        fields=(
            Field(
                name="worlds",
                kind=Kind.OBJECTS,
                about="each of them",
                required=False,
                inside=(_integer("ranks", "how many"),),
            ),
        ),
    ),
    Route(
        verb="POST",
        path="/v1/incident",
        about="Appends a line, of any fields, to the run's incident file. `kind` says what it is about.",
    ),
    Route(
        verb="POST",
        path="/v1/status",
        about="The state as the rules have it, every rank listed; for tools that come with us.",
    ),
)

_READS = (
    Route(verb="GET", path="/healthz", about="Whether somebody listens. Says nothing else.", needs_token=False),
    Route(
        verb="GET",
        path="/",
        about="The page that shows the job live. The file is the same for every job and holds nothing of it.",
        media="text/html",
        needs_token=False,
    ),
    Route(verb="GET", path="/v1/status", about="The state of the job for people, of bounded size at any world size."),
    Route(
        verb="GET",
        path="/v1/incidents",
        about="Incidents with an `id` above `after`, oldest first. Ids begin again with each epoch.",
        fields=(
            _integer("after", "the last id that is known; default 0", required=False),
            _integer("limit", "at most so many, and never more than 1000; default 100", required=False),
        ),
    ),
    Route(verb="GET", path="/v1/history", about="Samples of (time, step, loss, generation), and what happened."),
    Route(verb="GET", path="/metrics", about="Counters and gauges in Prometheus' text format.", media="text/plain"),
    Route(verb="GET", path="/openapi.json", about="This table as an OpenAPI 3.1 document."),
)

ROUTES = (*_READS, *_REPORTS)

_ERRORS = {
    "400": "no such method, a wrong field, or no JSON",
    "401": "no token, or a wrong one",
    "409": "the sender, or this coordinator, was replaced",
    "429": "too many requests; `Retry-After` says when to come again",
    "500": "a bug of ours; the log has it",
}


def openapi() -> dict[str, Any]:
    """The table as an OpenAPI 3.1 document."""
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.verb.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "arc-dist coordinator",
            "version": API_VERSION,
            "description": "Unknown fields and query parameters are ignored; answers may gain fields within /v1.",
        },
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "Error": {
                    "type": "object",
                    "properties": {
                        "error": {"enum": ["config", "fenced", "left_out", "deposed", "busy", "internal"]},
                        "message": {"type": "string"},
                    },
                    "required": ["error", "message"],
                }
            },
        },
        "security": [{"token": []}],
    }


def _operation(route: Route) -> dict[str, Any]:
    answer: dict[str, Any] = {"type": "object"} if route.media == "application/json" else {"type": "string"}
    operation: dict[str, Any] = {
        "operationId": f"{route.verb.lower()}_{route.path.rpartition('/')[2] or 'page'}".replace(".", "_"),
        "summary": route.about,
        "responses": {"200": {"description": "the answer", "content": {route.media: {"schema": answer}}}},
    }
    if not route.needs_token:
        operation["security"] = []
        return operation
    errors = _ERRORS | ({"413": "more bytes than are taken"} if route.verb == "POST" else {})
    for status, about in errors.items():
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        operation["responses"][status] = {"description": about, "content": content}
    if route.verb == "POST":
        body = {"application/json": {"schema": _object((*route.fields, *COMMON))}}
        operation["requestBody"] = {"content": body, "required": any(field.required for field in route.fields)}
    else:
        operation["parameters"] = [
            {"name": field.name, "in": "query", "required": field.required, "schema": field.schema()}
            for field in route.fields
        ]
    return operation


def _object(fields: tuple[Field, ...]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {field.name: field.schema() for field in fields},
        "required": [field.name for field in fields if field.required],
    }
