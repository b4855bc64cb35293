"""Trains a toy and writes down which samples each rank uses in which step; the world may differ from run to run.

Arguments: a JSON object with the fields of `elastic_job.Plan`, and: "out" (a directory), "life" (of this run), "kills"
({rank: step}), "nans" ({rank: step}), "until" (steps in the whole run), "pause_s" (after
each step), "slow" ([host, seconds]: what each micro-batch takes longer there), "strike" (the rank that is killed, once,
as soon as there is a file "strike" in "out").
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from arc_dist import Arc
from elastic_job import Plan, build_loader
from toy import Toy, build_model, build_optimizers, build_schedulers, digest


class Log:
    """Every micro-batch of every attempt at a step, written before anything is done with it."""

    def __init__(self, path: Path, life: list[int], rank: int) -> None:
        self._path = path
        self._life, self._rank = life, rank
        self._attempt, self._left = 0, 0

    def add(self, step: int, micro_batches: int, samples: list[int]) -> None:
        if self._left == 0:
            self._attempt, self._left = self._attempt + 1, micro_batches
        self._left -= 1
        line = {"life": self._life, "attempt": self._attempt, "step": step, "rank": self._rank, "samples": samples}
        with open(self._path, "a") as file:
            file.write(json.dumps(line) + "\n")


def main() -> None:
    config = json.loads(sys.argv[1])
    plan = Plan(**config["plan"])
    out = Path(config["out"])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    toy = Toy(kind=plan.kind)
    model = build_model(toy)
    optimizers = build_optimizers(toy, model)
    arc = Arc(
        model, optimizers, scheduler=build_schedulers(toy, optimizers), accumulate=plan.accumulate, max_grad_norm=1.0,
        snapshot_every=2, checkpoint_every=plan.checkpoint_every, store=str(out / "store"),
        **config.get("settings", {}),
    )  # fmt: skip
    log = Log(out / f"samples-{config['life']}-{rank}.jsonl", [config["life"], generation()], rank)

    def fires(what: str, step: int) -> bool:
        marker = out / f"{what}-{config['life']}-{rank}-{step}"
        if config.get(what, {}).get(str(rank)) != step or marker.exists():
            return False
        marker.touch()
        return True

    host, (slow_host, slow_s) = os.uname().nodename, config.get("slow", ("", 0.0))

    def is_struck() -> bool:
        marker = out / f"struck-{rank}"
        if rank != config.get("strike") or marker.exists() or not (out / "strike").exists():
            return False
        marker.touch()
        return True

    def loss_fn(batch):
        x, y, indices = batch
        if sys._getframe(1).f_code.co_name == "warm_up":  # its results are thrown away
            return nn.functional.mse_loss(model(x), y)
        step = arc.steps_done + 1
        log.add(step, arc._engine.accumulate, indices.tolist())
        if fires("kills", step) or is_struck():
            os.kill(os.getpid(), signal.SIGKILL)
        if host == slow_host:
            time.sleep(slow_s)
        loss = nn.functional.mse_loss(model(x), y)
        return loss * float("nan") if fires("nans", step) else loss

    steps = []
    for step in arc.train(loss_fn, build_loader(plan), steps=config["until"]):
        steps.append([step.number, step.action])
        with open(out / f"progress-{rank}", "a") as file:
            file.write(f"{step.number} {dist.get_world_size()}\n")
        with open(out / f"steps-{host}", "a") as file:
            line = {"at": time.monotonic(), "step": step.number, "generation": generation(), "store": meeting_place()}
            file.write(json.dumps({**line, "rank": rank, "ranks": dist.get_world_size()}) + "\n")
        time.sleep(config.get("pause_s", 0.0))
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    result = {"steps": steps, "digest": digest(model, optimizers), "rates": rates, "ranks": dist.get_world_size()}
    (out / f"result-{config['life']}-{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def meeting_place() -> str:
    """Another one for every set of processes that train together."""
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def generation() -> int:
    return int(os.environ.get("ARC_GENERATION", "0"))


main()
