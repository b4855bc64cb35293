"""The pure parts of the format: who writes what, whether parts cover a tensor, headers and manifests as bytes."""

from __future__ import annotations

import itertools
import json
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_safetensors

from arc_dist.checkpoint_store import TensorSpec, assign_writers
from arc_dist.checkpoint_store.format import (
    digest_of,
    intersect,
    is_file_name,
    known_dtypes,
    replicated_digest,
    safetensors_dtype,
    step_directory,
    step_of_directory,
    uncovered,
)
from arc_dist.checkpoint_store.manifest import parse_manifest
from arc_dist.checkpoint_store.shard import build_header, file_order_key, parse_header
from arc_dist.errors import CheckpointMismatch, ConfigError, StoreCorrupt
from store_helpers import random_tensor, same_bits


def spec_of(name: str, shape: tuple[int, ...], dtype: str = "float32", replicated: bool = True) -> TensorSpec:
    return TensorSpec(name, dtype, shape, shape, (0,) * len(shape), replicated)


names = st.lists(st.text(min_size=1, max_size=8), min_size=0, max_size=20, unique=True)


@settings(deadline=None)
@given(names, st.integers(1, 9), st.randoms())
def test_writers_are_the_same_in_any_order(tensor_names: list[str], world_size: int, shuffler: Any) -> None:
    specs = [spec_of(name, (index * 7 % 5, 3)) for index, name in enumerate(tensor_names)]
    writers = assign_writers(specs, world_size)
    assert set(writers) == set(tensor_names)
    assert all(0 <= rank < world_size for rank in writers.values())
    shuffled = list(specs)
    shuffler.shuffle(shuffled)
    assert assign_writers(shuffled, world_size) == writers
    assert replicated_digest(shuffled) == replicated_digest(specs)


def test_writers_share_the_bytes() -> None:
    specs = [spec_of(f"layer{i}.{kind}", shape) for i in range(12) for kind, shape in [("w", (64, 64)), ("b", (64,))]]
    writers = assign_writers(specs, 4)
    loads = [sum(s.nbytes for s in specs if writers[s.name] == rank) for rank in range(4)]
    assert max(loads) - min(loads) <= max(s.nbytes for s in specs)


def test_sharded_tensors_have_no_single_writer_unless_they_are_empty() -> None:
    sharded = TensorSpec("w", "float32", (2, 3), (4, 3), (2, 0))
    empty = TensorSpec("e", "float32", (0, 3), (0, 3), (0, 0))
    assert assign_writers([sharded, empty], 2) == {"e": 0}


def grid(shape: tuple[int, ...], cuts: list[list[int]]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes of a grid with the given inner cuts per dimension."""
    edges = [[0, *sorted({c for c in cut if 0 < c < size}), size] for cut, size in zip(cuts, shape)]
    boxes = []
    for index in itertools.product(*(range(len(e) - 1) for e in edges)):
        low = tuple(edges[d][i] for d, i in enumerate(index))
        boxes.append((low, tuple(edges[d][i + 1] - edges[d][i] for d, i in enumerate(index))))
    return boxes


@settings(deadline=None)
@given(st.data())
def test_coverage_accepts_every_grid_and_refuses_it_with_a_hole_or_an_overlap(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=0, max_size=3)))
    cuts = [data.draw(st.lists(st.integers(0, 6), max_size=3)) for _ in shape]
    boxes = grid(shape, cuts)
    data.draw(st.randoms()).shuffle(boxes)
    assert uncovered(shape, boxes) is None
    assert uncovered(shape, boxes[1:]) is not None
    assert uncovered(shape, [*boxes, boxes[0]]) is not None
    if len(boxes) > 1 and boxes[0][1] == boxes[1][1]:
        assert uncovered(shape, [boxes[0], boxes[0], *boxes[2:]]) is not None  # the right volume, in the wrong place


def test_coverage_of_many_parts_is_fast() -> None:
    began = time.monotonic()
    columns = [((0, i), (50, 1)) for i in range(20_000)]  # cut along the second dimension alone
    assert uncovered((50, 20_000), columns) is None
    nested = [((i % 2, 0), (5999, 1)) for i in range(6000)]  # the right volume, all of them overlap
    assert uncovered((6000, 5999), nested) is not None
    assert time.monotonic() - began < 10


def test_intersect_of_boxes() -> None:
    assert intersect((0, 0), (4, 4), (2, 3), (5, 5)) == ((2, 3), (2, 1))
    assert intersect((0,), (2,), (2,), (2,)) is None
    assert intersect((), (), (), ()) == ((), ())


@pytest.mark.parametrize("name", ["step-00000001", "step-00001200.g3", "step-00001200.g3-0a1b2c3d", "step-123456789"])
def test_names_of_step_directories(name: str) -> None:
    assert step_of_directory(name) is not None
    for other in (f"{name}x", f" {name}", f"{name}/..", f"{name}\n", name.upper(), "step-1", "step--0000001"):
        assert step_of_directory(other) is None
    assert step_directory(1200, generation=3) == "step-00001200.g3"


@pytest.mark.parametrize(
    "name",
    [
        "../rank-00000.json",
        "/etc/passwd",
        "rank-00000.json\n",
        "rank-00000.safetensors/../x",
        "rank-٠٠٠٠٠.json",
        "manifest.json",
        "",
        None,
        7,
    ],
)
def test_a_manifest_cannot_name_a_file_elsewhere(name: object) -> None:
    assert not is_file_name(name)


def test_our_files_are_safetensors_files() -> None:
    tensors = {f"t.{name}": random_tensor((3, 5), name) for name in known_dtypes()}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 7), 'ünïcode " \n': torch.ones(1)}
    specs = sorted((TensorSpec.whole(n, t) for n, t in tensors.items()), key=file_order_key)
    header = build_header(specs)
    assert len(header) % 8 == 0
    body = b"".join(bytes(tensors[s.name].reshape(-1).view(torch.uint8).tolist()) for s in specs)
    loaded = load_safetensors(header + body)
    assert set(loaded) == set(tensors)
    assert all(same_bits(loaded[name], tensors[name]) for name in tensors)
    parsed = parse_header(header, len(header) + len(body), "x")
    assert [s.name for s, _ in parsed] == [s.name for s in specs]
    for spec, start in parsed:
        assert (start - len(header)) % tensors[spec.name].element_size() == 0


HEADERS: list[Any] = [
    {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
    {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
    {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "U8", "shape": [1], "data_offsets": [7, 8]},
    },
    {"a": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}},
    {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
    {"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
    {"a": {"dtype": "F32", "shape": [1 << 61, 1 << 61, 1 << 61], "data_offsets": [0, 8]}},
    {"a": {"dtype": "F32", "shape": [2]}},
    {"a": []},
    {"__metadata__": {"DCP_SHARDING_INFO": "["}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
    {"__metadata__": 3},
    [],
    None,
]


@pytest.mark.parametrize("content", HEADERS, ids=range(len(HEADERS)))
def test_hostile_headers_are_corrupt(content: Any) -> None:
    text = json.dumps(content).encode()
    data = struct.pack("<Q", len(text)) + text + bytes(8)
    with pytest.raises(StoreCorrupt):
        parse_header(data, len(data), "file")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"abc",
        struct.pack("<Q", 1 << 63) + b"{}",
        struct.pack("<Q", 99_999_999) + b"{}",
        struct.pack("<Q", 2) + b"\xff\xfe",
        struct.pack("<Q", 20_000) + b"[" * 20_000,
        struct.pack("<Q", 15) + b'{"a":1,"a":2}  ',
    ],
    ids=range(7),
)
def test_hostile_header_bytes_are_corrupt(data: bytes) -> None:
    with pytest.raises(StoreCorrupt):
        parse_header(data, len(data), "file")


def good_manifest() -> dict[str, Any]:
    digest = "0" * 64
    shard = {"name": "rank-00000.safetensors", "kind": "tensors", "rank": 0, "nbytes": 24, "header_nbytes": 16}
    objects = {"name": "rank-00000.json", "kind": "objects", "rank": 0, "nbytes": 9, "header_nbytes": 0}
    chunk = {"offsets": [0], "shape": [2], "file": "rank-00000.safetensors", "start": 16, "nbytes": 8, "digest": digest}
    return {
        "format": "arc-dist-checkpoint",
        "version": 1,
        "step": 3,
        "generation": 0,
        "owner": "o",
        "world_size": 1,
        "certified": True,
        "committed_at": 1.0,
        "directory": "step-00000003",
        "hash": "sha256",
        "parent": None,
        "versions": {},
        "hosts": {},
        "meta": {},
        "files": [{**shard, "digest": digest}, {**objects, "digest": digest}],
        "tensors": {"a": {"dtype": "float32", "global_shape": [2], "chunks": [chunk]}},
    }


def sealed(fields: Any) -> bytes:
    body = json.dumps(fields, indent=1).encode().removesuffix(b"\n}")
    return body + f',\n"manifest_digest": "sha256:{digest_of(body)}"\n}}\n'.encode()


def test_a_manifest_made_by_hand_from_the_specification_is_read() -> None:
    manifest = parse_manifest(sealed(good_manifest()), "m", "step-00000003")
    assert manifest.step == 3
    assert parse_manifest(manifest.to_bytes(), "m", "step-00000003") == manifest


CHANGES: list[tuple[tuple[Any, ...], Any]] = [
    (("format",), "other"),
    (("version",), "1"),
    (("version",), -1),
    (("step",), 4),
    (("step",), True),
    (("world_size",), 0),
    (("world_size",), 2),
    (("certified",), 1),
    (("committed_at",), "now"),
    (("directory",), "step-00000004"),
    (("directory",), "../step-00000003"),
    (("meta",), []),
    (("files",), {}),
    (("files", 0, "name"), "../../etc/passwd"),
    (("files", 0, "name"), "/etc/passwd"),
    (("files", 0, "name"), "rank-00001.safetensors"),
    (("files", 0, "kind"), "objects"),
    (("files", 0, "kind"), "pickle"),
    (("files", 0, "nbytes"), 25),
    (("files", 0, "nbytes"), 1 << 70),
    (("files", 0, "header_nbytes"), 0),
    (("files", 0, "header_nbytes"), 1 << 40),
    (("files", 0, "digest"), ""),
    (("files", 1, "name"), "rank-00000.safetensors"),
    (("files", 1, "rank"), 1),
    (("tensors",), []),
    (("tensors", "a", "global_shape"), [3]),
    (("tensors", "a", "global_shape"), [-2]),
    (("tensors", "a", "global_shape"), [2, 1]),
    (("tensors", "a", "global_shape"), [1] * 100),
    (("tensors", "a", "chunks"), []),
    (("tensors", "a", "chunks", 0, "offsets"), [1]),
    (("tensors", "a", "chunks", 0, "offsets"), [-1]),
    (("tensors", "a", "chunks", 0, "shape"), [1 << 61]),
    (("tensors", "a", "chunks", 0, "start"), 15),
    (("tensors", "a", "chunks", 0, "start"), 17),
    (("tensors", "a", "chunks", 0, "nbytes"), 7),
    (("tensors", "a", "chunks", 0, "file"), "../x"),
    (("tensors", "a", "chunks", 0, "file"), "rank-00000.json"),
    (("tensors", "a", "chunks", 0, "digest"), 5),
]


@pytest.mark.parametrize(("path", "value"), CHANGES, ids=[f"{'.'.join(map(str, p))}={str(v)[:20]}" for p, v in CHANGES])
def test_a_manifest_that_lies_is_refused_even_with_a_right_digest(path: tuple[Any, ...], value: Any) -> None:
    fields = good_manifest()
    place: Any = fields
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(StoreCorrupt) as caught:
        parse_manifest(sealed(fields), "m", "step-00000003")
    assert "valid JSON" not in str(caught.value)  # refused for what it says


OPTIONAL = {("parent",), ("files", 1, "header_nbytes")}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*path, key))


@pytest.mark.parametrize(
    "path", [p for p in places(good_manifest()) if p not in OPTIONAL and type(p[-1]) is str], ids=str
)
def test_a_manifest_without_one_of_its_fields_is_refused(path: tuple[Any, ...]) -> None:
    fields = good_manifest()
    place: Any = fields
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    with pytest.raises(StoreCorrupt):
        parse_manifest(sealed(fields), "m", "step-00000003")


@pytest.mark.parametrize(
    "change", [{"version": 3}, {"version": 99, "files": "something new"}, {"hash": "blake9"}], ids=str
)
def test_a_newer_format_is_said_to_be_newer(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointMismatch, match="Upgrade arc-dist"):
        parse_manifest(sealed({**good_manifest(), **change}), "m", "step-00000003")


def test_unknown_fields_are_ignored() -> None:
    parse_manifest(sealed({**good_manifest(), "note": {"deep": [1]}}), "m", "step-00000003")


@pytest.mark.parametrize(
    "spec",
    [
        spec_of("__metadata__", (1,)),
        spec_of("", (1,)),
        spec_of("\ud800", (1,)),
        spec_of("a", (1,), "complex128"),
        TensorSpec("a", "float32", (2,), (3,), (2,)),
        TensorSpec("a", "float32", (2,), (3, 1), (0,)),
        TensorSpec("a", "float32", (2,), (3,), (0,), True),
    ],
)
def test_specs_that_cannot_be_stored_are_refused(spec: TensorSpec) -> None:
    with pytest.raises(ConfigError):
        spec.check()


def test_every_dtype_has_one_safetensors_name() -> None:
    assert len({safetensors_dtype(name) for name in known_dtypes()}) == len(known_dtypes())
    for name in known_dtypes():
        assert getattr(torch, name).itemsize == spec_of("a", (), name).nbytes
