"""Trains a byte-level GPT under DDP or FSDP2, protected by arc-dist.

::

    arcrun --nproc-per-node=2 examples/train_gpt.py --steps 200 --store /tmp/checkpoints
    arcrun --nproc-per-node=2 examples/train_gpt.py --steps 200 --store /tmp/checkpoints --fsdp

Kill any rank, or all of them, or start it again after the end of the job: it continues at the exact sample.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from arc_dist import Arc, SeededSampler
from faults import FaultScript, parse
from gpt import GPT, GPTConfig, StdlibText, count_parameters, held_out_loss, make_optimizer, next_byte_loss


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="updates in the whole run")
    parser.add_argument("--batch", type=int, default=8, help="windows per rank and step")
    parser.add_argument("--fsdp", action="store_true", help="shard the model with FSDP2 instead of replicating it")
    parser.add_argument("--store", help="directory or URL for checkpoints")
    parser.add_argument("--checkpoint-every", type=int, default=50)
    parser.add_argument("--snapshot-every", type=int, default=None, help="default: measured, under 1 %% of the time")
    parser.add_argument("--faults", type=parse, default=[], help="KIND:RANK:STEP,... to inject (examples/faults.py)")
    parser.add_argument("--faults-dir", type=Path, default=Path("faults"), help="where it is noted what has struck")
    parser.add_argument("--result", type=Path, help="write the held-out loss there, as JSON")
    return parser.parse_args()


def build_model(config: GPTConfig, *, fsdp: bool) -> nn.Module:
    torch.manual_seed(0)
    model = GPT(config)
    if not fsdp:
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def main() -> None:
    args = parse_arguments()
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    config = GPTConfig()
    model = build_model(config, fsdp=args.fsdp)
    optimizer = make_optimizer(model)
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20) * max(0.1, 1 - step / (1.2 * args.steps)))
    data = StdlibText(config.context)
    loader = DataLoader(data, batch_size=args.batch, sampler=SeededSampler(data, seed=1), drop_last=True)
    faults = FaultScript(args.faults, rank, args.faults_dir)

    arc = Arc(
        model,
        optimizer,
        scheduler=scheduler,
        store=args.store,
        max_grad_norm=1.0,
        checkpoint_every=args.checkpoint_every,
        snapshot_every=args.snapshot_every,
    )

    def loss_fn(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return faults.on_loss(next_byte_loss(model, batch), arc.steps_done + 1)

    began = time.perf_counter()
    for step in arc.train(loss_fn, loader, steps=args.steps):
        if rank == 0 and (step.number % 10 == 0 or step.action != "apply"):
            rate = step.number and args.batch * world_size * config.context / step_seconds(step)
            done = f"step {step.number:4d}/{args.steps}  loss {step.loss:.4f}  {rate:,.0f} bytes/s"
            print(done + (f"  after {step.action}" if step.action != "apply" else ""), flush=True)
        faults.between_steps(model, step.number + 1)

    loss = held_out_loss(model, context=config.context)
    if rank == 0:
        parameters = count_parameters(model)
        print(f"held-out loss {loss:.4f} ({parameters:,} parameters, {time.perf_counter() - began:.1f} s)", flush=True)
        if args.result:
            args.result.write_text(json.dumps({"held_out_loss": loss, "pid": os.getpid()}))
    dist.destroy_process_group()


def step_seconds(step: object) -> float:
    timings = step.timings  # type: ignore[attr-defined]
    return timings.data_s + timings.forward_backward_s + timings.guard_s + timings.update_s


if __name__ == "__main__":
    main()
