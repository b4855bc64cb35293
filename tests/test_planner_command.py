"""`arc simulate`: units, refusals, what it prints, and laws that its answers must keep."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arc_dist import cli
from arc_dist.errors import ConfigError
from arc_dist.planner import options
from arc_dist.planner.cluster import arc_plan, parse_tier_speeds, torchrun_plan
from arc_dist.planner.faults import trace
from arc_dist.planner.model import live
from arc_dist.planner.units import DAY_S, format_size, format_time, parse_rate, parse_size, parse_time

SMALL = ("--nodes", "64", "--state", "200GB", "--time", "60d", "--lives", "2")


def simulate(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main(["simulate", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["simulate", *arguments]) == 78
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5y", 5 * 365.25 * 86400),
        ("90s", 90),
        ("1.5h", 5400),
        (" 2 d ", 172800),
        ("10min", 600),
        ("3m", 180),
        ("7ms", 0.007),
    ],
)
def test_times_are_read(text: str, seconds: float) -> None:
    assert parse_time(text) == pytest.approx(seconds)


def test_sizes_and_rates_are_read() -> None:
    assert (parse_size("2TB"), parse_size("1GiB"), parse_size("3e9"), parse_size("5 gb")) == (2e12, 2**30, 3e9, 5e9)
    assert parse_rate("10GB/s") == parse_rate("10GB") == 1e10
    assert parse_time("never") == math.inf


@pytest.mark.parametrize("text", ["", "5", "-5y", "5 parsecs", "nan", "1e999s", "5y/s", "٣s"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a time"):
        parse_time(text)


@pytest.mark.parametrize("text", ["", "TB", "-2TB", "2TX", "2TB/s", "1e999"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)


@given(st.floats(1e-3, 1e11))
def test_printed_times_and_sizes_read_back(value: float) -> None:
    assert parse_time(format_time(value)) == pytest.approx(value, rel=0.006)
    assert parse_size(format_size(value * 1e3)) == pytest.approx(value * 1e3, rel=0.006)


def test_tiers_are_read_with_the_limits_of_one_node_and_of_all() -> None:
    local, nfs, s3 = parse_tier_speeds("nvme=2GB/s, nfs=20GB/s, s3=100GB/s@1GB/s")
    assert (local.is_local, nfs.is_local, s3.is_local) == (True, False, False)
    assert local.transfer_s(2e12, 100) == pytest.approx(10.0)  # each node writes its hundredth
    assert nfs.transfer_s(2e12, 100) == pytest.approx(100.0)
    assert (s3.transfer_s(2e12, 50), s3.transfer_s(2e12, 1000)) == (pytest.approx(40.0), pytest.approx(20.0))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "0", "--state", "2TB"], "--nodes must be 1 or more"),
        (["--nodes", "four", "--state", "2TB"], "--nodes: 'four' is not a whole number"),
        (["--nodes=-4", "--state", "2TB"], "--nodes must be 1 or more"),
        (["--nodes", "4", "--state=-2TB"], "--state: '-2TB' is not a size"),
        (["--nodes", "4", "--state", "0TB"], "--state must be above 0"),
        (["--nodes", "4", "--state", "50TB"], "Give more --nodes or --memory"),
        (["--nodes", "4", "--state", "400GB", "--replicas", "32"], "fewer --replicas"),
        (["--nodes", "4", "--state", "1TB", "--replicas", "33"], "--replicas must be at most the 32 ranks"),
        (["--nodes", "4", "--state", "1TB", "--mtbf-node", "0s"], "--mtbf-node must be above 0"),
        (["--nodes", "4", "--state", "1TB", "--mtbf-node", "10us"], "--mtbf-node: '10us' is not a time"),
        (["--nodes", "4", "--state", "1TB", "--mtbf-node", "0.1s"], "is too much to play"),
        (["--nodes", "4", "--state", "1TB", "--detect-node", "never"], "--detect-node must be a time"),
        (["--nodes", "4", "--state", "1TB", "--copy-rate", "0GB/s"], "--copy-rate must be above 0"),
        (["--nodes", "4", "--state", "1TB", "--weibull", "0"], "--weibull must be above 0"),
        (["--nodes", "4", "--state", "1TB", "--weibull", "nan"], "--weibull must be above 0"),
        (["--nodes", "4", "--state", "1TB", "--reboot-share", "2"], "--reboot-share must be between 0 and 1"),
        (["--nodes", "4", "--state", "1TB", "--drag", "1"], "--drag must be 0 or more, and below 1"),
        (["--nodes", "4", "--state", "1TB", "--spares", "-1"], "--spares must be 0 or more"),
        (["--nodes", "4", "--state", "1TB", "--peer-copies", "4"], "--peer-copies must be 0 to 3"),
        (["--nodes", "4", "--state", "1TB", "--persist", "10s"], "s3 every 10 s: making one takes 4.17 min"),
        (
            ["--nodes", "4", "--state", "1TB", "--persist", "nfs=1h"],
            "--persist nfs: there is no such tier",
        ),
        (["--nodes", "4", "--state", "1TB", "--persist", "s3=1h,s3=2h"], "s3 appears twice"),
        (["--nodes", "4", "--state", "1TB", "--persist", "never"], "s3 must be above 0, and a time"),
        (["--nodes", "4", "--state", "1TB", "--snapshot", "1s"], "memory every 1 s: making one takes 10 s"),
        (["--nodes", "4", "--state", "1TB", "--torchrun-persist", "1s"], "torchrun's s3 every 1 s"),
        (["--nodes", "4", "--state", "1TB", "--tiers", "nvme=2GB/s"], "no place outlives a node"),
        (["--nodes", "4", "--state", "1TB", "--tiers", "s3=1GB/s,nvme=2GB/s"], "name the shared places last"),
        (["--nodes", "4", "--state", "1TB", "--tiers", "s3"], "'s3' is not a new NAME=RATE"),
        (["--nodes", "4", "--state", "1TB", "--tiers", "memory=1GB/s"], "is not a new NAME=RATE"),
        (["--nodes", "4", "--state", "1TB", "--tiers", "s3=0GB/s"], "the rates of s3 must be above 0"),
        (["--nodes", "4", "--state", "1TB", "--tiers", "nvme=1GB/s@1GB/s,s3=1GB/s"], "is per node already"),
        (["--nodes", "4", "--state", "1TB", "--time", "never"], "--time must be above 0"),
        (["--nodes", "4", "--state", "1TB", "--lives", "0"], "--lives: '0' is not a whole number from 1"),
        (["--nodes", "4", "--state", "1TB", "--plot", "out.png"], "--plot out.png: the picture is an SVG"),
        (["--nodes", "4", "--state", "1TB", "--plot", "/no/such/place/out.svg"], "No such file or directory"),
    ],
)
def test_wrong_input_has_one_clear_error(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    # A job of a few faults, where the refusal comes last.
    assert words in refusal(
        capsys, *(["--lives", "1", "--time", "5d"] if "--lives" not in arguments else []), *arguments
    )


def test_the_help_names_the_source_of_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["simulate", "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in options.OPTIONS:
        if option.default is not None:
            assert option.source
            assert f"[{option.default}; {' '.join(option.source.split())}]" in text, option.flag


def test_the_answer_is_the_same_for_the_same_seed(capsys: pytest.CaptureFixture[str]) -> None:
    first = simulate(capsys, *SMALL)
    assert simulate(capsys, *SMALL) == first
    assert simulate(capsys, *SMALL, "--seed", "1") != first


def test_a_picture_is_written_and_the_text_has_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plan.svg"
    assert cli.main(["simulate", *SMALL, "--plot", str(plot)]) == 0
    text = capsys.readouterr().out
    for words in (
        "goodput with arc-dist",
        "where time is lost with torchrun",
        "Young",
        "Daly",
        "best found",
        "o arc-dist",
    ):
        assert words in text
    assert max(len(line) for line in text.splitlines()) <= 120
    root = ElementTree.parse(plot).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    curves = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(curves) == 2
    assert all(len(curve.attrib["points"].split()) >= 10 for curve in curves)


def test_a_job_that_never_fails_is_all_goodput(capsys: pytest.CaptureFixture[str]) -> None:
    never = ("--mtbf-node", "never", "--mtbf-process", "never", "--mtbf-numeric", "never")
    assert cli.main(["simulate", *SMALL, *never]) == 0
    assert "nothing ever fails" in capsys.readouterr().out
    answer = simulate(capsys, *SMALL, *never)
    assert answer["job_mtbf_s"] is None
    assert all(arm["goodput"] > 0.9999 for arm in answer["arms"])


def goodputs(*arguments: str, persist_s: float = 3600.0, is_async: bool = False) -> tuple[float, float]:
    """Of arc-dist and torchrun over 200 days, the same faults for all that have the same rates."""
    parser = argparse.ArgumentParser()
    options.add_options(parser)
    cluster = options.read_cluster(parser.parse_args(["--nodes", "64", "--state", "200GB", *arguments]))
    faults = trace(cluster.rates(), 200 * DAY_S, "0")
    ours = arc_plan(cluster, {"memory": 600.0, "s3": persist_s})
    theirs = torchrun_plan(cluster, 3600.0, is_async=is_async)
    return live(ours, faults, 200 * DAY_S).goodput, live(theirs, faults, 200 * DAY_S).goodput


def test_laws() -> None:
    """Against the same faults: what gets worse makes goodput worse, for both."""
    usual = goodputs()
    assert usual[0] > usual[1]
    for worse in (("--mtbf-node", "40d"), ("--detect-node", "1h"), ("--spares", "0", "--repair", "5d")):
        ours, theirs = goodputs(*worse)
        assert ours < usual[0], worse
        assert theirs < usual[1], worse
    assert goodputs("--spares", "64") == usual
    assert goodputs(persist_s=8 * 3600.0)[0] < usual[0]
    assert goodputs(is_async=True)[1] > usual[1]
    warned, hasty = goodputs("--mtbf-preempt", "1d"), goodputs("--mtbf-preempt", "1d", "--grace", "0s")
    assert hasty[0] < warned[0] < usual[0]
    assert hasty[1] == warned[1]


def test_what_a_fault_leaves_decides_where_the_job_goes_on_from(capsys: pytest.CaptureFixture[str]) -> None:
    tiers = ("--tiers", "nvme=2GB/s,s3=1GB/s", "--mtbf-node", "30d", "--persist", "s3=6h")
    lost, _ = simulate(capsys, *SMALL, *tiers)["arms"]
    assert "nvme" not in lost["interval_s"]  # no fault is recovered from there, so it is not written
    assert cli.main(["simulate", *SMALL, *tiers]) == 0
    assert "left out, as none of these faults is recovered from there: nvme" in capsys.readouterr().out
    rebooted, _ = simulate(capsys, *SMALL, *tiers, "--reboot-share", "1")["arms"]
    assert "nvme" in rebooted["interval_s"]
    assert rebooted["faults"]["reboot"]["lost_work"] < 0.2 * lost["faults"]["node"]["lost_work"]
    peers, _ = simulate(capsys, *SMALL, *tiers, "--peer-copies", "1")["arms"]
    assert peers["faults"]["node"]["lost_work"] < 0.2 * lost["faults"]["node"]["lost_work"]
    replicas, _ = simulate(capsys, *SMALL, "--replicas", "2", "--mtbf-process", "100d", "--snapshot", "2h")["arms"]
    one, _ = simulate(capsys, *SMALL, "--mtbf-process", "100d", "--snapshot", "2h")["arms"]
    assert replicas["faults"]["process"]["lost_work"] < 0.1 * one["faults"]["process"]["lost_work"]


def test_a_year_of_16384_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    answer = simulate(capsys, "--nodes", "2048", "--gpus", "8", "--state", "2TB", "--time", "1y", "--lives", "4")
    assert answer["job_mtbf_s"] == pytest.approx(3.09 * 3600, rel=0.01)
    assert sum(cost["number"] for cost in answer["arms"][0]["faults"].values()) == pytest.approx(2836, rel=0.05)
