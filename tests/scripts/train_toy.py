"""Trains a toy under Arc with faults; every rank writes what it ended with, as JSON.

Arguments: a JSON object with the fields of `toy.Toy`, and: "out" (a directory), "kills" ({rank: [steps]}), "raises"
({rank: step}), "oom" (a cgroup in which the kills are the OOM killer's), "pauses" ({rank: step}: waits there for ever,
the first time), "gates" (steps in which all ranks wait for a file `go-<step>` in "out"), "lags" ({rank: seconds that
each of its losses takes}), "store", "settings" (of Arc).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from memory_limit import exhaust
from toy import Toy, guarded


def main():
    config = json.loads(sys.argv[1])
    out = Path(config["out"])
    toy = Toy(**config["toy"])
    if toy.kind != "single":
        dist.init_process_group("gloo")
    rank = dist.get_rank() if toy.kind != "single" else 0
    (out / "trainers").mkdir(exist_ok=True)
    (out / "trainers" / f"{rank}-{os.getpid()}").write_text(str(os.getpid()))
    kills = config.get("kills", {}).get(str(rank), [])
    where = config.get("where", "loss")

    def strike(step, place):
        marker = out / f"killed-{rank}-{step}"
        if place == where and step in kills and not marker.exists():
            marker.write_text(str(os.getpid()))
            if "oom" in config:
                exhaust(Path(config["oom"]))
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(loss, arc):
        step = arc.steps_done + 1
        strike(step, "loss")
        paused = out / f"paused-{rank}"
        if config.get("pauses", {}).get(str(rank)) == step and not paused.exists():
            paused.touch()
            signal.pause()
        while step in config.get("gates", []) and not (out / f"go-{step}").exists():
            time.sleep(0.01)
        time.sleep(config.get("lags", {}).get(str(rank), 0))
        if config.get("raises", {}).get(str(rank)) == step:
            raise ValueError(f"the script's own bug at step {step}")
        return loss

    job = guarded(toy, wrap_loss=wrap, store=config.get("store"), **config.get("settings", {}))
    steps = []
    for step in job.steps:
        steps.append([step.number, step.action, step.repeated])
        strike(step.number, "body")
        with open(out / f"progress-{rank}", "a") as file:
            file.write(f"{step.number}\n")
    bases = [path.name for path in Path(os.environ.get("ARC_SHM_DIR", out)).glob("base-*.bin")]
    result = {"bases": bases, "digest": job.digest(), "replica": job.replica(), "steps": steps, "pid": os.getpid()}
    (out / f"result-{rank}.json").write_text(json.dumps(result))
    if toy.kind != "single":
        dist.destroy_process_group()


main()
