"""Save under one parallelism and world, load under another: the whole state, optimizer included, is bit for bit equal.

The states are real ones: a model trained for two steps under DDP, FSDP2 (`fully_shard`), HSDP (a mesh of replicas and
shards) or alone, taken with torch's `get_state_dict`, whose tensors divide unevenly or into fewer rows than ranks.
"""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from arc_dist.checkpoint_store import Store
from arc_dist.checkpoint_store.buffers import read_bytes
from arc_dist.checkpoint_store.dcp import ArcLoadPlanner, ArcReader, ArcWriter
from ranks import run_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch"),
]

SAVED_BY = [("ddp", 4), ("fsdp", 4), ("hsdp", 4), ("single", 1)]
LOADED_BY = [("single", 1), ("ddp", 2), ("fsdp", 2), ("fsdp", 3), ("hsdp", 4)]


class Net(nn.Module):
    """Dimensions of 7, 5, 3, 2 and 1: no world but 1 divides them all, and some have fewer rows than ranks."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.layers = nn.ModuleList([nn.Linear(5, 3), nn.Linear(3, 2, dtype=torch.float32)])
        self.head = nn.Linear(2, outputs)
        self.scale = nn.Parameter(torch.ones(2))
        self.register_buffer("table", torch.rand(3, 2))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return self.head(hidden * self.scale)


def build(kind: str, world_size: int, seed: int, outputs: int = 1) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model: nn.Module = Net(outputs)
    if kind == "fsdp":
        for layer in model.layers:  # type: ignore[union-attr]
            fully_shard(layer)
        fully_shard(model)
    elif kind == "hsdp":
        mesh = init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
    elif kind == "ddp":
        model = DistributedDataParallel(model)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 0.02 + seed}]
    return model, torch.optim.AdamW(groups, lr=0.01 + seed)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.tensor([(rank + step) % 7, 2, 5])).pow(2).sum().backward()
        optimizer.step()


class App(Stateful):
    """What a trainer gives to DCP."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def digests(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Of the whole state, gathered. Every rank must call this; the result counts on rank 0."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    result: dict[str, str] = {}

    def visit(path: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            assert not isinstance(value, DTensor)
            result[path] = f"{value.dtype} {list(value.shape)} {hashlib.sha256(read_bytes(value)).hexdigest()}"
        elif isinstance(value, dict):
            for key, item in value.items():
                visit(f"{path}.{key}", item)
        elif path.endswith("params"):
            result[path] = repr(sorted(value))  # in which order a group lists its names is torch's affair
        elif isinstance(value, (list, tuple)) and any(isinstance(item, dict) for item in value):
            for index, item in enumerate(value):
                visit(f"{path}.{index}", item)
        else:
            result[path] = repr(value)

    visit("model", model_state)
    visit("optimizer", optimizer_state)
    return result


def save_trained(rank: int, world_size: int, root: str, kind: str) -> dict[str, str]:
    model, optimizer = build(kind, world_size, seed=1)
    train(model, optimizer, rank, steps=2)
    dcp.save({"app": App(model, optimizer)}, storage_writer=ArcWriter(root, step=2))
    return digests(model, optimizer)


def load_trained(rank: int, world_size: int, root: str, kind: str, expected: dict[str, str]) -> None:
    model, optimizer = build(kind, world_size, seed=2)
    before = digests(model, optimizer)
    dcp.load({"app": App(model, optimizer)}, storage_reader=ArcReader(root), planner=ArcLoadPlanner())
    after = digests(model, optimizer)
    if rank == 0:
        assert before != expected
        assert {n: (after.get(n), expected[n]) for n in expected if after.get(n) != expected[n]} == {}
        assert after.keys() == expected.keys()
    train(model, optimizer, rank, steps=1)  # and what was loaded can be trained on


@pytest.fixture(scope="module", params=SAVED_BY, ids=lambda p: f"{p[0]}{p[1]}")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    kind, world_size = request.param
    root = tmp_path_factory.mktemp(kind)
    expected = run_ranks(world_size, save_trained, str(root), kind, timeout_s=100)[0]
    checkpoint = Store(root).open(2)
    assert checkpoint.verify() == []
    assert checkpoint.world_size == world_size
    assert any(name.endswith("exp_avg_sq") for name in checkpoint.specs())
    assert len([name for name in expected if name.endswith("exp_avg_sq")]) == 8
    return str(root), expected


@pytest.mark.parametrize(("kind", "world_size"), LOADED_BY, ids=str)
def test_the_whole_state_is_equal_after_resharding(
    saved: tuple[str, dict[str, str]], kind: str, world_size: int
) -> None:
    root, expected = saved
    run_ranks(world_size, load_trained, root, kind, expected, timeout_s=100)


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["fsdp", "hsdp", "ddp"])
def test_the_whole_state_is_equal_on_eight_ranks(saved: tuple[str, dict[str, str]], kind: str) -> None:
    root, expected = saved
    run_ranks(8, load_trained, root, kind, expected, timeout_s=110, collective_timeout_s=90)


def test_shards_of_uneven_tensors_are_stored_as_torch_cuts_them(saved: tuple[str, dict[str, str]]) -> None:
    root, _ = saved
    manifest = Store(root).open(2).manifest
    cuts = {t.name: sorted((c.offsets, c.shape) for c in t.chunks) for t in manifest.tensors}
    rows = [shape[0] for _, shape in cuts["app.model.embed.weight"]]
    assert rows in ([7], [2, 2, 2, 1], [4, 3]), rows  # one process and DDP; FSDP on 4; HSDP with shards of 2
    assert [shape for _, shape in cuts["app.model.head.weight"]] == [(1, 2)]


def load_model_only(rank: int, world_size: int, root: str, expected: dict[str, str]) -> None:
    """The optimizer keeps its own state; a wider head keeps its own weights when the load is not strict."""
    model, optimizer = build("fsdp", world_size, seed=2)
    planner = ArcLoadPlanner()
    state = {"app": {"model": model.state_dict()}}
    report_keys = {n.removeprefix("model.") for n in expected if n.startswith("model.")}
    with pytest.raises(CheckpointException, match="in the checkpoint, but not in the state"):
        dcp.load(state, storage_reader=ArcReader(root), planner=planner)
    assert planner.report.missing == ()
    assert all(name.startswith("app.optimizer.") for name in planner.report.unexpected)

    lenient = ArcLoadPlanner(strict=False)
    state["app"]["model"]["extra.weight"] = torch.full((2,), 5.0)
    dcp.load(state, storage_reader=ArcReader(root), planner=lenient)
    assert lenient.report.missing == ("app.model.extra.weight",)
    assert lenient.report.unexpected == planner.report.unexpected
    assert state["app"]["model"].pop("extra.weight").tolist() == [5.0, 5.0]
    assert set(state["app"]["model"]) == report_keys
    model.load_state_dict(state["app"]["model"])
    loaded = digests(model, optimizer)
    if rank == 0:
        assert {n: loaded[n] for n in expected if n.startswith("model.")} == {
            n: expected[n] for n in expected if n.startswith("model.")
        }
        assert loaded != expected
    dist.barrier()


def test_the_model_alone_is_loaded_on_another_world(saved: tuple[str, dict[str, str]]) -> None:
    root, expected = saved
    run_ranks(2, load_model_only, root, expected)


def load_with_stock_torch(rank: int, world_size: int, directory: str, expected: dict[str, str]) -> None:
    model, optimizer = build("fsdp", world_size, seed=2)
    state = {"app": {"model": model.state_dict()}}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(directory))
    model.load_state_dict(state["app"]["model"])
    loaded = digests(model, optimizer)
    if rank == 0:
        names = [name for name in expected if name.startswith("model.")]
        assert {n: loaded[n] for n in names} == {n: expected[n] for n in names}


@pytest.mark.parametrize("world_size", [1, 3])
def test_stock_torch_reshards_it_without_us(saved: tuple[str, dict[str, str]], world_size: int) -> None:
    root, expected = saved
    run_ranks(world_size, load_with_stock_torch, f"{root}/run/step-00000002", expected)


def load_other_model(rank: int, world_size: int, root: str) -> str:
    model, optimizer = build("fsdp", world_size, seed=2, outputs=4)
    with pytest.raises(CheckpointException) as info:
        dcp.load({"app": App(model, optimizer)}, storage_reader=ArcReader(root), planner=ArcLoadPlanner())
    return str(info.value)


def test_a_model_of_other_shapes_is_refused_on_all_ranks(saved: tuple[str, dict[str, str]]) -> None:
    for text in run_ranks(2, load_other_model, saved[0]):
        assert "app.model.head.weight: [1, 2] in the checkpoint, [4, 2] in the state" in text
        assert "app.model.head.bias: [1] in the checkpoint, [4] in the state" in text
