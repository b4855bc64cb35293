"""arc-dist: keeps PyTorch training jobs running through numeric failures, crashed ranks and lost nodes.

Importing this package is cheap: torch is imported when a name that needs it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from arc_dist.errors import (
    ArcError,
    ConfigError,
    DataNotReproducible,
    ExitCode,
    InfrastructureError,
    Preempted,
    StoreError,
    TrainingStopped,
)

if TYPE_CHECKING:
    from arc_dist.arc import Action, Arc
    from arc_dist.checkpoint_store.store import Store
    from arc_dist.data.sampler import SeededSampler
    from arc_dist.inprocess import resilient
    from arc_dist.loop import StepResult
    from arc_dist.protocol.decision import Verdict
    from arc_dist.protocol.ladder import HealingPolicy

__version__ = "0.1.0"

__all__ = [
    "Arc",
    "resilient",
    "Action",
    "StepResult",
    "Verdict",
    "HealingPolicy",
    "SeededSampler",
    "Store",
    "ExitCode",
    "ArcError",
    "ConfigError",
    "DataNotReproducible",
    "InfrastructureError",
    "Preempted",
    "StoreError",
    "TrainingStopped",
]

_LAZY = {
    "Arc": "arc_dist.arc",
    "resilient": "arc_dist.inprocess",
    "Action": "arc_dist.arc",
    "StepResult": "arc_dist.loop",
    "Verdict": "arc_dist.protocol.decision",
    "HealingPolicy": "arc_dist.protocol.ladder",
    "SeededSampler": "arc_dist.data.sampler",
    "Store": "arc_dist.checkpoint_store.store",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
