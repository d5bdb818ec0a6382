"""What the center does with a pushed delta.

A rule is an immutable description; the arithmetic is in the native core (``csrc/kernels/rules.hpp``) and runs inside
the fused pass over each block. ``delta = (theta - anchor) / k`` is the mean update of a worker over its k local steps.
Rules that are optimizers take ``g = -delta`` as their gradient (Douillard et al. 2023, arXiv 2311.08105, algorithm 1),
and ``t`` is the number of pushes that the block has had, this one among them. Slots live at the center; all workers
share them. :class:`Groups` has a rule for each group of arrays.
"""

from .base import FOLLOW, STALENESS, Rule, whole
from .groups import Groups, group_of
from .kinds import SGD, Adagrad, Adam, AdamW, Add, Custom, DelayedNesterov, Elastic, Lion, RMSprop
from .like import like

__all__ = [
    "FOLLOW",
    "SGD",
    "STALENESS",
    "Adagrad",
    "Adam",
    "AdamW",
    "Add",
    "Custom",
    "DelayedNesterov",
    "Elastic",
    "Groups",
    "Lion",
    "RMSprop",
    "Rule",
    "group_of",
    "like",
    "whole",
]
