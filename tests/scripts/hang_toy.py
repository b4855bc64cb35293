"""Trains a toy under Arc, with one hang of a given kind on one rank at one step; every rank writes what it ended with.

Arguments: a JSON object with the fields of `toy.Toy`, and: "out" (a directory), "kind", "rank", "step", "settings" (of
Arc), "always" (not only the first time), "slow" ({rank: [part, seconds]}: what a straggler does in each step).
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import toy as toys
from toy import Toy, guarded

BATCH = 8


class Hang:
    def __init__(self, config, rank):
        self.kind, self.rank = config["kind"], rank
        self.step = config["step"] if rank == config["rank"] else -1
        self.at = config["step"]
        self.out = Path(config["out"])
        self.marker = self.out / f"hung-{rank}"
        self.always = config.get("always", False)

    def strikes(self, step, *kinds):
        if self.kind not in kinds or step != self.step or (self.marker.exists() and not self.always):
            return False
        self.marker.write_text(str(os.getpid()))
        return True

    def in_loss(self, step):
        if self.strikes(step, "stop"):
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.strikes(step, "suspend"):
            # With its supervisor, as Ctrl-Z or a frozen container would; then both go on.
            over = self.out / "suspension-over"
            pause = f"kill -STOP -{os.getpgrp()}; sleep 20; touch {over}; kill -CONT -{os.getpgrp()}"
            subprocess.Popen(["sh", "-c", pause], start_new_session=True)
            while not over.exists():
                time.sleep(0.05)
        elif self.strikes(step, "spin"):
            while True:
                pass
        elif self.strikes(step, "gil"):
            lock = ctypes.create_string_buffer(256)
            for _ in range(2):  # the second call never comes back, and PyDLL keeps the interpreter's lock
                ctypes.PyDLL(None).pthread_mutex_lock(lock)

    def in_body(self, step, arc):
        if self.strikes(step, "storage"):
            fifo = self.out / "fifo"
            os.mkfifo(fifo)
            with arc.section("write checkpoint", deadline_s=3.0):
                fifo.open("w").write("nobody reads this")
        if self.strikes(step, "evaluation"):
            time.sleep(max(4.0, 20.0 * min(1.0, self.last_step_s)))

    last_step_s = 0.0


def main():
    config = json.loads(sys.argv[1])
    toy = Toy(**config["toy"])
    if toy.kind != "single":
        dist.init_process_group("gloo")
    rank = dist.get_rank() if toy.kind != "single" else 0
    hang = Hang(config, rank)
    own_group = dist.new_group(backend="gloo") if hang.kind == "skip" else None
    part, extra_s = config.get("slow", {}).get(str(rank), ("", 0.0))
    fetch, fetched = toys.Noise.__getitem__, 0

    def slow_fetch(data, index):
        nonlocal fetched
        fetched += 1
        if hang.strikes(-(-fetched // BATCH), "data"):
            time.sleep(100_000)
        if part == "data":
            time.sleep(extra_s / BATCH)
        return fetch(data, index)

    toys.Noise.__getitem__ = slow_fetch

    def wrap(loss, arc):
        step = arc.steps_done + 1
        hang.in_loss(step)
        if own_group is not None and step == hang.at and not hang.strikes(step, "skip"):
            dist.all_reduce(torch.zeros(1), group=own_group)
        if part == "loss":
            busy_until = time.thread_time() + extra_s
            while time.thread_time() < busy_until:
                pass
        return loss

    job = guarded(toy, wrap_loss=wrap, **config.get("settings", {}))
    steps, began = [], time.monotonic()
    for step in job.steps:
        steps.append(step.number)
        hang.last_step_s = time.monotonic() - began
        hang.in_body(step.number, job.arc)
        began = time.monotonic()
    result = {"digest": job.digest(), "steps": steps, "generation": int(os.environ["ARC_GENERATION"])}
    (hang.out / f"result-{rank}.json").write_text(json.dumps(result))
    if toy.kind != "single":
        dist.destroy_process_group()


main()
