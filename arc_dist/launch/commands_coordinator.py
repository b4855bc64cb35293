"""``arc coordinator start|status|stop``: the actors on a Ray cluster that host coordinators.

A job needs none of them: its supervisors start the actor and end it. ``start`` shows beforehand that the cluster takes
one, and saves the job's start a second; ``stop`` ends what a job has left, without waiting for it to end by itself.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from arc_dist.checkpoint_store.progress import clean
from arc_dist.config import Env
from arc_dist.coordinator.ray_actor import IDLE_LIMIT_S
from arc_dist.errors import ConfigError
from arc_dist.supervisor.ray_link import ask

_NONE = 3


def add_command(subparsers: Any) -> None:
    """Registers ``arc coordinator``."""
    parser = subparsers.add_parser(
        "coordinator",
        help="coordinators in Ray: start, status, stop",
        description="The actors on a Ray cluster that host coordinators. Jobs start and end theirs by themselves.",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True, parser_class=type(parser))
    for name, text in (
        ("start", "starts a job's actor, or finds it; the job then need not"),
        ("status", "describes the actors; ends with 3 when there is none"),
        ("stop", "ends a job's actor; ends with 3 when there is none"),
    ):
        action = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        action.set_defaults(run=_run, action=name)
        action.add_argument("--job-id", metavar="ID", help="the job's name (torchrun --rdzv-id) [ARC_JOB_ID]")
        action.add_argument(
            "--coordinator", metavar="RAY", help="ray, the default, or ray://host:port [ARC_COORDINATOR]"
        )
        action.add_argument(
            "--timeout-s", type=_seconds, default=60.0, metavar="S", help="for Ray to answer (default 60)"
        )
        action.add_argument("--json", action="store_true", help="print JSON")
        if name == "start":
            action.add_argument(
                "--idle-s",
                type=_seconds,
                default=max(3600.0, IDLE_LIMIT_S),
                metavar="S",
                help="the actor ends when nobody has spoken to it for so long (default 3600)",
            )


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 1 <= seconds <= 1e7:
        raise argparse.ArgumentTypeError(f"between 1 and 1e7, not {text}")
    return seconds


def _run(args: argparse.Namespace) -> int:
    env = Env.read()
    if args.coordinator is not None:
        env = Env.read({"ARC_COORDINATOR": args.coordinator, "ARC_JOB_ID": env.job_id if env.job_named else ""})
        if env.ray is None:
            raise ConfigError(
                f"--coordinator={args.coordinator} is not ray or ray://host:port; only these have actors."
            )
    job_id = args.job_id or (env.job_id if env.job_named else "")
    if not job_id and args.action != "status":
        raise ConfigError(f"arc coordinator {args.action} needs the job's name: --job-id, or ARC_JOB_ID.")
    order: dict[str, Any] = {"do": args.action, "job_id": job_id, "address": env.ray or "auto"}
    if args.action == "start":
        order["idle_limit_s"] = args.idle_s
    done = ask(order, args.timeout_s)
    if args.json:
        print(json.dumps(done))
    else:
        print(_words(args.action, job_id, done))
    is_none = not done if args.action == "status" else not done.get("ended", True)
    return _NONE if is_none else 0


def _words(action: str, job_id: str, done: Any) -> str:
    if action == "start":
        return clean(_line({**done, "state": "answers"}))
    if action == "stop":
        return clean(f"{job_id}: the actor was ended" if done["ended"] else f"{job_id}: Ray has no such actor")
    return "\n".join(clean(_line(about)) for about in done) or "Ray has no coordinators"


def _line(about: dict[str, Any]) -> str:
    where = f" on {about['node']} (pid {about['pid']})" if "node" in about else ""
    serves = f", {about['url']}, epoch {about['epoch']}, job {about['phase']}" if "url" in about else ""
    return f"{about['job_id']}: {about['state']}{where}{serves or ', serves no job yet' * ('node' in about)}"
