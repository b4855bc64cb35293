"""One optimizer's state: taken apart into named tensors and the rest, and put back in place.

`Optimizer.load_state_dict` is not used: it casts state to the parameter's dtype, replaces every tensor, and cannot
take state away. Here a tensor that exists keeps its identity (CUDA graphs and compiled steps hold on to it), one that
is missing is made, and one that the snapshot does not have is removed, down to an optimizer that never took a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch

from arc_dist.checkpoint_store.format import TensorSpec
from arc_dist.errors import CheckpointMismatch, ConfigError
from arc_dist.snapshot.naming import DTensor
from arc_dist.snapshot.tensors import fits, layout_of, local, make_like

Pending = list[tuple[torch.Tensor, torch.Tensor]]  # (target, source) pairs, to be copied together


class OptimizerState:
    """Names and places of one optimizer's state.

    Args:
        optimizer: the optimizer.
        prefix: of its tensors' names: ``optimizer.``, or ``optimizer.<key>.`` when there are several.
        title: what to call it in errors.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, prefix: str, title: str) -> None:
        self.optimizer = optimizer
        self.title = title
        self._state_prefix = f"{prefix}state."
        self._by_name: dict[str, torch.Tensor] = {}
        self._names: dict[int, str] = {}
        self._groups: dict[int, dict[str, Any]] = {}
        self._on_host: dict[str, bool] = {}
        self._layouts: dict[str, list[str] | None] = {}

    # ------------------------------------------------------------------ taking apart

    def watched(self) -> list[Any]:
        """The objects whose replacement makes cached names stale: parameters and state tensors, in order."""
        optimizer = self.optimizer
        found: list[Any] = []
        for group in optimizer.param_groups:
            found += group["params"]
        for fields in optimizer.state.values():
            if isinstance(fields, dict):
                found += [value for value in fields.values() if isinstance(value, torch.Tensor)]
        return found

    def index(self, names: Mapping[int, str]) -> list[tuple[str, torch.Tensor]]:
        """Looks at everything anew.

        Args:
            names: id of a parameter -> its name, for the parameters of all models.

        Returns:
            The state's tensors with their full names.

        Raises:
            ConfigError: the optimizer holds parameters that no model has.
        """
        optimizer = self.optimizer
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._require_known(parameters, names)
        self._names = {id(parameter): names[id(parameter)] for parameter in parameters}
        self._by_name = {self._names[id(parameter)]: parameter for parameter in parameters}
        self._groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        self._on_host, self._layouts = {}, {}
        found: list[tuple[str, torch.Tensor]] = []
        for key, fields in optimizer.state.items():
            name = self._names.get(id(key))
            if name is None or not isinstance(fields, dict):
                continue
            for field, value in fields.items():
                if _is_tensor_field(field, value, key):
                    full = f"{self._state_prefix}{name}.{field}"
                    found.append((full, value))
                    self._note_place(full, field, value, key)
        return found

    def _require_known(self, parameters: Sequence[torch.Tensor], names: Mapping[int, str]) -> None:
        strange = [parameter for parameter in parameters if id(parameter) not in names]
        if not strange:
            return
        shown = ", ".join(f"{list(p.shape)} {str(p.dtype).removeprefix('torch.')}" for p in strange[:6])
        more = f" and {len(strange) - 6} more" if len(strange) > 6 else ""
        raise ConfigError(
            f"{self.title} holds {len(strange)} of {len(parameters)} parameters that are in none of the models given: "
            f"{shown}{more}. Give all models that it trains, and make it after the model has its final parameters "
            "(after fully_shard, and after a layer was replaced).",
            shapes=[list(p.shape) for p in strange],
        )

    def _note_place(self, full: str, field: str, value: torch.Tensor, parameter: torch.Tensor) -> None:
        """Remembers what a process without this tensor needs to make it, where `_usual_place` would be wrong."""
        on_host, layout = self._usual_place(field, tuple(value.shape), parameter)
        if parameter.device.type != "cpu" and on_host != (value.device.type == "cpu"):
            self._on_host[full] = not on_host
        if layout_of(value) != layout:
            self._layouts[full] = layout_of(value)

    def _usual_place(
        self, field: str, shape: tuple[int, ...], parameter: torch.Tensor
    ) -> tuple[bool, list[str] | None]:
        """(on the host?, DTensor layout) as torch's own optimizers have it.

        A step counter stays on the host unless a kernel reads it; what has the shape of a sharded parameter is sharded
        like it.
        """
        group = self._groups[id(parameter)]
        on_host = field == "step" and not (group.get("capturable") or group.get("fused"))
        sharded_alike = isinstance(parameter, DTensor) and shape == tuple(parameter.shape)
        return on_host, layout_of(parameter) if sharded_alike else None

    def small(self) -> dict[str, Any]:
        """Hyperparameters and all state that is not a tensor of its own. Refers to live objects: encode it at once."""
        names = self._names
        groups = [
            {**group, "params": [names[id(parameter)] for parameter in group["params"]]}
            for group in self.optimizer.param_groups
        ]
        other: dict[str, Any] = {}
        unkeyed: dict[Any, Any] = {}
        for key, fields in self.optimizer.state.items():
            name = names.get(id(key))
            if name is None:
                if not isinstance(key, torch.Tensor):  # else left by a parameter since removed
                    unkeyed[key] = fields
            elif not isinstance(fields, dict):
                other[name] = fields
            else:
                rest = {f: value for f, value in fields.items() if not _is_tensor_field(f, value, key)}
                if rest or not fields:
                    other[name] = rest
        return {
            "groups": groups,
            "other": other,
            "unkeyed": unkeyed,
            "on_host": self._on_host,
            "layouts": self._layouts,
        }

    # ------------------------------------------------------------------ putting back

    def split(self, name: str) -> tuple[str, str] | None:
        """(parameter's name, field) of a tensor of this optimizer; None for another's."""
        if not name.startswith(self._state_prefix):
            return None
        parameter, _, field = name[len(self._state_prefix) :].rpartition(".")
        return (parameter, field) if parameter in self._by_name else None

    def check(self, saved: Mapping[str, Any]) -> None:
        """Raises CheckpointMismatch when the groups name parameters that this optimizer does not have."""
        theirs = {name for group in saved["groups"] for name in group["params"]}
        strange = sorted(theirs - self._by_name.keys())
        if strange:
            raise CheckpointMismatch(
                f"{self.title}: the saved state is about parameters that it does not hold: {', '.join(strange[:8])}. "
                "Build the optimizer as it was when the state was saved.",
                parameters=strange,
            )

    def restore_tensors(
        self,
        entries: Sequence[tuple[str, str, TensorSpec, torch.Tensor]],
        saved: Mapping[str, Any] | None,
        pending: Pending,
    ) -> None:
        """Makes the optimizer hold exactly the given tensors, and queues their values for copying.

        Args:
            entries: (parameter's name, field, spec, value).
            saved: what `small` gave, or None to leave all that is not a tensor alone.
            pending: (target, source) pairs are added to it.
        """
        state = self.optimizer.state
        kept: dict[int, set[str]] = {}
        for name, field, spec, source in entries:
            parameter = self._by_name[name]
            fields = state.setdefault(parameter, {})
            kept.setdefault(id(parameter), set()).add(field)
            target = fields.get(field)
            if not isinstance(target, torch.Tensor) or not fits(spec, target):
                target = fields[field] = self._make(parameter, field, spec, saved)
            pending.append((local(target), source))
        for parameter in list(state):
            fields = state[parameter]
            if not isinstance(parameter, torch.Tensor) or not isinstance(fields, dict):
                continue
            mine = kept.get(id(parameter), set())
            for field in [f for f, v in fields.items() if f not in mine and _is_tensor_field(f, v, parameter)]:
                del fields[field]
            if not fields:
                del state[parameter]

    def _make(
        self, parameter: torch.Tensor, field: str, spec: TensorSpec, saved: Mapping[str, Any] | None
    ) -> torch.Tensor:
        on_host, layout = self._usual_place(field, spec.global_shape, parameter)
        if saved is not None:
            on_host = saved["on_host"].get(spec.name, on_host)
            layout = saved["layouts"].get(spec.name, layout)
        return make_like(spec, parameter, torch.device("cpu") if on_host else parameter.device, layout)

    def restore_small(self, saved: Mapping[str, Any], pending: Pending) -> None:
        """Puts back what `small` gave, and keeps parts of it: hand in a copy.

        Call it after the schedulers' turn, which may write rates.
        """
        self._restore_other(saved)
        groups = self.optimizer.param_groups
        for index, theirs in enumerate(saved["groups"]):
            if index == len(groups):
                groups.append({"params": []})
            mine = groups[index]
            if [self._names.get(id(parameter)) for parameter in mine["params"]] != theirs["params"]:
                mine["params"] = [self._by_name[name] for name in theirs["params"]]
            for key in [key for key in mine if key not in theirs]:
                del mine[key]
            for key, value in theirs.items():
                if key == "params":
                    continue
                old = mine.get(key)
                if _is_tensor(old) and _is_tensor(value) and _alike(old, value):
                    pending.append((old, value))  # a rate held in a tensor is read by captured graphs: keep the tensor
                else:
                    mine[key] = value
        del groups[len(saved["groups"]) :]

    def _restore_other(self, saved: Mapping[str, Any]) -> None:
        state = self.optimizer.state
        other = saved["other"]
        for key in list(state):
            if not isinstance(key, torch.Tensor):
                if key not in saved["unkeyed"]:
                    del state[key]
                continue
            name = self._names.get(id(key))
            if name is None:
                continue
            fields = state[key]
            if not isinstance(fields, dict):
                continue
            theirs = other.get(name, {})
            for field in [f for f, value in fields.items() if f not in theirs and not _is_tensor_field(f, value, key)]:
                del fields[field]
            if not fields and name not in other:
                del state[key]
        for name, value in other.items():
            parameter = self._by_name[name]
            if isinstance(value, dict):
                state.setdefault(parameter, {}).update(value)
            else:
                state[parameter] = value
        state.update(saved["unkeyed"])


def _is_tensor(value: Any) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor)


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def _is_tensor_field(field: Any, value: Any, parameter: Any) -> bool:
    """Whether a value becomes a named tensor of its own.

    Not so a plain tensor beside a sharded parameter: it differs by rank and has no place in a whole. It is kept with
    the small objects. A counter without dimensions is the same on all ranks.
    """
    if not isinstance(value, torch.Tensor) or not isinstance(field, str) or "." in field:
        return False
    return isinstance(value, DTensor) or not isinstance(parameter, DTensor) or value.ndim == 0
