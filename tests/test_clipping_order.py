"""With parameters in groups, clipping is still what ``clip_grad_norm_(model.parameters())`` does, bit for bit."""

from __future__ import annotations

import torch
from torch import nn

from arc_dist import Arc
from toy import Toy, build_loader, digest

STEPS = 20
TOY = Toy()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(33)
        self.inner = nn.Linear(33, 33)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(self.norm(x)).relu()


def parts():
    torch.manual_seed(3)
    # Many tensors, so that the order in which their norms are summed shows.
    model = nn.Sequential(nn.Linear(16, 33), *(Residual() for _ in range(12)), nn.Linear(33, 4))
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": matrices}]  # not the model's order
    return model, torch.optim.AdamW(groups, lr=3e-3)


def test_groups_of_parameters_change_no_bit():
    model, optimizer = parts()
    batches = iter(build_loader(TOY))
    for _ in range(STEPS):
        x, y = next(batches)
        nn.functional.mse_loss(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    expected = digest(model, [optimizer])

    model, optimizer = parts()
    arc = Arc(model, optimizer, max_grad_norm=0.1)
    for _ in arc.train(lambda batch: nn.functional.mse_loss(model(batch[0]), batch[1]), build_loader(TOY), steps=STEPS):
        pass
    assert digest(model, [optimizer]) == expected
