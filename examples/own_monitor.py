"""A monitor of one's own: weights that saturate are rolled back. Run it with python or arcrun."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from arc_dist import Arc
from arc_dist.monitors import Finding, Monitor, Part, Sees, register


@register
class Saturated(Monitor):
    """Too many weights of a layer lie beyond a limit."""

    name = "saturated"
    sees = Sees.WEIGHT

    def __init__(self, *, limit: float = 3.0, share: float = 0.5) -> None:
        self.limit, self.share = limit, share

    def look(self, subject: Part) -> Iterable[Finding]:
        outside = float((subject.sample().abs() > self.limit).float().mean())
        if outside > self.share:
            yield self.found(subject.name, outside, self.share)


def main() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(32, 1)
    data = [(0.01 * torch.randn(8, 32), torch.randn(8, 1)) for _ in range(60)]
    arc = Arc(
        model,
        torch.optim.AdamW(model.parameters()),
        snapshot_every=5,
        monitors=("standard", "saturated"),
        monitor_options={"saturated": {"policy": "rollback"}},
        monitor_budget=1.0,  # the steps of this model are too short for 1 %
    )
    hurt = False
    for step in arc.train(lambda batch: torch.nn.functional.mse_loss(model(batch[0]), batch[1]), data):
        if step.action != "apply":
            print(step.number, step.action, step.reason)
        if step.number == 30 and not hurt:
            hurt = True
            model.weight.data += 4.0


if __name__ == "__main__":
    main()
