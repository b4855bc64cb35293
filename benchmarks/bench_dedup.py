"""How many bytes, and how much time, ten checkpoints of a LoRA-like state take with and without references.

    python benchmarks/bench_dedup.py [--megabytes 200] [--changing 0.01] [--saves 10] [--directory DIR]

A share of the state changes between two saves, as with frozen layers and trained adapters. Printed are the bytes of all
files that the saves left, beside those of as many whole saves, and the median time of a save. `--changing 1` is the
worst case: all changes, so looking for what did not is in vain.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from arc_dist.checkpoint_store import ShardTensor, Store, TensorSpec
from stats import describe, setting

_NUM_TENSORS = 32


def make_state(megabytes: int, changing: float) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Frozen tensors and those that change, as many of each; a share of 1 leaves none that is frozen."""
    elements = megabytes * 1_000_000 // 4 // _NUM_TENSORS
    rare = max(1, int(elements * changing))
    frozen = {} if changing >= 1 else {f"model.base.{i}": torch.randn(elements - rare) for i in range(_NUM_TENSORS)}
    adapters = {f"model.lora.{i}": torch.randn(rare) for i in range(_NUM_TENSORS)}
    return {**frozen, **adapters}, sorted(adapters)


def run(root: Path, *, megabytes: int, changing: float, saves: int, dedup: bool) -> tuple[int, list[float]]:
    """The bytes of all files, and the seconds that each save took."""
    store = Store(root, dedup=dedup)
    store.check_writable()
    torch.manual_seed(0)
    state, changed = make_state(megabytes, changing)
    times: list[float] = []
    for step in range(1, saves + 1):
        for name in changed:
            state[name].normal_()
        tensors = [ShardTensor(TensorSpec.whole(name, tensor), tensor) for name, tensor in state.items()]
        began = time.perf_counter()
        part = store.write_part(step, generation=0, rank=0, world_size=1, tensors=tensors, objects={})
        store.commit(step, 0, 1, {0: part}, {"certified": True})
        times.append(time.perf_counter() - began)
    specs = [TensorSpec.whole(name, tensor) for name, tensor in state.items()]
    loaded = store.open(saves).read(specs)
    assert all(torch.equal(tensor, state[spec.name]) for spec, tensor in zip(specs, loaded))
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file()), times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--changing", type=float, default=0.01)
    parser.add_argument("--saves", type=int, default=10)
    parser.add_argument("--directory", help="where to write; a temporary directory by default")
    args = parser.parse_args()
    print(setting())
    found: dict[bool, int] = {}
    for dedup in (False, True):
        with tempfile.TemporaryDirectory(dir=args.directory) as root:
            options = {"megabytes": args.megabytes, "changing": args.changing, "saves": args.saves}
            found[dedup], times = run(Path(root), **options, dedup=dedup)
        label = "referring" if dedup else "whole"
        print(f"{label:<10} {found[dedup] / 1e6:9.1f} MB in {args.saves} saves; first {times[0]:.3f} s, then", end=" ")
        print(describe(times[1:], "s"))
    print(f"ratio of the bytes: {found[True] / found[False]:.4f}")


if __name__ == "__main__":
    main()
