"""Trains a toy under Arc on hosts of which one is slow; see test_eviction.py.

Arguments: a JSON object with the fields of `toy.Toy`, and: "out" (a directory), "slow" ([host, part of a step,
seconds]: what every rank on that host does in each step), "strike" (the rank that is killed, once, as soon as there is
a file "strike" in "out"), "store", "settings" (of Arc).
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import toy as toys
from toy import Toy, guarded

BATCH = 8


def main():
    config = json.loads(sys.argv[1])
    out = Path(config["out"])
    dist.init_process_group("gloo")
    rank, host = dist.get_rank(), socket.gethostname()
    slow_host, part, extra_s = config["slow"]
    part = part if host == slow_host else ""
    fetch = toys.Noise.__getitem__

    def slow_fetch(data, index):
        time.sleep(extra_s / BATCH)
        return fetch(data, index)

    if part == "data":
        toys.Noise.__getitem__ = slow_fetch

    def wrap(loss, arc):
        struck = out / f"struck-{rank}"
        if rank == config["strike"] and (out / "strike").exists() and not struck.exists():
            struck.write_text(str(arc.steps_done))
            os.kill(os.getpid(), signal.SIGKILL)
        if part == "loss":
            time.sleep(extra_s)
        return loss

    job = guarded(Toy(**config["toy"]), wrap_loss=wrap, store=config.get("store"), **config["settings"])
    generation = int(os.environ["ARC_GENERATION"])
    with open(out / f"steps-{rank}", "a", buffering=1) as file:
        for step in job.steps:
            line = {"step": step.number, "host": host, "generation": generation, "ranks": dist.get_world_size()}
            file.write(json.dumps(line | {"pid": os.getpid()}) + "\n")
    resumed = job.arc._engine.resumed
    result = {
        "digest": job.digest(),
        "host": host,
        "generation": generation,
        "resumed": None if resumed is None else [resumed.step, resumed.tier],
    }
    (out / f"result-{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


main()
