"""In which form snapshots are held, and the choice of one by the memory that there is.

=============  ==========================================================  =========
form           what a slot holds                                           exact
=============  ==========================================================  =========
`FULL`         every tensor, in the memory file system                     yes
`INCREMENTAL`  the tensors that change; the others are held once (base.py) yes
`DISK`         every tensor, in a file in $TMPDIR                          yes
`BF16`         every tensor; the parameters rounded to bfloat16            weights no
=============  ==========================================================  =========

`AUTO` is decided at the start, between `FULL` and `DISK`.
"""

from __future__ import annotations

import dataclasses
import enum
import os
from collections.abc import Sequence
from pathlib import Path

MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")
_RESERVE_DIVISOR = 10  # of each memory, a tenth stays free for what is not ours


class Form(enum.Enum):
    """How a ring holds snapshots; the values are those of the setting `snapshot_form`."""

    FULL = "full"
    INCREMENTAL = "incremental"
    BF16 = "bf16"
    DISK = "disk"
    AUTO = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Room:
    """What one rank needs and what its host has, in bytes.

    Attributes:
        needed: by all slots of the rank, beyond what it already holds in memory.
        host: names the memory that `ram_free` is of; ranks of one host share it.
        file_system: names the memory file system; ranks may share it.
        fs_total, fs_free: of the memory file system.
        ram_total, ram_free: of the host, or of the container that it is limited to.
    """

    needed: int
    host: str
    file_system: str
    fs_total: int
    fs_free: int
    ram_total: int
    ram_free: int


def choose_form(rooms: Sequence[Room]) -> tuple[Form, str]:
    """The form that all ranks use, and why. `rooms` has one entry per rank, the same list on every rank.

    Either form is exact. Memory is taken when it holds the slots of all ranks and a tenth of it stays free: of the
    memory file system, and of the RAM behind it.
    """
    for rank, room in enumerate(rooms):
        checks = (
            (
                "the memory file system",
                sum(other.needed for other in rooms if other.file_system == room.file_system),
                room.fs_free - room.fs_total // _RESERVE_DIVISOR,
            ),
            (
                "RAM",
                sum(other.needed for other in rooms if other.host == room.host),
                room.ram_free - room.ram_total // _RESERVE_DIVISOR,
            ),
        )
        for what, needed, free in checks:
            if needed > free:
                return Form.DISK, (
                    f"snapshots need {needed / 1e9:.2f} GB more on the host of rank {rank}, and {what} there has "
                    f"{max(free, 0) / 1e9:.2f} GB to spare"
                )
    return (
        Form.FULL,
        f"the snapshots of all {len(rooms)} ranks fit into memory, {rooms[0].needed / 1e9:.2f} GB on rank 0",
    )


def measure_room(root: Path, state_bytes: int, slots: int, held_bytes: int) -> Room:
    """Looks at this rank's host.

    Args:
        root: of the memory file system; where it cannot be used there is no room in it.
        state_bytes: of one snapshot.
        slots: number of snapshots.
        held_bytes: that this rank's slots take already, left by an earlier generation.
    """
    ram_total, ram_free = _ram()
    try:
        status = os.statvfs(root)
        fs_total, fs_free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
        file_system = f"{_host()}-{os.stat(root).st_dev}"
    except OSError:
        fs_total, fs_free, file_system = 0, 0, f"{_host()}-{root}"
    return Room(
        needed=max(0, slots * state_bytes - held_bytes),
        host=_host(),
        file_system=file_system,
        fs_total=fs_total,
        fs_free=fs_free,
        ram_total=ram_total,
        ram_free=ram_free,
    )


def file_system_type(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """The kind of file system that `path` lies on (ext4, tmpfs, ...), or "" when the kernel does not tell."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        # proc(5): mount id, parent id, major:minor, root, mount point, options, optional fields, "-", type, ...
        fields = line.split()
        if fields[2] == wanted:
            return fields[fields.index("-") + 1]
    return ""


def _host() -> str:
    # Containers of one host share its RAM, whatever they are called.
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _ram(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """Total and available bytes of RAM: the host's, or what the container is limited to when that is less."""
    rows = (line.split() for line in meminfo.read_text(encoding="ascii").splitlines())
    kib = {row[0]: int(row[1]) for row in rows if row[0] in ("MemTotal:", "MemAvailable:")}
    total, free = kib["MemTotal:"] << 10, kib["MemAvailable:"] << 10
    try:
        limit = (cgroup / "memory.max").read_text(encoding="ascii").strip()
        used = int((cgroup / "memory.current").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text(encoding="ascii").splitlines())
    except FileNotFoundError:
        return total, free  # the root of all groups, or an older kernel's
    if limit == "max":
        return total, free
    # Pages of files that were not read lately are given back when memory is wanted.
    spare = int(limit) - used + int(stat.get("inactive_file", "0"))
    return min(total, int(limit)), min(free, spare)
