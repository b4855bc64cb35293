"""A file on its way to S3: several parts at once, and a name that exactly one of several writers gets.

A part is a copy of its bytes (the client libraries take nothing that they cannot keep) and is sent by a thread that
lives as long as its request. They are daemons: a server that never answers must not hold up the end of the process.
"""

from __future__ import annotations

import contextlib
import io
import threading
import uuid
from typing import Any

from arc_dist.checkpoint_store.backends.service_errors import (
    MADE_CODES,
    NameTakenError,
    fenced,
    service_code,
    translated,
)
from arc_dist.errors import StoreGone

PART_BYTES = 8 << 20  # little beside the snapshot, and worth its request; S3 takes no less than 5 MiB
_MAX_PARTS = 10_000  # S3's own limit
# Three parts at once. Each costs its bytes, and once more where a transport copies what the kernel has not taken yet
# (plain HTTP before Python 3.12): with what an allocator keeps, that is just below 64 MiB.
_ROOM_BYTES = 3 * PART_BYTES
_WRITER = "arc-writer"  # names, in an object's metadata, the sink that made it


class Room:
    """Bounds the bytes of the parts that are on their way, over all files that share it.

    One part may always go, however large; it waits for nothing but requests, each of which the client ends in time.
    """

    def __init__(self, nbytes: int = _ROOM_BYTES) -> None:
        self._nbytes = nbytes
        self._taken = 0
        self._changed = threading.Condition()

    def wait(self, nbytes: int) -> None:
        """Waits until so many bytes may go, and takes nothing."""
        with self._changed:
            self._changed.wait_for(lambda: self._taken == 0 or self._taken + nbytes <= self._nbytes)

    def take(self, nbytes: int) -> None:
        """Waits until so many bytes may go."""
        with self._changed:
            self.wait(nbytes)
            self._taken += nbytes

    def give_back(self, nbytes: int) -> None:
        """To be called once for each `take`."""
        with self._changed:
            self._taken -= nbytes
            self._changed.notify_all()


class S3Sink:
    """One upload. The name appears with the request that ends it: one PUT, or the completion of an upload in parts.

    Not every service looks at the condition when the parts are joined (radosgw 16 does not), so an exclusive upload in
    parts first creates an object ``<name>.claim``, conditionally and in one PUT; only its creator joins.

    Every object that it makes names this sink in its metadata. So it knows its own when the answer to a request was
    lost and the client's next attempt was told that the name is taken; and `discard` removes nothing of another writer.

    Args:
        filesystem: of s3fs.
        path: ``bucket/key``.
        where: the same for messages.
        nbytes: what will be written. At most 10,000 parts carry it, of 8 MiB each for up to 78 GiB.
        exclusive: `publish` raises Fenced when the name is taken.
        room: for parts on their way; shared by all files of a backend.
    """

    def __init__(self, filesystem: Any, path: str, where: str, nbytes: int, *, exclusive: bool, room: Room) -> None:
        self._filesystem = filesystem
        self._bucket, self._key, _ = filesystem.split_path(path)
        self._where = where
        self._condition = {"IfNoneMatch": "*"} if exclusive else {}
        self._room = room
        self._part_bytes = max(PART_BYTES, -(-nbytes // _MAX_PARTS))
        self._token = uuid.uuid4().hex
        self._filling = io.BytesIO()
        self._upload: str | None = None
        self._threads: list[threading.Thread] = []  # one for each part
        self._parts: dict[int, dict[str, Any]] = {}  # what the service said of those that it has, by number from 1
        self._failure: BaseException | None = None  # of a part
        self._asked_for: list[str] = []  # keys that may have been made; the claim first

    def write(self, data: memoryview) -> None:
        with translated("writing", self._where):
            self._raise_failure()
            while len(data):
                if self._filling.tell() == self._part_bytes:
                    self._send_part()
                    # The next is not filled while the others take up all the room: it would be one buffer more.
                    self._room.wait(self._part_bytes)
                count = min(len(data), self._part_bytes - self._filling.tell())
                self._filling.write(data[:count])
                data = data[count:]

    def publish(self) -> None:
        try:
            with translated("writing", self._where):
                if self._upload is None:
                    self._make("put_object", self._key, Body=self._filling.getvalue(), Metadata={_WRITER: self._token})
                else:
                    self._join_parts()
        except NameTakenError as error:
            self.discard()
            raise fenced(self._where) from error
        self._upload = None

    def discard(self) -> None:
        """Ends the upload and removes what it has made.

        It waits for the parts on their way, since S3 may keep one that arrives while its upload is aborted.
        """
        self._wait()
        self._filling = io.BytesIO()
        if self._upload is not None:
            with contextlib.suppress(Exception):  # the error that led here is the one to tell
                self._call("abort_multipart_upload", self._key, UploadId=self._upload)
            self._upload = None
        while self._asked_for:
            key = self._asked_for.pop()
            with contextlib.suppress(Exception):  # as above
                if self._writer_of(key) == self._token:
                    self._call("delete_object", key)

    def _send_part(self) -> None:
        """Sends what has been filled, when there is room for it."""
        if self._upload is None:
            begun = self._call("create_multipart_upload", self._key, Metadata={_WRITER: self._token})
            self._upload = str(begun["UploadId"])
        self._room.take(self._part_bytes)
        try:
            self._raise_failure()
            # Not copied: the buffer hands out the bytes that it has, and is not written again.
            body, self._filling = self._filling.getvalue(), io.BytesIO()
            number = len(self._threads) + 1
            thread = threading.Thread(target=self._carry, args=(number, body), name="arc-part", daemon=True)
            thread.start()
        except BaseException:
            self._room.give_back(self._part_bytes)
            raise
        self._threads.append(thread)

    def _carry(self, number: int, body: bytes) -> None:
        try:
            said = self._call("upload_part", self._key, UploadId=self._upload, PartNumber=number, Body=body)
            part = {name: said[name] for name in ("ETag", "ChecksumSHA256") if name in said}
            self._parts[number] = {"PartNumber": number, **part}
        except BaseException as error:  # noqa: BLE001 - whatever it is, the writer raises it
            self._failure = error
        finally:
            self._room.give_back(self._part_bytes)

    def _join_parts(self) -> None:
        self._send_part()
        self._wait()
        self._raise_failure()
        if self._condition:
            self._make("put_object", f"{self._key}.claim", Body=b"", Metadata={_WRITER: self._token})
            if self._writer_of(self._key) is not None:
                raise NameTakenError(self._where)
        parts = [self._parts[number] for number in sorted(self._parts)]
        self._make("complete_multipart_upload", self._key, UploadId=self._upload, MultipartUpload={"Parts": parts})

    def _make(self, method: str, key: str, **request: Any) -> None:
        """Sends a request that makes an object, under the condition that this file is written under."""
        self._asked_for.append(key)
        try:
            self._call(method, key, **request, **self._condition)
        except Exception as error:
            # When an answer was lost, the client's next attempt meets what the first one made.
            if service_code(error) not in MADE_CODES or self._writer_of(key) != self._token:
                raise

    def _writer_of(self, key: str) -> str | None:
        """Which sink made an object, '' if that is not said; None when there is no such object."""
        try:
            with translated("looking for", self._where):
                found = self._call("head_object", key)
        except StoreGone:
            return None
        return str(found.get("Metadata", {}).get(_WRITER, ""))

    def _wait(self) -> None:
        for thread in self._threads:
            thread.join()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _call(self, method: str, key: str, **request: Any) -> dict[str, Any]:
        return self._filesystem.call_s3(method, Bucket=self._bucket, Key=key, **request)
