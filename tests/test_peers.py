"""Copies of snapshots between supervisors: only whole, only with the token, the newest whole one never touched."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from arc_dist.checkpoint_store.format import TensorSpec
from arc_dist.errors import StoreCorrupt
from arc_dist.peers import sender as sender_module
from arc_dist.peers.channel import BLOCK_BYTES, Channel, PeerUnavailable, connect
from arc_dist.peers.fetch import arrived, fetch, give_back, orders
from arc_dist.peers.image import Image
from arc_dist.peers.sender import CopySender, Partner
from arc_dist.peers.server import Job, PeerServer
from arc_dist.peers.service import Peers, PeerSettings
from arc_dist.peers.shelf import Goods, Shelf
from arc_dist.restore import from_memory
from arc_dist.snapshot import layout
from arc_dist.snapshot.form import Form
from arc_dist.snapshot.ring import SnapshotRing
from arc_dist.snapshot.slot import read_small_objects

TOKEN = "a-token-of-the-job"
TIMEOUT_S = 60.0


def job(rank: int = 0, **changes: Any) -> Job:
    return Job(**{"token": TOKEN, "lineage": "line", "rank": rank, "world_size": 4, **changes})


def state(numel: int, seed: int) -> tuple[list[TensorSpec], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(numel, generator=generator), torch.randn(7, generator=generator)]
    return [TensorSpec(f"t{i}", "float32", t.shape, t.shape, (0,), False) for i, t in enumerate(tensors)], tensors


class Rank:
    """A rank's directory, ring and listening service."""

    def __init__(
        self, root: Path, rank: int, *, numel: int = 1000, form: Form = Form.FULL, replica_key: int = 0, **changes: Any
    ) -> None:
        self.directory = root / f"r{rank}"
        self.directory.mkdir()
        self.rank = rank
        self.numel = numel
        self.ring = SnapshotRing(self.directory, form=form, replica_key=replica_key)
        self.shelves = {goods: Shelf(self.directory, goods) for goods in Goods}
        self.shelf = self.shelves[Goods.COPY]
        self.generation = 0
        self.server = PeerServer(
            job(rank, **changes),
            self.directory,
            self.shelves,
            "127.0.0.1",
            generation=lambda: self.generation,
            timeout_s=TIMEOUT_S,
        )
        self.partner = Partner(rank=rank, host="127.0.0.1", port=self.server.port)
        self.incidents: list[dict[str, Any]] = []
        self.specs, _ = state(numel, 0)

    def capture(self, step: int, *, generation: int = 0, seed: int | None = None, certified: bool = True) -> None:
        tensors = state(self.numel, step if seed is None else seed)[1]
        assert self.ring.capture(step, generation, self.specs, tensors, {"step": step}) is not None
        if certified:
            self.ring.certify(step)

    def sender(self, max_bytes_per_s: float | None = None, **changes: Any) -> CopySender:
        return CopySender(
            job(self.rank, **changes),
            self.directory,
            max_bytes_per_s=max_bytes_per_s,
            record=lambda **line: self.incidents.append(line),
            timeout_s=TIMEOUT_S,
        )

    def steps(self, owner: int) -> set[int]:
        return {kept.info.step for kept in self.shelf.kept() if kept.owner == owner}

    def close(self) -> None:
        self.server.close()
        self.ring.close()


@pytest.fixture
def ranks(shm_root: Path) -> Iterator[Any]:
    made: list[Rank] = []

    def make(rank: int, **changes: Any) -> Rank:
        made.append(Rank(shm_root, rank, **changes))
        return made[-1]

    yield make
    for rank in made:
        rank.close()


@pytest.fixture
def senders() -> Iterator[Any]:
    made: list[CopySender] = []

    def begin(owner: Rank, *partners: Partner, generation: int = 0, **changes: Any) -> CopySender:
        made.append(owner.sender(**changes))
        made[-1].begin(generation, partners)
        return made[-1]

    yield begin
    for sender in made:
        sender.close()


def eventually(condition: Any, what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.01)


def bring_back(owner: int, directory: Path, holder: Partner, step: int, generation: int = 0, **changes: Any) -> int:
    source = {"rank": owner, "generation": generation, "slot": 0, "holder": holder.rank}
    (order,) = orders(owner, directory, [holder], source, step)
    return fetch(job(owner, **changes), order, TIMEOUT_S, lambda sock: None)


@pytest.mark.parametrize("form", [Form.FULL, Form.INCREMENTAL])
def test_a_copy_comes_back_bit_for_bit(ranks, senders, form, shm_root):
    owner, holder = ranks(2, form=form, numel=5000), ranks(0)
    senders(owner, holder.partner)
    for step in (4, 8, 12):
        owner.capture(step, seed=1 if step < 12 else 2)  # steps 4 and 8 share a base, if there is one
        eventually(lambda s=step: s in holder.steps(2), f"the copy of step {step}")
    shutil.rmtree(owner.directory)
    new = shm_root / "new"
    new.mkdir()
    for step, seed in ((12, 2), (8, 1)):
        slot = bring_back(2, new, holder.partner, step)
        ring = SnapshotRing(new)
        specs, tensors, small = ring.restore(slot)
        assert specs == owner.specs
        for got, wanted in zip(tensors, state(5000, seed)[1], strict=True):
            assert torch.equal(got, wanted)
        assert small == {"step": step}
        assert [info.certified for info in ring.held() if info.step == step] == [True]
        ring.close()
    headers = [layout.read_header(path.read_bytes()[: layout.PAGE_BYTES]) for _, path in layout.slot_files(new)]
    assert [header is not None and header.base > 0 for header in headers] == [False, form is Form.INCREMENTAL]


def test_what_is_not_trusted_is_not_sent_and_two_are_kept(ranks, senders):
    owner, holder = ranks(2), ranks(0)
    senders(owner, holder.partner)
    for step in (4, 8, 12):
        owner.capture(step)
        eventually(lambda s=step: s in holder.steps(2), f"the copy of step {step}")
    assert holder.steps(2) == {8, 12}
    owner.capture(16, certified=False)
    eventually(lambda: 16 in {info.step for info in owner.ring.held()}, "the capture")
    time.sleep(3 * sender_module._LOOK_EVERY_S)  # several looks at a snapshot that is not to be sent
    assert holder.steps(2) == {8, 12}
    assert holder.steps(1) == set()


def test_a_rollback_takes_the_copies_back(ranks, senders):
    owner, holder = ranks(2), ranks(0)
    senders(owner, holder.partner)
    for step in (4, 8):
        owner.capture(step)
        eventually(lambda s=step: s in holder.steps(2), f"the copy of step {step}")
    owner.ring.drop_after(4)
    eventually(lambda: holder.steps(2) == {4}, "the copy of step 8 to be given up")


def test_a_slot_that_is_used_again_is_never_a_copy(ranks, senders):
    """Each capture overwrites what is being sent; in the end the newest arrives, and nothing torn ever does."""
    owner, holder = ranks(2, numel=4 * BLOCK_BYTES), ranks(0)
    sender = senders(owner, holder.partner, max_bytes_per_s=64 << 20)
    expected: dict[int, int] = {}
    for step in range(4, 44, 4):
        begun = sender.num_bytes
        owner.capture(step)
        expected[step] = step
        eventually(lambda b=begun: sender.num_bytes > b, "bytes of the next snapshot")
    eventually(lambda: 40 in holder.steps(2), "the newest copy")
    assert owner.incidents[0]["kind"] == "copy_late"
    assert "overwritten" in owner.incidents[0]["cause"]
    for kept in holder.shelf.kept():
        _, tensors, _ = SnapshotRing.open_peer(kept.directory, kept.info.slot)
        for got, wanted in zip(tensors, state(owner.numel, kept.info.step)[1], strict=True):
            assert torch.equal(got, wanted)


SENDER = """
import sys, time
sys.path.insert(0, sys.argv[4])
from pathlib import Path
from arc_dist.peers.sender import CopySender, Partner
from arc_dist.peers.server import Job
job = Job(token=sys.argv[3], lineage="line", rank=2, world_size=4)
sender = CopySender(job, Path(sys.argv[1]), max_bytes_per_s=4 << 20, record=print)
sender.begin(0, [Partner(rank=0, host="127.0.0.1", port=int(sys.argv[2]))])
while sender.num_bytes < 2 << 20:
    time.sleep(0.01)
print("half", flush=True)
time.sleep(600)
"""


def test_a_sender_that_is_killed_in_the_middle_leaves_the_copy_before_whole(ranks, senders):
    owner, holder = ranks(2, numel=4 * BLOCK_BYTES), ranks(0)
    first = senders(owner, holder.partner)
    owner.capture(4)
    eventually(lambda: holder.steps(2) == {4}, "the first copy")
    first.close()
    owner.capture(8)
    argv = [str(owner.directory), str(holder.partner.port), TOKEN, str(Path(__file__).parent.parent)]
    with subprocess.Popen([sys.executable, "-c", SENDER, *argv], stdout=subprocess.PIPE, text=True) as copier:
        assert copier.stdout is not None
        assert copier.stdout.readline() == "half\n"
        states = [layout.read_state(path.read_bytes()) for _, path in layout.slot_files(holder.directory / "peer-2")]
        copier.kill()
    assert (len(states), states.count(layout.SlotState.VALID)) == (2, 1)
    assert copier.returncode == -signal.SIGKILL
    assert holder.steps(2) == {4}
    senders(owner, holder.partner)  # the next one takes the torn slot, not the whole one
    eventually(lambda: holder.steps(2) == {4, 8}, "the second copy")


def test_the_rate_is_bounded_and_the_bytes_are_counted(ranks, senders):
    owner, holder = ranks(2, numel=2 * BLOCK_BYTES), ranks(0)
    rate = 16 << 20
    sender = senders(owner, holder.partner, max_bytes_per_s=rate)
    owner.capture(4)
    began = time.monotonic()
    eventually(lambda: holder.steps(2) == {4}, "the copy")
    seconds = time.monotonic() - began
    body = Image.open(owner.directory, 0).body
    assert sender.num_bytes == len(body)
    assert sender.num_bytes <= rate * seconds + BLOCK_BYTES  # the first block needs no wait
    eventually(lambda: sender.sent() == {0: 4}, "the answer")  # the copy is there before the sender hears so


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"token": "another"}, "token"), ({"lineage": "another"}, "job"), ({"world_size": 2}, "job")],
)
def test_strangers_are_refused(ranks, senders, changes, why, shm_root):
    owner, holder = ranks(2), ranks(0)
    senders(owner, holder.partner)
    owner.capture(4)
    eventually(lambda: holder.steps(2) == {4}, "the copy")
    new = shm_root / "new"
    new.mkdir()
    with pytest.raises(PeerUnavailable):
        bring_back(2, new, holder.partner, 4, **changes)
    assert layout.slot_files(new) == []
    owner.capture(8)
    stranger = owner.sender(**changes)
    stranger.begin(0, [holder.partner])
    eventually(lambda: owner.incidents, "the refusal")
    stranger.close()
    assert owner.incidents[0]["kind"] == "copy_late"


def test_a_message_without_the_right_proof_is_not_even_parsed(ranks):
    holder = ranks(0)
    sock, channel = connect("127.0.0.1", holder.partner.port, "another", timeout_s=TIMEOUT_S, peer="it")
    with sock:
        channel.send({"do": "get", "lineage": "line", "world_size": 4, "owner": 0, "step": 1, "generation": 0})
        with pytest.raises(PeerUnavailable, match="closed"):
            channel.receive()


def test_a_message_that_is_repeated_on_another_connection_is_refused():
    """What was overheard on one connection proves nothing on the next: each has a key of its own."""
    replies: list[Any] = []

    def serve(sock: socket.socket) -> None:
        try:
            replies.append(Channel(sock, TOKEN, serves=True, timeout_s=TIMEOUT_S, peer="client").receive())
        except PeerUnavailable as error:
            replies.append(error)

    overheard = b""
    for attempt in range(2):
        listening, client = _tcp_pair()
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        if attempt == 0:
            tap = _Tap(client)
            Channel(tap, TOKEN, serves=False, timeout_s=TIMEOUT_S, peer="server").send({"do": "drop"})
            overheard = tap.said
        else:
            client.sendall(overheard)
        thread.join(TIMEOUT_S)
        for each in (listening, client):
            each.close()
    assert replies[0] == {"do": "drop"}
    assert isinstance(replies[1], PeerUnavailable)
    assert "token" in str(replies[1])


class _Tap:
    """A socket that notes what is sent through it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.said = b""

    def sendall(self, data: Any) -> None:
        self.said += bytes(data)
        self._sock.sendall(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        listening, _ = server.accept()
    return listening, client


class Meddler:
    """Passes a connection on, and changes one byte of what goes to the server, or of what comes from it."""

    def __init__(self, port: int, at: int, *, to_server: bool) -> None:
        self._target, self._at, self._to_server = port, at, to_server
        self.is_done = False
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            client, _ = self._server.accept()
            server = socket.create_connection(("127.0.0.1", self._target))
            for source, target, meddles in ((client, server, self._to_server), (server, client, not self._to_server)):
                threading.Thread(target=self._pass_on, args=(source, target, meddles), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, meddles: bool) -> None:
        position = 0
        try:
            while data := bytearray(source.recv(1 << 16)):
                if meddles and position <= self._at < position + len(data) and not self.is_done:
                    data[self._at - position] ^= 1
                    self.is_done = True
                position += len(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            return  # one of them has gone


def test_an_altered_byte_on_the_way_to_the_holder_is_refused_and_sent_again(ranks, senders):
    owner, holder = ranks(2, numel=BLOCK_BYTES), ranks(0)
    meddler = Meddler(holder.partner.port, BLOCK_BYTES + 5000, to_server=True)
    senders(owner, Partner(rank=0, host="127.0.0.1", port=meddler.port))
    owner.capture(4)
    eventually(lambda: owner.incidents, "the refusal")
    assert meddler.is_done
    assert "altered" in owner.incidents[0]["cause"]
    eventually(lambda: holder.steps(2) == {4}, "the second attempt")


def test_an_altered_byte_on_the_way_back_is_refused(ranks, senders, shm_root):
    owner, holder = ranks(2, numel=BLOCK_BYTES), ranks(0)
    senders(owner, holder.partner)
    owner.capture(4)
    eventually(lambda: holder.steps(2) == {4}, "the copy")
    meddler = Meddler(holder.partner.port, BLOCK_BYTES + 5000, to_server=False)
    new = shm_root / "new"
    new.mkdir()
    with pytest.raises(StoreCorrupt, match="altered"):
        bring_back(2, new, Partner(rank=0, host="127.0.0.1", port=meddler.port), 4)
    assert meddler.is_done
    assert layout.inspect(new) == []


def test_a_bit_that_flips_in_the_holders_memory_is_found(ranks, senders, shm_root):
    owner, holder = ranks(2), ranks(0)
    senders(owner, holder.partner)
    owner.capture(4)
    eventually(lambda: holder.steps(2) == {4}, "the copy")
    kept = holder.shelf.find(2, 4, 0)
    assert kept is not None
    with layout.slot_path(kept.directory, kept.info.slot).open("r+b") as file:
        file.seek(layout.PAGE_BYTES + 100)
        byte = file.read(1)
        file.seek(layout.PAGE_BYTES + 100)
        file.write(bytes([byte[0] ^ 4]))
    new = shm_root / "new"
    new.mkdir()
    with pytest.raises(StoreCorrupt, match="altered"):
        bring_back(2, new, holder.partner, 4)
    assert layout.inspect(new) == []


def test_an_older_generation_is_fenced(ranks, senders):
    owner, holder = ranks(2), ranks(0)
    holder.generation = 5
    senders(owner, holder.partner, generation=4)
    owner.capture(4)
    eventually(lambda: owner.incidents, "the refusal")
    assert "fenced" in owner.incidents[0]["cause"]
    assert holder.steps(2) == set()


def test_a_holder_that_is_gone_is_said_and_not_waited_for(ranks, shm_root):
    owner, holder = ranks(2), ranks(0)
    settings = PeerSettings(copies=1, distance=1, domain="a", max_bytes_per_s=None)
    peers = Peers(job(2), settings, owner.directory, host="127.0.0.1", listen="127.0.0.1", record=lambda **line: None)
    plan = {"step": 4, "sources": {"2": {"rank": 2, "slot": 0, "shm_dir": "", "holder": 0, "generation": 0}}}
    holder.server.close()
    fetching = peers.start_fetch(plan, [{"rank": 0, "host": "127.0.0.1", "port": holder.partner.port}])
    assert fetching is not None
    eventually(lambda: fetching.is_over, "the end of the fetch")
    assert fetching.source is None
    assert "cannot be reached" in fetching.error
    assert peers.introduction()["distrusted"] == [0]
    peers.close()


def test_copies_of_ranks_that_others_keep_now_are_removed(ranks, senders):
    owner, holder = ranks(2), ranks(0)
    senders(owner, holder.partner)
    owner.capture(4)
    eventually(lambda: holder.steps(2) == {4}, "the copy")
    holder.shelf.retain([2])
    assert holder.steps(2) == {4}
    holder.shelf.retain([3])
    assert not (holder.directory / "peer-2").exists()


def test_a_note_is_the_small_part_of_a_snapshot_and_is_never_listed_as_one(ranks, senders, shm_root):
    owner, keeper = ranks(2, replica_key=9), ranks(0)
    sender = owner.sender()
    sender.begin(0, [], [keeper.partner])
    owner.capture(4)
    eventually(keeper.shelves[Goods.NOTE].kept, "the note")
    sender.close()
    (kept,) = keeper.shelves[Goods.NOTE].kept()
    assert (kept.owner, kept.info.step, kept.info.replica_key, kept.info.nbytes) == (2, 4, 9, 0)
    assert read_small_objects(kept.directory, kept.info.slot) == {"step": 4}
    assert layout.slot_path(kept.directory, kept.info.slot).stat().st_size <= 2 * layout.PAGE_BYTES
    assert keeper.steps(2) == set()
    assert layout.inspect(keeper.directory) == []


def test_snapshots_without_a_key_have_no_notes(ranks):
    owner, keeper = ranks(2), ranks(0)
    sender = owner.sender()
    sender.begin(0, [keeper.partner], [keeper.partner])
    owner.capture(4)
    eventually(lambda: keeper.steps(2) == {4}, "the copy, which goes after the note")
    assert keeper.shelves[Goods.NOTE].kept() == []
    sender.close()


def test_a_replicas_own_snapshot_and_a_note_are_put_beside_what_is_a_ranks_own(ranks, shm_root):
    replica, keeper, owner = ranks(1, replica_key=9, numel=5000), ranks(0), ranks(3, replica_key=9, numel=5000)
    for rank in (replica, owner):
        rank.capture(4, seed=1)
    sender = owner.sender()
    sender.begin(0, [], [keeper.partner])
    eventually(keeper.shelves[Goods.NOTE].kept, "the note")
    sender.close()
    new = shm_root / "new"
    new.mkdir()
    source = {"rank": 1, "slot": 0, "holder": 1, "generation": 0, "noted_by": 0, "noted_in": 0, "shm_dir": "there"}
    wanted = orders(3, new, [replica.partner, keeper.partner], source, 4)
    slots = {order.goods: (order.directory, fetch(job(3), order, TIMEOUT_S, lambda sock: None)) for order in wanted}
    found = arrived(source, slots)
    snapshot = from_memory({"step": 4, "sources": {"3": found}}, 3, new, own=lambda slot: pytest.fail("not its own"))
    assert snapshot.small == {"step": 4}
    for tensor, expected in zip(snapshot.tensors, state(5000, 1)[1], strict=True):
        assert torch.equal(tensor, expected)
    assert layout.inspect(new) == []
    give_back(new)
    assert list(new.iterdir()) == []
    assert torch.equal(snapshot.tensors[0], state(5000, 1)[1][0]), "what is open stays"


def test_a_replica_gives_only_what_it_trusts_and_only_its_own(ranks, shm_root):
    replica = ranks(1)
    replica.capture(4, certified=False)
    for owner, step in ((1, 4), (1, 8), (2, 4)):
        source = {"rank": owner, "slot": 0, "holder": 1, "generation": 0, "shm_dir": ""}
        (order,) = orders(3, shm_root, [replica.partner], source, step)
        with pytest.raises(PeerUnavailable, match="no copy"):
            fetch(job(3), order, TIMEOUT_S, lambda sock: None)
