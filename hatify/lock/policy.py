"""Lock policies: what becomes of entries that finished tasks own, in parameters that an open task may use as well."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import nn

from hatify.lock.entries import PartlyOwned
from hatify.lock.still import Still


class LockPolicy(ABC):
    """What happens to the gradient of a partly owned parameter, and what is put back after a step.

    Attributes:
        exact: whether finished tasks answer as before, bit for bit.
    """

    exact: ClassVar[bool]

    @abstractmethod
    def limit_gradient(self, owned: PartlyOwned, parameter: nn.Parameter) -> None:
        """Change ``parameter.grad``, which has just been accumulated, in place."""

    @abstractmethod
    def after_step(
        self, owned: Sequence[PartlyOwned], optimizer: torch.optim.Optimizer, decay: Mapping[int, float]
    ) -> None:
        """Put right what a step of `optimizer` has done to the parameters `owned`.

        Args:
            owned: those that it updates.
            optimizer: the optimizer.
            decay: the weight decay of each parameter, by identity.
        """


class Hard(LockPolicy):
    """Locked entries take no gradient (Equation 2), and are after every step what they were before."""

    exact = True

    def __init__(self) -> None:
        self._still = Still()

    def limit_gradient(self, owned: PartlyOwned, parameter: nn.Parameter) -> None:
        gradient = parameter.grad
        if gradient is not None and not gradient.is_sparse:
            owned.zero(gradient)
            self._still.note_masked(owned, gradient)

    def after_step(
        self, owned: Sequence[PartlyOwned], optimizer: torch.optim.Optimizer, decay: Mapping[int, float]
    ) -> None:
        for parameter in self._still.moved(owned, optimizer, decay):
            parameter.restore()
