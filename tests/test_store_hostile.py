"""Manifests, headers and objects made to hurt: an error of ours, in bounded time and memory, or nothing at all.

Digests keep no enemy out, since whoever can write the directory can compute them; so all of these are signed. They are
read in a child process whose address space is limited: memory in proportion to a lie ends it with a MemoryError.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import resource
import struct
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from arc_dist.checkpoint_store import Store
from arc_dist.checkpoint_store.format import digest_of
from arc_dist.checkpoint_store.shard import parse_header
from arc_dist.errors import ArcError, StoreCorrupt
from store_helpers import save

MAX_EXTRA_ADDRESS_BYTES = 2 << 30  # threads and their heaps reserve much and use little
MAX_EXTRA_MEMORY_KIB = 96 << 10
MAX_SECONDS_PER_CASE = 4.0  # of the processor: the machine may be busy
NUM_FUZZED = 1500

DEEP = "[" * 100_000
HUGE = 2**61
NASTY: list[Any] = [
    -1, 0, 1, 7, 2**31, 2**62 - 1, 2**62, 2**63, 2**64, 10**400, -(2**63), 0.5, 1e308, float("inf"), float("nan"),
    "", "x", "../x", "/etc/passwd", "rank-00000.json\x00", "rank-999999999.safetensors", "manifest.json", "\ud800",
    "a" * 10_000, None, True, False, [], {}, [[]], [0] * 65, [HUGE, HUGE], [-1], [1e3], {"$": "tensor"},
    {"$": "nosuch"}, {"$": "size", "v": [2**63]}, {"$": []},
]  # fmt: skip

Manifest = dict[str, Any]


def signed(body: bytes) -> bytes:
    return body + f',\n"manifest_digest": "sha256:{digest_of(body)}"\n}}\n'.encode()


def body_of(fields: Manifest) -> bytes:
    text = json.dumps({key: value for key, value in fields.items() if key != "manifest_digest"})
    return text[:-1].encode("utf-8", "surrogatepass")


def with_(path: Iterable[Any], value: Any) -> Callable[[Manifest], None]:
    """Replaces the value at a path, or all values at it where it has a '*'."""

    def mutate(fields: Manifest) -> None:
        *way, last = path
        places: list[Any] = [fields]
        for key in way:
            places = (
                [v for p in places for v in (p.values() if isinstance(p, dict) else p)]
                if key == "*"
                else [p[key] for p in places]
            )
        for place in places:
            place[last] = value(place[last]) if callable(value) else value

    return mutate


def huge_tensor(fields: Manifest) -> None:
    """A tensor of 2^40 bytes that all fields agree on; only the file is short."""
    name = "model.uint8"
    row = fields["tensors"][name]
    first = row["chunks"][0]
    nbytes = 1 << 40
    file = next(f for f in fields["files"] if f["name"] == first["file"])
    last_end = file["nbytes"]
    row["dtype"], row["global_shape"] = "uint8", [nbytes]
    old = first["nbytes"]
    row["chunks"] = [{**first, "offsets": [0], "shape": [nbytes], "nbytes": nbytes, "start": last_end - old}]
    others = [
        c
        for t in fields["tensors"].values()
        for c in t["chunks"]
        if c["file"] == first["file"] and c is not row["chunks"][0]
    ]
    for chunk in others:
        if chunk["start"] > first["start"]:
            chunk["start"] -= old
    file["nbytes"] = last_end - old + nbytes


def many_ranks(fields: Manifest) -> None:
    fields["world_size"] = HUGE


def rank_lie(fields: Manifest) -> None:
    for file in fields["files"]:
        file["rank"] = HUGE


def empty_and_vast(fields: Manifest) -> None:
    row = fields["tensors"]["model.empty"]
    row["global_shape"] = [0, HUGE, HUGE]
    for chunk in row["chunks"]:
        chunk["shape"], chunk["offsets"] = [0, HUGE, HUGE], [0, 0, 0]


def many_empty_parts(fields: Manifest) -> None:
    row = fields["tensors"]["model.empty"]
    row["chunks"] = row["chunks"] * 10_000


def many_copies(fields: Manifest) -> None:
    row = fields["tensors"]["model.w"]
    row["chunks"] = row["chunks"] * 5_000


CHANGES: dict[str, Callable[[Manifest], None]] = {
    "negative shape": with_(["tensors", "*", "global_shape"], [-1, -1]),
    "huge shape": with_(["tensors", "*", "global_shape"], [HUGE, HUGE]),
    "64 dimensions of 2^61": with_(["tensors", "*", "global_shape"], [HUGE] * 64),
    "65 dimensions": with_(["tensors", "*", "global_shape"], [1] * 65),
    "offsets of 2^63": with_(["tensors", "*", "chunks", 0, "offsets"], [2**63, 2**63]),
    "start of 2^62": with_(["tensors", "*", "chunks", 0, "start"], 2**62 - 1),
    "negative start": with_(["tensors", "*", "chunks", 0, "start"], -8),
    "overlapping": with_(["tensors", "*", "chunks", 0, "start"], lambda start: max(0, start - 4)),
    "dtype lies": with_(["tensors", "*", "dtype"], "float64"),
    "unknown dtype": with_(["tensors", "*", "dtype"], "object"),
    "dtype of torch that is none": with_(["tensors", "*", "dtype"], "load"),
    "path upwards": with_(["files", "*", "name"], "../../../etc/passwd"),
    "absolute path": with_(["files", "*", "name"], "/etc/passwd"),
    "path with NUL": with_(["files", "*", "name"], "rank-00000.json\x00.json"),
    "chunk in another directory": with_(
        ["tensors", "*", "chunks", 0, "file"], "../step-00000001/rank-00000.safetensors"
    ),
    "huge files": with_(["files", "*", "nbytes"], HUGE),
    "huge header": with_(["files", "*", "header_nbytes"], 100_000_000),
    "huge objects": with_(["files", 1, "nbytes"], 200 << 20),
    "all files are one": with_(["files", "*", "name"], "rank-00000.json"),
    "a world of 2^61 ranks": many_ranks,
    "ranks that are not": rank_lie,
    "time is a number with 400 digits": with_(["committed_at"], 10**400),
    "time is infinite": with_(["committed_at"], float("inf")),
    "time is not a number": with_(["committed_at"], float("nan")),
    "time is true": with_(["committed_at"], True),
    "another directory": with_(["directory"], "../run/step-00000001"),
    "another hash": with_(["hash"], "md5"),
    "a hash that is an attribute": with_(["hash"], "__class__"),
    "newer format": with_(["version"], 2**61),
    "no tensors": with_(["tensors"], []),
    "a tensor of 2^40 bytes": huge_tensor,
    "empty and vast": empty_and_vast,
    "the same empty part 10,000 times": many_empty_parts,
    "the same part 5,000 times": many_copies,
    "meta is a tensor": with_(["meta"], {"$": "tensor", "dtype": "float32", "shape": [HUGE], "data": ""}),
    "meta is a vast empty tensor": with_(
        ["meta"], {"$": "tensor", "dtype": "float32", "shape": [0, HUGE, HUGE], "data": ""}
    ),
    "meta is a vast empty array": with_(
        ["meta"], {"$": "np.ndarray", "dtype": "<U0", "shape": [HUGE, 4], "data": ""}
    ),
    "meta is a string dtype of 2^40": with_(["meta"], {"$": "np.scalar", "dtype": "<U1099511627776", "v": ""}),
    "meta has an unhashable key": with_(["meta"], {"$": "dict", "v": [[[], 1]]}),
    "meta is an infinite counter": with_(["meta"], {"$": "Counter", "v": [["a", 1e308]]}),
    "meta is a range of nothing": with_(["meta"], {"$": "range", "v": [0, 1, 0]}),
    "meta is a deque without end": with_(["meta"], {"$": "deque", "maxlen": -1, "v": []}),
    "meta says os": with_(["meta"], {"$": "os.system", "v": ["true"]}),
    "meta tag is a list": with_(["meta"], {"$": ["tensor"], "v": []}),
}  # fmt: skip

BODIES: dict[str, bytes] = {
    "nothing": b"",
    "deep list": b'{"format": ' + DEEP.encode(),
    "deep and closed": b'{"format": ' + DEEP.encode() + b"]" * len(DEEP),
    "repeated keys": b'{"format": "arc-dist-checkpoint", "format": "arc-dist-checkpoint"',
    "not UTF-8": b'{"format": "\xff\xfe"',
    "half a surrogate": b'{"format": "arc-dist-checkpoint", "owner": "\\ud800", "version": 1',
    "NUL bytes": b'{"\x00": 1',
    "a list": b"[1",
    "a number of a million digits": b'{"version": ' + b"9" * 1_000_000,
    "1e999999999": b'{"format": "arc-dist-checkpoint", "version": 1e999999999',
    "a million keys": b"{" + b",".join(b'"%d": 0' % i for i in range(100_000)),
}


def use(store: Store) -> list[str]:
    """Everything that reads. Returns what came of it; any error but ours goes through."""
    outcomes: list[str] = []

    def attempt(action: Callable[[], Any]) -> Any:
        try:
            result = action()
        except ArcError as error:
            outcomes.append(type(error).__name__ if len(str(error)) < 20_000 else "an endless message")
            return None
        outcomes.append("ok")
        return result

    attempt(store.steps)
    attempt(lambda: store.steps(include_damaged=True))
    attempt(store.newest)
    checkpoint = attempt(lambda: store.open(2))
    if checkpoint is not None:
        attempt(checkpoint.verify)
        attempt(lambda: checkpoint.meta)
        for rank in range(2):
            attempt(lambda rank=rank: checkpoint.objects(rank))
            attempt(lambda rank=rank: checkpoint.rank_specs(rank))
        specs = attempt(checkpoint.specs) or {}
        attempt(lambda: checkpoint.read(list(specs.values())))
        for spec in list(specs.values())[:3]:
            attempt(lambda spec=spec: checkpoint.read([spec]))
    assert "an endless message" not in outcomes
    # Whatever the one says, the other is still there.
    assert store.open(1).step == 1
    return outcomes


def status_kib(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def in_a_small_child(cases: Iterable[tuple[str, Callable[[], Any]]]) -> dict[str, Any]:
    """Runs cases in a fork whose memory is limited; returns outcomes by name. Any other error fails with its case."""
    read, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        outcomes: dict[str, Any] = {}
        name = "before the first"
        try:
            os.close(read)
            limit = (status_kib("VmSize") << 10) + MAX_EXTRA_ADDRESS_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            for name, action in cases:
                Path("/proc/self/clear_refs").write_text("5")
                before, began = status_kib("VmRSS"), time.process_time()
                outcomes[name] = action()
                seconds, extra = time.process_time() - began, status_kib("VmHWM") - before
                assert seconds < MAX_SECONDS_PER_CASE, f"took {seconds:.1f} s"
                assert extra < MAX_EXTRA_MEMORY_KIB, f"took {extra} KiB"
        except BaseException:  # noqa: BLE001 - it is the finding
            outcomes = {"": f"{name}:\n{traceback.format_exc()[-3000:]}"}
        finally:
            with os.fdopen(write_end, "wb") as pipe:
                pickle.dump(outcomes, pipe)
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    assert data, "the child died"
    outcomes = pickle.loads(data)
    assert "" not in outcomes, outcomes[""]
    return outcomes


@pytest.fixture
def target(shm_root: Path) -> tuple[Store, Path, Manifest]:
    """A store of two steps; the manifest of the second is what the tests replace."""
    store = Store(shm_root, owner="a")
    for step in (1, 2):
        save(store, step, world_size=2)
    path = shm_root / "run" / "step-00000002" / "manifest.json"
    return store, path, json.loads(path.read_bytes())


def manifest_case(target: tuple[Store, Path, Manifest], body: bytes) -> Callable[[], list[str]]:
    store, path, _ = target

    def run() -> list[str]:
        path.write_bytes(signed(body))
        return use(Store(store.url, owner="reader"))

    return run


def test_the_signature_is_accepted(target: tuple[Store, Path, Manifest]) -> None:
    """Otherwise nothing here would be tested beyond the digest."""
    outcomes = in_a_small_child([("same", manifest_case(target, body_of(target[2])))])
    assert set(outcomes["same"]) == {"ok"}
    assert len(outcomes["same"]) >= 13


def test_manifests_of_the_corpus(target: tuple[Store, Path, Manifest]) -> None:
    cases = []
    for name, change in CHANGES.items():
        fields = copy.deepcopy(target[2])
        change(fields)
        cases.append((name, manifest_case(target, body_of(fields))))
    cases += [(name, manifest_case(target, body)) for name, body in BODIES.items()]
    whole = body_of(target[2])
    cases += [(f"cut at {n}", manifest_case(target, whole[:n])) for n in range(0, len(whole), max(1, len(whole) // 40))]
    outcomes = in_a_small_child(cases)
    assert len(outcomes) == len(cases) >= len(CHANGES) + len(BODIES) + 40
    harmless = {name for name, found in outcomes.items() if set(found) == {"ok"}}
    # These get as far as the reader, which must not believe them.
    for name in ("a tensor of 2^40 bytes", "meta says os", "meta is a tensor"):
        assert outcomes[name][3] == "ok" and set(outcomes[name]) != {"ok"}, outcomes[name]
    # Equal copies of a part may repeat; the tag of a value that is not used by anybody hurts nobody.
    assert harmless <= {"meta is an infinite counter", "the same empty part 10,000 times"}


def test_manifests_that_were_cut_or_are_empty_files(target: tuple[Store, Path, Manifest]) -> None:
    store, path, _ = target
    data = path.read_bytes()

    def written(content: bytes) -> Callable[[], list[str]]:
        def run() -> list[str]:
            path.write_bytes(content)
            return use(Store(store.url, owner="reader"))

        return run

    cases = [(f"{n} bytes", written(data[:n])) for n in (0, 1, 50, 99, 100, len(data) // 2, len(data) - 1)]
    outcomes = in_a_small_child([*cases, ("zeros", written(bytes(len(data)))), ("long", written(bytes(8 << 20)))])
    assert all("StoreCorrupt" in found for found in outcomes.values())


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a JSON document."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


def mutate(fields: Manifest, rng: random.Random) -> None:
    path = rng.choice(places(fields))
    place: Any = fields
    for key in path[:-1]:
        place = place[key]
    choice = rng.random()
    if choice < 0.55:
        place[path[-1]] = copy.deepcopy(rng.choice(NASTY))
    elif choice < 0.65:
        del place[path[-1]]
    elif choice < 0.75 and isinstance(place, list):
        place += copy.deepcopy(place[: rng.randint(1, 3)])
    elif choice < 0.9 and type(place[path[-1]]) is int:
        place[path[-1]] += rng.choice((-1, 1, 8, -8, 2**32))
    else:
        other = rng.choice(places(fields))
        source: Any = fields
        for key in other:
            source = source[key]
        place[path[-1]] = copy.deepcopy(source)


@pytest.mark.parametrize("seed", range(3))
def test_fuzzed_manifests(target: tuple[Store, Path, Manifest], seed: int) -> None:
    rng = random.Random(seed)

    def cases() -> Iterable[tuple[str, Callable[[], Any]]]:
        for number in range(NUM_FUZZED // 3):
            fields = copy.deepcopy(target[2])
            for _ in range(rng.randint(1, 3)):
                mutate(fields, rng)
            body = body_of(fields)
            if rng.random() < 0.2:
                position = rng.randrange(len(body))
                body = body[:position] + rng.randbytes(rng.randint(0, 3)) + body[position + rng.randint(0, 3) :]
            yield f"{seed}.{number}", manifest_case(target, body)

    outcomes = in_a_small_child(cases())
    assert len(outcomes) == NUM_FUZZED // 3
    refused = sum(set(found) != {"ok"} for found in outcomes.values())
    assert refused > len(outcomes) // 3  # the fuzzer hits something


def header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


ROW = '{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
INFINITE = '{"a": {"saved_offsets": [1e999]}}'
HEADERS: dict[str, tuple[bytes, int]] = {
    "empty": (b"", 0),
    "seven bytes": (b"\0" * 7, 7),
    "length of 2^64-1": (header(b"{}", 2**64 - 1), 10),
    "length of 2^63": (header(b"{}", 2**63), 10),
    "longer than the file": (header(b"{}", 3), 10),
    "not JSON": (header(b"nonsense"), 16),
    "not UTF-8": (header(b'{"\xff": 1}'), 16),
    "a list": (header(b"[]"), 10),
    "deep": (header(b'{"a": ' + DEEP.encode()), 100_014),
    "repeated": (header(f'{{"a": {ROW}, "a": {ROW}}}'.encode()), 200),
    "offset is infinite": (header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [1e999, 8]}}'), 100),
    "offset is NaN": (header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [NaN, 8]}}'), 100),
    "offset of 2^63": (header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [9223372036854775808, 8]}}'), 100),
    "offset is a text": (header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]}}'), 100),
    "negative shape": (header(b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}'), 100),
    "vast shape": (header(b'{"a": {"dtype": "F32", "shape": [2305843009213693952, 4], "data_offsets": [0, 8]}}'), 100),
    "dtype lies": (header(b'{"a": {"dtype": "F64", "shape": [2], "data_offsets": [0, 8]}}'), 100),
    "dtype is a list": (header(b'{"a": {"dtype": [], "shape": [2], "data_offsets": [0, 8]}}'), 100),
    "dtype is unknown": (header(b'{"a": {"dtype": "Q9", "shape": [2], "data_offsets": [0, 8]}}'), 100),
    "overlap": (header(f'{{"a": {ROW}, "b": {ROW}}}'.encode()), 150),
    "a row is null": (header(b'{"a": null}'), 30),
    "metadata is a list": (header(b'{"__metadata__": []}'), 28),
    "metadata is deep": (header(json.dumps({"__metadata__": {"DCP_SHARDING_INFO": DEEP}}).encode()), 100_060),
    "sharding is a number": (header(b'{"__metadata__": {"DCP_SHARDING_INFO": 7}}'), 50),
    "sharding is a list": (header(f'{{"__metadata__": {{"DCP_SHARDING_INFO": "[1]"}}, "a": {ROW}}}'.encode()), 150),
    "sharding has infinite offsets": (
        header(f'{{"__metadata__": {{"DCP_SHARDING_INFO": {json.dumps(INFINITE)}}}, "a": {ROW}}}'.encode()),
        200,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_the_corpus(name: str) -> None:
    data, nbytes = HEADERS[name]
    with pytest.raises(StoreCorrupt, match="somewhere"):
        parse_header(data, nbytes, "somewhere")


def test_fuzzed_headers(target: tuple[Store, Path, Manifest]) -> None:
    path = target[1].parent / "rank-00000.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    rows = json.loads(data[8 : 8 + length])
    rng = random.Random(5)
    accepted, refused = 0, 0
    assert parse_header(data[: 8 + length], len(data), "x")
    for _ in range(20_000 // 4):
        fields = copy.deepcopy(rows)
        if rng.random() < 0.7:
            mutate(fields, rng)
            text = json.dumps(fields).encode("utf-8", "surrogatepass")
        else:
            position = rng.randrange(length)
            text = data[8 : 8 + length]
            text = text[:position] + rng.randbytes(rng.randint(0, 2)) + text[position + rng.randint(0, 2) :]
        nbytes = len(data) - length + len(text)
        try:
            found = parse_header(header(text), nbytes, "x")
        except StoreCorrupt:
            refused += 1
            continue
        accepted += 1
        # What is accepted tiles the file: no tensor reaches outside it or into another.
        end = 8 + len(text)
        for spec, start in found:
            assert start == end and min(spec.shape, default=0) >= 0
            end += spec.nbytes
        assert end == nbytes
    assert refused > 1000 and accepted > 100


OBJECTS = [
    b"", b"[]", b"7", b"null", b"{}", b'{"objects": []}', b'{"objects": 1}', DEEP.encode(), b"\xff", b'{"a":1,"a":2}',
    b'{"objects": {}, "step": "x"}', b'{"objects": {"x": 1e999}}', b"9" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("content", OBJECTS, ids=lambda content: content[:30].decode("latin-1"))
def test_objects_with_a_right_digest(target: tuple[Store, Path, Manifest], content: bytes) -> None:
    store, path, fields = target
    (path.parent / "rank-00000.json").write_bytes(content)
    fields = copy.deepcopy(fields)
    entry = next(f for f in fields["files"] if f["name"] == "rank-00000.json")
    entry["nbytes"], entry["digest"] = len(content), digest_of(content)
    path.write_bytes(signed(body_of(fields)))
    checkpoint = Store(store.url).open(2)
    try:
        objects = checkpoint.objects(0)
    except StoreCorrupt:
        return
    assert isinstance(objects, dict)
    assert content in (b'{"objects": {}, "step": "x"}', b'{"objects": {"x": 1e999}}')
