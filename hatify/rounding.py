"""Whether two values are the same but for rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Largest difference that rounding explains in single precision, in units of the largest number in a value.
ROUNDING = 1e-3


def agree(found: Any, expected: Tensor, operands: list[Tensor]) -> bool:
    """Whether a value is what it should be, but for rounding: of itself, or of large operands that cancel."""
    if not isinstance(found, Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not expected.is_floating_point() or not expected.numel():
        return True
    rounding = max(ROUNDING, 10 * torch.finfo(expected.dtype).eps)
    largest = max(_largest(t) for t in (expected, *operands) if t.is_floating_point())
    if float((found - expected).abs().max()) <= rounding * largest:
        return True
    return torch.allclose(found, expected, rounding, rounding * largest, equal_nan=True)


def _largest(value: Tensor) -> float:
    """The largest finite number."""
    magnitude = value.abs()
    if not magnitude.isfinite().all():
        magnitude = magnitude[magnitude.isfinite()]
    return float(magnitude.max()) if magnitude.numel() else 0.0
