"""The state of all random generators of a process: python, numpy, torch, CUDA. Captured at every step, so it is cheap.

Measured on one core: python's ``getstate`` takes 9 us, numpy's ``get_state`` 33. So their raw words (0.2 us each) tell
whether they have moved since the last call, and the last answer is used if not: about 3 us in all then.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import json
import random
import struct
import sys
from typing import Any, NamedTuple

import torch

from arc_dist.errors import ConfigError

_PYTHON_WORDS = struct.Struct("<625I")
_SIZES = struct.Struct("<II")  # of the head and of numpy's state
_PYTHON_VERSION = 3  # of random.getstate(); the only one since Python 3.2
_MT19937_BYTES = 625 * 4  # 624 words of key and the position
_NUMPY_GAUSS = struct.Struct("<i4xd")  # whether a number is waiting, and the number


class RngState(NamedTuple):
    """A point in all random sequences. Treat it as opaque; `pack_rng` makes bytes of it.

    Attributes:
        python: of `random.getstate()`.
        numpy: of ``numpy.random.get_state(legacy=False)``; None when numpy was not imported.
        torch: of the CPU generator, uint8.
        cuda: of each CUDA device's generator, uint8 on the CPU; empty when CUDA was not initialised.
    """

    python: tuple[Any, ...]
    numpy: dict[str, Any] | None
    torch: torch.Tensor
    cuda: tuple[torch.Tensor, ...]


def capture_rng() -> RngState:
    """The present point in all random sequences of this process."""
    cuda = torch.cuda
    return RngState(
        _capture_python(),
        _capture_numpy() if "numpy" in sys.modules else None,
        torch.default_generator.get_state(),
        tuple(cuda.get_rng_state_all()) if cuda.is_initialized() else (),
    )


def restore_rng(state: RngState | bytes) -> None:
    """Goes back to a captured point. numpy is left alone when it had not been imported then.

    Raises:
        ConfigError: the state is of another number of CUDA devices than this process has.
    """
    if not isinstance(state, RngState):
        state = unpack_rng(state)
    random.setstate(state.python)
    if state.numpy is not None:
        import numpy as np

        np.random.set_state(state.numpy)
    torch.default_generator.set_state(state.torch)
    if state.cuda:
        if len(state.cuda) != torch.cuda.device_count():
            raise ConfigError(
                f"the random state of {len(state.cuda)} CUDA devices cannot be restored: this process sees "
                f"{torch.cuda.device_count()}. Give the process as many devices as before (CUDA_VISIBLE_DEVICES)."
            )
        torch.cuda.set_rng_state_all(list(state.cuda))


def pack_rng(state: RngState) -> bytes:
    """The state as bytes: sizes, a short JSON head, numpy's state as JSON, python's words, torch's words."""
    version, words, gauss = state.python
    if version != _PYTHON_VERSION:
        raise ConfigError(f"random.getstate() is of version {version}, which is not known. Upgrade arc-dist.")
    generators = [state.torch, *state.cuda]
    head = json.dumps(
        {
            "gauss": None if gauss is None else float(gauss).hex(),
            "torch": [generator.numel() for generator in generators],
        }
    ).encode()
    numpy_text = _pack_numpy(state.numpy)
    raw = [ctypes.string_at(generator.data_ptr(), generator.numel()) for generator in generators]
    sizes = _SIZES.pack(len(head), len(numpy_text))
    return b"".join([sizes, head, numpy_text, _PYTHON_WORDS.pack(*words), *raw])


def unpack_rng(data: bytes) -> RngState:
    """The inverse of `pack_rng`."""
    head_bytes, numpy_bytes = _SIZES.unpack_from(data)
    offset = _SIZES.size
    head = json.loads(data[offset : offset + head_bytes])
    offset += head_bytes
    numpy_state = _from_jsonable(json.loads(data[offset : offset + numpy_bytes]))
    offset += numpy_bytes
    words = _PYTHON_WORDS.unpack_from(data, offset)
    offset += _PYTHON_WORDS.size
    generators: list[torch.Tensor] = []
    for nbytes in head["torch"]:
        generators.append(torch.frombuffer(bytearray(data[offset : offset + nbytes]), dtype=torch.uint8))
        offset += nbytes
    gauss = None if head["gauss"] is None else float.fromhex(head["gauss"])
    return RngState((_PYTHON_VERSION, words, gauss), numpy_state, generators[0], tuple(generators[1:]))


def derive_rng(data: bytes, name: str) -> bytes:
    """Another packed point in all random sequences, which is a function of a packed one and a name.

    Each generator is seeded with the first 8 bytes of a SHA-256 of the name and the point (numpy's with the lower 4).
    The generators of this process are left where they are.
    """
    here, has_numpy = capture_rng(), unpack_rng(data).numpy is not None
    seed = int.from_bytes(hashlib.sha256(name.encode() + b"\0" + data).digest()[:8], "little")
    try:
        random.seed(seed)
        if has_numpy:
            import numpy as np

            np.random.seed(seed & 0xFFFFFFFF)
        torch.manual_seed(seed)
        derived = capture_rng()
    finally:
        restore_rng(here)
    return pack_rng(derived if has_numpy else derived._replace(numpy=None))


class _PythonMemory:
    """What the last look at python's generator gave, and the raw words by which to tell whether it moved since."""

    looked: bool = False
    words: memoryview | None = None  # on the words themselves; None when they cannot be read
    raw: bytes = b""
    state: tuple[Any, ...] = ()


def _capture_python() -> tuple[Any, ...]:
    memory = _PythonMemory
    if not memory.looked:
        memory.looked, memory.words = True, _python_words()
    if memory.words is None:
        return random.getstate()
    raw = memory.words.tobytes()
    if raw != memory.raw or memory.state[2] != random.getstate.__self__.gauss_next:  # type: ignore[attr-defined]
        memory.raw, memory.state = raw, random.getstate()
    return memory.state


def _python_words() -> memoryview | None:
    """The position and the 624 words of `random`'s generator where CPython keeps them; None if they are not there."""
    generator = getattr(random.getstate, "__self__", None)
    if sys.implementation.name != "cpython" or type(generator) is not random.Random:
        return None
    head_bytes = object.__basicsize__
    if random.Random.__basicsize__ < head_bytes + _PYTHON_WORDS.size:
        return None
    view = _memory_at(id(generator) + head_bytes, _PYTHON_WORDS.size)
    index, *words = _PYTHON_WORDS.unpack(view)
    return view if random.getstate()[1] == (*words, index) else None


def _memory_at(address: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")


class _NumpyMemory:
    """What the last look at numpy's generator gave, and the raw words by which to tell whether it moved since."""

    generator: Any = None  # that the two views belong to, so that it lives as long as they
    words: memoryview
    gauss: memoryview
    raw: tuple[bytes, bytes] | None = None
    state: dict[str, Any] | None = None
    gauss_offset: int | None = None  # see `_numpy_gauss_offset`; None before the first look
    packed: tuple[dict[str, Any], bytes] | None = None  # the last state that was packed, and its text


def _capture_numpy() -> dict[str, Any]:
    import numpy as np

    get_generator = getattr(np.random, "get_bit_generator", None)  # since numpy 1.24
    generator = get_generator() if get_generator is not None else None
    memory = _NumpyMemory
    if generator is None or generator is not memory.generator:
        if memory.gauss_offset is None:
            memory.gauss_offset = _numpy_gauss_offset()
        if generator is None or type(generator).__name__ != "MT19937" or not memory.gauss_offset:
            return np.random.get_state(legacy=False)  # type: ignore[return-value]
        owner = np.random.get_state.__self__  # type: ignore[attr-defined]
        memory.generator, memory.raw = generator, None
        memory.words = _memory_at(generator.ctypes.state_address, _MT19937_BYTES)
        memory.gauss = _memory_at(id(owner) + memory.gauss_offset, _NUMPY_GAUSS.size)
    raw = (memory.words.tobytes(), memory.gauss.tobytes())
    if raw != memory.raw:
        memory.raw, memory.state = raw, np.random.get_state(legacy=False)  # type: ignore[assignment]
    assert memory.state is not None
    return memory.state


def _numpy_gauss_offset() -> int:
    """Where a RandomState keeps the second number of a Gaussian pair, which its words do not contain; 0 if not found.

    Drawing that number, or going back to before it was drawn, changes nothing else.
    """
    import numpy as np

    if sys.implementation.name != "cpython" or type(getattr(np.random.get_state, "__self__", None)) is not (
        np.random.RandomState
    ):
        return 0
    probe = np.random.RandomState(np.random.MT19937(1))
    probe.standard_normal()
    wanted = (1, probe.get_state(legacy=False)["gauss"])  # type: ignore[call-overload]
    content = ctypes.string_at(id(probe), np.random.RandomState.__basicsize__)
    for offset in range(object.__basicsize__, len(content) - _NUMPY_GAUSS.size + 1, 8):
        if _NUMPY_GAUSS.unpack_from(content, offset) == wanted:
            return offset
    return 0


def _pack_numpy(state: dict[str, Any] | None) -> bytes:
    if state is None:
        return b"null"
    packed = _NumpyMemory.packed
    if packed is None or packed[0] is not state:  # a captured state is never changed, so identity is equality
        packed = _NumpyMemory.packed = (state, json.dumps(_to_jsonable(state)).encode())
    return packed[1]


def _to_jsonable(value: Any) -> Any:
    """What numpy's state is made of: nested dicts of strings, whole numbers of any size, floats and arrays of those."""
    if isinstance(value, dict):
        return {key: _to_jsonable(entry) for key, entry in value.items()}
    if isinstance(value, float):
        return {"hex": value.hex()}
    if hasattr(value, "tobytes"):
        return {"array": base64.b64encode(value.tobytes()).decode(), "dtype": value.dtype.str, "shape": value.shape}
    return value


def _from_jsonable(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "array" in value:
        import numpy as np

        array = np.frombuffer(base64.b64decode(value["array"]), dtype=value["dtype"])
        return array.reshape(value["shape"]).copy()
    if "hex" in value:
        return float.fromhex(value["hex"])
    return {key: _from_jsonable(entry) for key, entry in value.items()}


def same_rng(a: RngState, b: RngState) -> bool:
    """Whether two captured points are one."""
    return (
        a.python == b.python
        and a.numpy is b.numpy
        and torch.equal(a.torch, b.torch)
        and len(a.cuda) == len(b.cuda)
        and all(torch.equal(mine, theirs) for mine, theirs in zip(a.cuda, b.cuda, strict=True))
    )
