"""A disk that forgets: what the recorded calls of a store may have left after a power cut.

The rules are those that POSIX gives, and no kinder: bytes are safe after fsync of the file, names after fsync of their
directory. Of what is not safe, any part may be there: each unsynced name alone, each unsynced file empty, whole, cut or
with blocks missing. A rename is one step; a file that was reserved but not written reads as zeros.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from os_calls import Call, OsCalls

BLOCK_BYTES = 4096
ROOT = 0

Op = tuple[Any, ...]


class Killed(BaseException):
    """The process that was to make this call is dead."""


class Recorder(OsCalls):
    """Records every call that changes the disk; kills its caller before the call number `kill_at`."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.ops: list[Op] = []
        self.kill_at: int | None = None
        self._tree: dict[str, int] = {"": ROOT}
        self._inodes: dict[int, int] = {}  # descriptor -> inode
        self._offsets: dict[int, int] = {}
        self._numbers = itertools.count(1)

    def mark(self, *what: Any) -> None:
        self.ops.append(("mark", *what))

    def rule(self, call: Call) -> Callable[[], Any]:
        if self.kill_at is not None and len(self.ops) >= self.kill_at and call.name != "close":
            raise Killed
        return super().rule(call)

    def done(self, call: Call, result: Any) -> None:
        handler = getattr(self, f"_{call.name}", None)
        if handler is not None:
            handler(call, result)

    def _place(self, path: str) -> tuple[int, str]:
        parent, _, name = path.rpartition("/")
        return self._tree[parent], name

    def _open(self, call: Call, descriptor: int) -> None:
        (path,) = call.paths
        flags = call.arguments[1]
        if path not in self._tree:
            assert flags & os.O_CREAT
            self._tree[path] = next(self._numbers)
            self.ops.append(("create", *self._place(path), self._tree[path]))
        assert not flags & os.O_TRUNC
        self._inodes[descriptor] = self._tree[path]
        self._offsets[descriptor] = 0

    def _mkdir(self, call: Call, _: Any) -> None:
        (path,) = call.paths
        self._tree[path] = next(self._numbers)
        self.ops.append(("mkdir", *self._place(path), self._tree[path]))

    def _write(self, call: Call, count: int) -> None:
        descriptor, data = call.arguments
        offset = self._offsets[descriptor]
        self.ops.append(("write", self._inodes[descriptor], offset, bytes(data[:count])))
        self._offsets[descriptor] = offset + count

    def _fallocate(self, call: Call, _: Any) -> None:
        descriptor, nbytes = call.arguments
        self.ops.append(("size", self._inodes[descriptor], nbytes))

    def _fsync(self, call: Call, _: Any) -> None:
        self.ops.append(("fsync", self._inodes[call.arguments[0]]))

    def _rename(self, call: Call, _: Any) -> None:
        old, new = call.paths
        (parent, old_name), (new_parent, new_name) = self._place(old), self._place(new)
        assert parent == new_parent, "a rename between directories is two steps for a crash; not modelled"
        for path in [path for path in self._tree if path == new or path.startswith(new + "/")]:
            del self._tree[path]
        for path in [path for path in self._tree if path == old or path.startswith(old + "/")]:
            self._tree[new + path[len(old) :]] = self._tree.pop(path)
        self.ops.append(("rename", parent, old_name, new_name, self._tree[new]))

    def _link(self, call: Call, _: Any) -> None:
        old, new = call.paths
        self._tree[new] = self._tree[old]
        self.ops.append(("link", *self._place(new), self._tree[new]))

    def _unlink(self, call: Call, _: Any) -> None:
        (path,) = call.paths
        self.ops.append(("unlink", *self._place(path)))
        del self._tree[path]

    _rmdir = _unlink


class Disk:
    """What is safe and what is not after some calls."""

    def __init__(self) -> None:
        self.kinds: dict[int, str] = {ROOT: "directory"}
        self.names: dict[int, dict[str, int]] = {ROOT: {}}  # of directories, safe
        self.changes: dict[int, list[tuple[dict[str, int], list[str]]]] = {ROOT: []}  # not yet safe: added, removed
        self.data: dict[int, bytes] = {}  # of files, safe
        self.writes: dict[int, list[tuple[int, bytes]]] = {}  # not yet safe

    def apply(self, op: Op) -> None:
        name, *rest = op
        if name in ("create", "mkdir"):
            parent, entry, inode = rest
            self.kinds[inode] = "file" if name == "create" else "directory"
            if name == "create":
                self.data[inode], self.writes[inode] = b"", []
            else:
                self.names[inode], self.changes[inode] = {}, []
            self.changes[parent].append(({entry: inode}, []))
        elif name == "link":
            self.changes[rest[0]].append(({rest[1]: rest[2]}, []))
        elif name == "rename":
            self.changes[rest[0]].append(({rest[2]: rest[3]}, [rest[1]]))
        elif name == "unlink":
            self.changes[rest[0]].append(({}, [rest[1]]))
        elif name == "write":
            self.writes[rest[0]].append((rest[1], rest[2]))
        elif name == "size":
            self.writes[rest[0]].append((rest[1], b""))
        elif name == "fsync":
            self._sync(rest[0])

    def _sync(self, inode: int) -> None:
        if self.kinds[inode] == "directory":
            self.names[inode] = changed(self.names[inode], self.changes[inode])
            self.changes[inode] = []
        else:
            self.data[inode] = written(self.data[inode], self.writes[inode])
            self.writes[inode] = []

    def unsafe(self) -> tuple[list[tuple[int, int]], list[int]]:
        """The changes of names, as (directory, number), and the files with unsafe bytes."""
        changes = [(inode, number) for inode, items in self.changes.items() for number in range(len(items))]
        return changes, [inode for inode, items in self.writes.items() if items]

    def state(self, kept: set[tuple[int, int]], cut: Callable[[int, bytes, bytes], bytes]) -> dict[str, bytes | None]:
        """The tree after a crash: path -> bytes, or None for a directory."""
        found: dict[str, bytes | None] = {}

        def walk(inode: int, path: str) -> None:
            items = [item for number, item in enumerate(self.changes[inode]) if (inode, number) in kept]
            for name, child in changed(self.names[inode], items).items():
                below = f"{path}{name}"
                if self.kinds[child] == "directory":
                    found[below] = None
                    walk(child, below + "/")
                else:
                    safe = self.data[child]
                    pending = self.writes[child]
                    found[below] = cut(child, safe, written(safe, pending)) if pending else safe

        walk(ROOT, "")
        return found


def changed(names: dict[str, int], changes: list[tuple[dict[str, int], list[str]]]) -> dict[str, int]:
    result = dict(names)
    for added, removed in changes:
        for name in removed:
            result.pop(name, None)
        result.update(added)
    return result


def written(data: bytes, writes: list[tuple[int, bytes]]) -> bytes:
    result = bytearray(data)
    for offset, piece in writes:
        end = offset + len(piece)
        if len(result) < end:
            result.extend(bytes(end - len(result)))
        result[offset:end] = piece
    return bytes(result)


def torn(how: str, rng: random.Random) -> Callable[[int, bytes, bytes], bytes]:
    """What is left of a file between its safe and its newest bytes."""

    def cut(inode: int, safe: bytes, newest: bytes) -> bytes:
        chosen = rng.choice(("none", "all", "half", "zeros", "blocks")) if how == "any" else how
        if chosen == "none":
            return safe
        if chosen == "all":
            return newest
        if chosen == "half":
            return newest[: len(newest) // 2]
        result = bytearray(len(newest))  # its size is known, its blocks are not all there
        for begin in range(0, len(newest), BLOCK_BYTES):
            if chosen == "blocks" and rng.random() < 0.5:
                result[begin : begin + BLOCK_BYTES] = newest[begin : begin + BLOCK_BYTES]
        return bytes(result)

    return cut


def crash_states(disk: Disk, rng: random.Random, num_samples: int) -> Iterator[dict[str, bytes | None]]:
    """States after a crash at this moment: the extremes, each name alone, each name missing, and random others."""
    changes, files = disk.unsafe()
    everything = set(changes)
    ways = ("none", "all", "half", "zeros", "blocks") if files else ("all",)
    for how in ways:
        yield disk.state(everything, torn(how, rng))
    if changes:
        yield disk.state(set(), torn("all", rng))
    if len(changes) > 1:
        for change in changes[-6:]:
            yield disk.state({change}, torn("any", rng))
            yield disk.state(everything - {change}, torn("any", rng))
    if len(changes) > 2 or files:
        for _ in range(num_samples):
            yield disk.state({c for c in changes if rng.random() < 0.5}, torn("any", rng))


def materialise(state: dict[str, bytes | None], target: Path) -> None:
    target.mkdir()
    for path in sorted(state):
        content = state[path]
        if content is None:
            (target / path).mkdir()
        else:
            (target / path).write_bytes(content)


def fingerprint(state: dict[str, bytes | None], context: Any) -> bytes:
    """Equal for equal trees, drafts included."""
    return hashlib.sha256(repr((sorted(state.items()), context)).encode()).digest()
