"""The cases of the contract that one process and one thread can prove. See `contract`."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from arc_dist.checkpoint_store.backends import LocalBackend, Unsupported, open_backend
from arc_dist.checkpoint_store.contract_support import Room, pattern, refused, require
from arc_dist.errors import ArcError, ConfigError, Fenced, StoreCorrupt, StoreFull, StoreGone

_LARGE_BYTES = (17 << 20) + 4097  # more than one part of a multipart upload, and not a multiple of anything
_NUM_FILES = 40
_CREATE = ("exclusive_create",)

CASES: list[tuple[tuple[str, ...], Callable[[Room], None]]] = []


def _case(*needs: str) -> Callable[[Callable[[Room], None]], Callable[[Room], None]]:
    def keep(body: Callable[[Room], None]) -> Callable[[Room], None]:
        CASES.append((needs, body))
        return body

    return keep


@_case()
def what_is_not_promised_is_refused(room: Room) -> None:
    """A storage without exclusive create refuses every step that would need it, and writes nothing."""
    if room.backend.capabilities.exclusive_create:
        return
    backend = room.backend
    refused(backend.prepare, Unsupported)
    refused(lambda: backend.create_exclusive(room.path("a"), b"x"), Unsupported)
    refused(lambda: backend.claim(room.path("b"), "c", b"x"), Unsupported)
    refused(lambda: backend.create(room.path("d"), 1, exclusive=True), Unsupported)
    require(room.names() == set(), f"a refused call left {sorted(room.names())}")


@_case(*_CREATE)
def prepare_may_be_repeated(room: Room) -> None:
    """Preparing a store that is prepared changes nothing."""
    room.backend.prepare()
    room.backend.prepare()
    require(room.backend.exists(""), "the root does not exist after prepare")


@_case()
def published_bytes_are_read_back(room: Room) -> None:
    """A published file has exactly the bytes that were written, whatever its size."""
    room.make()
    for nbytes in (0, 1, 4096, 65537, _LARGE_BYTES):
        data = pattern(nbytes, nbytes)
        room.put(f"f{nbytes}", data)
        require(room.content(f"f{nbytes}") == data, f"a file of {nbytes} bytes came back different")


@_case()
def a_published_file_is_seen_by_others_at_once(room: Room) -> None:
    """Another client of the same process, opened before the write, lists and reads the file right after it."""
    room.make()
    room.put("first", b"1")
    other = open_backend(room.backend.url)
    require({e.name for e in other.list(room.path())} == {"first"}, "the first listing is wrong")
    room.put("second", b"22")
    require(other.exists(room.path("second")), "the new file is not there for another client")
    require(other.read(room.path("second"), 10) == b"22", "another client reads other bytes")
    require({e.name for e in other.list(room.path())} == {"first", "second"}, "another client lists old names")


@_case("atomic_publish")
def a_file_has_no_name_before_publish(room: Room) -> None:
    """While a file is written its name is not there, and nothing is listed that a reader would take for it."""
    room.make()
    for nbytes in (100, _LARGE_BYTES):
        path = room.path(f"rank-{nbytes % 97:05d}.safetensors")
        sink = room.backend.create(path, nbytes, exclusive=False)
        try:
            sink.write(memoryview(pattern(nbytes)))
            require(not room.backend.exists(path), "the name exists before publish")
            refused(lambda path=path: room.backend.open(path), StoreGone)
            visible = [n for n in room.names() if n.endswith(".safetensors") or not n.startswith(".")]
            require(not visible, f"a file being written shows as {visible}")
        finally:
            sink.discard()


@_case("atomic_publish")
def a_replaced_file_is_whole(room: Room) -> None:
    """A file that is written again has the old bytes before publish and the new ones after it."""
    room.make()
    room.put("f", b"old")
    sink = room.backend.create(room.path("f"), 5, exclusive=False)
    sink.write(memoryview(b"newer"))
    require(room.content("f") == b"old", "the old bytes are gone before publish")
    sink.publish()
    require(room.content("f") == b"newer", "the new bytes are not there after publish")


@_case(*_CREATE)
def a_taken_name_is_refused(room: Room) -> None:
    """An exclusive file whose name is taken is `Fenced`, at any size; the first one's bytes stay, nothing else does."""
    room.make()
    for nbytes in (0, 10, _LARGE_BYTES):
        name = f"f{nbytes}"
        late = room.backend.create(room.path(name), nbytes, exclusive=True)  # begun while the name was free
        try:
            late.write(memoryview(pattern(nbytes, 1)))
            first = pattern(nbytes, 2)
            room.put(name, first, exclusive=True)
            refused(late.publish, Fenced)
        finally:
            late.discard()
        before = room.names()
        refused(lambda name=name: room.put(name, b"third", exclusive=True), Fenced)
        require(room.content(name) == first, "the bytes of the first writer were replaced")
        require(room.names() == before, f"a refused writer left {sorted(room.names() - before)}")


@_case(*_CREATE)
def exclusive_create_happens_once(room: Room) -> None:
    """`create_exclusive` says True once; the loser changes nothing, also when it comes from another client."""
    room.make()
    for data in (b"", b"first", pattern(1 << 20)):
        name = f"manifest-{len(data)}"
        require(room.backend.create_exclusive(room.path(name), data), "the first create was refused")
        require(not room.backend.create_exclusive(room.path(name), b"second"), "a second create succeeded")
        other = open_backend(room.backend.url)
        require(not other.create_exclusive(room.path(name), b"third"), "another client's create succeeded")
        require(room.content(name) == data, "the first one's bytes are gone")
    require(len(room.names()) == 3, f"files beside the created ones: {sorted(room.names())}")


@_case(*_CREATE)
def a_removed_name_is_free_again(room: Room) -> None:
    """After `remove` a name can be created exclusively again."""
    room.make()
    for nbytes in (5, _LARGE_BYTES):
        room.put("f", pattern(nbytes, 1), exclusive=True)
        room.backend.remove(room.path("f"))
        room.put("f", pattern(nbytes, 2), exclusive=True)
        require(room.content("f") == pattern(nbytes, 2), "other bytes than were written")
        room.backend.remove(room.path("f"))
    require(room.backend.create_exclusive(room.path("f"), b"x"), "the name of a removed file is still taken")


@_case(*_CREATE)
def a_claim_happens_once(room: Room) -> None:
    """`claim` creates a directory with its one file, both at once, and says True once."""
    room.make()
    name = "step-00000001"
    require(room.backend.claim(room.path(name), "attempt.json", b"mine"), "the first claim was refused")
    require(not room.backend.claim(room.path(name), "attempt.json", b"theirs"), "a second claim succeeded")
    require(room.content(f"{name}/attempt.json") == b"mine", "the first claim's bytes are gone")
    require(room.names(name) == {"attempt.json"}, f"the claimed directory holds {sorted(room.names(name))}")
    require(room.names() == {name}, f"a claim left {sorted(room.names() - {name})}")


@_case()
def discard_leaves_nothing(room: Room) -> None:
    """A discarded file leaves no name, begun, half written or published, and may be discarded twice."""
    room.make()
    room.put("kept", b"k")
    for exclusive in {False, room.backend.capabilities.exclusive_create}:
        for nbytes in (0, 10, _LARGE_BYTES):
            for written, publish in ((0, False), (nbytes // 2, False), (nbytes, False), (nbytes, True)):
                sink = room.backend.create(room.path("f"), nbytes, exclusive=exclusive)
                sink.write(memoryview(pattern(nbytes))[:written])
                if publish:
                    sink.publish()
                sink.discard()
                sink.discard()
                left = room.all_names() - {"kept"}
                require(not left, f"discarded after {written} of {nbytes} bytes, published: {publish}: {sorted(left)}")


@_case()
def reading_past_the_end_is_damage(room: Room) -> None:
    """A range that the file does not have is `StoreCorrupt`, never a short or padded buffer."""
    room.make()
    data = pattern(1000)
    room.put("f", data)
    source = room.backend.open(room.path("f"))
    try:
        require(source.nbytes == 1000, f"its size is {source.nbytes}, not 1000")
        source.read_into(1000, memoryview(bytearray(0)))
        for offset, nbytes in ((999, 2), (1000, 1), (0, 1001), (5000, 10), (1 << 40, 1)):
            refused(
                lambda o=offset, n=nbytes: source.read_into(o, memoryview(bytearray(n))),
                StoreCorrupt,
            )
        buffer = bytearray(10)
        source.read_into(990, memoryview(buffer))
        require(bytes(buffer) == data[990:], "the last bytes are wrong")
    finally:
        source.close()
    refused(lambda: room.backend.read(room.path("f"), 999), StoreCorrupt)
    require(room.backend.read(room.path("f"), 1000) == data, "a read with a fitting limit is wrong")


@_case()
def what_is_missing_is_gone(room: Room) -> None:
    """A missing file or directory is `StoreGone` to readers and nothing to those who remove."""
    room.make()
    room.put("f", b"x")
    missing = room.path("missing")
    refused(lambda: room.backend.open(missing), StoreGone)
    refused(lambda: room.backend.read(missing, 10), StoreGone)
    refused(lambda: room.backend.list(missing), StoreGone)
    require(not room.backend.exists(missing), "a missing file exists")
    require(not room.backend.exists(f"{missing}/below"), "a file in a missing directory exists")
    require(not room.backend.exists(room.path("f/below")), "a file below a file exists")
    for _ in range(2):
        room.backend.remove(missing)
        room.backend.remove_directory(missing)


@_case()
def removing_may_be_repeated(room: Room) -> None:
    """A removed file is gone at once and removing it again does nothing; other files stay."""
    room.make()
    room.put("a", b"1")
    room.put("ab", b"2")
    for _ in range(2):
        room.backend.remove(room.path("a"))
        require(room.names() == {"ab"}, f"after remove: {sorted(room.names())}")
        require(not room.backend.exists(room.path("a")), "a removed file exists")


@_case()
def a_directory_with_files_is_not_removed(room: Room) -> None:
    """`remove_directory` never takes files with it."""
    room.backend.make_directory(room.path("d"))
    room.put("d/f", b"x")
    try:
        room.backend.remove_directory(room.path("d"))
    except ArcError as error:
        require(not isinstance(error, StoreGone), "a directory with a file is said to be gone")
    require(room.content("d/f") == b"x", "removing a directory took its file")
    room.backend.remove(room.path("d/f"))
    room.backend.remove_directory(room.path("d"))
    require("d" not in room.names(), "an empty directory is still listed after it was removed")


@_case()
def a_listing_is_complete_and_flat(room: Room) -> None:
    """`list` gives each name of one directory once, says what is a directory, and goes no deeper."""
    room.backend.make_directory(room.path("sub/deeper"))
    room.put("sub/deeper/f", b"x")
    wanted = {f"rank-{i:05d}.json": False for i in range(_NUM_FILES)} | {"sub": True}
    for name, is_directory in wanted.items():
        if not is_directory:
            room.put(name, b"x")
    found = room.backend.list(room.path())
    require(len(found) == len(wanted), f"{len(found)} names listed, {len(wanted)} are there")
    require({e.name: e.is_directory for e in found} == wanted, "names or kinds are wrong")
    require(room.names("sub") == {"deeper"}, "a listing goes deeper than one directory")
    refused(lambda: room.backend.list(room.path("rank-00000.json")), ConfigError)


@_case()
def names_are_kept_as_they_are(room: Room) -> None:
    """Names that the store uses, long ones and ones that differ in case alone are kept apart and unchanged."""
    room.make()
    names = [
        "step-00000001.g3-0123abcd",
        "rank-00000.safetensors",
        ".probe-0a",
        "Run",
        "run",
        "RUN",
        "a.b",
        "a_b-c",
        "x" * 128,
    ]
    for index, name in enumerate(names):
        room.put(name, str(index).encode())
    require(room.names() == set(names), f"listed: {sorted(room.names())}")
    for index, name in enumerate(names):
        require(room.content(name) == str(index).encode(), f"{name} holds what was written to another name")


@_case()
def directories_may_be_made_again(room: Room) -> None:
    """`make_directory` and `sync_directory` may be repeated and keep what is there."""
    for _ in range(2):
        room.backend.make_directory(room.path("a/b"))
        room.put("a/b/f", b"x")
        room.backend.sync_directory(room.path("a/b"))
        room.backend.sync_directory(room.path("a/b"))
    require(room.names("a/b") == {"f"}, "a file was lost")


@_case("reserve")
def a_file_that_cannot_fit_is_refused_first(room: Room) -> None:
    """A file larger than any disk is `StoreFull` before its first byte is written, and leaves nothing."""
    room.make()
    try:
        sink = room.backend.create(room.path("f"), 1 << 60, exclusive=False)
    except StoreFull:
        require(room.names() == set(), f"it left {sorted(room.names())}")
        return
    sink.discard()
    raise Unsupported(f"{room.backend.url}: space cannot be reserved here; a full disk is met while writing")


@_case("private")
def files_are_private(room: Room) -> None:
    """Files have the mode 0600 and directories 0700, whatever the umask."""
    if not isinstance(room.backend, LocalBackend):
        raise Unsupported(f"{room.backend.url}: modes cannot be looked at here")
    before = os.umask(0)
    try:
        room.backend.make_directory(room.path("d"))
        room.put("d/f", b"x")
        room.backend.create_exclusive(room.path("d/m"), b"x")
        room.backend.claim(room.path("d/c"), "attempt.json", b"x")
    finally:
        os.umask(before)
    top = room.backend.root / room.directory
    for path in (top, *top.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        require(mode == (0o700 if path.is_dir() else 0o600), f"{path.name} has the mode {mode:04o}")
