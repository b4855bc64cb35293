"""Rollback and resumption give the batches and random states of a run that nothing happened to (S10, S11)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, WeightedRandomSampler

from arc_dist.data.digest import batch_digest
from arc_dist.data.position import read_mark
from arc_dist.data.sampler import SeededSampler
from arc_dist.data.source import BatchSource
from arc_dist.snapshot.rng import capture_rng, pack_rng, restore_rng
from data_sources import OwnGenerator, Rows, Saved, Stream, draw_like_a_model, rng_digest, seed_everything, train

EPOCHS = 3
Factory = Callable[[], Iterable[Any]]


def dataloader(dataset: Callable[[], Any], **options: Any) -> Factory:
    return lambda: DataLoader(dataset(), batch_size=4, **options)


def seeded(draws: str = "", **options: Any) -> Factory:
    def make() -> Iterable[Any]:
        rows = Rows(draws=draws)
        return DataLoader(rows, batch_size=4, sampler=SeededSampler(rows, num_replicas=2, rank=1, seed=3), **options)

    return make


def distributed(draws: str = "", **options: Any) -> Factory:
    def make() -> Iterable[Any]:
        rows = Rows(size=47, draws=draws)
        return DataLoader(rows, batch_size=4, sampler=DistributedSampler(rows, num_replicas=2, rank=0), **options)

    return make


def own_generator(**options: Any) -> Factory:
    return lambda: DataLoader(
        Rows(draws="torch"), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5), **options
    )


def sampler(kind: Callable[[Any], Any], **options: Any) -> Factory:
    def make() -> Iterable[Any]:
        rows = Rows()
        return DataLoader(rows, batch_size=4, sampler=kind(rows), **options)

    return make


class Reiterable:
    """Any iterable: its batches come from the global generators, drawn as they are asked for."""

    def __iter__(self) -> Any:
        for index in range(6):
            yield torch.rand(2) + index


ALL_DRAWS = "torch python numpy"
IN_PROCESS: dict[str, Factory] = {
    "in order": dataloader(Rows),
    "in order, augmented": dataloader(lambda: Rows(draws=ALL_DRAWS)),
    "shuffled": dataloader(Rows, shuffle=True),
    "shuffled, augmented": dataloader(lambda: Rows(draws=ALL_DRAWS), shuffle=True),
    "shuffled, last dropped": dataloader(lambda: Rows(draws="python"), shuffle=True, drop_last=True),
    "single samples": lambda: DataLoader(Rows(7, "numpy"), batch_size=None, shuffle=True),
    "a generator of the loader's": own_generator(),
    "a generator of the dataset's": dataloader(OwnGenerator, shuffle=True),
    "with replacement": sampler(lambda rows: RandomSampler(rows, replacement=True, num_samples=70)),
    "weighted": sampler(lambda rows: WeightedRandomSampler([1.0, 2.0, 3.0] * 7 + [1.0, 1.0], 23)),
    "seeded sampler": seeded(),
    "seeded sampler, augmented": seeded(ALL_DRAWS),
    "distributed sampler": distributed("torch"),
    "iterable dataset": dataloader(Stream),
    "iterable dataset, augmented": dataloader(lambda: Stream(draws=ALL_DRAWS)),
    "list": lambda: [torch.full((2,), float(i)) for i in range(6)],
    "iterable": Reiterable,
}
WITH_WORKERS: dict[str, Factory] = {
    "in order": dataloader(Rows, num_workers=2),
    "shuffled": dataloader(Rows, shuffle=True, num_workers=2),
    "shuffled, augmented": dataloader(lambda: Rows(draws=ALL_DRAWS), shuffle=True, num_workers=2),
    "a generator of the loader's": own_generator(num_workers=2),
    "seeded sampler": seeded(num_workers=2),
    "seeded sampler, augmented": seeded("numpy", num_workers=2),
    "distributed sampler, augmented": distributed("python", num_workers=2),
    "iterable dataset, augmented": dataloader(lambda: Stream(draws=ALL_DRAWS), num_workers=2),
    "persistent workers": dataloader(Rows, shuffle=True, num_workers=2, persistent_workers=True),
}


def undisturbed(factory: Factory, **options: Any) -> list[Any]:
    seed_everything(11)
    return train(BatchSource(factory(), epochs=EPOCHS, **options))


def scramble() -> None:
    """The random state in which a restarted script finds itself has nothing to do with the one it had."""
    seed_everything(random.SystemRandom().randrange(2**32))


def check_resumed(factory: Factory, whole: list[Any], at: int) -> None:
    """An interrupted run up to batch `at`, and another that goes on, are together the undisturbed one."""
    seed_everything(11)
    source = BatchSource(factory(), epochs=EPOCHS)
    before = train(source, at)
    saved = Saved(source)
    source.close()
    scramble()
    again = BatchSource(factory(), epochs=EPOCHS)
    saved.resume(again)
    assert before + train(again) == whole, f"resumed at {at}"


@pytest.mark.parametrize("name", IN_PROCESS)
def test_a_run_resumed_at_any_batch_is_the_undisturbed_one(name: str) -> None:
    factory = IN_PROCESS[name]
    whole = undisturbed(factory)
    for at in range(len(whole) + 1):
        check_resumed(factory, whole, at)


@pytest.mark.parametrize("name", WITH_WORKERS)
def test_a_run_with_workers_resumed_at_random_batches_is_the_undisturbed_one(name: str) -> None:
    factory = WITH_WORKERS[name]
    whole = undisturbed(factory)
    per_epoch = len(whole) // EPOCHS
    points = {0, 1, per_epoch, len(whole), *random.Random(name).sample(range(len(whole)), 3)}
    for at in sorted(points):
        check_resumed(factory, whole, at)


def test_the_guarded_sequence_is_that_of_a_plain_loop() -> None:
    for factory in (IN_PROCESS["shuffled, augmented"], IN_PROCESS["distributed sampler"]):
        guarded = undisturbed(factory)
        seed_everything(11)
        loader = factory()
        plain = []
        for epoch in range(EPOCHS):
            if isinstance(loader.sampler, DistributedSampler):  # type: ignore[attr-defined]
                loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            for index, data in enumerate(loader):
                plain.append((len(plain), epoch, index, batch_digest(data), rng_digest()))
                draw_like_a_model()
        assert guarded == plain


@pytest.mark.parametrize("name", IN_PROCESS)
def test_rewinding_gives_the_same_batches_and_random_states(name: str) -> None:
    """Also across epochs, repeatedly, and from within a replay."""
    factory = IN_PROCESS[name]
    whole = undisturbed(factory)
    rng = random.Random(name)
    seed_everything(11)
    source = BatchSource(factory(), epochs=EPOCHS)
    saved = [Saved(source)]
    at = 0
    for _ in range(25):
        steps = train(source, 1)
        assert steps == whole[at : at + 1]
        at += len(steps)
        if at == len(saved):
            saved.append(Saved(source))
        if rng.random() < 0.3:
            at = rng.randrange(len(saved))
            saved[at].rewind(source)
    assert train(source) == whole[at:]


@pytest.mark.parametrize("name", ["shuffled, augmented", "iterable dataset, augmented", "persistent workers"])
def test_rewinding_with_workers(name: str) -> None:
    factory = WITH_WORKERS[name]
    whole = undisturbed(factory)
    seed_everything(11)
    source = BatchSource(factory(), epochs=EPOCHS)
    train(source, 4)
    saved = Saved(source)
    train(source, 5)
    saved.rewind(source)
    assert train(source) == whole[4:]


@pytest.mark.parametrize("name", ["shuffled, augmented", "a generator of the dataset's", "iterable", "list"])
def test_rewinding_further_than_the_memory_asks_the_loader_again(name: str) -> None:
    factory = IN_PROCESS[name]
    whole = undisturbed(factory)
    seed_everything(11)
    source = BatchSource(factory(), epochs=EPOCHS, replay_capacity=2)
    train(source, 8)
    saved = Saved(source)
    assert train(source, 6) == whole[8:14]
    saved.rewind(source)
    assert train(source) == whole[8:]


def test_a_position_recorded_during_a_replay_is_as_good() -> None:
    factory = IN_PROCESS["shuffled, augmented"]
    whole = undisturbed(factory)
    seed_everything(11)
    source = BatchSource(factory(), epochs=EPOCHS)
    train(source, 3)
    early = Saved(source)
    train(source, 8)
    early.rewind(source)
    assert train(source, 4) == whole[3:7]
    during = Saved(source)
    scramble()
    again = BatchSource(factory(), epochs=EPOCHS)
    during.resume(again)
    assert train(again) == whole[7:]


def test_a_resumed_run_can_be_rewound_and_resumed_again() -> None:
    factory = IN_PROCESS["shuffled, augmented"]
    whole = undisturbed(factory)
    seed_everything(11)
    source = BatchSource(factory(), epochs=EPOCHS)
    train(source, 4)
    first = Saved(source)
    for at in (6, 9, 13):
        scramble()
        source = BatchSource(factory(), epochs=EPOCHS)
        first.resume(source)
        start = Saved(source)
        assert start.position == first.position
        train(source, 2)
        start.rewind(source)
        begin = int(first.position["ordinal"])
        assert train(source, at - begin) == whole[begin:at]
        first = Saved(source)


@pytest.mark.parametrize("name", ["shuffled, augmented", "seeded sampler, augmented", "iterable"])
def test_a_mark_of_any_step_is_a_position_too(name: str) -> None:
    """A rank that dies between snapshots leaves its mark; its successor goes on there."""
    factory = IN_PROCESS[name]
    whole = undisturbed(factory)
    seed_everything(11)
    source = BatchSource(factory(), epochs=EPOCHS)
    marks = []
    for step in range(len(whole)):
        if step % 5 == 2:
            source.position()
        marks.append((source.mark(), pack_rng(capture_rng())))
        train(source, 1)
    for at, (mark, rng) in enumerate(marks):
        scramble()
        again = BatchSource(factory(), epochs=EPOCHS)
        again.resume(read_mark(mark))
        restore_rng(rng)
        assert train(again) == whole[at:]


def test_the_position_before_the_present_step_spans_its_micro_batches() -> None:
    factory = IN_PROCESS["shuffled, augmented"]
    whole = undisturbed(factory)
    seed_everything(11)
    source = BatchSource(factory(), epochs=EPOCHS)
    train(source, 4)
    rng = pack_rng(capture_rng())
    source.begin_step()
    train(source, 3)
    before = source.position_before_fetch()
    scramble()
    again = BatchSource(factory(), epochs=EPOCHS)
    again.resume(before)
    restore_rng(rng)
    assert train(again) == whole[4:]


def test_skipping_without_loading_makes_only_the_batches_that_are_checked() -> None:
    def resumed(draws: str) -> list[int]:
        seed_everything(11)
        source = BatchSource(dataloader(lambda: Rows(40, draws), shuffle=True)())
        train(source, 8)
        position = source.position()
        rows = Rows(40, draws)
        again = BatchSource(DataLoader(rows, batch_size=4, shuffle=True))
        again.resume(position)
        return rows.made

    assert len(resumed("")) == 8  # the first and the eighth batch, four rows each
    assert len(resumed("torch python")) == 8


def test_workers_that_draw_are_seen() -> None:
    for draws, drew in (("", False), ("torch", True), ("python", True), ("numpy", True)):
        seed_everything(11)
        source = BatchSource(DataLoader(Rows(draws=draws), batch_size=4, num_workers=2))
        train(source, 3)
        assert source.position()["items_draw"] is drew, draws
        source.close()


def test_a_loader_that_fails_once_can_be_asked_again() -> None:
    class Flaky(Rows):
        fails = True

        def __getitem__(self, index: int) -> Any:
            if index == 9 and self.fails:
                self.fails = False
                raise OSError("the file server is away")
            return super().__getitem__(index)

    whole = undisturbed(dataloader(lambda: Rows(draws="torch")))
    seed_everything(11)
    source = BatchSource(dataloader(lambda: Flaky(draws="torch"))(), epochs=EPOCHS)
    seen = train(source, 2)
    saved = Saved(source)
    with pytest.raises(OSError, match="away"):
        source.next()
    saved.rewind(source)
    assert seen + train(source) == whole
