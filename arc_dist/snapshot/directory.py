"""Directories in a memory file system: made with an owner, removed with it, collected when it died without a word.

Standard library only, for the supervisor's sake.

Ownership is a lock (flock) on the file `owner`, not a process id: a lock ends with its holder whatever killed it, and
it means the same in two containers that share /dev/shm but number their processes apart. Children forked by the owner
hold the lock too, until they exec or end; a directory therefore stays while anything that may write into it lives.

A directory whose owner is gone may still be wanted: by the next life of the same job. Such a one is signed
(`inheritance.py`), and is collected only when that life does not come.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import shutil
import tempfile
import time
from pathlib import Path

from arc_dist.snapshot import inheritance

_logger = logging.getLogger(__name__)

_PREFIX = "arc-dist-"
_UNBORN_PREFIX = "arc-unborn-"  # not locked yet; renamed to _PREFIX once it is
_SPILL_PREFIX = "arc-spill-"
_UNBORN_GRACE_S = 600.0
_REMOVE_ATTEMPTS = 100


class OwnedDirectory:
    """A private directory that lives as long as this object's process.

    Args:
        root: where to make it, such as /dev/shm. What dead owners of the same user left there is removed first.
        label: a word for people who list the root (a job id, a rank); anything unusual in it is replaced.
    """

    def __init__(self, root: Path, label: str = "") -> None:
        collect_dead(root)
        label = "".join(c if c.isalnum() else "_" for c in label)[:40]
        unique = f"{os.getuid()}-{label}-{os.getpid()}-{secrets.token_hex(4)}"
        unborn = root / (_UNBORN_PREFIX + unique)
        unborn.mkdir(mode=0o700)
        self._owner_fd = os.open(unborn / "owner", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._owner_fd, fcntl.LOCK_EX)
        os.write(self._owner_fd, f"{os.getpid()}\n".encode())
        self.path = root / (_PREFIX + unique)
        unborn.rename(self.path)
        self._pid = os.getpid()

    def close(self, *, keep: bool = False) -> None:
        """Removes the directory, unless it is to be kept. In a forked child only its share of the lock is given up."""
        if self._owner_fd < 0:
            return
        if os.getpid() == self._pid and not keep:
            remove_directory(self.path)
        os.close(self._owner_fd)
        self._owner_fd = -1


def collect_dead(root: Path) -> list[Path]:
    """Removes this user's directories under `root` whose owners are gone, and returns what was removed.

    Not those that a next life of their job may still come for.
    """
    removed: list[Path] = []
    uid = f"{os.getuid()}-"
    for path in root.iterdir():
        if path.name.startswith(_UNBORN_PREFIX + uid):
            dead = _is_old(path)
        elif path.name.startswith(_PREFIX + uid):
            # A signature first: one that is being taken over meanwhile is unlocked only once it is empty.
            dead = not inheritance.is_awaited(path) and is_unlocked(path / "owner")
        else:
            continue
        if dead:
            remove_directory(path)
            removed.append(path)
    return removed


def collect_of_agent(root: Path) -> None:
    """Removes what was kept for ranks that this process, a launcher's agent, would have started again."""
    for path in owned_directories(root):
        if inheritance.is_of_agent(path, os.getpid()) and is_unlocked(path / "owner"):
            remove_directory(path)


def remove_directory(path: Path) -> None:
    """Removes one of our directories, and the files outside it that its slots were moved to for lack of memory."""
    with contextlib.suppress(FileNotFoundError):
        for entry in path.rglob("*"):
            if entry.is_symlink():
                remove_spill(entry)
    _remove_tree(path)


def spill(link: Path) -> Path:
    """Moves what is to be written at `link` out of the memory file system: makes it a link into $TMPDIR.

    Readers open `link` as before. What was at `link` is lost.
    """
    target_dir = Path(tempfile.mkdtemp(prefix=f"{_SPILL_PREFIX}{os.getuid()}-"))
    target = target_dir / link.name
    target.touch(mode=0o600)
    draft = link.with_name(f".{link.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    draft.symlink_to(target)
    draft.rename(link)
    _logger.debug("%s is kept in %s", link, target)
    return target


def remove_spill(link: Path) -> None:
    """Removes the file that `spill` made for `link`, and the link; does nothing to any other kind of link."""
    target = Path(os.readlink(link))
    if target.parent.name.startswith(_SPILL_PREFIX):
        _remove_tree(target.parent)
    link.unlink(missing_ok=True)


def owned_directories(root: Path) -> list[Path]:
    """This user's directories under `root`, whoever owns them."""
    prefix = f"{_PREFIX}{os.getuid()}-"
    return sorted(path for path in root.iterdir() if path.name.startswith(prefix))


def is_unlocked(owner: Path) -> bool:
    """Whether nobody holds the lock on a directory's `owner` file."""
    try:
        descriptor = os.open(owner, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True  # being removed, by its owner or by another collector that died in the middle
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return False
    finally:
        os.close(descriptor)
    return True


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > _UNBORN_GRACE_S
    except FileNotFoundError:
        return False


def _remove_tree(path: Path) -> None:
    """Removes a directory that another supervisor may be collecting at the same time: what is gone is as wanted."""
    for _ in range(_REMOVE_ATTEMPTS):
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            if path.exists():
                continue
        return
    shutil.rmtree(path, ignore_errors=True)  # the other one is at work in it and will finish
