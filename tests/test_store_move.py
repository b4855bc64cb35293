"""`arc diff`, `arc copy`, `arc export`: what they compare, bring and write, and the exit codes that scripts read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from arc_dist.checkpoint_store import Store
from arc_dist.checkpoint_store.commands import DAMAGED, NOTHING_THERE, OK
from arc_dist.checkpoint_store.commands_move import _parse_rate
from arc_dist.checkpoint_store.diff import compare
from arc_dist.checkpoint_store.progress import Progress
from arc_dist.errors import ConfigError, StoreCorrupt, StoreGone
from store_helpers import fsdp_cut, random_tensor, rows, same_bits, save
from test_store_commands import arc, flip


def write(store: Store, step: int, tensors: dict[str, torch.Tensor], *, world_size: int = 1) -> None:
    """Saves tensors cut by rows over the ranks."""
    parts = {
        rank: store.write_part(
            step,
            generation=0,
            rank=rank,
            world_size=world_size,
            tensors=[rows(n, t, *fsdp_cut(t.shape[0], rank, world_size)) for n, t in tensors.items()],
            objects={},
        )
        for rank in range(world_size)
    }
    store.commit(step, 0, world_size, parts, {"certified": True})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "ckpt", owner="a")
    store.check_writable()
    return store


def test_diff_names_what_differs_and_how(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    base = {name: random_tensor((6, 2), seed=i) for i, name in enumerate(["a", "b", "c", "d", "e"])}
    changed = {k: v.clone() for k, v in base.items()}
    changed["b"].view(torch.uint8)[5, 1] ^= 1
    changed["c"] = base["c"].double()
    changed["d"] = base["d"].reshape(4, 3)
    changed["f"] = changed.pop("e")
    write(store, 1, base, world_size=2)
    write(store, 2, changed, world_size=2)
    assert arc("diff", store.url, store.url, "--step-a", "1", "--step-b", "2", "--json") == DAMAGED
    fields = json.loads(capsys.readouterr().out)
    assert [(d["name"], d["what"]) for d in fields["differences"]] == [
        ("b", "bytes"),
        ("c", "dtype"),
        ("d", "shape"),
        ("e", "only in a"),
        ("f", "only in b"),
    ]
    assert (fields["a"], fields["b"], fields["num_equal"], fields["num_read"]) == (1, 2, 1, 0)
    assert fields["differences"][0]["a"] == {"dtype": "float32", "shape": [6, 2], "nbytes": 48}
    assert arc("diff", f"{store.url}/run/step-00000001", store.url) == DAMAGED
    out = capsys.readouterr().out
    assert "steps 1 and 2: 5 tensors differ" in out
    assert "float64 [6, 2] 96 B" in out
    assert arc("diff", store.url, store.url) == OK
    assert "0 tensors differ" in capsys.readouterr().out


def test_diff_reads_no_data_when_digests_suffice(store: Store) -> None:
    write(store, 1, {"a": random_tensor((6, 2))}, world_size=2)
    write(store, 2, {"a": random_tensor((6, 2))}, world_size=2)
    for path in (Path(store.url) / "run").glob("step-*/rank-*"):
        path.unlink()
    found = compare(store.open(1), store.open(2))
    assert (found.differences, found.num_equal, found.num_read) == ((), 1, 0)


def test_diff_of_steps_that_were_cut_differently_reads_and_verifies(store: Store) -> None:
    tensors = {"a": random_tensor((7, 2)), "b": random_tensor((5, 3), "bfloat16", 3)}
    write(store, 1, tensors, world_size=2)
    write(store, 2, tensors, world_size=3)
    found = compare(store.open(1), store.open(2))
    assert (found.differences, found.num_equal, found.num_read) == ((), 2, 2)
    tensors["b"].view(torch.uint8)[4, 5] ^= 1
    write(store, 3, tensors, world_size=3)
    assert [d.name for d in compare(store.open(1), store.open(3)).differences] == ["b"]
    path = Path(store.url) / "run" / "step-00000002" / "rank-00001.safetensors"
    flip(path, path.stat().st_size - 1)
    with pytest.raises(StoreCorrupt):
        compare(store.open(1), store.open(2))


def test_diff_of_nothing(store: Store, tmp_path: Path) -> None:
    save(store, 1)
    (tmp_path / "empty").mkdir()
    assert arc("diff", store.url, str(tmp_path / "empty")) == NOTHING_THERE
    assert arc("diff", store.url, store.url, "--step-b", "9") == NOTHING_THERE


def test_copy_of_a_run_brings_everything(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2, 3):
        save(store, step, world_size=2)
    store.pin(1, "figure 3")
    store.quarantine(3, 3, "diverged")
    target = tmp_path / "target"
    assert arc("copy", store.url, str(target), "--verify") == OK
    out = capsys.readouterr().out
    assert [line.split(":")[0] for line in out.splitlines()] == [f"run/step-0000000{n}" for n in (3, 2, 1)]
    assert Store(target).steps() == store.steps()
    assert [(i.pinned, i.quarantined) for i in Store(target).steps()] == [
        ("figure 3", None),
        (None, None),
        (None, "diverged"),
    ]
    assert arc("verify", str(target)) == OK
    capsys.readouterr()
    assert arc("copy", f"{store.url}/run", str(target), "--json") == OK
    rows = json.loads(capsys.readouterr().out)
    assert [(row["num_sent"], row["committed"], row["ok"]) for row in rows] == [(0, False, True)] * 3


def test_copy_of_one_step_to_another_run(store: Store, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(store, step)
    assert arc("copy", store.url, str(tmp_path / "t"), "--step", "2", "--to-run", "best", "--max-rate", "1GB") == OK
    assert [info.step for info in Store(tmp_path / "t", run="best").steps()] == [2]
    assert arc("copy", f"{store.url}/run/step-00000001", str(tmp_path / "t")) == OK
    assert arc("copy", store.url, str(tmp_path / "t"), "--newest") == OK
    assert [info.step for info in Store(tmp_path / "t").steps()] == [1, 3]


def test_copy_leaves_damaged_steps_and_says_so(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2, 3, 4):
        save(store, step)
    run = Path(store.url) / "run"
    path = run / "step-00000002" / "rank-00000.safetensors"
    flip(path, path.stat().st_size - 1)
    flip(run / "step-00000003" / "manifest.json", 30)
    (run / "step-00000004" / "rank-00000.json").unlink()
    target = Store(tmp_path / "t", owner="b")
    assert arc("copy", store.url, target.url) == DAMAGED
    out = capsys.readouterr().out
    assert out.count("NOT COPIED") == 3
    assert "step-00000002/rank-00000.safetensors: the bytes of tensor model." in out
    assert [info.step for info in target.steps()] == [1]


def test_copy_goes_on_past_a_place_that_is_taken(store: Store, tmp_path: Path) -> None:
    target = Store(tmp_path / "t", owner="b")
    target.check_writable()
    save(target, 2, seed=99)
    for step in (1, 2, 3):
        save(store, step)
    assert arc("copy", store.url, target.url) == DAMAGED
    assert [info.step for info in target.steps()] == [1, 2, 3]
    assert target.manifest(2).owner == "b"


def test_what_copy_refuses(store: Store, tmp_path: Path) -> None:
    save(store, 1)
    with pytest.raises(StoreGone):
        arc("copy", store.url, str(tmp_path / "no" / "mount"))
    assert arc("copy", store.url, str(tmp_path / "t"), "--step", "7") == NOTHING_THERE
    with pytest.raises(ConfigError, match="both source and target"):
        arc("copy", store.url, store.url)
    with pytest.raises(ConfigError, match="such as 200MB"):
        arc("copy", store.url, str(tmp_path / "t"), "--max-rate", "fast")
    save(Store(store.url, run="other", owner="b"), 1)
    with pytest.raises(ConfigError, match="several"):
        arc("copy", store.url, str(tmp_path / "t"), "--to-run", "x")
    (tmp_path / "empty").mkdir()
    assert arc("copy", str(tmp_path / "empty"), str(tmp_path / "t")) == NOTHING_THERE


def test_rates() -> None:
    assert [_parse_rate(text) for text in ("100", "200MB", "1GiB/s", "1.5k", "2 MB")] == [
        100,
        200e6,
        1 << 30,
        1500,
        2e6,
    ]


def test_an_exported_model_loads_anywhere(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7))
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    write(store, 1, {**tensors, "optimizer.state.0.weight.exp_avg": torch.ones(7, 5)}, world_size=3)
    out = tmp_path / "model.safetensors"
    assert arc("export", store.url, str(out), "--prefix", "model.", "--json") == OK
    assert json.loads(capsys.readouterr().out)["num_tensors"] == 4
    fresh = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7))
    fresh.load_state_dict(safetensors.load_file(out))
    for name, tensor in model.state_dict().items():
        assert same_bits(fresh.state_dict()[name], tensor)
    with pytest.raises(ConfigError, match="--force"):
        arc("export", store.url, str(out))
    assert arc("export", store.url, str(out), "--force") == OK
    assert sorted(safetensors.load_file(out)) == sorted([*tensors, "optimizer.state.0.weight.exp_avg"])
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt", "model.safetensors"}


def test_export_of_every_dtype_and_shape(store: Store, tmp_path: Path) -> None:
    import fsspec

    from arc_dist.checkpoint_store.shard import parse_header

    saved = save(store, 1, world_size=2)
    for out in (str(tmp_path / "all.safetensors"), "memory://export-test/all.safetensors"):
        assert arc("export", store.url, out) == OK
        with fsspec.open(out, "rb") as file:
            data = file.read()
        found = {spec.name: (spec, start) for spec, start in parse_header(data, len(data), out)}
        assert found.keys() == saved.keys()
        for name, tensor in saved.items():
            spec, start = found[name]
            assert spec.shape == tuple(tensor.shape)
            raw = tensor.contiguous().reshape(-1).view(torch.uint8).tolist() if tensor.numel() else []
            assert list(data[start : start + spec.nbytes]) == raw
    fsspec.filesystem("memory").rm("/export-test", recursive=True)


def test_what_must_not_be_trusted_is_exported_only_by_name(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2, 3):
        save(store, step, meta={"certified": step < 3})
    store.quarantine(2, 2, "diverged")
    assert arc("export", store.url, str(tmp_path / "a"), "--json") == OK
    assert json.loads(capsys.readouterr().out)["step"] == 1
    assert arc("export", store.url, str(tmp_path / "b"), "--step", "3") == OK
    assert arc("export", f"{store.url}/run/step-00000002", str(tmp_path / "c")) == OK
    store.quarantine(1, 1, "diverged too")
    with pytest.raises(ConfigError, match="Choose one with --step"):
        arc("export", store.url, str(tmp_path / "d"))
    assert arc("export", store.url, str(tmp_path / "d"), "--step", "9") == NOTHING_THERE


def test_a_damaged_step_is_not_exported(store: Store, tmp_path: Path) -> None:
    save(store, 1)
    path = Path(store.url) / "run" / "step-00000001" / "rank-00000.safetensors"
    flip(path, path.stat().st_size - 1)
    with pytest.raises(StoreCorrupt, match="bytes of tensor"):
        arc("export", store.url, str(tmp_path / "x.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_what_export_refuses(store: Store, tmp_path: Path) -> None:
    write(store, 1, {"model.a": torch.ones(2, 2), "model.": torch.ones(3)})
    with pytest.raises(ConfigError, match="Names begin with: model"):
        arc("export", store.url, str(tmp_path / "x"), "--prefix", "module.")
    with pytest.raises(ConfigError, match="cannot be the name"):
        arc("export", store.url, str(tmp_path / "x"), "--prefix", "model.")
    with pytest.raises(ConfigError, match="name a file"):
        arc("export", store.url, f"{tmp_path}/")
    with pytest.raises(StoreGone):
        arc("export", store.url, str(tmp_path / "no" / "x.safetensors"))
    with pytest.raises(SystemExit):
        arc("export", store.url, str(tmp_path / "x"), "--format", "onnx")
    (tmp_path / "empty").mkdir()
    assert arc("export", str(tmp_path / "empty"), str(tmp_path / "x")) == NOTHING_THERE


def test_progress_is_silent_where_no_one_watches_and_all_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("x", 100) as progress:
        progress(50)
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_and_in_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("arc_dist.checkpoint_store.progress._LOG_AFTER_S", 0.0)
    with Progress("copying \x1b[2J", 200) as progress:
        progress(50)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("copying \\x1b[2J:  25 %, ")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress("copying", 200) as progress:
        progress(100)
    err = capsys.readouterr().err
    assert err.startswith("\rcopying:  50 %")
    assert err.endswith("\r\x1b[K")
