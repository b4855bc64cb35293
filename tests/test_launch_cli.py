"""The `arc` command: help, versions, errors of ours as one line with the right exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arc_dist import cli
from arc_dist.telemetry import report


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


@pytest.mark.parametrize("ahead_s", [-7200.0, 0.0, 7200.0])
def test_the_report_is_right_when_the_clocks_of_hosts_differ(ahead_s: float, tmp_path: Path) -> None:
    """A rank dies on a host whose clock is `ahead_s` before that of the coordinator's, which takes all lines down."""
    died = {"kind": "rank_died", "rank": 1, "generation": 0, "step": 10, "cause": "killed by SIGKILL"}
    died |= {"died_at": 1000.0 + ahead_s, "time": 1000.1 + ahead_s, "resumed_after_s": 0.5, "heard_at": 1000.5}
    later = {"kind": "resumed", "generation": 1, "step": 9, "restored_step": 8, "tier": "memory"}
    lines = [died, {**later, "time": 1002.0, "heard_at": 1002.0}]
    (tmp_path / "incidents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (incident,) = report.summarize(report.read_lines(tmp_path))["incidents"]
    assert incident["restored_step"] == 8
    assert incident["steps_lost"] == 2
    assert incident["resumed_after_s"] == pytest.approx(2.0)
