"""What one caller may take from the server: requests per second, bytes, and time for its own side of a connection."""

from __future__ import annotations

import dataclasses
import io
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of a server. A job's own ranks never come near them; something that runs wild does.

    Attributes:
        request_bytes: larger requests are refused unread.
        request_s: for a request to arrive whole once it has begun.
        answer_s: for an answer to be taken.
        idle_s: between two requests of a connection that has shown the token.
        stranger_s: the same for one that has not.
        reads_per_s: GET requests of all callers together; ten seconds' worth may come at once.
        reports_per_s: POST requests of all callers together, likewise.
        refusals_per_s: wrong tokens of one address, likewise.
        connections: open at the same time.
    """

    request_bytes: int = 32 << 20  # a shard's part of a manifest lists every tensor
    request_s: float = 60.0
    answer_s: float = 60.0
    idle_s: float = 300.0
    stranger_s: float = 20.0
    reads_per_s: float = 50.0
    reports_per_s: float = 1000.0
    refusals_per_s: float = 10.0
    connections: int = 256

    def for_world(self, world_size: int) -> Limits:
        """The same with room for what `world_size` ranks say and hold open."""
        return dataclasses.replace(
            self,
            reports_per_s=self.reports_per_s + 20.0 * world_size,
            connections=self.connections + 8 * world_size,
        )


_BURST_S = 10.0
_MAX_ADDRESSES = 1024


class Bucket:
    """Lets `rate_per_s` through on average, and ten seconds' worth at once.

    Args:
        rate_per_s: what comes in; must be positive.
        clock: monotonic seconds.
    """

    def __init__(self, rate_per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate_per_s = rate_per_s
        self._clock = clock
        self._guard = threading.Lock()
        self._level = self._most = max(1.0, rate_per_s * _BURST_S)
        self._filled_at = clock()

    def take(self) -> float:
        """Takes one and answers 0, or takes nothing and answers after how many seconds there will be one."""
        with self._guard:
            now_s = self._clock()
            self._level = min(self._most, self._level + (now_s - self._filled_at) * self._rate_per_s)
            self._filled_at = now_s
            if self._level >= 1.0:
                self._level -= 1.0
                return 0.0
            return (1.0 - self._level) / self._rate_per_s


class BucketPerAddress:
    """A bucket for each address, as many as are kept: the one not heard of for longest goes first."""

    def __init__(self, rate_per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate_per_s = rate_per_s
        self._clock = clock
        self._guard = threading.Lock()
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def take(self, address: str) -> float:
        with self._guard:
            bucket = self._buckets.pop(address, None) or Bucket(self._rate_per_s, self._clock)
            self._buckets[address] = bucket
            if len(self._buckets) > _MAX_ADDRESSES:
                self._buckets.popitem(last=False)
        return bucket.take()


class TimedStream(io.RawIOBase):
    """A connection whose requests and answers have deadlines as a whole, however slowly their bytes trickle.

    Every read or write that would go beyond raises `TimeoutError`.
    """

    def __init__(self, connection: socket.socket, limits: Limits) -> None:
        super().__init__()
        self._connection = connection
        self._limits = limits
        self._awaits_first = False
        self._read_by_s = 0.0
        self._write_by_s = 0.0

    def await_request(self, *, is_known: bool) -> None:
        """A request may come now; `is_known`: the caller has shown the token."""
        self._awaits_first = True
        self._read_by_s = time.monotonic() + (self._limits.idle_s if is_known else self._limits.stranger_s)

    def begin_answer(self) -> None:
        """An answer is to leave now."""
        self._write_by_s = time.monotonic() + self._limits.answer_s

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]  # typeshed: a Buffer
        self._connection.settimeout(_remaining(self._read_by_s))
        count = self._connection.recv_into(buffer)
        if self._awaits_first:
            self._awaits_first = False
            self._read_by_s = time.monotonic() + self._limits.request_s
        return count

    def write(self, data: bytes | memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]  # typeshed: a Buffer
        self._connection.settimeout(_remaining(self._write_by_s))
        return self._connection.send(data)


def _remaining(by_s: float) -> float:
    remaining_s = by_s - time.monotonic()
    if remaining_s <= 0:
        raise TimeoutError("the other end takes too long")
    return remaining_s
