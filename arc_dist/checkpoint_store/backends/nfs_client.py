"""What an NFS client does behind a program's back, and what undoes it.

A client remembers for up to a minute (`acdirmax`) that a name was not there, and says so after another host has created
it: a step that was just committed would be passed over, and work lost in silence. It remembers names that were there as
well. Opening a directory makes it ask the server whether the directory has changed ("close to open").

A client renames an open file that is removed to ``.nfs<number>``, and removes that when the file is closed. Until then
its directory is not empty.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
from pathlib import Path

_OPEN_BUT_REMOVED = ".nfs"
_NFS_SUPER_MAGIC = 0x6969  # statfs(2)
_STATFS_WORDS = 32  # twice what the structure has


def ask_server(root: Path, path: Path) -> None:
    """Makes the client forget what it remembers of `path`, which is `root` or below it. Not on NFS, nothing is done.

    Raises:
        OSError: the storage failed; not when the path or something above it is not there.
    """
    if not is_nfs(root):
        return
    above = [root.parent] if path == root else [*reversed(path.relative_to(root).parents)]
    for directory in above:
        try:
            os.close(os.open(root / directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        except (FileNotFoundError, NotADirectoryError):
            return
        except PermissionError:
            pass  # we may pass through it, but not open it; then what the client remembers must do


def is_nfs(path: Path) -> bool:
    """Whether a path, which need not exist, is on NFS, as far as the system can say; where it cannot, it may be."""
    if sys.platform != "linux":
        return True
    words = (ctypes.c_long * _STATFS_WORDS)()
    for place in (path, path.parent):
        if ctypes.CDLL(None, use_errno=True).statfs(os.fsencode(place), words) == 0:
            return words[0] == _NFS_SUPER_MAGIC
    return True


def is_of_client(name: str) -> bool:
    """Whether a name is the client's own and no file of ours."""
    return name.startswith(_OPEN_BUT_REMOVED)


def only_of_client(directory: Path) -> bool:
    """Whether a directory holds nothing but removed files that somebody may still have open.

    Those that nobody has, which a client that died left behind, are removed, and the directory if it is empty then. It
    stays, without anything of ours in it, while this host has one open.

    Raises:
        OSError: the storage failed.
    """
    names = os.listdir(directory)
    if not all(is_of_client(name) for name in names):
        return False
    for name in names:
        try:
            os.unlink(directory / name)
        except FileNotFoundError:
            pass  # closed meanwhile
        except OSError as error:
            if error.errno != errno.EBUSY:  # open on this host
                raise
    with contextlib.suppress(OSError):
        os.rmdir(directory)
    return True
