"""What test_real_nfs.py runs inside, on a real NFS mount: each function is one story, and returns what it saw."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from arc_dist import Store
from arc_dist.checkpoint_store import contract
from arc_dist.checkpoint_store.backends import LocalBackend
from arc_dist.checkpoint_store.orphans import collect_orphans
from nfs_tools import (
    CKPT,
    DEADLINE_S,
    ELEMENTS,
    FaultAt,
    Forked,
    Training,
    arc,
    damage_at,
    failure,
    fill_disk,
    put,
    ready_store,
    server_starts_when_told,
    steps_at,
    train_two_ranks,
    train_with_fault,
    write,
)
from services import nfs_guest as guest
from services.nfs_guest import EXPORT, NFS, OTHER
from store_helpers import files_of, same_bits, save, whole
from toy import Toy, guarded, plain


def contract_suite() -> dict[str, Any]:
    guest.resize_disk(256 << 20)  # some cases hold several files of 17 MiB
    return {"exit_code": contract.main([str(CKPT)]), "left": [p.name for p in CKPT.iterdir()]}


def two_ranks_two_clients() -> dict[str, Any]:
    import torch._dynamo  # noqa: F401 - before the fork, for both

    guest.mount(Path("/media/nfs2"))
    first = train_two_ranks(Toy(kind="ddp", steps=10))
    steps = steps_at(CKPT)
    second = train_two_ranks(Toy(kind="ddp", steps=20))  # restores 10
    resumed = steps_at(CKPT)
    for path in CKPT.iterdir():
        guest.run("rm", "-r", str(path))
    straight = train_two_ranks(Toy(kind="ddp", steps=20))
    verified = arc("verify", str(CKPT))
    return {
        "first": first,
        "steps": steps,
        "second": second,
        "resumed": resumed,
        "straight": straight,
        "verified": verified,
        "damage": damage_at(CKPT),
    }


def full_disk(version: str) -> dict[str, Any]:
    guest.remount(version=version)
    store = ready_store()
    put(store, 1)
    filler = fill_disk(ELEMENTS)  # a quarter of what a step takes
    probe = NFS / "probe"
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT)
    written, said_at = os.write(descriptor, bytes(4 * ELEMENTS)), "nothing"
    try:
        os.fsync(descriptor)
    except OSError as error:
        said_at = f"fsync {error.errno}"
    finally:
        os.close(descriptor)
        probe.unlink()
    before = files_of(CKPT)
    full = [failure(lambda: write(store, 2)) for _ in range(2)]
    left = [path.name for path in files_of(CKPT) if path not in before]
    still = [steps_at(CKPT), damage_at(CKPT)]
    store.discard(2, generation=0, world_size=1)
    # Training goes on in the next tier while it is full, and comes back when it is not.
    filler.unlink()
    filler = fill_disk(16 << 10)
    job = Training(Toy(steps=30), store=f"{CKPT}/job, {OTHER}", checkpoint_every=10)
    job.until(20)
    filler.unlink()
    digest = job.finish()
    return {
        "probe": [written, said_at],
        "full": full,
        "left": left,
        "still": still,
        "incidents": job.incidents,
        "digest": [digest, plain(Toy(steps=30))[0]],
        "nfs": steps_at(CKPT / "job"),
        "other": steps_at(OTHER),
        "drafts": [path.name for path in files_of(CKPT) if path.name.startswith(".")],
        "damage": damage_at(CKPT / "job"),
    }


def server_stops(mounted: str) -> dict[str, Any]:
    """In the middle of the save of step 20; it is back before step 40."""
    guest.remount({"soft": guest.SOFT, "hard": guest.HARD}[mounted])
    ready_store()
    start_server = server_starts_when_told()
    toy = Toy(steps=60)
    fault = FaultAt(20, guest.stop_server)
    job = Training(toy, store=str(CKPT), checkpoint_every=10, save_timeout_s=6.0)
    job.until(20)
    while not job.job.arc._engine._checkpointer.is_writing():
        job.until(job.number + 1, wait=False)
    assert fault.done.wait(DEADLINE_S)
    began = time.monotonic()
    job.until(job.number + 8, wait=False)
    trained = {"serving": guest.is_serving(), "s": time.monotonic() - began, "to": job.number}
    settled_s = guest.wait_until(lambda: not job.job.arc._engine._checkpointer.is_writing(), DEADLINE_S, "the save")
    start_server()
    guest.wait_until(lambda: failure(lambda: Store(CKPT).steps())["type"] is None, DEADLINE_S, "the mount")
    if mounted == "hard":
        stuck = job.job.arc._engine._checkpointer._stuck
        guest.wait_until(lambda: not stuck, DEADLINE_S, "the call that never returned")
    digest = job.finish()
    return {
        "fired": fault.fired,
        "trained": trained,
        "settled_s": settled_s,
        "incidents": job.incidents,
        "digest": [digest, plain(toy)[0]],
        "steps": steps_at(CKPT),
        "damage": damage_at(CKPT),
    }


def server_never_comes_back() -> dict[str, Any]:
    """A hard mount: no call returns any more. Training ends all the same; the next job finds all there is."""
    guest.remount(guest.HARD)
    ready_store()
    job = Forked(train_with_fault, 30, 20)
    lost = job.answer()
    there = {"serving": guest.is_serving(), "exit_code": job.exit_code(5.0), "other": steps_at(OTHER)}
    guest.start_server()
    ended = job.exit_code(DEADLINE_S)
    next_job = Forked(train_with_fault, 40, -1).result()
    return {
        "lost": lost,
        "there": there,
        "ended": ended,
        "next": next_job,
        "plain": [plain(Toy(steps=n))[0] for n in (30, 40)],
        "nfs": steps_at(CKPT),
        "damage": damage_at(CKPT),
    }


def server_restarts(mounted: str) -> dict[str, Any]:
    """In the middle of the save of step 20, with its grace period."""
    guest.remount({"soft": guest.SOFT, "hard": guest.HARD}[mounted])
    ready_store()

    def restart() -> None:
        guest.stop_server()
        guest.start_server(grace=True)

    fault = FaultAt(20, restart)
    job = Training(Toy(steps=30), store=str(CKPT), checkpoint_every=10)
    digest = job.finish()
    return {
        "fired": fault.fired,
        "digest": [digest, plain(Toy(steps=30))[0]],
        "incidents": job.incidents,
        "steps": steps_at(CKPT),
        "damage": damage_at(CKPT),
    }


def stale_handles() -> dict[str, Any]:
    store = ready_store()
    for step in (10, 20):
        put(store, step)
    # The newest step is taken away and put back from a backup: other inodes, the same bytes.
    held = store.open(20)
    newest = EXPORT / "ckpt" / "run" / "step-00000020"
    guest.run("cp", "-a", str(newest), str(guest.DISK / "backup"))
    guest.run("rm", "-r", str(newest))
    guest.run("mv", str(guest.DISK / "backup"), str(newest))
    back = [info.step for info in store.steps()]
    (loaded,) = held.read([held.specs()["w"]])
    # Another file system is served under the name of the old one.
    guest.replace_disk()
    raw = ""
    try:
        os.listdir(NFS)
    except OSError as error:
        raw = errno.errorcode[error.errno or 0]
    actions: dict[str, Callable[[], Any]] = {
        "newest": store.newest,
        "steps": store.steps,
        "open": lambda: store.open(20),
        "write": lambda: write(store, 30),
        "fresh": lambda: Store(CKPT).newest(),
        "prune": lambda: store.prune(keep_last=2),
        "orphans": store.collect_orphans,
        "writable": lambda: Store(CKPT).check_writable(),
        "training": lambda: next(guarded(Toy(), store=str(CKPT)).steps),
    }
    return {
        "back": back,
        "read": same_bits(loaded, torch.arange(ELEMENTS, dtype=torch.float32) + 20),
        "raw": raw,
        "failures": {name: failure(action) for name, action in actions.items()},
    }


def late_names() -> dict[str, Any]:
    """What another client has created is not seen here for some seconds. The other is the server's own user."""
    guest.remount(f"{guest.SOFT},acdirmin=30,acdirmax=30")
    here = ready_store()
    put(here, 10, 1000)
    there = Store(EXPORT / "ckpt", owner="a")
    backend, tensors = here.backend, [whole("w", torch.arange(1000.0))]
    unseen: dict[str, list[bool]] = {}

    def part(store: Store, step: int, rank: int) -> dict[str, Any]:
        return store.write_part(step, generation=0, rank=rank, world_size=2, tensors=tensors, objects={"rank": rank})

    def look(name: str) -> None:
        """Whether it is there: as the client says, and in truth."""
        unseen[name] = [(CKPT / "run" / name).exists(), (EXPORT / "ckpt" / "run" / name).exists()]

    # A shard of another rank, and the commit here.
    parts = {0: part(here, 20, 0)}
    look("step-00000020/rank-00001.json")
    before = dict(unseen)
    backend.list("run/step-00000020")
    parts[1] = part(there, 20, 1)
    look("step-00000020/rank-00001.json")
    here.commit(20, 0, 2, parts, {"certified": True})
    # A step of another rank's making, and our part of it.
    look("step-00000030")
    parts = {1: part(there, 30, 1)}
    look("step-00000030")
    parts[0] = part(here, 30, 0)
    # An attempt that is looked at here, and its commit by the other.
    seen = [steps_at(CKPT)]
    look("step-00000030/manifest.json")
    there.commit(30, 0, 2, parts, {"certified": True})
    look("step-00000030/manifest.json")
    seen.append(steps_at(CKPT))
    # A whole step of the other.
    look("step-00000040")
    put(there, 40, 1000)
    look("step-00000040")
    seen.append(steps_at(CKPT))
    put(there, 50, 1000)
    seen.append(steps_at(CKPT))
    there.prune(keep_last=2)
    seen.append(steps_at(CKPT))
    return {"before": before, "unseen": unseen, "seen": seen, "damage": damage_at(CKPT)}


def silly_rename() -> dict[str, Any]:
    """An open file that is removed is renamed to .nfs…; it is there until it is closed."""
    store = ready_store()
    for step in (10, 20, 30):
        put(store, step, 1000)
    first = "run/step-00000010"
    held = store.backend.open(f"{first}/rank-00000.safetensors")
    (EXPORT / "ckpt" / first / ".nfs000dead").touch()  # of a client that died
    pruned = failure(lambda: store.prune(keep_last=2))
    names = sorted(path.name for path in (EXPORT / "ckpt" / first).iterdir())
    listed = steps_at(CKPT)
    orphans = failure(lambda: [(orphan.directory, orphan.due) for orphan in store.collect_orphans()])
    later = time.time() + 1000
    held_open = failure(lambda: [o.removed for o in collect_orphans(store.backend, "run", grace_s=600, now=later)])
    between = sorted(path.name for path in (EXPORT / "ckpt" / "run").iterdir())
    buffer = memoryview(bytearray(held.nbytes))
    held.read_into(0, buffer)
    again = failure(lambda: store.prune(keep_last=2))
    put(store, 40, 1000)
    held.close()
    after = failure(lambda: store.prune(keep_last=2))
    collected = failure(lambda: [o.removed for o in collect_orphans(store.backend, "run", grace_s=600, now=later)])
    return {
        "pruned": pruned,
        "names": names,
        "listed": listed,
        "orphans": orphans,
        "again": again,
        "after": after,
        "held_open": held_open,
        "between": between,
        "collected": collected,
        "left": sorted(path.name for path in (EXPORT / "ckpt" / "run").iterdir()),
        "steps": steps_at(CKPT),
        "damage": damage_at(CKPT),
    }


def denied_and_private() -> dict[str, Any]:
    """root_squash makes root nobody; a plain user of a directory of their own is served."""
    own = EXPORT / "own"
    own.mkdir(mode=0o700)
    os.chown(own, 1000, 1000)
    guest.export(squash_root=True)
    as_root = failure(lambda: Store(CKPT).check_writable())
    foreign = failure(lambda: Store(NFS / "own").steps())

    def as_user() -> list[str]:
        os.setgroups([])
        os.setgid(1000)
        os.setuid(1000)
        os.umask(0)
        save(Store(NFS / "own", owner="a"), 10)
        return damage_at(NFS / "own")

    damage = Forked(as_user).result()
    modes = {oct(stat.S_IMODE(p.stat().st_mode)) for p in files_of(own)}
    directories = {oct(stat.S_IMODE(p.stat().st_mode)) for p in own.rglob("*") if p.is_dir()}
    owners = {p.stat().st_uid for p in own.rglob("*")}
    return {
        "as_root": as_root,
        "foreign": foreign,
        "damage": damage,
        "modes": [sorted(modes), sorted(directories), sorted(owners)],
    }


def exclusive_race(rounds: int, processes: int) -> dict[str, Any]:
    """All processes create the same names, half of them through another client."""
    guest.mount(Path("/media/nfs2"))
    ready_store()
    context = multiprocessing.get_context("fork")
    start = context.Barrier(processes)

    def racer(number: int) -> list[tuple[bool, bool]]:
        if number % 2:
            guest.move_to_another_client(Path("/media/nfs2"))
        backend = LocalBackend(CKPT)
        won: list[tuple[bool, bool]] = []
        for round_ in range(rounds):
            data = f"{number}".encode()
            start.wait(DEADLINE_S)
            created = backend.create_exclusive(f"run/name-{round_}", data)
            start.wait(DEADLINE_S)
            won.append((created, backend.claim(f"run/claim-{round_}", "who", data)))
        return won

    racers = [Forked(racer, number) for number in range(processes)]
    won = [racer.result() for racer in racers]
    winners = [[[n for n in range(processes) if won[n][r][kind]] for r in range(rounds)] for kind in (0, 1)]
    read = [
        [int((EXPORT / "ckpt" / "run" / f"name-{r}").read_text()) for r in range(rounds)],
        [int((EXPORT / "ckpt" / "run" / f"claim-{r}" / "who").read_text()) for r in range(rounds)],
    ]
    left = [p.name for p in (EXPORT / "ckpt" / "run").iterdir() if p.name.startswith(".")]
    return {"winners": winners, "read": read, "left": left}


if __name__ == "__main__":
    _name, _arguments = sys.argv[1], json.loads(sys.argv[2])
    os.environ["ARC_RUN_DIR"] = "/media/tmp/run"
    _deadline = threading.Timer(10 * DEADLINE_S, os._exit, [99])
    _deadline.daemon = True
    _deadline.start()
    _seen = globals()[_name](*_arguments)
    print(json.dumps(_seen))
