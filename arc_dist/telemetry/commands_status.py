"""``arc status`` and ``arc watch``: how a running job is, once or live.

====  ======================================================
0     the job runs
1     it starts, or recovers from a failure
2     it is over
3     it cannot be reached, or none runs here
====  ======================================================
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arc_dist.checkpoint_store.progress import clean
from arc_dist.config import Env
from arc_dist.coordinator import endpoint as endpoints
from arc_dist.coordinator.client import CoordinatorClient
from arc_dist.coordinator.endpoint import Endpoint
from arc_dist.errors import ArcError, ConfigError, CoordinatorUnavailable
from arc_dist.telemetry import report, screen
from arc_dist.telemetry.recorder import INCIDENTS_FILE

HEALTHY = 0
RECOVERING = 1
OVER = 2
UNREACHABLE = 3
_CODES = {"running": HEALTHY, "starting": RECOVERING, "recovering": RECOVERING, "done": OVER, "stopped": OVER}
_ANSWER_S = 10.0
_PATIENCE_S = 60.0
_CLEAR = "\x1b[H\x1b[2J"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """One look at a job.

    Attributes:
        code: as in the module's text.
        text: for people.
        answer: for scripts.
    """

    code: int
    text: str
    answer: Any


def add_commands(subparsers: Any) -> None:
    """Registers ``arc status`` and ``arc watch``."""
    codes = "Ends with 0 when the job runs, 1 when it starts or recovers, 2 when it is over, 3 when it is not reached."
    status = subparsers.add_parser("status", help="how a running job is", description=f"Shows a job once. {codes}")
    status.set_defaults(run=_run_status)
    watch = subparsers.add_parser(
        "watch", help="the same, live", description=f"Shows a job until it is over, or until Ctrl-C. {codes}"
    )
    watch.add_argument("--every", type=_seconds, default=2.0, metavar="S", help="seconds between two looks (default 2)")
    watch.set_defaults(run=_run_watch)
    for parser in (status, watch):
        parser.add_argument(
            "where",
            nargs="?",
            help="the run directory, or the coordinator's URL with the token in ARC_TOKEN; "
            "default: the job that runs on this host",
        )
        parser.add_argument("--json", action="store_true", help="print JSON, one object per look")


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"between 0.1 and 3600, not {text}")
    return seconds


def _run_status(args: argparse.Namespace) -> int:
    env = Env.read()
    jobs = endpoints.running(env.shm_root) if args.where is None else []
    found = _look_at_all(jobs) if len(jobs) > 1 else look(args.where, env)
    print(json.dumps(found.answer) if args.json else found.text)
    return found.code


def _look_at_all(jobs: list[Endpoint]) -> Look:
    """Several jobs run here: a line for each. The worst of them gives the code."""
    looks = [_look_at(job, screen.one_line) for job in jobs]
    lines = [f"{len(jobs)} jobs run here; name the run directory of one to see more."]
    lines += [f"{job.run_dir}: {found.text}" for job, found in zip(jobs, looks, strict=True)]
    answer = [{"run_dir": job.run_dir, **found.answer} for job, found in zip(jobs, looks, strict=True)]
    return Look(code=max(found.code for found in looks), text="\n".join(lines), answer=answer)


def look(where: str | None, env: Env, *, width: int | None = None) -> Look:
    """Finds one job and looks at it.

    Args:
        where: a run directory or a URL; None: the one job that runs on this host.
        env: for the token of a URL, and where to look for jobs.
        width: of the text in columns; None asks the terminal.

    Raises:
        ConfigError: `where` leads nowhere, or several jobs run here.
    """
    columns = width or shutil.get_terminal_size((120, 40)).columns
    if where is None:
        return _look_here(env, columns)
    if where.startswith(("http://", "https://")):
        return _look_at(_endpoint_of_url(where, env), lambda status: screen.render(status, width=columns))
    run_dir = Path(where)
    try:
        job = endpoints.read(run_dir / endpoints.NAME)
    except (FileNotFoundError, NotADirectoryError):
        return _look_back(run_dir)
    return _look_at(job, lambda status: screen.render(status, width=columns))


def _look_here(env: Env, columns: int) -> Look:
    jobs = endpoints.running(env.shm_root)
    if not jobs:
        text = (
            f"no job of yours that has rank 0 on this host was found in {env.shm_root}. Give its run directory or its "
            f"URL; arc report shows what became of one that is over."
        )
        return _unreachable(text)
    if len(jobs) > 1:
        raise ConfigError(f"several jobs run here: {', '.join(job.run_dir for job in jobs)}. Name one of these.")
    return _look_at(jobs[0], lambda status: screen.render(status, width=columns))


def _endpoint_of_url(url: str, env: Env) -> Endpoint:
    if not env.token:
        raise ConfigError(
            f"the token for {url} is not known. Set ARC_TOKEN to it; it is in {endpoints.NAME} in the run directory."
        )
    authority = None if env.tls_ca is None else str(env.tls_ca)
    return Endpoint(
        url=url.rstrip("/"),
        token=env.token,
        job_id="",
        run_dir="",
        world_size=0,
        host="",
        pid=0,
        authority=authority,
    )


def _look_at(job: Endpoint, render: Callable[[dict[str, Any]], str]) -> Look:
    """Asks a coordinator. What answers under another name, or refuses the token, is not the job that was meant."""
    authority = None if job.authority is None else Path(job.authority)
    client = CoordinatorClient(job.url, job.token, timeout_s=_ANSWER_S, authority=authority)
    try:
        status = client.get("/v1/status")
    except CoordinatorUnavailable as error:
        hint = f" What happened until then: arc report {job.run_dir}" if job.run_dir else ""
        return _unreachable(f"{error.message}.{hint}")
    except ArcError as error:
        return _unreachable(f"{job.url} does not answer for this job: {error.message}")
    finally:
        client.close()
    if job.job_id and status["job_id"] != job.job_id:
        return _unreachable(f"at {job.url} is the job {status['job_id']} by now, not {job.job_id}")
    return Look(code=_CODES.get(status["health"], RECOVERING), text=render(status), answer=status)


def _look_back(run_dir: Path) -> Look:
    """No coordinator is announced in the run directory: nothing runs, and the incident file tells how it was."""
    if not (run_dir / INCIDENTS_FILE).is_file():
        raise ConfigError(f"{run_dir} is no run directory: there is neither {endpoints.NAME} nor {INCIDENTS_FILE}.")
    summary = report.summarize(report.read_lines(run_dir))
    lines = [clean(line) for line in report.render(summary).splitlines()]
    text = "\n".join([f"no coordinator runs for {run_dir}: the job is over.", *lines])
    return Look(code=OVER, text=text, answer={"health": "over", **summary})


def _unreachable(text: str) -> Look:
    return Look(code=UNREACHABLE, text=text, answer={"health": "unreachable", "message": text})


# ---- live ------------------------------------------------------------------------------------------------------------


def _run_watch(args: argparse.Namespace) -> int:
    env = Env.read()
    code = UNREACHABLE
    try:
        with _Painter(args.json) as paint:
            reached_at = time.monotonic()
            while True:
                found = look(args.where, env)
                code = found.code
                paint(found)
                if code != UNREACHABLE:
                    reached_at = time.monotonic()
                if code == OVER or time.monotonic() - reached_at > _PATIENCE_S:
                    break
                time.sleep(args.every)
    except KeyboardInterrupt:
        pass  # how one leaves it
    else:
        if not args.json and sys.stdout.isatty():
            print(found.text)  # the alternate screen took the last picture with it
    return code


class _Painter:
    """Puts one look after another on the terminal: with rich where it is installed, else with two escape codes.

    Where the output is no terminal, each look is printed below the last; with `as_json` as one line.
    """

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._live: Any = None

    def __enter__(self) -> Callable[[Look], None]:
        if self._as_json:
            return lambda found: print(json.dumps(found.answer), flush=True)
        if not sys.stdout.isatty():
            return lambda found: print(found.text + "\n", flush=True)
        try:
            from rich.live import Live
            from rich.text import Text
        except ImportError:
            return lambda found: print(_CLEAR + found.text, flush=True)
        self._live = Live(screen=True, auto_refresh=False)
        self._live.start()
        return lambda found: self._live.update(Text(found.text), refresh=True)

    def __exit__(self, *exc_info: object) -> None:
        if self._live is not None:
            self._live.stop()
