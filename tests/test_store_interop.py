"""Stock torch reads and reshards our step directories without us, and we reshard them too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from arc_dist.checkpoint_store import ShardTensor, Store, TensorSpec
from arc_dist.checkpoint_store.format import known_dtypes
from ranks import run_ranks
from store_helpers import fsdp_cut, random_tensor, rows, same_bits, save, whole

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def step_directory(root: Path, step: int) -> str:
    return str(root / "run" / f"step-{step:08d}")


def sharded_state() -> dict[str, torch.Tensor]:
    """Tensors as FSDP2 shards them: even, uneven, fewer rows than ranks, one row."""
    return {
        "model.even": random_tensor((8, 3), "float32", 1),
        "model.uneven": random_tensor((5, 2), "bfloat16", 2),
        "model.few": random_tensor((2, 2, 2), "float64", 3),
        "model.one": random_tensor((1,), "int64", 4),
    }


def save_sharded(root: Path, world_size: int) -> None:
    store = Store(root, owner="o")
    store.check_writable()
    replicated = {"optimizer.state.w.step": torch.tensor(3.0), "model.flag": torch.tensor([True, False])}
    parts = {}
    for rank in range(world_size):
        tensors = [rows(n, t, *fsdp_cut(t.shape[0], rank, world_size)) for n, t in sharded_state().items()]
        tensors += [whole(n, t) for n, t in replicated.items()]
        parts[rank] = store.write_part(
            1, generation=0, rank=rank, world_size=world_size, tensors=tensors, objects={"rank": rank}
        )
    store.commit(1, 0, world_size, parts, {"certified": True})


def test_one_process_loads_every_dtype_with_stock_torch(tmp_path: Path) -> None:
    saved = save(Store(tmp_path, owner="o"), 5, world_size=2)
    loaded = {name: torch.empty_like(tensor) for name, tensor in saved.items()}
    dcp.load(loaded, storage_reader=HuggingFaceStorageReader(step_directory(tmp_path, 5)), no_dist=True)
    assert len(loaded) > len(known_dtypes())
    assert all(same_bits(loaded[name], tensor) for name, tensor in saved.items())


@pytest.mark.parametrize("thread_count", [1, 4])
def test_one_process_puts_shards_of_three_ranks_together(tmp_path: Path, thread_count: int) -> None:
    save_sharded(tmp_path, 3)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in sharded_state().items()}
    loaded["optimizer.state.w.step"] = torch.zeros(())
    reader = HuggingFaceStorageReader(step_directory(tmp_path, 1), thread_count=thread_count)
    dcp.load(loaded, storage_reader=reader, no_dist=True)
    assert all(same_bits(loaded[name], tensor) for name, tensor in sharded_state().items())
    assert loaded["optimizer.state.w.step"].item() == 3.0


def test_the_safetensors_library_reads_each_file(tmp_path: Path) -> None:
    save_sharded(tmp_path, 2)
    with safe_open(Path(step_directory(tmp_path, 1), "rank-00001.safetensors"), framework="pt") as file:
        offsets = json.loads(file.metadata()["DCP_SHARDING_INFO"])
        assert offsets["model.uneven"] == {"saved_offsets": [3, 0]}
        assert same_bits(file.get_tensor("model.uneven"), sharded_state()["model.uneven"][3:])
        assert "model.one" not in file.keys()  # noqa: SIM118 - this object is no mapping


def test_a_nested_state_dict_is_found_by_our_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    tensors = [whole(f"model.{n}", t.detach()) for n, t in model.named_parameters()]
    tensors += [whole(f"optimizer.state.{n}.exp_avg", torch.full_like(t, 7)) for n, t in model.named_parameters()]
    store = Store(tmp_path)
    part = store.write_part(1, generation=0, rank=0, world_size=1, tensors=tensors, objects={})
    store.commit(1, 0, 1, {0: part}, {})
    state: dict[str, Any] = {
        "model": {n: torch.zeros_like(t) for n, t in model.named_parameters()},
        "optimizer": {"state": {"weight": {"exp_avg": torch.zeros(2, 3)}}},
    }
    dcp.load(state, storage_reader=HuggingFaceStorageReader(step_directory(tmp_path, 1)), no_dist=True)
    assert same_bits(state["model"]["weight"], model.weight.detach())
    assert bool((state["optimizer"]["state"]["weight"]["exp_avg"] == 7).all())


def load_sharded(rank: int, world_size: int, root: str) -> None:
    """Loads with stock torch into DTensors cut for this world, into replicas, and into plain tensors."""
    mesh = init_device_mesh("cpu", (world_size,))
    expected = sharded_state()
    state: dict[str, Any] = {}
    for name, tensor in expected.items():
        placement = Shard(0) if name != "model.even" else Shard(1)
        state[name] = distribute_tensor(torch.zeros_like(tensor), mesh, [placement])
    state["optimizer.state.w.step"] = torch.zeros(())
    state["model.flag"] = distribute_tensor(torch.zeros(2, dtype=torch.bool), mesh, [Replicate()])
    dcp.load(state, storage_reader=HuggingFaceStorageReader(root))
    for name, tensor in expected.items():
        assert isinstance(state[name], DTensor)
        assert same_bits(state[name].full_tensor(), tensor), name
    assert state["optimizer.state.w.step"].item() == 3.0
    assert state["model.flag"].full_tensor().tolist() == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize(("saved_by", "loaded_by"), [(3, 2), (1, 2), (2, 3)])
def test_stock_torch_reshards_between_worlds(tmp_path: Path, saved_by: int, loaded_by: int) -> None:
    save_sharded(tmp_path, saved_by)
    run_ranks(loaded_by, load_sharded, step_directory(tmp_path, 1))


def save_with_fsdp(rank: int, world_size: int, root: str) -> dict[str, list[float]] | None:
    """Trains a step under FSDP2 with uneven shards, saves through the store, loads with stock torch into a twin."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    def build(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 1))  # 5 rows on 2 ranks; 1 row on 2
        fully_shard(model)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.full((2, 7), 0.5 + rank)).pow(2).sum().backward()
        optimizer.step()

    def named(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in model.named_parameters():
            tensors[f"model.{name}"] = parameter
            for field, value in optimizer.state[parameter].items():
                tensors[f"optimizer.state.{name}.{field}"] = value
        return tensors

    model, optimizer = build(0)
    step(model, optimizer)
    shards: list[ShardTensor] = []
    for name, tensor in named(model, optimizer).items():
        if isinstance(tensor, DTensor):
            local = tensor.to_local().detach()
            _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
            spec = TensorSpec(name, "float32", tuple(local.shape), tuple(tensor.shape), tuple(offset))
            shards.append(ShardTensor(spec, local))
        else:
            shards.append(whole(name, tensor))
    store = Store(root, owner="o")
    part = store.write_part(2, generation=0, rank=rank, world_size=world_size, tensors=shards, objects={})
    parts: list[Any] = [None] * world_size
    dist.all_gather_object(parts, part)
    if rank == 0:
        store.commit(2, 0, world_size, dict(enumerate(parts)), {"certified": True})
    dist.barrier()

    twin, twin_optimizer = build(1)
    step(twin, twin_optimizer)
    state: dict[str, Any] = dict(named(twin, twin_optimizer))
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(Path(root, "run", "step-00000002"))))
    for name, tensor in named(model, optimizer).items():
        mine, theirs = (t.to_local() if isinstance(t, DTensor) else t for t in (tensor, state[name]))
        assert same_bits(mine.detach(), theirs.detach()), name

    # And through our own reader, cut as this rank holds it.
    for shard, tensor in zip(shards, store.open(2).read([s.spec for s in shards])):
        assert same_bits(tensor, shard.data.detach()), shard.spec.name
    return None


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_fsdp2_state_round_trips_through_stock_torch(tmp_path: Path, world_size: int) -> None:
    Store(tmp_path, owner="o").check_writable()
    run_ranks(world_size, save_with_fsdp, str(tmp_path))


@pytest.mark.parametrize("saved_by", [1, 2, 3, 4])
@pytest.mark.parametrize("loaded_by", [1, 2, 3, 8])
def test_our_reader_reshards_between_worlds(tmp_path: Path, saved_by: int, loaded_by: int) -> None:
    save_sharded(tmp_path, saved_by)
    checkpoint = Store(tmp_path).open(1)
    assert checkpoint.verify() == []
    for rank in range(loaded_by):
        for name, tensor in sharded_state().items():
            wanted = rows(name, tensor, *fsdp_cut(tensor.shape[0], rank, loaded_by))
            target = torch.zeros_like(wanted.data)
            checkpoint.read_into([(wanted.spec, target)])
            assert same_bits(target, wanted.data), (name, rank)
    columns = TensorSpec("model.even", "float32", (8, 2), (8, 3), (0, 1))
    (part,) = checkpoint.read([columns])
    assert same_bits(part, sharded_state()["model.even"][:, 1:])


def test_targets_may_have_any_strides(tmp_path: Path) -> None:
    save_sharded(tmp_path, 2)
    tensor = sharded_state()["model.even"]
    target = torch.zeros(3, 8).t()
    Store(tmp_path).open(1).read_into([(TensorSpec.whole("model.even", tensor), target)])
    assert same_bits(target, tensor)


def test_nothing_in_a_step_directory_is_a_pickle(tmp_path: Path) -> None:
    save_sharded(tmp_path, 2)
    for path in Path(step_directory(tmp_path, 1)).iterdir():
        assert path.suffix in (".json", ".safetensors"), path
