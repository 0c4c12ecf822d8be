"""What optimizers remember of parameters that have been widened since."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor

from hatify.errors import HatError
from hatify.lock.watch import watch
from hatify.widening.widened import Place, into_place

#: Where the indices of each dimension have gone.
Dims = tuple[Place | None, ...]


class Followed:
    """Puts what an optimizer remembers of a parameter in its place, at the first step after that has been widened.

    What is new begins with nothing.
    """

    def __init__(self) -> None:
        #: Of each parameter, by identity: its name, itself, and the shapes that it had, each with what came then.
        self.widened: dict[int, tuple[str, Tensor, list[tuple[torch.Size, Dims]]]] = {}
        watch(self)

    def add(self, name: str, parameter: Tensor, shape: torch.Size, dims: Dims) -> None:
        """A parameter has been widened that had this `shape`, and its entries have gone to `dims`."""
        _, _, steps = self.widened.setdefault(id(parameter), (name, parameter, []))
        steps.append((shape, dims))

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer, held: AbstractSet[int]) -> None:
        """Look at what `optimizer` remembers.

        Raises:
            HatError: something has another shape than the parameter had.
        """
        for key in self.widened.keys() & held:
            name, parameter, steps = self.widened[key]
            state: dict[str, Any] = optimizer.state.get(parameter, {})
            for what, value in state.items():
                if isinstance(value, Tensor) and value.numel() > 1 and not _fits(value, parameter.shape):
                    state[what] = _followed(value, f"{what} of {name}", steps)

    def after_step(self, optimizer: torch.optim.Optimizer, held: AbstractSet[int]) -> None:
        """Nothing is left to be done."""


def _fits(value: Tensor, shape: torch.Size) -> bool:
    """Whether a tensor has this shape, but for dimensions of size 1."""
    return value.ndim == len(shape) and all(n in (1, size) for n, size in zip(value.shape, shape, strict=True))


def _followed(value: Tensor, what: str, steps: Sequence[tuple[torch.Size, Dims]]) -> Tensor:
    """What an optimizer remembers of a parameter that had one of the shapes of `steps`, as the parameter is now."""
    begun = next((i for i, (shape, _) in enumerate(steps) if _fits(value, shape)), None)
    if begun is None:
        raise HatError(
            f"the optimizer's {what} is of shape {tuple(value.shape)}, which cannot be widened along with the "
            "parameter: make a new optimizer"
        )
    for _, dims in steps[begun:]:
        places = [None if n == 1 else place for n, place in zip(value.shape, dims, strict=True)]
        wide = value.new_zeros([n if place is None else place[0] for n, place in zip(value.shape, places, strict=True)])
        value = into_place(value, places, wide)
    return value
