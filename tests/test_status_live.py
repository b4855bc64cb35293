"""A real job as people see it: its files, `arc status`, `arc watch`, the page in a browser, the metrics."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import re
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from arc_dist.coordinator import endpoint as endpoints
from arc_dist.coordinator.client import CoordinatorClient
from arc_dist.coordinator.endpoint import Endpoint
from browser import Browser, require_browser
from ranks import Job, torchrun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
SCRIPT = str(Path(__file__).parent / "scripts" / "train_toy.py")
LIMIT_S = 200.0
EVIL = "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'>\x1b[2J"


@dataclasses.dataclass(frozen=True)
class Live:
    """A job that trains for as long as the tests need it, and of which rank 1 was killed once."""

    job: Job
    out: Path
    run_dir: Path
    shm_root: Path

    @property
    def endpoint(self) -> Endpoint:
        return endpoints.read(self.run_dir / endpoints.NAME)

    def client(self) -> CoordinatorClient:
        return CoordinatorClient(self.endpoint.url, self.endpoint.token, timeout_s=60)

    def status(self) -> dict[str, Any]:
        return self.client().get("/v1/status")

    def arc(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        code = "import sys; from arc_dist.cli import main; sys.exit(main(sys.argv[1:]))"
        env = {**os.environ, "ARC_SHM_ROOT": str(self.shm_root), "COLUMNS": "160", **environ}
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_S)


@pytest.fixture(scope="module", params=["ddp", pytest.param("fsdp", marks=pytest.mark.soak)])
def live(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    out, run_dir = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("run")
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="arc-tests-status-", dir=parent) as shm:
        config = {
            "out": str(out),
            "toy": {"kind": request.param, "steps": 10_000_000},
            "kills": {"1": [20]},
            "store": str(out / "store"),
            "settings": {"checkpoint_every": 200},
        }
        env = {"ARC_RUN_DIR": str(run_dir), "ARC_SHM_ROOT": shm}
        argv = torchrun(2, "-m", "arc_dist", SCRIPT, json.dumps(config))
        with Job(argv, env=env) as job:
            made = Live(job, out, run_dir, Path(shm))
            job.wait_for((run_dir / endpoints.NAME).exists, LIMIT_S, "the coordinator's address")
            job.wait_for((out / "killed-1-20").exists, LIMIT_S, "the kill of rank 1 at step 20")
            job.wait_for(lambda: _has_recovered(made), LIMIT_S, "a restart, and reports of both ranks after it")
            yield made


def _has_recovered(live: Live) -> bool:
    status = live.status()
    beyond = status["ranks"]["step_min"] is not None and status["ranks"]["step_min"] > 20
    both = all(rank["step"] is not None for rank in status["ranks"]["listed"])
    stored = any(tier["tier"] != "memory" and tier["count"] for tier in status["checkpoints"]["tiers"])
    return status["generation"] >= 1 and beyond and both and stored and status["incidents"]["count"] >= 1


def test_the_address_is_for_the_owner_alone_and_the_token_is_nowhere_else(live: Live):
    paths = [live.run_dir / endpoints.NAME, *live.shm_root.glob(f"*/{endpoints.NAME}")]
    assert len(paths) == 2
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert endpoints.read(path) == live.endpoint
    for path in [*live.run_dir.iterdir(), live.job.directory / "stdout", live.job.directory / "stderr"]:
        if path.name != endpoints.NAME:
            assert live.endpoint.token.encode() not in path.read_bytes(), path


def test_status_finds_the_one_job_of_the_host(live: Live):
    found = live.arc("status")
    assert found.returncode == 0, found
    for words in ("running for", "2 ranks", "1 restarts", "killed by SIGKILL", "checkpoints:", "committed"):
        assert words in found.stdout, found.stdout
    status = json.loads(live.arc("status", "--json").stdout)
    assert (status["health"], status["restarts"], status["world_size"]) == ("running", 1, 2)
    assert status["step"] > 20
    assert {rank["state"] for rank in status["ranks"]["listed"]} == {"running"}
    assert status["incidents"]["last"][0]["ranks"] == [1]
    assert 0 < status["goodput"] <= 1


def test_status_takes_a_run_directory_or_a_url_with_the_token(live: Live):
    assert live.arc("status", str(live.run_dir)).returncode == 0
    endpoint = live.endpoint
    assert live.arc("status", endpoint.url, ARC_TOKEN=endpoint.token).returncode == 0
    without = live.arc("status", endpoint.url)
    assert (without.returncode, "ARC_TOKEN" in without.stderr) == (78, True)
    wrong = live.arc("status", endpoint.url, ARC_TOKEN="wrong")
    assert (wrong.returncode, "token" in wrong.stdout) == (3, True)
    assert endpoint.token not in wrong.stdout + wrong.stderr + without.stderr


def test_watch_shows_look_after_look_until_it_is_left(live: Live):
    code = "import sys; from arc_dist.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "watch", str(live.run_dir), "--json", "--every", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watch:
        assert watch.stdout is not None
        looks = [json.loads(watch.stdout.readline()) for _ in range(3)]
        watch.send_signal(2)
        _, error = watch.communicate(timeout=LIMIT_S)
    assert [look["health"] for look in looks] == ["running"] * 3, error
    assert looks[-1]["time"] > looks[0]["time"]
    assert watch.returncode == 0, error


@pytest.mark.parametrize("rich", [True, False])
def test_watch_draws_on_a_terminal_with_rich_and_without(live: Live, rich: bool):
    if rich:
        pytest.importorskip("rich")
    hide = "" if rich else "sys.modules['rich'] = sys.modules['rich.live'] = None; "
    code = f"import sys; {hide}from arc_dist.cli import main; sys.exit(main(sys.argv[1:]))"
    outer, inner = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    command = [sys.executable, "-c", code, "watch", str(live.run_dir), "--every", "0.1"]
    with subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, env=env) as watch:
        os.close(inner)
        stuck = threading.Timer(LIMIT_S, watch.kill)
        stuck.start()
        drawn = b""
        while drawn.count(b"generation 1") < 2 and watch.poll() is None:
            drawn += os.read(outer, 65_536)
        watch.send_signal(2)
        assert watch.wait(LIMIT_S) == 0, drawn
        stuck.cancel()
    os.close(outer)
    assert (b"\x1b[?1049h" in drawn) == rich  # the alternate screen
    assert drawn.count(b"\x1b[2J") >= (0 if rich else 2)


def test_metrics_are_what_prometheus_reads(live: Live):
    parser = pytest.importorskip("prometheus_client.parser")
    endpoint = live.endpoint
    import urllib.request

    request = urllib.request.Request(f"{endpoint.url}/metrics", headers={"Authorization": f"Bearer {endpoint.token}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        families = {family.name: family for family in parser.text_string_to_metric_families(answer.read().decode())}
    value = {name: family.samples[0].value for name, family in families.items() if family.samples}
    assert value["arc_generation"] >= 1
    assert value["arc_step"] > 20
    assert value["arc_restarts"] == 1
    assert {sample.labels["rank"] for sample in families["arc_rank_step"].samples} == {"0", "1"}
    assert value["arc_checkpoints_committed"] >= 1
    assert value["arc_last_commit_age_seconds"] >= 0
    assert 0 < value["arc_goodput_ratio"] <= 1
    kinds = {sample.labels["kind"]: sample.value for sample in families["arc_incidents"].samples}
    assert kinds["rank_died"] == 1


@pytest.mark.parametrize(("width", "is_phone"), [(1280, False), (390, True)])
def test_the_page_shows_the_job_live(live: Live, width: int, is_phone: bool):
    require_browser()
    live.client().incident(kind="test", cause=EVIL, step=7, ranks=[0], action=EVIL)
    endpoint = live.endpoint
    with Browser(width=width, is_phone=is_phone) as browser:
        browser.open(f"{endpoint.url}/#token={endpoint.token}")
        browser.wait_for(lambda: "killed by SIGKILL" in browser.text(), "the incident")
        first = _step(browser)
        browser.wait_for(lambda: _step(browser) > max(first, 20), "the next steps")
        text = browser.text()
        assert re.search(r"generation\s+[1-9]", text)
        assert str(live.out / "store") in text
        assert "<script>window.pwned" in text
        assert browser.run("return window.pwned === undefined")
        assert browser.run("return document.querySelectorAll('main script, main img').length") == 0
        assert browser.run("return document.querySelectorAll('#timeline .incident, #timeline .commit').length") >= 2
        assert browser.run("return document.querySelectorAll('#loss .curve').length") >= 1
        assert browser.run("return document.querySelectorAll('#loss .undone').length") >= 1
        assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
        assert browser.run("return location.href").rstrip("#") == f"{endpoint.url}/"  # the token left the address
        assert browser.run("return sessionStorage.getItem('token')") == endpoint.token
        assert browser.run("return document.cookie + JSON.stringify(localStorage)") == "{}"
        assert browser.console() == []
        asked = browser.requests()
        assert len(asked) > 3
        assert all(url.startswith((f"{endpoint.url}/", "data:")) for url in asked), asked
        assert not any(endpoint.token in url.partition("#")[0] for url in asked)


def test_a_wrong_token_is_asked_for_again(live: Live):
    require_browser()
    endpoint = live.endpoint
    with Browser(width=800, is_phone=False) as browser:
        browser.open(f"{endpoint.url}/")
        browser.wait_for(lambda: "Token of the job" in browser.text(), "the field for the token")
        browser.type("#token", "wrong\n")
        browser.wait_for(lambda: "token is wrong" in browser.text(), "a refusal")
        browser.type("#token", f"{endpoint.token}\n")
        browser.wait_for(lambda: "killed by SIGKILL" in browser.text(), "the job")


def _step(browser: Browser) -> int:
    found = re.search(r"^step\s+(\d+)", browser.text(), re.MULTILINE)
    return int(found[1]) if found else -1


def test_when_the_supervisors_are_killed_it_is_unreachable_and_nothing_runs_here(live: Live):
    """The last test of the module: it ends the job."""
    live.job.kill()
    gone = live.arc("status", str(live.run_dir))
    assert (gone.returncode, "cannot be reached" in gone.stdout) == (3, True), gone
    assert "arc report" in gone.stdout
