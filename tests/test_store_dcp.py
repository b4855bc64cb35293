"""`dcp.save`, `dcp.async_save` and `dcp.load` through ArcWriter and ArcReader: verified, committed once, no pickle."""

from __future__ import annotations

import io
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from arc_dist.checkpoint_store import Store
from arc_dist.checkpoint_store.dcp import ArcLoadPlanner, ArcReader, ArcWriter
from arc_dist.checkpoint_store.format import known_dtypes
from arc_dist.errors import ConfigError
from dcp_helpers import blank, checkpoint_fails, failures, flip, same
from store_helpers import files_of, random_tensor, same_bits

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch")


def nested_state(seed: int = 0) -> dict[str, Any]:
    """Tensors of every dtype, empty ones, numbers, and containers that DCP flattens or takes as one object."""
    return {
        "model": {name: random_tensor((3, 5), name, seed + i) for i, name in enumerate(known_dtypes())},
        "empty": torch.empty(0, 4),
        "optimizer": {
            "state": {"w": {"step": torch.tensor(7.0 + seed), "exp_avg": random_tensor((4, 2), "float32", seed)}},
            "param_groups": [{"lr": 0.1 + seed, "betas": (0.9, 0.999), "params": ["w"], "foreach": None}],
        },
        "list": [torch.arange(3) + seed, {"inner": torch.ones(2) * seed}],
        "train": OrderedDict(step=3 + seed, name="a run", blob=b"\x80\x04pickle-like \x00", nan=float("nan")),
        "dtype": torch.bfloat16,
        "pair": (seed, torch.tensor([1, 2]) + seed),
    }


# ---- one process


def test_a_nested_state_round_trips_bit_for_bit(tmp_path: Path) -> None:
    state = nested_state()
    dcp.save(state, storage_writer=ArcWriter(tmp_path, step=5, meta={"loss": 0.25}))
    loaded = blank(state)
    dcp.load(loaded, storage_reader=ArcReader(tmp_path))
    assert same(dict(state, train=dict(state["train"])), loaded)
    checkpoint = Store(tmp_path).open(5)
    assert checkpoint.verify() == []
    assert (checkpoint.meta["loss"], checkpoint.manifest.certified) == (0.25, True)


def test_stock_torch_and_our_reader_read_what_dcp_saved(tmp_path: Path) -> None:
    state = nested_state()
    dcp.save(state, storage_writer=ArcWriter(tmp_path, step=5))
    stock = {"model": blank(state["model"])}
    dcp.load(stock, storage_reader=HuggingFaceStorageReader(str(tmp_path / "run" / "step-00000005")))
    assert same(stock["model"], state["model"])
    checkpoint = Store(tmp_path).open(5)
    specs = checkpoint.specs()
    (tensor,) = checkpoint.read([specs["optimizer.state.w.exp_avg"]])
    assert same_bits(tensor, state["optimizer"]["state"]["w"]["exp_avg"])


def test_the_nested_state_comes_back_from_nothing(tmp_path: Path) -> None:
    state = nested_state()
    dcp.save(state, storage_writer=ArcWriter(tmp_path, step=5))
    found = _load_state_dict_from_keys(storage_reader=ArcReader(tmp_path))
    assert same(dict(state, train=dict(state["train"])), found)


def test_no_file_is_a_pickle_and_none_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = nested_state()
    forbidden: list[str] = []

    def refuse(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            forbidden.append(name)
            raise AssertionError(name)

        return call

    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, refuse(name))
    dcp.save(state, storage_writer=ArcWriter(tmp_path, step=5), no_dist=True)
    dcp.load(blank(state), storage_reader=ArcReader(tmp_path), no_dist=True)
    assert forbidden == []
    for path in files_of(tmp_path):
        assert path.suffix in (".json", ".safetensors"), path
        assert not path.read_bytes().startswith((b"\x80", b"PK")), path


def test_the_newest_certified_step_is_taken_and_any_can_be_named(tmp_path: Path) -> None:
    for step, certified in ((1, True), (2, True), (3, False)):
        dcp.save({"x": torch.tensor(step)}, storage_writer=ArcWriter(tmp_path, step=step, certified=certified))
    for step, expected in ((None, 2), (1, 1), (3, 3)):
        state = {"x": torch.tensor(0)}
        dcp.load(state, storage_reader=ArcReader(tmp_path, step=step))
        assert state["x"].item() == expected


def test_one_writer_serves_many_steps_by_checkpoint_id(tmp_path: Path) -> None:
    writer, reader = ArcWriter(tmp_path, run="a"), ArcReader(tmp_path, run="a")
    for step, name in ((10, "10"), (20, "step-20"), (30, f"{tmp_path}/a/step-00000030"), (40, f"{tmp_path}/step-40")):
        dcp.save({"x": torch.tensor(step)}, checkpoint_id=name, storage_writer=writer)
        state = {"x": torch.tensor(0)}
        dcp.load(state, checkpoint_id=name, storage_reader=reader)
        assert state["x"].item() == step
    assert [info.step for info in Store(tmp_path, run="a").steps()] == [10, 20, 30, 40]
    with pytest.raises(ConfigError, match="stored nowhere else"):
        dcp.save({"x": torch.tensor(0)}, checkpoint_id="/elsewhere/step-50", storage_writer=writer)
    with pytest.raises(ConfigError, match="names no step"):
        dcp.save({"x": torch.tensor(0)}, checkpoint_id="last", storage_writer=writer)


def test_a_step_saved_again_is_another_commit_and_the_newer_counts(tmp_path: Path) -> None:
    for value in (1, 2):
        dcp.save({"x": torch.tensor(value)}, storage_writer=ArcWriter(tmp_path, step=5))
    state = {"x": torch.tensor(0)}
    dcp.load(state, storage_reader=ArcReader(tmp_path))
    assert state["x"].item() == 2
    assert len(list((tmp_path / "run").iterdir())) == 2


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "rank-00000.json", "manifest.json"])
def test_a_flipped_bit_is_found_before_any_tensor_changes(tmp_path: Path, file: str) -> None:
    state = nested_state()
    dcp.save(state, storage_writer=ArcWriter(tmp_path, step=5))
    path = tmp_path / "run" / "step-00000005" / file
    flip(path, path.stat().st_size // 2)
    loaded = blank(state)
    with checkpoint_fails() as caught:
        dcp.load(loaded, storage_reader=ArcReader(tmp_path, step=5))
    assert file in failures(caught[0])
    assert same(loaded, blank(state))


class Unknown:
    """State that only pickle could store."""


def test_an_object_without_encoding_is_refused_by_its_name(tmp_path: Path) -> None:
    state = {"x": torch.ones(2), "sched": {"inner": {"fn": [1, Unknown()]}}}
    with checkpoint_fails() as caught:
        dcp.save(state, storage_writer=ArcWriter(tmp_path, step=5))
    text = failures(caught[0])
    assert "sched.inner.fn.1" in text
    assert "Unknown" in text
    assert "ConfigError" in text
    assert Store(tmp_path).steps() == []


def test_what_has_no_plain_bytes_is_refused_by_its_name(tmp_path: Path) -> None:
    bad = {
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.empty(2, device="meta"),
        "complex": torch.ones(2, dtype=torch.complex128),
    }
    for name, tensor in bad.items():
        with checkpoint_fails() as caught:
            dcp.save({"ok": torch.ones(1), name: tensor}, storage_writer=ArcWriter(tmp_path, step=5))
        assert name in failures(caught[0])
    assert Store(tmp_path).steps() == []


def test_missing_steps_and_arguments_are_clear(tmp_path: Path) -> None:
    state = {"x": torch.ones(1)}
    with checkpoint_fails() as caught:
        dcp.save(state, storage_writer=ArcWriter(tmp_path))
    assert "which step?" in failures(caught[0])
    dcp.save(state, storage_writer=ArcWriter(tmp_path, step=1, certified=False))
    with checkpoint_fails() as caught:
        dcp.load(state, storage_reader=ArcReader(tmp_path))
    assert "no certified step" in failures(caught[0])
    with checkpoint_fails() as caught:
        dcp.load(state, storage_reader=ArcReader(tmp_path, step=7))
    assert "has no committed step 7. It has: 1." in failures(caught[0])
    with pytest.raises(ConfigError, match="use_collectives"):
        dcp.save(state, storage_writer=ArcWriter(tmp_path, step=2), use_collectives=False, no_dist=True)
    with pytest.raises(ConfigError, match="reserved"):
        ArcWriter(tmp_path, step=1, meta={"dcp": 1})
    with pytest.raises(ConfigError, match="whole number"):
        ArcWriter(tmp_path, step=-1)
    assert [info.step for info in Store(tmp_path).steps()] == [1]


def test_missing_keys_and_other_shapes_with_torchs_planner(tmp_path: Path) -> None:
    dcp.save({"x": torch.ones(3)}, storage_writer=ArcWriter(tmp_path, step=1))
    with checkpoint_fails() as caught:
        dcp.load({"x": torch.ones(3), "y": torch.ones(1)}, storage_reader=ArcReader(tmp_path))
    assert "Missing key in checkpoint state_dict: y" in failures(caught[0])
    with checkpoint_fails() as caught:
        dcp.load({"x": torch.ones(4)}, storage_reader=ArcReader(tmp_path))
    assert "Size mismatch" in failures(caught[0])


def test_another_dtype_is_an_error_unless_asked_for(tmp_path: Path) -> None:
    dcp.save({"a": torch.ones(1), "x": torch.full((3,), 1.001)}, storage_writer=ArcWriter(tmp_path, step=1))
    state = {"a": torch.zeros(1), "x": torch.zeros(3, dtype=torch.bfloat16)}
    with checkpoint_fails() as caught:
        dcp.load(state, storage_reader=ArcReader(tmp_path))
    assert "x: torch.float32 [3] in the checkpoint, torch.bfloat16 [3] in the state" in failures(caught[0])
    assert state["a"].item() == 0
    dcp.load(state, storage_reader=ArcReader(tmp_path, convert_dtype=True))
    assert same_bits(state["x"], torch.full((3,), 1.001).to(torch.bfloat16))


class PicklingPlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        raise AssertionError("must not be called")


def test_a_planner_that_wants_a_pickle_is_refused(tmp_path: Path) -> None:
    dcp.save({"x": torch.ones(1), "n": 3}, storage_writer=ArcWriter(tmp_path, step=1))
    with checkpoint_fails() as caught:
        dcp.load({"x": torch.zeros(1), "n": 0}, storage_reader=ArcReader(tmp_path), planner=PicklingPlanner())
    assert "PicklingPlanner.load_bytes wants a pickle" in failures(caught[0])
    only_tensors = {"x": torch.zeros(1)}
    dcp.load(only_tensors, storage_reader=ArcReader(tmp_path), planner=PicklingPlanner())
    assert only_tensors["x"].item() == 1


def test_planners_that_do_not_flatten(tmp_path: Path) -> None:
    state = {"x": torch.arange(4), "n": {"deep": [1, 2]}}
    dcp.save(state, storage_writer=ArcWriter(tmp_path, step=1), planner=DefaultSavePlanner(flatten_state_dict=False))
    loaded: dict[str, Any] = {"x": torch.zeros(4, dtype=torch.int64), "n": None}
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    dcp.load(loaded, storage_reader=ArcReader(tmp_path), planner=planner)
    assert same(planner.state_dict, state)


# ---- partial load


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    state = {"model": {"a": torch.ones(2), "b": torch.ones(3)}, "optimizer": {"a": torch.ones(2)}, "step": 4}
    dcp.save(state, storage_writer=ArcWriter(tmp_path, step=1))
    return tmp_path


def test_the_model_alone_is_loaded_strictly(trained: Path) -> None:
    planner = ArcLoadPlanner()
    state = {"model": {"a": torch.zeros(2), "b": torch.zeros(3)}}
    dcp.load(state, storage_reader=ArcReader(trained), planner=planner)
    assert same(state["model"], {"a": torch.ones(2), "b": torch.ones(3)})
    assert (planner.report.missing, planner.report.unexpected) == ((), ())
    assert planner.report.not_asked == ("optimizer.a", "step")


def test_a_strict_load_names_every_difference(trained: Path) -> None:
    planner = ArcLoadPlanner()
    state = {"model": {"a": torch.zeros(2), "c": torch.zeros(3), "d": torch.zeros(3)}}
    with checkpoint_fails() as caught:
        dcp.load(state, storage_reader=ArcReader(trained), planner=planner)
    assert "CheckpointMismatch" in failures(caught[0])
    for line in ("model.c: not in the checkpoint", "model.d: not in", "model.b: in the checkpoint, but not in the"):
        assert line in failures(caught[0])
    assert planner.report.missing == ("model.c", "model.d")
    assert planner.report.unexpected == ("model.b",)
    assert state["model"]["a"].tolist() == [0, 0]


def test_a_load_that_is_not_strict_takes_what_both_have(trained: Path) -> None:
    planner = ArcLoadPlanner(strict=False)
    state = {"model": {"a": torch.zeros(2), "head": torch.full((3,), 9.0)}}
    dcp.load(state, storage_reader=ArcReader(trained), planner=planner)
    assert same(state["model"], {"a": torch.ones(2), "head": torch.full((3,), 9.0)})
    assert planner.report.missing == ("model.head",)
    assert planner.report.unexpected == ("model.b",)


@pytest.mark.parametrize("strict", [True, False])
def test_another_shape_or_kind_is_an_error_in_any_case(trained: Path, strict: bool) -> None:
    state = {"model": {"a": torch.zeros(5), "b": "text"}, "step": torch.zeros(1)}
    with checkpoint_fails() as caught:
        dcp.load(state, storage_reader=ArcReader(trained), planner=ArcLoadPlanner(strict=strict))
    text = failures(caught[0])
    assert "model.a: [2] in the checkpoint, [5] in the state" in text
    assert "model.b: a tensor in the checkpoint, a str in the state" in text
    assert "step: an object in the checkpoint, a tensor in the state" in text


def test_a_flat_state_expects_all_names(trained: Path) -> None:
    planner = ArcLoadPlanner(strict=False)
    dcp.load({"model.a": torch.zeros(2)}, storage_reader=ArcReader(trained), planner=planner)
    assert planner.report.unexpected == ("model.b", "optimizer.a", "step")
    with pytest.raises(ConfigError, match="nothing has been loaded"):
        _ = ArcLoadPlanner().report


class OwnDataPlanner(DefaultSavePlanner):
    def create_global_plan(self, all_plans: Any) -> Any:
        plans, metadata = super().create_global_plan(all_plans)
        metadata.planner_data = {"own": object()}
        return plans, metadata


def test_a_planner_may_keep_data_of_its_own_in_the_metadata(tmp_path: Path) -> None:
    state = {"model": {"x": torch.ones(2)}}
    dcp.save(state, storage_writer=ArcWriter(tmp_path, step=1), planner=OwnDataPlanner())
    loaded = blank(state)
    dcp.load(loaded, storage_reader=ArcReader(tmp_path))
    assert same(state, loaded)


def test_the_example_of_the_document_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path(__file__).parent.parent.joinpath("docs", "dcp.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs/dcp.md", "exec"), {})
    assert capsys.readouterr().out == "() ()\n"
    assert Store(tmp_path / "ckpt", run="a").open(1200).verify() == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_of_a_cuda_device(tmp_path: Path) -> None:
    state = {"x": torch.arange(1000, device="cuda"), "n": 3}
    dcp.save(state, storage_writer=ArcWriter(tmp_path, step=1))
    loaded = {"x": torch.zeros_like(state["x"]), "n": 0}
    dcp.load(loaded, storage_reader=ArcReader(tmp_path))
    assert loaded["x"].is_cuda
    assert torch.equal(loaded["x"], state["x"])


def test_a_run_cannot_lead_out_of_the_store() -> None:
    for kind in (ArcReader, ArcWriter):
        with pytest.raises(ConfigError, match="cannot be the name of a run"):
            kind("/x", run="../y")
