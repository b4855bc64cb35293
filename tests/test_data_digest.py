"""A batch's digest: equal for equal batches in any process, different for what differs."""

from __future__ import annotations

import collections
import dataclasses
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arc_dist.checkpoint_store.buffers import as_bytes
from arc_dist.data import digest
from arc_dist.data.digest import batch_digest


@dataclasses.dataclass
class Pair:
    x: Any
    y: Any


class Graph:
    def __init__(self, nodes: Any) -> None:
        self.nodes = nodes


Named = collections.namedtuple("Named", ["x", "y"])

DIFFERENT = [
    None,
    0,
    False,
    0.0,
    -0.0,
    "0",
    b"0",
    [],
    (),
    {},
    set(),
    [0, 1],
    (0, 1),
    Named(0, 1),
    Pair(0, 1),
    Pair(1, 0),
    Graph(1),
    Graph(2),
    {0: 1},
    {1: 0},
    {0, 1},
    {"a": [1, {"b": 2}]},
    [[1], 2],
    [1, [2]],
    torch.zeros(2),
    torch.zeros(2, 1),
    torch.zeros(2, dtype=torch.float64),
    torch.zeros(2, dtype=torch.bfloat16),
    torch.zeros(2, dtype=torch.bool),
    torch.zeros(2, dtype=torch.complex64),
    torch.zeros(2, dtype=torch.float8_e4m3fn),
    torch.zeros(2, device="meta"),
    torch.zeros(()),
    torch.zeros(0),
    torch.zeros(0, 3),
    torch.eye(3).to_sparse(),
    torch.eye(3),
    torch.tensor([float("nan")]),
    torch.tensor([float("inf")]),
    np.zeros(2),
    np.zeros(2, dtype=np.float32),
    np.float32(0),
    np.array(["a", "b"], dtype=object),
    np.array(["a", "c"], dtype=object),
]


def test_what_differs_has_different_digests() -> None:
    digests = [batch_digest(value) for value in DIFFERENT]
    assert len(set(digests)) == len(digests)
    assert digests == [batch_digest(value) for value in DIFFERENT]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@given(one=values, two=values)
def test_digests_are_equal_when_and_only_when_values_are(one: Any, two: Any) -> None:
    # repr tells apart what == does not: 0, 0.0, -0.0 and False.
    assert (batch_digest(one) == batch_digest(two)) == (repr(one) == repr(two))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.float8_e5m2])
def test_of_a_large_tensor_any_row_counts(dtype: torch.dtype) -> None:
    rows = torch.randint(0, 100, (64, 150_528 // 4)).to(dtype)
    before = batch_digest(rows)
    for row in (0, 17, 63):
        changed = rows.clone()
        changed[row] = torch.randint(0, 100, (150_528 // 4,)).to(dtype)
        assert batch_digest(changed) != before
    assert batch_digest(rows.clone()) == before


def test_layout_in_memory_does_not_count() -> None:
    values = torch.arange(12.0).reshape(3, 4)
    assert batch_digest(values.t().contiguous().t()) == batch_digest(values)
    assert batch_digest(torch.complex(values, values).conj()) == batch_digest(torch.complex(values, -values))
    assert batch_digest(np.asfortranarray(values.numpy())) == batch_digest(values.numpy())


def test_it_is_the_same_in_another_process() -> None:
    code = "from arc_dist.data.digest import batch_digest as d; print(d([{'a', 'b', 'c'}, {'k': (1, 2.5)}, 'text']))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout.strip() == batch_digest([{"a", "b", "c"}, {"k": (1, 2.5)}, "text"])


def test_a_batch_that_contains_itself_has_none() -> None:
    batch: list[Any] = []
    batch.append(batch)
    with pytest.raises(RecursionError, match="contains itself"):
        batch_digest(batch)


def test_the_cost_of_a_large_batch_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def counted(source: torch.Tensor) -> Any:
        data = as_bytes(source)
        lengths.append(len(data))
        return data

    monkeypatch.setattr(digest, "as_bytes", counted)
    batch_digest(torch.zeros(64, 3, 224, 224))  # 38.5 MB
    assert len(lengths) == 1 and 500_000 < lengths[0] <= (1 << 20) + 4
