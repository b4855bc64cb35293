"""What a snapshot and a rollback cost, beside the least that copying the same bytes can cost.

    python benchmarks/bench_snapshot.py [--params-millions 10 50] [--blocks 15] [--threads N]

Prints, for a GPT-shaped model with AdamW after its first steps, the median time over interleaved blocks of

* bare copy: every tensor of the state into preallocated private memory, one `copy_` each; and back;
* snapshot: the whole capture (tensors, optimizer settings, random state, headers) into a ring slot;
* rollback: the whole restore in place;
* clone: every tensor cloned, which is what `copy.deepcopy(state_dict())` costs at the least.

Ratios are the medians of the ratios within each block, with a 95 % interval of the median (order statistics).

Then, for each form of snapshots, the bytes that a ring of two slots holds in memory and on disk after some steps and
captures, by the bytes of the state, and the time of a capture by that of a bare copy: for the same model, and for one
that is frozen but for low-rank adapters (1 % of its parameters).
"""

from __future__ import annotations

import argparse
import timeit
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from arc_dist.snapshot.form import Form
from arc_dist.snapshot.record import StepRecord
from arc_dist.snapshot.ring import SnapshotRing, own_directory
from arc_dist.snapshot.rng import capture_rng, pack_rng, restore_rng
from arc_dist.snapshot.state import TrainingState
from stats import median_interval, setting

_WARM_UP = 6  # captures until every slot has been written in its form's own layout


def make_state(millions: float) -> tuple[TrainingState, Callable[[], None]]:
    """A GPT-shaped stack of about `millions` parameters with AdamW state, and a function that takes a step."""
    width = 384 if millions < 30 else 512 if millions < 100 else 768
    per_layer = 12 * width * width
    layers = max(1, round(millions * 1e6 / per_layer))
    blocks = [
        nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(3 * width, width),
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.GELU(),
            nn.Linear(3 * width, width),
        )
        for _ in range(layers)
    ]
    model = nn.Sequential(*blocks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(4, width)).square().mean().backward()
        optimizer.step()
        scheduler.step()

    return TrainingState({"model": model}, {"optimizer": optimizer}, [scheduler]), step


def measure(millions: float, blocks: int) -> None:
    """Prints the table for one size."""
    state, step = make_state(millions)
    step()
    ring = SnapshotRing()
    specs, tensors = state.tensors()
    private = [torch.zeros_like(tensor, requires_grad=False) for tensor in tensors]

    @torch.no_grad()
    def bare() -> None:
        for target, source in zip(private, tensors, strict=True):
            target.copy_(source)

    @torch.no_grad()
    def bare_back() -> None:
        for target, source in zip(tensors, private, strict=True):
            target.copy_(source)

    @torch.no_grad()
    def clone() -> None:
        clones = [tensor.clone() for tensor in tensors]
        clones.clear()

    number = 0

    def snapshot() -> None:
        nonlocal number
        number += 1
        assert ring.capture(number, 0, *state.tensors(), state.small()) is not None

    def rollback() -> None:
        newest = max(ring.held(), key=lambda info: info.step)
        state.restore(*ring.restore(newest.slot))

    ways = {"bare copy": bare, "snapshot": snapshot, "bare copy back": bare_back, "rollback": rollback, "clone": clone}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():  # once for the memory, once for the caches
        way()
        way()
    for block in range(blocks):
        order = list(ways) if block % 2 == 0 else list(reversed(ways))
        for name in order:
            times[name].append(min(timeit.repeat(ways[name], number=1, repeat=2)))
    nbytes = sum(spec.nbytes for spec in specs)
    parameters = sum(p.numel() for model in state.models.values() for p in model.parameters())
    print(
        f"\n{parameters / 1e6:.1f} M parameters, {nbytes / 1e6:.1f} MB of state in {len(specs)} tensors, "
        f"{blocks} blocks"
    )
    for name, values in times.items():
        middle, low, high = median_interval(values)
        print(
            f"  {name:16s} {1e3 * middle:9.3f} ms  [{1e3 * low:.3f}, {1e3 * high:.3f}]  "
            f"{nbytes / middle / 1e9:6.2f} GB/s"
        )
    for name, base in (("snapshot", "bare copy"), ("rollback", "bare copy back"), ("clone", "bare copy")):
        middle, low, high = median_interval([a / b for a, b in zip(times[name], times[base], strict=True)])
        print(f"  {name} / {base}: {middle:.3f}  [{low:.3f}, {high:.3f}]")
    ring.close()


class Adapted(nn.Module):
    """A frozen linear layer with a trained low-rank product beside it, as LoRA has it."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(x) + self.up(self.down(x))


def make_adapted(millions: float) -> tuple[TrainingState, Callable[[], None]]:
    """A stack of about `millions` parameters, 1 % of them trained."""
    width = 800
    model = nn.Sequential(*[Adapted(width, rank=4) for _ in range(max(1, round(millions * 1e6 / width**2)))])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(4, width)).square().mean().backward()
        optimizer.step()

    return TrainingState({"model": model}, {"optimizer": optimizer}), step


def measure_forms(title: str, state: TrainingState, step: Callable[[], None], blocks: int) -> None:
    """Prints the table of forms for one state; every capture follows a step, so that what trains has changed."""
    step()
    specs, tensors = state.tensors()
    private = [torch.zeros_like(tensor, requires_grad=False) for tensor in tensors]
    nbytes = sum(spec.nbytes for spec in specs)
    forms = [form for form in Form if form is not Form.AUTO]
    directories = {form: own_directory(Path("/dev/shm"), f"bench-{form.value}") for form in forms}
    rings = {
        form: SnapshotRing(owned.path, form=form, rounds=state.is_parameter if form is Form.BF16 else None)
        for form, owned in directories.items()
    }

    @torch.no_grad()
    def bare() -> None:
        for target, source in zip(private, tensors, strict=True):
            target.copy_(source)

    times: dict[Form | None, list[float]] = {key: [] for key in (None, *forms)}
    for number in range(_WARM_UP + blocks):
        step()
        small = state.small()
        took: dict[Form | None, float] = {None: timeit.timeit(bare, number=1)}
        for form in forms if number % 2 else reversed(forms):
            ring = rings[form]
            took[form] = timeit.timeit(lambda: ring.capture(number, 0, specs, tensors, small), number=1)  # noqa: B023
            ring.certify(number)
        for key, values in times.items():
            values += [took[key]] if number >= _WARM_UP else []
    print(f"\n{title}: {nbytes / 1e6:.1f} MB of state in {len(specs)} tensors, two slots, {blocks} blocks")
    print("  form         in memory  on disk (bytes / bytes of the state)   capture / bare copy")
    for form in forms:
        files = list(directories[form].path.glob("*.bin"))
        memory = sum(path.stat().st_size for path in files if not path.is_symlink()) / nbytes
        disk = sum(path.stat().st_size for path in files if path.is_symlink()) / nbytes
        middle, low, high = median_interval([a / b for a, b in zip(times[form], times[None], strict=True)])
        print(f"  {form.value:12s} {memory:9.3f}  {disk:7.3f}  {'':33s} {middle:6.3f}  [{low:.3f}, {high:.3f}]")
        rings[form].close()
        directories[form].close()


def measure_small() -> None:
    """Prints what is paid at every step."""
    owned = own_directory(Path("/dev/shm"), "bench")
    record = StepRecord(owned.path)
    state = capture_rng()
    print("\nat every step, best of 5 x 2000, in us:")
    for name, way in {
        "random state, captured": capture_rng,
        "random state, packed": lambda: pack_rng(state),
        "random state, restored": lambda: restore_rng(state),
        "step record, random state included": lambda: record.write(1, capture_rng()),
    }.items():
        print(f"  {name:36s} {min(timeit.repeat(way, number=2000, repeat=5)) / 2000 * 1e6:7.1f}")
    record.close()
    owned.close()


def main() -> None:
    """Runs all sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params-millions", type=float, nargs="+", default=[2.0, 10.0, 50.0])
    parser.add_argument("--form-millions", type=float, nargs="*", default=[50.0])
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{setting()}, {torch.get_num_threads()} threads")
    for millions in arguments.params_millions:
        measure(millions, arguments.blocks)
    for millions in arguments.form_millions:
        measure_forms(f"dense {millions:g} M", *make_state(millions), arguments.blocks)
        measure_forms(f"adapters on frozen {millions:g} M", *make_adapted(millions), arguments.blocks)
    measure_small()


if __name__ == "__main__":
    main()
