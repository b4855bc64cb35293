"""A CPU tensor's memory as bytes, without a copy and without numpy.

`Tensor.numpy()` knows neither bfloat16 nor the 8-bit floats, and numpy is not among our dependencies.
"""

from __future__ import annotations

import ctypes
import sys

import torch

from arc_dist.errors import ConfigError


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """A writable view of a contiguous CPU tensor's memory, row-major, little-endian.

    The view does not keep the tensor alive: hold on to it.
    """
    assert tensor.device.type == "cpu"
    assert tensor.is_contiguous()
    if sys.byteorder != "little":
        raise ConfigError("checkpoints are little-endian; this machine is not. Save on another machine.")
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes == 0:
        return memoryview(bytearray())
    return memoryview((ctypes.c_ubyte * nbytes).from_address(tensor.data_ptr())).cast("B")


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its memory can be viewed by `as_bytes`, else a contiguous copy on the CPU."""
    tensor = tensor.detach()
    if tensor.is_conj():
        tensor = tensor.resolve_conj()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor.cpu().contiguous()


def read_bytes(tensor: torch.Tensor) -> bytes:
    """A copy of a tensor's bytes."""
    source = plain(tensor)
    return bytes(as_bytes(source))


def write_bytes(tensor: torch.Tensor, data: bytes) -> None:
    """Overwrites a contiguous CPU tensor; `data` has exactly its size."""
    as_bytes(tensor)[:] = data
