"""Forms of snapshots: each gives back what was captured, within its bound of memory, and the choice among them."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from arc_dist import Arc
from arc_dist.checkpoint_store.format import TensorSpec
from arc_dist.config import Env
from arc_dist.errors import ConfigError
from arc_dist.healing.vote import Voter
from arc_dist.memory import expected_bytes, open_ring
from arc_dist.settings import Settings
from arc_dist.snapshot import form as form_module
from arc_dist.snapshot import layout
from arc_dist.snapshot.form import Form, Room, choose_form
from arc_dist.snapshot.incremental import choose_members, same_bytes
from arc_dist.snapshot.layout import SlotDamaged, SlotState
from arc_dist.snapshot.ring import SnapshotRing
from arc_dist.snapshot.state import TrainingState

pytestmark = pytest.mark.disk  # which one of the forms is for

NUMEL = 20_000
NUM_TENSORS = 6
STATE_BYTES = NUMEL * 4 * NUM_TENSORS
OVERHEAD_BYTES = 600_000  # per slot: header, table, room for small objects


def state_of(versions: tuple[int, ...], numel: int = NUMEL) -> tuple[list[TensorSpec], list[torch.Tensor]]:
    """Tensors that are a function of their index and version."""
    tensors = [
        torch.arange(numel, dtype=torch.int32).add_(1000 * version + index) for index, version in enumerate(versions)
    ]
    return [TensorSpec.whole(f"model.t{index}", tensor) for index, tensor in enumerate(tensors)], tensors


def assert_holds(snapshot: Any, versions: tuple[int, ...], numel: int = NUMEL) -> None:
    specs, tensors, small = snapshot
    expected_specs, expected = state_of(versions, numel)
    assert small == {"versions": list(versions)}
    assert specs == expected_specs
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


def bytes_held(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir() if path.suffix == ".bin")


def capture(ring: SnapshotRing, step: int, versions: tuple[int, ...], numel: int = NUMEL) -> int | None:
    return ring.capture(step, 0, *state_of(versions, numel), {"versions": list(versions)})


# --- incremental: any history ---

changes = st.sets(st.integers(0, NUM_TENSORS - 1))
histories = st.lists(
    st.tuples(changes, st.sampled_from(["certify", "leave", "back", "restart", "pin"])), min_size=1, max_size=12
)


@settings(max_examples=25, deadline=None)
@given(histories, st.integers(2, 3))
def test_each_slot_gives_back_what_was_captured_whatever_changed(
    history: list[tuple[set[int], str]], num_slots: int
) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        directory = Path(name)
        ring = SnapshotRing(directory, slots=num_slots, form=Form.INCREMENTAL)
        taken: dict[int, tuple[int, ...]] = {}
        versions = (0,) * NUM_TENSORS
        pinned: list[tuple[int, Any, tuple[int, ...]]] = []
        for step, (changed, then) in enumerate(history):
            # A version may come back (index % 3), so bases meet tensors that return to what they were.
            versions = tuple((v + 1) % 3 if index in changed else v for index, v in enumerate(versions))
            slot = capture(ring, step, versions)
            if slot is not None:
                taken[step] = versions
            if then == "certify":
                ring.certify(step)
            elif then == "back":
                ring.drop_after(max(0, step - 1))
            elif then == "restart":
                ring.close()
                pinned.clear()
                ring = SnapshotRing(directory, slots=num_slots, form=Form.INCREMENTAL)
            elif then == "pin" and slot is not None and not pinned:
                ring.pin(slot)
                pinned.append((slot, ring.restore(slot), versions))
            held = ring.held()
            assert held == layout.inspect(directory)
            for info in held:
                assert_holds(ring.restore(info.slot), taken[info.step])
                assert_holds(SnapshotRing.open_peer(directory, info.slot), taken[info.step])
                assert info.nbytes == STATE_BYTES
            for _, snapshot, then_versions in pinned:  # streamed to the store meanwhile, maybe given up
                assert_holds(snapshot, then_versions)
            assert bytes_held(directory) <= num_slots * (STATE_BYTES * 9 // 8 + OVERHEAD_BYTES)
        ring.close()


def test_what_does_not_change_is_held_once_and_leaves_the_base_when_it_does(tmp_path: Path) -> None:
    ring = SnapshotRing(tmp_path, form=Form.INCREMENTAL)

    def train(step: int, versions: tuple[int, ...]) -> int:
        capture(ring, step, versions)
        ring.certify(step)
        return bytes_held(tmp_path)

    assert train(1, (0, 0, 0, 0, 0, 1)) >= STATE_BYTES
    assert layout.base_files(tmp_path) == []
    train(2, (0, 0, 0, 0, 0, 2))
    held = train(3, (0, 0, 0, 0, 0, 3))
    shared = NUMEL * 4 * (NUM_TENSORS - 1)
    assert shared < held <= shared + 2 * (NUMEL * 4 + OVERHEAD_BYTES)
    assert [number for number, _ in layout.base_files(tmp_path)] == [1]
    before = layout.base_path(tmp_path, 1).read_bytes()
    # Three of the shared tensors begin to change: a new base, and the old one while a slot names it.
    train(4, (0, 0, 4, 4, 4, 4))
    assert [number for number, _ in layout.base_files(tmp_path)] == [1, 2]
    assert layout.base_path(tmp_path, 1).read_bytes() == before
    train(5, (0, 0, 5, 5, 5, 5))
    assert [number for number, _ in layout.base_files(tmp_path)] == [2]
    for info in ring.held():
        version = info.step
        assert_holds(ring.restore(info.slot), (0, 0, version, version, version, version))
    # Nothing is shared any more: no base is left, and no more is held than in full.
    train(6, (6,) * NUM_TENSORS)
    held = train(7, (7,) * NUM_TENSORS)
    assert layout.base_files(tmp_path) == []
    assert held <= 2 * (STATE_BYTES + OVERHEAD_BYTES)
    ring.close()


def test_bytes_decide_and_not_values() -> None:
    zero, nan = torch.tensor([0.0]), torch.tensor([float("nan")])
    assert not same_bytes(zero, -zero)
    assert same_bytes(nan, nan.clone())
    assert same_bytes(torch.ones(2, 3).t(), torch.ones(3, 2))
    assert not same_bytes(torch.arange(6).view(2, 3).t(), torch.arange(6).view(3, 2))
    assert same_bytes(torch.tensor([1 - 2j]).conj(), torch.tensor([1 + 2j]))
    assert not same_bytes(torch.ones(2), torch.ones(2, dtype=torch.bfloat16))


def test_a_snapshot_is_not_listed_without_its_base(tmp_path: Path) -> None:
    ring = SnapshotRing(tmp_path, form=Form.INCREMENTAL)
    capture(ring, 1, (0, 0, 0, 0, 0, 1))
    capture(ring, 2, (0, 0, 0, 0, 0, 2))
    ring.close()
    assert [info.step for info in layout.inspect(tmp_path)] == [1, 2]
    base = layout.base_path(tmp_path, 1)
    data = base.read_bytes()
    for damaged in (data[:-1], None):
        base.unlink() if damaged is None else base.write_bytes(damaged)
        assert [info.step for info in layout.inspect(tmp_path)] == [1]
        with pytest.raises(SlotDamaged, match=r"base-1\.bin"):
            SnapshotRing.open_peer(tmp_path, 1)
        with pytest.raises(SlotDamaged, match=r"base-1\.bin"):
            SnapshotRing(tmp_path).restore(1)
    # A ring that finds this goes on, and the next capture needs nothing of it.
    ring = SnapshotRing(tmp_path, form=Form.INCREMENTAL)
    for step in (3, 4):
        slot = capture(ring, step, (0, 0, 0, 0, 0, step))
        assert slot is not None
        assert_holds(ring.restore(slot), (0, 0, 0, 0, 0, step))
    ring.close()


sizes = st.lists(st.integers(0, 50_000), min_size=1, max_size=8)


@given(sizes, st.data())
def test_members_are_shared_and_a_new_base_is_made_only_when_it_pays(nbytes: list[int], data: st.DataObject) -> None:
    indices = st.sampled_from(range(len(nbytes)))
    same = data.draw(st.sets(indices))
    present = data.draw(st.sets(st.sampled_from(sorted(same)))) if same else set()
    base_bytes = sum(nbytes[index] for index in present) + data.draw(st.integers(0, 50_000))
    chosen = choose_members(nbytes, present, base_bytes, same)
    if chosen.is_new:
        assert set(chosen.members) == same
    else:
        assert set(chosen.members) == present
        waste = base_bytes + sum(nbytes[i] for i in same) - 2 * sum(nbytes[i] for i in present)
        assert waste <= max(base_bytes / 8, layout.PAGE_BYTES)


# --- incremental: torn writes ---

_KILL_NUMEL = 100_000


def _versions(step: int) -> tuple[int, ...]:
    """Phases of 4 steps, in each of which other tensors change: bases are made, kept and removed all the time."""
    phase = step // 4
    return tuple(step if (index + phase) % 3 == 0 else 10_000 + phase for index in range(NUM_TENSORS))


def _capture_for_ever(directory: Path) -> None:
    ring = SnapshotRing(directory, form=Form.INCREMENTAL)
    step = max((info.step for info in ring.held()), default=0)
    while True:
        step += 1
        capture(ring, step, _versions(step), _KILL_NUMEL)
        ring.certify(step)


def kill_captures(directory: Path, kills: int, seed: int) -> tuple[int, int]:
    """Kills a capturing process again and again; returns how many kills left a torn slot, and an unnamed base."""
    chance = random.Random(seed)
    torn = unnamed = 0
    for kill in range(kills):
        pid = os.fork()
        if pid == 0:
            try:
                _capture_for_ever(directory)
            finally:
                os._exit(1)
        deadline = time.monotonic() + 20
        before = max((info.sequence for info in layout.inspect(directory)), default=0)
        while max((i.sequence for i in layout.inspect(directory)), default=0) <= before:
            assert time.monotonic() < deadline, "the writer captures nothing"
        time.sleep(chance.uniform(0.0, 0.02))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "the writer ended by itself"
        pages = [path.read_bytes()[: layout.PAGE_BYTES] for _, path in layout.slot_files(directory)]
        states = [layout.read_state(page) for page in pages]
        listed = layout.inspect(directory)
        assert listed, f"kill {kill}: no snapshot was left, states {states}"
        assert len(listed) == states.count(SlotState.VALID), "a valid slot without its base"
        for info in listed:
            assert_holds(SnapshotRing.open_peer(directory, info.slot), _versions(info.step), _KILL_NUMEL)
        named = {header.base for page in pages if (header := layout.read_header(page)) is not None}
        torn += len(listed) < 2
        unnamed += bool({number for number, _ in layout.base_files(directory)} - named)
    return torn, unnamed


def test_a_kill_in_the_middle_of_an_incremental_capture_mixes_no_states(shm_root: Path) -> None:
    torn, _ = kill_captures(shm_root / "torn", 8, seed=1)
    assert torn, "no kill hit a write, so nothing was tested"
    shutil.rmtree(shm_root / "torn")


@pytest.mark.soak
def test_hundreds_of_kills_in_the_middle_of_incremental_captures_mix_no_states(shm_root: Path) -> None:
    torn, unnamed = kill_captures(shm_root / "torn", 400, seed=2)
    assert torn > 50, "too few kills hit a write"
    assert unnamed > 5, "too few kills hit the making of a base"
    shutil.rmtree(shm_root / "torn")


# --- rounded weights ---


def make_training() -> tuple[TrainingState, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.Linear(128, 2))
    model.register_buffer("table", torch.randn(3))
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(5, 64)).square().mean().backward()
        optimizer.step()

    return TrainingState({"m": model}, {"o": optimizer}), step


def test_bf16_rounds_parameters_and_nothing_else(tmp_path: Path) -> None:
    state, step = make_training()
    step()
    ring = SnapshotRing(tmp_path, form=Form.BF16, rounds=state.is_parameter)
    ring.capture(1, 0, *state.tensors(), state.small())
    before = {spec.name: tensor.clone() for spec, tensor in zip(*state.tensors(), strict=True)}
    rng = torch.get_rng_state()
    step()
    state.restore(*ring.restore(0))
    after = dict(zip((spec.name for spec in state.tensors()[0]), state.tensors()[1], strict=True))
    assert not torch.equal(before["model.0.weight"], after["model.0.weight"]), "nothing had to be rounded"
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        if state.is_parameter(name):
            assert torch.equal(after[name], value.bfloat16().float())
            assert ((after[name] - value).abs() <= value.abs() * 2**-8).all()
        else:
            assert torch.equal(after[name], value)
    assert torch.equal(torch.get_rng_state(), rng)
    (info,) = ring.held()
    peer = SnapshotRing.open_peer(tmp_path, 0)
    own = ring.restore(0)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(peer.tensors, own.tensors, strict=True))
    # The bytes that a "full" snapshot would hold, less two per element of the parameters.
    numel = sum(value.numel() for name, value in before.items() if state.is_parameter(name))
    header = layout.read_header(layout.slot_path(tmp_path, 0).read_bytes())
    assert header is not None
    held = sum(
        entry.nbytes for entry in layout.read_table(memoryview(layout.slot_path(tmp_path, 0).read_bytes()), header)
    )
    assert held == info.nbytes - 2 * numel
    ring.close()


def test_16_bit_and_integer_parameters_are_not_rounded(tmp_path: Path) -> None:
    tensors = [
        torch.tensor([1 / 3], dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.complex64)
    ]
    specs = [TensorSpec.whole(f"model.{tensor.dtype}", tensor) for tensor in tensors]
    ring = SnapshotRing(tmp_path, form=Form.BF16, rounds=lambda name: True)
    ring.capture(1, 0, specs, tensors, {})
    held = ring.restore(0).tensors
    assert [tensor.dtype for tensor in held] == [torch.float16, torch.bfloat16, torch.bfloat16, torch.complex64]
    assert [torch.equal(a, b) for a, b in zip(held, tensors, strict=True)] == [True, True, False, True]
    ring.close()


# --- on disk ---


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "disk"
    path.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(path))
    return path


def test_disk_slots_lie_in_the_temporary_directory_from_the_start_and_are_found(
    disk: Path, shm_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ring = SnapshotRing(root=shm_root, form=Form.DISK)
    for step in (1, 2, 3):
        capture(ring, step, (step,) * NUM_TENSORS)
    (directory,) = shm_root.glob("arc-dist-*-ring-*")
    links = [path for _, path in layout.slot_files(directory)]
    assert len(links) == 2
    assert all(path.is_symlink() and disk in path.resolve().parents for path in links)
    assert not caplog.records
    assert [(info.slot, info.step) for info in layout.inspect(directory)] == [(0, 3), (1, 2)]
    assert_holds(SnapshotRing.open_peer(directory, 0), (3,) * NUM_TENSORS)
    ring.close()
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("after", [Form.FULL, Form.DISK, Form.INCREMENTAL])
@pytest.mark.parametrize("before", [Form.FULL, Form.DISK, Form.INCREMENTAL])
def test_a_successor_with_another_form_reads_and_goes_on(disk: Path, tmp_path: Path, before: Form, after: Form) -> None:
    directory = tmp_path / "ring"
    ring = SnapshotRing(directory, form=before)
    for step in (1, 2):
        capture(ring, step, (0, 0, 0, 0, 0, step))
    ring.close()
    ring = SnapshotRing(directory, form=after)
    for info in ring.held():
        assert_holds(ring.restore(info.slot), (0, 0, 0, 0, 0, info.step))
    for step in (3, 4):
        capture(ring, step, (0, 0, 0, 0, 0, step))
    assert sorted(info.step for info in ring.held()) == [3, 4]
    for info in ring.held():
        assert_holds(ring.restore(info.slot), (0, 0, 0, 0, 0, info.step))
    if after is Form.DISK:
        assert all(path.is_symlink() for _, path in layout.slot_files(directory))
    ring.close()


# --- the choice ---


@pytest.fixture
def tmpfs_of_mb(tmp_path: Path) -> Iterator[Any]:
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a file system")
    libc = ctypes.CDLL(None, use_errno=True)
    target = tmp_path / "tmpfs"
    target.mkdir()

    def mount(size_mb: int) -> Path:
        if libc.mount(b"tmpfs", bytes(target), b"tmpfs", 0, f"size={size_mb}m".encode()) != 0:
            pytest.skip(f"needs root with the right to mount: {os.strerror(ctypes.get_errno())}")
        assert os.statvfs(target).f_blocks * os.statvfs(target).f_frsize == size_mb << 20
        return target

    yield mount
    libc.umount2(bytes(target), 2)


def room(**fields: Any) -> Room:
    usual = {"needed": 10, "host": "a", "file_system": "a-shm", "fs_total": 100, "fs_free": 100}
    return Room(**{**usual, "ram_total": 1000, "ram_free": 1000, **fields})


@pytest.mark.parametrize(
    ("rooms", "form", "reason"),
    [
        ([room()], Form.FULL, "fit into memory"),
        ([room(needed=90)], Form.FULL, "fit into memory"),
        ([room(needed=91)], Form.DISK, "the memory file system"),
        ([room(needed=45), room(needed=46)], Form.DISK, "rank 0"),  # they share it
        ([room(needed=45), room(needed=46, host="b", file_system="b-shm")], Form.FULL, "fit into memory"),
        ([room(), room(needed=91, host="b", file_system="b-shm")], Form.DISK, "rank 1"),
        ([room(needed=50, ram_free=149)], Form.DISK, "RAM"),
        ([room(needed=50, ram_free=150)], Form.FULL, "fit into memory"),
        ([room(needed=60), room(needed=60, file_system="a-other", ram_free=219)], Form.DISK, "RAM"),
        ([room(needed=0, fs_free=0, fs_total=0)], Form.FULL, "fit into memory"),
        ([room(needed=1, fs_free=0, fs_total=0)], Form.DISK, "0.00 GB to spare"),
    ],
)
def test_auto_takes_memory_when_all_ranks_fit_with_a_reserve(rooms: list[Room], form: Form, reason: str) -> None:
    chosen, why = choose_form(rooms)
    assert chosen is form
    assert reason in why


@given(st.lists(st.builds(room, needed=st.integers(0, 200), fs_free=st.integers(0, 100)), min_size=1, max_size=4))
def test_more_memory_never_sends_auto_to_disk_and_it_is_always_lossless(rooms: list[Room]) -> None:
    chosen, _ = choose_form(rooms)
    assert chosen in (Form.FULL, Form.DISK)
    richer = [dataclasses.replace(one, fs_free=one.fs_free + 50) for one in rooms]
    assert chosen is Form.DISK or choose_form(richer)[0] is Form.FULL


def test_a_containers_limit_counts_as_its_ram(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  2000 kB\nMemFree: 1 kB\nMemAvailable:  1500 kB\n")
    assert form_module._ram(meminfo, tmp_path) == (2000 << 10, 1500 << 10)
    (tmp_path / "memory.current").write_text("400000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert form_module._ram(meminfo, tmp_path) == (2000 << 10, 1500 << 10)
    (tmp_path / "memory.max").write_text("1000000\n")
    assert form_module._ram(meminfo, tmp_path) == (1_000_000, 700_000)


@pytest.mark.parametrize(("size_mb", "form"), [(2, Form.DISK), (64, Form.FULL)])
def test_auto_looks_at_the_real_file_system(
    disk: Path, tmpfs_of_mb: Any, size_mb: int, form: Form, caplog: pytest.LogCaptureFixture
) -> None:
    state, step = make_training()
    state.models["m"].register_buffer("large", torch.zeros(1_000_000))
    root = tmpfs_of_mb(size_mb)
    assert os.path.ismount(root)
    with caplog.at_level("INFO", logger="arc_dist"):
        ring = open_ring(state, Settings(snapshot_form="auto"), Voter(), Env(shm_root=root), slots=2)
    assert f"in the form '{form.value}'" in caplog.text
    assert expected_bytes(state) > 4_000_000
    step()
    assert ring.capture(1, 0, *state.tensors(), state.small()) == 0
    (directory,) = root.iterdir()
    assert layout.slot_path(directory, 0).is_symlink() == (form is Form.DISK)
    assert state.tensors()[0] == ring.restore(0).specs
    ring.close()


def test_a_temporary_directory_in_memory_is_warned_of(
    tmpfs_of_mb: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state, _ = make_training()
    settings = Settings(snapshot_form="disk")
    root = tmpfs_of_mb(8)
    assert form_module.file_system_type(root) == "tmpfs"
    for directory, warnings in ((root.parent, 0), (root, 1)):
        monkeypatch.setattr("tempfile.tempdir", str(directory))
        if form_module.file_system_type(directory) == "tmpfs":
            warnings = 1
        open_ring(state, settings, Voter(), Env(shm_root=root), slots=2).close()
        assert len([record for record in caplog.records if "is a memory file system" in record.message]) == warnings
        caplog.clear()


def test_the_estimate_of_a_state_is_that_of_adam() -> None:
    state, step = make_training()
    before = expected_bytes(state)
    step()
    after = expected_bytes(state)
    assert after == sum(spec.nbytes for spec in state.tensors()[0])
    assert 0 <= after - before < 200  # Adam's step counters are not foreseen


@pytest.mark.parametrize("wrong", ["half", "", None, 3, ["full"]])
def test_a_wrong_form_is_refused(wrong: Any) -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(ConfigError, match=r"snapshot_form=.*one of full, incremental, bf16, disk, auto"):
        Arc(model, torch.optim.SGD(model.parameters()), snapshot_form=wrong)


def test_the_form_is_part_of_what_all_ranks_must_agree_on() -> None:
    assert Settings(snapshot_form="disk").comparable()["snapshot_form"] == "disk"
    assert Settings().snapshot_form == "full"
