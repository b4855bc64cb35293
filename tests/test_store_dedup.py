"""Tensors that did not change are referred to: fewer bytes, equal restores, and nothing referred to gets lost."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import HuggingFaceStorageReader

from arc_dist import Arc
from arc_dist.checkpoint_store import Store, references
from arc_dist.checkpoint_store.attempts import claim
from arc_dist.checkpoint_store.catalog import Catalog
from arc_dist.checkpoint_store.format import digest_of, step_directory
from arc_dist.checkpoint_store.manifest import parse_manifest
from arc_dist.checkpoint_store.orphans import find_orphans
from arc_dist.checkpoint_store.pruning import plan_prune, prune
from arc_dist.checkpoint_store.references import protectors, remove_step
from arc_dist.checkpoint_store.retention import Retention
from arc_dist.checkpoint_store.tiers import Tiers, parse_tiers
from arc_dist.checkpoint_store.transfer import copy_step
from arc_dist.errors import ConfigError, StoreCorrupt, StoreError, StoreGone
from dedup_helpers import LARGE, State, commit, large_state, open_store, require_equal, save_state, write
from store_helpers import fsdp_cut, random_tensor, rows, same_bits, save

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
FIXTURES = Path(__file__).parent / "data"


def directory(step: int) -> str:
    return f"step-{step:08d}"


def test_what_did_not_change_is_referred_to_and_read_back(tmp_path: Path) -> None:
    store, state = open_store(tmp_path), large_state()
    first = save_state(store, 1, state)
    changed = {**state, "model.1": random_tensor(LARGE, seed=77)}
    second = save_state(store, 2, changed)
    assert (first.version, first.refers_to) == (1, ())
    assert (second.version, second.refers_to) == (2, (directory(1),))
    assert {t.name for t in second.tensors for c in t.chunks if c.directory} == {"model.0", "model.2"}
    assert second.nbytes < first.nbytes / 2
    require_equal(store, 1, state)
    require_equal(store, 2, changed)


def test_references_lead_to_the_bytes_and_never_to_references(tmp_path: Path) -> None:
    store, state = open_store(tmp_path), large_state()
    for step in range(1, 5):
        manifest = save_state(store, step, state)
    assert manifest.refers_to == (directory(1),)
    # A process that starts anew knows nothing of the saves before it, and finds the same.
    assert save_state(open_store(tmp_path, owner="later"), 9, state).refers_to == (directory(1),)


def test_without_the_option_every_step_is_whole(tmp_path: Path) -> None:
    store = open_store(tmp_path, dedup=False)
    for step in (1, 2):
        manifest = save_state(store, step, large_state())
        assert (manifest.version, manifest.refers_to) == (1, ())
        assert "refers" not in (tmp_path / "run" / directory(step) / "attempt.json").read_text()


@pytest.mark.parametrize("what", ["dtype", "shape", "name", "small", "cut"])
def test_only_the_same_part_of_the_same_tensor_is_referred_to(tmp_path: Path, what: str) -> None:
    store, tensor = open_store(tmp_path), random_tensor(LARGE)
    other = {
        "dtype": {"model.w": tensor.view(torch.int32)},
        "shape": {"model.w": tensor.reshape(-1)},
        "name": {"model.v": tensor},
        "small": {"model.w": tensor[1:]},
        "cut": {"model.w": tensor},
    }[what]
    first = {"model.w": tensor[1:] if what == "small" else tensor}
    save_state(store, 1, first)
    assert save_state(store, 2, other, world_size=2 if what == "cut" else 1).refers_to == ()
    require_equal(store, 2, other)


def test_a_tensor_that_stops_changing_is_referred_to_after_one_more_save(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    states = [{"model.w": random_tensor(LARGE, seed=seed)} for seed in (1, 2, 3, 3, 3)]
    referred = [save_state(store, step, state).refers_to for step, state in enumerate(states, 1)]
    assert referred == [(), (), (), (), (directory(4),)]
    for step, state in enumerate(states, 1):
        require_equal(store, step, state)


@pytest.mark.parametrize("world_size", [1, 2])
def test_ten_saves_of_a_lora_like_state_write_little(tmp_path: Path, world_size: int) -> None:
    store = open_store(tmp_path)
    frozen = {f"model.base.{i}": random_tensor((1024, 256), seed=i) for i in range(8)}
    written: list[int] = []
    for step in range(1, 11):
        adapters = {f"model.lora.{i}": random_tensor((10, 256), seed=1000 * step + i) for i in range(8)}
        state = {**frozen, **adapters}
        save_state(store, step, state, world_size)
        written.append(sum(f.stat().st_size for f in (tmp_path / "run" / directory(step)).iterdir()))
    assert sum(written) <= 0.12 * 10 * written[0], written
    require_equal(store, 10, state)


def test_two_ranks_refer_to_their_own_parts_and_any_world_reads_them(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    state = {"model.w": random_tensor((2 * LARGE[0] + 1, 8)), "model.v": random_tensor((2 * LARGE[0], 8), seed=5)}
    save_state(store, 1, state, world_size=2)
    state["model.v"] = state["model.v"].clone()
    state["model.v"][-1] += 1  # rank 1 alone has something new
    manifest = save_state(store, 2, state, world_size=2)
    assert sorted((t.name, c.rank) for t in manifest.tensors for c in t.chunks if c.directory) == [
        ("model.v", 0),
        ("model.w", 0),
        ("model.w", 1),
    ]
    checkpoint = store.open(2)
    assert [s.name for s in checkpoint.rank_specs(1)] == ["model.v", "model.w"]
    for world_size in (1, 2, 3):
        for rank in range(world_size):
            for name, tensor in state.items():
                wanted = rows(name, tensor, *fsdp_cut(tensor.shape[0], rank, world_size))
                assert same_bits(checkpoint.read([wanted.spec])[0], wanted.data)


def test_pruning_keeps_what_is_referred_to_and_says_why(tmp_path: Path) -> None:
    store, state = open_store(tmp_path), large_state()
    for step in range(1, 6):
        save_state(store, step, {**state, "model.0": random_tensor(LARGE, seed=step)})
    plan = plan_prune(store.backend, "run", Retention(last=2), 0.0)
    assert {row.step: row.why for row in plan.rows if row.kept}[1] == "step 4 refers to it"
    assert store.prune(keep_last=2) == [2, 3]
    for step in (1, 4, 5):
        require_equal(store, step, {**state, "model.0": random_tensor(LARGE, seed=step)})
    for step in (6, 7):  # nothing of the first is left in these
        save_state(store, step, large_state(seed=step))
    assert store.prune(keep_last=2) == [1, 4, 5]
    assert sorted(p.name for p in (tmp_path / "run").glob("step-*")) == [directory(6), directory(7)]


def test_two_commits_of_a_step_go_together_though_one_refers_to_the_other(tmp_path: Path) -> None:
    store, state = open_store(tmp_path), large_state()
    save_state(store, 1, state)
    commit(store, 1, write(store, 1, state, generation=1), generation=1)
    assert store.manifest(1).refers_to == (directory(1),)
    for step in (2, 3):
        save_state(store, step, large_state(seed=step))
    assert store.prune(keep_last=2) == [1]
    assert sorted(p.name for p in (tmp_path / "run").glob("step-*")) == [directory(2), directory(3)]


def test_steps_whose_commits_refer_to_each_other_in_turn_all_go(tmp_path: Path) -> None:
    """Step 1, step 2 that refers to it, and after a rollback step 1 once more, which refers to step 2."""
    store, state = open_store(tmp_path), large_state()
    save_state(store, 1, {"model.0": state["model.0"]})
    save_state(store, 2, state)
    commit(store, 1, write(store, 1, {"model.1": state["model.1"]}, generation=1), generation=1)
    assert store.manifest(2).refers_to == (directory(1),)
    assert store.manifest(1).refers_to == (directory(2),)
    for step in (3, 4):
        save_state(store, step, large_state(seed=step))
    assert store.prune(keep_last=2) == [1, 2]
    assert sorted(p.name for p in (tmp_path / "run").glob("step-*")) == [directory(3), directory(4)]


def test_a_quarantined_step_is_still_referred_to(tmp_path: Path) -> None:
    store, state = open_store(tmp_path), large_state()
    for step in range(1, 4):
        save_state(store, step, state)
    store.quarantine(1, 1, "poisoned")
    assert 1 not in store.prune(keep_last=2)
    require_equal(store, 3, state)


def test_a_save_in_progress_protects_what_it_may_refer_to(tmp_path: Path) -> None:
    store, state = open_store(tmp_path), large_state()
    save_state(store, 1, state)
    parts = write(store, 9, state)
    others = open_store(tmp_path, dedup=False)
    for step in (2, 3):
        save_state(others, step, large_state(seed=step))
    assert others.prune(keep_last=2) == []
    # Whoever had decided before the save began still finds it, and puts the manifest back.
    before = (tmp_path / "run" / directory(1) / "manifest.json").read_bytes()
    assert remove_step(store.backend, "run", directory(1)) == [directory(9)]
    assert (tmp_path / "run" / directory(1) / "manifest.json").read_bytes() == before
    commit(store, 9, parts)
    require_equal(store, 9, state)


def test_a_step_that_vanished_after_the_announcement_is_written_in_full(tmp_path: Path) -> None:
    store, state = open_store(tmp_path), large_state()
    save_state(store, 1, state)
    # The first rank to come has announced step 1.
    announced = claim(store.backend, store.run, store._attempt(2, 0, 1), store._announcement)
    assert json.loads((tmp_path / "run" / announced / "attempt.json").read_text())["refers"] == [directory(1)]
    Catalog(store.backend, "run").delete(directory(1))
    assert save_state(store, 2, state).refers_to == ()
    require_equal(store, 2, state)


@pytest.mark.parametrize("how", ["manifest", "file", "truncated", "replaced", "unannounced"])
def test_a_commit_refuses_references_that_lead_nowhere(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, state = open_store(tmp_path), large_state()
    monkeypatch.setattr(store, "_visible_timeout_s", 0.2)
    save_state(store, 1, state)
    (part,) = write(store, 2, state)
    held = tmp_path / "run" / directory(1)
    shard = held / "rank-00000.safetensors"
    if how == "manifest":
        (held / "manifest.json").unlink()
    elif how == "file":
        shard.unlink()
    elif how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif how == "replaced":
        Catalog(store.backend, "run").delete(directory(1))
        save_state(open_store(tmp_path, dedup=False), 1, large_state(seed=4))
    else:
        save_state(open_store(tmp_path, dedup=False), 3, state)
        part = {**part, "tensors": [{**row, "directory": directory(3)} for row in part["tensors"]]}
    with pytest.raises(StoreError, match="Nothing was committed"):
        commit(store, 2, [part])
    assert 2 not in [info.step for info in store.steps()]
    Catalog(store.backend, "run").delete(directory(2))
    assert save_state(store, 4, state).step == 4  # and the next save is not in the way of anything
    require_equal(store, 4, state)


def test_a_flipped_byte_that_is_referred_to_harms_all_that_refer_and_only_those(tmp_path: Path) -> None:
    store, state = open_store(tmp_path), large_state()
    save_state(store, 1, state)
    changed = {**state, "model.2": random_tensor(LARGE, seed=7)}
    for step in (2, 3):
        save_state(store, step, changed)
    shard = tmp_path / "run" / directory(1) / "rank-00000.safetensors"
    sound = shard.read_bytes()
    chunks = {t.name: t.chunks[0] for t in store.manifest(1).tensors}
    for name, chunk in chunks.items():
        for position in (chunk.start, chunk.start + chunk.nbytes // 2, chunk.start + chunk.nbytes - 1):
            data = bytearray(sound)
            data[position] ^= 1
            shard.write_bytes(data)
            for step in (1, 2, 3):
                checkpoint = store.open(step)
                harmed = step == 1 or name != "model.2"
                problems = checkpoint.verify()
                assert [p.tensors for p in problems] == ([(name,)] if harmed else [])
                assert all(p.file == f"run/{directory(1)}/rank-00000.safetensors" for p in problems)
                targets = [(spec, torch.zeros(spec.shape)) for spec in checkpoint.specs().values()]
                if harmed:
                    with pytest.raises(StoreCorrupt, match=name):
                        checkpoint.read_into(targets)
                    assert all(not target.any() for _, target in targets)
                else:
                    checkpoint.read_into(targets)
    shard.unlink()
    assert store.open(2).verify() != []
    with pytest.raises(StoreGone):
        store.open(2).read(list(store.open(2).specs().values()))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_copy_is_whole_and_stock_torch_reads_it(tmp_path: Path, world_size: int) -> None:
    store = open_store(tmp_path / "a")
    state = {f"model.{i}": random_tensor((2 * LARGE[0], 8), seed=i) for i in range(3)}
    save_state(store, 1, state, world_size)
    state["model.1"] = random_tensor((2 * LARGE[0], 8), "int64", seed=8).view(torch.float64)  # wider: goes first
    original = save_state(store, 2, state, world_size)
    assert original.version == 2
    target = open_store(tmp_path / "b")
    done = copy_step(store.backend, "run", directory(2), target.backend)
    copied = target.manifest(2)
    assert done.committed and done.sent_nbytes > original.nbytes
    assert (copied.version, copied.refers_to) == (1, ())
    assert copied.same_state(original) and not copied.same_content(original)
    for file in (f.name for f in copied.files if f.kind == "tensors"):  # FORMAT.md, 2.1: the widest first
        starts = {t.name: c.start for t in copied.tensors for c in t.chunks if c.file == file}
        assert min(starts, key=lambda name: starts[name]) == "model.1"
    require_equal(target, 2, state)
    loaded = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    reader = HuggingFaceStorageReader(str(tmp_path / "b" / "run" / directory(2)))
    dcp.load(loaded, storage_reader=reader, no_dist=True)
    assert all(same_bits(loaded[name], tensor) for name, tensor in state.items())
    again = copy_step(store.backend, "run", directory(2), target.backend)
    assert (again.committed, again.num_sent) == (False, 0)


def test_a_new_process_writes_damaged_bytes_again(tmp_path: Path) -> None:
    store, state = open_store(tmp_path), large_state()
    save_state(store, 1, state)
    flip(tmp_path / "run" / directory(1) / "rank-00000.safetensors")
    later = open_store(tmp_path, owner="later")
    manifest = save_state(later, 2, state)
    damaged = max(store.manifest(1).tensors, key=lambda t: t.chunks[0].start)
    assert {t.name for t in manifest.tensors if t.chunks[0].directory is None} == {damaged.name}
    require_equal(later, 2, state)


def flip(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_copy_of_damaged_references_is_refused(tmp_path: Path) -> None:
    store, state = open_store(tmp_path / "a"), large_state()
    save_state(store, 1, state)
    save_state(store, 2, state)
    flip(tmp_path / "a" / "run" / directory(1) / "rank-00000.safetensors")
    target = open_store(tmp_path / "b")
    with pytest.raises(StoreCorrupt, match=directory(1)):
        copy_step(store.backend, "run", directory(2), target.backend)
    assert target.steps() == []


def test_another_tier_replaces_damaged_references(tmp_path: Path) -> None:
    tiers = Tiers(parse_tiers([str(tmp_path / "a"), str(tmp_path / "b")]), owner="o", dedup=True)
    tiers.check_writable()
    fast, slow = tiers.stores
    state = large_state()
    save_state(fast, 1, state)
    assert save_state(fast, 2, state).refers_to == (directory(1),)
    copy_step(fast.backend, "run", directory(2), slow.backend)
    (tmp_path / "a" / "run" / directory(1) / "rank-00000.safetensors").unlink()
    checkpoint = tiers.open(2)
    loaded = checkpoint.read([checkpoint.specs()[name] for name in state])
    assert all(same_bits(tensor, state[name]) for name, tensor in zip(state, loaded))
    assert checkpoint.damage and directory(1) in checkpoint.damage[0].what


@pytest.mark.parametrize(("dedup", "package"), [(True, "blake3"), (False, "xxhash")])
def test_a_missing_hash_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dedup: bool, package: str
) -> None:
    store = open_store(tmp_path, dedup=dedup)
    save_state(store, 1, large_state())
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        store.open(1)
    assert Store(FIXTURES / "store-v1").open(5).verify() == []


@pytest.mark.filterwarnings("ignore")
def test_the_setting_reaches_the_store(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 128), torch.nn.Linear(128, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.01)
    data = [torch.ones(4, 256) for _ in range(20)]
    arc = Arc(model, optimizer, store=str(tmp_path), dedup=True, checkpoint_every=5, snapshot_every=2)
    for _ in arc.train(lambda batch: model(batch).square().mean(), data):
        time.sleep(0.05)  # a save takes place while the training goes on; one at a time
    manifests = [Store(tmp_path).manifest(info.step) for info in Store(tmp_path).steps()]
    assert len(manifests) >= 2
    assert [len(m.refers_to) for m in manifests] == [0] + [1] * (len(manifests) - 1)
    assert {t.name for t in manifests[-1].tensors for c in t.chunks if c.directory} == {"model.0.weight"}


def altered(data: bytes, change: Any, version: int = 2, **more: Any) -> bytes:
    """A manifest with its referred chunks changed, under a right digest."""
    fields = json.loads(data)
    fields |= {"version": version, **more}
    fields.pop("manifest_digest")
    for tensor in fields["tensors"].values():
        tensor["chunks"] = [{**c, **change} if "directory" in c else c for c in tensor["chunks"]]
    body = json.dumps(fields, indent=0).removesuffix("\n}").encode()
    return body + f',\n"manifest_digest": "sha256:{digest_of(body)}"\n}}\n'.encode()


@pytest.mark.parametrize(
    "change",
    [
        {"directory": "../other/step-00000001"},
        {"directory": "step-00000002"},
        {"directory": ""},
        {"directory": None},
        {"file": "../step-00000001/rank-00000.safetensors"},
        {"file": "attempt.json"},
        {"rank": 1},
        {"rank": None},
        {"start": -1},
        {"nbytes": 1},
    ],
    ids=str,
)
def test_hostile_references_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    store, state = open_store(tmp_path), large_state()
    save_state(store, 1, state)
    save_state(store, 2, state)
    data = (tmp_path / "run" / directory(2) / "manifest.json").read_bytes()
    assert parse_manifest(altered(data, {}), "m", directory(2)) == store.manifest(2)
    with pytest.raises(StoreCorrupt):
        parse_manifest(altered(data, change), "m", directory(2))
    with pytest.raises(StoreCorrupt, match="version 1"):
        parse_manifest(altered(data, {}, version=1), "m", directory(2))
    with pytest.raises(StoreCorrupt, match="too weak"):
        parse_manifest(altered(data, {}, hash="xxh3_128"), "m", directory(2))


def test_an_altered_announcement_does_not_free_what_a_committed_step_refers_to(tmp_path: Path) -> None:
    store, state = open_store(tmp_path), large_state()
    save_state(store, 1, state)
    save_state(store, 2, state)
    path = tmp_path / "run" / directory(2) / "attempt.json"
    sound = path.read_bytes()
    for position in range(len(sound)):
        data = bytearray(sound)
        data[position] ^= 1
        path.write_bytes(data)
        assert remove_step(store.backend, "run", directory(1)) == [directory(2)], position


def test_a_checkpoint_of_format_version_1_with_sha256_is_read(tmp_path: Path) -> None:
    store = Store(FIXTURES / "store-v1")
    manifest = store.manifest(5)
    assert (manifest.version, manifest.hash) == (1, "sha256")
    assert store.open(5).verify() == []
    expected = save(Store(tmp_path, owner="fixture"), 5, world_size=2, seed=3, meta={"epoch": 1})
    require_equal(store, 5, expected)
    # A new save beside an old one is not based on it: its digests are of another kind.
    copy_step(store.backend, "run", directory(5), open_store(tmp_path / "b").backend)
    assert save_state(open_store(tmp_path / "b"), 6, large_state()).refers_to == ()


def test_a_checkpoint_of_format_version_2_that_refers_to_an_older_step_is_read(tmp_path: Path) -> None:
    store = Store(FIXTURES / "store-v2")
    manifest = store.manifest(2)
    assert (manifest.version, manifest.hash, manifest.refers_to) == (2, "blake3", (directory(1),))
    for step in (1, 2):
        require_equal(store, step, {**large_state(count=1), "model.small": random_tensor((3, 2), "bfloat16", step)})
    copy_step(store.backend, "run", directory(2), open_store(tmp_path).backend)
    assert Store(tmp_path).manifest(2).refers_to == ()


def test_a_run_that_begins_to_refer_writes_its_first_step_whole(tmp_path: Path) -> None:
    """Digests of the fast hash are no reason to refer to anything."""
    state = large_state()
    assert save_state(open_store(tmp_path, dedup=False), 1, state).hash == "xxh3_128"
    store = open_store(tmp_path)
    assert save_state(store, 2, state).refers_to == ()
    assert save_state(store, 3, state).refers_to == (directory(2),)
    require_equal(store, 3, state)


class Crash(Exception):
    pass


class Crashing:
    """A backend on which the process ends before the call of this number."""

    def __init__(self, backend: Any, calls: int) -> None:
        self.inner, self.left = backend, calls

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inner, name)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise Crash
            return value(*args, **kwargs)

        return call


def test_a_removal_that_crashes_anywhere_harms_nothing_that_refers(tmp_path: Path) -> None:
    state, finished, without = large_state(), False, 0
    for calls in range(60):
        root = tmp_path / str(calls)
        store = open_store(root)
        save_state(store, 1, state)
        save_state(store, 2, state)
        try:
            assert remove_step(Crashing(store.backend, calls), "run", directory(1)) == [directory(2)]
            finished = True
        except Crash:
            pass
        require_equal(open_store(root), 2, state)
        assert protectors(store.backend, "run")[directory(1)] == [directory(2)]
        # Where the manifest is lost, nothing new refers to the directory; the bytes stay for what refers already.
        if [info.step for info in store.steps()] == [2]:
            without += 1
            assert directory(1) not in save_state(open_store(root), 3, state).refers_to
            assert store.prune(keep_last=2) == []
            require_equal(store, 2, state)
            require_equal(store, 3, state)
        if finished:
            break
    assert finished and without > 2


class Turns:
    """Lets two threads make their storage calls one at a time, in a given order; who has ended loses its turns."""

    def __init__(self, schedule: list[int]) -> None:
        self._schedule = iter(schedule)
        self._changed = threading.Condition()
        self._alive = {0, 1}
        self._next = 1
        with self._changed:
            self._choose()

    def _choose(self) -> None:
        turn = next(self._schedule, None)
        turn = 1 - self._next if turn is None else turn  # by turns: who waits for the other must not starve it
        self._next = turn if turn in self._alive else min(self._alive, default=0)
        self._changed.notify_all()

    def call(self, who: int, function: Any, *args: Any, **kwargs: Any) -> Any:
        with self._changed:
            assert self._changed.wait_for(lambda: self._next == who, 30)
            try:
                return function(*args, **kwargs)
            finally:
                self._choose()

    def end(self, who: int) -> None:
        with self._changed:
            self._alive.discard(who)
            if self._next == who:
                self._choose()


class Stepped:
    """A backend whose calls wait for their turn."""

    def __init__(self, backend: Any, turns: Turns, who: int) -> None:
        self.inner, self.turns, self.who = backend, turns, who

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inner, name)
        if not callable(value):
            return value
        return lambda *args, **kwargs: self.turns.call(self.who, value, *args, **kwargs)


@settings(max_examples=60, deadline=None)
@given(schedule=st.lists(st.integers(0, 1), max_size=40))
@example(schedule=[1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
def test_a_removal_and_a_save_in_any_order_lose_nothing(
    schedule: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("race")
    state = large_state(count=1)
    save_state(open_store(root), 1, state)
    turns, store, errors = Turns(schedule), open_store(root), []
    backend = store.backend
    store._backend = Stepped(backend, turns, 0)  # type: ignore[assignment]
    store._catalog = Catalog(store._backend, "run")

    def act(who: int, function: Any) -> None:
        try:
            function()
        except Exception as error:  # noqa: BLE001 - told to the test below
            errors.append((who, error))
        finally:
            turns.end(who)

    threads = [
        threading.Thread(target=act, args=(0, lambda: save_state(store, 2, state))),
        threading.Thread(target=act, args=(1, lambda: remove_step(Stepped(backend, turns, 1), "run", directory(1)))),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(references, "_POLL_S", 0.001)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not errors
    fresh = open_store(root)
    assert [info.step for info in fresh.steps()] in ([2], [1, 2])
    for info in fresh.steps():
        require_equal(fresh, info.step, state)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_sequence_of_saves_prunes_copies_and_restores(data: st.DataObject, tmp_path_factory: Any) -> None:
    root = tmp_path_factory.mktemp("sequence")
    store, other = open_store(root / "a"), open_store(root / "b")
    state = large_state(count=4)
    held: dict[int, State] = {}
    copied: dict[int, State] = {}
    versions = 0
    for step in range(1, data.draw(st.integers(3, 12), label="saves") + 1):
        for name in data.draw(st.sets(st.sampled_from(sorted(state))), label="changed"):
            versions += 1
            state = {**state, name: random_tensor(LARGE, seed=1000 + versions)}
        if data.draw(st.booleans(), label="a new process"):
            store = open_store(root / "a", owner=f"o{step}")
        save_state(store, step, state, world_size=data.draw(st.sampled_from([1, 1, 2]), label="ranks"))
        held[step] = state
        action = data.draw(st.sampled_from(["none", "prune", "copy", "quarantine"]), label="then")
        if action == "prune":
            policy = Retention(last=data.draw(st.integers(2, 4)), every=data.draw(st.sampled_from([None, 3])))
            for row in prune(store.backend, "run", policy).removed:
                del held[row.step]
        elif action == "copy":
            chosen = data.draw(st.sampled_from(sorted(held)), label="copied")
            copy_step(store.backend, "run", store.manifest(chosen).directory, other.backend)
            copied[chosen] = held[chosen]
        elif action == "quarantine":
            first = data.draw(st.sampled_from(sorted(held)), label="quarantined")
            store.quarantine(first, first, "poisoned")
        for place, steps in ((store, held), (other, copied)):
            for number in data.draw(st.sets(st.sampled_from(sorted(steps)), max_size=2)) if steps else ():
                require_equal(place, number, steps[number])
    assert [info.step for info in store.steps()] == sorted(held)
    for place, steps in ((store, held), (other, copied)):
        for number, expected in steps.items():
            require_equal(place, number, expected)
    # Each byte of each tensor is guarded in every step that has it, wherever it lies.
    victim = data.draw(st.sampled_from(sorted(held)), label="damaged")
    manifest = store.manifest(victim)
    tensor = data.draw(st.sampled_from(manifest.tensors), label="tensor")
    chunk = data.draw(st.sampled_from(tensor.chunks))
    path = root / "a" / "run" / (chunk.directory or manifest.directory) / chunk.file
    content = bytearray(path.read_bytes())
    content[chunk.start + data.draw(st.integers(0, chunk.nbytes - 1))] ^= 1
    path.write_bytes(content)
    place = (chunk.directory or manifest.directory, chunk.file, chunk.start)
    for number, expected in held.items():
        mine = store.manifest(number)
        harmed = any((c.directory or mine.directory, c.file, c.start) == place for t in mine.tensors for c in t.chunks)
        if harmed:
            with pytest.raises(StoreCorrupt):
                require_equal(store, number, expected)
        else:
            require_equal(store, number, expected)


def test_what_a_step_refers_to_is_no_orphan_even_without_its_manifest(tmp_path: Path) -> None:
    """As a removal that crashed after it had taken the manifest leaves it."""
    store = open_store(tmp_path)
    state = large_state()
    save_state(store, 1, state)
    save_state(store, 2, state)
    lost = tmp_path / "run" / step_directory(1)
    (lost / "manifest.json").unlink()
    later = time.time() + 10 * 86400
    found = find_orphans(store.backend, store.run, now=later)
    assert [orphan.directory for orphan in found] == []
    require_equal(store, 2, state)
    shutil.rmtree(tmp_path / "run" / step_directory(2))
    assert [orphan.directory for orphan in find_orphans(store.backend, store.run, now=later)] == [lost.name]
