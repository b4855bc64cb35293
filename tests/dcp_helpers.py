"""What the tests of DCP share: comparing nested states, and its exception, which is a BaseException."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from store_helpers import same_bits


def blank(value: Any) -> Any:
    """The same structure with other content."""
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {key: blank(item) for key, item in value.items()}
    if isinstance(value, list) and any(isinstance(item, (torch.Tensor, dict)) for item in value):
        return [blank(item) for item in value]
    return None


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and same_bits(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def failures(error: BaseException) -> str:
    """The text of what failed on each rank."""
    assert isinstance(error, CheckpointException), error
    return str(error)


@contextlib.contextmanager
def checkpoint_fails() -> Iterator[list[BaseException]]:
    """CheckpointException is a BaseException."""
    caught: list[BaseException] = []
    with pytest.raises(CheckpointException) as info:
        yield caught
    caught.append(info.value)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
