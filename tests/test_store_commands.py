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


@pytest.fixture
def long_run(tmp_path: Path) -> Path:
    """Six certified steps, of which 20 has the smallest loss."""
    store = Store(tmp_path / "ckpt", owner="a")
    store.check_writable()
    for step in range(10, 70, 10):
        save(store, step, meta={"metrics": {"loss": abs(step - 20) + 0.5}})
    return tmp_path / "ckpt"


def listed(root: Path) -> list[int]:
    return [info.step for info in Store(root).steps()]


def test_prune_says_why_and_a_dry_run_removes_nothing(long_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert arc("pin", str(long_run), "--step", "10", "--why", "figure 3") == OK
    assert "step 10 is pinned" in capsys.readouterr().out
    assert arc("prune", str(long_run), "--keep", "last=2,best=loss", "--dry-run") == OK
    out = capsys.readouterr().out
    assert "pinned: figure 3" in out
    assert "loss 0.5, number 1 of the smallest" in out
    assert "the newest certified step" in out
    assert out.count("would remove") == 3  # two steps and the sum
    assert "would remove 2 of 6 steps" in out
    assert listed(long_run) == [10, 20, 30, 40, 50, 60]
    assert arc("prune", str(long_run), "--keep", "last=2,best=loss", "--json") == OK
    fields = json.loads(capsys.readouterr().out)
    assert [(row["step"], row["kept"]) for row in fields["steps"]] == [
        (10, True),
        (20, True),
        (30, False),
        (40, False),
        (50, True),
        (60, True),
    ]
    assert listed(long_run) == [10, 20, 50, 60]
    assert arc("unpin", str(long_run), "--step", "10", "--json") == OK
    assert json.loads(capsys.readouterr().out)["was_pinned"] is True
    assert arc("prune", str(long_run / "run"), "--keep", "last=2") == OK
    assert "removed 2 of 4 steps" in capsys.readouterr().out
    assert listed(long_run) == [50, 60]


def test_ls_shows_pins_and_quarantine(long_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert arc("quarantine", str(long_run), "--step", "50", "--through", "99", "--why", "loss \x1b[2J diverged") == OK
    assert "in quarantine now: 50, 60" in capsys.readouterr().out
    assert arc("pin", str(long_run / "run" / "step-00000060")) == OK
    assert arc("ls", str(long_run)) == OK
    out = capsys.readouterr().out
    assert "quarantined, pinned" in out
    assert "never restored by itself: loss \\x1b[2J diverged" in out
    assert arc("ls", str(long_run), "--json") == OK
    rows = json.loads(capsys.readouterr().out)
    assert [(row["certified"], row["quarantined"] is not None) for row in rows[-3:]] == [
        (True, False),
        (False, True),
        (False, True),
    ]
    newest = Store(long_run).newest()
    assert newest is not None and newest.step == 40
    assert arc("quarantine", str(long_run), "--step", "60", "--release") == OK
    newest = Store(long_run).newest()
    assert newest is not None and newest.step == 60


def test_prune_orphans(long_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import os

    directory = long_run / "run" / "step-00000060"
    (directory / "manifest.json").unlink()
    assert arc("prune", str(long_run), "--orphans") == OK
    assert "step-00000060: left" in capsys.readouterr().out
    for path in (*directory.iterdir(), directory):
        os.utime(path, (1, 1))
    assert arc("prune", str(long_run), "--orphans", "--dry-run") == OK
    assert "step-00000060: would remove" in capsys.readouterr().out
    assert directory.exists()
    assert arc("prune", str(long_run), "--orphans", "--grace", "2h", "--json") == OK
    (orphan,) = json.loads(capsys.readouterr().out)["orphans"]
    assert (orphan["directory"], orphan["removed"]) == ("step-00000060", True)
    assert not directory.exists()
    assert arc("prune", str(long_run), "--orphans") == OK
    assert "nothing is left" in capsys.readouterr().out


def test_prune_leaves_a_damaged_step(long_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(long_run / "run" / "step-00000010" / "manifest.json", 40)
    assert arc("prune", str(long_run), "--keep", "last=2") == OK
    assert "left for you to look at" in capsys.readouterr().out
    assert (long_run / "run" / "step-00000010").exists()
    assert listed(long_run) == [50, 60]


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["prune"], "say what to keep"),
        (["prune", "--keep", "last=1"], "would leave nothing to restore"),
        (["prune", "--keep", "newest=3"], "there is no rule 'newest'"),
        (["prune", "--orphans", "--grace", "5s"], "may pause that long"),
        (["prune", "--orphans", "--grace", "soon"], "such as 90m or 7d"),
        (["pin"], "which step"),
        (["quarantine", "--step", "30", "--through", "20", "--why", "x"], "below"),
        (["quarantine", "--step", "30", "--through", "40", "--release"], "one step"),
    ],
)
def test_what_these_commands_refuse(long_run: Path, argv: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        arc(argv[0], str(long_run), *argv[1:])
    assert listed(long_run) == [10, 20, 30, 40, 50, 60]


def test_steps_and_runs_that_are_not_there(long_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["pin"], ["quarantine", "--why", "x"]):
        assert arc(command[0], str(long_run), "--step", "11", *command[1:]) == NOTHING_THERE
        assert "no committed step 11; `arc ls` shows" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="is one step"):
        arc("prune", str(long_run / "run" / "step-00000010"), "--keep", "last=2")
    save(Store(long_run, run="other", owner="b"), 10)
    with pytest.raises(ConfigError, match=r"several runs \(other, run\)"):
        arc("pin", str(long_run), "--step", "10")
    assert arc("pin", str(long_run), "--step", "10", "--run-name", "other") == OK
    (tmp_path / "empty").mkdir()
    assert arc("prune", str(tmp_path / "empty"), "--keep", "last=2") == NOTHING_THERE
    assert arc("unpin", str(long_run), "--step", "20", "--run-name", "run") == OK
    assert "was not pinned" in capsys.readouterr().out
    import shutil

    assert arc("pin", str(long_run / "run" / "step-00000030")) == OK
    shutil.rmtree(long_run / "run" / "step-00000030")
    assert arc("unpin", str(long_run / "run"), "--step", "30") == OK
    assert arc("unpin", str(long_run / "run"), "--step", "30") == NOTHING_THERE
