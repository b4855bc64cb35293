"""The ring: which slot is replaced, what survives a kill in the middle of a write, who can read it, where it lies."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from arc_dist.checkpoint_store.format import TensorSpec
from arc_dist.errors import ConfigError
from arc_dist.snapshot import layout
from arc_dist.snapshot.layout import SlotDamaged, SlotInfo, SlotState
from arc_dist.snapshot.ring import SnapshotRing, choose_slot
from arc_dist.snapshot.state import TrainingState
from ranks import run_ranks

State = tuple[list[TensorSpec], list[torch.Tensor]]


def content(step: int, numel: int = 1000) -> State:
    """Tensors that are a function of the step: no two steps agree in any of them."""
    generator = torch.Generator().manual_seed(step)
    tensors = [
        torch.randint(-(1 << 31), (1 << 31) - 1, (numel,), generator=generator, dtype=torch.int32),
        torch.full((numel, 2), step, dtype=torch.float64),
        torch.tensor(step),
        torch.empty(0, 3),
    ]
    return [TensorSpec.whole(f"model.t{index}", tensor) for index, tensor in enumerate(tensors)], tensors


def capture(ring: SnapshotRing, step: int, numel: int = 1000, **kwargs: Any) -> int | None:
    return ring.capture(step, 0, *content(step, numel), {"step": step}, **kwargs)


def assert_holds(snapshot: Any, step: int, numel: int = 1000) -> None:
    specs, tensors, small = snapshot
    expected_specs, expected = content(step, numel)
    assert small == {"step": step}
    assert specs == expected_specs
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


def steps(ring: SnapshotRing) -> dict[int, int]:
    return {info.slot: info.step for info in ring.held()}


@pytest.fixture
def ring(tmp_path: Path) -> Iterator[SnapshotRing]:
    ring = SnapshotRing(tmp_path / "ring")
    yield ring
    ring.close()


# --- which slot ---

infos = st.one_of(
    st.none(),
    st.builds(
        SlotInfo,
        slot=st.just(0),
        step=st.integers(0, 5),
        generation=st.just(0),
        certified=st.booleans(),
        nbytes=st.just(0),
        parting=st.booleans(),
        sequence=st.integers(0, 9),
    ),
)


@given(st.lists(infos, min_size=2, max_size=4), st.sets(st.integers(0, 3)), st.integers(0, 5))
def test_the_only_certified_and_the_pinned_are_never_chosen(
    held: list[SlotInfo | None], pinned: set[int], step: int
) -> None:
    slots = dict(enumerate(held))
    chosen, reason = choose_slot(slots, pinned, step)
    certified = [number for number, info in slots.items() if info is not None and info.certified]
    allowed = [number for number in slots if number not in pinned and certified != [number]]
    assert (chosen is None) == (not allowed)
    assert reason
    if chosen is None:
        return
    assert chosen in allowed
    mine = slots[chosen]
    if mine is not None:
        assert all(slots[number] is not None for number in allowed), "an empty slot was there"
        others = [info for number in allowed if (info := slots[number]) is not None]
        assert mine.step == step or all(info.step >= mine.step for info in others)


def test_with_two_slots_the_certified_one_stays_until_its_successor_is_certified(ring: SnapshotRing) -> None:
    assert [capture(ring, 1), capture(ring, 2), capture(ring, 3)] == [0, 1, 0]
    assert ring.certify(2) == 1
    assert [capture(ring, 4), capture(ring, 5), capture(ring, 6)] == [0, 0, 0]
    assert steps(ring) == {0: 6, 1: 2}
    assert ring.certify(6) == 0
    assert capture(ring, 7) == 1
    assert ring.certify(5) is None
    assert [(info.step, info.certified) for info in ring.held()] == [(6, True), (7, False)]
    assert_holds(ring.restore(0), 6)
    assert_holds(ring.restore(1), 7)


def test_a_pinned_slot_is_left_alone_and_the_other_reused(ring: SnapshotRing) -> None:
    capture(ring, 1)
    capture(ring, 2)
    ring.pin(0)
    ring.pin(0)
    assert [capture(ring, 3), capture(ring, 4)] == [1, 1]
    ring.unpin(0)
    assert capture(ring, 5) == 1
    ring.certify(5)
    assert capture(ring, 6) is None
    assert ring.refusal is not None
    assert "[0] are being read" in ring.refusal
    assert "[1] holds the only certified" in ring.refusal
    assert steps(ring) == {0: 1, 1: 5}
    assert_holds(ring.restore(0), 1)
    ring.unpin(0)
    assert capture(ring, 7) == 0
    assert ring.refusal is None


def test_a_pinned_certified_slot_lets_the_other_be_reused(ring: SnapshotRing) -> None:
    """The writer streams the certified one to the store while snapshots go on."""
    capture(ring, 1)
    ring.certify(1)
    ring.pin(0)
    assert [capture(ring, step) for step in (2, 3, 4)] == [1, 1, 1]
    assert_holds(ring.restore(0), 1)


def test_an_abandoned_timeline_is_given_up(ring: SnapshotRing) -> None:
    capture(ring, 5)
    ring.certify(5)
    capture(ring, 8)
    assert ring.drop_after(5) == [1]
    assert steps(ring) == {0: 5}
    assert capture(ring, 6) == 1
    ring.drop(1)
    assert steps(ring) == {0: 5}
    with pytest.raises(ConfigError, match="holds no valid snapshot"):
        ring.restore(1)
    with pytest.raises(ConfigError, match="holds no valid snapshot"):
        ring.tensors(7)


def test_the_newer_of_two_snapshots_of_a_step_is_certified(ring: SnapshotRing) -> None:
    capture(ring, 3)
    ring.certify(3)
    assert capture(ring, 3) == 1
    assert ring.certify(3) == 1
    assert [info.sequence for info in ring.held()] == [1, 2]


def test_what_is_not_what_its_spec_says_is_refused(ring: SnapshotRing) -> None:
    specs, tensors = content(1)
    for wrong in (tensors[0].float(), tensors[0][:10]):
        with pytest.raises(ConfigError, match="differ from their specs"):
            ring.capture(1, 0, specs, [wrong, *tensors[1:]], {})
    with pytest.raises(ConfigError, match="small"):
        ring.capture(1, 0, specs, tensors, {"small": object()})
    assert ring.held() == []
    with pytest.raises(ConfigError, match="at least 2"):
        SnapshotRing(slots=1)


def test_slots_grow_with_the_state_and_old_views_stay_readable(ring: SnapshotRing) -> None:
    capture(ring, 1, 10)
    view = ring.restore(0).tensors
    capture(ring, 2, 10)
    capture(ring, 3, 300_000)
    capture(ring, 4, 300_000)
    assert_holds(ring.restore(0), 3, 300_000)
    assert_holds(ring.restore(1), 4, 300_000)
    assert view[0].shape == (10,)
    capture(ring, 5, 20)  # and smaller again
    assert_holds(ring.restore(0), 5, 20)
    assert ring.held()[0].nbytes == 20 * 4 + 20 * 16 + 8


def test_a_closed_ring_holds_nothing_and_makes_nothing(shm_root: Path) -> None:
    ring = SnapshotRing(root=shm_root)
    capture(ring, 1)
    (directory,) = shm_root.glob("arc-dist-*-ring-*")
    assert layout.inspect(directory)[0].step == 1
    ring.close()
    assert not directory.exists()
    assert ring.held() == []
    assert capture(ring, 2) is None
    assert ring.refusal == "the ring is closed"


# --- other processes ---


def test_another_process_restores_what_this_one_captured(ring: SnapshotRing, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state, step = make_training()
    for _ in range(3):
        step()
    ring.capture(3, 1, *state.tensors(), state.small())
    digest = state.digest()
    step()
    (digests,) = run_ranks(1, _restore_elsewhere, str(tmp_path / "ring"), init=False)
    assert digests == [digest, digest, state.digest()]


def _restore_elsewhere(rank: int, world_size: int, directory: str) -> list[str]:
    state, step = make_training()
    state.restore(*SnapshotRing.open_peer(directory, 0))
    digests = [state.digest()]
    own = SnapshotRing(directory)  # and as its successor, which adopts the directory
    step()
    state.restore(*own.restore(0))
    assert own.held()[0].generation == 1
    digests.append(state.digest())
    step()
    return [*digests, state.digest()]


def make_training() -> tuple[TrainingState, Any]:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()

    return TrainingState({"m": model}, {"o": optimizer}), step


def test_a_peers_snapshot_cannot_be_changed_and_its_overwriting_is_noticed(ring: SnapshotRing, tmp_path: Path) -> None:
    capture(ring, 1)
    peer = SnapshotRing.open_peer(tmp_path / "ring", 0)
    assert_holds(peer, 1)
    peer.check()
    peer.tensors[0].zero_()  # in private memory
    assert_holds(ring.restore(0), 1)
    capture(ring, 2)
    peer.check()
    capture(ring, 3)
    with pytest.raises(SlotDamaged, match="step 1 was overwritten"):
        peer.check()
    with pytest.raises(ConfigError, match="no valid snapshot"):
        SnapshotRing.open_peer(tmp_path / "ring", 5)
    ring.drop(1)
    with pytest.raises(ConfigError, match="no valid snapshot"):
        SnapshotRing.open_peer(tmp_path / "ring", 1)


def test_a_parting_snapshot_says_so(ring: SnapshotRing, tmp_path: Path) -> None:
    capture(ring, 4, parting=True)
    (info,) = layout.inspect(tmp_path / "ring")
    assert (info.parting, info.certified, info.replicated) == (True, False, True)


# --- torn writes ---

_NUMEL = 400_000
_KILLS = 20


def _capture_for_ever(directory: Path) -> None:
    ring = SnapshotRing(directory)
    step = max((info.step for info in ring.held()), default=0)
    # Prepared before: nearly all of the time goes into writing.
    prepared = [content(step + 1 + index, _NUMEL) for index in range(6)]
    while True:
        for specs, tensors in prepared:
            step = int(tensors[2])
            ring.capture(step, 0, specs, tensors, {"step": step})
            ring.certify(step)


def test_a_kill_in_the_middle_of_a_write_leaves_the_other_slot_and_no_torn_one(shm_root: Path) -> None:
    directory = shm_root / "torn"
    chance = random.Random(1)
    torn = 0
    for kill in range(_KILLS * 3):
        if kill >= _KILLS and torn:
            break
        pid = os.fork()
        if pid == 0:
            try:
                _capture_for_ever(directory)
            finally:
                os._exit(1)
        deadline = time.monotonic() + 20
        before = {info.sequence for info in layout.inspect(directory)}
        while len({info.sequence for info in layout.inspect(directory)} - before) < 1 and time.monotonic() < deadline:
            pass
        time.sleep(chance.uniform(0.0, 0.02))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "the writer ended by itself"
        pages = [path.read_bytes()[: layout.PAGE_BYTES] for _, path in layout.slot_files(directory)]
        states = [layout.read_state(page) for page in pages]
        torn += SlotState.WRITING in states
        listed = layout.inspect(directory)
        assert listed, f"kill {kill}: no snapshot was left, states {states}"
        assert len(listed) == states.count(SlotState.VALID)
        for info in listed:
            assert_holds(SnapshotRing.open_peer(directory, info.slot), info.step, _NUMEL)
    assert torn, "no kill hit a write, so nothing was tested"
    shutil.rmtree(directory)  # other tests look at what is left in shared memory


# --- memory that is not there ---


@pytest.fixture
def tiny_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A memory file system with room for 2 MB."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a file system")
    libc = ctypes.CDLL(None, use_errno=True)
    target = tmp_path / "tmpfs"
    target.mkdir()
    if libc.mount(b"tmpfs", bytes(target), b"tmpfs", 0, b"size=2m") != 0:
        pytest.skip(f"needs root with the right to mount: {os.strerror(ctypes.get_errno())}")
    assert f" {target} tmpfs " in Path("/proc/mounts").read_text()
    assert os.statvfs(target).f_blocks * os.statvfs(target).f_frsize == 2 << 20
    yield target
    libc.umount2(bytes(target), 2)


def test_too_little_memory_sends_slots_to_the_temporary_directory_with_a_warning(
    tiny_tmpfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    monkeypatch.setenv("ARC_SHM_ROOT", str(tiny_tmpfs))
    ring = SnapshotRing()
    assert capture(ring, 1, 10_000) == 0
    assert not caplog.records
    assert [capture(ring, 2, 200_000), capture(ring, 3, 200_000)] == [1, 0]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "ARC_SHM_ROOT" in caplog.text
    assert_holds(ring.restore(0), 3, 200_000)
    (directory,) = tiny_tmpfs.iterdir()
    assert [(info.slot, info.step) for info in layout.inspect(directory)] == [(0, 3), (1, 2)]
    assert_holds(SnapshotRing.open_peer(directory, 1), 2, 200_000)
    # A successor goes on with the same files, and a smaller state comes back to them as well.
    assert steps(SnapshotRing(directory)) == {0: 3, 1: 2}
    assert capture(ring, 4, 200_000) == 1
    assert len(list(disk.iterdir())) == 2
    ring.close()
    assert list(disk.iterdir()) == []
    assert list(tiny_tmpfs.iterdir()) == []


def test_no_room_anywhere_is_said_and_training_goes_on(
    tiny_tmpfs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tiny_tmpfs))
    ring = SnapshotRing(root=tiny_tmpfs)
    assert capture(ring, 1, 10) == 0
    assert capture(ring, 2, 300_000) is None
    assert ring.refusal is not None
    assert ring.refusal.startswith("no room for 6.0 MB")
    assert caplog.records[-1].levelname == "ERROR"
    assert steps(ring) == {0: 1}
    assert_holds(ring.restore(0), 1, 10)
    assert capture(ring, 3, 10) == 1
    ring.close()
    assert list(tiny_tmpfs.iterdir()) == []


def test_a_root_that_does_not_exist_is_replaced_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ring = SnapshotRing(root=tmp_path / "missing")
    assert capture(ring, 1) == 0
    assert "cannot be used for snapshots" in caplog.text
    ring.close()
    assert list(tmp_path.iterdir()) == []
