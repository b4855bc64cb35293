"""What the checkpoint store costs beside the least it could cost: raw writes, raw reads, and torch's own checkpoints.

    python benchmarks/bench_store.py [--megabytes 500] [--blocks 5] [--directory DIR]

One process, one shard. All arms of a comparison take turns in one run, so that a drifting disk hurts all alike; printed
are medians with a 95 % interval, and ratios within each turn.

* write: our shard, hashed, fsynced and committed / the same bytes written raw and fsynced / ``dcp.save`` (no fsync).
* read: our verified restore / the same bytes read raw / ``dcp.load``, from the page cache; cold: from the disk. All
  into memory that is new, as in a process that has just started; reuse: into memory that was touched before.
* stall: what stops training: a snapshot (capture) and, once it is trusted, handing it to the background writer, each
  beside a bare copy of the same bytes into memory that is there already.
* memory: how much the process grows while a save is written from the snapshot.
* list: finding the newest step among 1,000 steps of 64 ranks, in seconds.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from arc_dist.checkpoint_store import ShardTensor, Store, TensorSpec
from arc_dist.checkpoint_store.buffers import as_bytes
from arc_dist.checkpoint_store.tiers import Tier, Tiers
from arc_dist.checkpointer import Checkpointer
from arc_dist.coordinator.client import LocalClient
from arc_dist.coordinator.service import Coordinator
from arc_dist.snapshot.ring import SnapshotRing
from stats import describe, setting

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_WARM_UP = 4  # turns that are not counted: caches and allocators, and a virtual machine gets its memory page by page


def state(megabytes: int) -> dict[str, torch.Tensor]:
    """Tensors of 8 MB and a few small ones, like a transformer's."""
    torch.manual_seed(0)
    large = {f"model.layer{i:03d}.weight": torch.randn(2_000_000) for i in range(megabytes // 8)}
    return large | {f"model.layer{i:03d}.bias": torch.randn(1024) for i in range(megabytes // 8)}


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """(wall, CPU) seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - cpu


class Bench:
    """The arms, over one state in one directory."""

    def __init__(self, directory: Path, megabytes: int) -> None:
        self.directory = directory
        self.tensors = state(megabytes)
        self.shards = [ShardTensor(TensorSpec.whole(name, tensor), tensor) for name, tensor in self.tensors.items()]
        self.store = Store(directory / "store", owner="bench")
        self.store.check_writable()
        self.step = 0
        self._numbers = itertools.count()
        self.raw = directory / "raw"

    def save(self) -> None:
        self.step += 1
        part = self.store.write_part(
            self.step, generation=0, rank=0, world_size=1, tensors=self.shards, objects={"step": self.step}
        )
        self.store.commit(self.step, 0, 1, {0: part}, {"certified": True})

    def raw_write(self) -> None:
        self.raw = self.directory / f"raw-{next(self._numbers)}"  # new, as a checkpoint's file is
        with open(self.raw, "wb", buffering=0) as file:
            for tensor in self.tensors.values():
                view = as_bytes(tensor)
                for begin in range(0, len(view), 4 << 20):
                    file.write(view[begin : begin + (4 << 20)])
            os.fsync(file.fileno())

    def dcp_save(self) -> None:
        shutil.rmtree(self.directory / "dcp", ignore_errors=True)
        dcp.save(self.tensors, checkpoint_id=self.directory / "dcp", no_dist=True)

    def restore(self) -> None:
        self.store.open(self.step).read([shard.spec for shard in self.shards])

    def raw_read(self) -> None:
        targets = [torch.empty_like(tensor) for tensor in self.tensors.values()]
        with open(self.raw, "rb", buffering=0) as file:
            for target in targets:
                file.readinto(as_bytes(target))

    def dcp_load(self) -> None:
        dcp.load(
            {k: torch.empty_like(v) for k, v in self.tensors.items()},
            checkpoint_id=self.directory / "dcp",
            no_dist=True,
        )

    def evict(self) -> None:
        """Makes the page cache let go of all files."""
        for path in self.directory.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def drop_old(self) -> None:
        for path in set(self.directory.glob("raw-*")) - {self.raw}:
            path.unlink()
        shutil.rmtree(self.directory / "store" / "run" / f"step-{self.step - 1:08d}", ignore_errors=True)


def compare(
    title: str,
    arms: Mapping[str, Callable[[], object]],
    blocks: int,
    *,
    before: Callable[[], object] = lambda: None,
    after: Callable[[], object] = lambda: None,
) -> None:
    """Prints seconds of each arm, and the first arm's ratio to each other one.

    `before` is called before each arm, `after` after each turn; neither is timed.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for block in range(-_WARM_UP, blocks):
        names = list(arms) if block % 2 else list(arms)[::-1]
        for name in names:
            before()
            spent = timed(arms[name])
            if block >= 0:
                times[name].append(spent)
        after()
    first = next(iter(arms))
    for name, spent in times.items():
        line = f"{title:6} {name:18} {describe([wall for wall, _ in spent], 's')}"
        if name != first:
            wall = [mine[0] / theirs[0] for mine, theirs in zip(times[first], spent, strict=True)]
            cpu = [mine[1] / max(theirs[1], 1e-9) for mine, theirs in zip(times[first], spent, strict=True)]
            line += f"; {first} / {name}: wall {describe(wall, '', 2)}, CPU {describe(cpu, '', 2)}"
        print(line, flush=True)


def _reuse_memory(reuse: bool) -> None:
    """Whether the C library hands out freed memory again, or gives large pieces back and takes new ones."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_THRESHOLD, (2**31 - 1) if reuse else 128 << 10)
    mallopt(_M_TRIM_THRESHOLD, (2**31 - 1) if reuse else 128 << 10)


def stall(bench: Bench, blocks: int) -> None:
    """Prints what a save takes of the training thread, and of memory."""
    names, tensors = list(bench.tensors), list(bench.tensors.values())
    specs = [TensorSpec.whole(name, bench.tensors[name]) for name in names]
    private = [torch.zeros_like(tensor) for tensor in tensors]
    ring, coordinator = SnapshotRing(), Coordinator(1, job_id="bench")
    writer = Checkpointer(
        tiers=Tiers([Tier(url=bench.store.url)], run=bench.store.run, owner="bench"),
        ring=ring,
        coordinator=LocalClient(coordinator),
        rank=0,
        world_size=1,
        generation=0,
    )

    def bare() -> None:
        for target, source in zip(private, tensors, strict=True):
            target.copy_(source)

    def capture() -> None:
        assert ring.capture(bench.step, 0, specs, tensors, {}) is not None

    def submit() -> None:
        slot = ring.certify(bench.step)
        assert slot is not None
        writer.submit(bench.step, slot)

    times: dict[str, list[float]] = {"bare copy": [], "snapshot": [], "hand over": []}
    grown = []
    for block in range(blocks + 2):
        bench.step += 1
        spent = {"bare copy": timed(bare)[0], "snapshot": timed(capture)[0]}
        before = _reset_peak()
        spent["hand over"] = timed(submit)[0]
        assert writer.wait(600.0)
        assert writer.committed[-1] == bench.step
        if block >= 2:  # the first turns make the slots
            grown.append(_peak_kib() - before)
            for name, seconds in spent.items():
                times[name].append(seconds)
        bench.drop_old()
    for name in ("snapshot", "hand over"):
        ratio = [mine / floor for mine, floor in zip(times[name], times["bare copy"], strict=True)]
        print(f"stall  {name:18} {describe(times[name], 's', 4)}; / bare copy: {describe(ratio, '', 3)}", flush=True)
    print(f"memory beyond the snapshot while saving: {describe([kib / 1024 for kib in grown], 'MiB', 1)}", flush=True)
    ring.close()
    coordinator.close()


def _reset_peak() -> int:
    """Makes the peak begin anew; returns the present size in KiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak_kib()


def _peak_kib() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1])


def list_many(directory: Path, steps: int, ranks: int) -> tuple[float, int]:
    """Seconds to find the newest certified step among so many; their manifests are real, their shards are tiny."""
    store = Store(directory / "many", owner="bench")
    store.check_writable()
    tensor = torch.zeros(1)
    parts = {}
    for rank in range(ranks):
        shard = ShardTensor(TensorSpec("model.w", "float32", (1,), (ranks,), (rank,)), tensor)
        parts[rank] = store.write_part(1, generation=0, rank=rank, world_size=ranks, tensors=[shard], objects={})
    store.commit(1, 0, ranks, parts, {"certified": True})
    run = directory / "many" / "run"
    # Only directories with a manifest count, and only the newest manifest is read: copies of the first stand for it.
    for step in range(2, steps):
        (run / f"step-{step:08d}").mkdir()
        os.link(run / "step-00000001" / "manifest.json", run / f"step-{step:08d}" / "manifest.json")
    for rank in range(ranks):
        shard = ShardTensor(TensorSpec("model.w", "float32", (1,), (ranks,), (rank,)), tensor)
        parts[rank] = store.write_part(steps, generation=0, rank=rank, world_size=ranks, tensors=[shard], objects={})
    store.commit(steps, 0, ranks, parts, {"certified": True})
    began = time.perf_counter()
    newest = store.newest()
    assert newest is not None
    return time.perf_counter() - began, newest.step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--blocks", type=int, default=11)
    parser.add_argument("--directory", help="where to write; default: a temporary directory")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        bench = Bench(Path(directory), args.megabytes)
        nbytes = sum(tensor.nbytes for tensor in bench.tensors.values())
        where = args.directory or "$TMPDIR"
        print(f"{setting()}; {nbytes / 1e6:.0f} MB in {len(bench.tensors)} tensors, 1 rank, in {where}")
        writing = {"ours": bench.save, "raw + fsync": bench.raw_write, "dcp.save": bench.dcp_save}
        compare("write", writing, args.blocks, after=bench.drop_old)
        reading = {"ours": bench.restore, "raw": bench.raw_read, "dcp.load": bench.dcp_load}
        _reuse_memory(False)
        compare("read", reading, args.blocks)
        compare("cold", reading, args.blocks, before=bench.evict)
        _reuse_memory(True)
        compare("reuse", reading, args.blocks)
        stall(bench, args.blocks)
        seconds, step = list_many(Path(directory), 1000, 64)
        print(f"list   newest of 1,000 steps of 64 ranks: step {step} in {seconds:.3f} s")


if __name__ == "__main__":
    main()
