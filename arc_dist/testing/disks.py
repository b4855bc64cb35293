"""Simulated disks: a store's backend and a journal's file on them, with the faults that disks have.

A disk outlives the processes that write to it. Each of them has a handle of its own, which stops working with it: what
a dead process had begun to write stays as it was.
"""

from __future__ import annotations

import collections
import errno
import posixpath
from collections.abc import Callable

from arc_dist.checkpoint_store.backends.base import Capabilities, Entry, translated
from arc_dist.errors import Fenced, StoreCorrupt
from arc_dist.testing.world import Killed, Life

_MESSAGES = {errno.ENOSPC: "No space left on device", errno.EIO: "Input/output error"}


class Disk:
    """Files by path, and what is wrong with the disk at the moment.

    Attributes:
        full: no write succeeds.
        broken: number of operations that will fail (EIO).
        lost_answers: number of writes that will be done and said to have failed.
        lost_writes: number of files that will be published as zeros.
        kills_writer: the next process that writes dies in the middle.
        journals: the files of journals, which are appended to.
        met: how often each of these has happened.
        damaged: paths whose content is not what was written.
        on_publish: told the path and content of each file that gets its name.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.tree: dict[str, dict[str, bytes | None]] = {"": {}}  # directory -> name -> content, None for a directory
        self.full = False
        self.broken = 0
        self.lost_answers = 0
        self.lost_writes = 0
        self.kills_writer = False
        self.journals: dict[str, bytearray] = {}
        self.met: collections.Counter[str] = collections.Counter()
        self.damaged: set[str] = set()
        self.on_publish: Callable[[str, bytes], None] = lambda path, data: None

    def touch(self, *, writes: bool) -> None:
        """One operation; raises OSError when it fails."""
        if self.broken > 0:
            self.broken -= 1
            self.met["disk-eio"] += 1
            raise OSError(errno.EIO, _MESSAGES[errno.EIO])
        if writes and self.full:
            self.met["disk-full"] += 1
            raise OSError(errno.ENOSPC, _MESSAGES[errno.ENOSPC])

    def answer(self) -> None:
        """A write was done; raises OSError when its answer is lost."""
        if self.lost_answers > 0:
            self.lost_answers -= 1
            self.met["lost-answer"] += 1
            raise OSError(errno.EIO, _MESSAGES[errno.EIO])

    def kill_writer(self, life: Life) -> None:
        self.kills_writer = False
        self.met["torn-write"] += 1
        life.end()

    def make_directories(self, path: str) -> None:
        while path and path not in self.tree:
            self.tree[path] = {}
            parent, name = posixpath.split(path)
            self.tree.setdefault(parent, {})[name] = None
            path = parent

    def find(self, path: str) -> bytes | None:
        """A file's content; None for a directory. FileNotFoundError when there is neither."""
        if path in self.tree:
            return None
        parent, name = posixpath.split(path)
        if name not in self.tree.get(parent, {}):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        return self.tree[parent][name]

    def holds(self, path: str) -> bool:
        parent, name = posixpath.split(path)
        return path in self.tree or name in self.tree.get(parent, {})

    def put(self, path: str, data: bytes) -> None:
        """A file gets its name, and perhaps the wrong bytes."""
        if self.lost_writes > 0 and not path.endswith(".json"):
            # Small files are written in one block with their name; what storage loses is data.
            self.lost_writes -= 1
            self.met["lost-write"] += 1
            self.damaged.add(path)
            self.on_publish(path, data)
            data = bytes(len(data))
        else:
            self.damaged.discard(path)
            self.on_publish(path, data)
        parent, name = posixpath.split(path)
        self.tree[parent][name] = data

    def flip(self, path: str, bit: int) -> None:
        """Alters one bit of a file."""
        parent, name = posixpath.split(path)
        data = bytearray(self.tree[parent][name] or b"")
        data[bit // 8 % len(data)] ^= 1 << bit % 8
        self.tree[parent][name] = bytes(data)
        self.damaged.add(path)
        self.met["bit-flip"] += 1

    def files(self, under: str) -> list[str]:
        """Paths of all files in the directories below `under`, sorted."""
        return sorted(
            f"{directory}/{name}"
            for directory, names in self.tree.items()
            if directory.startswith(f"{under}/")
            for name, content in names.items()
            if content is not None
        )


class SimBackend:
    """A `checkpoint_store.backends.Backend` on a simulated disk, as one process sees it."""

    def __init__(self, disk: Disk, life: Life) -> None:
        self._disk = disk
        self._life = life
        self.url = f"sim://{disk.name}"
        self.capabilities = Capabilities(
            exclusive_create=True, atomic_publish=True, durable=True, reserve=False, private=True, shared=True
        )

    def prepare(self) -> None:
        self._life.check()

    def make_directory(self, path: str) -> None:
        self._begin(path, writes=True)
        self._disk.make_directories(path)

    def list(self, path: str) -> list[Entry]:
        self._begin(path)
        with translated("listing", self._where(path)):
            self._disk.find(path)
        return [Entry(name, content is None) for name, content in sorted(self._disk.tree[path].items())]

    def exists(self, path: str) -> bool:
        self._begin(path)
        return self._disk.holds(path)

    def read(self, path: str, max_bytes: int) -> bytes:
        data = self._content(path)
        if len(data) > max_bytes:
            raise StoreCorrupt(f"{self._where(path)}: {len(data)} bytes are more than {max_bytes}")
        return data

    def open(self, path: str) -> SimSource:
        return SimSource(self._content(path), self._where(path))

    def claim(self, directory: str, name: str, data: bytes) -> bool:
        self._begin(directory, writes=True)
        if self._disk.holds(directory):
            return False
        self._disk.make_directories(directory)
        self._disk.put(f"{directory}/{name}", data)
        self._end(directory)
        return True

    def create(self, path: str, nbytes: int, *, exclusive: bool) -> SimSink:
        self._begin(path, writes=True)
        return SimSink(self, path, exclusive)

    def create_exclusive(self, path: str, data: bytes) -> bool:
        self.begin_write(path)
        if self._disk.holds(path):
            return False
        self._disk.make_directories(posixpath.dirname(path))
        self._disk.put(path, data)
        self._end(path)
        return True

    def remove(self, path: str) -> None:
        self._begin(path, writes=False)
        parent, name = posixpath.split(path)
        self._disk.tree.get(parent, {}).pop(name, None)

    def remove_directory(self, path: str) -> None:
        self._begin(path, writes=False)
        if not self._disk.tree.get(path):
            self._disk.tree.pop(path, None)
            parent, name = posixpath.split(path)
            self._disk.tree.get(parent, {}).pop(name, None)

    def sync_directory(self, path: str) -> None:
        self._begin(path, writes=False)

    def begin_write(self, path: str) -> None:
        """The next block; whoever writes may die here, with what it had written under no name."""
        self._begin(path, writes=True)
        if self._disk.kills_writer:
            self._disk.kill_writer(self._life)
            raise Killed(f"{self._life.name} while it wrote {path}")

    def publish(self, path: str, data: bytes, *, exclusive: bool) -> None:
        self._begin(path, writes=True)
        if exclusive and self._disk.holds(path):
            raise Fenced(f"{self._where(path)} is there already")
        self._disk.make_directories(posixpath.dirname(path))
        self._disk.put(path, data)
        self._end(path)

    def _begin(self, path: str, *, writes: bool = False) -> None:
        self._life.check()
        with translated("using", self._where(path)):
            self._disk.touch(writes=writes)

    def _end(self, path: str) -> None:
        with translated("writing", self._where(path)):
            self._disk.answer()

    def _content(self, path: str) -> bytes:
        self._begin(path)
        with translated("reading", self._where(path)):
            data = self._disk.find(path)
            if data is None:
                raise IsADirectoryError(errno.EISDIR, "Is a directory")
        return data

    def _where(self, path: str) -> str:
        return f"{self.url}/{path}"


class SimSink:
    """A file being written; see `backends.Sink`."""

    def __init__(self, backend: SimBackend, path: str, exclusive: bool) -> None:
        self._backend = backend
        self._path = path
        self._exclusive = exclusive
        self._data = bytearray()

    def write(self, data: memoryview) -> None:
        self._backend.begin_write(self._path)
        self._data += data

    def publish(self) -> None:
        self._backend.publish(self._path, bytes(self._data), exclusive=self._exclusive)

    def discard(self) -> None:
        self._data.clear()


class SimSource:
    """A file opened for reading; see `backends.Source`."""

    block_bytes = 1 << 20

    def __init__(self, data: bytes, where: str) -> None:
        self._data = data
        self._where = where

    @property
    def nbytes(self) -> int:
        return len(self._data)

    def num_streams(self) -> int:
        return 1

    def read_into(self, offset: int, buffer: memoryview) -> None:
        part = self._data[offset : offset + len(buffer)]
        if len(part) < len(buffer):
            raise StoreCorrupt(f"{self._where}: ends after {len(self._data)} bytes")
        buffer[:] = part

    def close(self) -> None:
        """Nothing is held open."""


class SimJournalFile:
    """A `coordinator.journal.JournalFile` on a simulated disk.

    The file that a replaced coordinator still has open is not the one that its successor put in its place, as with a
    rename on a real disk.
    """

    def __init__(self, disk: Disk, life: Life, name: str = "journal.log") -> None:
        self._disk = disk
        self._life = life
        self._name = name
        self._data = bytearray()

    @property
    def nbytes(self) -> int:
        return len(self._data)

    def read(self) -> bytes | None:
        content = self._disk.journals.get(self._name)
        return None if content is None else bytes(content)

    def replace(self, data: bytes) -> None:
        self._life.check()
        self._data = bytearray(data)
        self._disk.journals[self._name] = self._data

    def append(self, data: bytes) -> None:
        self._life.check()
        self._disk.touch(writes=True)
        if self._disk.kills_writer:
            self._disk.kill_writer(self._life)
            self._data += data[: len(data) // 2]
            raise Killed(f"{self._life.name} while it wrote its journal")
        self._data += data
        self._disk.answer()

    def is_in_place(self) -> bool:
        return self._disk.journals.get(self._name) is self._data

    def truncate(self, nbytes: int) -> None:
        self._life.check()
        del self._data[nbytes:]

    def close(self) -> None:
        """Nothing is held open."""
