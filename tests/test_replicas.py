"""Lost ranks are refilled from live replicas, bit for bit and with no store: HSDP's, and DDP's on other hosts."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hosts import Hosts
from ranks import run_ranks, run_supervised
from toy import Toy, plain

SCRIPTS = Path(__file__).parent / "scripts"
WAIT_S = 240.0
EVERY = 4
BLOCK_AT = 15  # 12 is the newest snapshot that is trusted then
NO_COPIES = {"ARC_PEER_COPIES": "0"}

needs_names = pytest.mark.skipif(
    subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode != 0,
    reason="hosts of their own names need CAP_SYS_ADMIN",
)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def undisturbed(rank: int, world_size: int, toy: Toy) -> str:
    return plain(toy)[0]


def kill_one(tmp_path: Path, toy: Toy, where: str = "loss") -> list[dict[str, Any]]:
    """Rank 3 of 4 is killed in step 13, or right after it; the only older snapshot is that of the start."""
    config = {"kills": {"3": [13]}, "where": where, "settings": {"snapshot_every": 50}}
    argument = json.dumps({"toy": dataclasses.asdict(toy), "out": str(tmp_path), **config})
    env = {"OMP_NUM_THREADS": "1", "ARC_RUN_DIR": str(tmp_path / "run")}
    done = run_supervised(4, str(SCRIPTS / "train_toy.py"), argument, env=env, timeout_s=WAIT_S)
    assert done.exit_code == 0, done
    assert (tmp_path / "killed-3-13").exists(), "the kill did not fire"
    results = [json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in range(4)]
    assert [result["digest"] for result in results] == run_ranks(4, undisturbed, toy), done
    return results


@pytest.mark.parametrize("where", [pytest.param("loss", marks=pytest.mark.soak), "body"])
def test_under_hsdp_a_replica_on_the_host_stands_in_so_that_no_step_is_lost(where, tmp_path):
    """The survivors lose their peer in the backward pass, or in the forward pass with parameters gathered."""
    results = kill_one(tmp_path, Toy(kind="hsdp", steps=18, samples=2048, batch_norm=True), where)
    assert [result["steps"][0][0] for result in results] == [13 + (where == "body")] * 4


def test_under_plain_fsdp_nobody_stands_in(tmp_path):
    results = kill_one(tmp_path, Toy(kind="fsdp", steps=18, samples=2048))
    assert [result["steps"][0][0] for result in results] == [1] * 4


def start(hosts: Hosts) -> None:
    hosts.start({0: "a", 1: "a", 2: "b", 3: "b"})
    hosts.wait_for((hosts.directory / "out" / "blocked-2").exists, WAIT_S, "the step of the fault")


def two_hosts(tmp_path: Path, shm_root: Path, toy: Toy, *, named: bool, env: dict[str, str]) -> Hosts:
    """Ranks 0 and 2 are replicas, and 1 and 3 (under DDP all four): each host has a whole state."""
    (tmp_path / "out").mkdir()
    argument = {
        "toy": dataclasses.asdict(toy),
        "out": str(tmp_path / "out"),
        "settings": {"snapshot_every": EVERY},
        "blocks": {"2": BLOCK_AT},
    }
    return Hosts(tmp_path, shm_root, str(SCRIPTS / "lost_host.py"), argument, env, named=named)


def check(hosts: Hosts, toy: Toy, step: int, fetched: dict[int, list[str]]) -> None:
    """All went on after `step`, from memory alone, and `fetched` says what each rank's incident must name."""
    codes = hosts.wait(WAIT_S)
    assert set(codes.values()) == {0}, hosts.story(f"exit codes {codes}")
    results = [json.loads((hosts.directory / "out" / f"result-{rank}.json").read_text()) for rank in range(4)]
    assert [result["resumed"] for result in results] == [[step, "memory"]] * 4, hosts.story("not from memory")
    lines = {line["rank"]: line for line in hosts.incidents("copy_fetched")}
    assert sorted(lines) == sorted(fetched), hosts.story(str(lines))
    for rank, words in fetched.items():
        assert [word for word in words if word not in lines[rank]["action"]] == [], lines[rank]
        assert lines[rank]["step"] == step
    assert hosts.incidents("copy_lost") == []
    assert [result["digest"] for result in results] == run_ranks(4, undisturbed, toy), hosts.story("other bits")
    assert [path for host in hosts.shm.iterdir() for path in host.iterdir()] == []


@needs_names
@pytest.mark.parametrize("kind", ["hsdp", "ddp"])
def test_a_lost_host_is_refilled_from_live_replicas_on_another_one(kind, tmp_path, shm_root):
    """Processes and memory of the host are gone; what only its ranks knew was noted at the other one."""
    toy = Toy(kind=kind, steps=20, samples=2048)
    with two_hosts(tmp_path, shm_root, toy, named=True, env=NO_COPIES if kind == "hsdp" else {}) as hosts:
        start(hosts)
        wanted = {(2, BLOCK_AT - 3), (3, BLOCK_AT - 3)}
        hosts.wait_for(lambda: wanted <= hosts.notes("a"), WAIT_S, "the notes")
        assert hosts.copies("a") == set()
        hosts.lose("b")
        assert not (shm_root / "b").exists()
        hosts.start({2: "c", 3: "c"})
        words = {
            rank: ["the snapshot of step 12 from the supervisor of rank", "the note of step 12 from"] for rank in (2, 3)
        }
        if kind == "hsdp":
            words = {rank: [f"{said[0]} {rank - 2}", said[1]] for rank, said in words.items()}
        check(hosts, toy, BLOCK_AT - 3, words)


@pytest.mark.soak
def test_on_one_host_only_the_note_is_fetched(tmp_path, shm_root):
    """The memory of two ranks is gone, that of their replicas can be read."""
    toy = Toy(kind="hsdp", steps=20, samples=2048)
    with two_hosts(tmp_path, shm_root, toy, named=False, env=NO_COPIES) as hosts:
        start(hosts)
        wanted = {(2, BLOCK_AT - 3), (3, BLOCK_AT - 3)}
        hosts.wait_for(lambda: wanted <= hosts.notes("a"), WAIT_S, "the notes")
        hosts.lose("b")
        hosts.start({2: "c", 3: "c"})
        check(hosts, toy, BLOCK_AT - 3, {rank: ["fetched the note of step 12"] for rank in (2, 3)})


@needs_names
@pytest.mark.parametrize("kind", ["hsdp", pytest.param("ddp", marks=pytest.mark.soak)])
def test_a_killed_process_goes_on_from_a_replica_on_another_host_with_no_step_lost(kind, tmp_path, shm_root):
    """Rank 2 shares its host with rank 3 alone, which under HSDP has other shards. DDP's replica there is nearer."""
    toy = Toy(kind=kind, steps=20, samples=2048)
    with two_hosts(tmp_path, shm_root, toy, named=True, env=NO_COPIES) as hosts:
        start(hosts)
        os.kill(int((tmp_path / "out" / "blocked-2").read_text()), signal.SIGKILL)
        fetched = {2: ["the snapshot of step 14 from the supervisor of rank 0"]} if kind == "hsdp" else {}
        check(hosts, toy, BLOCK_AT - 1, fetched)
