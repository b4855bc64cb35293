"""Measures of a model's output against mode collapse, for scripts to tell: ``arc.observe("output_entropy", ...)``.

The `MetricCollapse` monitor judges them by their names. They need the model's outputs, which only the script has.
"""

from __future__ import annotations

import math

import torch


def output_entropy(logits: torch.Tensor) -> float:
    """Entropy of the mean prediction over log(classes): near 1 for varied answers, 0 when all inputs get the same.

    Args:
        logits: (..., classes), before softmax; any floating dtype and device.

    Returns:
        A number in [0, 1]; NaN when a logit is not finite.

    Raises:
        ValueError: fewer than two classes, or no rows.
    """
    if logits.dim() < 1 or logits.shape[-1] < 2 or logits.numel() == 0:
        raise ValueError(f"output_entropy: logits of shape {tuple(logits.shape)} must be (..., classes), classes >= 2")
    with torch.no_grad():
        mean = torch.softmax(logits.detach().reshape(-1, logits.shape[-1]).float(), dim=-1).mean(dim=0)
        return float(torch.special.entr(mean).sum()) / math.log(logits.shape[-1])


def output_diversity(samples: torch.Tensor) -> float:
    """How much samples of a batch differ, against how much their values vary: 0 when all samples are alike.

    The mean variance over the batch divided by the variance of all values: about 1 for independent samples.

    Args:
        samples: (batch, ...), for instance a generator's images; any floating dtype and device.

    Raises:
        ValueError: fewer than two samples.
    """
    if samples.dim() < 1 or samples.shape[0] < 2 or samples.numel() == 0:
        raise ValueError(f"output_diversity: samples of shape {tuple(samples.shape)} must be (batch >= 2, ...)")
    with torch.no_grad():
        flat = samples.detach().reshape(samples.shape[0], -1).float()
        between = flat.var(dim=0).mean()
        overall = flat.var()
        if flat.shape[1] == 1:
            return float(between / (flat.square().mean() + 1e-30))
        return float(between / (overall + 1e-30))
