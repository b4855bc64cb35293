"""Messages between a supervisor and its zygote: JSON objects over a socket pair, each after its length.

JSON and not pickle, because a trainer's last words (an exception, a huge plan) must not be able to run code here.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from typing import Any

_HEADER = struct.Struct("!I")
_MAX_BYTES = 64 * 1024 * 1024  # a plan for 10,000 ranks is below 2 MB


def dumps(value: object) -> str:
    """JSON without blanks, for environment variables."""
    return json.dumps(value, separators=(",", ":"))


def send(sock: socket.socket, message: Mapping[str, Any]) -> None:
    """Sends one message; blocks until the kernel took all of it."""
    body = json.dumps(message).encode()
    sock.sendall(_HEADER.pack(len(body)) + body)


def receive(sock: socket.socket) -> dict[str, Any] | None:
    """Receives one message; None when the other side is gone."""
    header = _receive_exactly(sock, _HEADER.size)
    if header is None:
        return None
    (length,) = _HEADER.unpack(header)
    if length > _MAX_BYTES:
        raise ValueError(f"a message of {length} bytes on the zygote's socket: more than {_MAX_BYTES}")
    body = _receive_exactly(sock, length)
    return None if body is None else json.loads(body)


def _receive_exactly(sock: socket.socket, length: int) -> bytes | None:
    parts: list[bytes] = []
    while length:
        try:
            part = sock.recv(length)
        except ConnectionError:
            return None
        if not part:
            return None
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
