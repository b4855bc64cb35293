"""Object stores and other places that fsspec reaches by URL: ``s3://bucket/prefix``, ``memory://name``.

Large files go to S3 in parts (see `multipart`). Space cannot be reserved, so a full service is met while writing. A
commit needs a create that exactly one of several writers wins: where we do not know how to ask a service for that, the
store says `Unsupported` and writes nothing.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import threading
import urllib.parse
from typing import Any

from arc_dist.checkpoint_store.backends.base import Capabilities, Entry, Sink, Source, Unsupported, num_cores
from arc_dist.checkpoint_store.backends.multipart import Room, S3Sink
from arc_dist.checkpoint_store.backends.service_errors import NameTakenError, fenced, service_code, translated
from arc_dist.errors import ConfigError, StoreCorrupt, StoreError, StoreGone

_EXTRAS = {"s3": "s3", "s3a": "s3"}
_OPTIONS: dict[str, dict[str, Any]] = {
    # Listings must be fresh: another process commits. A dead service must be noticed within a bound.
    "s3": {
        "use_listings_cache": False,
        "config_kwargs": {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 3}},
    },
}
_BLOCK_BYTES = 16 << 20  # of one request of a reader
_ONE_PUT_BYTES = 4 << 30  # a conditional PUT must be one PUT: completion of a multipart upload may ignore it

# memory:// lives in this process, so a lock makes its create exclusive.
_MEMORY_LOCK = threading.Lock()


class RemoteBackend:
    """Files below one fsspec URL."""

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        self._protocol = {"s3a": "s3"}.get(parts.scheme, parts.scheme)
        if "@" in parts.netloc:
            raise ConfigError(
                f"store {self._protocol}://...: credentials do not belong in the URL, where logs would show them. Use "
                "the service's standard environment variables or files."
            )
        self.url = url
        self._root = f"{parts.netloc}{parts.path}".strip("/")
        self._filesystem: Any = None
        self._lock = threading.Lock()
        self._room = Room()
        self.capabilities = Capabilities(
            exclusive_create=self._protocol in ("s3", "memory"),
            atomic_publish=self._protocol in ("s3", "memory"),
            durable=self._protocol == "s3",
            reserve=False,
            private=False,
            shared=self._protocol != "memory",
        )

    def prepare(self) -> None:
        """Says at once what this service cannot do. Buckets are not created: a misspelt one would cost money."""
        self._require_exclusive_create()
        if self._protocol == "memory":
            self._fs().makedirs(self._full(""), exist_ok=True)

    def make_directory(self, path: str) -> None:
        """Nothing to do: a directory is there when a file is in it."""

    def list(self, path: str) -> list[Entry]:
        with translated("listing", self._name(path)):
            rows = self._fs().ls(self._full(path), detail=True)
        prefix = self._full(path).strip("/")
        entries: list[Entry] = []
        for row in rows:
            name = str(row["name"]).strip("/")
            if name == prefix and row["type"] == "file" and not str(row["name"]).endswith("/") and len(rows) == 1:
                raise ConfigError(f"{self._name(path)} is a file, not a directory. Correct the path.", file=path)
            if name != prefix:  # some services list a directory's own marker
                entries.append(Entry(name.rsplit("/", 1)[-1], row["type"] == "directory"))
        return entries

    def exists(self, path: str) -> bool:
        full = self._full(path)
        if not path and self._protocol == "s3":
            full = full.split("/", 1)[0]  # a prefix without keys is an empty store, not a missing one
        try:
            with translated("looking for", self._name(path)):
                self._fs().info(full)
        except StoreGone as error:
            if service_code(error.__cause__) == "NoSuchBucket":
                raise
            return False
        return True

    def read(self, path: str, max_bytes: int) -> bytes:
        source = self.open(path)
        if source.nbytes > max_bytes:
            raise StoreCorrupt(
                f"{self._name(path)}: {source.nbytes} bytes, more than such a file can have ({max_bytes}).", file=path
            )
        data = bytearray(source.nbytes)
        source.read_into(0, memoryview(data))
        return bytes(data)

    def open(self, path: str) -> Source:
        with translated("opening", self._name(path)):
            nbytes = int(self._fs().info(self._full(path))["size"])
        return _RemoteSource(self, path, nbytes)

    def claim(self, directory: str, name: str, data: bytes) -> bool:
        return self.create_exclusive(f"{directory}/{name}", data)

    def create(self, path: str, nbytes: int, *, exclusive: bool) -> Sink:
        if exclusive:
            self._require_exclusive_create()
            if self.exists(path):  # said before the upload; what decides is `publish`
                raise fenced(self._name(path))
        if self._protocol == "memory":
            return _MemorySink(self, path, exclusive)
        where = self._name(path)
        with translated("creating", where):
            if self._protocol == "s3":
                return S3Sink(self._fs(), self._full(path), where, nbytes, exclusive=exclusive, room=self._room)
            return _PlainSink(self, path, self._fs().open(self._full(path), "wb", block_size=_BLOCK_BYTES))

    def create_exclusive(self, path: str, data: bytes) -> bool:
        self._require_exclusive_create()
        full = self._full(path)
        guard: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        options: dict[str, Any] = {}
        if self._protocol == "memory":
            guard = _MEMORY_LOCK
        else:
            options = {"chunksize": _ONE_PUT_BYTES}
        try:
            with guard, translated("writing", self._name(path)):
                self._fs().pipe_file(full, data, mode="create", **options)
        except NameTakenError:
            return False
        return True

    def remove(self, path: str) -> None:
        names = (path,) if self._protocol == "memory" else (path, f"{path}.claim")
        for name in names:
            with contextlib.suppress(StoreGone), translated("removing", self._name(path)):
                self._fs().rm_file(self._full(name))

    def replace(self, path: str, data: bytes) -> None:
        """Writes a small file whole, over whatever is there."""
        with translated("writing", self._name(path)):
            self._fs().pipe_file(self._full(path), data)

    def remove_directory(self, path: str) -> None:
        if self._protocol == "memory":
            with contextlib.suppress(StoreGone, OSError), translated("removing", self._name(path)):
                self._fs().rmdir(self._full(path))

    def sync_directory(self, path: str) -> None:
        """Nothing to do: there are no directories, and an acknowledged PUT is durable."""

    def fetch(self, path: str, start: int, end: int) -> bytes:
        """The bytes [start, end) of a file; fewer when it is shorter."""
        with translated("reading", self._name(path)):
            return self._fs().cat_file(self._full(path), start=start, end=end)

    def _fs(self) -> Any:
        with self._lock:
            if self._filesystem is None:
                self._filesystem = self._connect()
            return self._filesystem

    def _connect(self) -> Any:
        fsspec = importlib.import_module("fsspec")
        try:
            # A copy: botocore changes what it is given, and another backend would not find the same client again.
            options = copy.deepcopy(_OPTIONS.get(self._protocol, {}))
            return fsspec.filesystem(self._protocol, **options)
        except ImportError as error:
            extra = _EXTRAS.get(self._protocol)
            remedy = f'pip install "arc-dist[{extra}]"' if extra else f"install what fsspec asks for: {error}"
            raise ConfigError(f"store {self.url}: the package for {self._protocol}:// is missing. {remedy}") from error
        except ValueError as error:
            raise ConfigError(
                f"store {self.url}: unknown kind of URL {self._protocol}://. Use a local directory or s3://bucket/prefix."
            ) from error

    def _require_exclusive_create(self) -> None:
        self._fs()
        if not self.capabilities.exclusive_create:
            raise Unsupported(
                f"store {self.url}: {self._protocol}:// gives no create that exactly one of several writers wins, so a "
                "commit could not be atomic. Use a local directory, NFS or s3://."
            )

    def _full(self, path: str) -> str:
        joined = f"{self._root}/{path}" if path else self._root
        return f"/{joined}" if self._protocol == "memory" else joined

    def _name(self, path: str) -> str:
        return f"{self.url.rstrip('/')}/{path}" if path else self.url


class _PlainSink:
    """A file that fsspec writes under its name at once, where nothing exclusive can be promised."""

    def __init__(self, backend: RemoteBackend, path: str, handle: Any) -> None:
        self._backend = backend
        self._path = path
        self._where = f"{backend.url}/{path}"
        self._handle = handle

    def write(self, data: memoryview) -> None:
        with translated("writing", self._where):
            self._handle.write(data)

    def publish(self) -> None:
        with translated("writing", self._where):
            self._handle.close()

    def discard(self) -> None:
        with contextlib.suppress(Exception):  # the error that led here is the one to tell
            if hasattr(self._handle, "discard"):
                self._handle.discard()
        # fsspec's finaliser would otherwise close, and so complete, the upload. Plain file objects have none.
        with contextlib.suppress(AttributeError):
            self._handle.closed = True
        with contextlib.suppress(StoreError):  # as above
            self._backend.remove(self._path)


class _MemorySink:
    """A file of ``memory://``, kept aside until it is published."""

    def __init__(self, backend: RemoteBackend, path: str, exclusive: bool) -> None:
        self._backend = backend
        self._path = path
        self._exclusive = exclusive
        self._data = bytearray()
        self._named = False

    def write(self, data: memoryview) -> None:
        self._data += data

    def publish(self) -> None:
        if not self._exclusive:
            self._backend.replace(self._path, bytes(self._data))
        elif not self._backend.create_exclusive(self._path, bytes(self._data)):
            raise fenced(f"{self._backend.url}/{self._path}")
        self._named = True

    def discard(self) -> None:
        self._data.clear()
        if self._named:
            self._backend.remove(self._path)


class _RemoteSource:
    block_bytes = _BLOCK_BYTES

    def num_streams(self) -> int:
        return max(4, min(8, num_cores()))  # requests wait for their answers

    def __init__(self, backend: RemoteBackend, path: str, nbytes: int) -> None:
        self._backend = backend
        self._path = path
        self.nbytes = nbytes

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if not len(buffer):
            return
        # A range that begins at the end or behind it is an error of its own to a service (416 InvalidRange).
        inside = offset < self.nbytes
        data = self._backend.fetch(self._path, offset, offset + len(buffer)) if inside else b""
        if len(data) != len(buffer):
            raise StoreCorrupt(
                f"{self._path}: {len(data)} of {len(buffer)} bytes at {offset}: shorter than its manifest says.",
                file=self._path,
            )
        buffer[:] = data

    def close(self) -> None:
        """Nothing is held open."""
