"""The store on S3 through s3fs, against moto's server; its commit is one conditional PUT."""

from __future__ import annotations

import concurrent.futures
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("s3fs", reason='s3fs is not installed: pip install "arc-dist[s3]"')
pytest.importorskip("moto", reason='moto is not installed: pip install "moto[server]"')

from arc_dist.checkpoint_store import SaveAborted, Store
from arc_dist.checkpoint_store.backends import RemoteBackend, remote
from arc_dist.checkpoint_store.format import step_directory
from arc_dist.checkpoint_store.references import remove_step
from arc_dist.checkpoint_store.transfer import copy_step
from arc_dist.errors import Fenced, StoreCorrupt, StoreDenied, StoreError, StoreGone, StoreTransient
from dedup_helpers import commit, large_state, require_equal, save_state, write
from real_s3 import recorded_requests
from s3_server import moto_server, new_bucket
from store_helpers import random_tensor, same_bits, save, whole

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with moto_server(tmp_path_factory.mktemp("moto") / "log") as url:
        yield url


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    return new_bucket(server, monkeypatch)


def keys(url: str) -> set[str]:
    import s3fs

    found = s3fs.S3FileSystem(use_listings_cache=False).find(url)
    return {str(key).removeprefix(url.removeprefix("s3://") + "/") for key in found}


def test_save_commit_list_verify_restore_prune(bucket: str) -> None:
    store = Store(f"{bucket}/deep/prefix/", owner="a")
    store.check_writable()
    assert store.steps() == []
    assert keys(bucket) == set()
    saved = {step: save(store, step, world_size=2) for step in (5, 10, 15)}
    assert [info.step for info in store.steps()] == [5, 10, 15]
    assert "deep/prefix/run/step-00000005/manifest.json" in keys(bucket)
    newest = store.newest()
    assert newest is not None
    assert newest.step == 15
    checkpoint = Store(f"{bucket}/deep/prefix").open(10)
    assert checkpoint.verify() == []
    names = list(saved[10])
    for name, tensor in zip(names, checkpoint.read([checkpoint.specs()[name] for name in names])):
        assert same_bits(tensor, saved[10][name]), name
    assert checkpoint.objects(1) == {"rank": 1, "step": 10}
    assert store.prune(keep_last=2) == [5]
    assert not any("step-00000005" in key for key in keys(bucket))


def test_a_large_shard_goes_up_in_parts(bucket: str) -> None:
    store = Store(bucket, owner="a")
    tensor = torch.arange(10 << 20, dtype=torch.int32)  # 40 MiB
    part = store.write_part(1, generation=0, rank=0, world_size=1, tensors=[whole("w", tensor)], objects={})
    store.commit(1, 0, 1, {0: part}, {"certified": True})
    checkpoint = store.open(1)
    (loaded,) = checkpoint.read([checkpoint.specs()["w"]])
    assert same_bits(loaded, tensor)


def test_an_aborted_upload_leaves_no_shard(bucket: str) -> None:
    store = Store(bucket, owner="a")
    tensor = torch.ones(10 << 20)
    calls = iter(range(1000))
    with pytest.raises(SaveAborted):
        store.write_part(
            1,
            generation=0,
            rank=0,
            world_size=1,
            tensors=[whole("w", tensor)],
            objects={},
            should_abort=lambda: next(calls) > 8,
        )
    assert keys(bucket) == {"run/step-00000001/attempt.json"}


def test_of_racing_creates_exactly_one_wins(bucket: str) -> None:
    backends = [RemoteBackend(bucket) for _ in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(b.create_exclusive, "x/manifest.json", f"{i}".encode()) for i, b in enumerate(backends)]
        won = [index for index, job in enumerate(jobs) if job.result()]
    assert len(won) == 1
    assert backends[0].read("x/manifest.json", 10) == f"{won[0]}".encode()


def test_a_second_commit_is_idempotent_or_fenced(bucket: str) -> None:
    store = Store(bucket, owner="a")
    tensors = [whole("w", torch.ones(4))]
    part = store.write_part(1, generation=0, rank=0, world_size=1, tensors=tensors, objects={})
    store.commit(1, 0, 1, {0: part}, {"certified": True})
    store.commit(1, 0, 1, {0: part}, {"certified": True})
    with pytest.raises((Fenced, StoreError)):
        store.commit(1, 0, 1, {0: {**part, "tensors": []}}, {"certified": True})
    other = Store(bucket, owner="b")
    second = other.write_part(1, generation=0, rank=0, world_size=1, tensors=tensors, objects={})
    assert second["directory"] == "step-00000001.g0"


def test_damage_is_found(bucket: str) -> None:
    import s3fs

    store = Store(bucket, owner="a")
    save(store, 1, world_size=2)
    fs = s3fs.S3FileSystem(use_listings_cache=False)
    for key in sorted(keys(bucket)):
        path = f"{bucket}/{key}"
        original = fs.cat_file(path)
        for altered in (original[:-1] + bytes([original[-1] ^ 1]), original[:-1]):
            fs.pipe_file(path, altered)
            try:
                assert store.open(1).verify() != [], key
            except StoreCorrupt:
                assert key.endswith("manifest.json")
        fs.pipe_file(path, original)
    assert store.open(1).verify() == []


def test_a_bucket_that_does_not_exist(bucket: str) -> None:
    store = Store(f"{bucket}-missing/x")
    for action in (store.check_writable, store.steps, store.newest):
        with pytest.raises(StoreGone, match=r"Create (the bucket|it)"):
            action()


def test_without_credentials(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(StoreDenied, match="Check the credentials"):
        Store(bucket).check_writable()


def test_a_service_that_is_not_there(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(StoreTransient) as caught:
            Store(bucket).check_writable()
    assert time.monotonic() - began < 60
    assert "FakeSecret" not in str(caught.value)


def test_no_secret_appears_in_files_or_errors(bucket: str) -> None:
    import s3fs

    save(Store(bucket, owner="a"), 1)
    fs = s3fs.S3FileSystem(use_listings_cache=False)
    for key in keys(bucket):
        content = fs.cat_file(f"{bucket}/{key}")
        assert b"FakeSecret" not in content
        assert b"FakeAccessKeyId" not in content


def test_references_are_kept_resolved_and_removed(bucket: str) -> None:
    store, state = Store(bucket, owner="o", dedup=True), large_state()
    store.check_writable()
    for step in range(1, 4):
        save_state(store, step, {**state, "model.0": random_tensor((4096, 8), seed=step)})
    assert store.manifest(3).refers_to == (step_directory(1),)
    assert store.prune(keep_last=2) == []  # of the three, the oldest is referred to
    parts = write(store, 4, state)
    assert remove_step(store.backend, "run", step_directory(1)) == [step_directory(n) for n in (2, 3, 4)]
    commit(store, 4, parts)
    require_equal(store, 4, state)
    copied = Store(f"{bucket}/copy")
    copy_step(store.backend, "run", step_directory(4), copied.backend)
    assert copied.manifest(4).refers_to == ()
    for step in (5, 6):
        save_state(store, step, large_state(seed=step))
    assert store.prune(keep_last=2) == [1, 2, 3, 4]
    require_equal(copied, 4, state)
    require_equal(store, 6, large_state(seed=6))


def test_a_job_takes_over_a_run_that_has_not_begun(bucket: str) -> None:
    """There is no directory of it, which is what no local disk shows."""
    for count in (1, 2):
        store = Store(f"{bucket}/new", owner=f"job-{count}")
        store.check_writable()
        store.take_over()
    assert keys(f"{bucket}/new/run") == {"owner-00000001.json", "owner-00000002.json"}
    with pytest.raises(StoreGone, match=r"Create (the bucket|it)"):
        Store(f"{bucket}-missing/new", owner="job").take_over()


def test_backends_of_one_service_share_a_client(bucket: str) -> None:
    first = RemoteBackend(bucket)
    assert not first.exists("x")
    assert RemoteBackend(f"{bucket}/elsewhere")._fs() is first._fs()
    assert remote._OPTIONS["s3"]["config_kwargs"]["retries"] == {"max_attempts": 3}, "botocore changes what it gets"


def test_finding_the_newest_and_committing_look_at_few_steps(bucket: str) -> None:
    """However many steps there are: a request to an object store takes tens of milliseconds."""
    store = Store(bucket, owner="a")
    for step in range(1, 10):
        save(store, step)
    backend = RemoteBackend(bucket)
    with recorded_requests(backend._fs()) as sent:
        newest = store.newest()
    assert newest is not None and newest.step == 9
    assert 0 < len(sent) <= 12, sent
    with recorded_requests(backend._fs()) as sent:
        save(store, 10)
    looked_at = {key.split("/")[1] for _, key in sent if "step-" in key}
    assert {"step-00000010"} < looked_at <= {"step-00000009", "step-00000010"}
