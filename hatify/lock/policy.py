"""Lock policies: what becomes of entries that finished tasks own, in parameters that an open task may use as well."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from hatify.lock.entries import PartlyOwned


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
    def after_step(self, owned: Sequence[PartlyOwned]) -> None:
        """Put right what a step has done to the parameters `owned`, which it updates."""


class Hard(LockPolicy):
    """Locked entries take no gradient (Equation 2), and are after every step what they were before."""

    exact = True

    def limit_gradient(self, owned: PartlyOwned, parameter: nn.Parameter) -> None:
        if parameter.grad is not None and not parameter.grad.is_sparse:
            owned.zero(parameter.grad)

    def after_step(self, owned: Sequence[PartlyOwned]) -> None:
        for parameter in owned:
            parameter.restore()
