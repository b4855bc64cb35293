"""What the checkpoint store costs on S3 beside the least it could cost: plain uploads and downloads by s3fs.

    python benchmarks/bench_s3.py [--endpoint URL] [--megabytes 500] [--blocks 7]

With --endpoint, credentials come from the standard environment variables; without it a moto server is started (a
stand-in written in Python, so its figures say how much our own part costs and nothing about real services).

One process, one shard, s3fs's own concurrency. All arms of a comparison take turns in one run; printed are medians with
a 95 % interval, and ratios within each turn.

* write: our shard, hashed and committed / ``s3fs.put`` of a file with the same bytes.
* read: our verified restore / ``s3fs.get`` of the same bytes into a file.
* list: requests, and seconds, to find the newest whole step among 1,000 steps of 64 ranks, and to commit another one.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import torch

from arc_dist.checkpoint_store import ShardTensor, Store, TensorSpec
from arc_dist.checkpoint_store.backends import RemoteBackend
from arc_dist.checkpoint_store.buffers import as_bytes
from arc_dist.checkpoint_store.catalog import Catalog
from arc_dist.checkpoint_store.format import MANIFEST_NAME, step_directory
from bench_store import compare, state
from stats import setting

_READY_TIMEOUT_S = 60.0


@contextlib.contextmanager
def moto_endpoint() -> Iterator[str]:
    """The URL of a moto server, while it runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + _READY_TIMEOUT_S
    try:
        while True:
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except OSError as error:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit('moto did not start. pip install "moto[server]", or give --endpoint.') from error
                time.sleep(0.1)
        os.environ.update(AWS_ACCESS_KEY_ID="bench", AWS_SECRET_ACCESS_KEY="bench", AWS_DEFAULT_REGION="us-east-1")
        yield url
    finally:
        server.kill()
        server.wait()


class Bench:
    """The arms, over one state in one bucket."""

    def __init__(self, bucket: str, directory: Path, megabytes: int) -> None:
        self.bucket = bucket
        self.files = (directory / "put", directory / "got")
        self.tensors = state(megabytes)
        self.shards = [ShardTensor(TensorSpec.whole(name, tensor), tensor) for name, tensor in self.tensors.items()]
        with open(self.files[0], "wb") as file:
            for tensor in self.tensors.values():
                file.write(as_bytes(tensor))
        self.client: Any = fsspec.filesystem("s3", use_listings_cache=False)
        self.store = Store(f"s3://{bucket}/ours", owner="bench")
        self.store.check_writable()
        self.step = 0

    def save(self) -> None:
        self.step += 1
        part = self.store.write_part(
            self.step, generation=0, rank=0, world_size=1, tensors=self.shards, objects={"step": self.step}
        )
        self.store.commit(self.step, 0, 1, {0: part}, {"certified": True})

    def put(self) -> None:
        self.client.put(str(self.files[0]), f"{self.bucket}/plain")

    def restore(self) -> None:
        self.store.open(self.step).read([shard.spec for shard in self.shards])

    def get(self) -> None:
        self.client.get(f"{self.bucket}/plain", str(self.files[1]))

    def drop_old(self) -> None:
        if self.step > 1:
            Catalog(self.store.backend, "run").delete(step_directory(self.step - 1))


@contextlib.contextmanager
def counted_requests(client: Any) -> Iterator[list[str]]:
    """The operations that a client sends within the block."""
    sent: list[str] = []

    def note(model: Any, **_: Any) -> None:
        sent.append(model.name)

    client.connect()
    events = client.s3.meta.events
    events.register("before-parameter-build.s3", note)
    try:
        yield sent
    finally:
        events.unregister("before-parameter-build.s3", note)


def list_many(bucket: str, steps: int, ranks: int) -> None:
    """Prints what the newest of so many steps costs to find; the manifests are real, all but two have no shards."""
    store = Store(f"s3://{bucket}/many", owner="bench")
    backend = RemoteBackend(f"s3://{bucket}/many")
    specs = [TensorSpec("model.w", "float32", (1,), (ranks,), (rank,)) for rank in range(ranks)]

    def write(step: int) -> dict[int, Any]:
        def part(rank: int) -> dict[str, Any]:
            shard = ShardTensor(specs[rank], torch.zeros(1))
            return store.write_part(step, generation=0, rank=rank, world_size=ranks, tensors=[shard], objects={})

        return {rank: part(rank) for rank in range(ranks)}

    store.commit(steps - 1, 0, ranks, write(steps - 1), {"certified": True})
    manifest = store.manifest(steps - 1)

    def synthetic(step: int) -> None:
        content = dataclasses.replace(manifest, step=step, directory=step_directory(step)).to_bytes()
        assert backend.create_exclusive(f"run/{step_directory(step)}/{MANIFEST_NAME}", content)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(synthetic, range(1, steps - 1)))
    parts = write(steps)
    store.commit(steps, 0, ranks, parts, {"certified": True})
    client = backend._fs()  # the client that all backends of this service share
    began = time.perf_counter()
    with counted_requests(client) as sent:
        newest = store.newest()
    seconds = time.perf_counter() - began
    assert newest is not None and newest.step == steps
    print(
        f"list   newest of {steps:,} steps of {ranks} ranks: step {newest.step}, {len(sent)} requests "
        f"(target: 20 at most), {seconds:.3f} s: {', '.join(f'{sent.count(op)} {op}' for op in sorted(set(sent)))}"
    )
    parts = write(steps + 1)
    with counted_requests(client) as sent:
        store.commit(steps + 1, 0, ranks, parts, {"certified": True})
    print(f"commit of another step there: {len(sent)} requests, one for each of {2 * ranks} files among them")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--endpoint", help="URL of the S3 service; default: a moto server of its own")
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1000, help="of the listing; 0: leave it out")
    parser.add_argument("--directory", help="where the plain file lies; default: a temporary directory")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.directory)))
        os.environ["AWS_ENDPOINT_URL"] = args.endpoint or stack.enter_context(moto_endpoint())
        bucket = f"arc-bench-{uuid.uuid4().hex[:12]}"
        client: Any = fsspec.filesystem("s3", use_listings_cache=False)
        client.mkdir(bucket)
        stack.callback(client.rm, bucket, recursive=True)
        bench = Bench(bucket, directory, args.megabytes)
        nbytes = sum(tensor.nbytes for tensor in bench.tensors.values())
        num_parameters = sum(tensor.numel() for tensor in bench.tensors.values())
        print(
            f"{setting()}; {num_parameters / 1e6:.1f} M parameters, {nbytes / 1e6:.0f} MB in {len(bench.tensors)} "
            f"tensors, 1 rank, {torch.get_num_threads()} torch thread, {args.endpoint or 'moto'}"
        )
        compare("write", {"ours": bench.save, "s3fs put": bench.put}, args.blocks, after=bench.drop_old)
        compare("read", {"ours": bench.restore, "s3fs get": bench.get}, args.blocks)
        if args.steps:
            list_many(bucket, args.steps, 64)


if __name__ == "__main__":
    main()
