"""Several real ranks save and load through ArcWriter and ArcReader; one that fails, hangs or dies spoils nothing."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from arc_dist.checkpoint_store import Store
from arc_dist.checkpoint_store.dcp import ArcReader, ArcWriter
from dcp_helpers import checkpoint_fails, failures, flip
from ranks import rank_outcomes, run_ranks
from store_helpers import random_tensor, same_bits

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch")


# ---- several ranks


def whole_state() -> dict[str, torch.Tensor]:
    return {"even": random_tensor((8, 3), "float32", 1), "uneven": random_tensor((5, 2), "bfloat16", 2)}


def sharded(world_size: int, fill: bool) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world_size,))
    tensors = {
        n: distribute_tensor(t if fill else torch.zeros_like(t), mesh, [Shard(0)]) for n, t in whole_state().items()
    }
    extra = {"copy": torch.arange(6.0), "empty": torch.empty(0, 3), "lr": 0.5} if fill else None
    return {"model": tensors, **(extra or {"copy": torch.zeros(6), "empty": torch.empty(0, 3), "lr": 0.0})}


def is_loaded(state: dict[str, Any]) -> bool:
    tensors = all(same_bits(state["model"][n].full_tensor(), t) for n, t in whole_state().items())
    return tensors and same_bits(state["copy"], torch.arange(6.0)) and state["lr"] == 0.5


def save_and_load(rank: int, world_size: int, root: str) -> list[str]:
    dcp.save(sharded(world_size, True), storage_writer=ArcWriter(root, step=3))
    state = sharded(world_size, False)
    assert not is_loaded(state)
    dcp.load(state, storage_reader=ArcReader(root))
    assert is_loaded(state)
    return sorted(path.name for path in Path(root, "run", "step-00000003").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_save_and_load_together(tmp_path: Path, world_size: int) -> None:
    names = run_ranks(world_size, save_and_load, str(tmp_path))[0]
    assert len(names) == 2 * world_size + 2
    manifest = Store(tmp_path).open(3).manifest
    assert manifest.world_size == world_size
    assert {t.name for t in manifest.tensors} == {"model.even", "model.uneven", "copy", "empty"}
    assert Store(tmp_path).open(3).verify() == []


def save_async(rank: int, world_size: int, root: str, kind: str) -> None:
    state = sharded(world_size, True)
    future = dcp.async_save(
        state, storage_writer=ArcWriter(root, step=3), async_checkpointer_type=AsyncCheckpointerType(kind)
    )
    for tensor in [*state["model"].values(), state["copy"]]:  # training goes on while the copy is written
        (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
    future = getattr(future, "upload_completion", future)
    future.result(timeout=90)
    loaded = sharded(world_size, False)
    dcp.load(loaded, storage_reader=ArcReader(root, step=3))
    assert is_loaded(loaded)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["thread", "process"])
def test_async_saves_commit_what_was_staged(tmp_path: Path, kind: str) -> None:
    run_ranks(2, save_async, str(tmp_path), kind, timeout_s=100, collective_timeout_s=90)
    assert Store(tmp_path).open(3).verify() == []


def fail_on_one_rank(rank: int, world_size: int, root: str, bad_rank: int, owner: str | None) -> str:
    """One rank has state that cannot be stored: it fails in write_data, after the others may have written theirs."""
    state = sharded(world_size, True)
    mesh = init_device_mesh("cpu", (world_size,))
    dtype = torch.complex128
    state["bad"] = distribute_tensor(torch.ones(world_size, dtype=dtype), mesh, [Shard(0)]).to(dtype)
    if rank != bad_rank:
        state["bad"] = DTensor.from_local(torch.ones(1), mesh, [Shard(0)])
    writer = ArcWriter(root, step=3, owner=owner)
    began = time.monotonic()
    with checkpoint_fails() as caught:
        dcp.save(state, storage_writer=writer)
    assert time.monotonic() - began < 10
    dist.barrier()
    assert Store(root).steps() == []
    text = failures(caught[0])

    assert rank != bad_rank or list(Path(root, "run").glob("*/rank-*")), "the other rank had written its part"
    dist.barrier()
    del state["bad"]  # the same writer, or the same owner, saves the step again, and what the failed save left is gone
    writer = writer if owner is None else ArcWriter(root, step=3, owner=owner)
    dcp.save(state, storage_writer=writer)
    dist.barrier()
    assert [path.name for path in Path(root, "run").iterdir()] == ["step-00000003"]
    return text


@pytest.mark.slow
@pytest.mark.parametrize(("bad_rank", "owner"), [(0, None), (1, None), (1, "start-1")])
def test_a_rank_that_fails_fails_the_save_on_all_ranks(tmp_path: Path, bad_rank: int, owner: str | None) -> None:
    for text in run_ranks(2, fail_on_one_rank, str(tmp_path), bad_rank, owner):
        assert f"(RANK {bad_rank})" in text
        assert f"(RANK {1 - bad_rank})" not in text
        assert "tensor bad: dtype complex128" in text
    assert Store(tmp_path).open(3).verify() == []


def run_out_of_space(rank: int, world_size: int, root: str) -> str:
    """The kernel refuses rank 1's file: larger than this process may write."""
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    mesh = init_device_mesh("cpu", (world_size,))
    state = {"x": distribute_tensor(torch.ones(100_000), mesh, [Shard(0)])}
    with checkpoint_fails() as caught:
        dcp.save(state, storage_writer=ArcWriter(root, step=3))
    return failures(caught[0])


@pytest.mark.slow
def test_a_rank_that_cannot_write_its_file_fails_the_save_on_all_ranks(tmp_path: Path) -> None:
    for text in run_ranks(2, run_out_of_space, str(tmp_path)):
        assert "(RANK 1)" in text
        assert "(RANK 0)" not in text
        assert "StoreFull" in text
        assert "rank-00001.safetensors" in text
    assert Store(tmp_path).steps() == []
    assert [path.name for path in (tmp_path / "run").rglob("rank-00001*")] == []


def load_damaged(rank: int, world_size: int, root: str) -> str:
    """The damaged shard is wanted by rank 1 only; rank 0 must not have changed its tensors either."""
    dcp.save(sharded(world_size, True), storage_writer=ArcWriter(root, step=3))
    dist.barrier()
    if rank == 0:
        entry = next(t for t in Store(root).open(3).manifest.tensors if t.name == "model.even")
        chunk = next(c for c in entry.chunks if c.offsets == (4, 0))
        flip(Path(root, "run", "step-00000003", chunk.file), chunk.start)
    dist.barrier()
    mesh = init_device_mesh("cpu", (world_size,))
    state = {"model": {"even": distribute_tensor(torch.zeros(8, 3), mesh, [Shard(0)])}}
    with checkpoint_fails() as caught:
        dcp.load(state, storage_reader=ArcReader(root))
    assert state["model"]["even"].to_local().abs().sum() == 0
    return failures(caught[0])


@pytest.mark.slow
def test_damage_that_one_rank_sees_leaves_all_ranks_untouched(tmp_path: Path) -> None:
    for text in run_ranks(2, load_damaged, str(tmp_path)):
        assert "(RANK 1)" in text
        assert "(RANK 0)" not in text
        assert "the bytes of tensor model.even differ" in text


def save_differently(rank: int, world_size: int, root: str) -> str:
    with checkpoint_fails() as caught:
        dcp.save({"x": torch.ones(1)}, storage_writer=ArcWriter(root, step=3 + rank))
    return failures(caught[0])


@pytest.mark.slow
def test_ranks_that_mean_different_steps_are_refused(tmp_path: Path) -> None:
    for text in run_ranks(2, save_differently, str(tmp_path)):
        assert "rank 1 saves" in text
    assert Store(tmp_path).steps() == []


def load_differently(rank: int, world_size: int, root: str) -> str:
    state = {"x": torch.zeros(1)}
    with checkpoint_fails() as caught:
        dcp.load(state, storage_reader=ArcReader(root, step=1 + rank))
    assert state["x"].item() == 0
    return failures(caught[0])


@pytest.mark.slow
def test_ranks_that_open_different_steps_load_none(tmp_path: Path) -> None:
    for step in (1, 2):
        dcp.save({"x": torch.ones(1)}, storage_writer=ArcWriter(tmp_path, step=step))
    for text in run_ranks(2, load_differently, str(tmp_path)):
        assert "a step was committed or removed meanwhile" in text


def save_with_cached_plans(rank: int, world_size: int, root: str, owner: str | None) -> str:
    text = ""
    for step in (1, 2, 3):
        state = sharded(world_size, True)
        state["n"] = torch.tensor(step)
        planner = DefaultSavePlanner(enable_plan_caching=True)
        try:
            dcp.save(state, storage_writer=ArcWriter(root, step=step, owner=owner), planner=planner)
        except CheckpointException as error:
            text = failures(error)
    return text


@pytest.mark.slow
def test_planners_that_cache_need_an_owner(tmp_path: Path) -> None:
    for text in run_ranks(2, save_with_cached_plans, str(tmp_path), None):
        assert "enable_plan_caching=True" in text
    assert [info.step for info in Store(tmp_path).steps()] == [1]
    root = tmp_path / "second"
    assert run_ranks(2, save_with_cached_plans, str(root), "start-1") == ["", ""]
    for step in (1, 2, 3):
        assert Store(root).open(step).verify() == []
        state = {"n": torch.tensor(0)}
        dcp.load(state, storage_reader=ArcReader(root, step=step))
        assert state["n"].item() == step


# ---- storage that does not answer


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    server = socket.create_server(("127.0.0.1", 0))
    connections: list[socket.socket] = []

    def accept() -> None:
        with contextlib.suppress(OSError):  # closed: the test is over
            while True:
                connections.append(server.accept()[0])

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    assert connections, "nobody asked the silent server: the fault did not fire"
    server.close()
    for connection in connections:
        connection.close()


def save_and_load_on_silence(rank: int, world_size: int) -> list[str]:
    import s3fs  # noqa: F401 - now, so that the time limits are spent on the server

    texts = []
    began = time.monotonic()
    for go in (
        lambda: dcp.save({"x": torch.ones(1)}, storage_writer=ArcWriter("s3://bucket/x", step=1, timeout_s=2.0)),
        lambda: dcp.load({"x": torch.ones(1)}, storage_reader=ArcReader("s3://bucket/x", timeout_s=2.0)),
    ):
        with checkpoint_fails() as caught:
            go()
        texts.append(failures(caught[0]))
    assert time.monotonic() - began < 45  # the group's timeout is 60 s
    return texts


@pytest.mark.slow
def test_storage_that_hangs_is_an_error_before_the_groups_timeout(silent_server: str) -> None:
    pytest.importorskip("s3fs")
    env = {"AWS_ENDPOINT_URL": silent_server, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    for texts in run_ranks(2, save_and_load_on_silence, env=env):
        for text in texts:
            assert "storage did not answer within 2 s" in text


def die_while_saving(rank: int, world_size: int, root: str) -> str:
    if rank == 1:
        os._exit(9)
    try:
        dcp.save({"x": torch.ones(1)}, storage_writer=ArcWriter(root, step=1))
    except Exception as error:  # noqa: BLE001 - gloo's error has many types
        return type(error).__name__
    return "saved"


@pytest.mark.slow
def test_a_dead_rank_leaves_no_commit(tmp_path: Path) -> None:
    outcomes = rank_outcomes(2, die_while_saving, str(tmp_path))
    assert outcomes[1].exit_code == 9
    assert outcomes[0].value not in (None, "saved")
    assert not Store(tmp_path).backend.exists("run") or Store(tmp_path).steps() == []
