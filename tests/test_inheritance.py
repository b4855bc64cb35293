"""Directories in shared memory that outlive their owners: who takes them over, who never does, and when they go."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from arc_dist.checkpoint_store.format import TensorSpec
from arc_dist.config import Env
from arc_dist.peers.adoption import Place, adopt
from arc_dist.peers.shelf import Shelf
from arc_dist.snapshot import directory as directories
from arc_dist.snapshot import inheritance, layout
from arc_dist.snapshot.directory import OwnedDirectory, collect_dead, collect_of_agent
from arc_dist.snapshot.inheritance import Signature
from arc_dist.snapshot.layout import StatusPage
from arc_dist.snapshot.ring import SnapshotRing
from arc_dist.supervisor.estate import Estate
from arc_dist.supervisor.membership import Membership
from arc_dist.supervisor.process import start_ticks

HERE = Place(local_rank=0, local_world_size=2)


def signed(rank: int = 0, **changes) -> Signature:
    return Signature(**{"lineage": "line", "rank": rank, "world_size": 4, **changes})


def leave(root: Path, signature: Signature, *steps: int, copies: tuple[int, ...] = ()) -> Path:
    """What a supervisor leaves that was killed: snapshots of its rank, and copies of others'."""
    owned = OwnedDirectory(root, "left")
    StatusPage.create(owned.path).close()
    signature.write(owned.path)
    for path in (owned.path, *(owned.path / f"peer-{owner}" for owner in copies)):
        path.mkdir(exist_ok=True)
        ring = SnapshotRing(path)
        specs = [TensorSpec("w", "float32", torch.Size([8]), torch.Size([8]), (0,), False)]
        for step in steps:
            ring.capture(step, 0, specs, [torch.full((8,), float(step))], {})
            ring.certify(step)
        ring.close()
    owned.close(keep=True)
    assert owned.path.exists()
    return owned.path


def heir(root: Path, signature: Signature, place: Place = HERE) -> tuple[OwnedDirectory, list[int]]:
    owned = OwnedDirectory(root, "next")
    signature.write(owned.path)
    return owned, adopt(root, owned.path, Shelf(owned.path), signature, place)


def test_a_rank_finds_its_own_snapshots_and_keeps_the_copies(tmp_path):
    left = leave(tmp_path, signed(), 4, 8, copies=(2, 3))
    owned, taken = heir(tmp_path, signed())
    assert taken == [0]
    assert {info.step for info in layout.inspect(owned.path)} == {4, 8}
    assert {(kept.owner, kept.info.step) for kept in Shelf(owned.path).kept()} == {(2, 4), (2, 8), (3, 4), (3, 8)}
    assert not left.exists()
    ring = SnapshotRing(owned.path)
    slot = next(info.slot for info in ring.held() if info.step == 8)
    assert ring.restore(slot).tensors[0].tolist() == [8.0] * 8
    ring.close()
    owned.close()
    assert list(tmp_path.iterdir()) == []


def test_what_belongs_to_a_rank_of_another_host_now_is_kept_as_a_copy_by_one_heir(tmp_path):
    leave(tmp_path, signed(rank=2), 8)
    first, taken = heir(tmp_path, signed(rank=1), Place(local_rank=1, local_world_size=2))
    assert taken == []
    second, taken = heir(tmp_path, signed(rank=0))
    assert taken == [2]
    assert layout.inspect(second.path) == []
    assert [(kept.owner, kept.info.step) for kept in Shelf(second.path).kept()] == [(2, 8)]
    first.close()
    second.close()


@pytest.mark.parametrize("rank", range(8))
@pytest.mark.parametrize("local", [1, 2, 4])
def test_every_directory_has_at_most_one_heir_on_a_host(rank, local):
    for first in range(0, 8, local):
        places = [Place(local_rank=number, local_world_size=local) for number in range(local)]
        heirs = [first + place.local_rank for place in places if place.is_heir(first + place.local_rank, rank)]
        assert len(heirs) == (1 if local > 1 or first == rank else 0)
        if first <= rank < first + local:
            assert heirs == [rank]


def test_another_job_takes_nothing_over(tmp_path):
    left = leave(tmp_path, signed(), 4)
    owned, taken = heir(tmp_path, signed(lineage="another"))
    assert taken == []
    assert layout.inspect(owned.path) == []
    assert left.exists()
    owned.close()


def test_what_another_number_of_ranks_left_is_removed(tmp_path):
    left = leave(tmp_path, signed(world_size=2), 4)
    owned, taken = heir(tmp_path, signed())
    assert taken == []
    assert not left.exists()
    owned.close()


def test_a_live_owner_is_waited_for_and_never_robbed(tmp_path, monkeypatch):
    monkeypatch.setattr("arc_dist.peers.adoption._PREDECESSOR_LIMIT_S", 0.2)
    live = OwnedDirectory(tmp_path, "live")
    StatusPage.create(live.path).close()
    signed().write(live.path)
    owned, taken = heir(tmp_path, signed())
    assert taken == []
    assert live.path.exists()
    live.close()
    owned.close()


def test_a_predecessor_that_is_still_dying_is_waited_for(tmp_path):
    left = leave(tmp_path, signed(), 4)
    script = "import fcntl, sys, time; f = open(sys.argv[1], 'r+'); fcntl.flock(f, 2); print('held', flush=True)"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{script}; sys.stdin.read()", str(left / "owner")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            _, taken = heir(tmp_path, signed())
            os.write(writer, json.dumps(taken).encode())
            os._exit(0)
        next_one = lambda: [path for path in directories.owned_directories(tmp_path) if "next" in path.name]  # noqa: E731
        while not next_one():
            time.sleep(0.01)
        holder.kill()
        os.waitpid(pid, 0)
    assert holder.returncode == -signal.SIGKILL
    assert json.loads(os.read(reader, 100)) == [0]


def test_a_directory_is_awaited_while_its_agent_lives_and_for_a_while_after(tmp_path, monkeypatch):
    ticks = start_ticks(os.getpid())
    assert ticks is not None
    with_agent = leave(tmp_path, signed(agent_pid=os.getpid(), agent_ticks=ticks), 4)
    without = leave(tmp_path, signed(agent_pid=os.getpid(), agent_ticks=ticks + 1), 4)
    assert collect_dead(tmp_path) == []
    monkeypatch.setattr(inheritance, "KEEP_S", 0.0)
    assert collect_dead(tmp_path) == [without]
    assert with_agent.exists()
    collect_of_agent(tmp_path)
    assert not with_agent.exists()


def test_a_signature_that_cannot_be_read_keeps_nothing(tmp_path):
    left = leave(tmp_path, signed(), 4)
    (left / "signature.json").write_text("{")
    assert collect_dead(tmp_path) == [left]


AGENT = {"TORCHELASTIC_RUN_ID": "job", "TORCHELASTIC_MAX_RESTARTS": "3"}


@pytest.mark.parametrize(
    ("environ", "returncode", "was_told", "is_left"),
    [
        ({**AGENT, "TORCHELASTIC_USE_AGENT_STORE": "True"}, 76, False, True),
        ({**AGENT, "TORCHELASTIC_USE_AGENT_STORE": "False"}, 76, False, True),  # as arcrun starts several nodes
        ({**AGENT, "TORCHELASTIC_RESTART_COUNT": "3"}, 76, False, False),
        ({**AGENT, "TORCHELASTIC_RESTART_COUNT": "3"}, 76, True, True),
        (AGENT, 0, False, False),
        (AGENT, 75, True, False),
        ({}, 76, False, False),
    ],
)
def test_memory_stays_for_a_launcher_that_starts_the_ranks_again(environ, returncode, was_told, is_left, tmp_path):
    membership = Membership.read(environ)
    with Estate(Env.read({"ARC_SHM_ROOT": str(tmp_path)}), membership) as estate:
        estate.claim("line", membership)
        estate.ends_with(returncode, was_told=was_told)
    assert estate.path.exists() == is_left
    if is_left:
        left = Signature.read(estate.path)
        assert left is not None and left.agent_pid == os.getppid()
