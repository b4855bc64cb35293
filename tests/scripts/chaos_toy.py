"""Trains a toy under Arc while planned faults strike; every rank notes its lives, and at the end its digest.

Arguments: a JSON object with the fields of `toy.Toy`, and: "out" (a directory), "store", "settings" (of Arc),
"faults" (see tests/chaos.py). A fault strikes once, from inside the rank that it names, so that it is addressed by
rank and step and needs no sleeping and no guessing from outside.
"""

import errno
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from arc_dist import restore
from arc_dist.checkpointer import Checkpointer
from arc_dist.supervisor.process import start_ticks
from toy import Toy, guarded

CONFIG = json.loads(sys.argv[1])
OUT = Path(CONFIG["out"])
RANK = int(os.environ["RANK"])
GENERATION = int(os.environ["ARC_GENERATION"])


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def append(name, entry):
    log = os.open(OUT / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(log, json.dumps(entry).encode() + b"\n")
    os.close(log)


def note_life():
    """Says who this is; a life of the same rank that is not over is what must never be."""
    path = OUT / f"lives-{RANK}"
    earlier = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for life in earlier:
        if start_ticks(life["pid"]) == life["ticks"]:
            append("two-live-trainers", {"rank": RANK, "earlier": life, "pid": os.getpid(), "generation": GENERATION})
    zygote = os.getppid()
    supervisor = parent_of(zygote)
    append(
        f"lives-{RANK}",
        {
            "at": time.monotonic(),
            "generation": GENERATION,
            "pid": os.getpid(),
            "ticks": start_ticks(os.getpid()),
            "zygote": zygote,
            "supervisor": supervisor,
            "agent": parent_of(supervisor),
        },
    )


def victim(rank, part):
    """The process that plays `part` for a rank, or None when it is gone."""
    life = json.loads((OUT / f"lives-{rank}").read_text().splitlines()[-1])
    return None if start_ticks(life["pid"]) != life["ticks"] else life[part]


def claim(fault, step):
    """True for the one process that may carry the fault out."""
    try:
        mark = os.open(OUT / f"fired-{fault['number']}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return False
    entry = {"at": time.monotonic(), "pid": os.getpid(), "generation": GENERATION, "step": step}
    os.write(mark, json.dumps(entry).encode())
    os.close(mark)
    return True


def carry_out(fault, step):
    part = {"supervisor": "supervisor", "zygote": "zygote", "agent": "agent"}.get(fault["kind"], "pid")
    if fault["kind"] in ("exit", "raise"):
        append("struck", {"number": fault["number"], "missed": []})
        if fault["kind"] == "exit":
            os._exit(3 + fault["number"] % 50)
        raise OSError(errno.EIO, f"Input/output error (fault {fault['number']} at step {step})")
    pids = [victim(rank, part) for rank in fault["ranks"]]
    missed = [rank for rank, pid in zip(fault["ranks"], pids) if pid is None]
    append("struck", {"number": fault["number"], "missed": missed, "pids": pids})
    pids = sorted((pid for pid in pids if pid is not None), key=lambda pid: pid == os.getpid())
    for pid in pids:
        os.kill(pid, signal.SIGSTOP if fault["kind"] == "stop" else signal.SIGKILL)
    if fault["kind"] == "stop":
        threading.Thread(target=kill_later, args=(pids, fault["delay_s"]), daemon=True).start()


def kill_later(pids, delay_s):
    time.sleep(delay_s)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def strike(place, step):
    for fault in CONFIG["faults"]:
        if fault["place"] != place or fault["by"] != RANK or step < fault["step"]:
            continue
        if fault["after"] is not None and not (OUT / f"fired-{fault['after']}").exists():
            continue
        if (OUT / f"fired-{fault['number']}").exists():
            continue
        if fault["delay_s"] and fault["kind"] != "stop":
            threading.Thread(target=strike_later, args=(fault, step), daemon=True).start()
        elif claim(fault, step):
            carry_out(fault, step)


def strike_later(fault, step):
    time.sleep(fault["delay_s"])
    if claim(fault, step):
        carry_out(fault, step)


def struck_around(owner, name, place, step_of):
    """Strikes before the real function runs, or after it where `place` ends in "ed"."""
    real = getattr(owner, name)

    def wrapped(*args, **kwargs):
        if not place.endswith("ed"):
            strike(place, step_of(args))
        result = real(*args, **kwargs)
        if place.endswith("ed"):
            strike(place, step_of(args))
        return result

    setattr(owner, name, wrapped)


def main():
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # the harness asks for it when nothing goes on any more
    note_life()
    strike("start", 0)
    for place in ("restore", "restored"):
        struck_around(restore, "_planned", place, lambda args: 0)
        struck_around(restore, "_read", place, lambda args: 0)
    for place in ("save", "saved"):  # the saved shard is not reported yet
        struck_around(Checkpointer, "_write_to", place, lambda args: args[1].step)
    dist.init_process_group("gloo")
    strike("joined", 0)

    def wrap(loss, arc):
        strike("loss", arc.steps_done + 1)
        return loss

    job = guarded(Toy(**CONFIG["toy"]), wrap_loss=wrap, store=CONFIG["store"], **CONFIG["settings"])
    for step in job.steps:
        strike("body", step.number)
        append(f"steps-{RANK}", [GENERATION, step.number])
    (OUT / f"result-{RANK}.json").write_text(json.dumps({"digest": job.digest(), "generation": GENERATION}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
