"""What arcrun arranges with torchrun's rendezvous for lost nodes."""

from __future__ import annotations

import argparse
import os

import pytest

from arc_dist.launch import nodes


def arguments(nnodes: str = "1:3", conf: str = "", endpoint: str = "head:29500", backend: str = "c10d"):
    known = {"nnodes": nnodes, "rdzv_conf": conf, "rdzv_endpoint": endpoint, "rdzv_backend": backend}
    return argparse.Namespace(**known, standalone=False, arc_spares=None)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("ARC_MIN_NODES", "ARC_RENDEZVOUS", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def parsed(conf: str) -> dict[str, int]:
    return {key: int(value) for key, _, value in (pair.partition("=") for pair in conf.split(","))}


@pytest.mark.parametrize("timeout_s", [2.0, 8.0, 15.0, 60.0, 301.5])
def test_the_rendezvous_leaves_a_node_out_after_the_node_has_ended_itself(timeout_s):
    given = arguments(conf="join_timeout=300")
    assert nodes.arrange(given, timeout_s)
    conf = parsed(given.rdzv_conf)
    assert conf["join_timeout"] == 300
    window_s = conf["keep_alive_interval"] * conf["keep_alive_max_attempt"]
    assert timeout_s + 2 * conf["keep_alive_interval"] <= window_s <= 2 * timeout_s + 3


def test_what_the_user_says_of_it_stays():
    given = arguments(conf="keep_alive_interval=7")
    assert nodes.arrange(given, 15.0)
    assert given.rdzv_conf == "keep_alive_interval=7"


@pytest.mark.parametrize(
    ("nnodes", "endpoint", "told"),
    [("2:4", "head:29500", ("2", "head:29500")), ("2:4", "head", ("2", "head:29400")), ("4", "head", (None, None))],
)
def test_supervisors_learn_what_the_launcher_allows(nnodes, endpoint, told):
    assert nodes.arrange(arguments(nnodes, endpoint=endpoint), 15.0)
    assert (os.environ.get("ARC_MIN_NODES"), os.environ.get("ARC_RENDEZVOUS")) == told


def test_other_rendezvous_are_left_alone():
    given = arguments("1", conf="", endpoint="", backend="static")
    assert nodes.arrange(given, 15.0)
    assert given.rdzv_conf == ""
