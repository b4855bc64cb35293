"""Object stores and other places that fsspec reaches by URL: ``s3://bucket/prefix``, ``memory://name``.

A rank has one upload at a time, in parts, from one buffer; space cannot be reserved, so a full service is met while
writing. A commit needs a create that exactly one of several writers wins: where we do not know how to ask a service for
that, the store says `Unsupported` and writes nothing.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import importlib
import threading
import urllib.parse
from collections.abc import Generator
from typing import Any, cast

from arc_dist.checkpoint_store.backends.base import (
    Capabilities,
    Entry,
    Sink,
    Source,
    Unsupported,
    num_cores,
    store_error,
)
from arc_dist.errors import (
    ArcError,
    ConfigError,
    Fenced,
    StoreCorrupt,
    StoreDenied,
    StoreError,
    StoreFull,
    StoreGone,
    StoreTransient,
)

_EXTRAS = {"s3": "s3", "s3a": "s3"}
_OPTIONS: dict[str, dict[str, Any]] = {
    # Listings must be fresh: another process commits. A dead service must be noticed within a bound.
    "s3": {
        "use_listings_cache": False,
        "config_kwargs": {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 3}},
    },
}
_BLOCK_BYTES = 16 << 20  # parts of a multipart upload; the buffer that one rank needs
_NO_MULTIPART_BYTES = 4 << 30  # a conditional PUT must be one PUT: completion of a multipart upload may ignore it

_DENIED_CODES = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "403"}
_FULL_CODES = {"QuotaExceeded", "QuotaExceededException", "EntityTooLarge", "507"}
_GONE_CODES = {"NoSuchBucket", "NoSuchKey", "404"}
_SHORTER_CODES = {"InvalidRange", "416"}
_CONFLICT_CODES = {"PreconditionFailed", "412"}
_BUSY_CODES = {"ConditionalRequestConflict", "SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "503"}

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
        with self._translated("listing", path):
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
            with self._translated("looking for", path):
                self._fs().info(full)
        except StoreGone as error:
            if _service_code(error.__cause__) == "NoSuchBucket":
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
        with self._translated("opening", path):
            nbytes = int(self._fs().info(self._full(path))["size"])
        return _RemoteSource(self, path, nbytes)

    def claim(self, directory: str, name: str, data: bytes) -> bool:
        return self.create_exclusive(f"{directory}/{name}", data)

    def create(self, path: str, nbytes: int, *, exclusive: bool) -> Sink:
        del nbytes  # object stores reserve nothing
        if exclusive:
            self._require_exclusive_create()
            if self.exists(path):  # said before the upload; what decides is `publish`
                raise self.fenced(path)
        if self._protocol == "memory":
            return _MemorySink(self, path, exclusive)
        with self._translated("creating", path):
            # "x" makes the request that ends the upload conditional.
            handle = self._fs().open(self._full(path), "xb" if exclusive else "wb", block_size=_BLOCK_BYTES)
        return _RemoteSink(self, path, handle, exclusive)

    def create_exclusive(self, path: str, data: bytes) -> bool:
        self._require_exclusive_create()
        full = self._full(path)
        guard: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        options: dict[str, Any] = {}
        if self._protocol == "memory":
            guard = _MEMORY_LOCK
        else:
            options = {"chunksize": _NO_MULTIPART_BYTES}
        try:
            with guard, self._translated("writing", path):
                self._fs().pipe_file(full, data, mode="create", **options)
        except _NameTakenError:
            return False
        return True

    def remove(self, path: str) -> None:
        names = (path,) if self._protocol == "memory" else (path, f"{path}.claim")
        for name in names:
            with contextlib.suppress(StoreGone), self._translated("removing", path):
                self._fs().rm_file(self._full(name))

    def replace(self, path: str, data: bytes) -> None:
        """Writes a small file whole, over whatever is there."""
        with self._translated("writing", path):
            self._fs().pipe_file(self._full(path), data)

    def fenced(self, path: str) -> Fenced:
        """The error of a name that another writer has taken."""
        return Fenced(
            f"{self._name(path)} exists already: another process writes this attempt at the step. Two runs must "
            "not share one run name.",
            file=path,
        )

    def remove_directory(self, path: str) -> None:
        if self._protocol == "memory":
            with contextlib.suppress(StoreGone, OSError), self._translated("removing", path):
                self._fs().rmdir(self._full(path))

    def sync_directory(self, path: str) -> None:
        """Nothing to do: there are no directories, and an acknowledged PUT is durable."""

    def fetch(self, path: str, start: int, end: int) -> bytes:
        """The bytes [start, end) of a file; fewer when it is shorter."""
        with self._translated("reading", path):
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

    @contextlib.contextmanager
    def _translated(self, doing: str, path: str) -> Generator[None]:
        try:
            yield
        except ArcError:
            raise
        except FileExistsError as error:
            raise _NameTakenError from error
        except Exception as error:  # client libraries raise errors of their own that are no OSError
            translated = _service_error(error, doing, self._name(path))
            if translated is None:
                raise
            raise translated from error


class _NameTakenError(Exception):
    """A conditional create was refused."""


class _RemoteSink:
    """One upload. The name appears with the request that ends it.

    Not every service looks at the condition when a multipart upload is completed (radosgw 16 does not), so such an
    upload first creates an object ``<name>.claim``, conditionally and in one PUT; only its creator completes.
    """

    def __init__(self, backend: RemoteBackend, path: str, handle: Any, exclusive: bool) -> None:
        self._backend = backend
        self._path = path
        self._handle = handle
        self._exclusive = exclusive
        self._claimed = False
        self._named = False
        self._nbytes = 0

    def write(self, data: memoryview) -> None:
        with self._backend._translated("writing", self._path):  # pyright: ignore[reportPrivateUsage]
            self._handle.write(data)
        self._nbytes += len(data)

    def publish(self) -> None:
        if self._exclusive and self._nbytes == 0:
            self._abandon()  # s3fs ends an empty upload with an unconditional request
            if not self._backend.create_exclusive(self._path, b""):
                raise self._backend.fenced(self._path)
            self._named = True
            return
        if self._exclusive and self._nbytes >= _BLOCK_BYTES:
            self._claimed = self._backend.create_exclusive(f"{self._path}.claim", b"")
            if not self._claimed or self._backend.exists(self._path):
                self.discard()
                raise self._backend.fenced(self._path)
        try:
            with self._backend._translated("writing", self._path):  # pyright: ignore[reportPrivateUsage]
                self._handle.close()
        except _NameTakenError as error:
            self.discard()
            raise self._backend.fenced(self._path) from error
        self._named = True

    def discard(self) -> None:
        """Ends the upload without completing it. Where a file is visible while written, it is removed."""
        self._abandon()
        if self._named or not self._backend.capabilities.atomic_publish:
            self._remove(self._path)
        if self._claimed:
            self._remove(f"{self._path}.claim")

    def _abandon(self) -> None:
        with contextlib.suppress(Exception):  # the error that led here is the one to tell
            if hasattr(self._handle, "discard"):
                self._handle.discard()
        # fsspec's finaliser would otherwise close, and so complete, the upload. Plain file objects have none.
        with contextlib.suppress(AttributeError):
            self._handle.closed = True

    def _remove(self, path: str) -> None:
        with contextlib.suppress(StoreError):  # as above
            self._backend.remove(path)


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
            raise self._backend.fenced(self._path)
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


def _service_code(error: BaseException | None) -> str:
    """The service's own error code (``"NoSuchBucket"``), looked for along the chain of causes; '' without one."""
    for _ in range(8):
        if error is None:
            break
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(cast("dict[str, Any]", response).get("Error", {}).get("Code", ""))
        error = error.__cause__ or error.__context__
    return ""


def _service_error(error: Exception, doing: str, where: str) -> Exception | None:
    """Our error for a client library's. Only codes are quoted: its text may hold more than one wants in a log."""
    code = _service_code(error)
    fields: dict[str, object] = {"file": where, "code": code}
    if code in _CONFLICT_CODES:
        return _NameTakenError(where)
    if code in _FULL_CODES:
        return StoreFull(f"{doing} {where}: {code}. Raise the quota, or choose another store.", **fields)
    if code in _DENIED_CODES or type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        return StoreDenied(
            f"{doing} {where}: {code or 'no credentials found'}. Check the credentials and the rights of this user.",
            **fields,
        )
    if code in _SHORTER_CODES:
        return StoreCorrupt(
            f"{doing} {where}: shorter than it was. Restore it from a copy, or an older step.", **fields
        )
    if code in _GONE_CODES:
        return StoreGone(f"{doing} {where}: {code}. Create the bucket, or correct the URL.", **fields)
    if code in _BUSY_CODES:
        return StoreTransient(f"{doing} {where}: {code}. It may succeed when tried again.", **fields)
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        return store_error(error, doing, where)
    if type(error).__module__.split(".")[0] in ("botocore", "aiobotocore", "aiohttp", "fsspec", "asyncio"):
        return StoreTransient(f"{doing} {where}: {type(error).__name__}. It may succeed when tried again.", **fields)
    if isinstance(error, OSError):
        return StoreError(f"{doing} {where}: {code or 'invalid argument'}. Look at the service's own log.", **fields)
    return None
