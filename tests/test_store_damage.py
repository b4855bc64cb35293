"""Every altered byte is found before use: flips, truncations, missing, swapped and stale files, zeroed holes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from arc_dist.checkpoint_store import Checkpoint, Store, TensorSpec
from arc_dist.checkpoint_store.manifest import parse_manifest
from arc_dist.checkpoint_store.tiers import Tiers, parse_tiers
from arc_dist.checkpoint_store.transfer import copy_step
from arc_dist.errors import StoreCorrupt, StoreError, StoreGone
from store_helpers import files_of, random_tensor, same_bits, save, state, whole


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "ckpt", owner="test")
    store.check_writable()
    return store


def step_path(store: Store, step: int) -> Path:
    return Path(store.url, store.run, f"step-{step:08d}")


def small_step(store: Store, step: int = 1) -> dict[str, torch.Tensor]:
    """A checkpoint of two ranks with few bytes, so that each of them can be flipped."""
    tensors = {"w": random_tensor((3, 2), "bfloat16", step), "b": random_tensor((5,), "uint8", step + 1)}
    shards = [whole(name, tensor) for name, tensor in tensors.items()]
    parts = {
        rank: store.write_part(step, generation=0, rank=rank, world_size=2, tensors=shards, objects={"r": rank})
        for rank in range(2)
    }
    store.commit(step, 0, 2, parts, {"certified": True})
    return tensors


def damage_is_found(store: Store, step: int) -> bool:
    """Whether opening or verifying the step tells of damage; the files that are named are the ones touched."""
    try:
        return bool(store.open(step).verify())
    except StoreError:
        return True


def try_to_load(store: Store, step: int, world_size: int) -> None:
    """Reads all that a restore reads, into tensors that must stay untouched when it fails."""
    checkpoint = store.open(step)
    specs = list(checkpoint.specs().values())
    targets = [torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for s in specs]
    try:
        checkpoint.read_into(list(zip(specs, targets)))
    except StoreError:
        assert all(not t.reshape(-1).view(torch.uint8).any() for t in targets if t.numel())
        raise
    for rank in range(world_size):
        checkpoint.objects(rank)


def test_every_byte_of_every_file_is_guarded(store: Store) -> None:
    small_step(store)
    files = files_of(step_path(store, 1))
    assert {f.name for f in files} == {
        "manifest.json",
        "attempt.json",
        "rank-00000.json",
        "rank-00001.json",
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    }
    assert not damage_is_found(store, 1)
    missed = []
    for file in files:
        original = file.read_bytes()
        for position in range(len(original)):
            altered = bytearray(original)
            altered[position] ^= 1 << (position * 5 % 8)
            if file.name == "manifest.json":
                try:
                    parse_manifest(bytes(altered), "m", file.parent.name)
                except StoreCorrupt:
                    continue
                missed.append((file.name, position))
                continue
            file.write_bytes(altered)
            if not damage_is_found(store, 1):
                missed.append((file.name, position))
        file.write_bytes(original)
    assert missed == []
    assert not damage_is_found(store, 1)


def test_every_bit_of_a_manifest_is_guarded(store: Store) -> None:
    small_step(store)
    original = (step_path(store, 1) / "manifest.json").read_bytes()
    for position in range(len(original)):
        for bit in range(8):
            altered = bytearray(original)
            altered[position] ^= 1 << bit
            with pytest.raises(StoreCorrupt):
                parse_manifest(bytes(altered), "m", "step-00000001")


def test_every_truncation_and_extension_is_found(store: Store) -> None:
    small_step(store)
    for file in files_of(step_path(store, 1)):
        original = file.read_bytes()
        for length in range(len(original)):
            if file.name == "manifest.json":
                with pytest.raises(StoreCorrupt):
                    parse_manifest(original[:length], "m", "step-00000001")
                continue
            file.write_bytes(original[:length])
            assert damage_is_found(store, 1), (file.name, length)
        file.write_bytes(original + b"\0")
        assert damage_is_found(store, 1), file.name
        file.write_bytes(original)
    assert not damage_is_found(store, 1)


def test_a_restore_refuses_each_damaged_file_and_leaves_its_targets_alone(store: Store) -> None:
    save(store, 4, world_size=2)
    for file in files_of(step_path(store, 4)):
        original = file.read_bytes()
        for position in (0, len(original) // 2, len(original) - 1):
            altered = bytearray(original)
            altered[position] ^= 0x10
            file.write_bytes(altered)
            if file.name != "attempt.json":  # says who saved; a restore does not use it
                with pytest.raises(StoreCorrupt) as caught:
                    try_to_load(store, 4, 2)
                assert file.name in str(caught.value)
        file.write_bytes(original)
    try_to_load(store, 4, 2)


def test_missing_files_are_found(store: Store) -> None:
    save(store, 4, world_size=2)
    for file in files_of(step_path(store, 4)):
        kept = file.read_bytes()
        file.unlink()
        assert damage_is_found(store, 4), file.name
        if file.name == "manifest.json":
            assert store.steps() == []
            with pytest.raises(StoreGone, match="no committed step 4"):
                store.open(4)
        elif file.name != "attempt.json":
            with pytest.raises(StoreGone, match=file.name):
                try_to_load(store, 4, 2)
        file.write_bytes(kept)
    assert not damage_is_found(store, 4)


def test_files_swapped_between_ranks_are_found(store: Store) -> None:
    save(store, 4, world_size=2, sharded=False)
    for kind in ("safetensors", "json"):
        a, b = (step_path(store, 4) / f"rank-0000{rank}.{kind}" for rank in (0, 1))
        one, two = a.read_bytes(), b.read_bytes()
        a.write_bytes(two)
        b.write_bytes(one)
        problems = store.open(4).verify()
        assert {Path(p.file).name for p in problems} == {a.name, b.name}
        with pytest.raises(StoreCorrupt):
            try_to_load(store, 4, 2)
        a.write_bytes(one)
        b.write_bytes(two)
    try_to_load(store, 4, 2)


def test_files_swapped_between_steps_are_found(store: Store) -> None:
    save(store, 4, world_size=2, seed=1)
    save(store, 8, world_size=2, seed=2)
    for file in files_of(step_path(store, 4)):
        other = step_path(store, 8) / file.name
        one, two = file.read_bytes(), other.read_bytes()
        file.write_bytes(two)
        other.write_bytes(one)
        assert damage_is_found(store, 4), file.name
        assert damage_is_found(store, 8), file.name
        file.write_bytes(one)
        other.write_bytes(two)
    shutil.rmtree(step_path(store, 8))
    step_path(store, 4).rename(step_path(store, 8))  # a whole directory under another step's name
    assert damage_is_found(store, 8)
    assert store.steps() == []


def test_a_stale_file_of_the_same_size_is_found(store: Store) -> None:
    small_step(store, 1)
    stale = (step_path(store, 1) / "rank-00000.safetensors").read_bytes()
    shutil.rmtree(step_path(store, 1))
    save_again = Store(store.url, owner="test")
    tensors = {"w": random_tensor((3, 2), "bfloat16", 77), "b": random_tensor((5,), "uint8", 78)}
    parts = {
        rank: save_again.write_part(
            1, generation=0, rank=rank, world_size=2, tensors=[whole(n, t) for n, t in tensors.items()], objects={}
        )
        for rank in range(2)
    }
    save_again.commit(1, 0, 2, parts, {"certified": True})
    path = step_path(store, 1) / "rank-00000.safetensors"
    assert len(stale) == path.stat().st_size
    path.write_bytes(stale)
    assert damage_is_found(store, 1)


def test_a_zeroed_hole_is_found_and_names_exactly_the_tensor(store: Store) -> None:
    tensors = {f"layer{i}": torch.randn(64, 64) for i in range(8)}
    part = store.write_part(
        1, generation=0, rank=0, world_size=1, tensors=[whole(n, t) for n, t in tensors.items()], objects={}
    )
    store.commit(1, 0, 1, {0: part}, {"certified": True})
    row = next(row for row in part["tensors"] if row["name"] == "layer5")
    path = step_path(store, 1) / row["file"]
    data = bytearray(path.read_bytes())
    data[row["start"] + 4096 : row["start"] + 8192] = bytes(4096)
    path.write_bytes(data)
    (problem,) = store.open(1).verify()
    assert problem.tensors == ("layer5",)
    assert problem.file.endswith("step-00000001/rank-00000.safetensors")
    with pytest.raises(StoreCorrupt, match="layer5"):
        store.open(1).read([store.open(1).specs()["layer5"]])
    (sound,) = store.open(1).read([store.open(1).specs()["layer4"]])
    assert same_bits(sound, tensors["layer4"])


def test_a_shard_that_is_not_in_the_manifest_is_reported(store: Store) -> None:
    save(store, 1)
    shutil.copy(step_path(store, 1) / "rank-00000.safetensors", step_path(store, 1) / "rank-00001.safetensors")
    (problem,) = store.open(1).verify()
    assert "stock readers would read it" in problem.what


@pytest.mark.parametrize("kind", ["directory", "pipe", "dangling link"])
def test_something_else_in_a_files_place_is_an_error_and_never_blocks(store: Store, kind: str) -> None:
    import os

    save(store, 1)
    path = step_path(store, 1) / "rank-00000.safetensors"
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere")
    assert damage_is_found(store, 1)
    with pytest.raises(StoreError):
        try_to_load(store, 1, 1)


def test_a_damaged_newest_step_is_passed_over_aloud(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    save(store, 4)
    save(store, 8)
    manifest = step_path(store, 8) / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"certified": true', b'"certified": True', 1))
    assert [info.step for info in store.steps()] == [4]
    newest = store.newest()
    assert newest is not None
    assert newest.step == 4
    assert caplog.text.count("step 8 is passed over") == 1
    listed = store.steps(include_damaged=True)
    assert [(info.step, info.problem is None) for info in listed] == [(4, True), (8, False)]
    with pytest.raises(StoreCorrupt):
        store.open(8)


def test_a_copy_on_another_rank_replaces_a_damaged_one(store: Store) -> None:
    """Ranks of a replicate dimension (HSDP) write the same part twice; one sound copy is enough."""
    tensor = random_tensor((4, 3), "float32", 5)
    parts = {}
    for rank in range(4):
        begin = rank % 2 * 2
        spec = TensorSpec("w", "float32", (2, 3), (4, 3), (begin, 0))
        from arc_dist.checkpoint_store import ShardTensor

        shard = ShardTensor(spec, tensor[begin : begin + 2])
        parts[rank] = store.write_part(1, generation=0, rank=rank, world_size=4, tensors=[shard], objects={})
    store.commit(1, 0, 4, parts, {"certified": True})
    path = step_path(store, 1) / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    checkpoint: Checkpoint = store.open(1)
    (loaded,) = checkpoint.read([checkpoint.specs()["w"]])
    assert same_bits(loaded, tensor)
    assert len(checkpoint.verify()) == 1


def test_state_of_every_dtype_survives(store: Store) -> None:
    saved = save(store, 3, world_size=3)
    checkpoint = store.open(3)
    specs = checkpoint.specs()
    assert set(specs) == set(saved)
    assert set(state()) < set(saved)
    for name, tensor in zip(saved, checkpoint.read([specs[name] for name in saved])):
        assert same_bits(tensor, saved[name]), name


@pytest.mark.parametrize("stride", [29, pytest.param(1, marks=pytest.mark.soak)])
def test_a_flipped_bit_is_found_and_the_other_copy_is_used(tmp_path: Path, stride: int) -> None:
    """Of every file of one copy; every single bit in the soak."""
    tiers = Tiers(parse_tiers(f"{tmp_path}/fast, {tmp_path}/slow"), owner="o")
    fast, slow = tiers.stores
    fast.check_writable()
    tensors = small_step(fast)
    copy_step(fast.backend, fast.run, "step-00000001", slow.backend)
    num_flips = 0
    for file in files_of(step_path(fast, 1)):
        original = file.read_bytes()
        for position in range(0, 8 * len(original), stride):
            altered = bytearray(original)
            altered[position // 8] ^= 1 << (position % 8)
            file.write_bytes(altered)
            num_flips += 1
            assert damage_is_found(fast, 1), (file.name, position)
            checkpoint = tiers.open(1)
            loaded = checkpoint.read([checkpoint.specs()[name] for name in tensors])
            assert all(same_bits(got, meant) for got, meant in zip(loaded, tensors.values())), (file.name, position)
            assert [checkpoint.objects(rank) for rank in range(2)] == [{"r": 0}, {"r": 1}], (file.name, position)
        file.write_bytes(original)
    assert not damage_is_found(fast, 1)
    assert num_flips >= 8 * sum(len(file.read_bytes()) for file in files_of(step_path(fast, 1))) // stride
