"""Whose snapshots may stand in for whose: keys on real ranks, for each kind of parallelism and for none."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from arc_dist.snapshot.replicas import replica_key, reshards
from arc_dist.snapshot.ring import SnapshotRing
from arc_dist.snapshot.state import TrainingState
from ranks import run_ranks

WORLD_SIZE = 4
HSDP = {"mesh_dim_names": ("replicate", "shard")}


def key(*models: nn.Module, zero: bool = False) -> int:
    named = {str(number): model for number, model in enumerate(models)}
    optimizers = {}
    for name, model in named.items():
        if zero:
            optimizers[name] = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1)
        else:
            optimizers[name] = torch.optim.AdamW(model.parameters())
    return replica_key(TrainingState(named, optimizers))


def small(outputs: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, outputs))


class Part(nn.Module):
    """A model of which DDP wraps a part; the rest is a rank's own."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = DistributedDataParallel(small())
        self.own = nn.Linear(2, 2)


def _keys(rank: int, world_size: int) -> dict[str, int]:
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    whole, grid = init_device_mesh("cpu", (world_size,)), init_device_mesh("cpu", (2, 2), **HSDP)
    turned = init_device_mesh("cpu", (1, 4), **HSDP)
    hooked = DistributedDataParallel(small())
    hooked.register_comm_hook(None, lambda state, bucket: torch.futures.Future())
    beside = fully_shard(small(), mesh=grid)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about a part of ZeroRedundancyOptimizer
        zero = key(DistributedDataParallel(small()), zero=True)
    return {
        "none": key(small()),
        "ddp": key(DistributedDataParallel(small())),
        "ddp, wider": key(DistributedDataParallel(small(7))),
        "ddp of halves": key(DistributedDataParallel(small(), process_group=halves[rank // 2])),
        "ddp of a part": key(Part()),
        "ddp with a hook": key(hooked),
        "ddp, and a model of its own": key(DistributedDataParallel(small()), small()),
        "ddp with sharded optimizer state": zero,
        "fsdp": key(fully_shard(small(), mesh=whole)),
        "fsdp of almost nothing": key(fully_shard(nn.Linear(1, 1), mesh=whole)),
        "hsdp": key(fully_shard(small(), mesh=grid)),
        "hsdp, one replica": key(fully_shard(small(), mesh=turned)),
        "hsdp beside ddp": key(beside, DistributedDataParallel(small())),
        "hsdp, and a model of its own": key(fully_shard(small(), mesh=grid), small()),
    }


def test_only_replicas_have_equal_keys() -> None:
    told = run_ranks(WORLD_SIZE, _keys)
    groups: dict[str, list[set[int]]] = {}
    for kind in told[0]:
        keys = [each[kind] for each in told]
        groups[kind] = [{r for r, other in enumerate(keys) if other == key} for key in dict.fromkeys(keys) if key]
    everyone, pairs = [{0, 1, 2, 3}], [{0, 2}, {1, 3}]
    assert groups == {
        "none": [],
        "ddp": everyone,
        "ddp, wider": everyone,
        "ddp of halves": [{0, 1}, {2, 3}],
        "ddp of a part": [],
        "ddp with a hook": [],
        "ddp, and a model of its own": [],
        "ddp with sharded optimizer state": [],
        "fsdp": [],
        "fsdp of almost nothing": [],
        "hsdp": pairs,
        "hsdp, one replica": [],
        "hsdp beside ddp": pairs,
        "hsdp, and a model of its own": [],
    }
    keys = [key for each in told for key in each.values() if key]
    assert len(set(keys)) == 1 + 1 + 2 + 2 + 2  # another state has another key
    assert all(0 < key < 1 << 63 for key in keys)


class Failing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("a peer is lost")


def _interrupted(rank: int, world_size: int) -> tuple[bool, bool, list[int]]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 4), Failing())
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), **HSDP))
    state = TrainingState({"m": model}, {"o": torch.optim.SGD(model.parameters())})
    before, specs = replica_key(state), list(state.tensors()[0])
    try:
        model(torch.ones(2, 4))
    except RuntimeError:
        gathered = not isinstance(model[0].weight, DTensor)
        assert reshards(state, before)
    ring = SnapshotRing(replica_key=before)
    now, tensors = state.tensors()
    ring.capture(1, 0, now, tensors, {}, parting=True)
    (info,) = ring.held()
    assert info.replica_key == before
    ring.close()
    return gathered, replica_key(state) == before and now == specs, [tensor.numel() for tensor in tensors]


def test_shards_are_back_in_place_after_a_forward_pass_that_failed() -> None:
    for gathered, same, numels in run_ranks(WORLD_SIZE, _interrupted):
        assert gathered, "nothing had been gathered, so nothing was tested"
        assert same
        assert numels == [8, 2]
