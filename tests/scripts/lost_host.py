"""Trains a toy under Arc and stops in the middle of a step, for its host to be lost there; see test_peer_copies.py.

Arguments: a JSON object with the fields of `toy.Toy`, and: "out" (a directory), "blocks" ({rank: step}, each once),
"store", "settings" (of Arc).
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from toy import Toy, guarded


def main():
    config = json.loads(sys.argv[1])
    out = Path(config["out"])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    block_at = config["blocks"].get(str(rank))

    def wrap(loss, arc):
        step = arc.steps_done + 1
        marker = out / f"blocked-{rank}"
        if step == block_at and not marker.exists():
            marker.write_text(str(os.getpid()))
            while True:
                signal.pause()
        return loss

    job = guarded(Toy(**config["toy"]), wrap_loss=wrap, store=config.get("store"), **config["settings"])
    first = None
    for step in job.steps:
        first = first or step.number
        with open(out / f"progress-{rank}", "a") as file:
            file.write(f"{step.number}\n")
    resumed = job.arc._engine.resumed
    result = {
        "digest": job.digest(),
        "first": first,
        "resumed": None if resumed is None else [resumed.step, resumed.tier],
        "pid": os.getpid(),
    }
    (out / f"result-{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


main()
