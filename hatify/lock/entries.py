"""Equation 2: which entries finished tasks own, how to reach them, and what they held."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hatify.nn.per_task import PER_TASK, owned_by

if TYPE_CHECKING:
    from hatify.model import HatModel
    from hatify.slots import Use


def locked_entries(uses: Iterable[Use], masks: Tensor, shape: torch.Size) -> Tensor:
    """Equation 2, exactly: an entry is locked where some task has both the feature it writes and the one it reads on.

    The printed form compares the cumulative maxima over tasks, and so also locks entries between a feature that only
    one task uses and a feature that only another one uses.

    Args:
        uses: how the parameter's entries connect features.
        masks: the finished tasks' binary masks, bool, shape (tasks, slots).
        shape: the parameter's shape.

    Returns:
        bool, of the parameter's shape.
    """
    locked = torch.zeros((1,) * len(shape), dtype=torch.bool, device=masks.device)
    for mask in masks:
        extended = torch.cat((mask, mask.new_ones(1)))
        for use in uses:
            entries = extended[use.written.to(mask.device)].any(-1)
            if use.read is not None:
                entries = entries & extended[use.read.to(mask.device)].any(-1)
            locked = locked | entries
    return locked.expand(shape)


#: From this share of locked runs on, it is faster to set the free ones aside.
MOST = 7 / 8


class PartlyOwned:
    """A parameter some of whose entries are locked.

    Where locked entries come in runs, as the kernels of a convolution do, they are reached by the numbers of the runs,
    which moves far less memory than a mask over all entries; where nearly all are locked, by those of the free ones.
    No way can be fooled by values that are not finite.

    Args:
        name: the parameter's name.
        parameter: the parameter.
        saved: its values when the task was opened.
        lock: bool, of the parameter's shape; True for locked entries.
    """

    def __init__(self, name: str, parameter: nn.Parameter, saved: Tensor, lock: Tensor) -> None:
        self.name, self.parameter, self.saved = name, parameter, saved
        self.kernel = parameter.shape[2:].numel() if parameter.ndim > 2 else 1
        self.lock = lock
        per_kernel = self.kernel > 1 and all(stride == 0 for stride in lock.stride()[2:]) and parameter.is_contiguous()
        kernels = lock.reshape(-1, self.kernel)[:, 0] if per_kernel else None
        self.runs = None if kernels is None else kernels.nonzero().squeeze(1)
        #: The runs that are free, if these are few.
        self.free: Tensor | None = None
        if kernels is not None and self.runs is not None and len(self.runs) > MOST * len(kernels):
            self.free = (~kernels).nonzero().squeeze(1)
        self.sample = some_of(lock)
        self.saved_sample = saved.take(self.sample)

    def restore(self) -> None:
        """Put the locked entries back."""
        if self.runs is None:
            torch.where(self.lock, self.saved, self.parameter, out=self.parameter)
        else:
            self._write(self.parameter, self.saved)

    def is_restored_in(self, tensor: Tensor) -> bool:
        """Whether the locked entries of `tensor` are what was saved."""
        if self.runs is None or not tensor.is_contiguous():
            return torch.equal(torch.where(self.lock, tensor, self.saved), self.saved)
        now, then = (t.view(-1, self.kernel)[self.runs] for t in (tensor, self.saved))
        return torch.equal(now, then)

    def zero(self, tensor: Tensor) -> None:
        """Zero the locked entries of a tensor of the parameter's shape."""
        if self.runs is not None and tensor.is_contiguous():
            self._write(tensor, None)
        else:
            tensor.masked_fill_(self.lock, 0)

    def _write(self, tensor: Tensor, values: Tensor | None) -> None:
        """Write the locked runs of `values`, or zeros, into `tensor`."""
        assert self.runs is not None
        to, source = tensor.view(-1, self.kernel), None if values is None else values.view(-1, self.kernel)
        if self.free is not None:
            kept = to[self.free]
            (to.zero_() if source is None else to.copy_(source)).index_copy_(0, self.free, kept)
        elif source is None:
            to.index_fill_(0, self.runs, 0)
        else:
            to.index_copy_(0, self.runs, source[self.runs])


def some_of(lock: Tensor, count: int = 512) -> Tensor:
    """The flat indices of up to `count` entries that are locked, in different rows."""
    rows = lock.reshape(lock.shape[0], -1)
    chosen = rows.any(1).nonzero().squeeze(1)
    chosen = chosen[:: max(1, len(chosen) // count)]
    return chosen * rows.shape[1] + rows[chosen].to(torch.uint8).argmax(1)


@dataclass
class WhollyOwned:
    """A tensor that belongs to finished tasks as a whole."""

    name: str
    parameter: Tensor
    saved: Tensor
    version: int

    def restore(self) -> None:
        """Put the values back."""
        self.parameter.copy_(self.saved)
        self.version = self.parameter._version

    def is_restored_in(self, tensor: Tensor) -> bool:
        """Whether `tensor` is what was saved."""
        return torch.equal(tensor, self.saved)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer, by name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def owned_by_tasks(model: HatModel, tasks: Iterable[int]) -> list[Tensor]:
    """Every tensor of which each of `tasks` has its own, the embeddings included."""
    modules = [m for m in model.modules() if isinstance(m, PER_TASK)]
    owned = {id(t): t for task in tasks for m in modules for t in owned_by(m, task)}
    owned |= {id(e): e for task in tasks for e in [model.task_state.embeddings[task]]}
    return list(owned.values())
