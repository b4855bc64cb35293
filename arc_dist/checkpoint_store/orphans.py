"""Directories without a manifest: what saves, removals and copies left that never ended. Finds and removes them.

Is it left over, or still being written? Nothing in the directory can say so for certain: `attempt.json` names the
owner and the generation, but a process of another host may sleep for hours and go on. So a directory is due only when

1. it is not an attempt of the `owner` who asks (a job discards its own attempts by itself), and
2. nothing in it has changed for the grace period. A save in progress changes it all the time: each block that is
   written makes a draft longer or newer, each file that is finished gets its name. On a file system the newest time of
   change in it tells; elsewhere, nothing tells the time, so what the directory looks like (names and sizes) is noted in
   the run's marks, and it is due once it has looked the same for the grace period in a later call.

An attempt of a start of the job that was replaced (`owners`) may not commit any more, so on a file system whoever
replaced it need not wait for 2: see `collect_own`. On an object store a commit that was on its way at that moment
would leave a manifest without its files, so there it waits for the grace period as well.

Should the save go on after all, it must not become a checkpoint without its files. Whoever removes a directory
therefore first takes the name of the manifest, with a tombstone, by the same exclusive create that a commit needs: one
of the two wins. If the commit wins, the directory is a checkpoint and stays. If the tombstone does, the commit finds
the name taken, and the save fails as one that was overtaken.

What a step or an attempt refers to is never an orphan, whatever it lacks (see `references`).

A copy that was killed and taken up again may leave drafts (`.*.tmp`) in a directory that is a checkpoint now. Nobody
writes to such a directory any more, so drafts there that are older than the grace period go too; and so does what
killed processes left in the run's own directory (see `litter`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any, cast

from arc_dist.checkpoint_store import pins
from arc_dist.checkpoint_store.backends import Backend, LocalBackend
from arc_dist.checkpoint_store.backends.base import translated
from arc_dist.checkpoint_store.format import (
    ATTEMPT_NAME,
    MANIFEST_NAME,
    MAX_ATTEMPT_BYTES,
    digest_of,
    is_file_name,
    parse_json,
    step_of_directory,
)
from arc_dist.checkpoint_store.litter import find_litter, remove_litter
from arc_dist.checkpoint_store.owners import replaced_owners
from arc_dist.checkpoint_store.references import protectors
from arc_dist.errors import ConfigError, StoreCorrupt, StoreGone

DEFAULT_GRACE_S = 86400.0
MIN_GRACE_S = 600.0  # longer than any pause of a healthy save: one block's write with all its retries

_BODY = b'{\n"format": "arc-dist-removed",\n"note": "never a checkpoint; `arc prune --orphans` removes the rest"'
TOMBSTONE = _BODY + f',\n"manifest_digest": "sha256:{digest_of(_BODY)}"\n}}\n'.encode()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Orphan:
    """A directory without a manifest, or one with drafts that nobody will finish.

    Attributes:
        directory: its name below the run; empty for the run's own directory.
        step: the step that it was for; None for the run's own directory.
        owner: who began it; None when that is not known any more.
        nbytes: of the files in it.
        age_s: for how long nothing in it has changed, as far as is known.
        due: whether it may be removed.
        why: the reason.
        removed: whether it was.
        drafts: when not empty, only these names in the directory are meant; it is a checkpoint, or the run.
    """

    directory: str
    step: int | None
    owner: str | None
    nbytes: int
    age_s: float
    due: bool
    why: str
    removed: bool = False
    drafts: tuple[str, ...] = ()


def find_orphans(
    backend: Backend,
    run: str,
    *,
    grace_s: float = DEFAULT_GRACE_S,
    owner: str | None = None,
    is_void: Callable[[str | None, int], bool] = lambda owner, step: False,
    now: float | None = None,
) -> list[Orphan]:
    """Looks at the directories without a manifest, and for drafts in the others. Changes nothing.

    Args:
        backend: where the run is.
        run: its name.
        grace_s: how long nothing must have changed, at least `MIN_GRACE_S`.
        owner: of the job that asks; its own attempts are never due.
        is_void: whether an attempt of this owner at this step can come to nothing any more; it is due at once.
        now: seconds since 1970; by default, now.

    Raises:
        ConfigError: the grace period is too short.
        StoreError: see `arc_dist.errors`.
    """
    if not grace_s >= MIN_GRACE_S:
        raise ConfigError(
            f"orphans: a grace period of {grace_s:.0f} s: at least {MIN_GRACE_S:.0f} s are needed, because a save in "
            "progress may pause that long."
        )
    at = time.time() if now is None else now
    marks = pins.read_marks(backend, run)
    found: list[Orphan] = []
    without = _without_manifest(backend, run)
    # A removal that crashed leaves files without a manifest, and a step may refer to them all the same.
    referred = protectors(backend, run) if without else {}
    for directory in without:
        if directory in referred:
            continue
        with contextlib.suppress(StoreGone):  # removed or renamed meanwhile: no orphan
            found.append(_examine(backend, run, directory, marks, grace_s, owner, is_void, at))
    if isinstance(backend, LocalBackend):  # elsewhere an unfinished upload has no name
        found += _old_drafts(backend, run, [orphan.directory for orphan in found], grace_s, at)
        found += _litter(backend, run, grace_s, at)
    return found


def collect_orphans(
    backend: Backend,
    run: str,
    *,
    grace_s: float = DEFAULT_GRACE_S,
    owner: str | None = None,
    is_void: Callable[[str | None, int], bool] = lambda owner, step: False,
    now: float | None = None,
) -> list[Orphan]:
    """Removes the directories that are due (see the module), and notes the others where that is needed.

    Arguments and errors as `find_orphans`.

    Returns:
        All that was found, with what became of it.
    """
    at = time.time() if now is None else now
    found = find_orphans(backend, run, grace_s=grace_s, owner=owner, is_void=is_void, now=at)
    done = [_collect(backend, run, orphan) if orphan.due else orphan for orphan in found]
    if not isinstance(backend, LocalBackend):
        _note(backend, run, [orphan.directory for orphan in done if not orphan.removed], at)
    return done


def collect_own(backend: Backend, run: str, *, owner: str, held_elsewhere: Collection[int]) -> list[Orphan]:
    """What a running job removes by itself: what killed processes of the same job left, with the shortest grace period.

    Args:
        backend: where the run is.
        run: its name.
        owner: of the job.
        held_elsewhere: steps that another tier holds. What looks like an attempt at one here may be a copy of it that
            was interrupted and will be taken up again, so it is given the grace period.

    Returns:
        What was removed.

    Raises:
        StoreError: see `arc_dist.errors`.
    """
    is_local = isinstance(backend, LocalBackend)
    replaced = functools.cache(lambda: replaced_owners(backend, run, owner))  # read only if something is left over

    def is_void(began_by: str | None, step: int) -> bool:
        return is_local and step not in held_elsewhere and began_by in replaced()

    done = collect_orphans(backend, run, grace_s=MIN_GRACE_S, owner=owner, is_void=is_void)
    return [orphan for orphan in done if orphan.removed]


def _without_manifest(backend: Backend, run: str) -> list[str]:
    try:
        entries = backend.list(run)
    except StoreGone:
        if backend.exists(""):
            return []  # a run that has not begun
        raise
    names = sorted(e.name for e in entries if e.is_directory and step_of_directory(e.name) is not None)
    return [name for name in names if _manifest_of(backend, f"{run}/{name}") in (None, TOMBSTONE)]


def _manifest_of(backend: Backend, path: str) -> bytes | None:
    """The tombstone if it is one, b"" for any other manifest, None when there is none."""
    try:
        return TOMBSTONE if backend.read(f"{path}/{MANIFEST_NAME}", len(TOMBSTONE)) == TOMBSTONE else b""
    except StoreGone:
        return None
    except StoreCorrupt:
        return b""  # larger than a tombstone


def _examine(
    backend: Backend,
    run: str,
    directory: str,
    marks: pins.Marks,
    grace_s: float,
    owner: str | None,
    is_void: Callable[[str | None, int], bool],
    now: float,
) -> Orphan:
    path = f"{run}/{directory}"
    step = step_of_directory(directory)
    assert step is not None
    sizes = _sizes(backend, path)
    began_by = _owner_of(backend, path)
    since = _changed_at(backend, path, directory, sizes, marks, now)
    foreign = sorted(name for name in sizes if not _is_ours(name))
    age_s = now - since
    due = False
    if foreign:
        why = f"holds files that are not ours: {', '.join(foreign[:5])}. Move them away"
    elif MANIFEST_NAME in sizes:
        due, why = True, "its removal had begun"
    elif owner is not None and began_by == owner:
        why = "an attempt of this job"
    elif is_void(began_by, step):
        due, why = True, "of an earlier start of this job"
    elif age_s < grace_s:
        why = f"may be a save in progress: changed, or first seen, {max(age_s, 0):.0f} s ago, less than {grace_s:.0f} s"
    else:
        due, why = True, f"nothing in it has changed for {age_s:.0f} s"
    return Orphan(
        directory=directory,
        step=step,
        owner=began_by,
        nbytes=sum(sizes.values()),
        age_s=age_s,
        due=due,
        why=why,
    )


def _old_drafts(
    backend: LocalBackend, run: str, without_manifest: list[str], grace_s: float, now: float
) -> list[Orphan]:
    found: list[Orphan] = []
    names = [e.name for e in backend.list(run) if e.is_directory] if backend.exists(run) else []
    for directory in sorted(set(names) - set(without_manifest)):
        step = step_of_directory(directory)
        if step is None:
            continue
        path = f"{run}/{directory}"
        with contextlib.suppress(StoreGone):  # pruned meanwhile
            entries = [e.name for e in backend.list(path) if e.name.startswith(".") and e.name.endswith(".tmp")]
            times = _modified_at(backend, path, entries)
            drafts = tuple(sorted(name for name, at in times.items() if now - at >= grace_s))
            if drafts:
                sizes = _sizes(backend, path)
                found.append(
                    Orphan(
                        directory=directory,
                        step=step,
                        owner=None,
                        nbytes=sum(sizes.get(name, 0) for name in drafts),
                        age_s=now - max(times[name] for name in drafts),
                        due=True,
                        why=f"{len(drafts)} drafts of an interrupted copy; the checkpoint itself stays",
                        drafts=drafts,
                    )
                )
    return found


def _litter(backend: LocalBackend, run: str, grace_s: float, now: float) -> list[Orphan]:
    found = find_litter(backend, run, grace_s=grace_s, now=now)
    if not found:
        return []
    return [
        Orphan(
            directory="",
            step=None,
            owner=None,
            nbytes=sum(nbytes for nbytes, _ in found.values()),
            age_s=min(age_s for _, age_s in found.values()),
            due=True,
            why=f"{len(found)} claims and drafts of processes that died",
            drafts=tuple(sorted(found)),
        )
    ]


def _collect(backend: Backend, run: str, orphan: Orphan) -> Orphan:
    path = f"{run}/{orphan.directory}"
    if not orphan.directory:
        assert isinstance(backend, LocalBackend)  # the only one that has such names
        remove_litter(backend, run, orphan.drafts)
        return dataclasses.replace(orphan, removed=True)
    if orphan.drafts:
        for name in orphan.drafts:
            backend.remove(f"{path}/{name}")
        return dataclasses.replace(orphan, removed=True)
    manifest = f"{path}/{MANIFEST_NAME}"
    with contextlib.suppress(StoreGone):
        _free_manifest(backend, path)
    if not backend.create_exclusive(manifest, TOMBSTONE) and _manifest_of(backend, path) != TOMBSTONE:
        return dataclasses.replace(orphan, due=False, why="was committed at this moment")
    with contextlib.suppress(StoreGone):  # another process removes it too, and was faster
        names = [name for name in _sizes(backend, path) if name not in (ATTEMPT_NAME, MANIFEST_NAME)]
        if not all(_is_ours(name) for name in names):
            # A file that is not ours came just now. The tombstone stays: nothing can be committed here any more.
            return dataclasses.replace(orphan, due=False, why="holds files that are not ours. Move them away")
        for name in [*names, ATTEMPT_NAME]:
            backend.remove(f"{path}/{name}")
        backend.sync_directory(path)
        backend.remove(manifest)
        backend.remove_directory(path)
    backend.sync_directory(run)
    return dataclasses.replace(orphan, removed=True)


def _free_manifest(backend: Backend, path: str) -> None:
    """Where there are no hard links, a committer that died may hold the right to the manifest's name: takes it away.

    Its draft goes first, so that it has nothing to give the name to should it wake up.
    """
    right = f"{MANIFEST_NAME}.claim"
    if right not in {entry.name for entry in backend.list(path)}:
        return
    for entry in backend.list(path):
        if entry.name.startswith(f".{MANIFEST_NAME}.") and entry.name.endswith(".tmp"):
            backend.remove(f"{path}/{entry.name}")
    if not backend.exists(f"{path}/{MANIFEST_NAME}"):
        backend.remove(f"{path}/{right}")


def _note(backend: Backend, run: str, directories: list[str], now: float) -> None:
    """Writes down what the directories look like now, and since when; forgets those that are gone."""
    looks: dict[str, str] = {}
    for directory in directories:
        with contextlib.suppress(StoreGone):
            looks[directory] = _look(_sizes(backend, f"{run}/{directory}"))

    def change(marks: pins.Marks) -> pins.Marks:
        def since(name: str, look: str) -> float:
            seen = marks.sightings.get(name)
            return seen[1] if seen is not None and seen[0] == look and seen[1] <= now else now

        sightings = {name: (look, since(name, look)) for name, look in looks.items()}
        return dataclasses.replace(marks, sightings=sightings)

    pins.change_marks(backend, run, change)


def _changed_at(
    backend: Backend, path: str, directory: str, sizes: dict[str, int], marks: pins.Marks, now: float
) -> float:
    """When something in a directory changed last, in seconds since 1970; `now` when nothing is known."""
    if isinstance(backend, LocalBackend):
        return max(_modified_at(backend, path, ["", *sizes]).values(), default=now)
    look, since = marks.sightings.get(directory, ("", now))
    return since if look == _look(sizes) else now


def _modified_at(backend: LocalBackend, path: str, names: Iterable[str]) -> dict[str, float]:
    """Times of change by name; '' is the directory itself. What is gone meanwhile is left out."""
    times: dict[str, float] = {}
    for name in names:
        full = backend.root / path / name
        with contextlib.suppress(StoreGone), translated("looking at", str(full)):
            times[name] = os.stat(full).st_mtime
    return times


def _sizes(backend: Backend, path: str) -> dict[str, int]:
    """Files and their sizes; directories, which none of ours has, end in '/'."""
    sizes: dict[str, int] = {}
    for entry in backend.list(path):
        sizes[f"{entry.name}/" if entry.is_directory else entry.name] = 0
        if not entry.is_directory:
            with contextlib.suppress(StoreGone, StoreCorrupt):  # gone meanwhile, or no plain file
                with contextlib.closing(backend.open(f"{path}/{entry.name}")) as file:
                    sizes[entry.name] = file.nbytes
    return sizes


def _look(sizes: dict[str, int]) -> str:
    return digest_of(json.dumps(sorted(sizes.items())).encode())[:32]


def _owner_of(backend: Backend, path: str) -> str | None:
    try:
        fields = parse_json(backend.read(f"{path}/{ATTEMPT_NAME}", MAX_ATTEMPT_BYTES), path)
    except (StoreGone, StoreCorrupt):
        return None
    owner = cast("dict[str, Any]", fields).get("owner") if isinstance(fields, dict) else None
    return owner if isinstance(owner, str) else None


def _is_ours(name: str) -> bool:
    plain = name.removesuffix(".claim")  # left by file systems without hard links
    return is_file_name(plain) or plain == MANIFEST_NAME or (name.startswith(".") and not name.endswith("/"))
