"""A fast path: steps after which locked entries need not be put back, since nothing has moved them.

On a CPU, where copying is what a step notices, putting back is left out after steps of torch's own optimizers without
weight decay, whose gradient has not been written to since it was masked, and whose momentum is zero at locked entries.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hatify.lock.entries import PartlyOwned

#: Optimizers that leave an entry where it is if its gradient and all they remember of it are zero.
_STILL = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop)


class Still:
    """Remembers of each parameter which gradient was masked, and which optimizer states are zero where it is locked."""

    def __init__(self) -> None:
        #: The gradient that was masked last, and its version then.
        self._masked: dict[str, tuple[weakref.ref[Tensor], int]] = {}
        self._clean: dict[str, list[weakref.ref[Tensor]]] = {}

    def note_masked(self, owned: PartlyOwned, gradient: Tensor) -> None:
        """Locked entries of this gradient are zero."""
        self._masked[owned.name] = weakref.ref(gradient), gradient._version

    def moved(
        self, owned: Sequence[PartlyOwned], optimizer: torch.optim.Optimizer, decay: Mapping[int, float]
    ) -> Sequence[PartlyOwned]:
        """Those of the parameters `owned` whose locked entries a step of `optimizer` may have moved.

        A gradient that was written to through ``data`` keeps its version; so some locked entries are looked at.
        """
        moved = [p for p in owned if not self._is_unmoved(p, optimizer, decay[id(p.parameter)])]
        if len(moved) < len(owned) and torch.cat([t for p in owned for t in _sampled(p)]).any():
            return owned
        return moved

    def _is_unmoved(self, owned: PartlyOwned, optimizer: torch.optim.Optimizer, decay: float) -> bool:
        """Whether the gradient was zero, the optimizer of a kind that then moves nothing, and no momentum does.

        What it remembers of locked entries is set to zero here, so that it holds for later steps.
        """
        parameter = owned.parameter
        if type(optimizer) not in _STILL or decay != 0 or parameter.device.type != "cpu":
            return False
        held = optimizer.state.get(parameter, {})
        state = [t for t in held.values() if _is_like(t, parameter)]
        known = self._clean.get(owned.name, [])
        clean = len(state) == len(known) and all(ref() is t for ref, t in zip(known, state, strict=True))
        if not clean:
            for t in state:
                owned.zero(t)
            self._clean[owned.name] = [weakref.ref(t) for t in state]
        seen, version = self._masked.get(owned.name, (None, 0))
        gradient = parameter.grad
        masked = gradient is None or (seen is not None and seen() is gradient and version == gradient._version)
        return clean and masked


def _sampled(owned: PartlyOwned) -> Iterator[Tensor]:
    """For some locked entries, the gradient and what the step has changed."""
    if owned.parameter.grad is not None:
        yield owned.parameter.grad.take(owned.sample)
    yield owned.parameter.take(owned.sample).sub_(owned.saved_sample)


def _is_like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape
