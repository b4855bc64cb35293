"""What every monitor is, and the registry that names them.

A monitor looks at one thing and says what it found. It never communicates, never changes what it looks at, and draws
no random numbers. Whether its finding is only told (an *alert*) or makes all ranks skip or roll back is its policy, and
is carried out by the vote, never by the monitor. So a monitor may look at other steps, or at other tensors, than its
peers on other ranks do: the ranks still act alike.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

import torch

from arc_dist.errors import ConfigError
from arc_dist.protocol.flags import NO_FLAGS, Flag

_SAMPLE_NUMEL = 4096


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a monitor found, for the incident.

    Attributes:
        flag: what all ranks shall act on; `NO_FLAGS` for an alert.
        name: of the tensor, series or setting, behind the monitor's name.
        value: what was seen.
        before: what it is compared with; None where there is nothing.
    """

    flag: Flag
    name: str
    value: float
    before: float | None


class Sees(enum.Enum):
    """What a monitor is given to look at, and with it the moment: all of them between the backward and the update."""

    SERIES = "series"  # the accepted losses and the script's own metrics, each by name
    GRADIENT = "gradient"  # one parameter's gradient as this rank holds it, after the reduction and after clipping
    WEIGHT = "weight"  # one parameter as this rank holds it
    OPTIMIZER = "optimizer"  # one tensor of an optimizer's state as this rank holds it
    GROUPS = "groups"  # the optimizers' parameter groups
    BATCH = "batch"  # each batch before its forward; not sampled, so only on request


class Cost(enum.Enum):
    """What one look takes: numbers only, a sample of a tensor, or a pass over a tensor."""

    CONSTANT = "constant"
    SAMPLE = "sample"
    PASS = "pass"


class Policy(enum.Enum):
    """What a finding leads to: it is told, the update is dropped, or the newest sound state is restored."""

    ALERT = "alert"
    SKIP = "skip"
    ROLLBACK = "rollback"


_FLAG_OF = {Policy.ALERT: NO_FLAGS, Policy.SKIP: Flag.MONITOR_UPDATE, Policy.ROLLBACK: Flag.MONITOR_STATE}


@dataclasses.dataclass(frozen=True)
class Part:
    """One tensor under watch, as this rank holds it: a shard under FSDP2. Real, floating, dense and not empty.

    Attributes:
        name: of the parameter (``blocks.0.weight``) or the optimizer's tensor (``blocks.0.weight.exp_avg_sq``).
        tensor: its values, to be read only.
        step: updates applied so far.
        is_embedding: rows are looked up, so most of them have no gradient in a step.
        field: an optimizer's name for it: ``exp_avg_sq``; empty for parameters and gradients.
        group: the optimizer's settings for it; empty for parameters and gradients.
        updates: how often the optimizer says it was updated, if it says so.
    """

    name: str
    tensor: torch.Tensor
    step: int
    is_embedding: bool = False
    field: str = ""
    group: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    updates: float | None = None

    def sample(self, numel: int = _SAMPLE_NUMEL) -> torch.Tensor:
        """At most `numel` of the values, always from the same places, flat. Whole rows where they fit."""
        tensor = self.tensor
        if tensor.numel() <= numel:
            return tensor.reshape(-1)
        if tensor.is_contiguous():
            return tensor.view(-1)[:numel]
        rows = max(1, numel * tensor.shape[0] // tensor.numel())
        return tensor[:rows].reshape(-1)[:numel]

    def rows(self, numel: int = 1 << 20) -> torch.Tensor | None:
        """The first rows as a matrix of at most `numel` values (one at least), or None for vectors and scalars."""
        tensor = self.tensor
        if tensor.dim() < 2 or tensor.shape[0] < 2:
            return None
        width = tensor.numel() // tensor.shape[0]
        return tensor[: max(1, numel // width)].reshape(-1, width)


class Monitor(abc.ABC):
    """Base of all monitors; see docs/monitors.md for one of your own.

    Class attributes:
        name: what users switch it on and off with, and what incidents call it.
        sees: what `look` is given.
        cost: what one look takes.
        policy: what its ordinary findings lead to; users may choose another.
    """

    name: ClassVar[str]
    sees: ClassVar[Sees]
    cost: ClassVar[Cost] = Cost.SAMPLE
    policy: Policy = Policy.ALERT

    @abc.abstractmethod
    def look(self, subject: Any) -> Iterable[Finding]:
        """Looks once: at a `Part`, a `Point` (series), the parameter groups, or a batch. Returns what it found."""

    def accept(self, subject: Any) -> None:  # noqa: B027 - most monitors learn as they look
        """Learns from a subject that raised no flag."""

    def again(self) -> bool:
        """Whether it needs to look at the same tensor in the very next step too."""
        return False

    def forget(self) -> None:  # noqa: B027 - most monitors have nothing that a restored state makes void
        """The state was restored: what is to be compared from one step to the next no longer follows."""

    def found(self, what: str, value: float, before: float | None = None, flag: Flag | None = None) -> Finding:
        """A finding about `what`. Gives it the flag of this monitor's policy unless another is given."""
        return Finding(_FLAG_OF[self.policy] if flag is None else flag, f"{self.name}: {what}", value, before)

    def certain(self, flag: Flag) -> Flag:
        """`flag`, for evidence that has no innocent reading; users may still ask for alerts only."""
        return NO_FLAGS if self.policy is Policy.ALERT else flag

    def state_dict(self) -> dict[str, Any]:
        """What it has learned; travels with snapshots and checkpoints. Plain values and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - for monitors that learn nothing
        """Puts back what `state_dict` gave."""


_REGISTRY: dict[str, type[Monitor]] = {}
_M = TypeVar("_M", bound=type[Monitor])

LITE = ("loss_spike", "loss_divergence", "metric_nonfinite", "metric_collapse", "hyperparameters")
STANDARD = (
    *LITE,
    "replicas",
    "second_moment",
    "gradient_layers",
    "weight_norm",
    "weight_sparsity",
)
FULL = (
    *STANDARD,
    "loss_plateau",
    "gradient_entropy",
    "gradient_consistency",
    "dead_neurons",
    "effective_rank",
    "weight_health",
    "stray_writes",
)
PRESETS: dict[str, tuple[str, ...]] = {"lite": LITE, "standard": STANDARD, "full": FULL}
# What is no `Monitor`, because it needs moments or messages of its own, and is switched on and off like one.
BUILT_IN = ("replicas", "stray_writes", "gradient_origin")


def register(monitor: _M) -> _M:
    """Makes a monitor known by its name: a class decorator. Do it on every rank, before `Arc` is made.

    Raises:
        ConfigError: the name is taken, or the class lacks one.
    """
    name = getattr(monitor, "name", None)
    if not isinstance(name, str) or not name.isidentifier() or not isinstance(getattr(monitor, "sees", None), Sees):
        raise ConfigError(f"{monitor.__name__}: a monitor needs `name`, an identifier, and `sees`, one of `Sees`.")
    taken = _REGISTRY.get(name)
    if name in BUILT_IN or name in PRESETS or (taken is not None and taken.__qualname__ != monitor.__qualname__):
        raise ConfigError(f"{monitor.__name__}: there is a monitor {name!r} already. Give it another name.")
    _REGISTRY[name] = monitor
    return monitor


def known() -> list[str]:
    """The names of all monitors."""
    return sorted([*_REGISTRY, *BUILT_IN])


def chosen(choice: str | Iterable[str]) -> tuple[str, ...]:
    """The monitors that a choice names: presets and names, in order; ``-name`` takes one away.

    Raises:
        ConfigError: an unknown name, or nothing but a take-away.
    """
    words = [choice] if isinstance(choice, str) else list(choice)
    names: dict[str, None] = {}
    for word in words:
        bare = word.removeprefix("-") if isinstance(word, str) else word
        if bare not in PRESETS and bare not in _REGISTRY and bare not in BUILT_IN:
            raise ConfigError(
                f"Arc(monitors={choice!r}): there is no monitor {bare!r}. Presets: {', '.join(PRESETS)}; monitors: "
                f"{', '.join(known())}.",
                setting="monitors",
            )
        members = PRESETS.get(bare, (bare,))
        for name in members:
            if word == bare:
                names[name] = None
            else:
                names.pop(name, None)
    return tuple(names)


def build(names: Iterable[str], options: Mapping[str, Mapping[str, Any]]) -> list[Monitor]:
    """Makes the monitors of these names, with the options given for each.

    Raises:
        ConfigError: an option that a monitor does not have or that is out of range.
    """
    names = list(names)
    for name in options:
        if name not in _REGISTRY:
            raise ConfigError(
                f"Arc(monitor_options): there is no monitor {name!r} with options. Those with some: "
                f"{', '.join(sorted(_REGISTRY))}.",
                setting="monitor_options",
            )
    return [_make(name, options.get(name, {})) for name in names if name in _REGISTRY]


def _make(name: str, options: Mapping[str, Any]) -> Monitor:
    arguments = dict(options)
    policy = arguments.pop("policy", None)
    try:
        monitor = _REGISTRY[name](**arguments)
        if policy is not None:
            monitor.policy = Policy(policy)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Arc(monitor_options): {name}: {error}.", setting="monitor_options") from error
    return monitor


def require(name: str, value: float, low: float, high: float) -> float:
    """`value`, if it is a number in [low, high].

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name}={value!r} must be a number in [{low:g}, {high:g}]")
    return value


class Histories:
    """The last few values of many things by name, with robust statistics of each.

    Args:
        size: values kept of each.
    """

    def __init__(self, size: int = 16) -> None:
        self._size = size
        self._values: dict[str, list[float]] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, value: float) -> None:
        values = self._values.setdefault(name, [])
        values.append(value)
        del values[: -self._size]
        self._counts[name] = self._counts.get(name, 0) + 1

    def count(self, name: str) -> int:
        """Values ever added under `name`."""
        return self._counts.get(name, 0)

    def last(self, name: str) -> list[float]:
        """The values kept of `name`, oldest first."""
        return self._values.get(name, [])

    def median(self, name: str) -> float:
        """The median of the values kept; there must be one."""
        return middle(self._values[name])

    def spread(self, name: str) -> float:
        """A robust standard deviation of the values kept: 1.4826 x MAD."""
        median = self.median(name)
        return 1.4826 * middle([abs(value - median) for value in self._values[name]])

    def drop(self, name: str) -> None:
        self._values.pop(name, None)
        self._counts.pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        names = list(self._values)
        table = torch.full((len(names), self._size), math.nan, dtype=torch.float64)
        for row, name in enumerate(names):
            values = self._values[name]
            table[row, : len(values)] = torch.tensor(values, dtype=torch.float64)
        return {"names": names, "counts": [self._counts[name] for name in names], "values": table}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        table = state["values"].tolist()
        self._counts = dict(zip(state["names"], state["counts"], strict=True))
        self._values = {
            name: row[: min(count, self._size)]
            for name, count, row in zip(state["names"], state["counts"], table, strict=True)
        }


def middle(values: Iterable[float]) -> float:
    """The upper median; there must be a value."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
