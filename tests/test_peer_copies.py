"""Lost hosts: their ranks' state comes back from copies in other hosts' memory, bit for bit, with no store at all."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from hosts import Hosts
from ranks import run_ranks
from toy import Toy, plain

SCRIPT = str(Path(__file__).parent / "scripts" / "lost_host.py")
WAIT_S = 240.0
EVERY = 4
BLOCK_AT = 15  # 12 is the newest snapshot that is trusted then
TOYS = {"fsdp": Toy(kind="fsdp", steps=24, samples=2048), "ddp": Toy(kind="ddp", steps=24, samples=2048)}


def undisturbed(rank: int, world_size: int, toy: Toy) -> str:
    return plain(toy)[0]


def argument(directory: Path, toy: Toy, **more: Any) -> dict[str, Any]:
    (directory / "out").mkdir()
    settings = {"snapshot_every": EVERY, **more.pop("settings", {})}
    fields = {"toy": dataclasses.asdict(toy), "out": str(directory / "out"), "settings": settings}
    return {**fields, "blocks": {"2": BLOCK_AT}, **more}


def until_struck(hosts: Hosts, *where: str) -> None:
    """Until the job stands still in the step of the fault, and copies of the newest trusted snapshot are whole."""
    hosts.wait_for((hosts.directory / "out" / "blocked-2").exists, WAIT_S, "the step of the fault")
    for host, owners in (("a", (2, 3)), ("b", (0, 1))):
        if host in where:
            wanted = {(owner, BLOCK_AT - 3) for owner in owners}
            hosts.wait_for(lambda h=host, w=wanted: w <= hosts.copies(h), WAIT_S, f"copies at host {host}")


def check(hosts: Hosts, toy: Toy, *, fetched: list[int]) -> None:
    """The job ended well, bitwise as if nothing had happened, from memory alone, and lost no more than an interval."""
    codes = hosts.wait(WAIT_S)
    assert set(codes.values()) == {0}, hosts.story(f"exit codes {codes}")
    results = [json.loads((hosts.directory / "out" / f"result-{rank}.json").read_text()) for rank in range(4)]
    assert [result["resumed"] for result in results] == [[BLOCK_AT - 3, "memory"]] * 4, hosts.story("not from memory")
    assert BLOCK_AT - 1 - (BLOCK_AT - 3) <= EVERY
    lines = hosts.incidents("copy_fetched")
    assert sorted(line["rank"] for line in lines) == fetched, lines
    assert {line["step"] for line in lines} <= {BLOCK_AT - 3}
    assert hosts.incidents("copy_lost") == []
    assert [result["digest"] for result in results] == run_ranks(4, undisturbed, toy), hosts.story("other bits")
    left = [path for host in hosts.shm.iterdir() for path in host.iterdir()]
    assert left == []


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_a_lost_host_is_replaced_and_its_ranks_go_on_from_copies(kind, tmp_path, shm_root):
    """DDP, too, when it is asked for: what a rank alone knows (random state) is lost with its host."""
    toy = TOYS[kind]
    env = {"ARC_PEER_COPIES": "1"} if kind == "ddp" else {}
    with Hosts(tmp_path, shm_root, SCRIPT, argument(tmp_path, toy), env) as hosts:
        hosts.start({0: "a", 1: "a", 2: "b", 3: "b"})
        until_struck(hosts, "a")
        hosts.lose("b")
        hosts.start({2: "c", 3: "c"})
        check(hosts, toy, fetched=[2, 3])


@pytest.mark.timeout(900)
@pytest.mark.parametrize("swapped", [False, True])
def test_all_supervisors_end_and_the_next_ones_take_over_what_is_left(swapped, tmp_path, shm_root):
    """As under torchrun, whose agents start all ranks again when one is lost; and may number the hosts otherwise."""
    toy = TOYS["fsdp"]
    with Hosts(tmp_path, shm_root, SCRIPT, argument(tmp_path, toy)) as hosts:
        hosts.start({0: "a", 1: "a", 2: "b", 3: "b"})
        until_struck(hosts, "a")
        hosts.lose("b")
        hosts.kill("a")
        assert hosts.ranks_left("a") == [0, 1]
        hosts.new_store()
        if swapped:
            hosts.start({0: "c", 1: "c", 2: "a", 3: "a"})
            check(hosts, toy, fetched=[0, 1, 2, 3])
        else:
            hosts.start({0: "a", 1: "a", 2: "c", 3: "c"})
            check(hosts, toy, fetched=[2, 3])
