"""Every backend keeps the contract that ships with the package, and the contract finds a backend that does not.

`ARC_TEST_STORES="s3://bucket/x,/mnt/nfs"` runs it on storage of one's own as well (a radosgw, an NFS mount): the URLs,
separated by commas, with credentials in the standard environment variables.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from arc_dist.checkpoint_store import Unsupported, contract
from arc_dist.checkpoint_store.backends import LocalBackend, RemoteBackend, open_backend
from arc_dist.errors import StoreCorrupt
from s3_server import moto_server, new_bucket

CASES = contract.cases()
NAMES = [case.name for case in CASES]
OWN = [url.strip() for url in os.environ.get("ARC_TEST_STORES", "").split(",") if url.strip()]
NEEDS_LINKS = {
    "a_taken_name_is_refused",
    "exclusive_create_happens_once",
    "a_removed_name_is_free_again",
    "discard_leaves_nothing",
    "files_are_private",
    "of_racing_creates_one_wins",
    "of_racing_files_one_wins",
}
each_case = pytest.mark.parametrize("case", CASES, ids=NAMES)


def test_the_cases_have_names_and_promises() -> None:
    assert len(set(NAMES)) == len(NAMES) >= 20
    assert all(case.promise.endswith(".") for case in CASES)


@pytest.mark.disk
@each_case
def test_local_directory(case: contract.Case, tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path)
    case.run(backend)
    assert list(tmp_path.iterdir()) == [], "a case cleans up behind itself"


@each_case
def test_local_directory_without_hard_links(
    case: contract.Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on SMB or a FUSE mount of an object store. (Racing processes have links again.)"""
    if case.name == "of_racing_processes_one_wins":
        return
    refused: list[Any] = []

    def link(*args: Any, **kwargs: Any) -> None:
        refused.append(args)
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    case.run(LocalBackend(tmp_path))
    assert bool(refused) == (case.name in NEEDS_LINKS)


@each_case
def test_memory_file_system(case: contract.Case, shm_root: Path) -> None:
    """tmpfs, where the machine has one."""
    case.run(LocalBackend(shm_root))


@each_case
def test_memory_url(case: contract.Case) -> None:
    backend = RemoteBackend("memory://contract")
    if not set(case.needs) <= promised(backend):
        with pytest.raises(Unsupported, match="does not promise"):
            case.run(backend)
        return
    backend.prepare()
    case.run(backend)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("s3fs", reason='s3fs is not installed: pip install "arc-dist[s3]"')
    pytest.importorskip("moto", reason='moto is not installed: pip install "moto[server]"')
    with moto_server(tmp_path_factory.mktemp("moto") / "log") as url:
        yield url


@pytest.mark.slow
@each_case
def test_s3(case: contract.Case, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = RemoteBackend(f"{new_bucket(server, monkeypatch)}/some/prefix")
    if not set(case.needs) <= promised(backend):
        with pytest.raises(Unsupported, match="does not promise"):
            case.run(backend)
        return
    case.run(backend)


if OWN:  # without any there is nothing to skip

    @pytest.mark.slow
    @each_case
    @pytest.mark.parametrize("url", OWN)
    def test_storage_of_ones_own(case: contract.Case, url: str) -> None:
        backend = open_backend(url)
        if set(case.needs) <= promised(backend):
            backend.prepare()
            case.run(backend)


def promised(backend: Any) -> set[str]:
    return {
        name
        for name in ("exclusive_create", "atomic_publish", "durable", "reserve", "private", "shared")
        if getattr(backend.capabilities, name)
    }


def test_a_service_without_exclusive_create(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each case is passed or `Unsupported`; none finds a weaker way taken in silence."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class Plain(MemoryFileSystem):
        protocol = "plain"
        store: ClassVar[dict[str, Any]] = {}
        pseudo_dirs: ClassVar[list[str]] = [""]

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return super()._strip_protocol(path.replace("plain://", "/"))

    fsspec.register_implementation("plain", Plain, clobber=True)
    backend = RemoteBackend("plain://x")
    assert promised(backend) == {"shared"}
    unsupported = set()
    for case in CASES:
        try:
            case.run(backend)
        except Unsupported:
            unsupported.add(case.name)
    assert unsupported == {case.name for case in CASES if case.needs}


# What each case is there to find: a backend broken in one place, and the cases that must fail on it.


class Careless(LocalBackend):
    """A local backend of which one method is replaced."""


def overwriting(self: LocalBackend, path: str, data: bytes) -> bool:
    target = self.root / path
    target.write_bytes(data)
    return True


def racy(self: LocalBackend, path: str, data: bytes) -> bool:
    target = self.root / path
    if target.exists():
        return False
    time.sleep(0.001)
    target.write_bytes(data)
    return True


def racy_claim(self: LocalBackend, directory: str, name: str, data: bytes) -> bool:
    target = self.root / directory
    if target.exists():
        return False
    time.sleep(0.001)
    target.mkdir(exist_ok=True, parents=True)
    (target / name).write_bytes(data)
    return True


class DirectSink:
    """Writes to the final name, as the simplest of implementations would."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("wb", buffering=0)

    def write(self, data: memoryview) -> None:
        time.sleep(0.001)  # others look meanwhile
        self.file.write(data)

    def publish(self) -> None:
        self.file.close()

    def discard(self) -> None:
        self.file.close()


def direct(self: LocalBackend, path: str, nbytes: int, *, exclusive: bool) -> Any:
    return DirectSink(self.root / path)


def padded(self: LocalBackend, path: str) -> Any:
    source = LocalBackend.open(self, path)
    real = source.read_into

    def read_into(offset: int, buffer: memoryview) -> None:
        try:
            real(offset, buffer)
        except StoreCorrupt:
            buffer[:] = bytes(len(buffer))

    source.read_into = read_into  # type: ignore[method-assign]
    return source


BROKEN: list[tuple[str, Callable[..., Any], set[str]]] = [
    ("create_exclusive", overwriting, {"exclusive_create_happens_once", "of_racing_creates_one_wins"}),
    ("create_exclusive", racy, {"of_racing_creates_one_wins"}),
    ("claim", racy_claim, {"of_racing_claims_one_wins", "files_are_private"}),
    (
        "create",
        direct,
        {
            "a_file_has_no_name_before_publish",
            "a_replaced_file_is_whole",
            "a_taken_name_is_refused",
            "discard_leaves_nothing",
            "of_racing_files_one_wins",
            "a_reader_sees_old_or_new_bytes",
        },
    ),
    ("open", padded, {"reading_past_the_end_is_damage"}),
    ("remove", lambda self, path: None, {"removing_may_be_repeated", "a_removed_name_is_free_again"}),
    ("remove", lambda self, path: (self.root / path).unlink(), {"what_is_missing_is_gone", "removing_may_be_repeated"}),
    ("exists", lambda self, path: (self.root / path).is_dir(), {"a_published_file_is_seen_by_others_at_once"}),
    ("list", lambda self, path: LocalBackend.list(self, path)[:20], {"a_listing_is_complete_and_flat"}),
    (
        "make_directory",
        lambda self, path: (self.root / path).mkdir(parents=True, exist_ok=False),
        {"directories_may_be_made_again"},
    ),
]


@pytest.mark.parametrize(("method", "body", "wanted"), BROKEN, ids=[f"{m}-{b.__name__}" for m, b, _ in BROKEN])
def test_the_contract_finds_a_broken_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, body: Callable[..., Any], wanted: set[str]
) -> None:
    broken = type("Broken", (LocalBackend,), {method: body})
    # Cases open clients of their own; they must be as broken.
    for module in ("contract_cases", "contract_races"):
        monkeypatch.setattr(f"arc_dist.checkpoint_store.{module}.open_backend", lambda url: broken(Path(url)))
    failed = set()
    for case in CASES:
        if case.name in wanted:
            try:
                case.run(broken(tmp_path))
            except Unsupported:
                pass
            except Exception:  # noqa: BLE001 - a broken backend may raise anything
                failed.add(case.name)
    assert failed == wanted


def run_main(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "arc_dist.checkpoint_store.contract", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


@pytest.mark.slow
def test_the_command_prints_one_line_per_case(tmp_path: Path) -> None:
    done = run_main(str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(CASES) + 1
    for case, line in zip(CASES, lines):
        assert line.startswith(("ok ", "unsupported ")) and case.name in line
    assert lines[-1] == "All promises hold."
    assert list(tmp_path.iterdir()) == []


def test_the_command_fails_with_the_broken_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = type("Broken", (LocalBackend,), {"create_exclusive": overwriting})
    monkeypatch.setattr(contract, "open_backend", lambda url: broken(Path(url)))
    assert (
        contract.main([str(tmp_path), "--case", "exclusive_create_happens_once", "--case", "removing_may_be_repeated"])
        == 1
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["ok", "FAILED"]
    assert "a second create succeeded" in lines[1]
    with pytest.raises(SystemExit):
        contract.main([str(tmp_path), "--case", "nosuch"])


def test_the_command_on_a_place_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert contract.main([str(tmp_path / "missing" / "x")]) == 1
    assert "mount what should be there" in capsys.readouterr().out
