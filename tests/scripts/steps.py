"""One rank, no process group: counts steps and does at some of them what the arguments say.

Each argument is ``GENERATION:STEP:ACTION``; a generation of ``*`` means all.
"""

import os
import signal
import subprocess
import sys
import time

import torch

log = open(sys.argv[1], "a", buffering=1)  # noqa: SIM115
orders = [argument.split(":") for argument in sys.argv[2:]]
generation = os.environ.get("ARC_GENERATION", "0")
print("start", os.getpid(), generation, file=log)
weight = torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.SGD([weight], lr=0.1)
for step in range(30):
    for when, at, action in orders:
        if when in ("*", generation) and int(at) == step:
            print("do", action, file=log)
            if action == "raise":
                raise RuntimeError("the same every time")
            if action.startswith("exit"):
                sys.exit(int(action[4:]))
            if action == "orphan":
                orphan = subprocess.Popen(["sleep", "1000"], start_new_session=True)
                print("orphan", orphan.pid, file=log)
            if action == "wait":
                time.sleep(60)
            if action == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
    weight.square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    print("step", step, file=log)
print("end", file=log)
