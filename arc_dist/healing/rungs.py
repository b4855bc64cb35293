"""Rungs of the user's own: what to change once an older state is back, on every rank alike."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, TypeVar

import torch
from torch import nn

from arc_dist.errors import ConfigError
from arc_dist.protocol.ladder import RUNGS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What a rung is given; equal on all ranks but for `rank` and the values of shards.

    Attributes:
        step: updates that the restored state contains.
        failed_step: the step whose update was not applied.
        flags: names of what was found: ``("loss_nonfinite",)``.
        tried: rungs used without progress since, this one included.
        models, optimizers: the training's own objects, at the restored state.
        rank, world_size: of this process.
    """

    step: int
    failed_step: int
    flags: Sequence[str]
    tried: Sequence[str]
    models: Mapping[str, nn.Module]
    optimizers: Sequence[torch.optim.Optimizer]
    rank: int
    world_size: int


class OwnRung(abc.ABC):
    """Base of rungs of the user's own; see docs/healing.md.

    Before it, the newest certified snapshot is restored, rate and clip are cut and the offending batches left out, as
    by "rollback". One that raises on any rank is told, and all ranks go on to the next rung.

    Class attributes:
        name: what it is called in `HealingPolicy.ladder` and in incidents.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def heal(self, case: Case) -> str:
        """Changes the training, in the same way on every rank, and says in a few words what it changed."""


_REGISTRY: dict[str, type[OwnRung]] = {}
_R = TypeVar("_R", bound=type[OwnRung])
_TAKEN = {*RUNGS, "apply", "stop", "own"}


def register(rung: _R) -> _R:
    """Makes a rung known by its name: a class decorator. Do it on every rank, before `Arc` is made.

    Raises:
        ConfigError: the name is taken, or the class lacks one.
    """
    name = getattr(rung, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError(f"{rung.__name__}: a rung needs `name`, an identifier.")
    known = _REGISTRY.get(name)
    if name in _TAKEN or (known is not None and known.__qualname__ != rung.__qualname__):
        raise ConfigError(f"{rung.__name__}: there is a rung {name!r} already. Give it another name.")
    _REGISTRY[name] = rung
    return rung


def require_known(ladder: Iterable[str]) -> None:
    """Refuses names that are neither built in nor registered.

    Raises:
        ConfigError: with the names that are known.
    """
    unknown = sorted({name for name in ladder if name not in RUNGS and name not in _REGISTRY})
    if unknown:
        raise ConfigError(
            f"HealingPolicy(ladder): there is no rung {', '.join(unknown)}. Known: {', '.join([*RUNGS, *_REGISTRY])}. "
            "Register one of your own before Arc is made (docs/healing.md).",
            setting="policy",
        )


def heal(name: str, case: Case) -> str:
    """Lets the rung of that name heal.

    Raises:
        ConfigError: there is none.
        Exception: whatever it raises.
    """
    rung = _REGISTRY.get(name)
    if rung is None:
        raise ConfigError(f"there is no rung {name!r}")
    return str(rung().heal(case))
