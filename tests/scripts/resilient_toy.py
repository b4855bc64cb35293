"""Trains a toy inside a function that is entered again, with faults; every rank writes what it ended with, as JSON.

Arguments: a JSON object with the fields of `toy.Toy`, and: "out" (a directory), "kills" ({rank: [steps]}), "where"
("loss", "body" or "evaluation"), "kills_at_entry" ({rank: [generations]}), "breaks" ({rank: [steps]}: raises what the
loss of a peer looks like), "breaks_always" ({rank: step}), "raises" ({rank: step}: the script's own bug, every time),
"sticks" ({rank: [step, how]}), "evaluates", "store", "settings" (of Arc), "within_s".
"""

import datetime
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from arc_dist import resilient
from toy import Toy, guarded

CONFIG = json.loads(sys.argv[1])
OUT = Path(CONFIG["out"])
HELD = []  # what a careless script keeps beyond its function


def once(name):
    """True the first time that any process of the job asks."""
    try:
        os.close(os.open(OUT / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def steps_of(kind, rank):
    return CONFIG.get(kind, {}).get(str(rank), [])


def strike(rank, step, place):
    if step in steps_of("kills", rank) and CONFIG.get("where", "loss") == place and once(f"killed-{rank}-{step}"):
        os.kill(os.getpid(), signal.SIGKILL)


def stick(rank, step):
    at, how = CONFIG.get("sticks", {}).get(str(rank), [0, ""])
    if at != step or not once(f"stuck-{rank}-{step}"):
        return
    if how == "sleep":
        time.sleep(1000)
    elif how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "wait":  # in C, without Python's lock, for what nobody ever says
        dist.distributed_c10d._get_default_store().wait(["never"], datetime.timedelta(seconds=1000))
    elif how == "thread":
        threading.Thread(target=time.sleep, args=(1000,), name="careless").start()


def usage():
    """What this process holds: resident memory in bytes, descriptors, threads; and bytes of its snapshots."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    snapshots = sum(path.stat().st_size for path in Path(os.environ["ARC_SHM_DIR"]).iterdir())
    return [resident, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), snapshots]


def evaluate(rank, step):
    strike(rank, step, "evaluation")
    total = torch.ones(1)
    for _ in range(3):
        dist.all_reduce(total)


@resilient(within_s=CONFIG.get("within_s", 30.0))
def main():
    toy = Toy(**CONFIG["toy"])
    rank, generation = int(os.environ["RANK"]), int(os.environ["ARC_GENERATION"])
    with open(OUT / f"entries-{rank}", "a") as file:
        file.write(f"{os.getpid()} {generation}\n")
    with open(OUT / f"usage-{rank}", "a") as file:
        file.write(json.dumps(usage()) + "\n")
    if generation in steps_of("kills_at_entry", rank) and once(f"killed-{rank}-entry-{generation}"):
        os.kill(os.getpid(), signal.SIGKILL)
    dist.init_process_group("gloo")
    group = dist.new_group()
    if CONFIG.get("sticks", {}).get(str(rank), [0, ""])[1] == "group":
        HELD.append(group)
    del group

    def wrap(loss, arc):
        step = arc.steps_done + 1
        strike(rank, step, "loss")
        stick(rank, step)
        if step in steps_of("breaks", rank) and once(f"broken-{rank}-{step}"):
            raise ConnectionResetError(f"rank {rank} lost its network in step {step}")
        if CONFIG.get("breaks_always", {}).get(str(rank)) == step:
            raise ConnectionResetError(f"rank {rank} loses its network in step {step}")
        if CONFIG.get("raises", {}).get(str(rank)) == step:
            raise ValueError(f"the script's own bug at step {step}")
        return loss

    job = guarded(toy, wrap_loss=wrap, store=CONFIG.get("store"), **CONFIG.get("settings", {}))
    steps = []
    for step in job.steps:
        steps.append(step.number)
        with open(OUT / f"progress-{rank}", "a") as file:
            file.write(f"{step.number}\n")
        strike(rank, step.number, "body")
        if CONFIG.get("evaluates"):
            evaluate(rank, step.number)
    digest = job.digest()
    dist.destroy_process_group()
    return rank, {"digest": digest, "steps": steps, "pid": os.getpid()}


if __name__ == "__main__":
    rank, result = main()
    (OUT / f"result-{rank}.json").write_text(json.dumps(result))
