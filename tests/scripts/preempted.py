"""Trains a toy under Arc and sends itself, its supervisor or the launcher a notice at one exact place, once.

Argument: a JSON object: "toy", "out" (a directory), "store", "settings" (of Arc), and "notice", which may be null:
{"rank", "step", "place", "target", "how", "times", "then"}.

Places: "import" (before the Arc exists), "restore" (while the state is looked for), "loss" (in a step), "body" (after
one), "save" (while a checkpoint is written). Targets: "trainer", "supervisor", "launcher". How: a signal's name or
"file". Then: what the rank does afterwards: "go on", "hang" or "die".
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from toy import Toy, guarded

CONFIG = json.loads(sys.argv[1])
OUT = Path(CONFIG["out"])
NOTICE = CONFIG["notice"] or {"place": None}
MARKER = OUT / "fired.json"
RANK = int(os.environ["RANK"])


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def committed():
    if CONFIG["store"] is None:
        return []
    return sorted(int(path.parent.name[5:13]) for path in Path(CONFIG["store"]).glob("run/step-*/manifest.json"))


def fire(arc=None):
    supervisor = parent_of(os.getppid())  # the zygote lies between
    pid = {"trainer": os.getpid(), "supervisor": supervisor, "launcher": parent_of(supervisor)}[NOTICE["target"]]
    certified = arc._engine.guard.protection.certified_steps() if arc is not None else []
    known = {"committed": committed(), "certified": certified, "pid": pid}
    MARKER.with_suffix(".draft").write_text(json.dumps(known))
    MARKER.with_suffix(".draft").rename(MARKER)
    for _ in range(NOTICE["times"]):
        if NOTICE["how"] == "file":
            Path(os.environ["ARC_PREEMPT_FILE"]).touch()
        else:
            os.kill(pid, getattr(signal, NOTICE["how"]))
    if NOTICE["then"] == "hang":
        time.sleep(10_000)
    if NOTICE["then"] == "die":
        os.kill(os.getpid(), signal.SIGKILL)


def strike(place, step=None, arc=None):
    if NOTICE["place"] == place and NOTICE["rank"] == RANK and NOTICE["step"] in (step, None) and not MARKER.exists():
        fire(arc)


def strike_inside(owner, name, place):
    """The notice comes while a function of ours is at work."""
    honest = getattr(owner, name)

    def struck(*args, **kwargs):
        strike(place)
        return honest(*args, **kwargs)

    setattr(owner, name, struck)


def main():
    strike("import")
    from arc_dist import restore
    from arc_dist.checkpointer import Checkpointer

    strike_inside(restore, "find", "restore")
    strike_inside(Checkpointer, "_write_to", "save")
    dist.init_process_group("gloo")

    def wrap(loss, arc):
        strike("loss", arc.steps_done + 1, arc)
        return loss

    job = guarded(Toy(**CONFIG["toy"]), wrap_loss=wrap, store=CONFIG["store"], **CONFIG["settings"])
    first = None
    for step in job.steps:
        first = step.number if first is None else first
        strike("body", step.number, job.arc)
    (OUT / f"result-{RANK}.json").write_text(json.dumps({"first": first, "digest": job.digest()}))
    dist.destroy_process_group()


main()
