"""Wherever between two snapshots a DDP rank is killed, the steps that were committed stay committed."""

from __future__ import annotations

from pathlib import Path

import pytest

from ranks import run_supervised

SCRIPT = str(Path(__file__).parent / "scripts" / "kill_at_steps.py")


@pytest.mark.slow
@pytest.mark.parametrize("snapshot_every", [1, 3])
def test_no_committed_step_is_lost(snapshot_every: int, tmp_path: Path):
    # Steps 8, 13, 18 are 2, 1 and 0 steps after a snapshot. The last is not trusted yet when the kill comes, and once
    # was passed over for an older one.
    kills = [(0, 8), (1, 13), (0, 18), (1, 23)]
    plan = ",".join(f"{rank}:{step}" for rank, step in kills)
    log = tmp_path / "steps"
    arguments = (SCRIPT, str(log), str(snapshot_every), plan)
    done = run_supervised(2, *arguments, timeout_s=100, cwd=tmp_path)
    assert done.exit_code == 0, done
    committed: dict[tuple[int, int], list[int]] = {}
    for line in log.read_text().splitlines():
        generation, rank, step = map(int, line.split())
        committed.setdefault((generation, rank), []).append(step)
    starts = [0, *(step for _, step in kills)]
    ends = [*(step for _, step in kills), kills[-1][1] + 5]
    for generation, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for rank in range(2):
            expected = list(range(start + 1, end + 1))
            assert committed[generation, rank] == expected, f"generation {generation}, rank {rank}\n{done}"
