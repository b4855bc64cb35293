"""torchdata's StatefulDataLoader, and other loaders that say themselves where they are."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from arc_dist.data.source import BatchSource
from arc_dist.errors import DataNotReproducible
from data_sources import OwnGenerator, Rows, Saved, Stream, seed_everything, train

EPOCHS = 3


class Counting:
    """A loader of the user's own, with state; its parts before the position are never made again."""

    def __init__(self) -> None:
        self.next = 0
        self.made: list[int] = []

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.next < 20:
            self.next += 1
            self.made.append(self.next)
            yield torch.tensor([self.next])
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


class TestLoadersOfTheUsersOwn:
    def test_they_go_on_from_their_own_state(self) -> None:
        whole = train(BatchSource(Counting(), epochs=2))
        source = BatchSource(Counting(), epochs=2)
        before = train(source, 10)
        source.position()
        before += train(source, 4)
        position = source.position()
        loader = Counting()
        again = BatchSource(loader, epochs=2)
        again.resume(position)
        assert loader.made == [11, 12, 13, 14]  # since the state before, to recognise the last one
        assert [step[:4] for step in before + train(again)] == [step[:4] for step in whole]

    def test_a_state_that_leads_elsewhere_is_refused(self) -> None:
        class Lying(Counting):
            def load_state_dict(self, state: dict[str, int]) -> None:
                self.next = state["next"] + 1

        source = BatchSource(Lying())
        train(source, 5)
        source.position()
        train(source, 5)
        with pytest.raises(DataNotReproducible, match=r"batch 9 has digest .*tried: state"):
            BatchSource(Lying()).resume(source.position())

    def test_the_state_belongs_to_the_batch_given_not_to_one_prefetched(self) -> None:
        """During a replay the loader is ahead; its state there must not become the position's."""
        source = BatchSource(Counting())
        train(source, 4)
        saved = Saved(source)
        whole = train(source, 8)
        saved.rewind(source)
        train(source, 3)
        during = Saved(source)
        again = BatchSource(Counting())
        during.resume(again)
        assert [step[0:4] for step in train(again)][:5] == [step[:4] for step in whole[3:]]


FACTORIES: dict[str, Callable[[Any], Any]] = {
    "in order": lambda make: make(Rows()),
    "shuffled": lambda make: make(Rows(), shuffle=True),
    "shuffled, augmented": lambda make: make(Rows(draws="torch numpy"), shuffle=True),
    "own generator": lambda make: make(OwnGenerator(), shuffle=True),
    "iterable": lambda make: make(Stream()),
    "workers": lambda make: make(Rows(), shuffle=True, num_workers=2),
    "workers, augmented": lambda make: make(Rows(draws="python torch"), shuffle=True, num_workers=2),
    "workers, iterable": lambda make: make(Stream(), num_workers=2),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_stateful_dataloader(name: str) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is in the extra 'dev'")

    def make_source() -> BatchSource:
        loader = FACTORIES[name](
            lambda dataset, **options: stateful.StatefulDataLoader(dataset, batch_size=4, **options)
        )
        return BatchSource(loader, epochs=EPOCHS)

    seed_everything(11)
    whole = train(make_source())
    points = range(len(whole) + 1)
    if "workers" in name:
        points = sorted(random.Random(name).sample(points, 5))
    for at in points:
        seed_everything(11)
        source = make_source()
        before = []
        while len(before) < at:
            before += train(source, min(2, at - len(before)))
            source.position()  # a snapshot every two batches
        saved = Saved(source)
        seed_everything(random.SystemRandom().randrange(2**32))
        again = make_source()
        saved.resume(again)
        start = Saved(again)
        assert train(again, 3) == whole[at : at + 3], f"resumed at {at}"
        start.rewind(again)
        assert before + train(again) == whole, f"resumed at {at}"
