"""The kernel ends one rank for lack of memory: the incident says so, and the job goes on bitwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memory_limit import memory_cgroup, num_oom_kills
from test_restart import job, undisturbed
from toy import Toy


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_rank_that_the_oom_killer_ends_is_named_with_its_cause(tmp_path: Path, kind: str) -> None:
    toy = Toy(kind=kind, steps=16)
    with memory_cgroup() as group:
        results, output = job(tmp_path, toy, 2, kills={"1": [9]}, oom=str(group))
        assert num_oom_kills(group) == 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "incidents.jsonl").read_text().splitlines()]
    (death,) = [line for line in lines if line["kind"] == "rank_died"]
    assert death["rank"] == 1
    assert "OOM killer" in death["cause"], output
    assert [result["digest"] for result in results] == undisturbed(toy, 2), output
