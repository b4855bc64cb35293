"""Room for the files of a rank's directory: in its memory file system, or on disk.

Standard library only.
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

from arc_dist.snapshot import directory

_logger = logging.getLogger(__name__)

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def open_file(path: Path) -> int:
    """A descriptor of the file at `path`, made when it is not there."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def reserve(path: Path, nbytes: int, *, on_disk: bool = False) -> int | None:
    """Makes the file at `path` at least `nbytes` long, all of it in place.

    Args:
        path: in the rank's directory. With `on_disk`, or with a warning when its file system has no room, it becomes
            a link into $TMPDIR.
        nbytes: of the file.
        on_disk: do not try the directory's own file system.

    Returns:
        A descriptor that the caller closes, or None when there is no room in either place; then nothing is at `path`.
    """
    if on_disk:
        return _reserve_on_disk(path, nbytes)
    descriptor = open_file(path)
    # Without the reservation a full memory file system would answer a store with SIGBUS.
    if _allocate(descriptor, nbytes):
        return descriptor
    os.close(descriptor)
    _logger.warning(
        "no room for %.1f MB in %s: this snapshot slot goes to the temporary directory, where it is slower. "
        "Give the memory file system more room (docker: --shm-size) or name another one in ARC_SHM_ROOT",
        nbytes / 1e6,
        path.parent,
    )
    return _reserve_on_disk(path, nbytes)


def remove(path: Path) -> None:
    """Removes a file that `reserve` made, wherever it lies; mappings of it stay readable. Nothing there is as well."""
    if path.is_symlink():
        directory.remove_spill(path)
    path.unlink(missing_ok=True)


def _reserve_on_disk(path: Path, nbytes: int) -> int | None:
    if path.is_symlink() and path.exists():
        descriptor = open_file(path)
    else:
        path.unlink(missing_ok=True)
        descriptor = os.open(directory.spill(path), os.O_RDWR | os.O_CLOEXEC)
    if _allocate(descriptor, nbytes):
        return descriptor
    os.close(descriptor)
    remove(path)
    return None


def _allocate(descriptor: int, nbytes: int) -> bool:
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        return False
    return True
