"""Checkpoints as bytes and manifests: written whole or not at all, verified before use, readable by stock torch.

`Store` is the entrance; FORMAT.md is the specification of what it writes.
"""

from __future__ import annotations

from arc_dist.checkpoint_store.backends import Unsupported
from arc_dist.checkpoint_store.catalog import StepInfo
from arc_dist.checkpoint_store.format import ShardTensor, TensorSpec, assign_writers
from arc_dist.checkpoint_store.reader import Checkpoint, Problem
from arc_dist.checkpoint_store.store import Store, default_commit
from arc_dist.checkpoint_store.writer import SaveAborted

__all__ = [
    "Checkpoint",
    "Problem",
    "SaveAborted",
    "ShardTensor",
    "StepInfo",
    "Store",
    "TensorSpec",
    "Unsupported",
    "assign_writers",
    "default_commit",
]
