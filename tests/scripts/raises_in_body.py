"""Raises in the loop's body while a checkpoint waits to be committed, for ever, and something holds the loop.

Arguments: a directory for the store.
"""

import sys
import threading
import time

import torch

from arc_dist import Arc
from arc_dist.checkpointer import Checkpointer

WAITS = threading.Event()


def commits_never(self, *arguments):
    print("waits", flush=True)
    WAITS.set()
    time.sleep(1e6)


Checkpointer._commit = commits_never


def main():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    arc = Arc(model, torch.optim.SGD(model.parameters(), lr=0.1), store=sys.argv[1], checkpoint_every=2)
    data = [(torch.randn(4, 4), torch.randn(4, 1)) for _ in range(50)]
    loop = arc.train(lambda batch: torch.nn.functional.mse_loss(model(batch[0]), batch[1]), data)
    for step in loop:
        if arc._engine._checkpointer.is_writing():
            WAITS.wait()
            raise ValueError(f"the script's own bug at step {step.number}")


main()
