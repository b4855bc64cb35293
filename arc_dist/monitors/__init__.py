"""Monitors: each reads one health signal inside a rank and raises flags.

A monitor never communicates and never acts. It is fed by accepted steps only, its statistics are robust (median and
median absolute deviation), and they travel with snapshots, so that one bad value can neither blind it nor be forgotten.
"""

from arc_dist.monitors.gradient import GradientMonitor
from arc_dist.monitors.learning_rate import LearningRateMonitor
from arc_dist.monitors.loss import LossMonitor
from arc_dist.monitors.state import StateProbe

__all__ = ["GradientMonitor", "LearningRateMonitor", "LossMonitor", "StateProbe"]
