"""The files of a committed step, opened for reading: sizes and heads are checked before anything in them is used."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import cast

from arc_dist.checkpoint_store.backends import Backend, Source
from arc_dist.checkpoint_store.format import new_hash
from arc_dist.checkpoint_store.manifest import Chunk, FileEntry, Manifest
from arc_dist.errors import ArcError, StoreCorrupt

REMEDY = "Restore an older step, or this one from a copy."


@dataclasses.dataclass(frozen=True, slots=True)
class Directory:
    """The directory of a committed step.

    Attributes:
        backend: where it is.
        path: below the backend's root.
        manifest: what it says, verified.
    """

    backend: Backend
    path: str
    manifest: Manifest

    def where(self, name: str = "") -> str:
        """A file of the directory, or itself, for messages."""
        return "/".join(part for part in (self.backend.url.rstrip("/"), self.path, name) if part)

    def beside(self, directory: str) -> str:
        """The path of another directory of the same run."""
        return "/".join([*self.path.split("/")[:-1], directory])

    def open_file(self, entry: FileEntry) -> tuple[Source, bytes]:
        """Opens a file after checking its size and its verified head: the header of tensors, else the whole of it.

        Raises:
            StoreGone, StoreCorrupt: it is missing, or not what the manifest says.
        """
        source = self.backend.open(f"{self.path}/{entry.name}")
        try:
            where = self.where(entry.name)
            if source.nbytes != entry.nbytes:
                raise StoreCorrupt(
                    f"{where}: {source.nbytes} bytes, its manifest says {entry.nbytes}. {REMEDY}", file=where
                )
            head = bytearray(entry.header_nbytes if entry.kind == "tensors" else entry.nbytes)
            source.read_into(0, memoryview(head))
            hasher = new_hash(self.manifest.hash)
            hasher.update(head)
            if hasher.hexdigest() != entry.digest:
                raise StoreCorrupt(f"{where}: its bytes differ from the manifest's digest. {REMEDY}", file=where)
            return source, bytes(head)
        except BaseException:
            source.close()
            raise

    def open_referred(self, chunk: Chunk) -> tuple[Source, bytes]:
        """Opens the file of another step that has a chunk of this one; the chunk's digest is what vouches for it.

        Raises:
            StoreGone, StoreCorrupt: it is missing, or too short.
        """
        path = f"{self.beside(chunk.directory or '')}/{chunk.file}"
        source = self.backend.open(path)
        if source.nbytes < chunk.start + chunk.nbytes:
            nbytes = source.nbytes
            source.close()
            where = f"{self.backend.url.rstrip('/')}/{path}"
            raise StoreCorrupt(
                f"{where}: {nbytes} bytes, step {self.manifest.step} needs more of it. {REMEDY}", file=where
            )
        return source, b""

    def corrupt(self, tensor: str, chunk: Chunk) -> StoreCorrupt:
        """The error of a tensor whose bytes differ."""
        where = self.where(chunk.file)
        if chunk.directory is not None:
            where = f"{self.backend.url.rstrip('/')}/{self.beside(chunk.directory)}/{chunk.file}"
        return StoreCorrupt(
            f"{where}: the bytes of tensor {tensor} differ from the manifest's digest. {REMEDY}",
            file=where,
            tensor=tensor,
        )


class OpenFiles:
    """The files of a step, each opened and checked once, whichever thread asks first."""

    def __init__(self, directory: Directory) -> None:
        self.directory = directory
        self._entries = {entry.name: entry for entry in directory.manifest.files}
        self._lock = threading.Lock()
        self._open: dict[tuple[str | None, str], tuple[Source, bytes] | ArcError] = {}

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *exc: object) -> None:
        for opened in self._open.values():
            if not isinstance(opened, ArcError):
                opened[0].close()

    def num_streams(self) -> int:
        """How many parts are best read at once of the files that were asked for so far."""
        files = [opened for opened in self._open.values() if not isinstance(opened, ArcError)]
        return max((source.num_streams() for source, _ in files), default=1)

    def get(self, name: str) -> tuple[Source, bytes]:
        return self._get((None, name), lambda: self.directory.open_file(self._entries[name]))

    def of(self, chunk: Chunk) -> tuple[Source, bytes]:
        """The file that has a chunk, of whichever step."""
        if chunk.directory is None:
            return self.get(chunk.file)
        return self._get((chunk.directory, chunk.file), lambda: self.directory.open_referred(chunk))

    def _get(self, key: tuple[str | None, str], open_it: Callable[[], tuple[Source, bytes]]) -> tuple[Source, bytes]:
        with self._lock:
            opened = self._open.get(key)
            if opened is None:
                try:
                    opened = open_it()
                except ArcError as error:
                    if error.retryable:
                        raise
                    opened = error
                self._open[key] = opened
        if isinstance(opened, ArcError):
            raise opened
        return opened


def is_in(chunk: Chunk, file: str) -> bool:
    """Whether a chunk lies in a file of the step's own directory."""
    return chunk.directory is None and chunk.file == file


def digest_range(source: Source, start: int, nbytes: int, algorithm: str, buffer: memoryview | None = None) -> str:
    """Digest of a range of a file, read block by block (into `buffer`, if given) so that it is hashed while cached."""
    hasher = new_hash(algorithm)
    at_once = source.block_bytes
    scratch = memoryview(bytearray(min(nbytes, at_once))) if buffer is None else None
    for begin in range(0, nbytes, at_once):
        size = min(at_once, nbytes - begin)
        block = buffer[begin : begin + size] if buffer is not None else cast("memoryview", scratch)[:size]
        source.read_into(start + begin, block)
        hasher.update(block)
    return hasher.hexdigest()
