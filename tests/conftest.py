"""Isolation of tests from the machine and from each other; the tools that start ranks are in ranks.py."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# A machine that is busy is no failure: durations are not asserted, by Hypothesis neither.
hypothesis.settings.register_profile("arc", deadline=None)
hypothesis.settings.load_profile("arc")

# Before anything imports torch: ranks share few cores, and a fork server's children inherit this.
os.environ["OMP_NUM_THREADS"] = "1"
# Whoever runs the tests may sit inside a job of their own. What is addressed to the tests themselves stays.
for _name in list(os.environ):
    if _name.startswith(("ARC_", "TORCHELASTIC_")) and not _name.startswith("ARC_TEST_"):
        del os.environ[_name]
for _name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(_name, None)
# A background job of a shell ignores Ctrl-C, and so would every process that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Where tests write: thousands of files that a store makes durable, one by one, are seconds on a disk.
MEMORY = Path("/dev/shm")
MEMORY_NEEDED_BYTES = 2 << 30
# With CI=true everything installable is installed, so that only these reasons may skip a test.
SKIPS_ALLOWED_IN_CI = ("needs a GPU", "needs root")
_skipped: list[str] = []


def pytest_report_header() -> str:
    import arc_dist

    return f"arc_dist: {Path(arc_dist.__path__[0]).resolve()}"


@pytest.hookimpl(tryfirst=True)  # before pytest itself looks where temporary directories are wanted
def pytest_configure(config: pytest.Config) -> None:
    if config.option.basetemp is None and _has_room(MEMORY):
        root = tempfile.mkdtemp(prefix=f"arc-tests-{os.getpid()}-", dir=MEMORY)
        config.option.basetemp = f"{root}/t"  # workers of pytest-xdist get a place in it
        config.add_cleanup(lambda: shutil.rmtree(root, ignore_errors=True))
    if os.environ.get("ARC_TEST_INSTALLED") != "1":
        return
    import arc_dist

    tree = Path(config.rootpath, "arc_dist").resolve()
    if Path(arc_dist.__path__[0]).resolve() == tree:
        raise pytest.UsageError(f"the installed package is to be tested, but arc_dist was imported from {tree}")


def _has_room(directory: Path) -> bool:
    """Whether tests can write there; in a container the memory file system may be a few megabytes."""
    if not os.access(directory, os.W_OK):
        return False
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize >= MEMORY_NEEDED_BYTES


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note_skip(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note_skip(report)


def _note_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):  # an expected failure has no reason tuple
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not reason.startswith(SKIPS_ALLOWED_IN_CI):
            _skipped.append(f"{report.nodeid}: {reason}")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A worker of pytest-xdist tells of modules that were skipped whole; of single tests both sides know."""
    _skipped.extend(line for line in getattr(node, "workeroutput", {}).get("skipped", ()) if line not in _skipped)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["skipped"] = _skipped
        return
    if os.environ.get("CI") == "true" and _skipped and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if os.environ.get("CI") == "true" and _skipped:
        terminalreporter.section("skipped, which is a failure with CI=true")
        for line in _skipped:
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def _shm_of_session() -> Iterator[Path]:
    parent = MEMORY if os.access(MEMORY, os.W_OK) else None
    root = Path(tempfile.mkdtemp(prefix=f"arc-tests-{os.getpid()}-", dir=parent))
    yield root
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def shm_root(_shm_of_session: Path) -> Iterator[Path]:
    """A directory of the test's own on the memory file system, removed at its end whatever the test leaves in it."""
    root = Path(tempfile.mkdtemp(dir=_shm_of_session))
    yield root
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """pytest's own, in memory where there is room; with the mark `disk` it lies with all other temporary files."""
    if request.node.get_closest_marker("disk") is None:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="arc-tests-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture(autouse=True)
def isolated(
    tmp_path: Path, shm_root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every test writes its incidents and its shared memory to places of its own.

    `tmp_path` comes first, so that it is removed when nothing is patched any more.
    """
    monkeypatch.setenv("ARC_RUN_DIR", str(tmp_path_factory.mktemp("run")))
    monkeypatch.setenv("ARC_SHM_ROOT", str(shm_root))
