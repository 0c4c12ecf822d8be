"""How support labels pass through each operation; importing this package registers every rule."""

from hatify.rules import contraction, movement, normalization, pointwise, reduction
from hatify.rules.registry import RULES, Call, Findings, Labels, constant_labels, rule

__all__ = [
    "RULES",
    "Call",
    "Findings",
    "Labels",
    "constant_labels",
    "contraction",
    "movement",
    "normalization",
    "pointwise",
    "reduction",
    "rule",
]
