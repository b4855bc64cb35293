"""A memory cgroup with a small limit, whose processes the kernel's OOM killer ends for real."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

_LIMIT = 32 << 20  # bytes, of what is allocated after entering: pages that a process has already stay charged elsewhere
_ROOT = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def memory_cgroup() -> Iterator[Path]:
    """A directory for `exhaust`; skips the test where no cgroup can be made."""
    is_v2 = (_ROOT / "cgroup.controllers").exists()
    group = (_ROOT if is_v2 else _ROOT / "memory") / f"arc-test-{uuid.uuid4().hex}"
    try:
        group.mkdir()
        if is_v2:
            (group / "memory.swap.max").write_text("0")
        (group / ("memory.max" if is_v2 else "memory.limit_in_bytes")).write_text(str(_LIMIT))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"needs root with the right to make memory cgroups: {error}")
    try:
        yield group
    finally:
        group.rmdir()


def exhaust(group: Path) -> None:
    """Enters the cgroup and allocates until the OOM killer comes. Only returns by an error, if it does not."""
    (group / "cgroup.procs").write_text(str(os.getpid()))
    bytearray(b"x" * (8 * _LIMIT))
    raise RuntimeError(f"{group}: {8 * _LIMIT} bytes were allocated within a limit of {_LIMIT}")


def num_oom_kills(group: Path) -> int:
    """How many of the cgroup's processes the OOM killer has ended."""
    for name in ("memory.events", "memory.oom_control"):
        with contextlib.suppress(FileNotFoundError):
            lines = dict(line.split() for line in (group / name).read_text().splitlines())
            return int(lines["oom_kill"])
    raise AssertionError(f"{group} counts no OOM kills")
