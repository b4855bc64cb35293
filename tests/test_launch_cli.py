"""The `arc` command: help, versions, errors of ours as one line with the right exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arc_dist import cli


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for command in ("ls", "verify", "inspect", "report"):
        assert command in text


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["report"], ["report", "x", "--no-such-option"]])
def test_a_wrong_command_line_is_a_configuration_error(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 78
    assert "--help" in capsys.readouterr().err


def test_an_error_of_ours_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path / "gone")]) == 78
    error = capsys.readouterr().err
    assert error.startswith("arc: ")
    assert error.count("\n") == 1


def test_the_report_of_a_supervised_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    incident = {
        "time": 1.0,
        "kind": "rank_died",
        "rank": 1,
        "generation": 0,
        "step": 5,
        "cause": "killed by SIGKILL",
        "seen_after_s": 0.01,
        "action": "restart",
        "new_generation": 1,
        "resumed_after_s": 0.05,
        "steps_lost": 0,
    }
    (tmp_path / "incidents.jsonl").write_text(json.dumps(incident) + "\n")
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "killed by SIGKILL" in capsys.readouterr().out
