"""Directories of a mounted file system: local disks, tmpfs, NFS.

The order of operations is the point of this file. A file's bytes are made durable before its name exists (write, fsync,
rename or link), and its name before anything that refers to it (fsync of the directory).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import uuid
from pathlib import Path

from arc_dist.checkpoint_store.backends.base import Capabilities, Entry, Source, num_cores, store_error, translated
from arc_dist.checkpoint_store.backends.nfs_client import ask_server, is_of_client, only_of_client
from arc_dist.errors import ConfigError, Fenced, StoreCorrupt, StoreGone

_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_MAX_INTERRUPTS = 1000  # of one call: a profiler's timer may interrupt a long reservation again and again
_NUM_SAMPLES = 8
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY}


class LocalBackend:
    """Files below one directory. Files and directories that it makes are private to the user (0600 and 0700)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)
        self.capabilities = Capabilities(
            exclusive_create=True, atomic_publish=True, durable=True, reserve=True, private=True, shared=True
        )

    def prepare(self) -> None:
        """Creates the root. Only the last directory of the path is created: a missing mount must not pass unnoticed."""
        where = str(self.root)
        if _is_directory(self.root):
            return
        for parent in (self.root, *self.root.parents):
            if _is_directory(parent) is False:
                raise ConfigError(
                    f"store {where}: {parent} is a file, not a directory. Name a directory for the checkpoints.",
                    file=str(parent),
                )
        if not _is_directory(self.root.parent):
            raise StoreGone(
                f"store {where}: {self.root.parent} does not exist. Create it (mkdir -p {self.root.parent}), or mount "
                "what should be there.",
                file=str(self.root.parent),
            )
        with translated("creating", where):
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.root, 0o700)
            self._sync_above_root()

    def make_directory(self, path: str) -> None:
        full = self._full(path)
        with translated("looking for", str(full)):
            ask_server(self.root, full)  # another host may just have removed it
        self._make_directories(full)

    def list(self, path: str) -> list[Entry]:
        full = self._full(path)
        with translated("listing", str(full)), os.scandir(full) as entries:
            return [Entry(entry.name, entry.is_dir()) for entry in entries if not is_of_client(entry.name)]

    def exists(self, path: str) -> bool:
        full = self._full(path)
        if _is_directory(full) is not None:
            return True
        with translated("looking for", str(full)):
            ask_server(self.root, full)
        return _is_directory(full) is not None

    def read(self, path: str, max_bytes: int) -> bytes:
        source = self.open(path)
        try:
            if source.nbytes > max_bytes:
                raise StoreCorrupt(
                    f"{self._full(path)}: {source.nbytes} bytes, more than such a file can have ({max_bytes}).",
                    file=path,
                )
            data = bytearray(source.nbytes)
            source.read_into(0, memoryview(data))
            return bytes(data)
        finally:
            source.close()

    def open(self, path: str) -> Source:
        full = self._full(path)
        with translated("opening", str(full)):
            # O_NONBLOCK: a named pipe put in a file's place must not block us; it has no effect on files.
            return _LocalSource(full, os.open(full, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))

    def claim(self, directory: str, name: str, data: bytes) -> bool:
        final = self._full(directory)
        if _is_directory(final) is not None:
            return False
        self._make_directories(final.parent)
        draft = final.parent / f".claim-{uuid.uuid4().hex}"
        with translated("creating", str(final)):
            try:
                os.mkdir(draft, 0o700)
                _write_file(draft / name, data)
                self._sync(draft)
                os.rename(draft, final)  # refuses to replace a directory that holds anything
            except BaseException as error:
                with contextlib.suppress(OSError):
                    os.unlink(draft / name)
                with contextlib.suppress(OSError):
                    os.rmdir(draft)
                if isinstance(error, OSError) and error.errno in _TAKEN:
                    return False
                raise
            self._sync(final.parent)
        return True

    def create(self, path: str, nbytes: int, *, exclusive: bool) -> _LocalSink:
        full = self._full(path)
        with translated("creating", str(full)):
            return _LocalSink(self, full, nbytes, exclusive)

    def create_exclusive(self, path: str, data: bytes) -> bool:
        final = self._full(path)
        draft = _draft_name(final)
        with translated("writing", str(final)):
            try:
                _write_file(draft, data)
                created = publish_exclusively(draft, final)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(draft)
            self._sync(final.parent)
        return created

    def remove(self, path: str) -> None:
        full = self._full(path)
        with translated("removing", str(full)):
            for name in (full, _claim_name(full)):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)

    def remove_directory(self, path: str) -> None:
        full = self._full(path)
        with translated("removing", str(full)), contextlib.suppress(FileNotFoundError):
            try:
                os.rmdir(full)
            except OSError as error:
                if error.errno not in _TAKEN or not only_of_client(full):
                    raise

    def sync_directory(self, path: str) -> None:
        # The names that lead there as well: who made those directories may have died before it could sync them.
        full = self._full(path)
        with translated("syncing", str(full)):
            self._sync(full)
            while full != self.root:
                full = full.parent
                self._sync(full)
            self._sync_above_root()

    def _full(self, path: str) -> Path:
        return self.root / path if path else self.root

    def _make_directories(self, directory: Path) -> None:
        """Creates the missing directories below the root; never the root itself, which may be an absent mount."""
        if directory == self.root:
            return
        there = _is_directory(directory)
        if there:
            return
        if there is False:
            raise ConfigError(
                f"{directory} is a file, not a directory. Name another run or directory.", file=str(directory)
            )
        self._make_directories(directory.parent)
        with translated("creating", str(directory)), contextlib.suppress(FileExistsError):
            os.mkdir(directory, 0o700)
            self._sync(directory.parent)

    def _sync_above_root(self) -> None:
        # A directory that we may pass through but not open (a host's /mnt) was not made by us either.
        with contextlib.suppress(PermissionError):
            self._sync(self.root.parent)

    def _sync(self, directory: Path) -> None:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some network and FUSE file systems know no fsync of a directory and keep names durable by themselves.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
                raise
        finally:
            os.close(descriptor)


class _LocalSink:
    def __init__(self, backend: LocalBackend, final: Path, nbytes: int, exclusive: bool) -> None:
        self._backend = backend
        self._final = final
        self._exclusive = exclusive
        self._draft = _draft_name(final)
        self._identity: tuple[int, int] | None = None
        self._descriptor: int | None = os.open(
            self._draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        try:
            self._identity = _identity(os.fstat(self._descriptor))
            _reserve(self._descriptor, nbytes)
        except BaseException:
            self.discard()
            raise

    def write(self, data: memoryview) -> None:
        assert self._descriptor is not None
        with translated("writing", str(self._final)):
            while data:
                data = data[os.write(self._descriptor, data) :]

    def publish(self) -> None:
        assert self._descriptor is not None
        with translated("writing", str(self._final)):
            # After a failed fsync the kernel may have dropped the pages: never tried again on this descriptor.
            os.fsync(self._descriptor)
            # Whatever close says, the descriptor is gone; another thread may already have its number.
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)  # NFS reports a full disk here at the latest
            if not self._exclusive:
                os.rename(self._draft, self._final)
            elif not publish_exclusively(self._draft, self._final):
                raise Fenced(
                    f"{self._final} exists already: another process writes this attempt at the step. Two runs must "
                    "not share one run name.",
                    file=str(self._final),
                )
            self._backend._sync(self._final.parent)  # pyright: ignore[reportPrivateUsage]

    def discard(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            with contextlib.suppress(OSError):
                os.close(descriptor)
        # The name may be ours even after an error: the call had been carried out and its answer was lost, or what
        # failed came after it. An attempt whose own file is in its way could never be repeated.
        with contextlib.suppress(OSError):
            if self._identity is not None and _identity(os.stat(self._final)) == self._identity:
                os.unlink(self._final)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(_claim_name(self._final))
        with contextlib.suppress(OSError):
            os.unlink(self._draft)


class _LocalSource:
    block_bytes = 1 << 20

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor: int | None = descriptor
        try:
            state = os.fstat(descriptor)
        except OSError:
            os.close(descriptor)
            raise
        if not stat.S_ISREG(state.st_mode):
            os.close(descriptor)
            raise StoreCorrupt(f"{path}: not a plain file. Restore it from a copy, or remove the step.", file=str(path))
        self.nbytes = state.st_size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        assert self._descriptor is not None
        with translated("reading", str(self._path)):
            while buffer:
                count = os.preadv(self._descriptor, [buffer], offset)
                if count == 0:
                    raise StoreCorrupt(
                        f"{self._path}: ends at byte {offset}, earlier than its manifest says.", file=str(self._path)
                    )
                offset += count
                buffer = buffer[count:]

    def num_streams(self) -> int:
        # From the page cache as many as cores can copy and hash. From a disk, several streams undo the kernel's reading
        # ahead, and what the disk's own work needs of the cores is taken from it.
        cores = min(8, num_cores())
        return max(2, cores) if self._is_cached() else max(1, cores // 2)

    def _is_cached(self) -> bool:
        """Whether a sample of the file is in memory; True where the file system cannot say."""
        assert self._descriptor is not None
        byte = bytearray(1)
        for number in range(_NUM_SAMPLES):
            try:
                os.preadv(self._descriptor, [byte], self.nbytes * number // _NUM_SAMPLES, os.RWF_NOWAIT)
            except BlockingIOError:
                return False
            except OSError:
                return True  # it knows no such reads, or an error that the reads themselves will meet
        return True

    def close(self) -> None:
        if self._descriptor is not None:
            # Nothing is lost with a reader's close: what was read is judged by its digest.
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None


def publish_exclusively(draft: Path, final: Path) -> bool:
    """Gives a finished file its name if the name is free; False, with the draft left, when it is taken.

    A hard link is refused by the server itself when the name exists, on NFS too. File systems without hard links
    (FUSE over object stores, SMB) get the same from an O_EXCL claim beside the name: its one owner may rename. The
    claim stays, since such a file system may show the new name late elsewhere. A crash between the two leaves a claim
    without a file, so this attempt can never be committed, which is safe.
    """
    try:
        os.link(draft, final)
    except FileExistsError:
        # NFS: the server may have done it and its answer been lost; the repeated call then finds our own link.
        if os.stat(draft).st_nlink == 1:
            return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        return _rename_with_claim(draft, final)
    os.unlink(draft)
    return True


def _rename_with_claim(draft: Path, final: Path) -> bool:
    claim = _claim_name(final)
    try:
        os.close(os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return False
    if _is_directory(final) is not None:
        os.unlink(claim)
        return False
    os.rename(draft, final)
    return True


def _draft_name(final: Path) -> Path:
    # Must not end in .safetensors: stock readers take every such file in the directory.
    return final.with_name(f".{final.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")


def _claim_name(final: Path) -> Path:
    return final.with_name(final.name + ".claim")


def _write_file(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def _is_directory(path: Path) -> bool | None:
    """Whether a directory is there; False for anything else, None for nothing. `pathlib` raises bare errors."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise store_error(error, "looking for", str(path)) from error


def _identity(state: os.stat_result) -> tuple[int, int]:
    return (state.st_dev, state.st_ino)


def _reserve(descriptor: int, nbytes: int) -> None:
    """Reserves space, so that a full disk is met before the first byte is written and not in the middle.

    glibc's posix_fallocate writes to every block where a file system has no such call (NFSv3); the system call itself
    says so instead, and then nothing is reserved.
    """
    if nbytes == 0:
        return
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None:
        return
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    for number in range(_MAX_INTERRUPTS):
        if fallocate(descriptor, 0, 0, nbytes) == 0:
            return
        code = ctypes.get_errno()
        if code == errno.EINTR and number < _MAX_INTERRUPTS - 1:
            continue
        if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            return
        raise OSError(code, os.strerror(code))
