"""A step copied between places is the same step, whole or not there: verified, resumable, never mixed with another."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from arc_dist.checkpoint_store import Store
from arc_dist.checkpoint_store.backends import Backend, open_backend
from arc_dist.checkpoint_store.transfer import Transfer, TransferAborted, copy_step, segments_of
from arc_dist.errors import ConfigError, Fenced, StoreCorrupt, StoreError, StoreGone
from store_helpers import same_bits, save

STEP = 10
DIRECTORY = "step-00000010"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    store = Store(tmp_path / "source", owner="a")
    store.check_writable()
    save(store, STEP, world_size=3)
    return tmp_path / "source"


@pytest.fixture(params=["local", "memory"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield from place(request.param, tmp_path)


# fsspec's memory files refuse the assignment to `closed` with which the remote backend gives up an upload.


@pytest.fixture(params=["local", "memory"])
def interrupted_target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A target for copies that end in the middle of a file."""
    yield from place(request.param, tmp_path)


def place(kind: str, tmp_path: Path) -> Iterator[str]:
    if kind == "local":
        yield str(tmp_path / "target")
        return
    import fsspec

    name = f"transfer-{uuid.uuid4().hex}"
    yield f"memory://{name}"
    filesystem = fsspec.filesystem("memory")
    for path in filesystem.ls("/", detail=False):
        if str(path).strip("/").startswith(name):
            filesystem.rm(path, recursive=True)


def copy(root: Path | str, target: str, **options: object) -> Transfer:
    return copy_step(open_backend(root), "run", DIRECTORY, open_backend(target), **options)  # type: ignore[arg-type]


def files_in(backend: Backend, path: str = f"run/{DIRECTORY}") -> dict[str, bytes]:
    return {entry.name: backend.read(f"{path}/{entry.name}", 1 << 30) for entry in backend.list(path)}


def flip(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_the_copy_has_every_byte_of_the_original(root: Path, target: str) -> None:
    counted: list[int] = []
    done = copy(root, target, progress=counted.append)
    assert files_in(open_backend(target)) == files_in(open_backend(root))
    manifest = Store(root).manifest(STEP)
    assert sum(counted) == manifest.nbytes == done.nbytes
    assert (done.step, done.num_sent, done.num_present, done.committed) == (STEP, 6, 0, True)
    assert Store(target).open(STEP).verify() == []
    # From there to a third place, so that a remote source is read too.
    back = root.parent / "back"
    copy_step(open_backend(target), "run", DIRECTORY, open_backend(back), target_run="other")
    assert files_in(open_backend(back), f"other/{DIRECTORY}") == files_in(open_backend(root))


def test_a_copied_step_restores_to_the_same_bits(root: Path, target: str) -> None:
    copy(root, target)
    ours, theirs = Store(root).open(STEP), Store(target).open(STEP)
    specs = list(ours.specs().values())
    for a, b in zip(ours.read(specs), theirs.read(specs), strict=True):
        assert same_bits(a, b)


def test_a_second_copy_sends_nothing(root: Path, target: str) -> None:
    copy(root, target)
    again = copy(root, target)
    assert (again.num_sent, again.sent_nbytes, again.num_present, again.committed) == (0, 0, 6, False)


def test_segments_tile_every_file(root: Path) -> None:
    manifest = Store(root).manifest(STEP)
    for entry in manifest.files:
        end = 0
        for segment in segments_of(manifest, entry):
            assert segment.start == end
            end += segment.nbytes
        assert end == entry.nbytes


def test_every_file_of_the_source_is_verified(root: Path, tmp_path: Path) -> None:
    for number, path in enumerate(sorted((root / "run" / DIRECTORY).iterdir())):
        for position in (0, path.stat().st_size // 2, path.stat().st_size - 1):
            target = tmp_path / f"target-{number}-{position}"
            whole = path.read_bytes()
            flip(path, position)
            with pytest.raises(StoreError) as caught:
                copy(root, str(target))
            assert path.name in caught.value.message
            path.write_bytes(whole)
            assert not (target / "run" / DIRECTORY / "manifest.json").exists()
            assert not (target / "run" / DIRECTORY / path.name).exists()


def test_a_damaged_tensor_is_named_and_truncation_is_seen(root: Path, interrupted_target: str) -> None:
    target = interrupted_target
    path = root / "run" / DIRECTORY / "rank-00001.safetensors"
    whole = path.read_bytes()
    flip(path)
    with pytest.raises(StoreCorrupt, match="bytes of tensor model") as caught:
        copy(root, target)
    assert str(caught.value.fields["tensor"]).startswith("model.")
    path.write_bytes(whole[:-1])
    with pytest.raises(StoreCorrupt, match="its manifest says"):
        copy(root, target)
    path.unlink()
    with pytest.raises(StoreGone):
        copy(root, target)
    path.write_bytes(whole)
    assert copy(root, target).committed


def test_an_interrupted_copy_goes_on_where_it_was(root: Path, interrupted_target: str) -> None:
    target = interrupted_target
    lost = root / "run" / DIRECTORY / "rank-00001.json"
    whole = lost.read_bytes()
    lost.unlink()
    with pytest.raises(StoreGone):
        copy(root, target)
    backend = open_backend(target)
    arrived = files_in(backend)
    assert "manifest.json" not in arrived
    assert "rank-00001.json" not in arrived
    lost.write_bytes(whole)
    source = files_in(open_backend(root))
    done = copy(root, target)
    assert done.num_present == sum(source[name] == data for name, data in arrived.items() if name != "attempt.json")
    assert Store(target).open(STEP).verify() == []


def test_what_arrived_damaged_is_sent_again(root: Path, target: str) -> None:
    """Also how a damaged copy of a committed step is repaired."""
    copy(root, target)
    backend = open_backend(target)
    name = f"run/{DIRECTORY}/rank-00002.safetensors"
    data = bytearray(backend.read(name, 1 << 30))
    data[-1] ^= 1
    backend.remove(name)
    assert backend.create_exclusive(name, bytes(data))
    backend.remove(f"run/{DIRECTORY}/rank-00000.json")
    done = copy(root, target)
    assert (done.num_sent, done.num_present, done.committed) == (2, 4, False)
    assert Store(target).open(STEP).verify() == []


@pytest.mark.parametrize("num_looks", [0, 1, 3, 7])
def test_a_copy_that_is_given_up_is_no_checkpoint_and_can_be_taken_up(
    root: Path, interrupted_target: str, num_looks: int
) -> None:
    target = interrupted_target
    looks = 0
    lock = threading.Lock()

    def should_abort() -> bool:
        nonlocal looks
        with lock:
            looks += 1
            return looks > num_looks

    with pytest.raises(TransferAborted, match="copy again"):
        copy(root, target, should_abort=should_abort)
    assert Store(target).steps() == []
    assert not [name for name in files_in(open_backend(target)) if name.endswith(".tmp")]
    assert copy(root, target).committed
    assert Store(target).open(STEP).verify() == []


def test_the_rate_is_kept_and_abort_does_not_wait_for_it(root: Path, interrupted_target: str) -> None:
    target = interrupted_target
    nbytes = Store(root).manifest(STEP).nbytes
    began = time.monotonic()
    copy(root, target, max_bytes_per_s=nbytes / 0.5)
    # The last file begins when all before it are paid for.
    assert time.monotonic() - began > 0.2
    began = time.monotonic()
    deadline = began + 0.3
    with pytest.raises(TransferAborted):
        copy(root, f"{target}-slow", max_bytes_per_s=1, should_abort=lambda: time.monotonic() > deadline)
    assert time.monotonic() - began < 5
    for rate in (0, -1, float("nan")):
        with pytest.raises(ConfigError, match="positive"):
            copy(root, target, max_bytes_per_s=rate)


def test_two_copiers_at_once_make_one_step(root: Path, tmp_path: Path) -> None:
    target = str(tmp_path / "target")
    results: list[Transfer | StoreError] = []

    def run() -> None:
        try:
            results.append(copy(root, target))
        except StoreError as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 4
    assert all(isinstance(result, Transfer) for result in results), results
    assert sum(result.committed for result in results if isinstance(result, Transfer)) == 1
    assert Store(target).open(STEP).verify() == []


def test_another_attempt_in_the_place_is_left_alone(root: Path, target: str) -> None:
    other = Store(target, owner="b")
    other.check_writable()
    save(other, STEP, seed=99)
    before = files_in(open_backend(target))
    with pytest.raises(Fenced, match="other content"):
        copy(root, target)
    open_backend(target).remove(f"run/{DIRECTORY}/manifest.json")
    with pytest.raises(Fenced, match="another attempt"):
        copy(root, target)
    before.pop("manifest.json")
    assert files_in(open_backend(target)) == before


def test_files_that_arrived_are_not_sent_again(root: Path, target: str) -> None:
    copy(root, target)
    backend = open_backend(target)
    for name in ("manifest.json", "rank-00002.safetensors"):
        backend.remove(f"run/{DIRECTORY}/{name}")
    done = copy(root, target)
    size = len(open_backend(root).read(f"run/{DIRECTORY}/rank-00002.safetensors", 1 << 30))
    assert (done.num_sent, done.num_present, done.sent_nbytes, done.committed) == (1, 5, size, True)


def test_a_foreign_shard_in_the_place_prevents_the_commit(root: Path, tmp_path: Path) -> None:
    copy(root, str(tmp_path / "target"))
    directory = tmp_path / "target" / "run" / DIRECTORY
    (directory / "manifest.json").unlink()
    (directory / "rank-00009.safetensors").write_bytes(b"x")
    with pytest.raises(StoreCorrupt, match="rank-00009"):
        copy(root, str(tmp_path / "target"))
    assert not (directory / "manifest.json").exists()


def test_a_directory_whose_removal_was_interrupted(root: Path, tmp_path: Path) -> None:
    copy(root, str(tmp_path / "target"))
    directory = tmp_path / "target" / "run" / DIRECTORY
    (directory / "manifest.json").unlink()
    (directory / "attempt.json").unlink()
    with pytest.raises(StoreError, match="removal was interrupted"):
        copy(root, str(tmp_path / "target"))


def test_what_cannot_be_copied(root: Path, tmp_path: Path, target: str) -> None:
    with pytest.raises(ConfigError, match="both source and target"):
        copy(root, f"{root}/")
    with pytest.raises(StoreGone):
        copy_step(open_backend(root), "run", "step-00000011", open_backend(target))
    with pytest.raises(StoreGone):
        copy(root, str(tmp_path / "no" / "such" / "mount"))
    flip(root / "run" / DIRECTORY / "manifest.json", 40)
    with pytest.raises(StoreCorrupt, match="manifest"):
        copy(root, target)


def test_the_manifest_of_another_step_is_refused(root: Path, target: str) -> None:
    save(Store(root, owner="a"), 11)
    path = root / "run" / DIRECTORY / "manifest.json"
    path.write_bytes((root / "run" / "step-00000011" / "manifest.json").read_bytes())
    assert json.loads(path.read_bytes())["step"] == 11
    with pytest.raises(StoreCorrupt, match="not of step-00000010"):
        copy(root, target)


_COPY = """
import sys
from arc_dist.checkpoint_store.backends import open_backend
from arc_dist.checkpoint_store.transfer import copy_step
source, target, rate = sys.argv[1:]
print("begin", flush=True)
copy_step(open_backend(source), "run", "step-00000010", open_backend(target), max_bytes_per_s=float(rate) or None,
          progress=lambda nbytes: print(nbytes, flush=True))
"""


@pytest.mark.parametrize("num_lines", [1, 3, 9, 30, 60])
def test_a_copy_that_is_killed_is_no_checkpoint_and_is_taken_up(root: Path, tmp_path: Path, num_lines: int) -> None:
    """SIGKILL after so many lines of progress: in the middle of files, or with nothing but the manifest missing."""
    target = str(tmp_path / "target")
    nbytes = Store(root).manifest(STEP).nbytes
    argv = [sys.executable, "-c", _COPY, str(root), target, str(nbytes / 3)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(num_lines):
            if not process.stdout.readline():
                break
        process.kill()
    if Path(target).exists():  # what is there is the whole step or no step
        assert all(Store(target).open(info.step).verify() == [] for info in Store(target).steps())
    copy(root, target)
    assert Store(target).open(STEP).verify() == []
    copied, original = files_in(open_backend(target)), files_in(open_backend(root))
    assert {name: data for name, data in copied.items() if not name.startswith(".")} == original
