"""Uploads to S3 in parts: what is in flight at once, what comes back, and what any failure on the way leaves behind.

Between the client and moto's server stands a proxy, which holds, refuses, drops or loses the requests that a test
names.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("s3fs", reason='s3fs is not installed: pip install "arc-dist[s3]"')
pytest.importorskip("moto", reason='moto is not installed: pip install "moto[server]"')

from arc_dist.checkpoint_store.backends import RemoteBackend, multipart, remote
from arc_dist.checkpoint_store.pace import Pace
from arc_dist.checkpoint_store.writer import write_rank
from arc_dist.errors import ArcError, Fenced, StoreDenied, StoreFull, StoreTransient
from s3_proxy import LIMIT_S, Drop, Proxy, Refuse, Request, s3_proxy
from s3_server import moto_server, new_bucket
from store_helpers import random_tensor, whole

pytestmark = pytest.mark.slow

SMALLEST = 5 << 20  # what S3 takes as a part that is not the last
NUM_PARTS = 4
NBYTES = NUM_PARTS * SMALLEST - 12345
PATH = "run/step-00000001/rank-00000.safetensors"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Proxy, str]]:
    """A proxy, and the URL of a bucket behind it. A request is repeated by s3fs alone, and once."""
    with (
        moto_server(tmp_path_factory.mktemp("moto") / "log") as server,
        s3_proxy(server) as proxy,
        pytest.MonkeyPatch.context() as patch,
    ):
        import s3fs

        patch.setattr(s3fs.S3FileSystem, "retries", 2)
        patch.setitem(remote._OPTIONS["s3"]["config_kwargs"], "retries", {"max_attempts": 0})
        yield proxy, new_bucket(proxy.url, patch)


@pytest.fixture
def proxy(service: tuple[Proxy, str]) -> Iterator[Proxy]:
    yield service[0]
    service[0].reset()


@pytest.fixture
def url(service: tuple[Proxy, str]) -> str:
    """An empty place."""
    return f"{service[1]}/{uuid.uuid4().hex}"


@pytest.fixture
def backend(proxy: Proxy, url: str, monkeypatch: pytest.MonkeyPatch) -> RemoteBackend:
    """With parts as small as S3 takes them, and room for three of them."""
    monkeypatch.setattr(multipart, "PART_BYTES", SMALLEST)
    backend = RemoteBackend(url)
    backend._room = multipart.Room(3 * SMALLEST)
    return backend


def content(nbytes: int, seed: int = 0) -> bytes:
    return random_tensor((nbytes,), "uint8", seed).numpy().tobytes()


def upload(backend: RemoteBackend, data: bytes, *, exclusive: bool = True, block: int = (3 << 20) + 7) -> None:
    """As the writer does it: from one buffer, which changes behind each write."""
    sink = backend.create(PATH, len(data), exclusive=exclusive)
    try:
        buffer = bytearray(block)
        for start in range(0, len(data), block):
            piece = data[start : start + block]
            buffer[: len(piece)] = piece
            sink.write(memoryview(buffer)[: len(piece)])
        sink.publish()
    except BaseException:
        sink.discard()
        raise


def require_content(backend: RemoteBackend, data: bytes) -> None:
    found = backend.read(PATH, len(data))
    assert hashlib.sha256(found).digest() == hashlib.sha256(data).digest()


def left(backend: RemoteBackend) -> set[str]:
    """All keys, and all uploads that have neither been joined nor aborted."""
    filesystem = backend._fs()
    bucket, prefix, _ = filesystem.split_path(backend.url)
    uploads = [str(row["Key"]) for row in filesystem.list_multipart_uploads(bucket)]
    keys = {str(key).removeprefix(f"{bucket}/{prefix}/") for key in filesystem.find(f"{bucket}/{prefix}")}
    return keys | {f"upload of {key}" for key in uploads if key.startswith(prefix)}


def require_nothing_left(backend: RemoteBackend) -> None:
    assert left(backend) == set()
    assert [thread for thread in threading.enumerate() if thread.name == "arc-part"] == []
    assert backend._room._taken == 0


def test_three_parts_are_in_flight_at_once_and_come_back_in_order(backend: RemoteBackend, proxy: Proxy) -> None:
    """Whatever the order in which they arrive: here the first of each three is the last."""
    groups = [[1, 2, 3], [4, 5, 6], [7, 8]]
    arrived: list[int] = []

    def three_at_once(request: Request) -> Refuse | None:
        group = next((group for group in groups if request.part in group), [])
        if not group:
            return None
        later = set(group[group.index(request.part) + 1 :])
        if not proxy.wait_for(lambda: set(group) <= {r.part for r in proxy.seen} and later <= set(arrived)):
            return Refuse(403, "AccessDenied")  # they do not overlap
        proxy.tell(lambda: arrived.append(request.part))
        return None

    proxy.rule = three_at_once
    data = content(8 * SMALLEST - 1)
    upload(backend, data)
    for group in groups:
        assert [part for part in arrived if part in group] == group[::-1]
    assert proxy.most_parts == 3
    require_content(backend, data)
    assert left(backend) == {PATH, f"{PATH}.claim"}
    backend.remove(PATH)
    require_nothing_left(backend)


@pytest.mark.parametrize("nbytes", [0, 1, SMALLEST - 1, SMALLEST, SMALLEST + 1])
@pytest.mark.parametrize("exclusive", [True, False])
def test_what_fits_into_one_part_is_one_put(backend: RemoteBackend, proxy: Proxy, nbytes: int, exclusive: bool) -> None:
    data = content(nbytes)
    upload(backend, data, exclusive=exclusive)
    require_content(backend, data)
    operations = [request.operation for request in proxy.seen if request.operation not in ("head", "get")]
    begun = operations.index("begin") if "begin" in operations else None
    assert (begun is None) == (nbytes <= SMALLEST)
    assert left(backend) == ({PATH, f"{PATH}.claim"} if exclusive and begun is not None else {PATH})


def test_the_parts_of_huge_files_are_larger_and_fewer_at_once() -> None:
    class Filesystem:
        def split_path(self, path: str) -> tuple[str, str, None]:
            return "bucket", path, None

    for nbytes, most in ((0, 3), (78 << 30, 3), (80 << 30, 2), (400 << 30, 1)):
        room = multipart.Room()
        sink = multipart.S3Sink(Filesystem(), "x", "x", nbytes, exclusive=True, room=room)
        assert sink._part_bytes * 10_000 >= nbytes
        count = 0
        while not room._taken or room._taken + sink._part_bytes <= room._nbytes:
            room.take(sink._part_bytes)
            count += 1
        assert count == most, nbytes


@pytest.mark.parametrize("number", range(1, NUM_PARTS + 1))
def test_a_failure_of_any_part_ends_the_upload_and_leaves_nothing(
    backend: RemoteBackend, proxy: Proxy, number: int
) -> None:
    proxy.rule = lambda request: Refuse(403, "QuotaExceeded") if request.part == number else None
    with pytest.raises(StoreFull, match="QuotaExceeded"):
        upload(backend, content(NBYTES))
    assert number in [request.part for request in proxy.seen], "the fault must have fired"
    assert "complete" not in [request.operation for request in proxy.seen]
    require_nothing_left(backend)
    proxy.rule = lambda request: None
    upload(backend, b"the name is free")
    require_content(backend, b"the name is free")


@pytest.mark.parametrize(
    ("operation", "action", "kind"),
    [
        ("part", Refuse(503, "SlowDown"), StoreTransient),
        ("part", Refuse(500, "InternalError"), StoreTransient),
        ("part", Refuse(500), StoreTransient),
        ("part", Refuse(403, "AccessDenied"), StoreDenied),
        ("part", Refuse(404, "NoSuchUpload"), StoreTransient),
        ("part", Drop(), StoreTransient),
        ("begin", Refuse(503, "ServiceUnavailable"), StoreTransient),
        ("begin", Drop(), StoreTransient),
        ("put", Refuse(507, "QuotaExceeded"), StoreFull),
        ("put", Drop(), StoreTransient),
        ("complete", Refuse(503, "SlowDown"), StoreTransient),
        ("complete", Refuse(404, "NoSuchUpload"), StoreTransient),
        ("complete", Drop(), StoreTransient),
    ],
)
def test_each_error_has_its_kind_and_leaves_nothing(
    backend: RemoteBackend, proxy: Proxy, operation: str, action: Refuse | Drop, kind: type[ArcError]
) -> None:
    proxy.rule = lambda request: action if request.operation == operation and request.part in (0, 2) else None
    with pytest.raises(kind):
        upload(backend, content(2 * SMALLEST))
    assert operation in [request.operation for request in proxy.seen], "the fault must have fired"
    require_nothing_left(backend)


@pytest.mark.parametrize("operation", ["part", "put", "complete"])
def test_an_answer_that_is_lost_once_costs_nothing(backend: RemoteBackend, proxy: Proxy, operation: str) -> None:
    """The second attempt is told that the name is taken, or that there is no such upload: the first one did it."""

    def lose(request: Request) -> Drop | None:
        return Drop(carried_out=True) if (request.operation, request.repeat) == (operation, 0) else None

    proxy.rule = lose
    data = content(2 * SMALLEST)
    upload(backend, data)
    assert max(request.repeat for request in proxy.seen if request.operation == operation) >= 1
    require_content(backend, data)
    backend.remove(PATH)
    data = content(100)
    proxy.seen.clear()
    upload(backend, data)
    require_content(backend, data)
    backend.remove(PATH)
    require_nothing_left(backend)


@pytest.mark.parametrize(("operation", "nbytes"), [("put", 100), ("put", 2 * SMALLEST), ("complete", 2 * SMALLEST)])
def test_an_object_whose_answers_are_all_lost_is_removed(
    backend: RemoteBackend, proxy: Proxy, operation: str, nbytes: int
) -> None:
    """The name must be free for the next attempt of the same save."""

    def lose(request: Request) -> Drop | None:
        return Drop(carried_out=request.repeat == 0) if request.operation == operation else None

    proxy.rule = lose
    with pytest.raises(StoreTransient):
        upload(backend, content(nbytes))
    require_nothing_left(backend)
    proxy.rule = lambda request: None
    upload(backend, content(nbytes, seed=1))
    require_content(backend, content(nbytes, seed=1))


@pytest.mark.parametrize("looks_at_condition", [True, False], ids=["as on AWS", "as in radosgw 16"])
def test_of_racing_uploads_one_wins_and_the_others_leave_nothing(
    backend: RemoteBackend, proxy: Proxy, looks_at_condition: bool
) -> None:
    proxy.strips_condition_of_completion = not looks_at_condition
    num_racers = 4
    begun = threading.Barrier(num_racers)
    contents = [content(SMALLEST + 1, seed) for seed in range(num_racers)]

    def race(index: int) -> bool:
        sink = RemoteBackend(backend.url).create(PATH, SMALLEST + 1, exclusive=True)
        try:
            sink.write(memoryview(contents[index]))
            begun.wait(LIMIT_S)
            sink.publish()
        except Fenced:
            sink.discard()
            return False
        return True

    with concurrent.futures.ThreadPoolExecutor(num_racers) as pool:
        won = list(pool.map(race, range(num_racers)))
    assert won.count(True) == 1
    require_content(backend, contents[won.index(True)])
    assert left(backend) == {PATH, f"{PATH}.claim"}


def test_a_name_taken_meanwhile_by_one_put_is_left_as_it_is(backend: RemoteBackend) -> None:
    sink = backend.create(PATH, NBYTES, exclusive=True)
    sink.write(memoryview(content(NBYTES)))
    assert backend.create_exclusive(PATH, b"first")
    with pytest.raises(Fenced, match="exists already"):
        sink.publish()
    sink.discard()
    assert backend.read(PATH, 10) == b"first"
    assert left(backend) == {PATH}


def test_the_rate_holds_for_parts_too(backend: RemoteBackend, proxy: Proxy) -> None:
    """When a part begins, no more bytes have left than the rate allows, but for what was being filled."""
    rate, now, begun = 1e6, [0.0], list[tuple[float, int]]()
    block = 4 << 20

    def sleep(seconds: float) -> None:
        now[0] += seconds

    def note(request: Request) -> None:
        if request.part:
            begun.append((now[0], request.part))

    proxy.rule = note
    write_rank(
        backend,
        "run/step-00000001",
        step=1,
        generation=0,
        owner="a",
        rank=0,
        world_size=1,
        tensors=[whole("w", torch.ones(7 * SMALLEST, dtype=torch.uint8))],
        objects={},
        should_abort=None,
        pace=Pace(rate, clock=lambda: now[0], sleep=sleep),
    )
    assert [part for _, part in sorted(begun, key=lambda row: row[1])] == list(range(1, 9))
    for at, part in begun:
        assert (part - 1) * SMALLEST <= rate * at + block, (at, part)


SILENT = """
import sys, threading
from arc_dist.checkpoint_store.backends import RemoteBackend
from arc_dist.checkpoint_store.deadline import call_within
from arc_dist.errors import StoreTransient

backend = RemoteBackend(sys.argv[1])
assert not backend.exists("x")

def write(gave_up):
    sink = backend.create("x", 64 << 20, exclusive=True)
    sink.write(memoryview(bytes(64 << 20)))
    sink.publish()

try:
    call_within(5.0, "writing", write)
except StoreTransient:
    print("in flight:", sum(thread.name == "arc-part" for thread in threading.enumerate()))
"""


def test_a_server_that_never_answers_holds_up_neither_the_caller_nor_the_end_of_the_process(
    proxy: Proxy, url: str
) -> None:
    over = threading.Event()

    def hold(request: Request) -> Refuse | None:
        if not request.part:
            return None
        over.wait(LIMIT_S)
        return Refuse(503)

    proxy.rule = hold
    try:
        done = subprocess.run([sys.executable, "-c", SILENT, url], capture_output=True, text=True, timeout=LIMIT_S)
        assert not over.is_set()
    finally:
        over.set()
    assert (done.returncode, done.stdout, done.stderr) == (0, "in flight: 3\n", "")
    assert sorted({request.part for request in proxy.seen} - {0}) == [1, 2, 3]


MEMORY = """
import sys, tracemalloc
from arc_dist.checkpoint_store.backends import RemoteBackend

backend = RemoteBackend(sys.argv[1])
block = memoryview(bytes(4 << 20))
def upload(name, nbytes):
    sink = backend.create(name, nbytes, exclusive=True)
    for _ in range(0, nbytes, len(block)):
        sink.write(block)
    sink.publish()
upload("first", 4 << 20)
tracemalloc.start()
upload("large", 64 << 20)
print(tracemalloc.get_traced_memory()[1])
"""


def test_the_memory_of_an_upload_is_bounded(service: tuple[Proxy, str], url: str) -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY, url], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert 3 * multipart.PART_BYTES < int(done.stdout) <= 64 << 20
