"""What the cases of the contract share: their error, their directory, and how they look at it."""

from __future__ import annotations

import contextlib
import random

from arc_dist.checkpoint_store.backends import Backend, Sink, Unsupported
from arc_dist.errors import ArcError, StoreError, StoreGone

_MAX_DEPTH = 8


class ContractBroken(StoreError):
    """A storage does not do what its backend promises."""


class Room:
    """A directory of one case's own on the storage that is examined."""

    def __init__(self, backend: Backend, directory: str) -> None:
        self.backend = backend
        self.directory = directory

    def path(self, name: str = "") -> str:
        """A path below the room."""
        return f"{self.directory}/{name}" if name else self.directory

    def make(self) -> None:
        """Creates the room, where directories are created."""
        self.backend.make_directory(self.directory)

    def put(self, name: str, data: bytes, *, exclusive: bool = False) -> None:
        """Writes and publishes a file."""
        sink = self.backend.create(self.path(name), len(data), exclusive=exclusive)
        try:
            write_in_pieces(sink, data)
            sink.publish()
        except BaseException:
            sink.discard()
            raise

    def content(self, name: str) -> bytes:
        """All bytes of a file."""
        return self.backend.read(self.path(name), 1 << 30)

    def names(self, name: str = "") -> set[str]:
        """The names in a directory of the room that readers may see; none when it is not there."""
        return {found for found in self.all_names(name) if not found.endswith(".claim")}

    def all_names(self, name: str = "") -> set[str]:
        """With the claims that some storage keeps beside exclusive names (FORMAT.md 1.4)."""
        try:
            return {entry.name for entry in self.backend.list(self.path(name))}
        except StoreGone:
            return set()

    def clear(self) -> None:
        """Removes what the case left. What cannot be removed is not the case's finding."""
        with contextlib.suppress(ArcError):
            self._clear(self.directory, _MAX_DEPTH)

    def _clear(self, path: str, depth: int) -> None:
        for entry in self.backend.list(path):
            if not entry.is_directory:
                self.backend.remove(f"{path}/{entry.name}")
            elif depth:
                self._clear(f"{path}/{entry.name}", depth - 1)
        self.backend.remove_directory(path)


def require(holds: bool, what: str) -> None:
    """Raises ContractBroken with `what` unless it holds."""
    if not holds:
        raise ContractBroken(what)


def refused(action: object, *kinds: type[ArcError]) -> ArcError:
    """Runs `action`; returns the error of one of `kinds` that it must raise."""
    assert callable(action)
    try:
        result = action()
    except kinds as error:
        return error
    except Unsupported:
        raise
    except ArcError as error:
        raise ContractBroken(f"{type(error).__name__} instead of {kinds[0].__name__}: {error.message}") from error
    raise ContractBroken(f"{kinds[0].__name__} was not raised; the result is {str(result)[:80]}")


def write_in_pieces(sink: Sink, data: bytes) -> None:
    """Writes in pieces of uneven size, as a header and tensors are."""
    view = memoryview(data)
    size = 7
    while view:
        sink.write(view[:size])
        view = view[size:]
        size = min(size * 3 + 1, 5 << 20)


def pattern(nbytes: int, seed: int = 0) -> bytes:
    """Bytes that show where they belong: no two blocks are equal."""
    return random.Random(seed).randbytes(nbytes)
