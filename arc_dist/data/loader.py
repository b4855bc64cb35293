"""What can be asked of a user's loader, whatever it is: a DataLoader, a stateful one, an iterable, an iterator."""

from __future__ import annotations

import contextlib
import random
import sys
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch.utils.data import DataLoader, IterableDataset

from arc_dist.data.witness import Witness
from arc_dist.errors import ConfigError

_MAX_SEARCHED = 2000
_MAX_DEPTH = 6
_MAX_ELEMENTS = 64


@runtime_checkable
class StatefulLoader(Protocol):
    """A loader that can say where it is, as torchdata's `StatefulDataLoader` does.

    `state_dict()` describes the place after the batch given last (not the last one prefetched); after
    `load_state_dict(state)` the next iterator goes on there.
    """

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any, /) -> object: ...


class LoaderView:
    """The questions that the batch source has for a loader. Constructing it does not touch the loader.

    Args:
        loader: what the user passed.

    Attributes:
        has_empty_epochs: an epoch without any batch is no mistake.

    Raises:
        ConfigError: it cannot be iterated over.
    """

    has_empty_epochs = False

    def __init__(self, loader: Iterable[Any]) -> None:
        if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
            raise ConfigError(
                f"the loader is a {type(loader).__name__}, which cannot be iterated over. Pass a DataLoader or an "
                "iterable of batches" + (" (call the function)." if callable(loader) else ".")
            )
        self.loader = loader
        self.is_stateful = isinstance(loader, StatefulLoader)
        self.is_dataloader = isinstance(loader, DataLoader)
        # A class of the user's may start anew in __iter__ although it returns itself; these cannot.
        self.is_one_shot = isinstance(loader, types.GeneratorType) or (
            isinstance(loader, Iterator) and type(loader).__module__ in ("builtins", "itertools")
        )
        self.started = False  # an iterator was made by us

    @property
    def may_draw_here(self) -> bool:
        """Whether taking a batch from a running iterator can draw random numbers in this process."""
        if isinstance(self.loader, (list, tuple)):
            return False
        return not (type(self.loader) is DataLoader and self.loader.num_workers > 0)

    @property
    def name(self) -> str:
        return type(self.loader).__name__

    @property
    def num_workers(self) -> int:
        return getattr(self.loader, "num_workers", 0) if self.is_dataloader else 0

    @property
    def batch_size(self) -> int | None:
        size = getattr(self.loader, "batch_size", None)
        if size is None:
            size = getattr(getattr(self.loader, "batch_sampler", None), "batch_size", None)
        return size if isinstance(size, int) else None

    @property
    def length(self) -> int | None:
        """Batches per epoch, or None if the loader does not say it."""
        if self.is_dataloader and isinstance(cast("DataLoader[Any]", self.loader).dataset, IterableDataset):
            # Asking makes DataLoader warn later when the dataset's own estimate was too low.
            return None
        try:
            return len(self.loader)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            return None

    # ------------------------------------------------------------------ epochs and iterators

    def set_epoch(self, epoch: int) -> None:
        """Tells the loader, its samplers and its dataset the epoch, as a training script does before each epoch."""
        told: set[int] = set()
        for part in self._parts():
            if id(part) not in told and callable(getattr(part, "set_epoch", None)):
                told.add(id(part))
                part.set_epoch(epoch)

    def iterate(self, *, wanted: Collection[int] = (), since: int = 0) -> tuple[Iterator[Any], Witness | None]:
        """Makes an iterator; only the batches at indices in `wanted` or from `since` on are made, see `can_skip`.

        Draws from the random generators exactly what ``iter(loader)`` draws.
        """
        self.started = True
        with contextlib.ExitStack() as stack:
            witness = None
            if self.is_plain_map and self.num_workers > 0:
                witness = Witness()
                fields = vars(self.loader)
                stack.enter_context(replaced(fields, "collate_fn", witness.collate(fields["collate_fn"])))
                stack.enter_context(replaced(fields, "worker_init_fn", witness.init(fields["worker_init_fn"])))
            if since:
                fields = vars(self.loader)
                name = "sampler" if fields["batch_sampler"] is None else "batch_sampler"
                stack.enter_context(replaced(fields, name, _Skipping(fields[name], set(wanted), since)))
            return iter(self.loader), witness

    @property
    def is_plain_map(self) -> bool:
        """A DataLoader of torch's own making over a map-style dataset, whose iterators are made as we know it."""
        loader = self.loader
        return (
            isinstance(loader, DataLoader)
            and type(loader).__iter__ is DataLoader.__iter__
            and not isinstance(getattr(loader, "dataset", None), IterableDataset)
            and {"collate_fn", "worker_init_fn", "sampler", "batch_sampler"} <= vars(loader).keys()
            and not self._is_persistent
        )

    def can_skip(self, items_draw: bool | None) -> bool:
        """Whether later batches are the same when earlier ones were never made.

        In this process they are: what an item draws is a matter of the random state before its fetch, which is known.
        A worker's random state depends on all items it made before, so there they must not draw at all.
        """
        if not self.is_plain_map or self._dataset_generators():
            return False
        return self.num_workers == 0 or items_draw is False

    @property
    def has_used_workers(self) -> bool:
        """Worker processes of an earlier epoch are waiting for the next."""
        return self._is_persistent and getattr(self.loader, "_iterator", None) is not None

    def arrange_workers(self, *, used: bool) -> None:
        """Brings persistent workers to where an epoch began: making them draws a seed, using them again does not."""
        if not self._is_persistent or self.has_used_workers == used:
            return
        if used:
            iter(self.loader)
        else:
            self.loader._iterator = None  # type: ignore[attr-defined]

    @property
    def _is_persistent(self) -> bool:
        return self.num_workers > 0 and getattr(self.loader, "persistent_workers", False)

    # ------------------------------------------------------------------ generators held by the loader

    def generator_states(self) -> dict[str, Any]:
        """States of all generators that samplers, dataset and collate function hold, by where they were found."""
        return {path: _state_of(generator) for path, generator in self._generators().items()}

    def restore_generators(self, states: Mapping[str, Any]) -> None:
        """Sets the generators found at the same places."""
        found = self._generators()
        for path, state in states.items():
            if path in found:
                _set_state(found[path], state)

    def _parts(self) -> list[Any]:
        batch_sampler = getattr(self.loader, "batch_sampler", None)
        parts = [
            self.loader,
            getattr(self.loader, "sampler", None),
            batch_sampler,
            getattr(batch_sampler, "sampler", None),
            getattr(self.loader, "dataset", None),
        ]
        return [part for part in parts if part is not None]

    def _generators(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        seen: set[int] = set()
        if not self.is_dataloader:
            _search(self.loader, "loader", found, seen, 0)
            return found
        for name in ("generator", "sampler", "batch_sampler", "dataset", "collate_fn"):
            _search(getattr(self.loader, name, None), name, found, seen, 0)
        return found

    def _dataset_generators(self) -> bool:
        return any(path.startswith(("dataset", "collate_fn")) for path in self._generators())


class _Skipping:
    """An index sampler that gives only some of another's indices. All are drawn, lazily, in their order."""

    def __init__(self, sampler: Iterable[Any], wanted: set[int], since: int) -> None:
        self._sampler = sampler
        self._wanted = wanted
        self._since = since

    def __iter__(self) -> Iterator[Any]:
        for index, indices in enumerate(self._sampler):
            if index >= self._since or index in self._wanted:
                yield indices

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type]


@contextlib.contextmanager
def replaced(fields: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    """For the moment in which an iterator is made; DataLoader forbids ordinary assignment to its samplers."""
    old, fields[name] = fields[name], value
    try:
        yield
    finally:
        fields[name] = old


def _search(value: Any, path: str, found: dict[str, Any], seen: set[int], depth: int) -> None:
    """Finds generators in an object's attributes and containers, to a bounded depth and number of objects."""
    if value is None or id(value) in seen or len(seen) >= _MAX_SEARCHED or depth > _MAX_DEPTH:
        return
    if isinstance(value, (str, bytes, int, float, torch.Tensor, type, types.ModuleType)):
        return
    seen.add(id(value))
    if _is_generator(value):
        found[path] = value
        return
    if isinstance(value, Mapping):
        entries = [(f"[{key!r}]", value[key]) for key in list(value)[:_MAX_ELEMENTS]] if type(value) is dict else []
    elif isinstance(value, (list, tuple)):
        entries = [(f"[{i}]", entry) for i, entry in enumerate(value[:_MAX_ELEMENTS])]
    else:
        entries = []
    fields = getattr(value, "__dict__", None)
    if isinstance(fields, dict):
        entries += [(f".{name}", entry) for name, entry in fields.items()]
    for suffix, entry in entries:
        _search(entry, path + suffix, found, seen, depth + 1)


def _is_generator(value: object) -> bool:
    if isinstance(value, (torch.Generator, random.Random)):
        return not isinstance(value, random.SystemRandom)
    numpy = sys.modules.get("numpy")
    # A module that was imported only in part, or by another interpreter, has no `random`.
    return numpy is not None and isinstance(value, (numpy.random.Generator, numpy.random.RandomState))


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state().clone()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "bit_generator"):
        return generator.bit_generator.state
    return generator.get_state(legacy=False)


def _set_state(generator: Any, state: Any) -> None:
    setter: Callable[[Any], None]
    if isinstance(generator, torch.Generator):
        setter = generator.set_state  # type: ignore[assignment]
    elif isinstance(generator, random.Random):
        setter = generator.setstate
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
        return
    else:
        setter = generator.set_state
    setter(state)
