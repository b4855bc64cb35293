"""Lost hosts: their ranks' state comes back from copies in other hosts' memory, bit for bit, with no store at all."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from arc_dist.peers.shelf import Shelf
from arc_dist.snapshot import layout
from arc_dist.snapshot.directory import owned_directories
from hosts import Hosts
from ranks import Job, run_ranks
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


def check(hosts: Hosts, toy: Toy, *, fetched: list[int], step: int = BLOCK_AT - 3, lost: tuple[int, ...] = ()) -> None:
    """The job ended well, bitwise as if nothing had happened, from memory alone, and lost no more than an interval."""
    codes = hosts.wait(WAIT_S)
    assert set(codes.values()) == {0}, hosts.story(f"exit codes {codes}")
    results = [json.loads((hosts.directory / "out" / f"result-{rank}.json").read_text()) for rank in range(4)]
    assert [result["resumed"] for result in results] == [[step, "memory"]] * 4, hosts.story("not from memory")
    if not lost:
        assert BLOCK_AT - 1 - step <= EVERY
    lines = hosts.incidents("copy_fetched")
    assert sorted(line["rank"] for line in lines) == fetched, lines
    assert {line["step"] for line in lines} == {step}
    assert sorted(line["rank"] for line in hosts.incidents("copy_lost")) == sorted(lost)
    assert [result["digest"] for result in results] == run_ranks(4, undisturbed, toy), hosts.story("other bits")
    left = [path for host in hosts.shm.iterdir() for path in host.iterdir()]
    assert left == []


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["fsdp", pytest.param("ddp", marks=pytest.mark.soak)])
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
def test_a_copy_that_cannot_be_fetched_is_said_and_another_source_is_taken(tmp_path, shm_root):
    """Two hosts keep copies. A bit of one flips in its holder's memory: the next plan names the other holder."""
    toy = TOYS["fsdp"]
    env = {"ARC_PEER_COPIES": "2"}
    with Hosts(tmp_path, shm_root, SCRIPT, argument(tmp_path, toy), env) as hosts:
        hosts.start({0: "a", 1: "d", 2: "b", 3: "b"})
        hosts.wait_for((tmp_path / "out" / "blocked-2").exists, WAIT_S, "the step of the fault")
        wanted = {(2, BLOCK_AT - 3), (3, BLOCK_AT - 3)}
        for host in "ad":
            hosts.wait_for(lambda h=host: wanted <= hosts.copies(h), WAIT_S, f"copies at host {host}")
        hosts.lose("b")
        flip_a_bit(hosts.shm / "a", owner=2, step=BLOCK_AT - 3)
        hosts.start({2: "c", 3: "c"})
        check(hosts, toy, fetched=[2, 3], lost=(2,))


def flip_a_bit(root: Path, *, owner: int, step: int) -> None:
    kept = [kept for path in owned_directories(root) for kept in Shelf(path).kept()]
    (mine,) = [kept for kept in kept if (kept.owner, kept.info.step) == (owner, step)]
    path = layout.slot_path(mine.directory, mine.info.slot)
    data = bytearray(path.read_bytes())
    data[layout.PAGE_BYTES + 200] ^= 1
    with path.open("r+b") as file:
        file.write(data)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("swapped", [pytest.param(False, marks=pytest.mark.soak), True])
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


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_memory_is_not_taken_over_when_the_journal_is_gone(tmp_path, shm_root):
    """Nobody knows then what was given up, so the job begins anew; and the old directories are not awaited for ever."""
    toy = TOYS["fsdp"]
    with Hosts(tmp_path, shm_root, SCRIPT, argument(tmp_path, toy)) as hosts:
        hosts.start({0: "a", 1: "a", 2: "b", 3: "b"})
        until_struck(hosts, "a", "b")
        hosts.kill("a", "b")
        assert [hosts.ranks_left(host) for host in "ab"] == [[0, 1], [2, 3]]
        shutil.rmtree(tmp_path / "run")
        hosts.new_store()
        hosts.start({0: "a", 1: "a", 2: "b", 3: "b"})
        assert hosts.wait(WAIT_S) == dict.fromkeys(range(4), 0), hosts.story("it did not end well")
        results = [json.loads((tmp_path / "out" / f"result-{rank}.json").read_text()) for rank in range(4)]
        assert [result["resumed"] for result in results] == [None] * 4
        assert [result["digest"] for result in results] == run_ranks(4, undisturbed, toy)
        # The agent that had started them (here the tests' fork server) lives, and could start that job again.
        assert [hosts.ranks_left(host) for host in "ab"] == [[0, 1], [2, 3]]


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_two_agents_of_torchrun_and_a_replaced_node(tmp_path, shm_root):
    """The real launcher: a node is lost with all its processes and its memory, and another one takes its place."""
    toy = TOYS["fsdp"]
    conf = "join_timeout=600,last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=5"
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{sock.getsockname()[1]}"
    # Blocked from either side: which node gets which ranks is torchrun's to say.
    config = {**argument(tmp_path, toy), "blocks": {"2": BLOCK_AT}}
    command = [
        sys.executable, "-m", "arc_dist.launch.arcrun", "--nnodes=2", "--nproc-per-node=2", "--max-restarts=3",
        "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=peers", f"--rdzv-conf={conf}",
        "--monitor-interval=0.1", SCRIPT, json.dumps(config),
    ]  # fmt: skip

    def start(host: str) -> Job:
        root = shm_root / host
        root.mkdir()
        env = {"ARC_RUN_DIR": str(tmp_path / "run"), "ARC_SHM_ROOT": str(root), "ARC_FAILURE_DOMAIN": host}
        return Job(command, env=env, cwd=tmp_path)

    hosts = Hosts(tmp_path, shm_root, SCRIPT, {})
    with start("a") as first:
        # The node that serves the rendezvous must be there first.
        first.wait_for(lambda: _listens(endpoint), WAIT_S, "the rendezvous")
        with start("b") as second:
            first.wait_for((tmp_path / "out" / "blocked-2").exists, WAIT_S, "the step of the fault")
            ranks = {host: hosts.ranks_left(host) for host in "ab"}
            assert sorted(ranks.values()) == [[0, 1], [2, 3]]
            wanted = {(owner, BLOCK_AT - 3) for owner in ranks["b"]}
            first.wait_for(lambda: wanted <= hosts.copies("a"), WAIT_S, "the copies")
            second.kill()
        shutil.rmtree(shm_root / "b")
        with start("c") as third:
            ends = [first.wait(2 * WAIT_S), third.wait(WAIT_S)]
    story = "\n".join(map(repr, ends))
    assert [end.exit_code for end in ends] == [0, 0], story
    results = [json.loads((tmp_path / "out" / f"result-{rank}.json").read_text()) for rank in range(4)]
    assert [result["resumed"] for result in results] == [[BLOCK_AT - 3, "memory"]] * 4, story
    assert [result["digest"] for result in results] == run_ranks(4, undisturbed, toy)
    assert len(hosts.incidents("copy_fetched")) >= 2
    assert [path for host in "ac" for path in (shm_root / host).iterdir()] == []


def _listens(endpoint: str) -> bool:
    host, _, port = endpoint.partition(":")
    with socket.socket() as sock:
        return sock.connect_ex((host, int(port))) == 0
