"""How a batch is divided: nothing is lost, weights add up, and what cannot be divided is refused with the remedy."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arc_dist.errors import ConfigError
from arc_dist.healing.microbatch import Splitter, num_samples, split, take
from arc_dist.healing.out_of_memory import is_out_of_memory

Pair = collections.namedtuple("Pair", "x y")


def batch_of(samples):
    x = torch.arange(samples * 3, dtype=torch.float32).view(samples, 3)
    return {"x": x, "pair": Pair(x + 1, [x * 2]), "texts": [str(i) for i in range(samples)], "scale": torch.tensor(2.0)}


@given(st.integers(1, 20), st.sampled_from([1, 2, 4, 8, 32]))
def test_the_parts_are_the_batch(samples, parts):
    batch = batch_of(samples)
    found = split(batch, parts)
    assert len(found) == parts
    assert sum(weight for _, weight in found) == pytest.approx(1.0)
    real = [part for part, weight in found if weight]
    assert torch.equal(torch.cat([part["x"] for part in real]), batch["x"])
    assert torch.equal(torch.cat([part["pair"].y[0] for part in real]), batch["pair"].y[0])
    assert [text for part in real for text in part["texts"]] == batch["texts"]
    assert all(part["scale"] is batch["scale"] and isinstance(part["pair"], Pair) for part, _ in found)
    for part, weight in found:
        assert num_samples(part) == len(part["x"]) >= 1
        assert weight in (0.0, len(part["x"]) / samples)


def test_the_parts_are_views_and_none_can_be_taken():
    x = torch.randn(8, 2)
    (first, _), _ = split((x,), 2)
    assert first[0].data_ptr() == x.data_ptr()
    assert take((x, [1, "a"]), 0)[0].shape == (0, 2)


@dataclasses.dataclass
class Graph:
    x: torch.Tensor


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({"n": 3}, "no tensor with a dimension"),
        ((torch.zeros(4, 2), torch.zeros(3)), r"first dimension \(3, 4\)"),
        (torch.zeros(0, 2), "no samples"),
        ((Graph(torch.zeros(4)),), "holds a Graph"),
        (torch.zeros(4, 2).to_sparse(), "layout"),
    ],
)
def test_what_cannot_be_divided_is_refused(batch, says):
    with pytest.raises(ConfigError, match=says):
        split(batch, 2)


def test_the_users_function_is_held_to_its_word():
    def by_hand(batch, parts):
        return [(Graph(x), 1 / parts) for x in batch.x.chunk(parts)]

    splitter = Splitter(by_hand)
    assert [len(part.x) for part, _ in splitter(Graph(torch.zeros(4)), 2)] == [2, 2]
    assert splitter.largest(Graph(torch.zeros(4)), 2) is None
    with pytest.raises(ConfigError, match="gave 4 parts of a batch instead of 8"):
        splitter(Graph(torch.zeros(4)), 8)


def test_what_says_that_memory_is_out_and_what_does_not():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    wrapped = RuntimeError("the step failed")
    wrapped.__cause__ = MemoryError()
    assert is_out_of_memory(wrapped)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
