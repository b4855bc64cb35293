"""Training into a real S3 service (Ceph's radosgw): whole jobs, and what they do when it is full or does not answer."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("s3fs", reason='s3fs is not installed: pip install "arc-dist[s3]"')

from arc_dist import Store
from arc_dist.checkpoint_store.commands import OK
from jobs import Job
from ranks import run_ranks
from real_s3 import keys, needs_ceph, new_bucket, use
from services import ceph
from test_store_commands import arc
from toy import Toy, guarded, plain

pytestmark = [pytest.mark.soak, pytest.mark.timeout(400), needs_ceph]
TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def cluster() -> Iterator[ceph.Cluster]:
    with ceph.running() as found:
        yield found


@pytest.fixture
def bucket(cluster: ceph.Cluster, monkeypatch: pytest.MonkeyPatch) -> str:
    use(cluster, monkeypatch)
    return new_bucket()


def train_body(rank: int, world_size: int, toy: Toy, url: str) -> tuple[int, str]:
    """Trains to the end, from the newest checkpoint there is; how many steps that took, and the state at the end."""
    job = guarded(toy, store=url, checkpoint_every=10)
    count = 0
    for _ in job.steps:
        count += 1
        job.arc._engine._checkpointer.wait()
    return count, job.digest()


def plain_body(rank: int, world_size: int, toy: Toy) -> str:
    return plain(toy)[0]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_save_and_go_on_where_they_were(
    bucket: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = Toy(kind=kind, steps=30)
    longer = dataclasses.replace(toy, steps=45)
    first = run_ranks(2, train_body, toy, f"{bucket}/runs", timeout_s=200)
    assert [digest for _, digest in first] == run_ranks(2, plain_body, toy)
    store = Store(f"{bucket}/runs")
    assert [info.step for info in store.steps()] == [10, 20, 30]
    second = run_ranks(2, train_body, longer, f"{bucket}/runs", timeout_s=200)
    assert [count for count, _ in second] == [15, 15], "it went on behind step 30"
    assert [digest for _, digest in second] == run_ranks(2, plain_body, longer)
    # The commands, on what the job has written.
    assert arc("ls", store.url) == OK
    listed = capsys.readouterr().out
    steps = [info.step for info in store.steps()]
    assert steps[-1] >= 40 and all(str(step) in listed for step in steps)
    assert arc("verify", store.url) == OK
    assert arc("copy", store.url, str(tmp_path / "copy"), "--verify") == OK
    assert [info.step for info in Store(tmp_path / "copy").steps()] == steps
    assert arc("copy", str(tmp_path / "copy"), f"{bucket}/back") == OK
    assert arc("diff", store.url, f"{bucket}/back") == OK
    assert arc("prune", store.url, "--keep", "last=2") == OK
    assert [info.step for info in store.steps()] == steps[-2:]
    left = {key.split("/")[1] for key in keys(f"{bucket}/runs") if "step-" in key}
    assert left == {f"step-{step:08d}" for step in steps[-2:]}


def test_a_bucket_over_its_quota_sends_saves_to_the_next_tier_until_there_is_room(
    cluster: ceph.Cluster, bucket: str, tmp_path: Path
) -> None:
    (tmp_path / "local").mkdir()
    toy = Toy(steps=40)
    job = guarded(toy, store=f"{bucket}, {tmp_path}/local", checkpoint_every=10)
    told: list[tuple[str, int]] = []
    record = job.arc._engine.record
    job.arc._engine.record = lambda **fields: (told.append((fields["kind"], fields["step"])), record(**fields))
    for count, _ in enumerate(job.steps, 1):
        job.arc._engine._checkpointer.wait()
        if count == 15:
            cluster.set_bucket_quota(bucket.removeprefix("s3://"), 4096)
        elif count == 35:
            cluster.set_bucket_quota(bucket.removeprefix("s3://"), None)
    assert count == 40
    assert job.digest() == plain(toy)[0]
    full = [step for kind, step in told if kind == "tier_full"]
    assert full and set(full) <= {20, 30}, told
    in_bucket = [info.step for info in Store(bucket).steps()]
    assert in_bucket == [step for step in (10, 20, 30, 40) if step not in full]
    assert in_bucket[-1] == 40, "used again"
    in_local = [info.step for info in Store(tmp_path / "local").steps()]
    assert set(full) < set(in_local) and in_local[-1] == 40, "the newest is brought to every tier"
    assert Store(tmp_path / "local").open(full[0]).verify() == []


FULL_JOB = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from toy import Toy, guarded
stores, room = sys.argv[2], Path(sys.argv[3])
toy = Toy(steps=60)
job = guarded(toy, store=stores, checkpoint_every=10, save_timeout_s=5.0)
for count, _ in enumerate(job.steps, 1):
    if count == 15:
        job.arc._engine._checkpointer.wait()
        print("at 15", flush=True)
        while not room.exists():
            time.sleep(0.05)
    if count > 15:
        time.sleep(0.5)
print("committed", job.arc._engine._checkpointer.committed, flush=True)
print("digest", job.digest(), flush=True)
"""


@pytest.mark.parametrize("with_local", [False, True], ids=["alone", "with a local tier"])
def test_a_full_cluster_holds_up_neither_training_nor_the_end_of_the_job(
    cluster: ceph.Cluster, bucket: str, tmp_path: Path, with_local: bool
) -> None:
    """It answers no PUT while it is full: that is what a full Ceph does."""
    (tmp_path / "local").mkdir()
    (tmp_path / "job.py").write_text(FULL_JOB)
    stores = f"{bucket}, {tmp_path}/local" if with_local else bucket
    with Job([sys.executable, str(tmp_path / "job.py"), str(TESTS), stores, str(tmp_path / "go")]) as job:
        job.wait_for(lambda: "at 15" in job.stdout(), 100, "step 15")
        cluster.set_full(True)
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                subprocess.run([sys.executable, "-c", PUT, bucket], timeout=15)  # the fault: a PUT hangs
            (tmp_path / "go").touch()
            done = job.wait(200)
        finally:
            cluster.set_full(False)
    assert done.exit_code == 0, done
    assert f"digest {plain(Toy(steps=60))[0]}" in done.stdout, done
    assert "not answer" in done.stderr or "too slow" in done.stderr, done
    assert [info.step for info in Store(bucket).steps()] == [10]
    assert Store(bucket).open(10).verify() == []
    if with_local:
        steps = [info.step for info in Store(tmp_path / "local").steps()]
        assert steps[-1] == 60, (steps, done)
        assert Store(tmp_path / "local").open(60).verify() == []
    # Room again: the next job saves there.
    assert guarded_to_end(Toy(steps=70), bucket) == 70


PUT = "import sys, s3fs; s3fs.S3FileSystem().pipe_file(sys.argv[1] + '/probe', b'x')"


def guarded_to_end(toy: Toy, url: str) -> int:
    for _ in guarded(toy, store=url, checkpoint_every=10).steps:
        pass
    return [info.step for info in Store(url).steps()][-1]
