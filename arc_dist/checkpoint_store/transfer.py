"""Copies a committed step from one place to another: every byte is hashed on the way, the manifest comes last.

The copy has the bytes of the original, manifest included, so it is the same checkpoint in another place. Of a step that
refers to bytes of other steps the copy has these bytes itself (see `resolve`), so it needs no other step there. Until
its manifest is there it is no checkpoint, so a copy may be given up or killed at any point. It may then be begun again,
by anyone: files that arrived whole are recognised by their digests and are not sent a second time.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import threading
from collections.abc import Callable, Collection, Iterable, Iterator

from arc_dist.checkpoint_store.backends import Backend, Sink, Source
from arc_dist.checkpoint_store.commit import check_written
from arc_dist.checkpoint_store.format import (
    ATTEMPT_NAME,
    MANIFEST_NAME,
    MAX_ATTEMPT_BYTES,
    MAX_MANIFEST_BYTES,
    check_run_name,
    digest_of,
    new_hash,
    step_of_directory,
)
from arc_dist.checkpoint_store.manifest import FileEntry, Manifest, parse_manifest
from arc_dist.checkpoint_store.pace import Pace
from arc_dist.checkpoint_store.pins import change_marks, read_marks
from arc_dist.checkpoint_store.resolve import Resolved, resolve
from arc_dist.checkpoint_store.threads import DaemonExecutor
from arc_dist.errors import ConfigError, Fenced, StoreCorrupt, StoreError, StoreGone

_BLOCK_BYTES = 4 << 20  # as the writer's: small enough to stay in the cache for the hash
_NUM_STREAMS = 4  # files on their way at once; an object store gives one stream a fraction of the bandwidth
_VISIBLE_TIMEOUT_S = 15.0  # NFS clients may not see another client's new file for some seconds


class TransferAborted(StoreError):
    """The copy was given up on request. What arrived stays, and the next copy of the step goes on from it."""

    retryable = True


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """What copying a step came to.

    Attributes:
        directory: the step's directory, of the same name in both places.
        nbytes: of all files of the step, the manifest apart.
        sent_nbytes: what had to be sent; less when files were there from an earlier copy.
        num_sent: files that were sent, `attempt.json` and the manifest apart.
        num_present: files that were there already, whole.
        committed: whether this call created the manifest; False when the step was there already.
    """

    step: int
    directory: str
    nbytes: int
    sent_nbytes: int
    num_sent: int
    num_present: int
    committed: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """A range of a file that has one digest; `tensor` is the name of the tensor whose bytes they are, if any."""

    start: int
    nbytes: int
    digest: str
    tensor: str | None = None


def copy_step(
    source: Backend,
    run: str,
    directory: str,
    target: Backend,
    *,
    target_run: str | None = None,
    progress: Callable[[int], None] | None = None,
    should_abort: Callable[[], bool] | None = None,
    max_bytes_per_s: float | None = None,
) -> Transfer:
    """Copies one committed step. Safe to repeat.

    It is also safe when two processes copy the same step at once, if the target shows files only when they are whole
    (`Capabilities.atomic_publish`; all but ``memory://``).

    A step that is in the target already is checked there, byte by byte, and files that are missing or damaged are
    sent again: copying is also how a damaged copy is repaired.

    Args:
        source: where the step is.
        run: its run there.
        directory: its directory in the run; the copy's has the same name.
        target: where it goes. Its root is made usable first (`Backend.prepare`).
        target_run: the run in the target; `run` without it.
        progress: called with the number of bytes done since the last call, whether sent or found; from several threads.
        should_abort: asked between blocks, from several threads; True gives the copy up with `TransferAborted`.
        max_bytes_per_s: limit of what is sent, over all files together; None for no limit.

    Raises:
        TransferAborted: `should_abort` said so.
        StoreCorrupt: a byte of the source differs from its manifest; the file and the tensor are named.
        Fenced: the target's directory belongs to another attempt at the step.
        ConfigError: source and target are the same place; the target cannot create exclusively.
        StoreError: see `arc_dist.errors`. The target has no new manifest then, unless what failed was the last fsync,
            behind it.
    """
    target_run = check_run_name(run if target_run is None else target_run)
    if max_bytes_per_s is not None and not max_bytes_per_s > 0:
        raise ConfigError(f"max_bytes_per_s={max_bytes_per_s}: give a positive number, or None for no limit.")
    if (source.url.rstrip("/"), run) == (target.url.rstrip("/"), target_run):
        raise ConfigError(f"copying {run}/{directory}: {source.url} is both source and target. Name another target.")
    data = source.read(f"{run}/{directory}/{MANIFEST_NAME}", MAX_MANIFEST_BYTES)
    resolved = resolve(parse_manifest(data, _name(source, f"{run}/{directory}/{MANIFEST_NAME}"), directory))
    manifest = resolved.manifest
    if resolved.headers:
        data = manifest.to_bytes()
    job = _Job(
        source=source,
        source_path=f"{run}/{directory}",
        target=target,
        target_path=f"{target_run}/{directory}",
        manifest=manifest,
        resolved=resolved,
        progress=progress,
        flow=_Flow(max_bytes_per_s, should_abort),
    )
    target.prepare()
    job.require_no_other(data)
    job.claim()
    sent = job.send_all()
    check_written(target, job.target_path, manifest, timeout_s=_VISIBLE_TIMEOUT_S)
    committed = job.commit(data)
    target.sync_directory(target_run)
    return Transfer(
        step=manifest.step,
        directory=directory,
        nbytes=manifest.nbytes,
        sent_nbytes=sum(entry.nbytes for entry in sent),
        num_sent=len(sent),
        num_present=len(job.entries()) - len(sent),
        committed=committed,
    )


def copy_marks(
    source: Backend, run: str, directories: Collection[str], target: Backend, *, target_run: str | None = None
) -> None:
    """Brings the pins and the quarantine of some steps to the target. Call it before the steps are copied.

    Otherwise a poisoned step would be restorable in the target for a while. Marks that are there already stay.

    Raises:
        StoreError: see `arc_dist.errors`; StoreCorrupt when the marks of either place cannot be read.
    """
    target_run = check_run_name(run if target_run is None else target_run)
    marks = read_marks(source, run)
    steps = {step_of_directory(directory) for directory in directories}
    pinned = {step: pin for step, pin in marks.pins.items() if step in steps}
    quarantined = {name: mark for name, mark in marks.quarantined.items() if name in directories}
    if not pinned and not quarantined:
        return
    target.prepare()
    target.make_directory(target_run)
    change_marks(
        target,
        target_run,
        lambda there: dataclasses.replace(
            there, pins={**pinned, **there.pins}, quarantined={**quarantined, **there.quarantined}
        ),
    )


def segments_of(manifest: Manifest, entry: FileEntry) -> list[Segment]:
    """A file's ranges with their digests, from its first byte to its last (FORMAT.md, 5.4 to 5.6)."""
    if entry.kind != "tensors":
        return [Segment(0, entry.nbytes, entry.digest)]
    inside = [
        Segment(chunk.start, chunk.nbytes, chunk.digest, tensor.name)
        for tensor in manifest.tensors
        for chunk in tensor.chunks
        if chunk.directory is None and chunk.file == entry.name
    ]
    return [Segment(0, entry.header_nbytes, entry.digest), *sorted(inside, key=lambda s: (s.start, s.nbytes))]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    source: Backend
    source_path: str
    target: Backend
    target_path: str
    manifest: Manifest
    resolved: Resolved
    progress: Callable[[int], None] | None
    flow: _Flow

    def entries(self) -> list[FileEntry]:
        """What is to be sent: all files but the one that comes with the directory. The largest first: they end last."""
        return sorted((e for e in self.manifest.files if e.kind != "attempt"), key=lambda e: -e.nbytes)

    def require_no_other(self, data: bytes) -> bool:
        """Whether this manifest is in the target; Fenced when another one is."""
        path = f"{self.target_path}/{MANIFEST_NAME}"
        if not self.target.exists(path):
            return False
        if self.target.read(path, MAX_MANIFEST_BYTES) != data:
            raise Fenced(
                f"{_name(self.target, path)}: is there with other content, and was left as it is. Verify it "
                "(`arc verify`); remove it if it is damaged, and copy again.",
                step=self.manifest.step,
            )
        return True

    def claim(self) -> None:
        """Takes the directory for this attempt, or finds that it is this attempt's already."""
        entry = next((file for file in self.manifest.files if file.kind == "attempt"), None)
        if entry is None:
            raise StoreCorrupt(f"{self._source_name(MANIFEST_NAME)}: names no {ATTEMPT_NAME}. Copy another step.")
        attempt = self.source.read(f"{self.source_path}/{ATTEMPT_NAME}", MAX_ATTEMPT_BYTES)
        if digest_of(attempt, self.manifest.hash) != entry.digest:
            raise self._differs(Segment(0, entry.nbytes, entry.digest), entry)
        self._advance(entry.nbytes)
        if self.target.claim(self.target_path, ATTEMPT_NAME, attempt):
            return
        where = _name(self.target, self.target_path)
        try:
            present = self.target.read(f"{self.target_path}/{ATTEMPT_NAME}", MAX_ATTEMPT_BYTES)
        except StoreGone as error:
            raise StoreError(
                f"{where}: is there without {ATTEMPT_NAME}: a step whose removal was interrupted, or not a step. "
                "Remove it (`arc prune --orphans` does, after a while) and copy again.",
                file=where,
            ) from error
        if present != attempt:
            raise Fenced(
                f"{where}: belongs to another attempt at step {self.manifest.step}, so this one was not copied into "
                "it. Copy to another run, or remove that one.",
                step=self.manifest.step,
            )

    def send_all(self) -> list[FileEntry]:
        """Sends what is not there; returns it. On an error nothing runs any more."""
        entries = self.entries()
        with DaemonExecutor(_NUM_STREAMS, name="arc-copy") as pool:
            jobs = [pool.submit(self._send_if_missing, entry) for entry in entries]
            try:
                for job in concurrent.futures.as_completed(jobs):
                    job.result()
            except BaseException:
                self.flow.stop()
                for job in jobs:
                    job.cancel()
                raise
        return [entry for entry, job in zip(entries, jobs) if job.result()]

    def commit(self, data: bytes) -> bool:
        """Creates the manifest; False when the same one is there already."""
        path = f"{self.target_path}/{MANIFEST_NAME}"
        if self.target.create_exclusive(path, data):
            return True
        if self.require_no_other(data):
            return False
        raise StoreError(
            f"{_name(self.target, path)}: another process began to create it and did not finish. Remove the directory "
            "and copy again.",
            step=self.manifest.step,
        )

    def _send_if_missing(self, entry: FileEntry) -> bool:
        segments = segments_of(self.manifest, entry)
        if self._is_present(entry, segments):
            self._advance(entry.nbytes)
            return False
        self._send(entry, segments)
        return True

    def _is_present(self, entry: FileEntry, segments: Iterable[Segment]) -> bool:
        try:
            with contextlib.closing(self.target.open(f"{self.target_path}/{entry.name}")) as present:
                if present.nbytes != entry.nbytes:
                    return False
                block = memoryview(bytearray(min(_BLOCK_BYTES, entry.nbytes)))
                return all(self._digest(present, segment, block) == segment.digest for segment in segments)
        except (StoreGone, StoreCorrupt):
            return False  # sent anew

    def _digest(self, file: Source, segment: Segment, block: memoryview) -> str:
        hasher = new_hash(self.manifest.hash)
        for offset, size in _blocks(segment):
            self.flow.check()
            file.read_into(offset, block[:size])
            hasher.update(block[:size])
        return hasher.hexdigest()

    def _send(self, entry: FileEntry, segments: Iterable[Segment]) -> None:
        """Copies a file, hashing. It gets its name only when all its digests were right."""
        with _Sources(self.source) as sources:
            if entry.name not in self.resolved.headers:
                nbytes = sources.get(f"{self.source_path}/{entry.name}").nbytes
                if nbytes != entry.nbytes:
                    raise StoreCorrupt(
                        f"{self._source_name(entry.name)}: {nbytes} bytes, its manifest says {entry.nbytes}. Copy "
                        "from another place that has the step, or copy another step.",
                        file=self._source_name(entry.name),
                    )
            self.flow.check()
            # Not exclusive: a damaged or torn file in its place is replaced, and two copiers bring the same bytes.
            sink = self.target.create(f"{self.target_path}/{entry.name}", entry.nbytes, exclusive=False)
            try:
                block = memoryview(bytearray(min(_BLOCK_BYTES, entry.nbytes)))
                with DaemonExecutor(1, name="arc-hash") as pool:
                    for segment in segments:
                        self._send_segment(sources, sink, pool, entry, segment, block)
                sink.publish()
            except BaseException:
                sink.discard()
                raise

    def _send_segment(
        self,
        sources: _Sources,
        sink: Sink,
        pool: concurrent.futures.Executor,
        entry: FileEntry,
        segment: Segment,
        block: memoryview,
    ) -> None:
        if segment.start == 0 and entry.name in self.resolved.headers:
            sink.write(memoryview(self.resolved.headers[entry.name]))
            self._advance(segment.nbytes)
            return
        origin = self.resolved.origins.get((entry.name, segment.start))
        path, start = f"{self.source_path}/{entry.name}", segment.start
        if origin is not None:
            path, start = f"{self.source_path.rsplit('/', 1)[0]}/{origin.directory}/{origin.file}", origin.start
        hasher = new_hash(self.manifest.hash)
        for offset, size in _blocks(segment):
            self.flow.spend(size)
            sources.get(path).read_into(offset - segment.start + start, block[:size])
            hashing = pool.submit(hasher.update, block[:size])
            try:
                sink.write(block[:size])
            finally:
                hashing.result()
            self._advance(size)
        if hasher.hexdigest() != segment.digest:
            raise self._differs(segment, entry, _name(self.source, path))

    def _differs(self, segment: Segment, entry: FileEntry, path: str | None = None) -> StoreCorrupt:
        where = self._source_name(entry.name) if path is None else path
        what = f"the bytes of tensor {segment.tensor} differ" if segment.tensor else "its bytes differ"
        return StoreCorrupt(
            f"{where}: {what} from the manifest's digest, so the step was not copied. Copy it from another place that "
            "has it, or copy another step.",
            file=where,
            tensor=segment.tensor,
        )

    def _source_name(self, name: str) -> str:
        return _name(self.source, f"{self.source_path}/{name}")

    def _advance(self, nbytes: int) -> None:
        if self.progress is not None:
            self.progress(nbytes)


class _Sources:
    """The files that one copied file is made of, each opened once, by one thread."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._open: dict[str, Source] = {}

    def __enter__(self) -> _Sources:
        return self

    def __exit__(self, *exc: object) -> None:
        for source in self._open.values():
            source.close()

    def get(self, path: str) -> Source:
        if path not in self._open:
            self._open[path] = self._backend.open(path)
        return self._open[path]


class _Flow:
    """Keeps all streams of a copy together below a rate, and tells each of them when to stop."""

    def __init__(self, max_bytes_per_s: float | None, should_abort: Callable[[], bool] | None) -> None:
        self._pace = Pace(max_bytes_per_s)
        self._should_abort = should_abort
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Makes every stream end at its next block."""
        self._stopped.set()

    def check(self) -> None:
        """Raises TransferAborted when the copy is to end."""
        if self._stopped.is_set() or (self._should_abort is not None and self._should_abort()):
            raise TransferAborted("the copy was given up on request. What arrived stays; copy again to go on.")

    def spend(self, nbytes: int) -> None:
        """Waits until this many bytes may be sent."""
        self._pace.spend(nbytes, self.check)


def _blocks(segment: Segment) -> Iterator[tuple[int, int]]:
    """(offset in the file, size) of the blocks of a range."""
    end = segment.start + segment.nbytes
    for offset in range(segment.start, end, _BLOCK_BYTES):
        yield offset, min(_BLOCK_BYTES, end - offset)


def _name(backend: Backend, path: str) -> str:
    return f"{backend.url.rstrip('/')}/{path}"
