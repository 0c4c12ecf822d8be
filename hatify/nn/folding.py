"""Masks multiplied into parameters, remembered while a finished task answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

T = TypeVar("T")

#: What was computed last for each module: from which mask, from what state of its parameters, and the result.
_REMEMBERED: WeakKeyDictionary[nn.Module, tuple[Tensor, tuple[tuple[int, int], ...], object]] = WeakKeyDictionary()


def remembered(module: nn.Module, mask: Tensor, compute: Callable[[], T]) -> T:
    """``compute()``, of the parameters of `module` and of `mask` alone; not repeated while neither changes.

    Only where it pays: in evaluation without gradients, where the masks of finished tasks are always the same tensors.
    A parameter changes with its version, as for autograd: writing to ``parameter.data`` goes unnoticed.
    """
    if module.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return compute()
    parameters = [p for p in module._parameters.values() if p is not None]
    if mask.is_inference() or any(p.is_inference() for p in parameters):
        return compute()
    versions = tuple((p._version, p.data_ptr()) for p in parameters)
    known = _REMEMBERED.get(module)
    if known is None or known[0] is not mask or known[1] != versions:
        known = _REMEMBERED[module] = (mask, versions, compute())
    return known[2]  # type: ignore[return-value]


def forget(network: nn.Module) -> None:
    """Free what is remembered for the modules of `network`."""
    for module in network.modules():
        _REMEMBERED.pop(module, None)
