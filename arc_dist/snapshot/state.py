"""All that is restored together, bit for bit: models, optimizers, schedulers, scaler, extras, random generators.

The state has two parts. **Tensors** are large and have names and places in a whole (`TensorSpec`), so that they can be
kept in shared memory, sharded, written once for all replicas, and read back on another number of ranks. Everything
else is **small**: plain objects of this rank alone, for the codec of the checkpoint store.

Buffers that a forward pass changes (running statistics of batch norm) are both. As tensors they are what rank 0 of a
DDP job would save. But each rank's own values differ from that between two forward passes, so with several ranks every
rank keeps its own among the small objects, and those win.
"""

from __future__ import annotations

import copy
import hashlib
import json
import operator
import types
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import nn

from arc_dist.checkpoint_store.codec import encode
from arc_dist.checkpoint_store.format import TensorSpec
from arc_dist.errors import CheckpointMismatch, ConfigError
from arc_dist.snapshot.naming import DTensor, FSDPModule, NamedTensor, bare, named_tensors, walk
from arc_dist.snapshot.optimizer import OptimizerState, Pending
from arc_dist.snapshot.rng import capture_rng, pack_rng, restore_rng
from arc_dist.snapshot.tensors import bytes_of, copy_exact, local, mismatch, spec_of

_CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state can be taken and put back."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


class TrainingState:
    """The state of a training, as named tensors and small objects.

    Args:
        models: by key. With one model its names are ``model.<fqn>``, with several ``model.<key>.<fqn>``.
        optimizers: by key. ``optimizer.state.<fqn>.<field>``, with several ``optimizer.<key>.state.<fqn>.<field>``.
        schedulers: learning-rate schedulers, or anything with `state_dict` and `load_state_dict`.
        scaler: a ``torch.amp.GradScaler`` or None.
        extras: further objects with `state_dict` and `load_state_dict`, whose state the codec can encode.

    Raises:
        ConfigError: something is not what it should be, or an optimizer trains parameters of no model.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        schedulers: Sequence[Any] = (),
        scaler: Any = None,
        extras: Mapping[str, Any] | None = None,
    ) -> None:
        _require_types(models, optimizers)
        _require_stateful([*schedulers, *([scaler] if scaler is not None else []), *(extras or {}).values()])
        self.models: dict[str, nn.Module] = dict(models)
        self.optimizers: tuple[torch.optim.Optimizer, ...] = tuple(optimizers.values())
        self.schedulers: tuple[Any, ...] = tuple(schedulers)
        self.scaler = scaler
        self.extras: dict[str, Any] = dict(extras or {})
        single = len(optimizers) == 1
        self._optimizers = {
            key: OptimizerState(
                optimizer,
                prefix="optimizer." if single else f"optimizer.{key}.",
                title=f"the optimizer {type(optimizer).__name__}" + ("" if single else f" {key!r}"),
            )
            for key, optimizer in optimizers.items()
        }
        self._modules: list[nn.Module] = []
        self._watched: list[Any] = []
        self._dtypes: list[torch.dtype] = []
        self._handles: list[torch.Tensor] = []  # the tensors themselves, in the order of the specs
        self._sharded: list[int] = []  # indices of DTensors among them
        self._specs: list[TensorSpec] = []
        self._locals: list[torch.Tensor] = []
        self._judged: set[str] = set()
        self._named: list[NamedTensor] = []
        with torch.no_grad():
            self._index()

    # ------------------------------------------------------------------ tensors

    def tensors(self) -> tuple[list[TensorSpec], list[torch.Tensor]]:
        """Every tensor of the state as this rank holds it: specs and live local tensors, to be read only.

        The same two list objects come back until something was replaced; checking that costs about 0.1 us per tensor.
        Parameters that FSDP2 has gathered are let go first.
        """
        with torch.no_grad():
            if not self._is_current():
                self._reshard()
                if not self._is_current():
                    self._index()
        return self._specs, self._locals

    def is_judged(self, name: str) -> bool:
        """Whether values that are not finite are a fault in the tensor of this name: in all but buffers."""
        return name in self._judged or name.startswith("optimizer.")

    def is_parameter(self, name: str) -> bool:
        """Whether the tensor of this name is a parameter of a model, not a buffer or an optimizer's."""
        return name in self._judged

    def moving_buffers(self) -> dict[str, torch.Tensor]:
        """The live buffers that a forward pass changes, by full name; empty in a world of one rank."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return {}
        return {f"model.{named.name}": named.tensor for named in self._named if named.moves}

    def statistics(self) -> list[torch.Tensor]:
        """The live buffers that a forward pass changes, whatever the number of ranks."""
        return [named.tensor for named in self._named if named.moves]

    def _present(self) -> list[Any]:
        """All objects whose replacement makes the lists stale."""
        found: list[Any] = []
        for module in self._modules:
            found += module._parameters.values()
            found += module._buffers.values()
            found += module._modules.values()
        for optimizer in self._optimizers.values():
            found += optimizer.watched()
        return found

    def _is_current(self) -> bool:
        present = self._present()
        if len(present) != len(self._watched) or not all(map(operator.is_, present, self._watched)):
            return False
        if self._sharded and not all(local(self._handles[i]) is self._locals[i] for i in self._sharded):
            return False
        # Module.to() changes dtype and memory under the same object.
        return [tensor.dtype for tensor in self._locals] == self._dtypes

    def _index(self) -> None:
        self._reshard()
        self._modules = [module for _, module in walk(self.models)]
        self._named = named_tensors(self.models)
        names = {id(named.tensor): named.name for named in self._named if not named.is_buffer}
        found = [(f"model.{named.name}", named.tensor) for named in self._named]
        for optimizer in self._optimizers.values():
            found += optimizer.index(names)
        self._handles = [tensor for _, tensor in found]
        self._locals = [local(tensor) for tensor in self._handles]
        self._specs = [spec_of(name, tensor) for name, tensor in found]
        self._sharded = [i for i, tensor in enumerate(self._handles) if isinstance(tensor, DTensor)]
        self._dtypes = [tensor.dtype for tensor in self._locals]
        self._judged = {f"model.{named.name}" for named in self._named if not named.is_buffer}
        self._watched = self._present()

    def _reshard(self) -> None:
        for model in self.models.values():
            for module in bare(model).modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    # ------------------------------------------------------------------ small objects

    def small(self) -> dict[str, Any]:
        """Everything that is not a tensor of its own. Refers to live objects in part: encode it before going on."""
        self.tensors()  # the optimizers' lists must be of now
        return {
            "optimizers": {key: optimizer.small() for key, optimizer in self._optimizers.items()},
            "schedulers": [_without_code(scheduler.state_dict()) for scheduler in self.schedulers],
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "extras": {key: extra.state_dict() for key, extra in self.extras.items()},
            "buffers": self.moving_buffers(),
            "rng": pack_rng(capture_rng()),
        }

    # ------------------------------------------------------------------ restoring

    def restore(
        self, specs: Sequence[TensorSpec], tensors: Sequence[torch.Tensor], small: Mapping[str, Any] | None
    ) -> None:
        """Puts a state back in place: existing tensors keep their identity and memory, gradients are left alone.

        Nothing is changed when the state does not fit.

        Args:
            specs: of the tensors; all of the state, no more and no less.
            tensors: their values, local parts, on any device; not needed afterwards.
            small: what `small` gave, or None to leave all that is not a tensor as it is (for scripts that own their
                schedulers and rates).

        Raises:
            CheckpointMismatch: the state is of another model, optimizer or sharding; the message lists how it differs.
        """
        with torch.no_grad():
            self._reshard()
            if not self._is_current():
                self._index()
            entries, model_pairs = self._match(specs, tensors)
            if small is not None:
                small = copy.deepcopy(dict(small))  # objects take parts of it over
                self._require_same_kinds(small)
            pending: Pending = model_pairs
            for key, optimizer in self._optimizers.items():
                optimizer.restore_tensors(entries[key], small["optimizers"][key] if small else None, pending)
            if small is not None:
                self._restore_small(small, pending)
            copy_exact([target for target, _ in pending], [source for _, source in pending])
            if small is not None:
                restore_rng(small["rng"])
            if not self._is_current():
                self._index()

    def _match(
        self, specs: Sequence[TensorSpec], tensors: Sequence[torch.Tensor]
    ) -> tuple[dict[str, list[tuple[str, str, TensorSpec, torch.Tensor]]], Pending]:
        """Sorts a snapshot's tensors by who takes them, after checking that they fit."""
        entries: dict[str, list[tuple[str, str, TensorSpec, torch.Tensor]]] = {key: [] for key in self._optimizers}
        theirs: dict[str, TensorSpec] = {}
        values: dict[str, torch.Tensor] = {}
        for spec, tensor in zip(specs, tensors, strict=True):
            for key, optimizer in self._optimizers.items():
                owner = optimizer.split(spec.name)
                if owner is not None:
                    entries[key].append((*owner, spec, tensor))
                    break
            else:
                theirs[spec.name] = spec
                values[spec.name] = tensor
        live = {
            spec.name: (spec, tensor)
            for spec, tensor in zip(self._specs, self._locals, strict=True)
            if spec.name.startswith("model.")
        }
        error = mismatch("the saved state", {name: spec for name, (spec, _) in live.items()}, theirs)
        if error is not None:
            raise error
        return entries, [(tensor, values[name]) for name, (_, tensor) in live.items()]

    def _require_same_kinds(self, small: Mapping[str, Any]) -> None:
        mine = (sorted(self._optimizers), len(self.schedulers), self.scaler is not None, sorted(self.extras))
        theirs = (
            sorted(small["optimizers"]),
            len(small["schedulers"]),
            small["scaler"] is not None,
            sorted(small["extras"]),
        )
        for what, have, saved in zip(("optimizers", "schedulers", "a scaler", "extras"), mine, theirs, strict=True):
            if have != saved:
                raise CheckpointMismatch(
                    f"the saved state has for {what}: {saved}; this training has: {have}. Give the same objects as "
                    "when it was saved.",
                    saved=saved,
                    have=have,
                )
        for key, optimizer in self._optimizers.items():
            optimizer.check(small["optimizers"][key])

    def _restore_small(self, small: Mapping[str, Any], pending: Pending) -> None:
        for scheduler, saved in zip(self.schedulers, small["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        if self.scaler is not None and small["scaler"]:  # a disabled scaler has an empty state and refuses to load it
            self.scaler.load_state_dict(small["scaler"])
        for key, extra in self.extras.items():
            extra.load_state_dict(small["extras"][key])
        for key, optimizer in self._optimizers.items():
            optimizer.restore_small(small["optimizers"][key], pending)
        if small["buffers"]:
            live = {f"model.{named.name}": named.tensor for named in self._named if named.is_buffer}
            # Queued behind the replicated values of the same buffers, so that these stay.
            pending += [(live[name], value) for name, value in small["buffers"].items() if name in live]

    # ------------------------------------------------------------------ digests

    def digest(self) -> str:
        """SHA-256 of every byte of this rank's state, random generators included. Reads all of it; for tests."""
        digest = hashlib.sha256()
        specs, tensors = self.tensors()
        with torch.no_grad():
            _add(digest, specs, tensors)
            value, parts = encode(self.small())
            digest.update(json.dumps(value, sort_keys=True).encode())
            for path in sorted(parts):
                digest.update(path.encode() + b"\0" + bytes_of(parts[path]))
        return digest.hexdigest()

    def replica_digest(self) -> str:
        """SHA-256 of the parameters and buffers that are the same on every rank if all replicas are in step.

        Left out: shards, and buffers that each rank's forward passes change (batch norm's running statistics).
        """
        digest = hashlib.sha256()
        moving = {f"model.{named.name}" for named in self._named if named.moves}
        specs, tensors = self.tensors()
        chosen = [
            (spec, tensor)
            for spec, tensor in zip(specs, tensors, strict=True)
            if spec.replicated and spec.name.startswith("model.") and spec.name not in moving
        ]
        with torch.no_grad():
            _add(digest, [spec for spec, _ in chosen], [tensor for _, tensor in chosen])
        return digest.hexdigest()

    def signature(self) -> str:
        """What model this is, in one short line that is equal on all ranks that build the same one."""
        self.tensors()
        rows = sorted(
            (spec.name, spec.dtype, spec.global_shape) for spec in self._specs if spec.name.startswith("model.")
        )
        kinds = [(key, type(state.optimizer).__name__) for key, state in self._optimizers.items()]
        numel = sum(torch.Size(shape).numel() for _, _, shape in rows)
        digest = hashlib.sha256(json.dumps([rows, kinds]).encode()).hexdigest()[:16]
        return f"{len(rows)} tensors, {numel} elements, digest {digest}"


def _add(digest: Any, specs: Sequence[TensorSpec], tensors: Sequence[torch.Tensor]) -> None:
    for spec, tensor in sorted(zip(specs, tensors, strict=True), key=lambda pair: pair[0].name):
        digest.update(repr((spec.name, spec.dtype, spec.shape, spec.offsets)).encode())
        digest.update(bytes_of(tensor))


def _without_code(value: Any) -> Any:
    """A scheduler's state without the functions among its attributes: code is not state (`LambdaLR` does the same)."""
    if type(value) is dict:
        return {key: _without_code(entry) for key, entry in value.items() if not isinstance(entry, _CODE)}
    if type(value) is list:
        return [_without_code(entry) for entry in value]
    return value


def _require_types(models: Mapping[str, object], optimizers: Mapping[str, object]) -> None:
    if not models:
        raise ConfigError("no model was given. Give the torch.nn.Module that is trained.")
    for key, model in models.items():
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"model {key!r} is a {type(model).__name__}, not a torch.nn.Module. Give the module that is trained.",
                model=key,
            )
    for key, optimizer in optimizers.items():
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigError(
                f"optimizer {key!r} is a {type(optimizer).__name__}, not a torch.optim.Optimizer. Give the optimizer "
                "object itself.",
                optimizer=key,
            )


def _require_stateful(objects: Sequence[object]) -> None:
    for thing in objects:
        if not isinstance(thing, Stateful):
            raise ConfigError(
                f"a {type(thing).__name__} has no state_dict and load_state_dict, so it cannot be restored. Add both "
                "methods, or leave the object out.",
                type=type(thing).__name__,
            )
