"""A rung and a policy of one's own: after spikes the last layer begins anew. Run it with python or arcrun."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from arc_dist import Arc, HealingPolicy
from arc_dist.healing import Case, OwnRung, register
from arc_dist.protocol.flags import Flag
from arc_dist.protocol.ladder import Evidence


@register
class ZeroLast(OwnRung):
    """The last layer begins at zero again."""

    name = "zero_last"

    def heal(self, case: Case) -> str:
        weight = list(case.models[""].parameters())[-2]
        torch.nn.init.zeros_(weight)
        return f"{weight.numel()} weights are zero"


class SpikesAtOnce(HealingPolicy):
    """Explosions are not skipped: the newest snapshot, then the rung above, then an escape."""

    def ladder_for(self, evidence: Evidence) -> Sequence[str]:
        if evidence.flags & (Flag.LOSS_EXPLOSION | Flag.GRAD_EXPLOSION):
            return ("rollback", "zero_last", "escape")
        return self.ladder


def main() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    data = [(torch.randn(8, 32), torch.randn(8, 1)) for _ in range(80)]
    spikes = 2

    def loss_fn(batch: Any) -> torch.Tensor:
        nonlocal spikes
        loss = torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        if arc.steps_done + 1 == 30 and spikes:
            spikes -= 1
            return loss * 1e6
        return loss

    def heard(incident: dict[str, Any]) -> None:
        print("heard of", incident["action"], incident.get("changed"))

    optimizer = torch.optim.AdamW(model.parameters())
    arc = Arc(model, optimizer, snapshot_every=5, policy=SpikesAtOnce(), on_incident=heard)
    for step in arc.train(loss_fn, data):
        if step.action != "apply":
            print(step.number, step.action, step.reason)


if __name__ == "__main__":
    main()
