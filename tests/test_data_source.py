"""The ends of the data, skipping, refusals, and what it costs."""

from __future__ import annotations

import json
import pickle
import random
import textwrap
import time
import types
from collections import UserDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from arc_dist.data.position import read_mark
from arc_dist.data.sampler import SeededSampler
from arc_dist.data.source import Batch, BatchSource
from arc_dist.errors import ConfigError, DataNotReproducible
from arc_dist.snapshot.rng import capture_rng
from data_sources import Rows, Saved, Stream, batch_digest, seed_everything, through_a_file, train
from ranks import run_plain


def ordinals(source: BatchSource) -> list[int]:
    return [batch.ordinal for batch in source]


def numbers(count: int) -> list[torch.Tensor]:
    return [torch.tensor([float(i)]) for i in range(count)]


class TestEnds:
    def test_one_epoch_when_nothing_is_said(self) -> None:
        assert ordinals(BatchSource(numbers(3))) == [0, 1, 2]

    def test_steps_go_through_as_many_epochs_as_needed(self) -> None:
        places = [(batch.epoch, batch.index) for batch in BatchSource(numbers(3), steps=5)]
        assert places == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]

    def test_the_shorter_of_epochs_and_steps_ends_the_run(self) -> None:
        assert len(ordinals(BatchSource(numbers(3), steps=5, epochs=1))) == 3
        assert len(ordinals(BatchSource(numbers(3), steps=2, epochs=7))) == 2
        assert ordinals(BatchSource(numbers(3), steps=0)) == []
        assert ordinals(BatchSource(numbers(3), epochs=0)) == []

    def test_the_end_stays_the_end_until_rewound(self) -> None:
        source = BatchSource(numbers(3))
        start = source.position()
        assert ordinals(source) == [0, 1, 2]
        with pytest.raises(StopIteration):
            source.next()
        source.rewind(start)
        assert ordinals(source) == [0, 1, 2]

    def test_an_infinite_stream_with_steps(self) -> None:
        def stream() -> Iterator[int]:
            while True:
                yield 1

        assert len(ordinals(BatchSource(stream(), steps=7))) == 7

    def test_steps_never_ask_for_a_batch_too_many(self) -> None:
        asked = []
        source = BatchSource((asked.append(i) for i in range(10)), steps=4)
        assert len(ordinals(source)) == 4
        assert len(asked) == 4

    @pytest.mark.parametrize("loader", [[], DataLoader(Rows(3), batch_size=4, drop_last=True), DataLoader(Stream(0))])
    def test_an_empty_loader_is_an_error_that_says_why(self, loader: Iterable[Any]) -> None:
        with pytest.raises(ConfigError, match=r"no batch in epoch 0.*drop_last"):
            BatchSource(loader).next()

    def test_a_generator_cannot_have_two_epochs(self) -> None:
        source = BatchSource(iter(numbers(3)), epochs=2)
        train(source, 3)
        with pytest.raises(ConfigError, match=r"epoch 1.*only once.*epochs=1"):
            source.next()

    def test_a_generator_that_ends_before_the_steps_do_ends_the_run(self, caplog: pytest.LogCaptureFixture) -> None:
        assert len(ordinals(BatchSource(iter(numbers(3)), steps=5))) == 3
        assert "ended after 3 batches" in caplog.text

    def test_set_epoch_reaches_sampler_and_dataset(self) -> None:
        class Told(Rows):
            epochs: list[int]

            def set_epoch(self, epoch: int) -> None:
                self.epochs = [*getattr(self, "epochs", []), epoch]

        rows = Told(8)
        sampler = SeededSampler(rows, num_replicas=1, rank=0)
        train(BatchSource(DataLoader(rows, batch_size=4, sampler=sampler), epochs=3))
        assert rows.epochs == [0, 1, 2]
        assert sampler.epoch == 2

    def test_ends_epoch(self) -> None:
        source = BatchSource(numbers(3), epochs=2)
        assert [source.ends_epoch(batch) for batch in source] == [False, False, True] * 2
        source = BatchSource(numbers(3), epochs=1)
        source.skip(2)
        assert [source.ends_epoch(batch) for batch in source] == [False, True]
        with pytest.raises(ConfigError, match="not known in advance"):
            BatchSource(iter([])).ends_epoch(Batch(None, 0, 0, 0))

    @pytest.mark.parametrize("options", [{"epochs": -1}, {"steps": 1.5}, {"replay_capacity": -1}])
    def test_arguments_out_of_range(self, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=next(iter(options))):
            BatchSource([], **options)

    def test_what_is_no_loader(self) -> None:
        with pytest.raises(ConfigError, match=r"cannot be iterated over.*call the function"):
            BatchSource(lambda: iter([]))  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="not a data position"):
            BatchSource([]).resume({"version": 1, "epoch": 3})
        with pytest.raises(ConfigError, match="not a mark"):
            read_mark(b"something else")
        with pytest.raises(DataNotReproducible, match="Upgrade"):
            BatchSource([]).resume({"version": 99})


class TestSkipping:
    def test_a_skipped_batch_does_not_come_again_after_a_rewind(self) -> None:
        source = BatchSource(numbers(6))
        train(source, 1)
        position = source.position()
        train(source, 3)
        source.skip(2)
        source.rewind(position)
        assert ordinals(source) == [1, 3, 4, 5]
        assert source.skipped() == (2,)

    def test_skips_outlive_the_state_that_is_rolled_back(self) -> None:
        source = BatchSource(numbers(6))
        start = source.position()
        for skip in (3, 1):
            train(source, 4)
            source.skip(skip)
            source.rewind(start)
        assert ordinals(source) == [0, 2, 4, 5]

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_a_skip_is_the_same_in_memory_and_after_a_restart(self, num_workers: int) -> None:
        """Both fetch the batch and do not give it, so the random sequences agree from there on."""

        def make() -> BatchSource:
            loader = DataLoader(Rows(draws="torch numpy"), batch_size=4, shuffle=True, num_workers=num_workers)
            return BatchSource(loader, epochs=2)

        seed_everything(3)
        source = make()
        train(source, 2)
        saved = Saved(source)
        train(source, 3)
        source.skip(4)
        saved.rewind(source)
        healed = train(source)
        assert [step[0] for step in healed] == [2, 3, *range(5, 12)]
        saved.position["skipped"] = [4]
        seed_everything(99)
        again = make()
        saved.resume(again)
        assert train(again) == healed

    def test_steps_do_not_count_skipped_batches(self) -> None:
        source = BatchSource(numbers(10), steps=4)
        train(source, 3)
        start = source.position(0)
        source.skip(1)
        source.rewind(start)
        assert ordinals(source) == [0, 2, 3, 4]

    def test_skips_are_part_of_a_position(self) -> None:
        source = BatchSource(numbers(6))
        train(source, 3)
        source.skip(4)
        again = BatchSource(numbers(6))
        again.resume(through_a_file(source.position()))
        assert ordinals(again) == [3, 5]


class Clock(Dataset[Any]):
    """Content that depends on the time."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, time.perf_counter_ns()])


class Unseeded:
    """An order from the system's entropy."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from random.SystemRandom().sample(numbers(30), 30)


class Remembering(Dataset[Any]):
    """Content that depends on what was made before."""

    def __init__(self) -> None:
        self.sum = 0.0

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        self.sum += index + torch.rand(()).item()
        return torch.tensor(self.sum)


def walk() -> Iterator[torch.Tensor]:
    """Each batch depends on draws that were made between the model's own."""
    place = torch.zeros(())
    while True:
        place = place + torch.rand(())
        yield place


class TestRefusals:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: DataLoader(Clock(), batch_size=2),
            lambda: DataLoader(Clock(), batch_size=2, num_workers=1),
            Unseeded,
            lambda: DataLoader(Remembering(), batch_size=2, shuffle=True),
            walk,
        ],
        ids=["clock", "clock in a worker", "unseeded order", "hidden state", "random walk"],
    )
    def test_a_source_that_does_not_give_the_same_again_is_found(self, make: Any) -> None:
        seed_everything(5)
        source = BatchSource(make(), steps=20)
        train(source, 5)
        saved = Saved(source)
        again = BatchSource(make(), steps=20)
        with pytest.raises(DataNotReproducible, match=r"resumed at batch 5 of epoch 0: batch \d has digest") as caught:
            saved.resume(again)
        assert "SeededSampler" in caught.value.message
        assert caught.value.fields["epoch"] == 0
        assert pickle.loads(pickle.dumps(caught.value)).fields == caught.value.fields

    def test_persistent_workers_that_draw_are_refused_after_the_first_epoch(self) -> None:
        def make() -> BatchSource:
            loader = DataLoader(Rows(draws="torch"), batch_size=4, num_workers=2, persistent_workers=True)
            return BatchSource(loader, epochs=3)

        seed_everything(5)
        source = make()
        train(source, 9)
        saved = Saved(source)
        with pytest.raises(DataNotReproducible, match="persistent_workers=False"):
            saved.resume(make())

    def test_going_on_inexactly_on_request(self, caplog: pytest.LogCaptureFixture) -> None:
        source = BatchSource(DataLoader(Clock(), batch_size=2))
        train(source, 3)
        saved = Saved(source)
        again = BatchSource(DataLoader(Clock(), batch_size=2), exact=False)
        saved.resume(again)
        assert ordinals(again) == [3, 4, 5]
        assert "going on inexactly" in caplog.text

    def test_another_batch_size_or_dataset(self) -> None:
        source = BatchSource(DataLoader(Rows(24), batch_size=4))
        train(source, 3)
        position = source.position()
        with pytest.raises(DataNotReproducible, match="4 samples per batch then, 3 now"):
            BatchSource(DataLoader(Rows(18), batch_size=3)).resume(position)
        with pytest.raises(DataNotReproducible, match="6 batches per epoch then, 3 now"):
            BatchSource(DataLoader(Rows(12), batch_size=4)).resume(position)

    def test_data_that_became_shorter(self) -> None:
        source = BatchSource(iter(numbers(6)))
        train(source, 5)
        with pytest.raises(DataNotReproducible, match="the data ended after 2 batches"):
            BatchSource(iter(numbers(2))).resume(source.position())

    def test_a_generator_cannot_go_back_beyond_the_memory(self) -> None:
        source = BatchSource(iter(numbers(20)), replay_capacity=2)
        train(source, 2)
        position = source.position()
        train(source, 9)
        with pytest.raises(DataNotReproducible, match="only once"):
            source.rewind(position)

    def test_a_generator_made_anew_by_the_restarted_script_is_resumed(self) -> None:
        def synthetic() -> Iterator[torch.Tensor]:
            for _ in range(9):
                yield torch.randn(3)

        seed_everything(4)
        whole = train(BatchSource(synthetic()))
        seed_everything(4)
        source = BatchSource(synthetic())
        train(source, 5)
        saved = Saved(source)
        seed_everything(77)
        again = BatchSource(synthetic())
        saved.resume(again)
        assert train(again) == whole[5:]

    def test_a_position_that_is_not_held_any_more(self) -> None:
        source = BatchSource(numbers(20), replay_capacity=2)
        train(source, 9)
        with pytest.raises(DataNotReproducible, match="no position before batch 3"):
            source.position(3)


class TestChangesInPlace:
    """User code may spoil the batch it was given; a replay must not give spoilt batches."""

    @staticmethod
    def spoil_and_rewind(source: BatchSource, spoil: Any) -> list[Any]:
        position = source.position()
        first = []
        for _ in range(3):
            batch = source.next()
            first.append(batch_digest(batch.data))
            spoil(batch.data)
        source.rewind(position)
        return [first, [batch_digest(source.next().data) for _ in range(3)]]

    def test_containers_are_kept_apart(self) -> None:
        def spoil(data: Any) -> None:
            data["labels"] = None
            del data["x"]
            data["extra"].append(5)

        loader = [{"x": torch.ones(2) * i, "labels": torch.ones(1), "extra": [1, 2]} for i in range(5)]
        first, again = self.spoil_and_rewind(BatchSource(loader), spoil)
        # The list's own batches were spoilt by the caller; those kept for replay were not.
        assert first == again
        users = [UserDict({"x": torch.ones(2) * i}) for i in range(5)]
        first, again = self.spoil_and_rewind(BatchSource(users), lambda data: data.pop("x"))
        assert first == again

    def test_tensors_changed_in_place_are_asked_from_the_loader_again(self, caplog: pytest.LogCaptureFixture) -> None:
        source = BatchSource(DataLoader(Rows(), batch_size=4))
        first, again = self.spoil_and_rewind(source, lambda data: data["x"].mul_(2))
        assert first == again
        assert "changed in place" in caplog.text

    def test_and_refused_where_that_is_impossible(self) -> None:
        source = BatchSource(t for t in numbers(6))
        with pytest.raises(DataNotReproducible, match="only once"):
            self.spoil_and_rewind(source, lambda data: data.mul_(2))

    def test_a_spoilt_batch_is_no_sign_of_a_position(self) -> None:
        source = BatchSource(DataLoader(Rows(), batch_size=4))
        for _ in range(3):
            source.next().data["x"].add_(1)
        again = BatchSource(DataLoader(Rows(), batch_size=4))
        again.resume(source.position())
        assert ordinals(again) == [3, 4, 5]


class TestMemory:
    def test_it_is_bounded_by_number_and_by_bytes(self) -> None:
        source = BatchSource([torch.zeros(1000) for _ in range(50)], replay_capacity=10)
        train(source)
        assert len(source._buffer) == 11
        source = BatchSource([torch.zeros(1000) for _ in range(50)], replay_bytes=16_000)
        train(source)
        assert len(source._buffer) == 4

    def test_release(self) -> None:
        source = BatchSource(numbers(20))
        train(source, 12)
        source.release(9)
        source.rewind(source.position(9))
        assert ordinals(source) == list(range(9, 20))


SCRIPT = """
    import json, pathlib, sys
    sys.path.insert(0, sys.argv[4])
    import torch
    from torch.utils.data import DataLoader
    from arc_dist.checkpoint_store.codec import decode, encode
    from arc_dist.snapshot.rng import capture_rng, pack_rng, restore_rng
    from data_sources import Rows, seed_everything, through_a_file, train
    from arc_dist.data.source import BatchSource

    if __name__ == "__main__":
        file, until, start_method = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
        options = dict(num_workers=2, multiprocessing_context=start_method) if start_method else {}
        seed_everything(0)
        source = BatchSource(DataLoader(Rows(draws="python"), batch_size=4, shuffle=True, **options), epochs=2)
        if file.exists():
            torch.rand(7)
            saved = decode(json.loads(file.read_text()))
            source.resume(saved["position"])
            restore_rng(saved["rng"])
        steps = train(source, until)
        saved = {"position": source.position(), "rng": pack_rng(capture_rng())}
        file.write_text(json.dumps(encode(saved, inline=True)[0]))
        print(json.dumps(steps))
"""


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["", pytest.param("fork", marks=pytest.mark.soak), "spawn"])
def test_processes_that_follow_each_other_are_one_run(tmp_path: Path, start_method: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))

    def run(file: str, until: int, start_method: str = start_method) -> list[Any]:
        arguments = [str(tmp_path / file), str(until), start_method, str(Path(__file__).parent)]
        done = run_plain(1, str(script), *arguments, timeout_s=100)
        assert done.exit_code == 0, done
        return json.loads(done.stdout)

    # Each worker that is spawned imports torch: forked ones must give the same, and once is enough for the others.
    whole = run("whole", 99, "fork" if start_method else "")
    assert len(whole) == 12
    stops = (8,) if start_method == "spawn" else (4, 4)
    assert [step for stop in (*stops, 99) for step in run("parts", stop)] == whole


def test_the_cost_per_batch_is_that_of_looking_at_the_random_states_a_few_times() -> None:
    """A ratio, in blocks that take turns, because test machines are busy: it is 4 to 5, some 10 us in all."""
    batches = [(torch.zeros(4), torch.zeros(4)) for _ in range(2000)]
    looking, keeping = [], []
    for _ in range(7):
        began = time.process_time()
        for _ in batches:
            capture_rng()
        looking.append(time.process_time() - began)
        source = BatchSource(batches)
        began = time.process_time()
        for _ in source:
            pass
        keeping.append(time.process_time() - began)
    assert min(keeping) < 12 * min(looking)


def test_batch_is_a_plain_tuple_with_names() -> None:
    batch = BatchSource(numbers(1)).next()
    assert isinstance(batch, tuple)
    assert types.SimpleNamespace(**batch._asdict()).ordinal == 0


def test_after_resuming_there_is_a_sample_of_the_data_until_the_next_batch() -> None:
    source = BatchSource(DataLoader(Rows(draws="torch"), batch_size=4))
    train(source, 3)
    again = BatchSource(DataLoader(Rows(draws="torch"), batch_size=4))
    assert again.sample is None
    again.resume(source.position())
    assert again.sample["x"].shape == (4, 3)
    again.next()
    assert again.sample is None
