"""What hashing costs, beside the least that touching the same bytes can cost: the choice of hash rests on it.

    python benchmarks/bench_hash.py [--megabytes 500] [--blocks 7]

Each hash goes over the same buffer in pieces of 4 MiB, as the store's writer and reader do, on one thread. Printed are
the median throughput over interleaved blocks, the median ratio to a copy of the same bytes within each block, and how
much another thread gets done meanwhile (the hash lets go of Python's lock). Packages that are not installed are left
out: ``pip install blake3 xxhash google-crc32c``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import random
import threading
import time
from collections.abc import Callable

from stats import describe, setting

_BLOCK_BYTES = 4 << 20


def algorithms() -> dict[str, Callable[[], object]]:
    """What can be measured here: a name, and a function that makes a fresh hash object with `update`."""
    found: dict[str, Callable[[], object]] = {"sha256": hashlib.sha256, "blake2b": hashlib.blake2b}
    if importlib.util.find_spec("blake3"):
        import blake3

        found["blake3"] = blake3.blake3
    if importlib.util.find_spec("xxhash"):
        found["xxh3_128"] = importlib.import_module("xxhash").xxh3_128
    if importlib.util.find_spec("google_crc32c"):
        found["crc32c"] = importlib.import_module("google_crc32c").Checksum
    return found


def hash_time_s(make: Callable[[], object], data: memoryview) -> float:
    hasher = make()
    update = hasher.update  # type: ignore[attr-defined]
    # Google's wheel takes bytes alone; the copy that this forces on a caller belongs to what it costs.
    wants_bytes = type(hasher).__module__.startswith("google_crc32c")
    began = time.perf_counter()
    for begin in range(0, len(data), _BLOCK_BYTES):
        block = data[begin : begin + _BLOCK_BYTES]
        update(bytes(block) if wants_bytes else block)
    return time.perf_counter() - began


def copy_time_s(data: memoryview, target: memoryview) -> float:
    began = time.perf_counter()
    for begin in range(0, len(data), _BLOCK_BYTES):
        target[begin : begin + _BLOCK_BYTES] = data[begin : begin + _BLOCK_BYTES]
    return time.perf_counter() - began


def lock_share(make: Callable[[], object], data: memoryview, seconds: float = 0.5) -> float:
    """How much of its usual work a pure Python loop gets done while another thread hashes.

    In one call for the whole buffer, so that a hash that keeps the lock stops the loop for as long.
    """
    stop = threading.Event()
    whole = bytes(data)

    def hash_on() -> None:
        while not stop.is_set():
            make().update(whole)  # type: ignore[attr-defined]

    def count() -> int:
        done, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            done += 1
        return done

    alone = count()
    thread = threading.Thread(target=hash_on)
    thread.start()
    beside = count()
    stop.set()
    thread.join()
    return beside / alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--blocks", type=int, default=7)
    args = parser.parse_args()
    data = memoryview(bytearray(random.Random(0).randbytes(1 << 20) * args.megabytes))
    target = memoryview(bytearray(len(data)))
    print(setting())
    copies: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in algorithms()}
    copy_time_s(data, target)  # touches the pages
    for _ in range(args.blocks):
        copies.append(copy_time_s(data, target))
        for name, make in algorithms().items():
            times[name].append(hash_time_s(make, data))
    print(f"copy      {describe([len(data) / s / 1e9 for s in copies], 'GB/s', 2)}")
    for name, make in algorithms().items():
        rate = describe([len(data) / s / 1e9 for s in times[name]], "GB/s", 2)
        ratio = describe([s / c for s, c in zip(times[name], copies)], "x the copy", 2)
        print(f"{name:<9} {rate}; {ratio}; a thread beside it keeps {100 * lock_share(make, data):.0f} %")


if __name__ == "__main__":
    main()
