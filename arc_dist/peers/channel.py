"""What two supervisors say to each other over TCP: messages that prove the job's token, and blocks of plain bytes.

::

    server --> 16 random bytes          each side's part of the key of this connection
    client --> 16 random bytes
    message:   length (4) | HMAC-SHA256 of (key, direction, number of the message, body) (32) | body, JSON
    bytes:     length (4) | that many bytes, again and again; a length of 0 ends them, `_ABANDONED` gives them up

The token itself never travels, and no message can be repeated in another place or connection. Blocks are not encrypted
and carry no proof of their own: their digest comes in a message after them. Every wait has a limit, and a message that
is not proven is read only up to a small size.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import socket
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from arc_dist.errors import InfrastructureError

BLOCK_BYTES = 1 << 20
_LENGTH = struct.Struct("!I")
_PART_BYTES = 16
_MAX_MESSAGE_BYTES = 64 << 10
_ABANDONED = 0xFFFF_FFFF


class PeerUnavailable(InfrastructureError):
    """Another supervisor did not do what it was asked: it is gone, refuses, or says what cannot be right."""


class Abandoned(Exception):
    """What is being sent changed meanwhile; the receiver must forget it."""


class Channel:
    """One side of a connection. Use it from one thread; closing the socket is the caller's.

    Args:
        sock: connected.
        token: of the job.
        serves: this side accepted the connection.
        timeout_s: for each wait.
        peer: names the other side in errors.

    Every method raises `PeerUnavailable` when the other side is gone, is too slow or does not know the token.
    """

    def __init__(self, sock: socket.socket, token: str, *, serves: bool, timeout_s: float, peer: str) -> None:
        sock.settimeout(timeout_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._peer = peer
        self._serves = serves
        self._sent = self._received = 0
        mine = secrets.token_bytes(_PART_BYTES)
        self._put(mine)
        theirs = bytes(self._take(_PART_BYTES))
        parts = mine + theirs if serves else theirs + mine
        self._key = hmac.digest(token.encode(), b"arc-dist peers 1" + parts, hashlib.sha256)

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends one message."""
        body = json.dumps(message, separators=(",", ":")).encode()
        proof = self._proof(self._serves, self._sent, body)
        self._sent += 1
        self._put(_LENGTH.pack(len(body)) + proof + body)

    def receive(self) -> dict[str, Any]:
        """Waits for one message. One with an `error` is raised as `PeerUnavailable`."""
        (length,) = _LENGTH.unpack(self._take(_LENGTH.size))
        if length > _MAX_MESSAGE_BYTES:
            raise self._problem(f"a message of {length} bytes; at most {_MAX_MESSAGE_BYTES} are read")
        proof, body = bytes(self._take(hashlib.sha256().digest_size)), bytes(self._take(length))
        if not hmac.compare_digest(proof, self._proof(not self._serves, self._received, body)):
            raise self._problem("a message that does not prove this job's token")
        self._received += 1
        message = json.loads(body)
        if not isinstance(message, dict):
            raise self._problem("a message that is no object")
        fields: dict[str, Any] = {str(key): value for key, value in message.items()}
        if "error" in fields:
            raise self._problem(str(fields["error"]))
        return fields

    def send_bytes(self, parts: Iterable[memoryview], before_each: Callable[[memoryview], None]) -> None:
        """Sends buffers block by block, straight from where they lie.

        Args:
            parts: one after the other.
            before_each: called with each block before it is sent; may wait, or raise `Abandoned`.

        Raises:
            Abandoned: passed on, once the other side was told to forget what it got.
        """
        try:
            for part in parts:
                for start in range(0, len(part), BLOCK_BYTES):
                    block = part[start : start + BLOCK_BYTES]
                    before_each(block)
                    self._put(_LENGTH.pack(len(block)))
                    self._put(block)
        except Abandoned:
            self._put(_LENGTH.pack(_ABANDONED))
            raise
        self._put(_LENGTH.pack(0))

    def receive_bytes(self, into: Iterable[memoryview]) -> None:
        """Fills buffers with what `send_bytes` of the other side sends, which must be exactly as much."""
        for part in into:
            position = 0
            while position < len(part):
                length = self._take_length()
                if not 0 < length <= min(BLOCK_BYTES, len(part) - position):
                    raise self._problem(f"a block of {length} bytes where {len(part) - position} are missing")
                self._fill(part[position : position + length])
                position += length
        if self._take_length() != 0:
            raise self._problem("more bytes than it had announced")

    def _take_length(self) -> int:
        (length,) = _LENGTH.unpack(self._take(_LENGTH.size))
        if length == _ABANDONED:
            raise self._problem("the snapshot was overwritten while it was sent")
        return length

    def _proof(self, from_server: bool, number: int, body: bytes) -> bytes:
        return hmac.digest(self._key, struct.pack("!BQ", from_server, number) + body, hashlib.sha256)

    def _put(self, data: bytes | memoryview) -> None:
        try:
            self._sock.sendall(data)
        except OSError as error:
            raise self._gone(error) from error

    def _take(self, nbytes: int) -> bytearray:
        data = bytearray(nbytes)
        self._fill(memoryview(data))
        return data

    def _fill(self, view: memoryview) -> None:
        while view:
            try:
                got = self._sock.recv_into(view)
            except OSError as error:
                raise self._gone(error) from error
            if not got:
                raise PeerUnavailable(f"{self._peer} closed the connection")
            view = view[got:]

    def _gone(self, error: OSError) -> PeerUnavailable:
        return PeerUnavailable(f"{self._peer} does not answer: {type(error).__name__}: {error}")

    def _problem(self, what: str) -> PeerUnavailable:
        return PeerUnavailable(f"{self._peer}: {what}")


def connect(host: str, port: int, token: str, *, timeout_s: float, peer: str) -> tuple[socket.socket, Channel]:
    """Opens a connection to another supervisor.

    Raises:
        PeerUnavailable: it cannot be reached, or is not one of this job.
    """
    try:
        sock = socket.create_connection((host, port), timeout=timeout_s)
    except OSError as error:
        raise PeerUnavailable(f"{peer} at {host}:{port} cannot be reached: {error}") from error
    try:
        return sock, Channel(sock, token, serves=False, timeout_s=timeout_s, peer=peer)
    except BaseException:
        sock.close()
        raise
