"""A step exists once its manifest does: claims, fences, racing commits, aborted saves, crashes, retention."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from arc_dist.checkpoint_store import SaveAborted, Store, default_commit
from arc_dist.checkpoint_store.backends import LocalBackend
from arc_dist.errors import ConfigError, Fenced, StoreError, StoreGone
from store_helpers import files_of, rows, save, state, whole


@pytest.fixture
def root(tmp_path: Path) -> Path:
    Store(tmp_path / "ckpt").check_writable()
    return tmp_path / "ckpt"


def write(store: Store, step: int, *, generation: int = 0, world_size: int = 1, value: float = 1.0) -> dict[int, Any]:
    tensors = [whole("w", torch.full((4,), value)), whole("v", torch.full((2,), value))]
    return {
        rank: store.write_part(
            step, generation=generation, rank=rank, world_size=world_size, tensors=tensors, objects={"value": value}
        )
        for rank in range(world_size)
    }


def value_of(store: Store, step: int) -> float:
    checkpoint = store.open(step)
    return float(checkpoint.read([checkpoint.specs()["w"]])[0][0])


def test_a_step_does_not_exist_before_its_commit(root: Path) -> None:
    store = Store(root, owner="a")
    parts = write(store, 3, world_size=2)
    assert store.steps() == []
    assert store.newest() is None
    with pytest.raises(StoreGone):
        store.open(3)
    store.commit(3, 0, 2, parts, {"certified": True, "epoch": 2, "best": float("inf")})
    (info,) = store.steps()
    assert (info.step, info.world_size, info.generation, info.certified) == (3, 2, 0, True)
    assert info.nbytes == sum(f.stat().st_size for f in files_of(root) if f.name != "manifest.json")
    assert store.open(3).meta == {"certified": True, "epoch": 2, "best": float("inf")}
    assert store.open(3).objects(1) == {"value": 1.0}
    manifest = store.manifest(3)
    assert manifest.parent is None
    assert set(manifest.hosts) == {"0", "1"}
    store.commit(9, 0, 1, write(store, 9), {})
    assert store.manifest(9).parent == 3
    assert store.manifest(9).certified is False


def test_files_are_private_and_no_draft_stays(root: Path) -> None:
    save(Store(root, owner="a"), 3, world_size=2)
    for path in root.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path
        assert not path.name.startswith("."), path


def test_parts_travel_as_json_to_the_coordinators_port(root: Path) -> None:
    store = Store(root, run="exp-1", owner="a")
    parts = json.loads(json.dumps({str(rank): part for rank, part in write(store, 3, world_size=2).items()}))
    default_commit(store.url, 3, 0, 2, parts, {"certified": True})
    assert [info.step for info in store.steps()] == [3]
    assert Store(root).steps() == []  # another run


def test_replicated_tensors_are_written_once(root: Path) -> None:
    store = Store(root, owner="a")
    parts = write(store, 3, world_size=4)
    written = [row["name"] for part in parts.values() for row in part["tensors"]]
    assert sorted(written) == ["v", "w"]


def test_a_commit_sent_twice_succeeds_twice(root: Path) -> None:
    store = Store(root, owner="a")
    parts = write(store, 3)
    store.commit(3, 0, 1, parts, {"certified": True})
    before = [f.read_bytes() for f in files_of(root)]
    store.commit(3, 0, 1, parts, {"certified": True})
    assert [f.read_bytes() for f in files_of(root)] == before


def test_of_racing_commits_exactly_one_wins(root: Path) -> None:
    store = Store(root, owner="a")
    parts = write(store, 3)
    # The same attempt, claimed by eight committers that each say something else about it.
    start = threading.Barrier(8)
    manifests: list[bytes] = []
    create = LocalBackend.create_exclusive

    class Racer(LocalBackend):
        def create_exclusive(self, path: str, data: bytes) -> bool:
            manifests.append(data)
            start.wait(20)
            return create(self, path, data)

    def commit(number: int) -> None:
        mine = Store(root)
        mine._backend = mine._catalog._backend = Racer(root)
        mine.commit(3, 0, 1, parts, {"certified": True, "number": number})

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for job in [pool.submit(commit, number) for number in range(8)]:
            job.result()
    assert len(set(manifests)) == 8
    present = (root / "run" / "step-00000003" / "manifest.json").read_bytes()
    assert manifests.count(present) == 1
    assert store.open(3).verify() == []


def test_a_second_attempt_goes_to_a_directory_of_its_own(root: Path) -> None:
    first = Store(root, owner="a")
    write(first, 3, generation=0, value=1.0)  # dies before the commit
    parts = write(first, 3, generation=1, value=2.0)
    first.commit(3, 1, 1, parts, {"certified": True})
    assert sorted(p.name for p in (root / "run").iterdir()) == ["step-00000003", "step-00000003.g1"]
    assert value_of(first, 3) == 2.0
    # Another start of the job, whose generations begin at 0 again.
    other = Store(root, owner="b")
    parts = write(other, 3, generation=0, value=3.0)
    other.commit(3, 0, 1, parts, {"certified": True})
    assert value_of(other, 3) == 3.0
    third = Store(root, owner="c")
    third.commit(3, 0, 1, write(third, 3, value=4.0), {"certified": True})
    assert value_of(third, 3) == 4.0
    assert [info.step for info in third.steps()] == [3]


def test_a_generation_that_rolled_back_commits_the_same_step_again(root: Path) -> None:
    store = Store(root, owner="a")
    for value in (1.0, 2.0, 3.0, 4.0):
        store.commit(3, 0, 2, write(store, 3, world_size=2, value=value), {"certified": True})
        assert value_of(store, 3) == value


def test_a_clock_set_back_does_not_bring_an_old_commit_forward(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(root, owner="a")
    store.commit(3, 0, 1, write(store, 3, value=1.0), {"certified": True})
    monkeypatch.setattr("time.time", lambda: 1000.0)
    store.commit(3, 1, 1, write(store, 3, generation=1, value=2.0), {"certified": True})
    assert value_of(store, 3) == 2.0


def test_all_ranks_of_an_attempt_find_the_same_directory(root: Path) -> None:
    for round_number in range(5):
        (root / "run").mkdir(exist_ok=True)
        (root / "run" / "step-00000007").mkdir(exist_ok=True)  # foreign and empty
        (root / "run" / "step-00000007" / "notes.txt").write_text("mine")
        start = threading.Barrier(6)

        def part(rank: int, owner: str = f"start {round_number}", start: threading.Barrier = start) -> str:
            store = Store(root, owner=owner)
            start.wait(20)
            tensors = [whole("w", torch.ones(4))]
            return store.write_part(7, generation=2, rank=rank, world_size=6, tensors=tensors, objects={})["directory"]

        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            directories = {job.result() for job in [pool.submit(part, rank) for rank in range(6)]}
        assert len(directories) == 1
    assert (root / "run" / "step-00000007" / "notes.txt").read_text() == "mine"


def test_two_processes_cannot_write_one_rank_of_one_attempt(root: Path) -> None:
    write(Store(root, owner="a"), 3)
    before = [f.read_bytes() for f in files_of(root)]
    with pytest.raises(Fenced, match="Two runs must not share one run name"):
        write(Store(root, owner="a"), 3, value=9.0)
    assert [f.read_bytes() for f in files_of(root)] == before


def test_a_generation_that_is_over_cannot_commit(root: Path) -> None:
    store = Store(root, owner="a")
    old = write(store, 3, generation=0)
    store.commit(5, 1, 1, write(store, 5, generation=1), {"certified": True})
    with pytest.raises(Fenced, match="generation 0 is over"):
        store.commit(3, 0, 1, old, {"certified": True})
    assert [info.step for info in store.steps()] == [5]


def test_ranks_of_several_processes_need_an_owner(root: Path) -> None:
    with pytest.raises(ConfigError, match="owner"):
        write(Store(root), 3, world_size=2)
    store = Store(root)
    store.commit(3, 0, 1, write(store, 3), {})


def test_commit_refuses_parts_that_do_not_fit(root: Path) -> None:
    store = Store(root, owner="a")
    parts = write(store, 3, world_size=2)
    other = write(store, 4, world_size=2)
    bad: list[dict[Any, Any]] = [
        {0: parts[0]},
        {0: parts[0], 1: other[1]},
        {0: parts[0], 1: parts[0]},
        {0: parts[0], 1: {**parts[1], "owner": "b"}},
        {0: parts[0], 1: {**parts[1], "directory": "step-00000003.g1"}},
        {0: parts[0], 1: {**parts[1], "replicated": "0" * 64}},
        {0: parts[0], 1: {**parts[1], "tensors": []}},
        {0: parts[0], 1: {**parts[1], "files": []}},
        {0: {**parts[0], "tensors": [*parts[0]["tensors"], *parts[0]["tensors"]]}, 1: parts[1]},
    ]
    for wrong in bad:
        with pytest.raises(StoreError):
            store.commit(3, 0, 2, wrong, {"certified": True})
    assert store.steps() == []
    store.commit(3, 0, 2, parts, {"certified": True})


def test_commit_refuses_a_tensor_with_a_hole(root: Path) -> None:
    store = Store(root, owner="a")
    tensor = torch.ones(6, 2)

    def part(rank: int, begin: int, end: int) -> Any:
        return store.write_part(
            3, generation=0, rank=rank, world_size=2, tensors=[rows("w", tensor, begin, end)], objects={}
        )

    parts = {0: part(0, 0, 3), 1: part(1, 4, 6)}
    with pytest.raises(StoreError, match=r"tensor w: its parts hold 10 of 12 elements"):
        store.commit(3, 0, 2, parts, {"certified": True})


def test_commit_refuses_replicas_that_differ_and_tensors_not_marked_replicated(root: Path) -> None:
    store = Store(root, owner="a")
    parts = {}
    for rank in range(2):
        shard = rows("w", torch.full((4,), float(rank)), 0, 4)
        parts[rank] = store.write_part(3, generation=0, rank=rank, world_size=2, tensors=[shard], objects={})
    with pytest.raises(StoreError, match=r"copies in rank-00000\S+ and rank-00001\S+ differ"):
        store.commit(3, 0, 2, parts, {"certified": True})


def test_commit_refuses_when_a_file_is_not_there(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(root, owner="a", visible_timeout_s=0.3)
    parts = write(store, 3)
    path = root / "run" / "step-00000003" / "rank-00000.safetensors"
    kept = path.read_bytes()
    path.unlink()
    with pytest.raises(StoreGone, match="written by rank 0, but not there"):
        store.commit(3, 0, 1, parts, {"certified": True})
    # As on NFS: the file of another host is seen some time later.
    monkeypatch.setattr(store, "_visible_timeout_s", 20.0)
    path.with_suffix(".late").write_bytes(kept)
    timer = threading.Timer(0.3, lambda: path.with_suffix(".late").rename(path))
    timer.start()
    store.commit(3, 0, 1, parts, {"certified": True})
    timer.join()
    assert store.open(3).verify() == []


def test_an_aborted_save_leaves_nothing_that_looks_like_a_checkpoint(root: Path) -> None:
    store = Store(root, owner="a")
    tensors = [whole(f"t{i}", torch.ones(1 << 20)) for i in range(4)]
    for after in range(8):
        calls = iter(range(100))
        with pytest.raises(SaveAborted):
            store.write_part(
                3,
                generation=0,
                rank=0,
                world_size=1,
                tensors=tensors,
                objects={},
                should_abort=lambda calls=calls, after=after: next(calls) >= min(after, 5),
            )
        assert [f.name for f in files_of(root)] == ["attempt.json"], after
    part = store.write_part(3, generation=0, rank=0, world_size=1, tensors=tensors, objects={})
    store.commit(3, 0, 1, {0: part}, {"certified": True})
    assert store.open(3).verify() == []


def test_discard_removes_an_uncommitted_attempt_only(root: Path) -> None:
    store = Store(root, owner="a")
    write(store, 3)
    assert store.discard(3, generation=0, world_size=1)
    assert not store.discard(3, generation=0, world_size=1)
    assert list((root / "run").iterdir()) == []
    store.commit(4, 0, 1, write(store, 4), {"certified": True})
    assert not store.discard(4, generation=0, world_size=1)
    assert not Store(root, owner="b").discard(4, generation=0, world_size=1)
    assert [info.step for info in store.steps()] == [4]


def test_buffers_are_only_read(root: Path) -> None:
    tensors = state(3)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    Store(root).write_part(
        1, generation=0, rank=0, world_size=1, tensors=[whole(n, t) for n, t in tensors.items()], objects={}
    )
    for name, tensor in tensors.items():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), before[name].reshape(-1).view(torch.uint8))


CRASHER = """
import ctypes, os, signal, sys, torch
from arc_dist.checkpoint_store import Store, ShardTensor, TensorSpec
root, limit = sys.argv[1], int(sys.argv[2])
count = 0
def hook(event, args):
    # Every file system call that Python announces is a point to die at.
    global count
    if event in ("open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir") and root in str(args[0]):
        count += 1
        if count == limit:
            os.kill(os.getpid(), signal.SIGKILL)
store = Store(root, owner=f"start {limit}")
tensors = [ShardTensor(TensorSpec.whole("w", t), t) for t in [torch.full((4,), 2.0)]]
sys.addaudithook(hook)
part = store.write_part(8, generation=0, rank=0, world_size=1, tensors=tensors, objects={"value": 2.0})
store.commit(8, 0, 1, {0: part}, {"certified": True})
os.write(1, b"committed %d" % count)
"""


@pytest.mark.slow
def test_sigkill_at_every_call_leaves_the_old_step_or_the_whole_new_one(root: Path) -> None:
    store = Store(root, owner="a")
    store.commit(4, 0, 1, write(store, 4, value=1.0), {"certified": True})
    context = {"saw_old": 0, "saw_new": 0}
    # The interpreter starts once; each attempt is a fork of it.
    driver = (
        "import os, sys, torch\n"
        "import arc_dist.checkpoint_store\n"
        f"source = {CRASHER!r}\n"
        "limit = 0\n"
        "while True:\n"
        "    limit += 1\n"
        "    sys.argv = ['x', sys.argv[1], str(limit)]\n"
        "    sys.stdout.flush()\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        exec(compile(source, 'crasher', 'exec'), {'__name__': 'x'})\n"
        "        os._exit(0)\n"
        "    _, status = os.waitpid(pid, 0)\n"
        "    print(f'{limit} {status}', flush=True)\n"
        "    if sys.stdin.readline().strip() == 'stop' or status == 0:\n"
        "        break\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", driver, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    kills = 0
    try:
        for _ in range(200):
            line = process.stdout.readline()
            assert line, "the driver ended"
            status = int(line.split()[-1])
            steps = [info.step for info in store.steps(include_damaged=True)]
            assert all(info.problem is None for info in store.steps(include_damaged=True))
            for step in steps:
                assert store.open(step).verify() == []
                assert value_of(store, step) == (1.0 if step == 4 else 2.0)
            context["saw_new" if 8 in steps else "saw_old"] += 1
            if status == 0:
                assert steps == [4, 8]
                break
            assert status == signal.SIGKILL
            kills += 1
            # Each attempt begins from the same place.
            for directory in (root / "run").iterdir():
                if directory.name != "step-00000004":
                    for file in directory.iterdir():
                        file.unlink()
                    directory.rmdir()
            process.stdin.write("go\n")
            process.stdin.flush()
    finally:
        process.stdin.close()
        process.kill()
        process.wait()
        process.stdout.close()
    assert kills >= 15
    assert context["saw_old"] >= 10
    assert context["saw_new"] >= 2  # killed after the manifest had its name


def test_prune_keeps_the_newest_certified_steps(root: Path) -> None:
    store = Store(root, owner="a")
    for step, certified in [(1, True), (2, False), (3, True), (4, True), (5, False), (6, True), (7, False)]:
        store.commit(step, 0, 1, write(store, step), {"certified": certified})
    for bad in (1, 0, -3):
        with pytest.raises(ConfigError, match="at least 2"):
            store.prune(keep_last=bad)
    assert store.prune(keep_last=4) == []
    assert store.prune(keep_last=2) == [1, 2, 3]
    assert [info.step for info in store.steps()] == [4, 5, 6, 7]
    assert store.prune(keep_last=2) == []
    assert all(store.open(step).verify() == [] for step in (4, 5, 6, 7))
    assert not (root / "run" / "step-00000001").exists()


def test_prune_removes_the_manifest_first(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(root, owner="a")
    for step in (1, 2, 3):
        store.commit(step, 0, 1, write(store, step), {"certified": True})
    calls: list[str] = []
    remove, sync = LocalBackend.remove, LocalBackend.sync_directory
    monkeypatch.setattr(LocalBackend, "remove", lambda self, path: (calls.append(path), remove(self, path)))
    monkeypatch.setattr(LocalBackend, "sync_directory", lambda self, path: (calls.append(path), sync(self, path)))
    store.prune(keep_last=2)
    assert calls[:2] == ["run/step-00000001/manifest.json", "run/step-00000001"]


def test_prune_leaves_damaged_and_foreign_things_alone(root: Path) -> None:
    store = Store(root, owner="a")
    for step in (1, 2, 3, 4):
        store.commit(step, 0, 1, write(store, step), {"certified": True})
    damaged = root / "run" / "step-00000001" / "manifest.json"
    damaged.write_bytes(b"{}")
    note = root / "run" / "step-00000002" / "notes.txt"
    note.write_text("mine")
    assert store.prune(keep_last=2) == [2]
    assert damaged.exists()
    assert note.exists()
    assert not (root / "run" / "step-00000002" / "manifest.json").exists()
    assert [info.step for info in store.steps()] == [3, 4]


def test_file_systems_without_hard_links_get_the_same_promise(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: object, target: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", no_links)
    store = Store(root, owner="a")
    store.check_writable()
    parts = write(store, 3)
    store.commit(3, 0, 1, parts, {"certified": True})
    store.commit(3, 0, 1, parts, {"certified": True})
    write(Store(root, owner="x"), 3, value=1.0)
    with pytest.raises(Fenced):
        write(Store(root, owner="x"), 3, value=2.0)
    assert store.open(3).verify() == []
    assert not [f for f in files_of(root) if f.name.startswith(".")]
