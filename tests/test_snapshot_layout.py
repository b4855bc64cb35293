"""Slots, status page and owned directories as a supervisor sees them, also after the owner or writer was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from arc_dist.snapshot import layout
from arc_dist.snapshot.directory import OwnedDirectory, collect_dead, remove_directory, spill
from arc_dist.snapshot.layout import Phase, SlotDamaged, SlotHeader, StatusPage, TableEntry


def write_slot(
    directory: Path, slot: int = 0, *, step: int = 7, certified: bool = False, parting: bool = False
) -> Path:
    """A slot with four bytes of tensor, written as the ring does it."""
    entry = TableEntry("model.w", "uint8", (4,), (4,), (0,), True, layout.PAGE_BYTES, 4, "uint8")
    table, small = layout.encode_table([entry]), b"small"
    table_offset = layout.PAGE_BYTES + 64
    small_offset = layout.align(table_offset + len(table))
    buffer = memoryview(bytearray(small_offset + len(small)))
    layout.begin_write(buffer)
    buffer[layout.PAGE_BYTES : layout.PAGE_BYTES + 4] = b"\x01\x02\x03\x04"
    buffer[table_offset : table_offset + len(table)] = table
    buffer[small_offset:] = small
    header = SlotHeader(
        sequence=3,
        step=step,
        generation=2,
        parting=parting,
        replicated=True,
        tensor_bytes=4,
        table_offset=table_offset,
        table_bytes=len(table),
        table_crc=layout.zlib.crc32(table),
        small_offset=small_offset,
        small_bytes=len(small),
        small_crc=layout.zlib.crc32(small),
        file_bytes=len(buffer),
    )
    layout.seal(buffer, header)
    if certified:
        layout.set_certified(buffer, True)
    path = layout.slot_path(directory, slot)
    path.write_bytes(buffer)
    return path


def test_a_sealed_slot_is_listed_with_everything_that_was_said_of_it(tmp_path: Path) -> None:
    write_slot(tmp_path, 1, step=9, certified=True)
    write_slot(tmp_path, 0, step=8, parting=True)
    (tmp_path / "slot-x.bin").write_bytes(b"not a slot")
    first, second = layout.inspect(tmp_path)
    assert (first.slot, first.step, first.certified, first.parting, first.nbytes) == (0, 8, False, True, 4)
    assert (second.slot, second.step, second.certified, second.parting, second.sequence) == (1, 9, True, False, 3)
    assert second.replicated
    assert second.generation == 2


def test_nothing_is_listed_where_there_is_nothing(tmp_path: Path) -> None:
    assert layout.inspect(tmp_path) == []
    assert layout.inspect(tmp_path / "missing") == []


def test_a_slot_cut_short_is_not_listed(tmp_path: Path) -> None:
    path = write_slot(tmp_path)
    data = path.read_bytes()
    for length in (0, 8, layout.PAGE_BYTES - 1, layout.PAGE_BYTES, len(data) - 1):
        path.write_bytes(data[:length])
        assert layout.inspect(tmp_path) == [], length


def test_no_flipped_bit_of_the_header_goes_unnoticed(tmp_path: Path) -> None:
    path = write_slot(tmp_path)
    good = path.read_bytes()
    (before,) = layout.inspect(tmp_path)
    for position in range(19 * 8):
        for bit in (0, 7):
            damaged = bytearray(good)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            found = layout.inspect(tmp_path)
            # The certified word alone is outside the checksum, because it changes later; only the value 1 means yes.
            if 24 <= position < 32:
                assert len(found) == 1
                assert found[0].certified == (position == 24 and bit == 0)
            else:
                assert found == [], f"byte {position} bit {bit}"
    path.write_bytes(good)
    assert layout.inspect(tmp_path) == [before]


@pytest.mark.parametrize("what", ["table", "small"])
def test_damage_behind_the_header_is_found_when_it_is_read(tmp_path: Path, what: str) -> None:
    data = bytearray(write_slot(tmp_path).read_bytes())
    header = layout.read_header(memoryview(data))
    assert header is not None
    data[(header.table_offset if what == "table" else header.small_offset) + 1] ^= 0x10
    with pytest.raises(SlotDamaged):
        (layout.read_table if what == "table" else layout.read_small)(memoryview(data), header)


def test_a_slot_being_written_and_one_given_up_are_not_listed(tmp_path: Path) -> None:
    path = write_slot(tmp_path)
    for change in (layout.begin_write, layout.set_empty):
        data = bytearray(path.read_bytes())
        change(memoryview(data))
        layout.slot_path(tmp_path, 1).write_bytes(data)
        assert [info.slot for info in layout.inspect(tmp_path)] == [0]


def test_layout_and_directory_need_the_standard_library_alone() -> None:
    code = (
        "import sys; import arc_dist.snapshot.layout, arc_dist.snapshot.directory\n"
        "print([m for m in ('torch', 'numpy', 'fsspec') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- the status page ---


def test_status_says_what_was_written_and_keeps_the_rest(tmp_path: Path) -> None:
    writer = StatusPage.create(tmp_path)
    reader = StatusPage.open(tmp_path)
    assert reader.read().phase is Phase.NONE
    writer.write(phase=Phase.STEPPING, step=3, generation=1)
    first = reader.read()
    writer.write(step=4)
    second = reader.read()
    assert (first.phase, first.step, first.generation, first.pid) == (Phase.STEPPING, 3, 1, os.getpid())
    assert (second.phase, second.step, second.generation) == (Phase.STEPPING, 4, 1)
    assert second.progress_ns > first.progress_ns
    StatusPage.create(tmp_path)
    assert (reader.read().phase, reader.read().step) == (Phase.NONE, 0)
    with pytest.raises(FileNotFoundError):
        StatusPage.open(tmp_path / "missing")


def test_a_reader_never_sees_a_mixture_of_two_writes(tmp_path: Path) -> None:
    """The writer keeps step and generation equal; it is killed in full flight many times."""
    page = StatusPage.create(tmp_path)
    last = 0
    for _ in range(20):
        pid = os.fork()
        if pid == 0:
            mine = StatusPage.open(tmp_path)
            step = mine.read().step
            while True:
                step += 1
                mine.write(step=step, generation=step)
        seen = []
        for _ in range(300):
            status = page.read()
            assert status.step == status.generation
            seen.append(status.step)
        while page.read().step <= last:
            pass
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        status = page.read()
        assert status.step == status.generation >= seen[-1] > 0 or last == 0
        assert seen == sorted(seen)
        last = status.step
    assert last > 20


# --- the last exception ---


def test_the_last_exception_is_whole_or_absent(tmp_path: Path) -> None:
    assert layout.read_exception(tmp_path) is None
    said = {"type": "ValueError", "message": "nö", "step": 3, "traceback": "…", "generation": 1, "rank": 0}
    layout.write_exception(tmp_path, said)
    assert layout.read_exception(tmp_path) == said
    assert os.listdir(tmp_path) == ["exception.json"]
    layout.clear_exception(tmp_path)
    layout.clear_exception(tmp_path)
    assert layout.read_exception(tmp_path) is None


# --- directories with an owner ---


def _fork_owner(root: Path, *, child_too: bool) -> tuple[int, int | None, Path]:
    """A process that owns a directory and waits; with `child_too` it has forked a child that waits as well."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        owned = OwnedDirectory(root, "test")
        child = os.fork() if child_too else None
        if child != 0:
            os.write(write_end, json.dumps([str(owned.path), child]).encode())
        while True:
            signal.pause()
    path, child = json.loads(os.read(read_end, 4096))
    os.close(read_end)
    os.close(write_end)
    return pid, child, Path(path)


def test_a_dead_owners_directory_is_collected_and_a_live_ones_is_not(tmp_path: Path) -> None:
    alive = OwnedDirectory(tmp_path, "job 1/rank 0")
    pid, _, dead = _fork_owner(tmp_path, child_too=False)
    assert collect_dead(tmp_path) == []
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert collect_dead(tmp_path) == [dead]
    assert not dead.exists()
    assert alive.path.exists()
    assert alive.path.stat().st_mode & 0o777 == 0o700
    alive.close()
    alive.close()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_stays_while_a_child_of_its_dead_owner_lives(tmp_path: Path) -> None:
    pid, child, path = _fork_owner(tmp_path, child_too=True)
    assert child is not None
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert collect_dead(tmp_path) == []
    os.kill(child, signal.SIGKILL)
    while not collect_dead(tmp_path):  # nobody here can wait for a grandchild
        pass
    assert not path.exists()


def test_a_forked_child_that_closes_does_not_remove_its_parents_directory(tmp_path: Path) -> None:
    owned = OwnedDirectory(tmp_path, "x")
    pid = os.fork()
    if pid == 0:
        owned.close()
        os._exit(0)
    os.waitpid(pid, 0)
    assert owned.path.exists()
    assert collect_dead(tmp_path) == []
    owned.close()


def test_what_was_moved_to_the_temporary_directory_goes_with_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    kept = tmp_path / "kept"
    kept.write_text("of somebody else")
    owned = OwnedDirectory(tmp_path, "x")
    (owned.path / "stranger").symlink_to(kept)
    target = spill(layout.slot_path(owned.path, 0))
    target.write_bytes(write_slot(owned.path, 1).read_bytes())
    assert [info.slot for info in layout.inspect(owned.path)] == [0, 1]
    owned.close()
    assert list(disk.iterdir()) == []
    assert kept.exists()
    remove_directory(owned.path)  # gone already: as wanted


def test_several_collectors_at_once_leave_nothing_and_raise_nothing(tmp_path: Path) -> None:
    for _ in range(5):
        pid, _, dead = _fork_owner(tmp_path, child_too=False)
        for index in range(200):
            (dead / f"f{index}").touch()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        collectors = []
        for _ in range(3):
            collector = os.fork()
            if collector == 0:
                code = 1
                try:
                    collect_dead(tmp_path)
                    code = 0
                finally:
                    os._exit(code)
            collectors.append(collector)
        assert [os.waitpid(collector, 0)[1] for collector in collectors] == [0, 0, 0]
        assert list(tmp_path.iterdir()) == []
