"""Bad input and failing storage: one clear error of the right kind with the remedy, and nothing half-written left."""

from __future__ import annotations

import errno
import importlib
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from arc_dist.checkpoint_store import ShardTensor, Store, TensorSpec, Unsupported
from arc_dist.checkpoint_store.backends.base import store_error
from arc_dist.checkpoint_store.format import digest_of
from arc_dist.errors import (
    ArcError,
    CheckpointMismatch,
    ConfigError,
    StoreDenied,
    StoreError,
    StoreFull,
    StoreGone,
    StoreTransient,
)
from store_helpers import files_of, save, whole


def write(store: Store, step: int = 1, nbytes: int = 16) -> Any:
    tensors = [whole("a", torch.ones(nbytes // 2, dtype=torch.uint8)), whole("b", torch.ones(nbytes // 8))]
    return store.write_part(step, generation=0, rank=0, world_size=1, tensors=tensors, objects={})


def test_a_writable_store_is_left_as_it_was(tmp_path: Path) -> None:
    store = Store(tmp_path / "new")
    store.check_writable()
    store.check_writable()
    assert files_of(tmp_path) == []
    assert (tmp_path / "new" / "run").is_dir()


def test_a_path_that_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for path in (file, file / "below"):
        with pytest.raises(ConfigError, match="is a file, not a directory"):
            Store(path).check_writable()
    (tmp_path / "run").write_text("x")
    with pytest.raises(ConfigError, match="is a file, not a directory"):
        Store(tmp_path).check_writable()
    with pytest.raises(ConfigError, match="is a file"):
        write(Store(tmp_path))


def test_a_missing_parent_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(StoreGone, match=r"mkdir -p .*/mnt"):
        Store(tmp_path / "mnt" / "ckpt").check_writable()
    assert not (tmp_path / "mnt").exists()
    with pytest.raises(StoreGone):
        write(Store(tmp_path / "gone"))
    with pytest.raises(StoreGone):
        Store(tmp_path / "gone").steps()
    with pytest.raises(StoreGone):
        Store(tmp_path / "gone").newest()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_has_not_begun_has_no_steps(tmp_path: Path) -> None:
    assert Store(tmp_path).steps() == []
    assert Store(tmp_path).newest() is None
    with pytest.raises(StoreGone, match=r"no committed step 3. It has: none"):
        Store(tmp_path).open(3)


@pytest.fixture
def nobody_can_enter() -> Iterator[Path]:
    """A directory that every user reaches."""
    path = Path(tempfile.mkdtemp(prefix="arc-store-"))
    path.chmod(0o755)
    yield path
    path.chmod(0o755)
    shutil.rmtree(path)


def as_nobody(action: Callable[[], Any]) -> tuple[type[BaseException] | None, str]:
    """Runs `action` without root's rights in a child; returns the error it raised."""
    read, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            result: tuple[type[BaseException] | None, str] = (None, "")
            try:
                action()
            except ArcError as error:
                result = (type(error), str(error))
            os.write(write_end, pickle.dumps(result))
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    assert data, "the child died"
    return pickle.loads(data)


def test_a_directory_without_write_permission(nobody_can_enter: Path) -> None:
    root = nobody_can_enter / "ckpt"
    root.mkdir(0o755)
    root.chmod(0o555)
    kind, message = as_nobody(Store(root).check_writable)
    assert kind is StoreDenied
    assert str(root) in message
    assert "write permission" in message
    kind, _ = as_nobody(lambda: write(Store(root)))
    assert kind is StoreDenied
    assert list(root.iterdir()) == []


def test_a_directory_without_read_permission(nobody_can_enter: Path) -> None:
    root = nobody_can_enter / "ckpt"
    save(Store(root.parent, run="ckpt", owner="a"), 1)
    if os.geteuid() != 0:
        root.chmod(0o000)
    kind, _ = as_nobody(Store(nobody_can_enter, run="ckpt").steps)
    assert kind is StoreDenied
    if os.geteuid() != 0:
        root.chmod(0o700)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a file system")


def mounted(path: Path, options: str) -> None:
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"needs root with the right to mount: {done.stderr.strip()}")
    assert os.path.ismount(path)  # a test that believed in a mount that is not there would fill the machine's disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    path = tmp_path / "small"
    mounted(path, "size=8m,nr_inodes=64")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill(action: Callable[[int], Any]) -> None:
    """Repeats until the disk is full; never more than it can hold."""
    for number in range(200):
        try:
            action(number)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                return
            raise
    raise AssertionError("the small disk was not filled")


@needs_root
@pytest.mark.parametrize("reserve", [True, False], ids=["reserved", "met in the middle"])
def test_a_full_disk(small_disk: Path, reserve: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert os.path.ismount(small_disk)
    if not reserve:
        monkeypatch.setattr("arc_dist.checkpoint_store.backends.local._reserve", lambda descriptor, nbytes: None)
    store = Store(small_disk, owner="a")
    store.check_writable()
    store.commit(1, 0, 1, {0: write(store, 1, 2 << 20)}, {"certified": True})
    free = os.statvfs(small_disk).f_bavail
    with pytest.raises(StoreFull) as caught:
        write(store, 2, 16 << 20)
    assert caught.value.fields["errno"] == errno.ENOSPC
    assert "rank-00000.safetensors" in str(caught.value)
    assert "Free space" in str(caught.value)
    assert os.statvfs(small_disk).f_bavail >= free - 4  # what was half written is removed
    assert [f.name for f in files_of(small_disk / "run" / "step-00000002")] == ["attempt.json"]
    assert store.open(1).verify() == []
    # Space returns, and so does the save.
    store.commit(2, 0, 1, {0: write(store, 2, 1 << 20)}, {"certified": True})
    assert [info.step for info in store.steps()] == [1, 2]


@needs_root
def test_a_disk_too_full_for_the_manifest(small_disk: Path) -> None:
    assert os.path.ismount(small_disk)
    store = Store(small_disk, owner="a")
    parts = {0: write(store, 1, 1 << 20)}
    filler = small_disk / "filler"
    fill(lambda number: filler.open("ab", buffering=0).write(bytes(64 << 10)))
    with pytest.raises(StoreFull):
        store.commit(1, 0, 1, parts, {"certified": True})
    assert store.steps() == []
    assert not [f for f in files_of(small_disk) if f.name.startswith(".")]
    with pytest.raises(StoreFull):
        store.check_writable()
    filler.unlink()
    store.commit(1, 0, 1, parts, {"certified": True})
    assert store.open(1).verify() == []


@needs_root
def test_a_disk_without_inodes(small_disk: Path) -> None:
    assert os.path.ismount(small_disk)
    store = Store(small_disk, owner="a")
    write(store, 1)
    fill(lambda number: (small_disk / f"file{number}").touch())
    with pytest.raises(StoreFull):
        write(store, 2)


@needs_root
def test_a_read_only_disk(small_disk: Path) -> None:
    store = Store(small_disk, owner="a")
    save(store, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StoreDenied, match="Read-only"):
        store.check_writable()
    with pytest.raises(StoreDenied):
        write(store, 2)
    assert store.open(1).verify() == []


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.EACCES, StoreDenied),
        (errno.EPERM, StoreDenied),
        (errno.EROFS, StoreDenied),
        (errno.ENOENT, StoreGone),
        (errno.ESTALE, StoreGone),
        (errno.EIO, StoreTransient),
        (errno.EINTR, StoreTransient),
        (errno.ETIMEDOUT, StoreTransient),
        (errno.EMFILE, StoreTransient),
        (errno.ENOTDIR, ConfigError),
        (errno.EXDEV, StoreError),
    ],
)
def test_every_errno_has_its_error(code: int, kind: type[ArcError]) -> None:
    error = store_error(OSError(code, os.strerror(code)), "writing", "/x/y")
    assert type(error) is kind
    assert "/x/y" in str(error)
    assert error.retryable == (kind is StoreTransient)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), copy.fields, str(copy)) == (type(error), error.fields, str(error))


CALLS = ["open", "write", "fsync", "link", "rename", "mkdir", "close", "unlink", "scandir"]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE])
@pytest.mark.parametrize("call", CALLS)
def test_an_error_of_any_call_is_ours_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    """The nth call fails, for every n; the save fails with a typed error or succeeds, and the old step stays whole."""
    store = Store(tmp_path, owner="old")
    save(store, 1)
    real = getattr(os, call)
    calls, limit = [0], [0]

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == limit[0]:
            if call == "close":
                real(*args, **kwargs)
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    fired = 0
    for number in range(1, 60):
        calls[0], limit[0] = 0, number
        attempt = Store(tmp_path, owner=f"start {number}")
        step = 10 + number
        outcome: ArcError | None = None
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                attempt.commit(step, 0, 1, {0: write(attempt, step)}, {"certified": True})
            except ArcError as error:
                outcome = error
        if calls[0] < number:
            assert outcome is None
            break
        fired += 1
        if outcome is not None and call not in ("close", "scandir"):
            assert outcome.fields.get("errno") == code, (call, number, outcome)
        for info in store.steps(include_damaged=True):
            assert info.problem is None
        assert store.open(1).verify() == []
        if outcome is None:
            assert attempt.open(step).verify() == []
    else:
        raise AssertionError("more calls than expected")
    assert fired >= 1


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[: max(1, len(data) // 3)]))
    store = Store(tmp_path, owner="a")
    saved = save(store, 1, world_size=2)
    monkeypatch.undo()
    assert store.open(1).verify() == []
    assert set(store.open(1).specs()) == set(saved)


def test_a_checkpoint_of_another_model_lists_names_and_shapes(tmp_path: Path) -> None:
    store = Store(tmp_path, owner="a")
    tensors = {"model.a": torch.ones(2, 3), "model.b": torch.ones(4), "model.c": torch.ones(1)}
    part = store.write_part(
        1, generation=0, rank=0, world_size=1, tensors=[whole(n, t) for n, t in tensors.items()], objects={}
    )
    store.commit(1, 0, 1, {0: part}, {})
    wanted = {"model.a": torch.zeros(2, 4), "model.b": torch.zeros(4, dtype=torch.float16), "model.d": torch.zeros(5)}
    pairs = [(TensorSpec.whole(n, t), t) for n, t in wanted.items()]
    checkpoint = store.open(1)
    with pytest.raises(CheckpointMismatch) as caught:
        checkpoint.read_into(pairs)
    message = str(caught.value)
    assert "model.a: float32 [2, 3] in the checkpoint, float32 [2, 4] in the model" in message
    assert "model.b: float32 [4] in the checkpoint, float16 [4] in the model" in message
    assert "model.d: not in the checkpoint" in message
    assert all(not tensor.any() for tensor in wanted.values())
    checkpoint.check_specs([TensorSpec.whole("model.c", tensors["model.c"])])
    with pytest.raises(CheckpointMismatch, match=r"model\.a: not in the model"):
        checkpoint.check_specs([TensorSpec.whole("model.c", tensors["model.c"])], all_names=True)
    many = [TensorSpec.whole(f"x{i}", torch.ones(1)) for i in range(500)]
    with pytest.raises(CheckpointMismatch, match="and 480 more") as caught:
        checkpoint.check_specs(many)
    assert len(str(caught.value)) < 4000


def test_a_target_that_does_not_fit_its_spec(tmp_path: Path) -> None:
    store = Store(tmp_path, owner="a")
    saved = save(store, 1)
    spec = store.open(1).specs()["model.w"]
    with pytest.raises(ConfigError, match=r"model\.w"):
        store.open(1).read_into([(spec, torch.zeros(2))])
    assert saved["model.w"].shape == (7, 3)


def test_a_newer_format_stops_instead_of_starting_afresh(tmp_path: Path) -> None:
    store = Store(tmp_path, owner="a")
    save(store, 1)
    path = tmp_path / "run" / "step-00000001" / "manifest.json"
    body = path.read_bytes()[: -len(',\n"manifest_digest": "sha256:"\n}\n') - 64]
    body = body.replace(b'"version": 1,', b'"version": 3,', 1)
    path.write_bytes(body + f',\n"manifest_digest": "sha256:{digest_of(body)}"\n}}\n'.encode())
    for action in (store.steps, store.newest, lambda: store.open(1)):
        with pytest.raises(CheckpointMismatch, match=r"format version 3.*Upgrade arc-dist"):
            action()
    (info,) = store.steps(include_damaged=True)
    assert info.newer_format


def test_objects_of_a_rank_that_did_not_save(tmp_path: Path) -> None:
    store = Store(tmp_path, owner="a")
    save(store, 1, world_size=2)
    with pytest.raises(StoreGone, match="written by 2 ranks"):
        store.open(1).objects(2)


@pytest.mark.parametrize(
    "objects",
    [{"x": float("nan")}, {"x": object()}, {"x": {1, 2}}, {"x": torch.ones(1)}],
    ids=["nan", "object", "set", "tensor"],
)
def test_objects_that_are_not_json(tmp_path: Path, objects: dict[str, Any]) -> None:
    store = Store(tmp_path)
    with pytest.raises(ConfigError, match="codec"):
        store.write_part(1, generation=0, rank=0, world_size=1, tensors=[], objects=objects)
    assert [f.name for f in files_of(tmp_path)] == ["attempt.json"]


@pytest.mark.parametrize(
    "shards",
    [
        [whole("a", torch.ones(1)), whole("a", torch.ones(1))],
        [ShardTensor(TensorSpec.whole("a", torch.ones(2)), torch.ones(3))],
        [ShardTensor(TensorSpec.whole("a", torch.ones(2)), torch.ones(2, dtype=torch.int32))],
        [whole("a", torch.ones(2, dtype=torch.complex128))],
        [whole("__metadata__", torch.ones(2))],
    ],
    ids=["twice", "shape", "dtype", "complex128", "reserved"],
)
def test_tensors_that_cannot_be_stored(tmp_path: Path, shards: list[ShardTensor]) -> None:
    with pytest.raises(ConfigError):
        Store(tmp_path).write_part(1, generation=0, rank=0, world_size=1, tensors=shards, objects={})


def test_numbers_that_make_no_sense(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for step, generation, rank, world_size in [(-1, 0, 0, 1), (1, -1, 0, 1), (1, 0, 1, 1), (1, 0, -1, 1)]:
        with pytest.raises(ConfigError):
            store.write_part(step, generation=generation, rank=rank, world_size=world_size, tensors=[], objects={})


@pytest.mark.parametrize("run", ["", ".", "..", "a/b", "../x", ".hidden", "step-00000001", "x" * 200, "a b", "ä"])
def test_names_of_runs(tmp_path: Path, run: str) -> None:
    with pytest.raises(ConfigError, match="run="):
        Store(tmp_path, run=run)


def test_urls_that_cannot_be_understood() -> None:
    for url in ("", "   ", "file://host/path"):
        with pytest.raises(ConfigError):
            Store(url)
    with pytest.raises(ConfigError, match="unknown kind of URL nosuch://"):
        Store("nosuch://bucket/x").check_writable()
    with pytest.raises(ConfigError, match="credentials do not belong in the URL") as caught:
        Store("s3://key:secret@bucket/x")
    assert "secret" not in str(caught.value)


def test_a_storage_without_exclusive_create_is_unsupported(tmp_path: Path) -> None:
    store = Store("http://localhost:1/x")
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        pytest.skip("aiohttp is not installed")
    with pytest.raises(Unsupported, match="commit could not be atomic"):
        store.check_writable()
    with pytest.raises(Unsupported):
        write(store)


def test_a_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = importlib.import_module("fsspec.registry")
    monkeypatch.delitem(registry._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)  # what `import s3fs` finds where it is not installed
    with pytest.raises(ConfigError, match=r'pip install "arc-dist\[s3\]"'):
        Store("s3://bucket/x").check_writable()


def test_memory_store_keeps_the_same_promises() -> None:
    store = Store("memory://arc-test", owner="a")
    store.check_writable()
    saved = save(store, 3, world_size=2)
    assert store.open(3).verify() == []
    assert set(store.open(3).specs()) == set(saved)
    store.commit(5, 0, 1, {0: write(store, 5)}, {"certified": True})
    store.commit(7, 0, 1, {0: write(store, 7)}, {"certified": True})
    assert store.prune(keep_last=2) == [3]
    assert [info.step for info in store.steps()] == [5, 7]


def test_the_state_is_not_copied(tmp_path: Path) -> None:
    """Writing 256 MiB takes a few MiB: blocks go from the buffer to the file."""
    tensor = torch.ones(64 << 20)
    store = Store(tmp_path)

    def peak_kib() -> int:
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])

    Path("/proc/self/clear_refs").write_text("5")
    before = peak_kib()
    part = store.write_part(1, generation=0, rank=0, world_size=1, tensors=[whole("w", tensor)], objects={})
    assert peak_kib() - before < 48 << 10
    assert part["tensors"][0]["nbytes"] == 256 << 20
