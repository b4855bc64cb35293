"""The last batches as they were given, so that a rollback gives them again without asking the loader."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from arc_dist.data.digest import batch_digest
from arc_dist.data.position import Anchor, Check
from arc_dist.data.witness import Witness
from arc_dist.snapshot.rng import RngState, pack_rng

_PLAIN = {torch.Tensor}
_VERSION = operator.attrgetter("_version")
_NBYTES = operator.attrgetter("nbytes")
_MAX_DEPTH = 8
_MAX_ANCHORS = 8
_MAX_CHECKABLE = 16  # entries that keep the random state before their fetch: 5 kB each, and fresh memory is slow


@dataclasses.dataclass
class Epoch:
    """How an epoch began, and what was learned on the way; shared by all its batches."""

    number: int
    rng: RngState | bytes | None
    generators: Mapping[str, Any]
    reused_workers: bool
    first: Check | None = None
    last: Check | None = None  # of the newest position recorded
    anchors: list[Anchor] = dataclasses.field(default_factory=list)
    witness: Witness | None = None
    drew_before: bool | None = False  # what the witness of an earlier process said
    head: tuple[Any, bytes] | None = None  # what the encoded part of a mark was made from, and itself

    @property
    def drew(self) -> bool | None:
        """Whether making items drew random numbers in workers; None when not known."""
        if self.witness is None or self.drew_before is None:
            return None
        return self.drew_before or self.witness.drew

    def packed_rng(self) -> bytes | None:
        if isinstance(self.rng, RngState):
            self.rng = pack_rng(self.rng)
        return self.rng

    def add_anchor(self, anchor: Anchor) -> None:
        """Keeps the newest few: a position needs one that lies before it."""
        if not self.anchors or self.anchors[-1].index < anchor.index:
            self.anchors.append(anchor)
            del self.anchors[:-_MAX_ANCHORS]


class Entry:
    """A batch that was given: its place, its content, and the random states around its fetch."""

    __slots__ = (
        "_content",
        "_is_checkable",
        "_tensors",
        "_versions",
        "after",
        "before",
        "epoch",
        "index",
        "nbytes",
        "ordinal",
    )

    def __init__(
        self, ordinal: int, epoch: Epoch, index: int, data: Any, before: RngState | None, after: RngState | None
    ) -> None:
        self.ordinal = ordinal
        self.epoch = epoch
        self.index = index
        self.before = before
        self.after = after
        self._is_checkable = True
        if type(data) is tuple and {*map(type, data)} == _PLAIN:
            # The commonest batch, in which nothing has to be copied. Only C functions run here.
            self._content = self._tensors = data
            try:
                self._versions = (*map(_VERSION, data),)
                self.nbytes = sum(map(_NBYTES, data))
                return
            except RuntimeError:  # an inference tensor, or a sparse one
                pass
        tensors: list[torch.Tensor] = []
        self._content = _copy_containers(data, tensors, 0)
        self._tensors = tensors
        self._versions = (*map(_version, tensors),)
        self.nbytes = sum([_nbytes(tensor) for tensor in tensors])

    @property
    def is_intact(self) -> bool:
        """False when a tensor of the batch was changed in place since it was given."""
        return all(map(operator.eq, map(_version, self._tensors), self._versions))

    @property
    def data(self) -> Any:
        """The batch, in containers of its own: taking an entry out of a dict does not change what is kept."""
        return _copy_containers(self._content, [], 0)

    def forget_before(self) -> None:
        """Lets go of the random state before the fetch, without which the batch is no check any more."""
        self._is_checkable = False
        self.before = None

    def check(self) -> Check | None:
        """How to recognise this batch; None when it was changed in place, or is not among the newest."""
        if not self._is_checkable or not self.is_intact:
            return None
        before = None
        if self.before is not None and self.after is not None:
            packed = pack_rng(self.before)
            if packed != pack_rng(self.after):
                before = packed
        return Check(self.index, batch_digest(self._content), before)


def _version(tensor: torch.Tensor) -> int:
    """Grows with every in-place change of the tensor; inference tensors have none."""
    try:
        return tensor._version
    except RuntimeError:
        return -1


def _nbytes(tensor: torch.Tensor) -> int:
    try:
        return tensor.nbytes
    except RuntimeError:  # a sparse one
        return 0


def _copy_containers(value: Any, tensors: list[torch.Tensor], depth: int) -> Any:
    kind = type(value)
    if kind is torch.Tensor or isinstance(value, torch.Tensor):
        tensors.append(value)
        return value
    if depth >= _MAX_DEPTH:
        return value
    if kind is list:
        return [_copy_containers(entry, tensors, depth + 1) for entry in value]
    if kind is tuple:
        return tuple([_copy_containers(entry, tensors, depth + 1) for entry in value])
    if kind is dict:
        return {key: _copy_containers(entry, tensors, depth + 1) for key, entry in value.items()}
    if isinstance(value, tuple):  # a named tuple cannot be changed; its tensors can
        for entry in value:
            _copy_containers(entry, tensors, depth + 1)
        return value
    if isinstance(value, Mapping):  # such as the UserDict of a tokenizer
        for entry in value.values():
            _copy_containers(entry, tensors, depth + 1)
        try:
            return copy.copy(value)
        except TypeError:  # a mapping that cannot be copied is given as it is
            return value
    return value


class ReplayBuffer:
    """A bounded window of consecutive batches, the newest last.

    Args:
        capacity: batches that can be given again.
        max_nbytes: bound on the tensors' bytes; the newest batch is kept whatever its size.
    """

    def __init__(self, capacity: int, max_nbytes: int) -> None:
        self._capacity = capacity + 1  # the batch before a position is what the position is recognised by
        self._max_nbytes = max_nbytes
        self._entries: deque[Entry] = deque()
        self._checkable: deque[Entry] = deque()  # those that keep the random state before their fetch
        self._nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def append(self, entry: Entry) -> None:
        entries = self._entries
        entries.append(entry)
        if entry.before is not None:
            self._checkable.append(entry)
            if len(self._checkable) > _MAX_CHECKABLE:
                self._checkable.popleft().forget_before()
        self._nbytes += entry.nbytes
        while len(entries) > self._capacity or (self._nbytes > self._max_nbytes and len(entries) > 1):
            self._nbytes -= entries.popleft().nbytes

    def get(self, ordinal: int) -> Entry | None:
        """The batch with this ordinal, if it is still held."""
        if not self._entries:
            return None
        offset = ordinal - self._entries[0].ordinal
        return self._entries[offset] if 0 <= offset < len(self._entries) else None

    def release(self, ordinal: int) -> None:
        """Lets go of what only positions before `ordinal` need."""
        while self._entries and self._entries[0].ordinal < ordinal - 1:
            self._nbytes -= self._entries.popleft().nbytes

    def clear(self) -> None:
        self._entries.clear()
        self._checkable.clear()
        self._nbytes = 0
