"""State survives encode, JSON and decode bit for bit; what cannot is refused with its path."""

from __future__ import annotations

import collections
import enum
import json
import math
import random
import struct
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arc_dist.checkpoint_store.codec import decode, encode
from arc_dist.checkpoint_store.format import known_dtypes
from arc_dist.errors import ConfigError, StoreCorrupt
from store_helpers import random_tensor, same_bits


def through_json(obj: object, *, inline: bool = False) -> Any:
    encoded, tensors = encode(obj, inline=inline)
    assert not (inline and tensors)
    copies = {path: tensor.clone() for path, tensor in tensors.items()}
    return decode(json.loads(json.dumps(encoded, allow_nan=False)), copies)


def equal(a: Any, b: Any) -> bool:
    """Equality of type, order and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    if isinstance(a, complex):
        return equal(a.real, b.real) and equal(a.imag, b.imag)
    if isinstance(a, torch.Tensor):
        return same_bits(a.detach(), b.detach()) and a.requires_grad == b.requires_grad
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, collections.defaultdict) and a.default_factory is not b.default_factory:
        return False
    if isinstance(a, collections.deque) and a.maxlen != b.maxlen:
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(x, y) for x, y in zip(a.values(), b.values()))
    if isinstance(a, (list, tuple, collections.deque)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return a == b


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary(max_size=20)
    | st.complex_numbers(allow_nan=True)
)
keys = st.text() | st.integers() | st.booleans() | st.none() | st.tuples(st.integers(), st.text())
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(st.text(), inner, max_size=4).map(collections.OrderedDict)
        | st.lists(inner, max_size=4).map(lambda v: collections.deque(v, maxlen=7))
        | st.sets(st.integers() | st.text(), max_size=4)
        | st.frozensets(st.integers(), max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(trees)
def test_any_tree_of_plain_values_round_trips(tree: Any) -> None:
    assert equal(through_json(tree), tree)


def test_special_floats_keep_their_bits() -> None:
    payload = struct.unpack("<d", bytes.fromhex("010000000000f8ff"))[0]
    values = [math.nan, -math.nan, payload, math.inf, -math.inf, -0.0, 5e-324, 1.7976931348623157e308, 0.1]
    assert equal(through_json(values), values)


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("dtype", known_dtypes())
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3)])
def test_tensors_of_every_dtype_and_shape(dtype: str, shape: tuple[int, ...], inline: bool) -> None:
    tensor = random_tensor(shape, dtype)
    assert equal(through_json({"a": [tensor]}, inline=inline), {"a": [tensor]})


@pytest.mark.parametrize("inline", [False, True])
def test_tensors_that_are_not_contiguous_and_parameters(inline: bool) -> None:
    obj = {
        "t": random_tensor((4, 6), "float32").t(),
        "slice": random_tensor((8,), "int16")[::2],
        "conj": torch.tensor([1 + 2j], dtype=torch.complex64).conj(),
        "p": torch.nn.Parameter(torch.ones(2)),
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "grad": torch.ones(3, requires_grad=True),
    }
    back = through_json(obj, inline=inline)
    assert equal({k: v.resolve_conj() for k, v in back.items()}, {k: v.resolve_conj() for k, v in obj.items()})


@pytest.mark.parametrize("inline", [False, True])
def test_numpy(inline: bool) -> None:
    obj = {
        "matrix": np.arange(12, dtype=">i4").reshape(3, 4).T,
        "nan": np.array([np.nan, -0.0, np.inf]),
        "empty": np.empty((0, 3), np.float16),
        "scalar": np.float64(math.nan),
        "zero_dim": np.array(3, np.uint8),
        "int": np.int64(-5),
        "flag": np.bool_(True),
        "text": np.array(["ab", "c"]),
        "time": np.datetime64("2020-01-01", "s"),
        "dtype": np.dtype("<f2"),
    }
    assert equal(through_json(obj, inline=inline), obj)


def test_torch_and_collection_types() -> None:
    obj = {
        "dtype": torch.bfloat16,
        "device": torch.device("cuda", 1),
        "size": torch.Size([2, 3]),
        "default": collections.defaultdict(list, {"a": [1]}),
        "nothing": collections.defaultdict(None, {1: 2}),
        "count": collections.Counter("abca"),
        "range": range(3, 9, 2),
        "bytes": bytearray(b"\x00\xff"),
        "reserved": {"$": "tensor", "v": 1},
        "surrogate": "\ud800",
        "big": 10**5000,
        "keys": {1: "a", "1": "b", (1, 2): "c", None: "d", 1.5: "e"},
    }
    assert equal(through_json(obj), obj)


def test_random_generators_continue_where_they_were() -> None:
    generators = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    back = through_json(generators, inline=True)
    expected = (random.random(), float(np.random.rand()), float(torch.rand(1)))
    random.setstate(back["python"])
    np.random.set_state(back["numpy"])
    torch.set_rng_state(back["torch"])
    assert (random.random(), float(np.random.rand()), float(torch.rand(1))) == expected


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_an_optimizer_continues_bitwise(make: Any) -> None:
    def fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return model, make(model.parameters(), lr=0.1)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(4, 3)).pow(2).sum().backward()
        optimizer.step()

    model, optimizer = fresh()
    step(model, optimizer)
    other, restored = fresh()
    other.load_state_dict(through_json(model.state_dict()))
    restored.load_state_dict(through_json(optimizer.state_dict()))
    step(model, optimizer)
    step(other, restored)
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(model.parameters(), other.parameters()))


def test_paths_of_tensors_are_readable_and_unique() -> None:
    one, two, three = torch.ones(1), torch.ones(2), torch.ones(3)
    obj = {"state": [{"exp_avg": one}], "a.b": two, "a": {"b": three}, "a_b": one}
    encoded, tensors = encode(obj)
    assert "state.0.exp_avg" in tensors
    assert len(tensors) == 4
    assert equal(decode(encoded, tensors), obj)


def test_equal_sets_are_equal_bytes() -> None:
    a, b = set(), set()
    for i in range(100):
        a.add(str(i))
        b.add(str(99 - i))
    assert json.dumps(encode(a)[0]) == json.dumps(encode(b)[0])


class Color(enum.IntEnum):
    RED = 1


class Point(NamedTuple):
    x: int


class Thing:
    pass


@pytest.mark.parametrize(
    "bad",
    [
        Thing(),
        Thing,
        lambda: 0,
        Color.RED,
        Point(1),
        np.array([object()]),
        np.zeros(2, dtype=[("a", "i4")]),
        torch.zeros(2).to_sparse(),
        torch.zeros(2, dtype=torch.complex128),
        torch.zeros(2, device="meta").as_subclass(type("Sub", (torch.Tensor,), {})),
        collections.defaultdict(lambda: 3),
        iter([]),
    ],
    ids=lambda bad: type(bad).__name__,
)
def test_what_cannot_be_stored_is_refused_with_its_path(bad: object) -> None:
    with pytest.raises(ConfigError, match=r"state at scheduler\.0\.deep: ") as caught:
        encode({"scheduler": [{"deep": bad}]})
    assert caught.value.fields["path"] == "scheduler.0.deep"


def test_state_that_contains_itself_is_refused_at_once() -> None:
    loop: list[Any] = []
    loop += [loop, loop, {"again": loop}]
    with pytest.raises(ConfigError, match="contains itself"):
        encode(loop)
    deep: list[Any] = []
    for _ in range(500):
        deep = [deep]
    with pytest.raises(ConfigError, match="deep"):
        encode(deep)


@pytest.mark.parametrize(
    "hostile",
    [
        {"$": "os.system", "v": "true"},
        {"$": "tensor", "dtype": "float32", "shape": [1 << 40], "data": ""},
        {"$": "tensor", "dtype": "float32", "shape": [-1], "data": ""},
        {"$": "tensor", "dtype": "load", "shape": [1], "data": "AAAA"},
        {"$": "tensor", "dtype": "float32", "shape": [1], "at": "missing"},
        {"$": "np.ndarray", "dtype": "|O", "shape": [1], "data": "AAAAAAAAAAA="},
        {"$": "np.ndarray", "dtype": "<f8", "shape": [9], "data": ""},
        {"$": "dtype", "v": "load"},
        {"$": "device", "v": "../x"},
        {"$": "defaultdict", "factory": "eval", "v": []},
        {"$": "set", "v": [[]]},
        {"$": "bytes", "v": "!!"},
        {"$": "tuple"},
        {"$": ["tuple"], "v": []},
        {"$": "int", "v": 5},
        object(),
    ],
)
def test_what_encode_never_makes_is_corrupt(hostile: object) -> None:
    with pytest.raises(StoreCorrupt):
        decode({"x": [hostile]})
