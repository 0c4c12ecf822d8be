"""Equation 2: which entries finished tasks own, how to reach them, and what they held."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hatify.nn.per_task import PER_TASK, owned_by
from hatify.nn.state import TaskState
from hatify.slots import Use


def locked_entries(uses: Iterable[Use], masks: Tensor, shape: torch.Size, base: Tensor | None = None) -> Tensor:
    """Equation 2, exactly: an entry is locked where some task has both the feature it writes and the one it reads on.

    The printed form compares the cumulative maxima over tasks, and so also locks entries between a feature that only
    one task uses and a feature that only another one uses.

    Of a locked base, every entry is locked that writes one of its features: it reads nothing beside itself.

    Args:
        uses: how the parameter's entries connect features.
        masks: the finished tasks' binary masks, bool, shape (tasks, slots).
        shape: the parameter's shape.
        base: the features of a locked base, bool, shape (slots,).

    Returns:
        bool, of the parameter's shape.
    """
    locked = torch.zeros((1,) * len(shape), dtype=torch.bool, device=masks.device)
    for mask in (*masks, *(() if base is None else (base,))):
        extended = torch.cat((mask, mask.new_ones(1)))
        for use in uses:
            entries = extended[use.written.to(mask.device)].any(-1)
            if use.read is not None and mask is not base:
                entries = entries & extended[use.read.to(mask.device)].any(-1)
            locked = locked | entries
    return locked.expand(shape)


#: Up to this share of free runs, it is faster to set those aside and copy all than to write the locked ones.
FEW = 1 / 5
#: Entries that come one by one are reached by their numbers up to this share: a number takes more memory than an entry.
SINGLE = 2 / 5


class PartlyOwned:
    """A parameter some of whose entries are locked, and what it held.

    Locked entries come in runs, such as the kernels of a convolution, or whole rows. They are reached by the numbers of
    their runs, or, where nearly all are locked, by those of the free ones: that moves less memory than a mask over all
    entries does (benchmarks/putting_back.py). No way can be fooled by values that are not finite.

    Args:
        name: the parameter's name.
        parameter: the parameter.
        saved: what it holds that is to stay.
        lock: bool, of the parameter's shape; True for locked entries.
        with_free: keep what free entries hold, too.
    """

    def __init__(self, name: str, parameter: nn.Parameter, saved: Tensor, lock: Tensor, with_free: bool) -> None:
        self.name, self.parameter, self.lock = name, parameter, lock
        self.run = _length_of_runs(lock)
        is_locked = self._runs_locked()
        locked, free = (chosen.nonzero().squeeze(1) for chosen in (is_locked, ~is_locked))
        by_numbers, few = parameter.is_contiguous(), len(free) <= FEW * len(is_locked)
        #: The numbers of the free runs, or of the locked ones, if that is how these are reached.
        self.free = free if by_numbers and few else None
        self.locked = (
            locked if by_numbers and not few and (self.run > 1 or len(locked) <= SINGLE * len(is_locked)) else None
        )
        #: What the locked runs held, or all of the parameter; and what the free ones held, if it is kept apart.
        self._kept = saved if self.locked is None else saved.reshape(-1, self.run)[self.locked]
        self._free = saved.reshape(-1, self.run)[free] if self.locked is not None and with_free else None

    def _runs_locked(self) -> Tensor:
        return self.lock.reshape(-1, self.run)[:, 0]

    @property
    def saved(self) -> Tensor:
        """What the parameter held; where that of free entries is not kept, what they hold."""
        if self.locked is None:
            return self._kept
        is_locked = self._runs_locked()
        of_free = self.parameter.detach().reshape(-1, self.run)[~is_locked] if self._free is None else self._free
        runs = self._kept.new_empty(len(is_locked), self.run)
        runs[is_locked], runs[~is_locked] = self._kept, of_free
        return runs.view(self.lock.shape)

    def restore(self) -> None:
        """Put the locked entries back."""
        self._write(self.parameter, self._kept)

    def zero(self, tensor: Tensor) -> None:
        """Zero the locked entries of a tensor of the parameter's shape."""
        self._write(tensor, None)

    def _write(self, tensor: Tensor, kept: Tensor | None) -> None:
        """Write what was kept, or zeros, into the locked entries of `tensor`."""
        if self.locked is not None and tensor.is_contiguous():
            runs = tensor.view(-1, self.run)
            runs.index_fill_(0, self.locked, 0) if kept is None else runs.index_copy_(0, self.locked, kept)
        elif self.free is not None and tensor.is_contiguous():
            runs = tensor.view(-1, self.run)
            aside = runs[self.free]
            tensor.zero_() if kept is None else tensor.copy_(kept)
            runs.index_copy_(0, self.free, aside)
        elif kept is None:
            tensor.masked_fill_(self.lock, 0)
        else:
            torch.where(self.lock, self.saved, tensor, out=tensor)

    def changed(self) -> int:
        """How many locked entries are not what they were."""
        if self.locked is None or not self.parameter.is_contiguous():
            return int(((self.parameter != self.saved) & self.lock).sum())
        return int((self.parameter.view(-1, self.run)[self.locked] != self._kept).sum())


def _length_of_runs(lock: Tensor) -> int:
    """How many entries that lie side by side are locked together: those along which `lock` was expanded."""
    length = 1
    for size, stride in zip(reversed(lock.shape), reversed(lock.stride()), strict=True):
        if size > 1 and stride:
            break
        length *= size
    return length


def first_of(lock: Tensor) -> int:
    """The flat index of an entry that is locked."""
    return int(lock.reshape(-1).to(torch.uint8).argmax())


@dataclass(frozen=True)
class WhollyOwned:
    """A tensor that belongs to finished tasks as a whole."""

    name: str
    parameter: Tensor
    saved: Tensor

    def restore(self) -> None:
        """Put the values back."""
        self.parameter.copy_(self.saved)

    def changed(self) -> int:
        """How many entries are not what they were."""
        return int((self.parameter != self.saved).sum())


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer, by name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def owned_by_tasks(model: nn.Module, tasks: Iterable[int]) -> list[Tensor]:
    """Every tensor of which each of `tasks` has its own, the embeddings included."""
    modules = [m for m in model.modules() if isinstance(m, PER_TASK)]
    owned = {id(t): t for task in tasks for m in modules for t in owned_by(m, task)}
    states = [m for m in model.modules() if isinstance(m, TaskState)]
    owned |= {id(e): e for task in tasks for state in states for e in [state.embeddings[task]]}
    return list(owned.values())
