"""Training state under DDP and FSDP2, on real ranks: shards, uneven and empty ones, gathered parameters, replicas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from arc_dist.errors import CheckpointMismatch, ConfigError
from arc_dist.snapshot.ring import SnapshotRing
from arc_dist.snapshot.state import TrainingState
from ranks import run_ranks

WORLD_SIZE = 2
WIDTH = 7  # odd: no two ranks get shards of the same size


class Block(nn.Module):
    """A transformer block, with biases of one element, of which only one rank gets any."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 1, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 15), nn.GELU(), nn.Dropout(0.1), nn.Linear(15, WIDTH))
        self.gate = nn.Linear(WIDTH, 1)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        normed = self.norm(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + torch.sigmoid(self.gate(x)) * self.mlp(x)


class Transformer(nn.Module):
    def __init__(self, *, batch_norm: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.norm = nn.BatchNorm1d(WIDTH) if batch_norm else nn.Identity()
        self.head = nn.Linear(WIDTH, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        x = self.embed(index)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.frozen(x))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1),
    "adam tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2)),
}


def make(kind: str, optimizer_kind: str, *, seed: int = 0) -> tuple[TrainingState, Callable[[], None]]:
    torch.manual_seed(seed)
    model: nn.Module = Transformer(batch_norm=kind == "ddp batch norm")
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = DistributedDataParallel(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[optimizer_kind](parameters)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
    torch.manual_seed(1000 * seed + dist.get_rank())  # other data and dropout on each rank

    def step() -> None:
        optimizer.zero_grad()
        index = torch.randint(0, 13, (4, 5))
        nn.functional.cross_entropy(model(index).flatten(0, 1), index.flatten()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()

    return TrainingState({"model": model}, {"optimizer": optimizer}, [scheduler]), step


def capture(ring: SnapshotRing, state: TrainingState, step: int) -> int:
    slot = ring.capture(step, 0, *state.tensors(), state.small())
    assert slot is not None
    return slot


def _goes_back(rank: int, world_size: int, kind: str) -> list[dict[str, Any]]:
    return [_goes_back_with(kind, optimizer_kind) for optimizer_kind in OPTIMIZERS]


def _goes_back_with(kind: str, optimizer_kind: str) -> dict[str, Any]:
    state, step = make(kind, optimizer_kind)
    ring = SnapshotRing(slots=3)
    digests = [state.digest()]
    slots = [capture(ring, state, 0)]
    for number in range(1, 5):
        step()
        digests.append(state.digest())
        if number in (1, 2):
            slots.append(capture(ring, state, number))
    assert len(set(digests)) == 5
    for start in (2, 1, 0, 2):
        before = {spec.name: tensor.data_ptr() for spec, tensor in zip(*state.tensors(), strict=True)}
        state.restore(*ring.restore(slots[start]))
        assert state.digest() == digests[start], f"{optimizer_kind}: back at {start}"
        after = {spec.name: tensor.data_ptr() for spec, tensor in zip(*state.tensors(), strict=True)}
        assert all(before.get(name, pointer) == pointer for name, pointer in after.items())
        for number in range(start + 1, 5):
            step()
            assert state.digest() == digests[number], f"{optimizer_kind}: from {start}, at {number}"
    return {"replica": state.replica_digest(), "replicated": ring.held()[0].replicated}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_going_back_and_on_equals_never_having_gone_back(kind: str) -> None:
    for first, second in zip(*run_ranks(WORLD_SIZE, _goes_back, kind), strict=True):
        assert first["replica"] == second["replica"]
        assert first["replicated"] == second["replicated"] == (kind == "ddp")


def _leaves(rank: int, world_size: int, directory: str, kind: str) -> list[str]:
    state, step = make(kind, "adamw")
    ring = SnapshotRing(Path(directory, str(rank)))
    for _ in range(3):
        step()
    capture(ring, state, 3)
    digests = [state.digest()]
    step()
    return [*digests, state.digest()]


def _takes_over(rank: int, world_size: int, directory: str, kind: str) -> list[str]:
    state, step = make(kind, "adamw", seed=5)
    step()  # also from a state that has moved on, and with DDP's buckets rebuilt as they were
    state.restore(*SnapshotRing(Path(directory, str(rank))).restore(0))
    digests = [state.digest()]
    step()
    return [*digests, state.digest()]


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "ddp batch norm"])
def test_new_processes_take_over_bit_for_bit(kind: str, tmp_path: Path) -> None:
    left = run_ranks(WORLD_SIZE, _leaves, str(tmp_path), kind)
    assert run_ranks(WORLD_SIZE, _takes_over, str(tmp_path), kind) == left


def _made_anew(rank: int, world_size: int) -> None:
    """An optimizer that has never stepped gets sharded state of the right kind."""
    state, step = make("fsdp", "adamw")
    step()
    ring = SnapshotRing()
    slot = capture(ring, state, 1)
    digest = state.digest()
    for small in (True, False):
        other, other_step = make("fsdp", "adamw", seed=9)
        specs, tensors, objects = ring.restore(slot)
        other.restore(specs, tensors, objects if small else None)
        assert not small or other.digest() == digest
        assert len(other.optimizers[0].state) == len(state.optimizers[0].state)
        for parameter, fields in other.optimizers[0].state.items():
            assert isinstance(parameter, DTensor)
            for field in ("exp_avg", "exp_avg_sq"):
                assert isinstance(fields[field], DTensor)
                assert fields[field].placements == parameter.placements
                assert fields[field].shape == parameter.shape
                assert fields[field].stride() == parameter.stride()
            assert not isinstance(fields["step"], DTensor)
            assert fields["step"].ndim == 0
        other_step()


def test_sharded_optimizer_state_is_made_where_it_is_missing() -> None:
    run_ranks(WORLD_SIZE, _made_anew)


def _specs(rank: int, world_size: int) -> list[Any]:
    state, step = make("fsdp", "adamw")
    step()
    return [(s.name, s.shape, s.global_shape, s.offsets, s.replicated) for s in state.tensors()[0]]


def test_shards_tile_the_whole_and_names_are_the_bare_models() -> None:
    ranks = run_ranks(WORLD_SIZE, _specs)
    names = [row[0] for row in ranks[0]]
    assert [row[0] for row in ranks[1]] == names
    assert len(set(names)) == len(names)
    assert "model.embed.weight" in names
    assert "model.head.weight" not in names  # tied
    assert "model.frozen.weight" in names
    assert "optimizer.state.blocks.1.mlp.0.weight.exp_avg" in names
    empty = 0
    for (name, shape, whole, offsets, replicated), (_, shape_1, whole_1, offsets_1, replicated_1) in zip(
        *ranks, strict=True
    ):
        assert whole == whole_1
        assert replicated == replicated_1 == (name.endswith((".step", ".passes")))
        if replicated:
            assert shape == shape_1 == whole
            continue
        assert shape[0] + shape_1[0] == whole[0]
        assert shape[1:] == shape_1[1:] == whole[1:]
        assert offsets[0] == 0
        assert offsets_1[0] == shape[0]
        empty += 0 in shape_1
    assert empty, "no rank had an empty shard, so that was not tested"


def _gathered(rank: int, world_size: int) -> None:
    """Between a forward pass without backward and the next step the root's parameters stay gathered."""
    state, step = make("fsdp", "adamw")
    step()
    model = state.models["model"]
    assert isinstance(model, FSDPModule)
    specs, tensors = state.tensors()
    with torch.no_grad():
        model(torch.zeros(1, 3, dtype=torch.int64))
    model.unshard()
    assert not any(isinstance(p, DTensor) for p in model._parameters.values() if p is not None)
    assert not isinstance(model.get_submodule("embed").weight, DTensor)
    assert state.tensors()[0] is specs
    assert state.tensors()[1] is tensors
    assert isinstance(model.get_submodule("embed").weight, DTensor)
    # Restoring while gathered must not leave the old gathered values in use.
    ring = SnapshotRing()
    slot = capture(ring, state, 1)
    model.eval()
    index = torch.arange(6).view(2, 3)
    with torch.no_grad():
        expected = model(index)
        for tensor in state.tensors()[1]:
            tensor.zero_()
        assert not torch.equal(model(index), expected)
        assert not isinstance(model.get_submodule("embed").weight, DTensor)
        state.restore(*ring.restore(slot))
        assert torch.equal(model(index), expected)


def test_gathered_parameters_are_let_go_first() -> None:
    run_ranks(WORLD_SIZE, _gathered)


def _batch_norm(rank: int, world_size: int) -> list[Any]:
    state, step = make("ddp batch norm", "adamw")
    for _ in range(2):
        step()
    moving = {name: tensor.clone() for name, tensor in state.moving_buffers().items()}
    assert sorted(moving) == ["model.norm.num_batches_tracked", "model.norm.running_mean", "model.norm.running_var"]
    digest = state.digest()
    ring = SnapshotRing()
    slot = capture(ring, state, 2)
    step()
    snapshot = ring.restore(slot)
    # The replicated values may come from another rank; the rank's own statistics win.
    for spec, tensor in zip(snapshot.specs, snapshot.tensors, strict=True):
        if "running" in spec.name:
            tensor.fill_(3.0)
    state.restore(*snapshot)
    assert state.digest() == digest
    return [state.replica_digest(), moving["model.norm.running_mean"].tolist()]


def test_each_rank_keeps_its_own_running_statistics() -> None:
    first, second = run_ranks(WORLD_SIZE, _batch_norm)
    assert first[0] == second[0]
    assert first[1] != second[1], "the ranks' statistics were equal, so nothing was tested"


def _refusals(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    fully_shard(model, mesh=mesh)
    with pytest.raises(ConfigError, match=r"2 of 2 parameters .*\[4, 4\].*after fully_shard"):
        TrainingState({"m": model}, {"o": optimizer})
    state = TrainingState({"m": model}, {})
    specs, tensors = state.tensors()
    whole = TrainingState({"m": nn.Linear(4, 4)}, {})
    with pytest.raises(CheckpointMismatch, match=r"model.weight is \[2, 4\] float32, this model has \[4, 4\]"):
        whole.restore(specs, tensors, None)
    uneven = nn.Linear(1, 2 * world_size)
    fully_shard(uneven, mesh=mesh)
    other = TrainingState({"m": uneven}, {})
    moved = [
        type(spec)(
            spec.name, spec.dtype, spec.shape, spec.global_shape, (2 - spec.offsets[0], *spec.offsets[1:]), False
        )
        for spec in other.tensors()[0]
    ]
    with pytest.raises(CheckpointMismatch, match="this rank holds the part at"):
        other.restore(moved, other.tensors()[1], None)


def test_other_shardings_are_refused() -> None:
    run_ranks(WORLD_SIZE, _refusals)
