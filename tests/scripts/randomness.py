"""Dies once, then shows the first random numbers of both lives."""

import os
import random
import signal
import sys

import numpy
import torch

with open(sys.argv[1], "a") as log:
    print(random.random(), numpy.random.rand(), torch.rand(1).item(), file=log)
if os.environ["ARC_GENERATION"] == "0":
    os.kill(os.getpid(), signal.SIGKILL)
