"""`arc import` and `arc export --format dcp`: tensors bit for bit, no foreign pickle runs, refusals name the remedy."""

from __future__ import annotations

import argparse
import json
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from arc_dist.checkpoint_store import Checkpoint, Store
from arc_dist.checkpoint_store.commands import OK, add_commands
from arc_dist.checkpoint_store.convert import export_dcp, find_step, import_checkpoint
from arc_dist.checkpoint_store.dcp import ArcReader, ArcWriter
from arc_dist.checkpoint_store.format import known_dtypes
from arc_dist.errors import ConfigError, StoreCorrupt, StoreError, StoreGone
from ranks import run_ranks
from store_helpers import random_tensor, same_bits, save

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning:torch")


def titan_state(seed: int = 0) -> dict[str, Any]:
    """What torchtitan gives to DCP: the model's names at the top, opaque bytes of the data loader, flat optimizer."""
    names = ("tok_embeddings.weight", "layers.0.attention.wq.weight", "norm.weight")
    model = {name: random_tensor((5, 3), "float32", seed + i) for i, name in enumerate(names)}
    return {
        **model,
        "half": random_tensor((4,), "bfloat16", seed),
        "empty": torch.empty(0, 3),
        "optimizer": {
            **{f"state.{name}.exp_avg": random_tensor((5, 3), "float32", seed + 9) for name in names},
            **{f"state.{name}.step": torch.tensor(12.0) for name in names},
            **{f"param_groups.{name}.lr": 0.0003 for name in names},
            **{f"param_groups.{name}.betas": (0.9, 0.95) for name in names},
        },
        "lr_scheduler": {"last_epoch": 12, "base_lrs": [0.0003], "_step_count": 13},
        "train_state": {"step": torch.tensor(12, dtype=torch.int32), "ntokens_seen": torch.tensor(98304)},
        "dataloader": {"dp_rank_0": b"\x80\x04\x95opaque", "world_size": 1},
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and same_bits(a.detach(), b.detach())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def read_back(store: Path) -> dict[str, Any]:
    """Everything of the newest step, nested as it was."""
    return _load_state_dict_from_keys(storage_reader=ArcReader(store))


# ---- import


def test_a_torchtitan_directory(tmp_path: Path) -> None:
    state = titan_state()
    dcp.save(state, checkpoint_id=tmp_path / "step-12", no_dist=True)
    done = import_checkpoint(tmp_path / "step-12", tmp_path / "store")
    assert (done.kind, done.step, done.num_tensors) == ("dcp", 12, 13)
    assert same(state, read_back(tmp_path / "store"))
    checkpoint = Store(tmp_path / "store").open(12)
    assert checkpoint.verify() == []
    assert checkpoint.meta["imported"] == {"format": "dcp", "skipped": []}


def save_classic(rank: int, world_size: int, path: str) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    state: dict[str, Any] = {
        f"model.{i}": distribute_tensor(random_tensor((5, 3), "float32", i), mesh, [Shard(i % 2)]) for i in range(20)
    }
    state |= {"few": distribute_tensor(random_tensor((1, 2), "int64", 3), mesh, [Shard(0)]), "lr": 0.5}
    dcp.save(state, checkpoint_id=path)
    dist.barrier()


@pytest.mark.slow
@pytest.mark.parametrize("group_bytes", [1 << 30, 100])
def test_a_directory_of_several_ranks_with_uneven_shards(tmp_path: Path, group_bytes: int) -> None:
    run_ranks(3, save_classic, str(tmp_path / "7"))
    import_checkpoint(tmp_path / "7", tmp_path / "store", group_bytes=group_bytes)
    found = read_back(tmp_path / "store")
    assert all(same_bits(found["model." + str(i)], random_tensor((5, 3), "float32", i)) for i in range(20))
    assert same_bits(found["few"], random_tensor((1, 2), "int64", 3))
    assert found["lr"] == 0.5
    checkpoint = Store(tmp_path / "store").open(7)
    assert checkpoint.world_size == 3 if group_bytes > 1000 else checkpoint.world_size > 10
    assert checkpoint.verify() == []


@pytest.mark.parametrize("legacy", [False, True])
def test_a_torch_save_file_of_every_dtype(tmp_path: Path, legacy: bool) -> None:
    tensors = {name: random_tensor((3, 5), name, i) for i, name in enumerate(known_dtypes())}
    tensors["view"] = torch.arange(12).reshape(3, 4).t()
    tensors["parameter"] = torch.nn.Parameter(torch.ones(2))
    if legacy:  # the old file format does not know all of them
        tensors = {name: tensors[name] for name in ("float32", "bfloat16", "int64", "bool", "view", "parameter")}
    state = {
        "model": OrderedDict(tensors),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
        "epoch": 3,
    }
    torch.save(state, tmp_path / "checkpoint-30.pt", _use_new_zipfile_serialization=not legacy)
    done = import_checkpoint(tmp_path / "checkpoint-30.pt", tmp_path / "store")
    assert (done.kind, done.step) == ("torch.save", 30)
    found = read_back(tmp_path / "store")
    assert same(tensors, found["model"])
    assert found["optimizer"]["state"]["0"]["step"].item() == 3.0
    assert found["optimizer"]["param_groups"] == [{"lr": 0.1, "params": [0, 1]}]
    assert found["epoch"] == 3


@pytest.mark.parametrize("whole", [True, False])
def test_huggingface_files(tmp_path: Path, whole: bool) -> None:
    tensors = {f"model.layers.{i}.weight": random_tensor((4, 3), "bfloat16", i) for i in range(4)}
    source = tmp_path / "hf"
    source.mkdir()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    where = {name: names[i % 2] for i, name in enumerate(tensors)}
    for file in names:
        save_file({name: t for name, t in tensors.items() if where[name] == file}, source / file, {"format": "pt"})
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    if not whole:
        (source / names[1]).unlink()
        with pytest.raises(StoreCorrupt, match=r"names 2 tensors that are not in the files.*Download"):
            import_checkpoint(source, tmp_path / "store", step=1)
        return
    import_checkpoint(source, tmp_path / "store", step=1)
    assert same(tensors, read_back(tmp_path / "store"))
    import_checkpoint(source / names[0], tmp_path / "store", step=2)
    assert set(read_back(tmp_path / "store")) == {name for name in tensors if where[name] == names[0]}


def save_sharded_safetensors(rank: int, world_size: int, path: str) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    state = {"w": distribute_tensor(random_tensor((5, 3), "float32", 1), mesh, [Shard(0)])}
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(path, save_distributed=True))
    dist.barrier()


@pytest.mark.slow
def test_safetensors_that_dcp_sharded(tmp_path: Path) -> None:
    run_ranks(2, save_sharded_safetensors, str(tmp_path / "hf"))
    import_checkpoint(tmp_path / "hf", tmp_path / "store", step=1)
    assert same({"w": random_tensor((5, 3), "float32", 1)}, read_back(tmp_path / "store"))


# ---- bad input


def test_a_truncated_or_missing_data_file(tmp_path: Path) -> None:
    source = tmp_path / "5"
    dcp.save({"x": torch.ones(200), "y": torch.ones(200)}, checkpoint_id=source, no_dist=True)
    file = source / "__0_0.distcp"
    data = file.read_bytes()
    for cut in (0, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:cut])
        with pytest.raises(StoreCorrupt, match=r"__0_0\.distcp"):
            import_checkpoint(source, tmp_path / "store")
    file.unlink()
    with pytest.raises(StoreGone, match="Copy the whole directory"):
        import_checkpoint(source, tmp_path / "store")
    assert Store(tmp_path / "store").steps() == []
    assert list((tmp_path / "store" / "run").iterdir()) == []  # what was begun is removed


@pytest.mark.parametrize("kind", ["file", "dcp"])
def test_a_flipped_bit_in_a_tensor_of_the_source_is_found(tmp_path: Path, kind: str) -> None:
    """torch itself loads it: it does not compare the checksums of its own zip files."""
    source = tmp_path / "5"
    state = {"x": torch.full((1000,), 1.5)}
    if kind == "file":
        torch.save(state, source)
    else:
        dcp.save(state, checkpoint_id=source, no_dist=True)
    file = source if kind == "file" else source / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[data.index(torch.full((1000,), 1.5).numpy().tobytes()) + 2000] ^= 1
    file.write_bytes(data)
    if kind == "file":
        assert not torch.equal(torch.load(source, weights_only=True)["x"], state["x"])
    with pytest.raises(StoreCorrupt, match="differ from its checksum"):
        import_checkpoint(source, tmp_path / "store")


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "5"
    dcp.save({"x": torch.ones(200), "y": torch.ones(200)}, checkpoint_id=source, no_dist=True)
    file = source / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    done: list[int] = []
    with pytest.raises(StoreCorrupt):
        import_checkpoint(source, tmp_path / "store", group_bytes=1, progress=done.append)
    assert done == [800], "the first tensor must have been written before the second failed"
    assert list((tmp_path / "store" / "run").iterdir()) == []


def test_a_truncated_torch_file(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1000)}, tmp_path / "5.pt")
    data = (tmp_path / "5.pt").read_bytes()
    for cut in (0, 10, len(data) // 2, len(data) - 1):
        (tmp_path / "5.pt").write_bytes(data[:cut])
        with pytest.raises((StoreCorrupt, ConfigError), match=r"5\.pt"):
            import_checkpoint(tmp_path / "5.pt", tmp_path / "store")


def test_sources_that_cannot_be_imported_say_why(tmp_path: Path) -> None:
    store = tmp_path / "store"

    def refused(source: Path, error: type[Exception], text: str, **options: Any) -> None:
        with pytest.raises(error, match=text):
            import_checkpoint(source, store, **{"step": 1, **options})

    refused(tmp_path / "nothing", StoreGone, "no such file")
    refused(tmp_path, ConfigError, "no checkpoint that is known")
    ours = Store(tmp_path / "ours", owner="o")
    ours.check_writable()
    save(ours, 5)
    refused(tmp_path / "ours" / "run" / "step-00000005", ConfigError, "needs no import")
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "__0.metadata").touch()
    refused(tmp_path / "local", ConfigError, "use_collectives=False")
    torch.save([1, 2], tmp_path / "list.pt")
    refused(tmp_path / "list.pt", ConfigError, "not a dictionary")
    torch.save({"x": torch.eye(2).to_sparse()}, tmp_path / "sparse.pt")
    refused(tmp_path / "sparse.pt", ConfigError, "tensor x: of layout torch.sparse_coo")
    torch.save({"a": {"b": torch.ones(1)}, "a.b": torch.ones(2)}, tmp_path / "twice.pt")
    refused(tmp_path / "twice.pt", ConfigError, r"two values have the name a\.b")
    good = tmp_path / "good.pt"
    torch.save({"x": torch.ones(2)}, good)
    refused(good, ConfigError, "Give --step", step=None)
    refused(good, ConfigError, "nothing with the name y to skip", skip=["y"])
    refused(good, ConfigError, "no tensor", skip=["x"])
    assert not store.exists()
    import_checkpoint(good, store, step=1)
    refused(good, ConfigError, "has a step 1 already")


# ---- export


def test_stock_dcp_loads_what_was_exported(tmp_path: Path) -> None:
    state = titan_state()
    dcp.save(state, storage_writer=ArcWriter(tmp_path / "store", step=12))
    export_dcp(tmp_path / "store", None, tmp_path / "classic")
    loaded = titan_state(seed=50)
    loaded["lr_scheduler"]["last_epoch"] = 0
    assert not same(state, loaded)
    dcp.load(loaded, storage_reader=FileSystemReader(tmp_path / "classic"), no_dist=True)
    assert same(state, loaded)
    dcp_to_torch_save(tmp_path / "classic", tmp_path / "file.pt")  # which rebuilds the nesting from the metadata
    assert same(state, torch.load(tmp_path / "file.pt", weights_only=True))


def test_a_step_of_the_training_loop_is_exported_by_its_flat_names(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", owner="o")
    store.check_writable()
    saved = save(store, 5, world_size=3)
    export_dcp(tmp_path / "store" / "run" / "step-00000005", None, tmp_path / "classic")
    loaded = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    dcp.load(loaded, storage_reader=FileSystemReader(tmp_path / "classic"), no_dist=True)
    assert same(saved, loaded)


def load_exported(rank: int, world_size: int, path: str) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    state = {"w": distribute_tensor(torch.zeros(5, 3), mesh, [Shard(0)])}
    dcp.load(state, storage_reader=FileSystemReader(path))
    assert same_bits(state["w"].full_tensor(), random_tensor((5, 3), "float32", 1))


@pytest.mark.slow
def test_stock_dcp_reshards_what_was_exported(tmp_path: Path) -> None:
    dcp.save({"w": random_tensor((5, 3), "float32", 1)}, storage_writer=ArcWriter(tmp_path / "store", step=1))
    export_dcp(tmp_path / "store", 1, tmp_path / "classic")
    run_ranks(2, load_exported, str(tmp_path / "classic"))


def test_an_export_holds_one_group_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {f"x{i}": random_tensor((1000,), "float32", i) for i in range(8)}
    dcp.save(state, storage_writer=ArcWriter(tmp_path / "store", step=1))
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    read = Checkpoint.read

    def counted(self: Checkpoint, specs: Any) -> list[torch.Tensor]:
        nonlocal most
        tensors = read(self, specs)
        alive.extend(weakref.ref(tensor) for tensor in tensors)
        most = max(most, sum(ref() is not None for ref in alive))
        return tensors

    monkeypatch.setattr(Checkpoint, "read", counted)
    export_dcp(tmp_path / "store", 1, tmp_path / "classic", group_bytes=8000)
    assert len(alive) == 8
    assert most <= 3, most  # two of the group, and the one that is written last of the group before
    assert len(list((tmp_path / "classic").glob("*.distcp"))) == 4
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    dcp.load(loaded, storage_reader=FileSystemReader(tmp_path / "classic"), no_dist=True)
    assert same(state, loaded)


def test_there_and_back_again(tmp_path: Path) -> None:
    state = titan_state()
    dcp.save(state, storage_writer=ArcWriter(tmp_path / "a", step=12))
    export_dcp(tmp_path / "a", 12, tmp_path / "12")
    import_checkpoint(tmp_path / "12", tmp_path / "b")
    assert same(state, read_back(tmp_path / "b"))
    digests = [
        {(t.name, c.digest) for t in Store(tmp_path / name).open(12).manifest.tensors for c in t.chunks}
        for name in ("a", "b")
    ]
    assert digests[0] == digests[1]


def test_damage_is_found_by_export_and_leaves_nothing(tmp_path: Path) -> None:
    dcp.save({"x": torch.ones(100), "y": torch.ones(100)}, storage_writer=ArcWriter(tmp_path / "store", step=1))
    path = tmp_path / "store" / "run" / "step-00000001" / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreCorrupt, match="the bytes of tensor y differ"):
        export_dcp(tmp_path / "store", 1, tmp_path / "classic")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store"]


def test_export_replaces_nothing_and_says_which_step(tmp_path: Path) -> None:
    for run in ("a", "b"):
        dcp.save({"x": torch.ones(1)}, storage_writer=ArcWriter(tmp_path / "store", run=run, step=1))
    with pytest.raises(ConfigError, match=r"2 runs fit \(a, b\)"):
        find_step(tmp_path / "store")
    assert find_step(tmp_path / "store" / "a").step == 1
    assert find_step(tmp_path / "store", run="b").step == 1
    with pytest.raises(StoreGone, match="no committed step 9"):
        find_step(tmp_path / "store" / "a", step=9)
    with pytest.raises(ConfigError, match="names step 1, not 2"):
        find_step(tmp_path / "store" / "a" / "step-00000001", step=2)
    with pytest.raises(StoreGone, match="no such store"):
        find_step(tmp_path / "nothing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(ConfigError, match="is there already"):
        export_dcp(tmp_path / "store" / "a", 1, tmp_path / "full")
    with pytest.raises(StoreError, match="no such directory"):
        export_dcp(tmp_path / "store" / "a", 1, tmp_path / "missing" / "out")
    (tmp_path / "empty").mkdir()
    export_dcp(tmp_path / "store" / "a", 1, tmp_path / "empty")
    assert (tmp_path / "empty" / ".metadata").exists()


# ---- the commands


def arc(*argv: str) -> int:
    parser = argparse.ArgumentParser(prog="arc")
    add_commands(parser.add_subparsers(required=True))
    args = parser.parse_args(argv)
    return args.run(args)


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = titan_state()
    dcp.save(state, checkpoint_id=tmp_path / "step-12", no_dist=True)
    store, out = str(tmp_path / "store"), str(tmp_path / "out")
    assert arc("import", str(tmp_path / "step-12"), "--store", store, "--skip", "dataloader.dp_rank_0") == OK
    assert "imported dcp as step 12 of run run: 13 tensors" in capsys.readouterr().out
    assert arc("verify", store) == OK
    capsys.readouterr()
    assert arc("export", store, out, "--format", "dcp", "--json") == OK
    told = json.loads(capsys.readouterr().out)
    assert (told["step"], told["path"], told["num_tensors"]) == (12, out, 13)
    loaded = titan_state(seed=50)
    del loaded["dataloader"]["dp_rank_0"], state["dataloader"]["dp_rank_0"]
    dcp.load(loaded, storage_reader=FileSystemReader(out), no_dist=True)
    assert same(state, loaded)
    arguments = ("import", str(tmp_path / "step-12"), "--store", store, "--step", "13", "--uncertified", "--json")
    assert arc(*arguments) == OK
    assert json.loads(capsys.readouterr().out)["step"] == 13
    assert find_step(store).step == 12
