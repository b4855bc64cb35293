"""The account of healing that outlives a process."""

from __future__ import annotations

import torch

from arc_dist.guard import Guard
from arc_dist.healing.ledger import Ledger
from arc_dist.healing.vote import Voter
from arc_dist.protocol.healing import History
from arc_dist.settings import Settings
from arc_dist.snapshot.ring import SnapshotRing
from arc_dist.snapshot.state import TrainingState


def test_an_account_is_read_back_and_replaced_as_a_whole(tmp_path):
    ledger = Ledger(tmp_path)
    assert ledger.read() is None
    for number in range(3):
        ledger.write({"history": {"decisions": number}, "skipped": list(range(number))})
        assert Ledger(tmp_path).read() == {"history": {"decisions": number}, "skipped": list(range(number))}
    assert [path.name for path in tmp_path.iterdir()] == ["healing.json"]


def test_without_a_directory_nothing_is_kept():
    ledger = Ledger(None)
    ledger.write({"history": {}})
    assert ledger.read() is None


def test_what_cannot_be_read_or_written_is_said_and_stops_nothing(tmp_path, caplog):
    caplog.set_level("WARNING", logger="arc_dist")
    ledger = Ledger(tmp_path)
    ledger.path.write_text('{"history":')
    assert ledger.read() is None
    assert "cannot be read" in caplog.text
    ledger.path.write_text("[]")
    assert ledger.read() is None
    gone = Ledger(tmp_path / "gone")
    gone.write({"history": {}})
    assert "would be lost" in caplog.text


def test_a_guard_that_sees_no_loss_gives_budgets_back_too():
    """What a script that knows nothing of us has: gradients are judged, and nothing else."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ring = SnapshotRing(None)
    guard = Guard(
        state=TrainingState({"": model}, {"": optimizer}),
        settings=Settings(),
        voter=Voter(),
        ring=ring,
        replicated=False,
        norm_is_global=False,
    )
    policy = guard.settings.policy
    guard.history = History(skips_in_a_row=3, lr_scale=0.5, healthy_in_a_row=policy.lr_restore_after)
    guard.follow(guard.history)
    try:
        assert guard.rate.factor == 0.5
        assert guard.conclude_gradient(1.0, 0) is None
        assert guard.history.skips_in_a_row == 0
        assert guard.rate.factor == 0.5 + (1 - policy.lr_cut) / policy.ramp_steps
    finally:
        ring.close()
