"""The store on a real S3 service: Ceph's radosgw, started for these tests. What training does there is in
test_real_s3_training.py."""

from __future__ import annotations

import concurrent.futures
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("s3fs", reason='s3fs is not installed: pip install "arc-dist[s3]"')

from arc_dist.checkpoint_store import Store, contract
from arc_dist.checkpoint_store.backends import RemoteBackend
from arc_dist.checkpoint_store.retry import Retries, retrying
from arc_dist.errors import Fenced, StoreDenied, StoreFull, StoreTransient
from ranks import run_ranks
from real_s3 import client, keys, needs_ceph, new_bucket, recorded_requests, use
from services import ceph
from store_helpers import same_bits, save, whole

pytestmark = [pytest.mark.soak, pytest.mark.timeout(300), needs_ceph]
TESTS = Path(__file__).resolve().parent
RACERS = 8


@pytest.fixture(scope="module")
def cluster() -> Iterator[ceph.Cluster]:
    with ceph.running() as found:
        yield found


@pytest.fixture
def bucket(cluster: ceph.Cluster, monkeypatch: pytest.MonkeyPatch) -> str:
    use(cluster, monkeypatch)
    return new_bucket()


def large(mebibytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 1 << 30, (mebibytes << 18,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed)
    )


def commit_one(store: Store, step: int, tensor: torch.Tensor) -> None:
    part = store.write_part(step, generation=0, rank=0, world_size=1, tensors=[whole("w", tensor)], objects={})
    store.commit(step, 0, 1, {0: part}, {"certified": True})


def require_no_uploads(bucket: str) -> None:
    """Parts whose upload was neither joined nor aborted are in no listing of keys, and cost money."""
    assert client().list_multipart_uploads(bucket.removeprefix("s3://")) == []


def require_equal(store: Store, step: int, tensor: torch.Tensor) -> None:
    checkpoint = store.open(step)
    (loaded,) = checkpoint.read([checkpoint.specs()["w"]])
    assert same_bits(loaded, tensor)


# ---------------------------------------------------------------------- the service itself


def test_a_killed_starter_leaves_no_process_and_no_directory(tmp_path: Path) -> None:
    log = tmp_path / "out"
    with log.open("w") as output:
        starter = subprocess.Popen(
            [sys.executable, str(TESTS / "services" / "ceph.py")],
            stdout=output,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        )
    wait_for(lambda: "ready" in log.read_text() or starter.poll() is not None, 120)
    assert starter.poll() is None, log.read_text()
    (directory,) = tmp_path.glob("arc-ceph-*")
    assert len(processes_of(directory)) >= 3, "monitor, OSD and gateway"
    os.kill(starter.pid, signal.SIGKILL)
    assert starter.wait(10) == -signal.SIGKILL
    wait_for(lambda: not directory.exists() and not processes_of(directory), 60)


def processes_of(directory: Path) -> list[int]:
    """Live processes that name the directory in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if str(directory).encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                pass  # ended while we looked
    return found


def wait_for(condition: Any, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


# ---------------------------------------------------------------------- the contract


@pytest.mark.parametrize("case", contract.cases(), ids=[case.name for case in contract.cases()])
def test_contract(case: contract.Case, bucket: str) -> None:
    backend = RemoteBackend(f"{bucket}/some/prefix")
    if not all(getattr(backend.capabilities, name) for name in case.needs):
        assert set(case.needs) <= {"reserve", "private"}, "what object stores do not have, and nothing else"
        return
    case.run(backend)
    assert keys(bucket) == set(), "a case cleans up behind itself"


def test_the_contract_runs_on_storage_named_in_the_environment(bucket: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "test_store_contract.py")]
    environ = {**os.environ, "ARC_TEST_STORES": f"{bucket}/own"}
    # Not in the checkout, whose package would come before an installed one that is to be tested.
    done = subprocess.run(
        [*command, "-k", "of_ones_own"], env=environ, capture_output=True, text=True, timeout=250, cwd=TESTS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(contract.cases())} passed" in done.stdout


# ---------------------------------------------------------------------- commits


def test_what_commits_is_never_sent_in_parts(bucket: str) -> None:
    """The gateway joins parts without a look at If-None-Match, so a commit that was sent in parts would not be one."""
    backend = RemoteBackend(bucket)
    with recorded_requests(backend._fs()) as sent:
        commit_one(Store(bucket, owner="a"), 1, torch.ones(4))
        assert backend.create_exclusive("run/marks-00000001.json", bytes(120 << 20))
        assert not backend.create_exclusive("run/marks-00000001.json", b"late")
    assert any(key.endswith("manifest.json") for _, key in sent), "the hook must have seen it"
    assert {name for name, _ in sent if "Multipart" in name or "Part" in name} == set()
    with recorded_requests(backend._fs()) as sent:
        commit_one(Store(bucket, owner="a"), 2, large(40))
    in_parts = {key for name, key in sent if name == "CompleteMultipartUpload"}
    assert in_parts == {"run/step-00000002/rank-00000.safetensors"}
    names = [(name, key.rsplit("/", 1)[-1]) for name, key in sent]
    claimed = names.index(("PutObject", "rank-00000.safetensors.claim"))
    assert claimed < names.index(("CompleteMultipartUpload", "rank-00000.safetensors")) < len(names)


def race_body(rank: int, world_size: int, url: str, parts: dict[int, Any]) -> str:
    store = Store(url, owner="a")
    store.check_writable()
    part = {**parts[0], "host": f"host-{rank}"}
    # The same attempt with other objects: what a second, mistaken committer of this directory would send.
    part["files"] = [
        {**file, "digest": f"{rank:064x}"} if file["kind"] == "objects" else file for file in part["files"]
    ]
    torch.distributed.barrier()
    try:
        store.commit(1, 0, 1, {0: part}, {"certified": True, "winner": rank})
    except Fenced:
        return "fenced"
    return "won"


def test_of_8_processes_that_commit_one_step_exactly_one_wins(bucket: str) -> None:
    store = Store(bucket, owner="a")
    part = store.write_part(1, generation=0, rank=0, world_size=1, tensors=[whole("w", torch.ones(4))], objects={})
    outcomes = run_ranks(RACERS, race_body, bucket, {0: part}, timeout_s=120)
    assert sorted(outcomes) == ["fenced"] * (RACERS - 1) + ["won"]
    manifest = store.manifest(1)
    winner = outcomes.index("won")
    assert (manifest.meta["winner"], manifest.hosts) == (winner, {0: f"host-{winner}"}) or manifest.meta[
        "winner"
    ] == winner
    assert next(f.digest for f in manifest.files if f.kind == "objects") == f"{winner:064x}"


def claim_body(rank: int, world_size: int, url: str) -> bool:
    backend = RemoteBackend(url)
    backend.exists("")
    torch.distributed.barrier()
    return backend.create_exclusive("run/step-00000001/manifest.json", f"{rank}".encode() * 100_000)


def test_of_8_processes_that_create_one_object_exactly_one_is_told_so(bucket: str) -> None:
    outcomes = run_ranks(RACERS, claim_body, bucket, timeout_s=120)
    assert sorted(outcomes) == [False] * (RACERS - 1) + [True]
    wanted = f"{outcomes.index(True)}".encode() * 100_000
    assert RemoteBackend(bucket).read("run/step-00000001/manifest.json", 1 << 20) == wanted


def test_of_racing_uploads_in_parts_one_wins_and_the_others_leave_nothing(bucket: str) -> None:
    """The gateway would let each of them join its parts."""
    num_racers, path = 4, "run/step-00000001/rank-00000.safetensors"
    begun = threading.Barrier(num_racers)

    def race(index: int) -> bool:
        sink = RemoteBackend(bucket).create(path, 20 << 20, exclusive=True)
        try:
            sink.write(memoryview(bytes([index]) * (20 << 20)))
            begun.wait(120)
            sink.publish()
        except Fenced:
            sink.discard()
            return False
        return True

    with concurrent.futures.ThreadPoolExecutor(num_racers) as pool:
        won = list(pool.map(race, range(num_racers)))
    assert won.count(True) == 1
    assert client().cat_file(f"{bucket}/{path}") == bytes([won.index(True)]) * (20 << 20)
    assert keys(bucket) == {path, f"{path}.claim"}
    require_no_uploads(bucket)


# ---------------------------------------------------------------------- quota


def test_a_bucket_over_its_quota_is_full_and_usable_again(cluster: ceph.Cluster, bucket: str) -> None:
    store = Store(bucket, owner="a")
    commit_one(store, 1, large(1))
    cluster.set_bucket_quota(bucket.removeprefix("s3://"), 2 << 20)
    for mebibytes in (2, 40):  # in one request, and in parts
        with pytest.raises(StoreFull, match=r"QuotaExceeded\. Raise the quota"):
            commit_one(store, 2, large(mebibytes))
    assert [info.step for info in store.steps()] == [1]
    assert not any(key.endswith((".safetensors", ".claim")) for key in keys(f"{bucket}/run/step-00000002"))
    require_no_uploads(bucket)
    cluster.set_bucket_quota(bucket.removeprefix("s3://"), None)
    commit_one(store, 2, large(40))
    require_equal(store, 2, large(40))
    require_equal(store, 1, large(1))


# ---------------------------------------------------------------------- rights


def test_a_wrong_secret_is_denied_and_never_shown(
    cluster: ceph.Cluster, bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(Store(bucket, owner="a"), 1, world_size=2)
    for key in keys(bucket):
        content = client().cat_file(f"{bucket}/{key}")
        assert cluster.user.secret_key.encode() not in content and cluster.user.access_key.encode() not in content
    wrong = ceph.User(name="tester", access_key=cluster.user.access_key, secret_key="WrongSecret" + "x" * 29)
    use(cluster, monkeypatch, wrong)
    caplog.set_level(logging.DEBUG, logger="arc_dist")
    store = Store(bucket, owner="b")
    for action in (store.check_writable, store.steps, store.newest, lambda: store.open(1), lambda: save(store, 2)):
        with pytest.raises(StoreDenied, match="Check the credentials and the rights") as caught:
            action()
        text = f"{caught.value!r} {caught.value} {caught.value.fields}"
        assert "WrongSecret" not in text
    assert "WrongSecret" not in caplog.text
    command = [sys.executable, "-c", "import sys; from arc_dist.cli import main; sys.exit(main())", "ls", bucket]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert "Check the credentials" in done.stdout + done.stderr
    assert "WrongSecret" not in done.stdout + done.stderr
    use(cluster, monkeypatch)
    assert [info.step for info in Store(bucket).steps()] == [1], "nothing was written"


def test_another_user_may_not_write(cluster: ceph.Cluster, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(cluster, monkeypatch, cluster.add_user(f"other-{time.monotonic_ns()}"))
    with pytest.raises(StoreDenied, match=r"AccessDenied\. Check the credentials"):
        Store(bucket, owner="b").check_writable()


# What `credential_process` in a configuration file runs: it takes a role for some seconds and notes what it got.
CREDENTIALS = """
import botocore.config, botocore.session, datetime, json, sys
endpoint, key, secret, seconds, log = sys.argv[1:]
sts = botocore.session.Session().create_client(
    "sts", endpoint_url=endpoint, region_name="default", aws_access_key_id=key, aws_secret_access_key=secret,
    config=botocore.config.Config(parameter_validation=False))  # it would refuse less than 900 s
got = sts.assume_role(RoleArn="arn:aws:iam:::role/saver", RoleSessionName="saver", DurationSeconds=int(seconds))
got = got["Credentials"]
got["Expiration"] = got["Expiration"].astimezone(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
line = json.dumps({"Version": 1, **got})
print(line, file=open(log, "a"))
print(line)
"""
LIFETIME_S = 8
TRUST = {"Effect": "Allow", "Principal": {"AWS": ["arn:aws:iam:::user/tester"]}, "Action": ["sts:AssumeRole"]}
ALLOW = {"Effect": "Allow", "Action": ["s3:*"], "Resource": "arn:aws:s3:::*"}


def test_credentials_that_expire_are_fetched_anew(
    cluster: ceph.Cluster, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short-lived credentials, as instance roles and `aws sso` give them, from `credential_process`."""
    import s3fs

    policies = [json.dumps({"Version": "2012-10-17", "Statement": [statement]}) for statement in (TRUST, ALLOW)]
    cluster.admin("role", "create", "--role-name=saver", f"--assume-role-policy-doc={policies[0]}")
    cluster.admin("role-policy", "put", "--role-name=saver", "--policy-name=all", f"--policy-doc={policies[1]}")
    (tmp_path / "fetch.py").write_text(CREDENTIALS)
    user, log = cluster.user, tmp_path / "log"
    command = (
        f"{sys.executable} {tmp_path}/fetch.py {cluster.endpoint} {user.access_key} {user.secret_key} {LIFETIME_S}"
    )
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {command} {log}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    s3fs.S3FileSystem.clear_instance_cache()
    backend = RemoteBackend(bucket)  # botocore asks anew before every request: so short a time is always nearly over
    assert backend.create_exclusive("first", b"1")
    time.sleep(LIFETIME_S + 2)
    first = json.loads(log.read_text().splitlines()[0])
    old = s3fs.S3FileSystem(
        key=first["AccessKeyId"], secret=first["SecretAccessKey"], token=first["SessionToken"], use_listings_cache=False
    )
    with pytest.raises(PermissionError):  # they have expired for the service too
        old.ls(bucket)
    assert backend.create_exclusive("second", b"2")  # the same client as before
    assert backend.read("second", 10) == b"2"
    assert len(log.read_text().splitlines()) >= 2, "fetched anew"


# ---------------------------------------------------------------------- a gateway that dies


def test_a_gateway_killed_in_an_upload_and_started_again(cluster: ceph.Cluster, bucket: str) -> None:
    """A save is tried again as the checkpointer does it; whatever comes of it, only a commit makes a checkpoint."""
    store = Store(bucket, owner="a")
    commit_one(store, 1, large(1))
    tensor = large(96)
    fired: list[int] = []
    blocks = iter(range(100_000))
    restart = threading.Thread(target=cluster.start_gateway)

    def at_block() -> bool:
        if next(blocks) == 12:  # 48 MiB: in the third part
            fired.append(cluster.kill_gateway())
            restart.start()
        return False

    def write() -> dict[str, Any]:
        return store.write_part(
            2,
            generation=0,
            rank=0,
            world_size=1,
            tensors=[whole("w", tensor)],
            objects={},
            should_abort=at_block,
        )

    try:
        part = retrying(write, Retries(first_pause_s=3.0))  # on a busy machine a gateway takes 10 s to start
    finally:
        restart.join(120)
    assert fired == [-signal.SIGKILL], "the fault must have fired"
    assert [info.step for info in store.steps()] == [1], "not committed, so no checkpoint"
    store.commit(2, 0, 1, {0: part}, {"certified": True})
    require_equal(store, 2, tensor)
    commit_one(store, 3, large(1, seed=3))
    require_equal(store, 3, large(1, seed=3))


def test_a_gateway_that_stays_away_ends_the_save_and_leaves_no_checkpoint(cluster: ceph.Cluster, bucket: str) -> None:
    store = Store(bucket, owner="a")
    commit_one(store, 1, large(1))
    fired: list[int] = []
    blocks = iter(range(100_000))

    def at_block() -> bool:
        if next(blocks) == 12:
            fired.append(cluster.kill_gateway())
        return False

    try:
        with pytest.raises(StoreTransient, match="may succeed when tried again") as caught:
            store.write_part(
                2,
                generation=0,
                rank=0,
                world_size=1,
                tensors=[whole("w", large(96))],
                objects={},
                should_abort=at_block,
            )
        assert fired == [-signal.SIGKILL], "the fault must have fired"
        assert cluster.user.secret_key not in str(caught.value)
    finally:
        cluster.start_gateway()
    assert [info.step for info in store.steps(include_damaged=True)] == [1]
    assert keys(f"{bucket}/run/step-00000002") == {"attempt.json"}
    commit_one(store, 2, large(1, seed=2))
    require_equal(store, 2, large(1, seed=2))


def test_writers_and_readers_on_many_threads(bucket: str) -> None:
    store = Store(bucket, owner="a")
    states = {step: large(24, seed=step) for step in range(1, 5)}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda step: commit_one(store, step, states[step]), states))
        list(pool.map(lambda step: require_equal(store, step, states[step]), states))
    assert all(store.open(step).verify() == [] for step in states)
    assert json.loads(client().cat_file(f"{bucket}/run/step-00000001/attempt.json"))["owner"] == "a"
