"""The training script of bench_restart.py: the same model and data with `Arc`, and with torchrun and a DCP checkpoint.

Every committed step appends "<monotonic ns> <rank> <pid> <generation> <step>" to a file, so that the parent can tell
when training went on after it killed a rank. Each process also notes how long the script itself took to build the
model and to wrap it, which no way of restarting saves.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from gpt import GPT, GPTConfig

STEPS = 1_000_000  # it is ended from outside
CHECKPOINT_EVERY = 100
CONTEXT = 64


def build(name: str) -> tuple[nn.Module, TensorDataset, int]:
    """A model, its data, and the rows of a batch."""
    if name == "gpt10m":
        tokens = torch.randint(0, 256, (4096, CONTEXT + 1))
        return GPT(GPTConfig.m10()), TensorDataset(tokens[:, :-1], tokens[:, 1:]), 2
    layers = (nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 42))
    return nn.Sequential(*layers), TensorDataset(torch.randn(4096, 64), torch.randint(0, 42, (4096,))), 64


def main() -> None:
    """Trains until it is killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("arm", choices=("arc", "resilient", "torchrun"))
    parser.add_argument("model", choices=("mlp", "gpt10m"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--hang-factor", type=float, default=10.0)
    parser.add_argument("--hang-min-s", type=float, default=60.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    log = os.open(arguments.directory / "steps", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    began = time.monotonic()
    plain, data, rows = build(arguments.model)
    model = DistributedDataParallel(plain)
    with (arguments.directory / "builds").open("a") as builds:
        builds.write(f"{time.monotonic() - began}\n")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def loss_fn(batch: list[torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())

    def committed(step: int) -> None:
        generation = os.environ["TORCHELASTIC_RESTART_COUNT"]
        os.write(log, f"{time.monotonic_ns()} {dist.get_rank()} {os.getpid()} {generation} {step}\n".encode())

    if arguments.arm != "torchrun":
        from arc_dist import Arc
        from arc_dist.data.sampler import SeededSampler

        store = f"{arguments.directory / 'store'}?keep=last=3" if arguments.store else None
        arc = Arc(
            model,
            optimizer,
            max_grad_norm=1.0,
            store=store,
            checkpoint_every=CHECKPOINT_EVERY,
            hang_factor=arguments.hang_factor,
            hang_min_s=arguments.hang_min_s,
        )
        for result in arc.train(loss_fn, DataLoader(data, rows, sampler=SeededSampler(data)), steps=STEPS):
            committed(result.number)
        return
    path = arguments.directory / "dcp"
    step = load(path, model, optimizer)
    sampler = DistributedSampler(data)
    for epoch in range(STEPS):
        sampler.set_epoch(epoch)
        for batch in DataLoader(data, rows, sampler=sampler):
            loss_fn(batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % CHECKPOINT_EVERY == 0:
                save(path, model, optimizer, step)
            committed(step)


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """A classic DCP checkpoint in a directory of its own; the link to the newest is renamed into place."""
    import torch.distributed.checkpoint as dcp  # here, because our arm does not need it
    from torch.distributed.checkpoint.state_dict import get_state_dict

    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save({**state, "step": step}, checkpoint_id=path.with_name(f"dcp-{step}"))
    if dist.get_rank() == 0:
        old = path.resolve() if path.exists() else None
        draft = path.with_name("draft")
        draft.symlink_to(path.with_name(f"dcp-{step}"))
        draft.replace(path)
        if old is not None:
            shutil.rmtree(old)
    dist.barrier()


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Loads the newest DCP checkpoint, if there is one; returns its step."""
    if not path.exists():
        return 0
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "step": 0}
    dcp.load(state, checkpoint_id=path.resolve())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(state["step"])


if __name__ == "__main__":
    if "resilient" in sys.argv[1:2]:
        from arc_dist import resilient

        main = resilient(main)
    main()
