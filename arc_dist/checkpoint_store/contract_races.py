"""The cases of the contract in which threads and processes race. See `contract`.

Every racer waits at a barrier, so that the calls meet; a case repeats its race, because one race proves little.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable

from arc_dist.checkpoint_store.backends import Backend, open_backend
from arc_dist.checkpoint_store.contract_support import ContractBroken, Room, pattern, require, write_in_pieces
from arc_dist.errors import ArcError, Fenced, StoreTransient

_NUM_THREADS = 16
_NUM_PROCESSES = 4
_NUM_ROUNDS = 8
_TIMEOUT_S = 60.0
_CREATE = ("exclusive_create",)

RACES: list[tuple[tuple[str, ...], Callable[[Room], None]]] = []


def _case(*needs: str) -> Callable[[Callable[[Room], None]], Callable[[Room], None]]:
    def keep(body: Callable[[Room], None]) -> Callable[[Room], None]:
        RACES.append((needs, body))
        return body

    return keep


@_case(*_CREATE)
def of_racing_creates_one_wins(room: Room) -> None:
    """Of 16 threads with clients of their own that create one name, exactly one is told that it did."""
    room.make()
    for number in range(_NUM_ROUNDS):
        path = room.path(f"manifest-{number}")
        won = _race(room.backend, lambda backend, i, path=path: backend.create_exclusive(path, _words(i)))
        require(len(won) == 1, f"round {number}: {len(won)} of {_NUM_THREADS} creates succeeded")
        require(room.content(f"manifest-{number}") == _words(won[0]), "the file holds a loser's bytes")
    require(len(room.names()) == _NUM_ROUNDS, f"losers left files: {sorted(room.names())[:5]}")


@_case(*_CREATE)
def of_racing_claims_one_wins(room: Room) -> None:
    """Of 16 threads that claim one directory, exactly one is told that it did, and its bytes are there."""
    room.make()
    for number in range(_NUM_ROUNDS):
        path = room.path(f"step-{number:08d}")
        won = _race(room.backend, lambda backend, i, path=path: backend.claim(path, "attempt.json", _words(i)))
        require(len(won) == 1, f"round {number}: {len(won)} of {_NUM_THREADS} claims succeeded")
        require(room.content(f"step-{number:08d}/attempt.json") == _words(won[0]), "it holds a loser's bytes")
    require(len(room.names()) == _NUM_ROUNDS, f"losers left directories: {sorted(room.names())[:5]}")


@_case(*_CREATE)
def of_racing_files_one_wins(room: Room) -> None:
    """Of 16 threads that publish one exclusive name, one succeeds, the others are `Fenced` and leave nothing."""
    room.make()
    for number in range(_NUM_ROUNDS // 2):
        name = f"rank-{number:05d}.safetensors"
        won = _race(room.backend, lambda backend, i, name=name: _publish(backend, room.path(name), _words(i)))
        require(len(won) == 1, f"round {number}: {len(won)} of {_NUM_THREADS} writers published")
        require(room.content(name) == _words(won[0]), "the file holds a loser's bytes")
        require(room.names() == {f"rank-{n:05d}.safetensors" for n in range(number + 1)}, "losers left files")


@_case("exclusive_create", "shared")
def of_racing_processes_one_wins(room: Room) -> None:
    """Of 4 processes that create, claim and publish the same names, exactly one wins each."""
    room.make()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with contextlib.ExitStack() as stack:
        # One pool would give two races to one process where processes start slowly.
        executors = [concurrent.futures.ProcessPoolExecutor(1, mp_context=context) for _ in range(_NUM_PROCESSES)]
        pools = [stack.enter_context(executor) for executor in executors]
        for job in [pool.submit(os.getpid) for pool in pools]:
            job.result(_TIMEOUT_S)  # all processes have started
        arguments = (room.backend.url, room.directory, time.time() + 0.3, dict(os.environ))
        jobs = [pool.submit(_racer, index, *arguments) for index, pool in enumerate(pools)]
        answers = [job.result(_TIMEOUT_S) for job in jobs]
    require(len({pid for pid, _ in answers}) == _NUM_PROCESSES, "the racers were not processes of their own")
    results = [won for _, won in answers]
    for number in range(_NUM_ROUNDS):
        for kind, name in (("create", f"m{number}"), ("claim", f"c{number}/attempt.json"), ("publish", f"p{number}")):
            won = [index for index, result in enumerate(results) if f"{kind}{number}" in result]
            require(len(won) == 1, f"{kind} {number}: {len(won)} of {_NUM_PROCESSES} processes won")
            require(room.content(name) == _words(won[0]), f"{kind} {number}: it holds a loser's bytes")


@_case("atomic_publish")
def a_reader_sees_old_or_new_bytes(room: Room) -> None:
    """While a file is replaced again and again, every read of it is whole: the bytes of one writing."""
    room.make()
    versions = [pattern(50_000, seed) for seed in range(4)]
    room.put("f", versions[0])
    known, over, reads, torn = set(versions), threading.Event(), [0], [0]

    def read() -> None:
        while not over.is_set():
            try:
                data = room.content("f")
            except ArcError as error:
                raise ContractBroken(f"a file that is being replaced cannot be read: {error.message}") from error
            reads[0] += 1
            torn[0] += data not in known

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        job = pool.submit(read)
        try:
            for number in range(40):
                room.put("f", versions[number % len(versions)])
        finally:
            over.set()
        job.result(_TIMEOUT_S)
    require(reads[0] > 0, "the reader did not get to read")
    require(torn[0] == 0, f"{torn[0]} of {reads[0]} reads mix two writings")


@_case()
def many_threads_read_one_source(room: Room) -> None:
    """One open file gives the right bytes to 16 threads at once."""
    room.make()
    data = pattern(1 << 20)
    room.put("f", data)
    source = room.backend.open(room.path("f"))

    def read(index: int) -> bool:
        for number in range(4):
            offset = (index * 61_003 + number * 257_123) % (len(data) - 5000)
            buffer = bytearray(5000)
            source.read_into(offset, memoryview(buffer))
            if bytes(buffer) != data[offset : offset + 5000]:
                return False
        return True

    try:
        with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
            require(all(pool.map(read, range(_NUM_THREADS))), "a thread read another's bytes")
    finally:
        source.close()


def _words(index: int) -> bytes:
    return f"racer {index} ".encode() * (index + 1)


def _publish(backend: Backend, path: str, data: bytes) -> bool:
    try:
        sink = backend.create(path, len(data), exclusive=True)
    except Fenced:
        return False
    try:
        write_in_pieces(sink, data)
        sink.publish()
    except Fenced:
        sink.discard()
        return False
    except BaseException:
        sink.discard()
        raise
    return True


def _race(backend: Backend, action: Callable[[Backend, int], bool]) -> list[int]:
    """Those for whom `action` returned True."""
    start = threading.Barrier(_NUM_THREADS)

    def run(index: int) -> bool:
        mine = open_backend(backend.url)
        start.wait(_TIMEOUT_S)
        return _patiently(lambda: action(mine, index))

    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
        jobs = [pool.submit(run, index) for index in range(_NUM_THREADS)]
        return [index for index, job in enumerate(jobs) if job.result(_TIMEOUT_S)]


def _patiently(action: Callable[[], bool]) -> bool:
    """Again after a transient error: a service may answer a conditional write with "conflict, try again"."""
    for number in range(5):
        with contextlib.suppress(StoreTransient):
            return action()
        time.sleep(0.05 * 2**number)
    return action()


def _racer(index: int, url: str, directory: str, begin: float, environment: dict[str, str]) -> tuple[int, list[str]]:
    """One process of a race; returns its id and what it won."""
    os.environ.update(environment)  # a fork server keeps the environment it was started in: credentials, endpoints
    backend = open_backend(url)
    won: list[str] = []
    time.sleep(max(0.0, begin - time.time()))
    for number in range(_NUM_ROUNDS):
        time.sleep(max(0.0, begin + 0.2 * number - time.time()))  # together again
        data = _words(index)
        if _patiently(lambda n=number, d=data: backend.create_exclusive(f"{directory}/m{n}", d)):
            won.append(f"create{number}")
        if _patiently(lambda n=number, d=data: backend.claim(f"{directory}/c{n}", "attempt.json", d)):
            won.append(f"claim{number}")
        if _patiently(lambda n=number, d=data: _publish(backend, f"{directory}/p{n}", d)):
            won.append(f"publish{number}")
    return os.getpid(), won
