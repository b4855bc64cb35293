"""A script that knows nothing of us is guarded by the launcher alone: probe, vote, skip or roll back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ranks import run_plain, run_supervised

SCRIPT = str(Path(__file__).parent / "scripts" / "unguarded_faults.py")


def run(kind, fault, tmp_path, *, guarded=True):
    out = tmp_path / ("guarded" if guarded else "alone")
    out.mkdir()
    num_ranks = 1 if kind == "single" else 2
    arguments = (SCRIPT, kind, fault, str(out))
    env = {"OMP_NUM_THREADS": "1", "ARC_RUN_DIR": str(tmp_path / "run")}
    run_them = run_supervised if guarded else run_plain
    done = run_them(num_ranks, *arguments, env=env, timeout_s=80)
    assert done.exit_code == 0, str(done)
    results = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    assert sum(result["fired"] for result in results) == (fault != "none")
    return results, done.stdout + done.stderr


@pytest.mark.parametrize("fault", ["nan-data", "inf-weight"])
@pytest.mark.parametrize("kind", ["single", "ddp", "fsdp"])
def test_the_fault_kills_the_script_alone_and_not_with_us(tmp_path, kind, fault):
    hurt, _ = run(kind, fault, tmp_path, guarded=False)
    assert not any(result["finite"] for result in hurt[:1]), "the fault must really hurt the unguarded script"
    healed, output = run(kind, fault, tmp_path)
    assert all(result["finite"] for result in healed), output
    assert ("SKIP" if fault == "nan-data" else "ROLLBACK") in output
    if kind == "ddp" and fault == "nan-data":
        assert healed[0]["digests"] == healed[1]["digests"], "replicas are equal after every step"
    elif kind == "ddp":  # the hurt rank alone is hurt until the next step heals it
        assert healed[0]["digests"][:20] == healed[1]["digests"][:20]
        assert healed[0]["digests"][21:] == healed[1]["digests"][21:]


@pytest.mark.parametrize("kind", ["single", "ddp", "fsdp"])
def test_without_a_fault_the_result_is_the_same(tmp_path, kind):
    alone, _ = run(kind, "none", tmp_path, guarded=False)
    guarded, output = run(kind, "none", tmp_path)
    assert guarded == alone
    assert "SKIP" not in output
