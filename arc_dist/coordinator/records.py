"""What crosses the service's border: causes and holdings from messages, descriptions and incidents for people."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arc_dist.coordinator.wire import Fields
from arc_dist.errors import ConfigError
from arc_dist.protocol.budgets import Cause
from arc_dist.protocol.events import Listed
from arc_dist.protocol.job import Job, Member
from arc_dist.protocol.pick import Committed, Holding

INCIDENTS_NAME = "incidents.jsonl"
_MAX_LINE_BYTES = 1 << 20
_MAX_LISTED = 100_000


def identity_of(member: Member) -> str:
    """Tells a supervisor from another one for the same rank."""
    return f"{member.host}/{member.pid}/{member.shm_dir}"


def member_of(identity: str, host: str, shm_dir: str) -> Member | None:
    """The supervisor that has this identity, or None when it is not one of `host` and `shm_dir`."""
    head, tail = f"{host}/", f"/{shm_dir}"
    pid = identity.removeprefix(head).removesuffix(tail)
    if not pid.isascii() or not pid.isdigit() or identity != f"{head}{pid}{tail}":
        return None
    return Member(host=host, pid=int(pid), shm_dir=shm_dir)


def read_cause(fields: Mapping[str, Any]) -> Cause:
    """The cause of a death as a supervisor tells it.

    Raises:
        ConfigError: it cannot be understood.
    """
    try:
        return Cause.from_dict(fields)
    except ValueError as error:
        raise ConfigError(f"died: the cause cannot be understood: {error}") from None


def read_holding(entry: Mapping[str, Any]) -> Holding:
    """One snapshot of an inventory."""
    fields = Fields("ready", entry)
    return Holding(
        step=fields.integer("step"),
        slot=fields.integer("slot"),
        generation=fields.integer("generation", default=0),
        certified=fields.boolean("certified", default=False),
        parting=fields.boolean("parting", default=False),
        replicated=fields.boolean("replicated", default=False),
        nbytes=fields.integer("nbytes", default=0),
    )


def read_listed(fields: Fields) -> Listed:
    """What a store holds, as a training process tells it."""
    url = fields.text("url")
    entries: set[Committed] = set()
    for entry in fields.mappings("committed", max_items=_MAX_LISTED):
        listed = Fields("hello_store", entry)
        entries.add(
            Committed(
                step=listed.integer("step"),
                url=url,
                generation=listed.integer_or_none("generation"),
                certified=listed.boolean("certified", default=True),
            )
        )
    return Listed(url=url, committed=frozenset(entries))


def append_incident(run_dir: Path, line: Mapping[str, Any]) -> None:
    """Appends one line to the run's incident file in one write, so that lines of several threads do not mix.

    Raises:
        ConfigError: the line is too long.
        OSError: it could not be written.
    """
    try:
        text = json.dumps({"time": time.time(), **line}, default=str).encode() + b"\n"
    except RecursionError:
        raise ConfigError("incident: it is nested too deeply to be written") from None
    if len(text) > _MAX_LINE_BYTES:
        raise ConfigError(f"incident: {len(text)} bytes are more than {_MAX_LINE_BYTES}")
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = os.open(run_dir / INCIDENTS_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        os.write(file, text)
    finally:
        os.close(file)


def describe(job: Job) -> dict[str, Any]:
    """A job's state as the rules have it, for tools that come with us; `view` makes what people read."""
    return {
        "phase": job.phase.value,
        "generation": job.generation,
        "step": job.reached or (job.plan.step if job.plan else None),
        "joined": sorted(job.members),
        "ready": sorted(job.ready),
        "finished": sorted(job.finished),
        "deaths": [str(death) for death in job.deaths],
        "restarts": job.ledger.restarts,
        "fruitless_generations": job.ledger.fruitless,
        "plan": job.plan.as_dict() if job.plan else None,
        "stop": dataclasses.asdict(job.stop) if job.stop else None,
        "committed": sorted({entry.step for entry in job.known.committed}),
    }
