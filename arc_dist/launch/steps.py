"""Counts optimizer steps of a script that is not guarded, so that progress can be told from a loop of failures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from arc_dist import inprocess
from arc_dist.config import Env
from arc_dist.snapshot.layout import Phase, StatusPage


def count_steps(directory: Path, generation: int) -> None:
    """Installs a hook that writes the number of optimizer steps to the status page; imports torch."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    page, owner, steps = StatusPage.open(directory), os.getpid(), 0

    def count(optimizer: Any, args: Any, kwargs: Any) -> None:
        nonlocal steps
        if os.getpid() == owner:  # a forked child that trains something else inherits this
            steps += 1
            page.write(phase=Phase.NONE, step=steps, generation=generation)

    def renew() -> None:
        nonlocal steps, generation
        steps, generation = 0, Env.read().generation

    register_optimizer_step_post_hook(count)
    inprocess.at_reentry(renew)
