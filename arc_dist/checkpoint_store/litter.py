"""What killed processes left in the directory of a run, outside of its steps. Finds and removes it.

These are only found on file systems; on object stores nothing has a name before it is whole (but a probe of
`Store.check_writable`, 40 bytes long). What a process may leave when it dies between two calls:

    .claim-<32 hex>/            the directory of a step on its way to its name, with `attempt.json` or without
    .probe-<32 hex>             the file with which `Store.check_writable` tries the storage
    .<name>.<pid>-<8 hex>.tmp   a draft of a probe, of marks or of an owner
    <name>.json.claim           where there are no hard links: the right to create marks or an owner, never used

Nobody can tell a dead process from one that sleeps, so only what has not changed for the grace period goes. Should its
writer wake up after all, its next call fails and nothing of it is ever seen: a claim is renamed before it is emptied,
so that it cannot become a step without its attempt, and the right to a name goes after the draft that would get it.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import uuid
from collections.abc import Iterable
from pathlib import Path

from arc_dist.checkpoint_store.backends import LocalBackend
from arc_dist.checkpoint_store.backends.base import translated
from arc_dist.checkpoint_store.format import ATTEMPT_NAME
from arc_dist.errors import StoreGone

_CLAIM = re.compile(r"\.claim-[0-9a-f]{32}")
_PROBE = re.compile(r"\.probe-[0-9a-f]{32}")
_DRAFT = re.compile(r"\.(?P<name>.+)\.[0-9]+-[0-9a-f]{8}\.tmp")
_RIGHT = re.compile(r"(?P<name>(marks|owner)-[0-9]{8,12}\.json)\.claim")


def find_litter(backend: LocalBackend, run: str, *, grace_s: float, now: float) -> dict[str, tuple[int, float]]:
    """What may be removed: names below the run, each with its bytes and the seconds since it changed last.

    Raises:
        StoreError: see `arc_dist.errors`.
    """
    if not backend.exists(run):
        return {}
    directory = backend.root / run
    entries = backend.list(run)
    files = {entry.name for entry in entries if not entry.is_directory}
    found: dict[str, tuple[int, float]] = {}
    for entry in entries:
        with contextlib.suppress(StoreGone), translated("looking at", str(directory / entry.name)):
            inside = _claimed(directory / entry.name) if entry.is_directory and _CLAIM.fullmatch(entry.name) else None
            if inside is None and (entry.is_directory or not _is_litter(entry.name, files)):
                continue
            states = [os.lstat(path) for path in (directory / entry.name, *(inside or ()))]
            age_s = now - max(state.st_mtime for state in states)
            if age_s >= grace_s:
                found[entry.name] = (sum(s.st_size for s in states[1:] or states) if inside != [] else 0, age_s)
    # A right whose draft is younger than it may be in use, or has been taken up again.
    drafted = {m["name"] for name in files - found.keys() if (m := _DRAFT.fullmatch(name))}
    return {n: size for n, size in found.items() if not ((m := _RIGHT.fullmatch(n)) and m["name"] in drafted)}


def remove_litter(backend: LocalBackend, run: str, names: Iterable[str]) -> None:
    """Removes what `find_litter` has found; what is gone meanwhile is passed over.

    Raises:
        StoreError: see `arc_dist.errors`.
    """
    directory = backend.root / run
    for name in sorted(names, key=lambda name: _RIGHT.fullmatch(name) is not None):
        with contextlib.suppress(StoreGone), translated("removing", str(directory / name)):
            if not _CLAIM.fullmatch(name):
                os.unlink(directory / name)
                continue
            mine = directory / f".claim-{uuid.uuid4().hex}"
            os.rename(directory / name, mine)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(mine / ATTEMPT_NAME)
            os.rmdir(mine)
    backend.sync_directory(run)


def _is_litter(name: str, files: set[str]) -> bool:
    right = _RIGHT.fullmatch(name)
    if right is not None:
        return right["name"] not in files  # one that was used stays beside what it made
    return _PROBE.fullmatch(name) is not None or _DRAFT.fullmatch(name) is not None


def _claimed(path: Path) -> list[Path] | None:
    """What is in a claim; None when something there is not ours, or it only leads to another directory."""
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        return None
    names = os.listdir(path)
    return [path / name for name in names] if set(names) <= {ATTEMPT_NAME} else None
