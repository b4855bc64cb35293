"""What a checkpoint's manifest says about its step beyond its tensors: place in the data, metrics, best so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from arc_dist.errors import ConfigError

_MAX_METRICS = 256
_MAX_NAME = 128


class Observed:
    """The newest value of each metric, and the best ones with their steps. Travels with snapshots and checkpoints."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._smallest: dict[str, tuple[float, int]] = {}
        self._largest: dict[str, tuple[float, int]] = {}

    def add(self, name: str, value: float, step: int) -> None:
        """Takes a value that was found after `step` updates.

        A value that is not finite is remembered as the newest and never as the best.

        Raises:
            ConfigError: not a name and a number, or too many names.
        """
        if not isinstance(name, str) or not name or len(name) > _MAX_NAME:
            raise ConfigError(f"observe({name!r}): a metric's name is a text of 1 to {_MAX_NAME} characters.")
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"observe({name!r}, {type(value).__name__}): the value must be one number.") from error
        if name not in self._values and len(self._values) >= _MAX_METRICS:
            raise ConfigError(f"observe({name!r}): {_MAX_METRICS} metrics are tracked already. Use fewer names.")
        self._values[name] = number
        if math.isfinite(number):
            if name not in self._smallest or number < self._smallest[name][0]:
                self._smallest[name] = (number, step)
            if name not in self._largest or number > self._largest[name][0]:
                self._largest[name] = (number, step)

    def best(self, name: str, *, largest: bool = False) -> tuple[float, int] | None:
        """The best value so far and the step that it was found after; None when there is none."""
        return (self._largest if largest else self._smallest).get(name)

    def state_dict(self) -> dict[str, Any]:
        return {
            "values": dict(self._values),
            "smallest": {name: list(pair) for name, pair in self._smallest.items()},
            "largest": {name: list(pair) for name, pair in self._largest.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._values = dict(state["values"])
        self._smallest = {name: (value, step) for name, (value, step) in state["smallest"].items()}
        self._largest = {name: (value, step) for name, (value, step) in state["largest"].items()}

    def about(self, step: int, data: Mapping[str, Any] | None, loss: float | None, world_size: int) -> dict[str, Any]:
        """What the manifest shall say, JSON-able: numbers that are not finite are left out.

        Args:
            step: updates applied.
            data: the position in the data (see `BatchSource.position`), if known.
            loss: of the last step, on this rank.
            world_size: ranks, each with data of its own.
        """
        about: dict[str, Any] = {"step": step}
        if data is not None:
            about["data"] = {"epoch": data["epoch"], "batch": data["ordinal"]}
            if data["batch_size"] is not None:
                about["data"]["samples"] = data["ordinal"] * data["batch_size"] * world_size
        metrics = {name: value for name, value in self._values.items() if math.isfinite(value)}
        if loss is not None and math.isfinite(loss):
            metrics.setdefault("loss", loss)
        about["metrics"] = metrics
        about["best"] = {
            name: {"smallest": list(pair), "largest": list(self._largest[name])}
            for name, pair in self._smallest.items()
        }
        return about
