"""`arc ls`, `arc verify`, `arc inspect`: what they print and the exit codes that scripts read."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from arc_dist.checkpoint_store import Store
from arc_dist.checkpoint_store.commands import DAMAGED, NOTHING_THERE, OK, add_commands, format_bytes, format_time
from arc_dist.errors import ConfigError, StoreGone
from store_helpers import save


def arc(*argv: str) -> int:
    parser = argparse.ArgumentParser(prog="arc")
    add_commands(parser.add_subparsers(required=True))
    args = parser.parse_args(argv)
    return args.run(args)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    store = Store(tmp_path / "ckpt", owner="a")
    store.check_writable()
    save(store, 5, world_size=2)
    save(store, 10, world_size=2, meta={"certified": False})
    return tmp_path / "ckpt"


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_ls_for_people(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert arc("ls", str(root)) == OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["RUN", "STEP", "SIZE", "TENSORS", "WORLD", "COMMITTED", "STATE", "DIRECTORY"]
    assert "KiB" in lines[1]
    assert [line.split()[1] for line in lines[1:]] == ["5", "10"]
    assert " certified " in lines[1]
    assert " uncertified " in lines[2]


@pytest.mark.parametrize("below", ["", "run", "run/"])
def test_ls_for_scripts(root: Path, capsys: pytest.CaptureFixture[str], below: str) -> None:
    assert arc("ls", f"{root}/{below}", "--json") == OK
    rows = json.loads(capsys.readouterr().out)
    assert [(row["run"], row["step"], row["world_size"], row["problem"]) for row in rows] == [
        ("run", 5, 2, None),
        ("run", 10, 2, None),
    ]


def test_verify_of_a_sound_store(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert arc("verify", str(root)) == OK
    assert capsys.readouterr().out.count(": ok, ") == 2
    assert arc("verify", str(root), "--newest", "--json") == OK
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["step"], row["ok"], row["problems"]) == (10, True, [])


def test_verify_names_the_damaged_file_and_its_tensors(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "run" / "step-00000010" / "rank-00001.safetensors"
    flip(path, path.stat().st_size - 1)
    assert arc("verify", str(root)) == DAMAGED
    out = capsys.readouterr().out
    assert "run/step-00000005: ok" in out
    assert "run/step-00000010: DAMAGED" in out
    assert "run/step-00000010/rank-00001.safetensors: bytes differ" in out
    assert "tensors: model." in out
    assert arc("verify", str(root), "--step", "5") == OK
    assert arc("verify", str(root), "--step", "10", "--json") == DAMAGED
    (row,) = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert not row["ok"]
    assert len(row["problems"][0]["tensors"]) == 1
    assert arc("verify", str(root / "run" / "step-00000010")) == DAMAGED


def test_a_damaged_manifest(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(root / "run" / "step-00000010" / "manifest.json", 40)
    assert arc("verify", str(root)) == DAMAGED
    assert "run/step-00000010/manifest.json" in capsys.readouterr().out
    assert arc("ls", str(root)) == DAMAGED
    assert "DAMAGED" in capsys.readouterr().out


def test_inspect(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert arc("inspect", str(root), "--tensors") == OK
    out = capsys.readouterr().out
    assert "step:          10" in out
    assert "model.bfloat16" in out
    assert arc("inspect", str(root / "run" / "step-00000005"), "--json") == OK
    fields = json.loads(capsys.readouterr().out)
    assert (fields["step"], fields["world_size"], fields["meta"]["loss"]) == (5, 2, 0.5)
    assert {"name": "model.w", "dtype": "float32", "shape": [7, 3], "nbytes": 84} in fields["tensors"]


def test_nothing_committed_is_not_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("ls", "verify", "inspect"):
        assert arc(command, str(tmp_path)) == NOTHING_THERE
        assert "no committed checkpoint" in capsys.readouterr().err
    assert arc("ls", str(tmp_path), "--json") == NOTHING_THERE
    assert json.loads(capsys.readouterr().out) == []


def test_paths_that_lead_nowhere(root: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreGone):
        arc("ls", str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="Correct the path"):
        arc("ls", str(tmp_path / "file"))
    (root / "run" / "step-00000099").mkdir()
    with pytest.raises(StoreGone, match="no committed checkpoint"):
        arc("verify", str(root / "run" / "step-00000099"))


def test_several_runs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(Store(root, run="other", owner="b"), 7)
    assert arc("ls", str(root), "--json") == OK
    assert {row["run"] for row in json.loads(capsys.readouterr().out)} == {"run", "other"}
    assert arc("ls", str(root), "--run-name", "other", "--json") == OK
    assert {row["run"] for row in json.loads(capsys.readouterr().out)} == {"other"}


def test_names_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from store_helpers import whole

    store = Store(tmp_path)
    name = "model.\x1b[2Jevil"
    part = store.write_part(1, generation=0, rank=0, world_size=1, tensors=[whole(name, torch.ones(3))], objects={})
    store.commit(1, 0, 1, {0: part}, {"note": "\x1b[2J"})
    assert arc("inspect", str(tmp_path), "--tensors") == OK
    path = tmp_path / "run" / "step-00000001" / "rank-00000.safetensors"
    flip(path, path.stat().st_size - 1)
    assert arc("verify", str(tmp_path)) == DAMAGED
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\\x1b[2Jevil" in out


def test_sizes_and_times() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 5 << 20, 3 << 50)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 MiB",
        "3072.0 TiB",
    ]
    assert format_time(0) == "1970-01-01 00:00:00Z"
    assert format_time(1e300) == "1e+300"
