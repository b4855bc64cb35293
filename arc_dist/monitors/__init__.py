"""Monitors: each reads one health signal inside a rank and raises flags.

A monitor never communicates and never acts. It is fed by accepted steps only, its statistics are robust (median and
median absolute deviation), and they travel with snapshots, so that one bad value can neither blind it nor be forgotten.
"""

from arc_dist.monitors.base import Cost, Finding, Monitor, Part, Policy, Sees, register
from arc_dist.monitors.batches import LabelRange, NonfiniteBatch, RepeatedBatches
from arc_dist.monitors.gradient import GradientMonitor
from arc_dist.monitors.gradients import DeadNeurons, GradientConsistency, GradientEntropy, GradientLayers
from arc_dist.monitors.learning_rate import LearningRateMonitor
from arc_dist.monitors.loss import LossMonitor
from arc_dist.monitors.optimizers import Hyperparameters, SecondMoment
from arc_dist.monitors.outputs import output_diversity, output_entropy
from arc_dist.monitors.series import LossDivergence, LossPlateau, LossSpike, MetricCollapse, MetricNonfinite, Point
from arc_dist.monitors.state import StateProbe
from arc_dist.monitors.weights import EffectiveRank, WeightHealth, WeightNorm, WeightSparsity

__all__ = [
    # the ones that act in the very step
    "GradientMonitor",
    "LearningRateMonitor",
    "LossMonitor",
    "StateProbe",
    # what a monitor of one's own is made of
    "Cost",
    "Finding",
    "Monitor",
    "Part",
    "Point",
    "Policy",
    "Sees",
    "register",
    # measures for `Arc.observe`
    "output_diversity",
    "output_entropy",
    # the monitors by name
    "DeadNeurons",
    "EffectiveRank",
    "GradientConsistency",
    "GradientEntropy",
    "GradientLayers",
    "Hyperparameters",
    "LabelRange",
    "LossDivergence",
    "LossPlateau",
    "LossSpike",
    "MetricCollapse",
    "MetricNonfinite",
    "NonfiniteBatch",
    "RepeatedBatches",
    "SecondMoment",
    "WeightHealth",
    "WeightNorm",
    "WeightSparsity",
]
