"""The way between a supervisor and a trainer that can stay: a Unix socket in the rank's shared-memory directory.

From the trainer: ``began {generation, within_s}``, ``left {generation}``, ``stuck {generation, reason}``. To it:
``leave {generation}``, ``enter {generation, set}``. Messages are those of wire.py; a closed end says that a function
is over, or that its process is. See protocol/reentry.py for what follows from them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

_NAME = "reentry"
_BACKLOG = 4
_CREDENTIALS = struct.Struct("3i")  # pid, user, group; see unix(7)


def listen(directory: Path) -> socket.socket:
    """The supervisor's end, in its rank's directory, which is private to the user."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with _short_path(directory) as path:
        sock.bind(path)
    sock.listen(_BACKLOG)
    return sock


def connect(directory: Path) -> socket.socket:
    """The trainer's end.

    Raises:
        OSError: there is no supervisor with such a socket.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short_path(directory) as path:
            sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock


def peer_pid(sock: socket.socket) -> int:
    """Who connected, as the kernel knows it."""
    pid, _, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid


@contextlib.contextmanager
def _short_path(directory: Path) -> Iterator[str]:
    """A path of a socket may have 107 bytes; that of a directory may be longer."""
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{_NAME}"
    finally:
        os.close(descriptor)
