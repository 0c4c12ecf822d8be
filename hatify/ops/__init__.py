"""What is known of each operation; importing this package registers all of them, one file for each family."""

from hatify.ops import contraction, movement, normalization, pointwise, reduction
from hatify.ops.registry import (
    OPERATIONS,
    Along,
    Call,
    Findings,
    Labels,
    Operation,
    Trait,
    alike,
    constant_labels,
    has_trait,
    op,
    operation_of,
)

__all__ = [
    "OPERATIONS",
    "Along",
    "Call",
    "Findings",
    "Labels",
    "Operation",
    "Trait",
    "alike",
    "constant_labels",
    "contraction",
    "has_trait",
    "movement",
    "normalization",
    "op",
    "operation_of",
    "pointwise",
    "reduction",
]
