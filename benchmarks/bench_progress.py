"""What saying where a step is costs the step: the section changes of one step of `Arc.train`, and nothing else.

The page is a real one in the memory file system, as under a supervisor; a block is 20,000 steps without anything in
them, and the figure is the median of its processor time over blocks, with its 95 % interval. The target is 5 us per
step.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from arc_dist.protocol.hangs import HangPolicy, Section
from arc_dist.sections import Sections
from arc_dist.snapshot.progress import ProgressPage
from stats import describe, setting

_STEPS = 20_000


def one_block(sections: Sections, first: int, micro_batches: int) -> float:
    """Microseconds per step."""
    data, forward = int(Section.DATA), int(Section.FORWARD)
    backward, vote, update, script = (
        int(Section.BACKWARD),
        int(Section.VOTE),
        int(Section.UPDATE),
        int(Section.SCRIPT),
    )
    began = time.process_time()
    for step in range(first, first + _STEPS):
        sections.begin_step(step, data)
        for _ in range(micro_batches):
            sections.enter_computing(forward)
            sections.enter_computing(backward)
        sections.enter_computing(vote)
        sections.enter(update)
        sections.enter(script)
    return (time.process_time() - began) / _STEPS * 1e6


def empty_block() -> float:
    """The same loop with nothing in it."""
    began = time.process_time()
    for _ in range(_STEPS):
        pass
    return (time.process_time() - began) / _STEPS * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, default=40)
    args = parser.parse_args()
    print(setting())
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        ProgressPage.create(Path(directory)).close()
        sections = Sections(HangPolicy(), 1.5)
        sections.attach(Path(directory), 0)
        for micro_batches in (1, 4):
            one_block(sections, 1, micro_batches)
            times = [one_block(sections, n * _STEPS, micro_batches) - empty_block() for n in range(args.blocks)]
            print(f"section changes of a step, {micro_batches} micro-batches: {describe(times, 'us')}; target 5 us")


if __name__ == "__main__":
    main()
