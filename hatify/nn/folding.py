"""Masks multiplied into parameters, remembered while a finished task answers."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

T = TypeVar("T")

#: The state of a parameter: which one, its version, and where it lies in memory.
State = tuple[weakref.ref[Tensor], int, int]

#: What was computed last for each module: from which mask, from what states of its parameters, and the result.
_REMEMBERED: WeakKeyDictionary[nn.Module, tuple[Tensor, list[State], object]] = WeakKeyDictionary()


def is_transformed() -> bool:
    """Whether the call is compiled, or transformed by ``torch.func``, so that tensors are not what they seem."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def can_be_remembered() -> bool:
    """Whether what a call computes may be kept for others: not if it is transformed or recorded."""
    return not (is_transformed() or torch.jit.is_tracing())


def remembered(module: nn.Module, mask: Tensor, compute: Callable[[], T]) -> T:
    """``compute()``, of the parameters of `module` and of `mask` alone; not repeated while neither changes.

    Only where it pays: in evaluation without gradients, where the masks of finished tasks are always the same tensors.
    A parameter changes with its version, as for autograd: writing to ``parameter.data`` goes unnoticed.
    """
    if module.training or torch.is_grad_enabled() or not can_be_remembered():
        return compute()
    parameters = [p for p in module._parameters.values() if p is not None]
    if mask.is_inference() or any(p.is_inference() for p in parameters):
        return compute()
    known = _REMEMBERED.get(module)
    if known is not None and known[0] is mask and _are_in(known[1], parameters):
        return known[2]  # type: ignore[return-value]
    result = compute()
    _REMEMBERED[module] = (mask, [(weakref.ref(p), p._version, p.data_ptr()) for p in parameters], result)
    return result


def _are_in(states: list[State], parameters: list[nn.Parameter]) -> bool:
    """Whether `parameters` are the same objects, as they were then: memory may be used again by others."""
    return len(states) == len(parameters) and all(
        ref() is p and version == p._version and place == p.data_ptr()
        for (ref, version, place), p in zip(states, parameters, strict=True)
    )


def release(network: nn.Module) -> None:
    """Free what is remembered for the modules of `network`."""
    for module in network.modules():
        _REMEMBERED.pop(module, None)
